package offloadhook

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// rig is a receiver with all that it does recorded. A bubble that ends with a goroutine of it left fails the test.
type rig struct {
	*Receiver
	store *spyStore

	mu       sync.Mutex // protects what follows
	observed []Observation
	calls    []call
}

// call is one call of a callback.
type call struct {
	field string // of Callbacks
	id    string
	at    time.Time
}

type callback = func(ctx context.Context, env *Envelope) error

// newRig makes a receiver whose callbacks all call f; nil means that they succeed.
func newRig(t testing.TB, f callback, opts ...Option) *rig {
	t.Helper()
	r := &rig{store: new(spyStore)}
	called := func(ctx context.Context, env *Envelope, field string) error {
		r.mu.Lock()
		r.calls = append(r.calls, call{field, env.EventID, time.Now()})
		r.mu.Unlock()
		if f == nil {
			return nil
		}
		return f(ctx, env)
	}
	cb := Callbacks{
		CaseCompleted: func(ctx context.Context, env *Envelope, _ *CaseCompleted) error {
			return called(ctx, env, "CaseCompleted")
		},
		CaseFailed: func(ctx context.Context, env *Envelope, _ *CaseFailed) error {
			return called(ctx, env, "CaseFailed")
		},
		CaseInputNeeded: func(ctx context.Context, env *Envelope, _ *CaseInputNeeded) error {
			return called(ctx, env, "CaseInputNeeded")
		},
		Other: func(ctx context.Context, env *Envelope) error { return called(ctx, env, "Other") },
	}
	r.Receiver = Handler(cb, append([]Option{WithDeduper(r.store), WithObserver(r.record)}, opts...)...)
	t.Cleanup(func() { _ = r.Shutdown(context.Background()) })
	return r
}

func (r *rig) record(_ context.Context, o Observation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.observed = append(r.observed, o)
}

// observations returns what the observer was told of id, and of nothing in particular for "". A callback may end before
// the observer has been told that its event was accepted; here Accepted comes first.
func (r *rig) observations(id string) (told []Observation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range r.observed {
		switch {
		case (o.Envelope == nil) != (id == "") || o.Envelope != nil && o.Envelope.EventID != id:
		case o.Outcome == Accepted:
			told = slices.Insert(told, 0, o)
		default:
			told = append(told, o)
		}
	}
	return told
}

// outcomes returns the outcomes among them.
func (r *rig) outcomes(id string) (outcomes []Outcome) {
	for _, o := range r.observations(id) {
		outcomes = append(outcomes, o.Outcome)
	}
	return outcomes
}

// count returns how often the observer was told outcome.
func (r *rig) count(outcome Outcome) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range r.observed {
		if o.Outcome == outcome {
			n++
		}
	}
	return n
}

// called returns the ids of the events whose callbacks were called, in that order.
func (r *rig) called() (ids []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.calls {
		ids = append(ids, c.id)
	}
	return ids
}

// times returns when the callback was called for id.
func (r *rig) times(id string) (times []time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.calls {
		if c.id == id {
			times = append(times, c.at)
		}
	}
	return times
}

// deliver delivers an event that must be new.
func (r *rig) deliver(t testing.TB, id, caseID string) {
	t.Helper()
	if fresh, err := r.Deliver(t.Context(), eventBody(id, caseID)); !fresh || err != nil {
		t.Errorf("Deliver(%s) = %v, %v, want true, nil", id, fresh, err)
	}
}

// deliverAsync delivers while the test goes on; the result comes over the channel.
func (r *rig) deliverAsync(id, caseID string) <-chan delivery {
	result := make(chan delivery, 1)
	go func() {
		start := time.Now()
		fresh, err := r.Deliver(context.Background(), eventBody(id, caseID))
		result <- delivery{fresh, err, time.Since(start)}
	}()
	return result
}

type delivery struct {
	fresh bool
	err   error
	took  time.Duration
}

// spyStore is a Memory that notes its calls, and fails or waits where a test says so.
type spyStore struct {
	memory  Memory
	onClaim func(ctx context.Context, env *Envelope) error            // an error is returned in place of claiming
	onDone  func(ctx context.Context, env *Envelope, err error) error // an error is returned in place of recording

	mu    sync.Mutex // protects what follows
	calls []string
}

func (s *spyStore) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, fmt.Sprintf(format, args...))
}

func (s *spyStore) noted() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

func (s *spyStore) Claim(ctx context.Context, env *Envelope) (fresh bool, err error) {
	s.note("claim %s", env.EventID)
	if s.onClaim != nil {
		if err := s.onClaim(ctx, env); err != nil {
			return false, err
		}
	}
	return s.memory.Claim(ctx, env)
}

func (s *spyStore) Done(ctx context.Context, env *Envelope, err error) error {
	s.note("done %s %v", env.EventID, err)
	if s.onDone != nil {
		if err := s.onDone(ctx, env, err); err != nil {
			return err
		}
	}
	return s.memory.Done(ctx, env, err)
}

// eventBody is an event of the type case.completed; without a case if caseID is "".
func eventBody(id, caseID string) []byte {
	return fmt.Appendf(nil, `{"event_id":%q,"event_type":"case.completed","timestamp":1774131900000,`+
		`"data":{"caseId":%q,"status":"COMPLETED","channel":"EMAIL","attemptCount":1}}`, id, caseID)
}

var errTest = errors.New("a failure of the test's making")

// inBubble runs f as a subtest in which time is not real.
func inBubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Helper()
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

func expectEqual[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func expectList[T comparable](t testing.TB, what string, got []T, want ...T) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// TestAnswers is the table of what HTTP gets to see, over a real connection: promise 6 on the way in.
func TestAnswers(t *testing.T) {
	const (
		id      = "evt_1"
		marker  = "b0dyb0dy" // must not come back in an answer or an error
		noEvent = `{"event_id":"","text":"` + marker + `"}`
	)
	good := string(eventBody(id, "case_1"))
	typed := func(eventType, data string) string {
		return `{"event_id":"` + id + `","event_type":` + eventType + `,"timestamp":1,"data":` + data + `}`
	}
	stamped := func(timestamp string) string {
		return `{"event_id":"` + id + `","event_type":"case.failed","timestamp":` + timestamp + `,"data":{}}`
	}
	token := []Option{WithToken("first token", "second")}
	failing := WithDeduper(&spyStore{onClaim: func(context.Context, *Envelope) error { return errTest }})
	limit := []Option{WithMaxBodyBytes(int64(len(good)))}
	type headers = map[string]string

	tests := []struct {
		name    string
		opts    []Option
		method  string // POST if empty
		target  string // / if empty
		request headers
		body    string
		chunked bool

		status  int
		answer  headers
		field   string // the callback that runs
		drifted bool   // the observation of the handled event has an error
		unread  bool   // refused before the body
		err     error  // in the observation of a refusal
	}{
		{name: "new event", body: good, status: 202, field: "CaseCompleted"},
		{name: "chunked", body: good, chunked: true, status: 202, field: "CaseCompleted"},
		{name: "white space around", body: " \r\n\t" + good + "\n", status: 202, field: "CaseCompleted"},
		{name: "case.failed", body: typed(`"case.failed"`, `{}`), status: 202, field: "CaseFailed"},
		{name: "case.input_needed", body: typed(`"case.input_needed"`, `{}`), status: 202, field: "CaseInputNeeded"},

		{name: "timestamp missing", body: `{"event_id":"evt_1"}`, status: 202, field: "Other"},
		{name: "timestamp string", body: stamped(`"2026-03-21"`), status: 202, field: "CaseFailed"},
		{name: "timestamp fraction", body: stamped(`1.5`), status: 202, field: "CaseFailed"},
		{name: "timestamp too large", body: stamped(`99999999999999999999`), status: 202, field: "CaseFailed"},
		{name: "timestamp null", body: stamped(`null`), status: 202, field: "CaseFailed"},

		{name: "type unknown", body: typed(`"case.reopened"`, `{}`), status: 202, field: "Other"},
		{name: "type missing", body: `{"event_id":"evt_1","data":{}}`, status: 202, field: "Other"},
		{name: "type no string", body: typed(`7`, `{}`), status: 202, field: "Other"},
		{name: "data missing", body: `{"event_id":"evt_1","event_type":"case.failed"}`,
			status: 202, field: "Other", drifted: true},
		{name: "data null", body: typed(`"case.failed"`, `null`), status: 202, field: "Other", drifted: true},
		{name: "data array", body: typed(`"case.failed"`, `[]`), status: 202, field: "Other", drifted: true},
		{name: "data of another form", body: typed(`"case.failed"`, `{"attemptCount":"2"}`),
			status: 202, field: "Other", drifted: true},
		{name: "lone surrogate in text", body: typed(`"case.failed"`, `{"failureReason":"\ud800"}`),
			status: 202, field: "CaseFailed"},
		{name: "bad UTF-8 in text", body: typed(`"case.failed"`, "{\"failureReason\":\"\xff\"}"),
			status: 202, field: "CaseFailed"},
		{name: "id of 255 bytes", body: string(eventBody(strings.Repeat("x", 255), "case_1")),
			status: 202, field: "CaseCompleted"},

		{name: "GET", method: "GET", status: 405, answer: headers{"Allow": "POST"}, unread: true},
		{name: "PUT", method: "PUT", body: good, status: 405, answer: headers{"Allow": "POST"}, unread: true},
		{name: "DELETE", method: "DELETE", body: good, status: 405, answer: headers{"Allow": "POST"}, unread: true},

		{name: "token in the query", opts: token, target: "/?a=b&token=first+token", body: good,
			status: 202, field: "CaseCompleted"},
		{name: "token in the header", opts: token, request: headers{"Authorization": "Bearer first token"}, body: good,
			status: 202, field: "CaseCompleted"},
		{name: "second token", opts: token, request: headers{"Authorization": "bearer second"}, body: good,
			status: 202, field: "CaseCompleted"},
		{name: "token missing", opts: token, body: good,
			status: 401, answer: headers{"WWW-Authenticate": "Bearer"}, unread: true},
		{name: "token empty", opts: token, target: "/?token=", request: headers{"Authorization": "Bearer "}, body: good,
			status: 401, answer: headers{"WWW-Authenticate": "Bearer"}, unread: true},
		{name: "token wrong", opts: token, target: "/?token=first", body: good,
			status: 401, answer: headers{"WWW-Authenticate": "Bearer"}, unread: true},
		{name: "token of another scheme", opts: token, request: headers{"Authorization": "Basic second"}, body: good,
			status: 401, answer: headers{"WWW-Authenticate": "Bearer"}, unread: true},

		{name: "type with parameters", request: headers{"Content-Type": "Application/JSON ; charset=utf-8"}, body: good,
			status: 202, field: "CaseCompleted"},
		{name: "type with a suffix", request: headers{"Content-Type": "application/cloudevents+JSON"}, body: good,
			status: 202, field: "CaseCompleted"},
		{name: "no content type", request: headers{"Content-Type": ""}, body: good, status: 202, field: "CaseCompleted"},
		{name: "text/plain", request: headers{"Content-Type": "text/plain"}, body: good, status: 415, unread: true},
		{name: "text/json", request: headers{"Content-Type": "text/vnd.x+json"}, body: good, status: 415, unread: true},
		{name: "application/jsonp", request: headers{"Content-Type": "application/jsonp"}, body: good,
			status: 415, unread: true},
		{name: "form", request: headers{"Content-Type": "application/x-www-form-urlencoded"}, body: good,
			status: 415, unread: true},

		{name: "at the limit", opts: limit, body: good, status: 202, field: "CaseCompleted"},
		{name: "at the limit, chunked", opts: limit, body: good, chunked: true, status: 202, field: "CaseCompleted"},
		{name: "over the limit, declared", opts: limit, body: good + " ", status: 413, unread: true},
		{name: "over the limit, streamed", opts: limit, body: good + " ", chunked: true, status: 413},

		{name: "no event", body: noEvent, status: 400, err: ErrMalformed},
		{name: "no JSON", body: marker, status: 400, err: ErrMalformed},
		{name: "id too long", body: string(eventBody(strings.Repeat(marker, 32), "case_1")),
			status: 400, err: ErrMalformed},
		{name: "no body", body: "", status: 400, err: ErrMalformed},

		{name: "store fails, open", opts: []Option{failing}, body: good, status: 202, field: "CaseCompleted"},
		{name: "store fails, closed", opts: []Option{failing, WithFailClosed()}, body: good,
			status: 503, answer: headers{"Retry-After": "1"}, err: errTest},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var ran *Envelope
			r := newRig(t, func(_ context.Context, env *Envelope) error { ran = env; return nil }, test.opts...)
			srv := httptest.NewServer(r)
			defer srv.Close()

			var body io.Reader = strings.NewReader(test.body)
			if test.chunked {
				body = io.MultiReader(body) // hides the length
			}
			req, err := http.NewRequest(cmp.Or(test.method, "POST"), srv.URL+cmp.Or(test.target, "/"), body)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			for name, value := range test.request {
				if req.Header.Set(name, value); value == "" {
					req.Header.Del(name)
				}
			}
			resp, err := srv.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			expectEqual(t, "status", resp.StatusCode, test.status)
			for name, value := range test.answer {
				expectEqual(t, name, resp.Header.Get(name), value)
			}
			accepted := test.status == 202
			if accepted {
				expectEqual(t, "body of the answer", string(text), "")
			} else if len(text) > 120 || strings.Contains(string(text), marker) || strings.Contains(string(text), "making") {
				t.Errorf("the answer says %q", text)
			}

			if !accepted && strings.Contains(test.body, id) && test.err == nil { // refused for the request alone
				if fresh, err := r.Deliver(t.Context(), []byte(good)); !fresh || err != nil {
					t.Errorf("then the real event: %v, %v", fresh, err)
				}
			}
			if err := r.Shutdown(t.Context()); err != nil {
				t.Fatal(err)
			}
			var first Observation
			for _, o := range r.observed {
				if o.Outcome == Accepted || o.Outcome == Refused {
					first = o
					break
				}
			}
			if accepted {
				expectEqual(t, "outcome", first.Outcome, Accepted)
				expectEqual(t, "body observed", string(first.Body), test.body)
				if len(r.calls) != 1 || r.calls[0].field != test.field {
					t.Fatalf("callbacks: %v, want %s once", r.calls, test.field)
				}
				expectEqual(t, "Raw", string(ran.Raw), test.body)
				if strings.HasPrefix(test.name, "timestamp") {
					expectEqual(t, "Timestamp", ran.Timestamp, 0)
				}
				expectEqual(t, "handled", r.count(Handled), 1)
				for _, o := range r.observed {
					expectEqual(t, "data did not fit", o.Err != nil, o.Outcome == Handled && test.drifted || o.Outcome == StoreFailed)
				}
				return
			}
			expectEqual(t, "outcome", first.Outcome, Refused)
			switch {
			case test.unread:
				expectEqual(t, "body observed", string(first.Body), "")
			case test.status == 413:
				expectEqual(t, "body observed", string(first.Body), good)
			default:
				expectEqual(t, "body observed", string(first.Body), test.body)
			}
			expectEqual(t, "has an envelope", first.Envelope != nil, test.status == 503)
			if first.Err == nil || test.err != nil && !errors.Is(first.Err, test.err) {
				t.Errorf("error observed: %v, want %v", first.Err, test.err)
			} else if strings.Contains(first.Err.Error(), marker) {
				t.Errorf("the error quotes the body: %v", first.Err)
			}
			if calls := r.store.noted(); test.err != nil && len(calls) > 0 {
				t.Errorf("the store saw %q", calls)
			}
		})
	}

	// An id that is being handled, or was.
	t.Run("duplicate", func(t *testing.T) {
		handling, release := make(chan struct{}), make(chan struct{})
		r := newRig(t, func(context.Context, *Envelope) error { close(handling); <-release; return nil })
		srv := httptest.NewServer(r)
		defer srv.Close()
		post := func(body string, want int) {
			t.Helper()
			resp, err := srv.Client().Post(srv.URL, "application/json", strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			text, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			expectEqual(t, "status", resp.StatusCode, want)
			expectEqual(t, "body of the answer", string(text), "")
		}
		post(good, 202) // before the callback finishes (promise 2)
		<-handling
		post(good, 200)
		post(`{"event_id":"evt_1","other":"payload"}`, 200)
		close(release)
		for r.count(Handled) == 0 {
			runtime.Gosched()
		}
		post(good, 200)
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		expectList(t, "callbacks", r.called(), id)
		expectEqual(t, "duplicates observed", r.count(Duplicate), 3)
		expectEqual(t, "payload kept", string(r.observations(id)[0].Body), good)
	})

	t.Run("shut down", func(t *testing.T) {
		r := newRig(t, nil)
		srv := httptest.NewServer(r)
		defer srv.Close()
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		resp, err := srv.Client().Post(srv.URL, "application/json", strings.NewReader(good))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		expectEqual(t, "status", resp.StatusCode, 503)
		expectEqual(t, "Retry-After", resp.Header.Get("Retry-After"), "1")
		expectEqual(t, "connection closes", resp.Close, true)
		expectList(t, "outcomes", r.outcomes(id), Refused)
		if o := r.observed[0]; !errors.Is(o.Err, ErrClosed) || string(o.Body) != good {
			t.Errorf("observed %v of %q", o.Err, o.Body)
		}
		expectList(t, "store", r.store.noted())
	})
}

// TestHostileBodies sends every body that cannot be an event: 400, no callback, nothing stored.
func TestHostileBodies(t *testing.T) {
	files, err := filepath.Glob("testdata/hostile/*")
	if err != nil || len(files) < 20 {
		t.Fatalf("hostile bodies: %d, %v", len(files), err)
	}
	r := newRig(t, nil)
	srv := httptest.NewServer(r)
	defer srv.Close()
	for i, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			body, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := srv.Client().Post(srv.URL, "application/json", bytes.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			text, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			expectEqual(t, "status", resp.StatusCode, 400)
			if len(text) > 120 {
				t.Errorf("the answer is long: %q", text)
			}
			o := r.observations("")[i]
			if o.Outcome != Refused || !errors.Is(o.Err, ErrMalformed) || !bytes.Equal(o.Body, body) {
				t.Errorf("observed %s, %v, %d bytes; want %s, %v, %d bytes",
					o.Outcome, o.Err, len(o.Body), Refused, ErrMalformed, len(body))
			}
		})
	}
	expectList(t, "store", r.store.noted())
	expectList(t, "callbacks", r.called())
}

// TestBrokenOffBody hangs up half way, over TCP: a handler that returned in silence would send a 200.
func TestBrokenOffBody(t *testing.T) {
	body := string(eventBody("evt_1", "case_1"))
	for name, request := range map[string]string{
		"declared":   post(body[:20], len(body)),
		"whole JSON": post(body, len(body)+1),
		"chunked":    "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n14\r\n" + body[:20] + "\r\n",
		"bad chunk": "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n14\r\n" + body[:20] +
			"\r\nno number\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			srv := httptest.NewServer(r)
			defer srv.Close()
			conn, err := net.Dial("tcp", srv.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, request); err != nil {
				t.Fatal(err)
			}
			if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			expectEqual(t, "status", readAnswer(t, conn).StatusCode, 400)
			expectList(t, "store", r.store.noted())
			told := r.observations("")
			if len(told) != 1 || told[0].Outcome != Refused {
				t.Fatalf("observed %v", told)
			}
			if got := string(told[0].Body); !strings.HasPrefix(body, got) || len(got) < 20 {
				t.Errorf("body observed: %q", got)
			}
		})
	}
}

// TestEndlessBody streams without end: 413 after the limit, and the connection closes.
func TestEndlessBody(t *testing.T) {
	r := newRig(t, nil, WithMaxBodyBytes(1000))
	srv := httptest.NewServer(r)
	defer srv.Close()
	conn, err := net.Dial("tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var sending sync.WaitGroup
	sending.Go(func() {
		_, err := io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
		for sent := 0; err == nil; sent++ {
			_, err = io.WriteString(conn, "100\r\n"+strings.Repeat(" ", 0x100)+"\r\n")
			if sent > 1_000_000 {
				t.Error("the server reads on and on")
				return
			}
		}
	})
	resp := readAnswer(t, conn)
	expectEqual(t, "status", resp.StatusCode, 413)
	expectEqual(t, "connection closes", resp.Close, true)
	sending.Wait()
	expectEqual(t, "bytes observed", len(r.observations("")[0].Body), 1000)
}

// post is a request as text, with a body that may fall short of the length that it declares.
func post(body string, length int) string {
	return fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		length, body)
}

func readAnswer(t testing.TB, conn net.Conn) *http.Response {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// pipes is a listener whose connections lie in memory, so that a server can run in a bubble.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	close  func()
}

// serve runs srv until the test ends.
func serve(t testing.TB, srv *http.Server) *pipes {
	p := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	p.close = sync.OnceFunc(func() { close(p.closed) })
	var serving sync.WaitGroup
	serving.Go(func() { _ = srv.Serve(p) })
	t.Cleanup(func() {
		_ = srv.Close()
		serving.Wait()
	})
	return p
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.close(); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }

func (p *pipes) dial(t testing.TB) net.Conn {
	client, server := net.Pipe()
	p.conns <- server
	t.Cleanup(func() { client.Close() })
	return client
}

// send writes a request that the server reads as far as it was sent.
func send(t testing.TB, conn net.Conn, request string) {
	t.Helper()
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
}

// TestSlowBody: a body has 10 s, or what a stricter server allows.
func TestSlowBody(t *testing.T) {
	for _, test := range []struct {
		name     string
		timeout  time.Duration // of the server
		deadline time.Duration
	}{
		{"by default", 0, 10 * time.Second},
		{"with a generous server", time.Minute, 10 * time.Second},
		{"with a strict server", 2 * time.Second, 2 * time.Second},
	} {
		inBubble(t, test.name, func(t *testing.T) {
			r := newRig(t, nil)
			conn := serve(t, &http.Server{Handler: r, ReadTimeout: test.timeout}).dial(t)
			body := string(eventBody("evt_1", "case_1"))
			start := time.Now()
			send(t, conn, post(body[:20], len(body)))
			resp := readAnswer(t, conn)
			expectEqual(t, "status", resp.StatusCode, 408)
			expectEqual(t, "connection closes", resp.Close, true)
			expectEqual(t, "after", time.Since(start), test.deadline)
			expectList(t, "store", r.store.noted())
			expectList(t, "outcomes", r.outcomes(""), Refused)
			expectEqual(t, "body observed", string(r.observations("")[0].Body), body[:20])
		})
	}

	// Each byte that drips in must not put the end off.
	inBubble(t, "dripping", func(t *testing.T) {
		r := newRig(t, nil)
		conn := serve(t, &http.Server{Handler: r}).dial(t)
		body := string(eventBody("evt_1", "case_1"))
		start := time.Now()
		send(t, conn, post("", len(body)))
		var dripping sync.WaitGroup
		dripping.Go(func() {
			for i := range body {
				time.Sleep(time.Second - time.Millisecond)
				if _, err := io.WriteString(conn, body[i:i+1]); err != nil {
					return
				}
			}
		})
		expectEqual(t, "status", readAnswer(t, conn).StatusCode, 408)
		expectEqual(t, "after", time.Since(start), 10*time.Second)
		expectEqual(t, "body observed", string(r.observations("")[0].Body), body[:10])
		conn.Close()
		dripping.Wait()
	})

	// A body that comes slowly but in time is an event like any other, and so is the next on its connection.
	inBubble(t, "in time", func(t *testing.T) {
		r := newRig(t, nil)
		conn := serve(t, &http.Server{Handler: r}).dial(t)
		for _, id := range []string{"evt_1", "evt_2"} {
			body := string(eventBody(id, "case_1"))
			send(t, conn, post(body[:20], len(body)))
			time.Sleep(9 * time.Second)
			send(t, conn, body[20:])
			expectEqual(t, "status", readAnswer(t, conn).StatusCode, 202)
			time.Sleep(time.Minute)
		}
		expectList(t, "callbacks", r.called(), "evt_1", "evt_2")
	})

	inBubble(t, "500 beside live traffic", func(t *testing.T) {
		r := newRig(t, nil)
		p := serve(t, &http.Server{Handler: r})
		start := time.Now()
		var slow sync.WaitGroup
		for range 500 {
			conn := p.dial(t)
			slow.Go(func() {
				send(t, conn, post(`{"event_id"`, 100))
				expectEqual(t, "status", readAnswer(t, conn).StatusCode, 408)
				expectEqual(t, "after", time.Since(start), 10*time.Second)
			})
		}
		synctest.Wait()
		live := p.dial(t)
		for i := range 500 {
			body := eventBody(fmt.Sprint("evt_", i), fmt.Sprint("case_", i))
			send(t, live, post(string(body), len(body)))
			expectEqual(t, "status", readAnswer(t, live).StatusCode, 202)
		}
		expectEqual(t, "live traffic took", time.Since(start), 0)
		slow.Wait()
		expectEqual(t, "refused", r.count(Refused), 500)
		expectEqual(t, "handled", r.count(Handled), 500)
	})
}

// TestEarlyRefusal: net/http would read the body of a refused request before it answers.
func TestEarlyRefusal(t *testing.T) {
	for _, test := range []struct {
		name, head string
		status     int
	}{
		{"method", "PUT / HTTP/1.1\r\nHost: x\r\n", 405},
		{"token", "POST / HTTP/1.1\r\nHost: x\r\n", 401},
		{"type", "POST /?token=t HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n", 415},
	} {
		for _, length := range []string{"Content-Length: 1000", "Content-Length: 900000", "Transfer-Encoding: chunked"} {
			inBubble(t, test.name+", "+length, func(t *testing.T) {
				r := newRig(t, nil, WithToken("t"))
				conn := serve(t, &http.Server{Handler: r}).dial(t)
				start := time.Now()
				send(t, conn, test.head+length+"\r\n\r\n")
				resp := readAnswer(t, conn)
				expectEqual(t, "status", resp.StatusCode, test.status)
				expectEqual(t, "connection closes", resp.Close, true)
				expectEqual(t, "after", time.Since(start), 0)
				_, _ = io.Copy(io.Discard, conn)
				if held := time.Since(start); held > 10*time.Second {
					t.Errorf("the connection was held for %v", held)
				}
			})
		}
	}
}

// TestDeadlineIsOver: what wraps the receiver may take its time after it. The deadline for the body must not cancel the
// request then.
func TestDeadlineIsOver(t *testing.T) {
	body := string(eventBody("evt_1", "case_1"))
	for name, request := range map[string]string{
		"no body":          post("", 0),
		"refused, no body": "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"with a body":      post(body, len(body)),
	} {
		inBubble(t, name, func(t *testing.T) {
			r := newRig(t, nil)
			var err error
			conn := serve(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				r.ServeHTTP(w, req)
				time.Sleep(time.Minute)
				err = req.Context().Err()
			})}).dial(t)
			send(t, conn, request)
			readAnswer(t, conn)
			if err != nil {
				t.Errorf("the request was cancelled: %v", err)
			}
		})
	}
}

// bare hides all that a ResponseWriter can do beside its three methods.
type bare struct{ http.ResponseWriter }

// TestRecorders: a ResponseWriter without deadlines will do.
func TestRecorders(t *testing.T) {
	for name, wrap := range map[string]func(http.ResponseWriter) http.ResponseWriter{
		"recorder": func(w http.ResponseWriter) http.ResponseWriter { return w },
		"wrapper":  func(w http.ResponseWriter) http.ResponseWriter { return bare{w} },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			w := httptest.NewRecorder()
			r.ServeHTTP(wrap(w), httptest.NewRequest("POST", "/", bytes.NewReader(eventBody("evt_1", "case_1"))))
			expectEqual(t, "status", w.Code, 202)
		})
	}
	t.Run("request without a body", func(t *testing.T) {
		r := newRig(t, nil)
		w := httptest.NewRecorder()
		r.ServeHTTP(w, &http.Request{Method: "POST", URL: new(url.URL)})
		expectEqual(t, "status", w.Code, 400)
	})
}

// TestHangUp: a sender that hangs up right after the body has sent an event all the same.
func TestHangUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var claimed, done, called error
		r := newRig(t, func(ctx context.Context, _ *Envelope) error {
			called = ctx.Err()
			return nil
		})
		request := make(chan context.Context, 1)
		hungUp := errors.New("never")
		r.store.onClaim = func(ctx context.Context, _ *Envelope) error {
			req := <-request
			<-req.Done()
			hungUp = req.Err()
			time.Sleep(time.Second)
			claimed = ctx.Err()
			return nil
		}
		r.store.onDone = func(ctx context.Context, _ *Envelope, _ error) error {
			done = ctx.Err()
			return nil
		}
		conn := serve(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			request <- req.Context()
			r.ServeHTTP(w, req)
		})}).dial(t)
		body := string(eventBody("evt_1", "case_1"))
		send(t, conn, post(body, len(body)))
		conn.Close()
		time.Sleep(time.Minute)
		synctest.Wait()
		if hungUp != context.Canceled {
			t.Fatalf("the request's context: %v, so this tests nothing", hungUp)
		}
		for what, err := range map[string]error{"Claim": claimed, "Done": done, "callback": called} {
			if err != nil {
				t.Errorf("the context of %s: %v", what, err)
			}
		}
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Handled)
	})
}

// TestStoreTimeout: a store that does not answer costs a request five seconds, not more.
func TestStoreTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil, WithFailClosed())
		r.store.onClaim = func(ctx context.Context, _ *Envelope) error {
			<-ctx.Done()
			return ctx.Err()
		}
		conn := serve(t, &http.Server{Handler: r}).dial(t)
		start := time.Now()
		body := string(eventBody("evt_1", "case_1"))
		send(t, conn, post(body, len(body)))
		expectEqual(t, "status", readAnswer(t, conn).StatusCode, 503)
		expectEqual(t, "after", time.Since(start), 5*time.Second)
		expectList(t, "outcomes", r.outcomes("evt_1"), StoreFailed, Refused)
	})
}

type contextKey struct{}

// TestCallbackContext: the values of the request without its cancellation, and the end of the receiver.
func TestCallbackContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var first, last error
		var value any
		r := newRig(t, func(ctx context.Context, _ *Envelope) error {
			value = ctx.Value(contextKey{})
			if _, bounded := ctx.Deadline(); bounded {
				t.Error("the context has a deadline")
			}
			child, cancel := context.WithCancel(ctx) // a context of ours that derives must be cancelled too
			defer cancel()
			time.Sleep(time.Minute)
			first = child.Err()
			<-child.Done()
			last = ctx.Err()
			return last
		})
		ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), contextKey{}, "v"), time.Second)
		if fresh, err := r.Deliver(ctx, eventBody("evt_1", "case_1")); !fresh || err != nil {
			t.Fatal(fresh, err)
		}
		cancel()
		shutdown, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := r.Shutdown(shutdown); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown: %v", err)
		}
		synctest.Wait()
		if value != "v" || first != nil || last != context.Canceled {
			t.Errorf("value %v; after a minute %v, want nil; after the shutdown %v, want %v",
				value, first, last, context.Canceled)
		}
	})
}

// TestPanic: a panic of a callback is a failure like another (promise 4), with its stack.
func TestPanic(t *testing.T) {
	for _, test := range []struct {
		name string
		f    func()
		is   error
		text string
	}{
		{"with an error", func() { panic(fmt.Errorf("wrapped: %w", errTest)) }, errTest, "wrapped"},
		{"with a string", func() { panic("a string") }, nil, "a string"},
		{"of the runtime", func() { _ = []int(nil)[len(os.Args)] }, nil, "index out of range"},
	} {
		inBubble(t, test.name, func(t *testing.T) {
			attempts := 0
			r := newRig(t, func(context.Context, *Envelope) error {
				if attempts++; attempts == 1 {
					test.f()
				}
				return nil
			})
			r.deliver(t, "evt_1", "case_1")
			time.Sleep(time.Minute)
			expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Retrying, Handled)
			err := r.observations("evt_1")[1].Err
			var panicked *PanicError
			if !errors.As(err, &panicked) {
				t.Fatalf("%v is no PanicError", err)
			}
			if !strings.Contains(string(panicked.Stack), "TestPanic") {
				t.Errorf("the stack does not name the culprit: %s", panicked.Stack)
			}
			if !strings.Contains(err.Error(), test.text) || test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

// TestGoexit: a callback that ends its goroutine has failed, and costs no concurrency.
func TestGoexit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		attempts := 0
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			if attempts++; attempts <= 3 {
				runtime.Goexit()
			}
			return nil
		}, WithConcurrency(1), WithRetry(4, time.Second))
		r.deliver(t, "evt_1", "case_1")
		time.Sleep(time.Minute)
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Retrying, Retrying, Retrying, Handled)
	})
}

// TestRetry is promise 4: backoff that doubles, with jitter, then GaveUp, and the id is open again.
func TestRetry(t *testing.T) {
	inBubble(t, "until it is handled", func(t *testing.T) {
		attempts := 0
		r := newRig(t, func(context.Context, *Envelope) error {
			if attempts++; attempts < 3 {
				return errTest
			}
			return nil
		})
		r.deliver(t, "evt_1", "case_1")
		time.Sleep(time.Minute)
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Retrying, Retrying, Handled)
		expectList(t, "store", r.store.noted(), "claim evt_1", "done evt_1 <nil>")
		for i, o := range r.observations("evt_1")[1:] {
			expectEqual(t, "attempt", o.Attempt, i+1)
			expectEqual(t, "error", o.Err != nil, i < 2)
		}
	})

	inBubble(t, "backoff", func(t *testing.T) {
		const attempts, events = 8, 200
		r := newRig(t, func(context.Context, *Envelope) error { return errTest })
		for i := range events {
			r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i))
		}
		time.Sleep(5 * time.Minute)
		var shortest, longest [attempts]time.Duration
		for i := range events {
			times := r.times(fmt.Sprint("evt_", i))
			if len(times) != attempts {
				t.Fatalf("%d attempts, want %d", len(times), attempts)
			}
			for n := 1; n < attempts; n++ {
				rest := times[n].Sub(times[n-1])
				if shortest[n] == 0 || rest < shortest[n] {
					shortest[n] = rest
				}
				longest[n] = max(longest[n], rest)
			}
		}
		for n := 1; n < attempts; n++ {
			rest := time.Second << (n - 1)
			if shortest[n] < rest*3/4 || longest[n] > rest*5/4 {
				t.Errorf("rest %d is %v to %v, want %v and a quarter more or less", n, shortest[n], longest[n], rest)
			}
			if longest[n]-shortest[n] < rest/4 {
				t.Errorf("rest %d is always %v to %v: that is no jitter", n, shortest[n], longest[n])
			}
		}
	})

	inBubble(t, "an hour at most", func(t *testing.T) {
		r := newRig(t, func(context.Context, *Envelope) error { return errTest }, WithRetry(100, time.Second))
		r.deliver(t, "evt_1", "case_1")
		time.Sleep(200 * time.Hour)
		times := r.times("evt_1")
		expectEqual(t, "attempts", len(times), 100)
		for n := 1; n < len(times); n++ {
			if rest := times[n].Sub(times[n-1]); rest > 75*time.Minute {
				t.Errorf("rest %d is %v", n, rest)
			}
		}
	})

	inBubble(t, "gave up", func(t *testing.T) {
		fail := true
		r := newRig(t, func(context.Context, *Envelope) error {
			if fail {
				return errTest
			}
			return nil
		}, WithRetry(3, time.Second))
		r.deliver(t, "evt_1", "case_1")
		time.Sleep(time.Minute)
		synctest.Wait()
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Retrying, Retrying, GaveUp)
		o := r.observations("evt_1")[3]
		if o.Attempt != 3 || !errors.Is(o.Err, errTest) || !bytes.Equal(o.Body, eventBody("evt_1", "case_1")) {
			t.Errorf("observed attempt %d, %v, %q", o.Attempt, o.Err, o.Body)
		}
		expectList(t, "store", r.store.noted(), "claim evt_1", "done evt_1 "+errTest.Error())
		fail = false
		r.deliver(t, "evt_1", "case_1")
		time.Sleep(time.Minute)
		expectEqual(t, "handled", r.count(Handled), 1)
	})

	inBubble(t, "never", func(t *testing.T) {
		r := newRig(t, func(context.Context, *Envelope) error { return errTest }, WithRetry(1, time.Second))
		r.deliver(t, "evt_1", "case_1")
		synctest.Wait()
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, GaveUp)
	})

	// A rest takes none of the concurrency, and holds back nothing but its case.
	inBubble(t, "holds back its case alone", func(t *testing.T) {
		failed := false
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			if env.EventID == "evt_a1" && !failed {
				failed = true
				return errTest
			}
			return nil
		}, WithConcurrency(1), WithRetry(2, time.Hour))
		r.deliver(t, "evt_a1", "case_a")
		synctest.Wait()
		r.deliver(t, "evt_a2", "case_a")
		r.deliver(t, "evt_b", "case_b")
		r.deliver(t, "evt_none", "")
		time.Sleep(time.Minute)
		expectList(t, "at once", r.called(), "evt_a1", "evt_b", "evt_none")
		time.Sleep(2 * time.Hour)
		expectList(t, "in the end", r.called(), "evt_a1", "evt_b", "evt_none", "evt_a1", "evt_a2")
	})

	inBubble(t, "takes no room", func(t *testing.T) {
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			if strings.HasPrefix(env.EventID, "evt_bad") {
				return errTest
			}
			return nil
		}, WithBacklog(4), WithConcurrency(2), WithRetry(2, time.Hour))
		for i := range 4 {
			r.deliver(t, fmt.Sprint("evt_bad", i), fmt.Sprint("case_bad", i))
			synctest.Wait()
		}
		start := time.Now()
		for i := range 20 {
			r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i))
			synctest.Wait()
		}
		expectEqual(t, "handled", r.count(Handled), 20)
		expectEqual(t, "waited", time.Since(start), 0)
	})
}

// TestNoCallback: an unknown type is done then. Drifted data is given up at once, so that an Inbox keeps it.
func TestNoCallback(t *testing.T) {
	for _, test := range []struct {
		name, body string
		outcome    Outcome
		done       string
	}{
		{"unknown type", `{"event_id":"evt_1","event_type":"case.reopened","data":{}}`, Ignored, "<nil>"},
		{"known type", `{"event_id":"evt_1","event_type":"case.failed","data":{}}`, Ignored, "<nil>"},
		{"drifted data", `{"event_id":"evt_1","event_type":"case.failed","data":{"status":7}}`, GaveUp, "offloadhook: data"},
		{"no data", `{"event_id":"evt_1","event_type":"case.failed"}`, GaveUp, "offloadhook: data"},
	} {
		inBubble(t, test.name, func(t *testing.T) {
			r := &rig{store: new(spyStore)}
			r.Receiver = Handler(Callbacks{}, WithDeduper(r.store), WithObserver(r.record))
			if fresh, err := r.Deliver(t.Context(), []byte(test.body)); !fresh || err != nil {
				t.Fatal(fresh, err)
			}
			if err := r.Shutdown(t.Context()); err != nil {
				t.Fatal(err)
			}
			expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, test.outcome)
			calls := r.store.noted()
			if len(calls) != 2 || !strings.HasPrefix(calls[1], "done evt_1 "+test.done) {
				t.Errorf("store: %q, want done with %s", calls, test.done)
			}
		})
	}
}

// TestDoneFails: what failed is recording the end, so that is tried again, and the callback is not (promise 3).
func TestDoneFails(t *testing.T) {
	for _, result := range []error{nil, errTest} {
		inBubble(t, fmt.Sprint("callback returns ", result), func(t *testing.T) {
			r := newRig(t, func(context.Context, *Envelope) error { return result }, WithRetry(1, 0), WithConcurrency(1))
			failures := 0
			r.store.onDone = func(_ context.Context, env *Envelope, _ error) error {
				if env.EventID == "evt_1" && failures < 3 {
					failures++
					return errTest
				}
				return nil
			}
			r.deliver(t, "evt_1", "case_1")
			r.deliver(t, "evt_2", "case_2") // which that must not hold back
			synctest.Wait()
			expectList(t, "called at once", r.called(), "evt_1", "evt_2")
			time.Sleep(time.Minute)
			expectList(t, "called", r.called(), "evt_1", "evt_2")
			expectEqual(t, "store failures", r.count(StoreFailed), 3)
			dones := 0
			for _, c := range r.store.noted() {
				if c == fmt.Sprintf("done evt_1 %v", result) {
					dones++
				}
			}
			expectEqual(t, "calls of Done", dones, 4)
			want := Handled
			if result != nil {
				want = GaveUp
			}
			expectEqual(t, "told once", r.count(want), 2)
			fresh, err := r.Deliver(t.Context(), eventBody("evt_1", "case_1"))
			if fresh != (result != nil) || err != nil {
				t.Errorf("then the same event: %v, %v", fresh, err)
			}
		})
	}

	// The event must not hold up its case, or a shutdown, for ever.
	inBubble(t, "without end", func(t *testing.T) {
		r := newRig(t, nil)
		r.store.onDone = func(context.Context, *Envelope, error) error { return errTest }
		r.deliver(t, "evt_1", "case_1")
		r.deliver(t, "evt_2", "case_1")
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		expectList(t, "called", r.called(), "evt_1", "evt_2")
	})
}

// TestOrder is promise 5, for many schedules: one case in order and one at a time, different cases side by side.
func TestOrder(t *testing.T) {
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			plan := newPlan(rng, 40)
			concurrency := 1 + rng.IntN(4)
			var running atomic.Int32
			watch := newOrderWatch()
			r := newRig(t, func(_ context.Context, env *Envelope) error {
				if n := running.Add(1); int(n) > concurrency {
					t.Errorf("seed %d: %d callbacks at once, want %d", seed, n, concurrency)
				}
				defer running.Add(-1)
				return watch.run(t, plan, env)
			}, WithConcurrency(concurrency), WithBacklog(1+rng.IntN(5)), WithRetry(5, 100*time.Millisecond))
			plan.deliver(t, rng, func(body []byte) (bool, error) {
				for {
					fresh, err := r.Deliver(t.Context(), body)
					if !errors.Is(err, ErrBusy) {
						return fresh, err
					}
					time.Sleep(10 * time.Millisecond)
				}
			})
			if err := r.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			watch.check(t, plan)
			if t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		})
	}
}

// plan is a schedule: events by case, and what their callbacks will do.
type plan struct {
	cases  [][]string               // event ids; those of a case are delivered in that order
	caseOf map[string]int           // by event id
	acts   map[string][]planned     // by event id: what each attempt does; further attempts succeed at once
	pauses map[string]time.Duration // before the delivery
}

type planned struct {
	takes time.Duration
	fails bool
}

// newPlan plans n events. No event fails more than three times.
func newPlan(rng *rand.Rand, n int) *plan {
	p := &plan{
		cases:  make([][]string, 1+rng.IntN(5)),
		caseOf: make(map[string]int),
		acts:   make(map[string][]planned),
		pauses: make(map[string]time.Duration),
	}
	for i := range n {
		id, c := fmt.Sprint("evt_", i), rng.IntN(len(p.cases))
		p.cases[c] = append(p.cases[c], id)
		p.caseOf[id] = c
		for range 1 + rng.IntN(3) {
			p.acts[id] = append(p.acts[id], planned{time.Duration(rng.IntN(400)) * time.Millisecond, rng.IntN(3) == 0})
		}
		if rng.IntN(3) == 0 {
			p.pauses[id] = time.Duration(rng.IntN(3000)) * time.Millisecond
		}
	}
	return p
}

func (p *plan) body(id string) []byte { return eventBody(id, fmt.Sprint("case_", p.caseOf[id])) }

// deliver delivers the cases side by side, some events twice, and returns when all is delivered.
func (p *plan) deliver(t *testing.T, rng *rand.Rand, deliver func(body []byte) (bool, error)) {
	var senders sync.WaitGroup
	for _, ids := range p.cases {
		twice := make([]bool, len(ids))
		for i := range twice {
			twice[i] = rng.IntN(4) == 0
		}
		senders.Go(func() {
			for i, id := range ids {
				time.Sleep(p.pauses[id])
				if fresh, err := deliver(p.body(id)); !fresh || err != nil {
					t.Errorf("%s: %v, %v, want true, nil", id, fresh, err)
				}
				if twice[i] {
					if fresh, err := deliver(p.body(id)); fresh || err != nil {
						t.Errorf("%s again: %v, %v, want false, nil", id, fresh, err)
					}
				}
			}
		})
	}
	senders.Wait()
}

// orderWatch is the callback of a plan. It sees to it that a case has one callback at a time.
type orderWatch struct {
	mu       sync.Mutex // protects what follows
	attempts map[string]int
	running  map[int]bool
	handled  map[int][]string // by case
}

func newOrderWatch() *orderWatch {
	return &orderWatch{attempts: make(map[string]int), running: make(map[int]bool), handled: make(map[int][]string)}
}

func (w *orderWatch) run(t *testing.T, p *plan, env *Envelope) error {
	id := env.EventID
	c := p.caseOf[id]
	w.mu.Lock()
	if w.running[c] {
		t.Errorf("%s runs beside another event of case %d", id, c)
	}
	if !bytes.Equal(env.Raw, p.body(id)) {
		t.Errorf("%s has become %q", id, env.Raw)
	}
	w.running[c] = true
	var act planned
	if n := w.attempts[id]; n < len(p.acts[id]) {
		act = p.acts[id][n]
	}
	w.attempts[id]++
	w.mu.Unlock()
	time.Sleep(act.takes)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running[c] = false
	if act.fails {
		return errTest
	}
	w.handled[c] = append(w.handled[c], id)
	return nil
}

// check says that every event was handled once, and each case in order.
func (w *orderWatch) check(t *testing.T, p *plan) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for c, ids := range p.cases {
		expectList(t, fmt.Sprint("case ", c), w.handled[c], ids...)
	}
}

// TestSideBySide: all of the concurrency is used, by different cases and by events without one.
func TestSideBySide(t *testing.T) {
	for name, caseOf := range map[string]func(i int) string{
		"cases":         func(i int) string { return fmt.Sprint("case_", i) },
		"without cases": func(int) string { return "" },
	} {
		inBubble(t, name, func(t *testing.T) {
			var running, most atomic.Int32
			r := newRig(t, func(context.Context, *Envelope) error {
				most.Store(max(most.Load(), running.Add(1)))
				time.Sleep(time.Second)
				running.Add(-1)
				return nil
			}, WithConcurrency(7))
			start := time.Now()
			for i := range 70 {
				r.deliver(t, fmt.Sprint("evt_", i), caseOf(i))
			}
			if err := r.Shutdown(t.Context()); err != nil {
				t.Fatal(err)
			}
			expectEqual(t, "at once", most.Load(), 7)
			expectEqual(t, "took", time.Since(start), 10*time.Second)
		})
	}
}

// TestBacklog: without an Inbox an event waits for room, a bounded time and in a bounded queue.
func TestBacklog(t *testing.T) {
	inBubble(t, "full", func(t *testing.T) {
		release := make(chan struct{})
		r := newRig(t, func(context.Context, *Envelope) error { <-release; return nil }, WithBacklog(2), WithConcurrency(1))
		p := serve(t, &http.Server{Handler: r})
		r.deliver(t, "evt_1", "case_1")
		r.deliver(t, "evt_2", "case_2")
		waiting := []<-chan delivery{r.deliverAsync("evt_3", "case_3"), r.deliverAsync("evt_4", "case_4")}
		synctest.Wait()

		start := time.Now()
		conn := p.dial(t)
		body := string(eventBody("evt_5", "case_5"))
		send(t, conn, post(body, len(body)))
		resp := readAnswer(t, conn)
		expectEqual(t, "status", resp.StatusCode, 503)
		expectEqual(t, "Retry-After", resp.Header.Get("Retry-After"), "1")
		expectEqual(t, "with too many waiting, after", time.Since(start), 0)
		for _, id := range []string{"evt_1", "evt_2"} { // a duplicate needs no room
			if fresh, err := r.Deliver(t.Context(), eventBody(id, "case_1")); fresh || err != nil {
				t.Errorf("duplicate of %s: %v, %v", id, fresh, err)
			}
		}
		expectEqual(t, "duplicates took", time.Since(start), 0)
		for _, result := range waiting {
			if d := <-result; d.fresh || !errors.Is(d.err, ErrBusy) || d.took != 5*time.Second {
				t.Errorf("%v, %v after %v, want %v after 5s", d.fresh, d.err, d.took, ErrBusy)
			}
		}
		for _, id := range []string{"evt_3", "evt_4", "evt_5"} {
			expectList(t, id, r.outcomes(id), Refused)
			if !slices.Contains(r.store.noted(), "done "+id+" "+ErrBusy.Error()) {
				t.Errorf("the id of %s is still claimed", id)
			}
		}
		close(release)
		synctest.Wait()
		for _, id := range []string{"evt_3", "evt_4", "evt_5"} {
			r.deliver(t, id, "")
		}
		synctest.Wait()
		expectEqual(t, "handled", r.count(Handled), 5)
	})

	inBubble(t, "first come, first served", func(t *testing.T) {
		r := newRig(t, func(context.Context, *Envelope) error { time.Sleep(time.Second); return nil },
			WithBacklog(4), WithConcurrency(1))
		for i := range 4 {
			r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i))
		}
		var waiting []<-chan delivery
		for i := 4; i < 8; i++ {
			waiting = append(waiting, r.deliverAsync(fmt.Sprint("evt_", i), fmt.Sprint("case_", i)))
			synctest.Wait()
		}
		for i, result := range waiting {
			if d := <-result; !d.fresh || d.err != nil || d.took != time.Duration(i+1)*time.Second {
				t.Errorf("waiter %d: %v, %v after %v", i, d.fresh, d.err, d.took)
			}
		}
		time.Sleep(time.Minute)
		expectList(t, "called", r.called(), "evt_0", "evt_1", "evt_2", "evt_3", "evt_4", "evt_5", "evt_6", "evt_7")
	})

	// Duplicates of one undecided id take no room, so they cannot crowd others out.
	inBubble(t, "many of one id", func(t *testing.T) {
		r := newRig(t, nil, WithBacklog(2))
		r.store.onClaim = func(_ context.Context, env *Envelope) error {
			if env.EventID == "evt_slow" {
				time.Sleep(time.Second)
			}
			return nil
		}
		var slow []<-chan delivery
		for range 100 {
			slow = append(slow, r.deliverAsync("evt_slow", "case_1"))
		}
		synctest.Wait()
		start := time.Now()
		for i := range 10 {
			r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i))
			synctest.Wait()
		}
		expectEqual(t, "took", time.Since(start), 0)
		fresh := 0
		for _, result := range slow {
			d := <-result
			if d.err != nil {
				t.Error(d.err)
			}
			if d.fresh {
				fresh++
			}
		}
		expectEqual(t, "fresh", fresh, 1)
	})
}

// TestUndecided: a duplicate of a claim that is still being decided shares its outcome, whichever it is (promise 3).
func TestUndecided(t *testing.T) {
	for _, test := range []struct {
		name    string
		outcome error
		opts    []Option
	}{
		{"granted", nil, nil},
		{"failed", errTest, []Option{WithFailClosed()}},
	} {
		inBubble(t, test.name, func(t *testing.T) {
			r := newRig(t, nil, test.opts...)
			r.store.onClaim = func(context.Context, *Envelope) error {
				time.Sleep(3 * time.Second)
				return test.outcome
			}
			var deliveries []<-chan delivery
			for range 10 {
				deliveries = append(deliveries, r.deliverAsync("evt_1", "case_1"))
			}
			fresh := 0
			for _, result := range deliveries {
				d := <-result
				if !errors.Is(d.err, test.outcome) || d.took != 3*time.Second {
					t.Errorf("%v after %v, want %v after 3s", d.err, d.took, test.outcome)
				}
				if d.fresh {
					fresh++
				}
			}
			synctest.Wait()
			calls := r.called()
			if test.outcome == nil {
				expectEqual(t, "fresh", fresh, 1)
				expectList(t, "called", calls, "evt_1")
				expectEqual(t, "duplicates", r.count(Duplicate), 9)
				return
			}
			expectEqual(t, "fresh", fresh, 0)
			expectList(t, "called", calls)
			expectEqual(t, "refused", r.count(Refused), 10)
			r.store.onClaim = nil
			r.deliver(t, "evt_1", "case_1")
		})
	}

	inBubble(t, "no room", func(t *testing.T) {
		r := newRig(t, func(context.Context, *Envelope) error { time.Sleep(time.Minute); return nil }, WithBacklog(1))
		r.deliver(t, "evt_0", "case_0")
		first := r.deliverAsync("evt_1", "case_1")
		time.Sleep(time.Second)
		second := r.deliverAsync("evt_1", "case_1")
		if d := <-first; !errors.Is(d.err, ErrBusy) {
			t.Errorf("first: %v", d.err)
		}
		if d := <-second; !errors.Is(d.err, ErrBusy) || d.took != 4*time.Second {
			t.Errorf("second: %v after %v", d.err, d.took)
		}
	})

	// A store that panics must not leave duplicates waiting.
	inBubble(t, "panicked", func(t *testing.T) {
		r := newRig(t, nil)
		r.store.onClaim = func(context.Context, *Envelope) error {
			time.Sleep(time.Second)
			panic("the store")
		}
		var first sync.WaitGroup
		first.Go(func() {
			defer func() {
				if recover() == nil {
					t.Error("the panic was swallowed")
				}
			}()
			_, _ = r.Deliver(t.Context(), eventBody("evt_1", "case_1"))
		})
		synctest.Wait()
		if d := <-r.deliverAsync("evt_1", "case_1"); d.err == nil {
			t.Error("the duplicate was acknowledged")
		}
		first.Wait()
	})
}

// TestStoreFails: a plain Deduper that fails. Failing open handles the event without it.
func TestStoreFails(t *testing.T) {
	inBubble(t, "open", func(t *testing.T) {
		r := newRig(t, nil)
		r.store.onClaim = func(context.Context, *Envelope) error { return errTest }
		r.deliver(t, "evt_1", "case_1")
		synctest.Wait()
		expectList(t, "outcomes", r.outcomes("evt_1")[1:], StoreFailed, Handled)
	})
	inBubble(t, "closed", func(t *testing.T) {
		r := newRig(t, nil, WithFailClosed())
		r.store.onClaim = func(context.Context, *Envelope) error { return errTest }
		_, err := r.Deliver(t.Context(), eventBody("evt_1", "case_1"))
		if !errors.Is(err, errTest) {
			t.Errorf("Deliver: %v, want %v", err, errTest)
		}
		expectList(t, "outcomes", r.outcomes("evt_1"), StoreFailed, Refused)
		calls := r.store.noted() // the id may have been recorded all the same
		if len(calls) != 2 || !strings.HasPrefix(calls[1], "done evt_1 ") || strings.HasSuffix(calls[1], "<nil>") {
			t.Errorf("store: %q, want Done with an error at the end", calls)
		}
		expectList(t, "called", r.called())
	})
}

// TestObservation: how long things took, which attempt it was, and in which context.
func TestObservation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var observed []Observation
		var mu sync.Mutex
		store := &spyStore{onClaim: func(context.Context, *Envelope) error { time.Sleep(time.Second); return nil }}
		attempts := 0
		r := Handler(Callbacks{Other: func(context.Context, *Envelope) error {
			time.Sleep(time.Minute)
			if attempts++; attempts == 1 {
				return errTest
			}
			return nil
		}}, WithDeduper(store), WithRetry(2, time.Hour), WithObserver(func(ctx context.Context, o Observation) {
			if ctx.Value(contextKey{}) != "v" {
				t.Errorf("%s without the values of the delivery", o.Outcome)
			}
			mu.Lock()
			defer mu.Unlock()
			observed = append(observed, o)
		}))
		ctx := context.WithValue(t.Context(), contextKey{}, "v")
		body := []byte(`{"event_id":"evt_1"}`)
		if fresh, err := r.Deliver(ctx, body); !fresh || err != nil {
			t.Fatal(fresh, err)
		}
		body[0] = 'X' // Deliver has a copy
		if _, err := r.Deliver(ctx, body); !errors.Is(err, ErrMalformed) {
			t.Errorf("%v, want %v", err, ErrMalformed)
		}
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		want := []Observation{
			{Outcome: Accepted, Elapsed: time.Second},
			{Outcome: Refused},
			{Outcome: Retrying, Attempt: 1, Elapsed: time.Minute},
			{Outcome: Handled, Attempt: 2, Elapsed: time.Minute},
		}
		if len(observed) != len(want) {
			t.Fatalf("observed %v", observed)
		}
		for i, o := range observed {
			if o.Outcome != want[i].Outcome || o.Attempt != want[i].Attempt || o.Elapsed != want[i].Elapsed {
				t.Errorf("observed %s, attempt %d, after %v; want %+v", o.Outcome, o.Attempt, o.Elapsed, want[i])
			}
			if o.Outcome != Refused && string(o.Body) != `{"event_id":"evt_1"}` {
				t.Errorf("%s: body %q", o.Outcome, o.Body)
			}
		}
	})
}

// TestDefaultObserver: problems go to the log, with what is needed to find them and nothing of the body.
func TestDefaultObserver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		before := slog.Default()
		defer slog.SetDefault(before)
		slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
		r := Handler(Callbacks{CaseCompleted: func(_ context.Context, env *Envelope, _ *CaseCompleted) error {
			if env.EventID == "evt_bad" {
				panic("oops")
			}
			return nil
		}}, WithRetry(1, 0))
		for _, body := range [][]byte{eventBody("evt_good", "case_1"), []byte(`{"event_id":"evt_new"}`)} {
			if fresh, err := r.Deliver(t.Context(), body); !fresh || err != nil {
				t.Fatal(fresh, err)
			}
		}
		synctest.Wait()
		expectEqual(t, "log without problems", log.String(), "")
		_, _ = r.Deliver(t.Context(), eventBody("evt_bad", "case_secret"))
		_, _ = r.Deliver(t.Context(), []byte("case_secret"))
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{string(GaveUp), "evt_bad", "oops", "TestDefaultObserver", string(Refused)} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("the log lacks %q: %s", want, &log)
			}
		}
		if strings.Contains(log.String(), "case_secret") {
			t.Errorf("the log quotes the body: %s", &log)
		}
	})
}

// TestSameIDAtOnce: 1,000 ids, 100 deliveries of each: one callback for each (promise 3).
func TestSameIDAtOnce(t *testing.T) {
	const ids, times = 1000, 100
	var calls [ids]atomic.Int32
	var fresh atomic.Int32
	number := make(map[string]int)
	var bodies [][]byte
	for i := range ids {
		number[fmt.Sprint("evt_", i)] = i
		bodies = append(bodies, eventBody(fmt.Sprint("evt_", i), fmt.Sprint("case_", i)))
	}
	r := Handler(Callbacks{CaseCompleted: func(_ context.Context, env *Envelope, _ *CaseCompleted) error {
		calls[number[env.EventID]].Add(1)
		return nil
	}})
	var senders sync.WaitGroup
	for i := range times {
		senders.Go(func() {
			for n := range ids {
				ok, err := r.Deliver(t.Context(), bodies[(n+i/10)%ids]) // ten abreast, in ten waves
				if err != nil {
					t.Error(err)
				}
				if ok {
					fresh.Add(1)
				}
			}
		})
	}
	senders.Wait()
	if err := r.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	expectEqual(t, "fresh", fresh.Load(), ids)
	for i := range calls {
		expectEqual(t, fmt.Sprint("callbacks for evt_", i), calls[i].Load(), 1)
	}
}

// TestShutdown drains, and at the end of its context cancels and reports.
func TestShutdown(t *testing.T) {
	inBubble(t, "drains", func(t *testing.T) {
		attempts := 0
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			time.Sleep(time.Second)
			if env.EventID == "evt_0" {
				if attempts++; attempts < 3 {
					return errTest
				}
			}
			return nil
		}, WithConcurrency(1), WithBacklog(2))
		r.deliver(t, "evt_0", "case_1")
		r.deliver(t, "evt_1", "case_1")
		waiting := r.deliverAsync("evt_2", "case_2") // accepted in the middle of the shutdown
		synctest.Wait()
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := <-waiting; !d.fresh || d.err != nil {
			t.Errorf("the event that waited for room: %v, %v", d.fresh, d.err)
		}
		expectEqual(t, "handled", r.count(Handled), 3)
		expectEqual(t, "unfinished", r.count(Unfinished), 0)
	})

	inBubble(t, "refuses what is new", func(t *testing.T) {
		release := make(chan struct{})
		r := newRig(t, func(context.Context, *Envelope) error { <-release; return nil })
		r.deliver(t, "evt_1", "case_1")
		var stopping sync.WaitGroup
		stopping.Go(func() {
			if err := r.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		for _, id := range []string{"evt_1", "evt_2"} {
			if fresh, err := r.Deliver(t.Context(), eventBody(id, "case_2")); fresh || !errors.Is(err, ErrClosed) {
				t.Errorf("%s: %v, %v, want false, %v", id, fresh, err, ErrClosed)
			}
		}
		expectList(t, "store", r.store.noted(), "claim evt_1")
		close(release)
		stopping.Wait()
		expectList(t, "called", r.called(), "evt_1")
	})

	inBubble(t, "waits for a claim that is undecided", func(t *testing.T) {
		r := newRig(t, nil)
		r.store.onClaim = func(context.Context, *Envelope) error { time.Sleep(time.Second); return nil }
		delivering := r.deliverAsync("evt_1", "case_1")
		synctest.Wait()
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := <-delivering; !d.fresh || d.err != nil {
			t.Errorf("%v, %v", d.fresh, d.err)
		}
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Handled)
	})

	inBubble(t, "cancels and reports at its deadline", func(t *testing.T) {
		r := newRig(t, func(ctx context.Context, env *Envelope) error {
			switch env.EventID {
			case "evt_failing":
				return errTest
			case "evt_stubborn":
				time.Sleep(time.Hour)
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		}, WithConcurrency(3), WithBacklog(5), WithRetry(3, time.Hour))
		events := []string{"evt_failing", "evt_running", "evt_stubborn", "evt_same_case", "evt_ready1", "evt_ready2"}
		for _, id := range events {
			caseID := id
			if id == "evt_same_case" {
				caseID = "evt_running"
			}
			r.deliver(t, id, caseID)
			synctest.Wait()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		err := r.Shutdown(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Second {
			t.Errorf("Shutdown: %v after %v", err, time.Since(start))
		}
		for _, id := range events {
			os := r.observations(id)
			last := os[len(os)-1]
			if last.Outcome != Unfinished || !errors.Is(last.Err, context.DeadlineExceeded) ||
				!bytes.Contains(last.Body, []byte(id)) {
				t.Errorf("last of %s: %s, %v, %q", id, last.Outcome, last.Err, last.Body)
			}
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		expectEqual(t, "unfinished", r.count(Unfinished), len(events))
		dones := strings.Join(r.store.noted(), "\n")
		for _, id := range events {
			want := "done " + id + " " + ErrClosed.Error()
			if id == "evt_stubborn" { // which returned nil in the end
				want = "done " + id + " <nil>"
			}
			expectEqual(t, want, strings.Count(dones, want), 1)
		}
		for _, id := range []string{"evt_same_case", "evt_ready1", "evt_ready2"} {
			if slices.Contains(r.called(), id) && id == "evt_same_case" {
				t.Errorf("%s was started", id)
			}
		}
		expectEqual(t, "goroutines left", ourGoroutines(), 0)
	})

	inBubble(t, "passes its deadline before a claim is decided", func(t *testing.T) {
		r := newRig(t, nil)
		r.store.onClaim = func(context.Context, *Envelope) error { time.Sleep(2 * time.Second); return nil }
		delivering := r.deliverAsync("evt_1", "case_1")
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := r.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown: %v", err)
		}
		if d := <-delivering; d.fresh || !errors.Is(d.err, ErrClosed) {
			t.Errorf("the delivery: %v, %v, want false, %v", d.fresh, d.err, ErrClosed)
		}
		synctest.Wait()
		expectList(t, "called", r.called())
		expectList(t, "store", r.store.noted(), "claim evt_1", "done evt_1 "+ErrClosed.Error())
	})

	// The callback has failed, and before its rest begins there is no more time for one: the id must not stay claimed.
	inBubble(t, "fails at the deadline", func(t *testing.T) {
		r := &rig{store: new(spyStore)}
		r.Receiver = Handler(Callbacks{Other: func(context.Context, *Envelope) error { return errTest }},
			WithDeduper(r.store), WithObserver(func(ctx context.Context, o Observation) {
				r.record(ctx, o)
				if o.Outcome == Retrying {
					time.Sleep(2 * time.Second)
				}
			}))
		if fresh, err := r.Deliver(t.Context(), []byte(`{"event_id":"evt_1"}`)); !fresh || err != nil {
			t.Fatal(fresh, err)
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := r.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown: %v", err)
		}
		time.Sleep(time.Minute)
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Retrying, Unfinished)
		expectList(t, "store", r.store.noted(), "claim evt_1", "done evt_1 "+ErrClosed.Error())
	})

	inBubble(t, "twice, at once, and with nothing to do", func(t *testing.T) {
		idle := newRig(t, nil)
		over, cancel := context.WithCancel(t.Context())
		cancel()
		for range 2 { // nothing is left, so the context does not matter
			if err := idle.Shutdown(over); err != nil {
				t.Errorf("Shutdown of an idle receiver: %v", err)
			}
		}
		r := newRig(t, func(context.Context, *Envelope) error { time.Sleep(time.Minute); return nil })
		r.deliver(t, "evt_1", "case_1")
		var stopping sync.WaitGroup
		for range 10 {
			stopping.Go(func() {
				if err := r.Shutdown(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		stopping.Wait()
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Handled)
	})

	inBubble(t, "again after its deadline", func(t *testing.T) {
		r := newRig(t, func(context.Context, *Envelope) error { time.Sleep(time.Minute); return nil })
		r.deliver(t, "evt_1", "case_1")
		synctest.Wait()
		over, cancel := context.WithCancel(t.Context())
		cancel()
		for range 3 {
			if err := r.Shutdown(over); !errors.Is(err, context.Canceled) {
				t.Errorf("Shutdown: %v", err)
			}
		}
		if err := r.Shutdown(t.Context()); err != nil { // waits for the callback that ignores its context
			t.Errorf("Shutdown: %v", err)
		}
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Unfinished, Handled)
	})
}

// TestShutdownUnderLoad shuts down while events come in, with a deadline that passes in every second round. What was
// acknowledged is handled or reported; what was refused is not run after that.
func TestShutdownUnderLoad(t *testing.T) {
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 2))
			takes := time.Duration(1+rng.IntN(500)) * time.Millisecond
			r := newRig(t, func(ctx context.Context, env *Envelope) error {
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(takes):
				}
				if env.EventID[len(env.EventID)-1] == '7' {
					return errTest
				}
				return nil
			}, WithConcurrency(1+rng.IntN(4)), WithBacklog(1+rng.IntN(10)), WithRetry(2, time.Second))
			deliveries := make(map[string]<-chan delivery)
			for i := range 40 {
				id := fmt.Sprint("evt_", i)
				deliveries[id] = r.deliverAsync(id, fmt.Sprint("case_", i%6))
				if rng.IntN(4) == 0 {
					time.Sleep(takes / 2)
				}
			}
			ctx, cancel := t.Context(), context.CancelFunc(func() {})
			if seed%2 == 0 {
				ctx, cancel = context.WithTimeout(ctx, time.Duration(rng.IntN(1000))*time.Millisecond)
			}
			defer cancel()
			if err := r.Shutdown(ctx); err != nil && seed%2 == 1 {
				t.Error(err)
			}
			results := make(map[string]delivery)
			for id, result := range deliveries {
				results[id] = <-result
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			for id, d := range results {
				outcomes := r.outcomes(id)
				ends := 0
				for _, o := range outcomes {
					if o == Handled || o == GaveUp || o == Unfinished {
						ends++
					}
				}
				switch {
				case d.err == nil && ends != 1:
					t.Errorf("%s was acknowledged, and then: %v", id, outcomes)
				case d.err != nil && (ends > 0 || len(r.times(id)) > 0):
					t.Errorf("%s was refused with %v, and then: %v", id, d.err, outcomes)
				}
			}
			expectEqual(t, "goroutines left", ourGoroutines(), 0)
			if t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		})
	}
}

// ourGoroutines counts the goroutines that run, or were started by, a receiver.
func ourGoroutines() (n int) {
	stacks := make([]byte, 4<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for stack := range strings.SplitSeq(string(stacks), "\n\n") {
		if strings.Contains(stack, "offloadhook.(*Receiver)") {
			n++
		}
	}
	return n
}

// TestNoGoroutines: none while nothing is pending, but for the sweep of an Inbox, and none at all after Shutdown.
func TestNoGoroutines(t *testing.T) {
	for name, sweeps := range map[string]int{"deduper": 0, "inbox": 1} {
		inBubble(t, name, func(t *testing.T) {
			var opts []Option
			if sweeps > 0 {
				opts = append(opts, WithInbox(new(fakeInbox)))
			}
			r := newRig(t, nil, opts...)
			for i := range 100 {
				r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i%10))
			}
			synctest.Wait()
			expectEqual(t, "handled", r.count(Handled), 100)
			expectEqual(t, "goroutines at rest", ourGoroutines(), sweeps)
			if err := r.Shutdown(t.Context()); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			expectEqual(t, "goroutines after Shutdown", ourGoroutines(), 0)
		})
	}
}

// fakeInbox is an Inbox in memory. A receiver that is abandoned and another that is given the same one are what a crash
// and a restart are to a real one.
type fakeInbox struct {
	onClaim   func(ctx context.Context, env *Envelope) error // after storing; an error is returned in place of nil
	onDone    func(env *Envelope) error                      // an error is returned in place of recording
	onPending func(call int) error                           // after the snapshot was taken; an error is yielded first
	goesOn    bool                                           // after such an error, with the events
	onYield   func(call int, id string)                      // before each event, and with "" at the end

	mu       sync.Mutex // protects what follows, and the functions above once a receiver has the store
	events   []*inboxEvent
	handled  map[string]bool
	pendings []time.Time // when Pending was called
}

type inboxEvent struct {
	id     string
	raw    []byte
	gaveUp time.Time // zero unless given up
}

func (in *fakeInbox) find(id string) int {
	return slices.IndexFunc(in.events, func(e *inboxEvent) bool { return e.id == id })
}

func (in *fakeInbox) Claim(ctx context.Context, env *Envelope) (fresh bool, err error) {
	in.mu.Lock()
	i := in.find(env.EventID)
	fresh = !in.handled[env.EventID] && (i < 0 || !in.events[i].gaveUp.IsZero())
	if fresh {
		if i >= 0 {
			in.events = slices.Delete(in.events, i, i+1)
		}
		in.events = append(in.events, &inboxEvent{id: env.EventID, raw: bytes.Clone(env.Raw)})
	}
	onClaim := in.onClaim
	in.mu.Unlock()
	if onClaim != nil {
		err = onClaim(ctx, env)
	}
	return fresh && err == nil, err
}

func (in *fakeInbox) Done(_ context.Context, env *Envelope, result error) error {
	in.mu.Lock()
	onDone := in.onDone
	in.mu.Unlock()
	if onDone != nil {
		if err := onDone(env); err != nil {
			return err
		}
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	i := in.find(env.EventID)
	switch {
	case i < 0 || !in.events[i].gaveUp.IsZero():
	case result != nil:
		in.events[i].gaveUp = time.Now()
	default:
		in.events = slices.Delete(in.events, i, i+1)
		if in.handled == nil {
			in.handled = make(map[string]bool)
		}
		in.handled[env.EventID] = true
	}
	return nil
}

func (in *fakeInbox) Pending(context.Context) iter.Seq2[*Envelope, error] {
	return func(yield func(*Envelope, error) bool) {
		in.mu.Lock()
		in.pendings = append(in.pendings, time.Now())
		call := len(in.pendings)
		for _, e := range slices.Clone(in.events) {
			if !e.gaveUp.IsZero() && (call == 1 || time.Since(e.gaveUp) >= 10*time.Minute) {
				i := in.find(e.id)
				in.events = append(slices.Delete(in.events, i, i+1), &inboxEvent{id: e.id, raw: e.raw})
			}
		}
		snapshot := slices.DeleteFunc(slices.Clone(in.events), func(e *inboxEvent) bool { return !e.gaveUp.IsZero() })
		onPending, onYield := in.onPending, in.onYield
		in.mu.Unlock()
		if call > 100_000 {
			panic("Pending is called over and over")
		}
		if onPending != nil {
			if err := onPending(call); err != nil && (!yield(nil, err) || !in.goesOn) {
				return
			}
		}
		for _, e := range snapshot {
			if onYield != nil {
				onYield(call, e.id)
			}
			env, err := ParseEnvelope(e.raw)
			if !yield(env, err) {
				return
			}
		}
		if onYield != nil {
			onYield(call, "")
		}
	}
}

// change runs f, which sets some of the functions.
func (in *fakeInbox) change(f func()) {
	in.mu.Lock()
	defer in.mu.Unlock()
	f()
}

// put stores an event as if it had been claimed before the receiver was there.
func (in *fakeInbox) put(id, caseID string) {
	in.events = append(in.events, &inboxEvent{id: id, raw: eventBody(id, caseID)})
}

// pending returns the ids that are not done.
func (in *fakeInbox) pending() (ids []string) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, e := range in.events {
		ids = append(ids, e.id)
	}
	return ids
}

// readings returns when Pending was called.
func (in *fakeInbox) readings() []time.Time {
	in.mu.Lock()
	defer in.mu.Unlock()
	return slices.Clone(in.pendings)
}

// TestInboxStartsBehind: an event of a case must not overtake an older one that waits in the store (promise 5).
func TestInboxStartsBehind(t *testing.T) {
	inBubble(t, "until Pending has been read to its end", func(t *testing.T) {
		in := new(fakeInbox)
		in.put("evt_old1", "case_1")
		in.put("evt_old2", "case_1")
		in.onYield = func(_ int, id string) {
			if id == "evt_old2" {
				time.Sleep(5 * time.Second)
			}
		}
		r := newRig(t, nil, WithInbox(in))
		time.Sleep(time.Second) // in the middle of the reading
		r.deliver(t, "evt_new1", "case_1")
		r.deliver(t, "evt_new2", "case_2")
		synctest.Wait()
		if called := r.called(); slices.Contains(called, "evt_new1") || slices.Contains(called, "evt_new2") {
			t.Errorf("called in the middle of the reading: %v", called)
		}
		time.Sleep(time.Minute)
		called := slices.DeleteFunc(r.called(), func(id string) bool { return id == "evt_new2" })
		expectList(t, "case_1", called, "evt_old1", "evt_old2", "evt_new1")
		expectEqual(t, "handled", r.count(Handled), 4)
		expectList(t, "in the store", in.pending())
	})

	inBubble(t, "an error is no end", func(t *testing.T) {
		in := new(fakeInbox)
		in.put("evt_old", "case_1")
		const failures = 5
		in.onPending = func(call int) error {
			if call <= failures {
				return errTest
			}
			return nil
		}
		r := newRig(t, func(context.Context, *Envelope) error {
			if len(in.readings()) <= failures {
				t.Error("called before a clean reading")
			}
			return nil
		}, WithInbox(in))
		synctest.Wait()
		r.deliver(t, "evt_new", "case_1")
		time.Sleep(2 * time.Minute)
		expectList(t, "called", r.called(), "evt_old", "evt_new")
		told := r.observations("")
		expectEqual(t, "errors told", len(told), failures)
		for _, o := range told {
			if o.Outcome != StoreFailed || !errors.Is(o.Err, errTest) {
				t.Errorf("told %s, %v", o.Outcome, o.Err)
			}
		}
	})

	// What came while there was no room is in the store. What comes when there is some again must stay behind it.
	inBubble(t, "room comes free in the middle", func(t *testing.T) {
		in := new(fakeInbox)
		release := make(map[string]chan struct{})
		for _, id := range []string{"evt_a", "evt_b"} {
			release[id] = make(chan struct{})
		}
		goOn := make(chan struct{})
		in.onYield = func(call int, id string) {
			if call == 2 && id == "" {
				<-goOn
			}
		}
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			if wait := release[env.EventID]; wait != nil {
				<-wait
			}
			return nil
		}, WithInbox(in), WithBacklog(2))
		synctest.Wait()
		r.deliver(t, "evt_a", "case_a")
		synctest.Wait()
		r.deliver(t, "evt_b", "case_b")
		synctest.Wait()
		r.deliver(t, "evt_1", "case_1") // finds no room
		close(release["evt_a"])         // so the store is read, and evt_1 takes the room
		synctest.Wait()
		r.deliver(t, "evt_2", "case_1") // finds no room
		close(release["evt_b"])
		synctest.Wait()
		r.deliver(t, "evt_3", "case_1") // finds some
		close(goOn)
		time.Sleep(time.Minute)
		expectEqual(t, "readings", len(in.readings()) > 2, true)
		expectList(t, "called", r.called(), "evt_a", "evt_b", "evt_1", "evt_2", "evt_3")
	})

	// A replayed event has no request: its context has no values, and its bytes are what was received.
	inBubble(t, "without a request", func(t *testing.T) {
		in := new(fakeInbox)
		raw := []byte(" {\"data\" : {\"x\":1e400},\r\n \"event_id\":\"evt_1\" }\n")
		in.events = append(in.events, &inboxEvent{id: "evt_1", raw: raw})
		r := newRig(t, func(ctx context.Context, env *Envelope) error {
			if ctx.Value(contextKey{}) != nil || ctx.Value(http.ServerContextKey) != nil {
				t.Error("the context has values")
			}
			expectEqual(t, "Raw", string(env.Raw), string(raw))
			return nil
		}, WithInbox(in))
		synctest.Wait()
		expectList(t, "called", r.called(), "evt_1")
	})
}

// TestInboxUndecided: a reading that meets an id whose claim is not decided neither runs it nor passes over it.
func TestInboxUndecided(t *testing.T) {
	for _, test := range []struct {
		name string
		err  error
	}{
		{"granted", nil},
		{"failed", errTest}, // but stored all the same
	} {
		inBubble(t, test.name, func(t *testing.T) {
			in := new(fakeInbox)
			in.onClaim = func(_ context.Context, env *Envelope) error {
				if env.EventID == "evt_1" {
					time.Sleep(4 * time.Second)
					return test.err
				}
				return nil
			}
			in.onPending = func(call int) error {
				if call == 1 {
					time.Sleep(time.Second)
				}
				return nil
			}
			r := newRig(t, nil, WithInbox(in))
			// The claim is in the store before the first snapshot is taken, or after it: both are played.
			first := r.deliverAsync("evt_1", "case_1")
			time.Sleep(3 * time.Second)
			expectList(t, "called before the claim is decided", r.called())
			later := r.deliverAsync("evt_2", "case_1")
			if d := <-later; !d.fresh || d.err != nil {
				t.Errorf("the later event: %v, %v", d.fresh, d.err)
			}
			if d := <-first; !errors.Is(d.err, test.err) {
				t.Errorf("the first event: %v, want %v", d.err, test.err)
			}
			time.Sleep(time.Minute)
			called := r.called()
			slices.Sort(called)
			expectList(t, "called", called, "evt_1", "evt_2")
			expectList(t, "in the store", in.pending())
		})
	}

	// The reading is held at the undecided id, and what it has read behind that waits too.
	inBubble(t, "in the snapshot", func(t *testing.T) {
		in := new(fakeInbox)
		claiming := make(chan struct{})
		in.onPending = func(call int) error {
			if call == 2 {
				<-claiming
			}
			return nil
		}
		in.onClaim = func(_ context.Context, env *Envelope) error {
			if env.EventID == "evt_1" {
				time.Sleep(4 * time.Second)
			}
			return nil
		}
		r := newRig(t, func(context.Context, *Envelope) error { time.Sleep(time.Second); return nil }, WithInbox(in))
		time.Sleep(9 * time.Second)
		first := r.deliverAsync("evt_1", "case_1") // undecided when Pending is called for the second time
		time.Sleep(2 * time.Second)
		close(claiming)
		synctest.Wait()
		expectList(t, "called before the claim is decided", r.called())
		if d := <-first; !d.fresh || d.err != nil {
			t.Errorf("the first event: %v, %v", d.fresh, d.err)
		}
		time.Sleep(time.Minute)
		expectList(t, "called", r.called(), "evt_1")
	})
}

// TestInboxFinishesDuringReading: what ends between the snapshot and its turn is not run again (promise 3).
func TestInboxFinishesDuringReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := new(fakeInbox)
		in.onYield = func(call int, _ string) {
			if call == 2 {
				time.Sleep(5 * time.Second)
			}
		}
		r := newRig(t, func(context.Context, *Envelope) error { time.Sleep(12 * time.Second); return nil }, WithInbox(in))
		time.Sleep(time.Second)
		r.deliver(t, "evt_1", "case_1")
		time.Sleep(time.Minute)
		expectList(t, "called", r.called(), "evt_1")
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Handled)
	})
}

// TestInboxIsTheQueue: with no room in memory the answer is still a 202, and the event is read back in order, once.
func TestInboxIsTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const events, cases, concurrency, backlog = 2000, 10, 3, 8
		in := new(fakeInbox)
		release := make(chan struct{})
		order := make(map[string][]string)
		var mu sync.Mutex
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			<-release
			mu.Lock()
			defer mu.Unlock()
			order[env.caseID()] = append(order[env.caseID()], env.EventID)
			return nil
		}, WithInbox(in), WithConcurrency(concurrency), WithBacklog(backlog))
		p := serve(t, &http.Server{Handler: r})
		synctest.Wait()
		conn := p.dial(t)
		start := time.Now()
		want := make(map[string][]string)
		for i := range events {
			id, caseID := fmt.Sprint("evt_", i), fmt.Sprint("case_", i%cases)
			want[caseID] = append(want[caseID], id)
			body := string(eventBody(id, caseID))
			send(t, conn, post(body, len(body)))
			expectEqual(t, "status", readAnswer(t, conn).StatusCode, 202)
		}
		expectEqual(t, "took", time.Since(start), 0)
		if n := ourGoroutines(); n > concurrency+2 { // and the connection, and the sweep
			t.Errorf("%d goroutines", n)
		}
		time.Sleep(time.Minute)
		r.Receiver.mu.Lock()
		if held := len(r.tasks); held > backlog {
			t.Errorf("%d events in memory, want at most %d", held, backlog)
		}
		r.Receiver.mu.Unlock()
		close(release)
		time.Sleep(time.Minute)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		for caseID, ids := range want {
			expectList(t, caseID, order[caseID], ids...)
		}
		expectEqual(t, "handled", r.count(Handled), events)
		expectList(t, "in the store", in.pending())
	})
}

// TestInboxRetriesTakeNoRoom: events that wait for another attempt do not fill the backlog.
func TestInboxRetriesTakeNoRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			if strings.HasPrefix(env.EventID, "evt_bad") {
				return errTest
			}
			return nil
		}, WithInbox(new(fakeInbox)), WithBacklog(4), WithConcurrency(2), WithRetry(2, 10*time.Hour))
		for i := range 4 {
			r.deliver(t, fmt.Sprint("evt_bad", i), fmt.Sprint("case_bad", i))
		}
		time.Sleep(time.Minute)
		expectEqual(t, "waiting for another attempt", r.count(Retrying), 4)
		for i := range 20 {
			r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i))
		}
		time.Sleep(time.Minute)
		expectEqual(t, "handled", r.count(Handled), 20)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := r.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
}

// TestInboxSweep: Pending is called every 10 s, whatever else happens, since a shared store renews its lease there, and
// not much more often.
func TestInboxSweep(t *testing.T) {
	check := func(t *testing.T, in *fakeInbox, since time.Time, period time.Duration) {
		t.Helper()
		last, n := since, 0
		for _, at := range append(in.readings(), since.Add(period)) {
			if at.Before(since) {
				last = at
				continue
			}
			if gap := at.Sub(last); gap > 10*time.Second {
				t.Errorf("no reading for %v", gap)
			}
			last = at
			n++
		}
		if most := 2 * int(period/(10*time.Second)); n > most {
			t.Errorf("%d readings in %v, want at most %d", n, period, most)
		}
	}
	inBubble(t, "idle", func(t *testing.T) {
		in := new(fakeInbox)
		newRig(t, nil, WithInbox(in))
		start := time.Now()
		time.Sleep(5 * time.Minute)
		check(t, in, start, 5*time.Minute)
	})
	inBubble(t, "full", func(t *testing.T) {
		in := new(fakeInbox)
		r := newRig(t, func(ctx context.Context, _ *Envelope) error { <-ctx.Done(); return ctx.Err() },
			WithInbox(in), WithConcurrency(2), WithBacklog(3))
		synctest.Wait()
		for i := range 20 {
			r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i))
		}
		synctest.Wait()
		start := time.Now()
		time.Sleep(5 * time.Minute)
		check(t, in, start, 5*time.Minute)
		over, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.Shutdown(over); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	inBubble(t, "draining", func(t *testing.T) {
		in := new(fakeInbox)
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			if env.EventID == "evt_0" {
				time.Sleep(5 * time.Minute)
			} else {
				time.Sleep(15 * time.Second)
			}
			return nil
		}, WithInbox(in), WithConcurrency(2), WithBacklog(30))
		synctest.Wait()
		for i := range 20 {
			r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i))
		}
		synctest.Wait()
		start := time.Now()
		if err := r.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		check(t, in, start, 5*time.Minute)
	})
}

// TestInboxFails: an Inbox that fails to claim refuses, whatever the receiver does with a plain Deduper.
func TestInboxFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := new(fakeInbox)
		r := newRig(t, nil, WithInbox(in))
		synctest.Wait()
		in.onClaim = func(context.Context, *Envelope) error { return errTest }
		if fresh, err := r.Deliver(t.Context(), []byte(`{"event_id":"evt_1"}`)); fresh || !errors.Is(err, errTest) {
			t.Errorf("Deliver: %v, %v", fresh, err)
		}
		synctest.Wait()
		expectList(t, "outcomes", r.outcomes("evt_1"), StoreFailed, Refused)
		expectList(t, "called now", r.called())
		in.onClaim = nil
		r.deliver(t, "evt_2", "case_2")
		synctest.Wait()
		expectList(t, "called", r.called(), "evt_2")
	})

	// With an Inbox there is no end to recording the end: until then another receiver would run it again.
	inBubble(t, "to record", func(t *testing.T) {
		in := new(fakeInbox)
		r := newRig(t, nil, WithInbox(in))
		failures := 0
		in.onDone = func(*Envelope) error {
			if failures++; failures <= 30 {
				return errTest
			}
			return nil
		}
		synctest.Wait()
		r.deliver(t, "evt_1", "case_1")
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		expectList(t, "called", r.called(), "evt_1")
		expectEqual(t, "store failures", r.count(StoreFailed), 30)
		expectEqual(t, "handled", r.count(Handled), 1)
		expectList(t, "in the store", in.pending())
	})
}

// TestInboxLost: the store is another's now. Refuse, cancel what runs, start nothing, and say so.
func TestInboxLost(t *testing.T) {
	lost := fmt.Errorf("taken over: %w", ErrClosed)
	for _, test := range []struct {
		name string
		lose func(r *rig, in *fakeInbox)
	}{
		{"Claim", func(r *rig, in *fakeInbox) {
			in.change(func() { in.onClaim = func(context.Context, *Envelope) error { return lost } })
			_, _ = r.Deliver(context.Background(), eventBody("evt_claim", "case_claim"))
		}},
		{"Pending", func(r *rig, in *fakeInbox) {
			in.change(func() { in.onPending = func(int) error { return lost } })
			time.Sleep(11 * time.Second)
		}},
		{"Done", func(r *rig, in *fakeInbox) {
			in.change(func() { in.onDone = func(*Envelope) error { return lost } })
			time.Sleep(31 * time.Second) // until evt_short ends
		}},
	} {
		inBubble(t, test.name, func(t *testing.T) {
			in := new(fakeInbox)
			r := newRig(t, func(ctx context.Context, env *Envelope) error {
				if env.EventID == "evt_short" {
					select {
					case <-time.After(30 * time.Second):
						return nil
					case <-ctx.Done():
					}
				}
				<-ctx.Done()
				return ctx.Err()
			}, WithInbox(in), WithConcurrency(2))
			p := serve(t, &http.Server{Handler: r})
			synctest.Wait()
			for _, id := range []string{"evt_running", "evt_short", "evt_ready"} {
				r.deliver(t, id, id)
				synctest.Wait()
			}
			test.lose(r, in)
			synctest.Wait()
			claims := 0
			in.change(func() { in.onClaim = func(context.Context, *Envelope) error { claims++; return lost } })
			conn := p.dial(t)
			body := string(eventBody("evt_new", "case_new"))
			send(t, conn, post(body, len(body)))
			resp := readAnswer(t, conn)
			expectEqual(t, "status", resp.StatusCode, 503)
			expectEqual(t, "Retry-After", resp.Header.Get("Retry-After"), "1")
			time.Sleep(time.Hour)
			synctest.Wait()
			expectEqual(t, "claims after that", claims, 0)
			expectList(t, "called", r.called(), "evt_running", "evt_short")
			expectList(t, "evt_running", r.outcomes("evt_running"), Accepted, Unfinished)
			expectList(t, "evt_ready", r.outcomes("evt_ready"), Accepted)
			if r.count(StoreFailed) == 0 {
				t.Error("the observer was not told")
			}
			for _, o := range r.observed {
				if o.Outcome == StoreFailed && !errors.Is(o.Err, ErrClosed) {
					t.Errorf("told %v", o.Err)
				}
			}
			if err := r.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			for _, id := range []string{"evt_running", "evt_short", "evt_ready"} {
				if !slices.Contains(in.pending(), id) {
					t.Errorf("%s is no longer in the store", id)
				}
			}
		})
	}
}

// TestInboxShutdown waits for what runs, and leaves the rest to the next instance.
func TestInboxShutdown(t *testing.T) {
	inBubble(t, "drains what runs", func(t *testing.T) {
		in := new(fakeInbox)
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			time.Sleep(time.Minute)
			if env.EventID == "evt_1" {
				return errTest
			}
			return nil
		}, WithInbox(in), WithConcurrency(2))
		synctest.Wait()
		for i := range 6 {
			r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i%3))
			synctest.Wait()
		}
		start := time.Now()
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		expectEqual(t, "took", time.Since(start), time.Minute)
		expectList(t, "called", r.called(), "evt_0", "evt_1")
		expectList(t, "evt_0", r.outcomes("evt_0"), Accepted, Handled)
		expectList(t, "evt_1", r.outcomes("evt_1"), Accepted, Unfinished) // it failed, and there is no time to try again
		expectEqual(t, "unfinished", r.count(Unfinished), 1)
		expectList(t, "in the store", in.pending(), "evt_1", "evt_2", "evt_3", "evt_4", "evt_5")

		in.pendings = nil
		next := newRig(t, nil, WithInbox(in), WithConcurrency(1))
		time.Sleep(time.Minute)
		expectList(t, "called by the next", next.called(), "evt_1", "evt_2", "evt_3", "evt_4", "evt_5")
		expectList(t, "then in the store", in.pending())
	})

	// What was handled must not be handled again because it could not be recorded at once (promise 3).
	inBubble(t, "records what has ended", func(t *testing.T) {
		in := new(fakeInbox)
		failures := 0
		in.onDone = func(*Envelope) error {
			if failures++; failures <= 3 {
				return errTest
			}
			return nil
		}
		r := newRig(t, nil, WithInbox(in))
		synctest.Wait()
		r.deliver(t, "evt_1", "case_1")
		synctest.Wait()
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		expectList(t, "called", r.called(), "evt_1")
		expectList(t, "in the store", in.pending())
	})

	inBubble(t, "at its deadline", func(t *testing.T) {
		in := new(fakeInbox)
		r := newRig(t, func(ctx context.Context, _ *Envelope) error { <-ctx.Done(); return ctx.Err() },
			WithInbox(in), WithConcurrency(2))
		synctest.Wait()
		for i := range 5 {
			r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i))
			synctest.Wait()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := r.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown: %v", err)
		}
		synctest.Wait()
		expectEqual(t, "unfinished", r.count(Unfinished), 2)
		for _, id := range []string{"evt_0", "evt_1"} {
			expectList(t, id, r.outcomes(id), Accepted, Unfinished)
		}
		expectEqual(t, "in the store", len(in.pending()), 5)
		expectEqual(t, "goroutines left", ourGoroutines(), 0)
	})
}

// TestInboxGaveUp: an event that was given up comes back after its rest, or by a redelivery.
func TestInboxGaveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := new(fakeInbox)
		r := newRig(t, func(context.Context, *Envelope) error { return errTest }, WithInbox(in), WithRetry(2, time.Second))
		synctest.Wait()
		r.deliver(t, "evt_1", "case_1")
		time.Sleep(9 * time.Minute)
		expectEqual(t, "attempts before the rest is over", len(r.times("evt_1")), 2)
		time.Sleep(2 * time.Minute)
		expectEqual(t, "attempts after it", len(r.times("evt_1")), 4)
		r.deliver(t, "evt_1", "case_1")
		time.Sleep(time.Minute)
		expectEqual(t, "attempts after a redelivery", len(r.times("evt_1")), 6)
		expectEqual(t, "gave up", r.count(GaveUp), 3)
	})
}

// TestInboxOrder: promises 1, 3 and 5 with a store as the queue, for many schedules: readings that fail or take long,
// claims that take long, a Done that fails, a small backlog.
func TestInboxOrder(t *testing.T) {
	for seed := range uint64(300) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 3))
			plan := newPlan(rng, 60)
			watch := newOrderWatch()
			in := &fakeInbox{goesOn: seed%2 == 0}
			late := *plan
			late.cases = nil
			for _, ids := range plan.cases { // the first of each case were there before
				n := rng.IntN(len(ids)+1) / 3
				for _, id := range ids[:n] {
					in.events = append(in.events, &inboxEvent{id: id, raw: plan.body(id)})
				}
				late.cases = append(late.cases, ids[n:])
			}
			before := len(in.events)
			var mu sync.Mutex
			chance := func(n int, most time.Duration) bool {
				mu.Lock()
				hit, pause := rng.IntN(n) == 0, time.Duration(rng.Int64N(int64(most)))
				mu.Unlock()
				if hit {
					time.Sleep(pause)
				}
				return hit
			}
			in.onClaim = func(context.Context, *Envelope) error { chance(3, 4*time.Second); return nil }
			in.onYield = func(int, string) { chance(4, 800*time.Millisecond) }
			in.onPending = func(int) error {
				if chance(4, time.Second) {
					return errTest
				}
				return nil
			}
			in.onDone = func(*Envelope) error {
				if chance(5, time.Second) {
					return errTest
				}
				return nil
			}
			concurrency, backlog := 1+rng.IntN(4), 1+rng.IntN(6)
			r := newRig(t, func(_ context.Context, env *Envelope) error { return watch.run(t, plan, env) },
				WithInbox(in), WithConcurrency(concurrency), WithBacklog(backlog), WithRetry(5, 100*time.Millisecond))
			senders := rand.New(rand.NewPCG(seed, 4))
			late.deliver(t, senders, func(body []byte) (bool, error) { return r.Deliver(t.Context(), body) })
			time.Sleep(time.Hour)
			synctest.Wait()
			watch.check(t, plan)
			expectEqual(t, "handled", r.count(Handled), 60)
			expectList(t, "in the store", in.pending())
			if t.Failed() {
				t.Fatalf("seed %d: %d before, concurrency %d, backlog %d", seed, before, concurrency, backlog)
			}
		})
	}
}

// TestMemory is the contract of Memory: what it remembers, how long, and how much of it.
func TestMemory(t *testing.T) {
	claim := func(t *testing.T, m *Memory, id string) bool {
		t.Helper()
		fresh, err := m.Claim(t.Context(), &Envelope{EventID: id})
		if err != nil {
			t.Errorf("Claim(%s): %v", id, err)
		}
		return fresh
	}
	done := func(t *testing.T, m *Memory, id string, result error) {
		t.Helper()
		if err := m.Done(t.Context(), &Envelope{EventID: id}, result); err != nil {
			t.Errorf("Done(%s): %v", id, err)
		}
	}
	handle := func(t *testing.T, m *Memory, id string) {
		t.Helper()
		expectEqual(t, "first claim of "+id, claim(t, m, id), true)
		done(t, m, id, nil)
	}

	inBubble(t, "zero value", func(t *testing.T) {
		var m Memory
		expectEqual(t, "first claim", claim(t, &m, "a"), true)
		expectEqual(t, "while it is being handled", claim(t, &m, "a"), false)
		expectEqual(t, "another id", claim(t, &m, "A"), true)
		done(t, &m, "a", nil)
		expectEqual(t, "once handled", claim(t, &m, "a"), false)
		done(t, &m, "A", errTest)
		expectEqual(t, "once given up", claim(t, &m, "A"), true)
		time.Sleep(24*time.Hour - time.Millisecond)
		expectEqual(t, "within a day", claim(t, &m, "a"), false)
		time.Sleep(time.Millisecond)
		expectEqual(t, "after a day", claim(t, &m, "a"), true)
		expectEqual(t, "being handled for a day", claim(t, &m, "A"), false)
	})

	inBubble(t, "a claim that is not held", func(t *testing.T) {
		var m Memory
		done(t, &m, "a", nil)
		expectEqual(t, "never granted", claim(t, &m, "a"), true)
		done(t, &m, "a", nil)
		done(t, &m, "a", errTest)
		expectEqual(t, "given up once handled", claim(t, &m, "a"), false)
	})

	inBubble(t, "TTL", func(t *testing.T) {
		m := Memory{TTL: time.Hour}
		for i := range 100 {
			handle(t, &m, fmt.Sprint(i))
			time.Sleep(time.Minute)
		}
		for i := range 100 { // 0 was handled 100 minutes ago, 99 a minute ago
			expectEqual(t, fmt.Sprint(i, " again"), claim(t, &m, fmt.Sprint(i)), i <= 40)
		}
	})

	inBubble(t, "Limit", func(t *testing.T) {
		m := Memory{Limit: 10}
		expectEqual(t, "first claim", claim(t, &m, "held"), true)
		for i := range 100 {
			handle(t, &m, fmt.Sprint(i))
		}
		expectEqual(t, "an id being handled", claim(t, &m, "held"), false)
		for i := 91; i < 100; i++ {
			expectEqual(t, fmt.Sprint(i, " again"), claim(t, &m, fmt.Sprint(i)), false)
		}
		expectEqual(t, "the oldest", claim(t, &m, "90"), true)
	})

	inBubble(t, "Limit below what is being handled", func(t *testing.T) {
		m := Memory{Limit: 10}
		for i := range 100 {
			claim(t, &m, fmt.Sprint(i))
		}
		for i := range 100 {
			expectEqual(t, fmt.Sprint(i, " again"), claim(t, &m, fmt.Sprint(i)), false)
			done(t, &m, fmt.Sprint(i), nil)
		}
		expectEqual(t, "the last", claim(t, &m, "99"), false)
	})

	t.Run("at once", func(t *testing.T) {
		const ids, times = 1000, 100
		var m Memory
		var fresh atomic.Int32
		var claimers sync.WaitGroup
		for range times {
			claimers.Go(func() {
				for i := range ids {
					if claim(t, &m, fmt.Sprint(i)) {
						fresh.Add(1)
						done(t, &m, fmt.Sprint(i), nil)
					}
				}
			})
		}
		claimers.Wait()
		expectEqual(t, "fresh", fresh.Load(), ids)
	})
}

// TestMemorySize: under 64 bytes for each of a million ids, also when others have gone again, and nothing in them that
// a collection would have to walk.
func TestMemorySize(t *testing.T) {
	const ids = 1_000_000
	heap := func() (bytes, scanned uint64) {
		runtime.GC()
		runtime.GC() // pools let go with the second
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		scan := []metrics.Sample{{Name: "/gc/scan/heap:bytes"}}
		metrics.Read(scan)
		return stats.HeapAlloc, scan[0].Value.Uint64()
	}
	var m Memory
	bytesBefore, scannedBefore := heap()
	n := 0
	for _, upTo := range []int{ids, ids + ids/4, ids + ids/2} {
		for ; n < upTo; n++ {
			env := Envelope{EventID: fmt.Sprint("evt_", n)}
			if fresh, _ := m.Claim(t.Context(), &env); !fresh {
				t.Fatalf("%s is not new", env.EventID)
			}
			_ = m.Done(t.Context(), &env, nil)
		}
		bytes, scanned := heap()
		if each := float64(int64(bytes-bytesBefore)) / ids; each >= 64 {
			t.Errorf("%.1f bytes an id after %d of them", each, n)
		}
		if each := float64(int64(scanned-scannedBefore)) / ids; each > 1 {
			t.Errorf("%.1f bytes an id for the collector to walk after %d of them", each, n)
		}
	}
	if fresh, _ := m.Claim(t.Context(), &Envelope{EventID: fmt.Sprint("evt_", n-ids)}); fresh {
		t.Error("an id within the limit is forgotten")
	}
}

// TestIDSet compares idSet with a map and a slice, for many random histories.
func TestIDSet(t *testing.T) {
	type entry struct {
		id digest
		at time.Time
	}
	for seed := range uint64(100) {
		rng := rand.New(rand.NewPCG(seed, 5))
		var set idSet
		var order []entry
		in := make(map[digest]bool)
		now := time.UnixMilli(1774131900000)
		most := 1 + rng.IntN(5000)
		spread := 1 + rng.IntN(2*most)
		pick := func() (d digest) {
			binary.BigEndian.PutUint64(d[:], uint64(rng.IntN(spread)))
			return d
		}
		forget := func() {
			delete(in, order[0].id)
			order = order[1:]
		}
		for range 20_000 {
			now = now.Add(time.Duration(rng.IntN(3)) * time.Millisecond)
			switch d := pick(); {
			case rng.IntN(200) == 0:
				then := now.Add(-time.Duration(rng.IntN(2*most)) * time.Millisecond)
				set.expire(then)
				for len(order) > 0 && !order[0].at.After(then) {
					forget()
				}
			case len(order) >= most:
				set.drop()
				forget()
			default:
				set.add(d, now)
				if !in[d] { // to add an id again does not renew it
					in[d] = true
					order = append(order, entry{d, now})
				}
			}
			if d := pick(); set.has(d) != in[d] {
				t.Fatalf("seed %d: has(%x) = %v, want %v, of %d", seed, d, set.has(d), in[d], len(order))
			}
			if set.len() != len(order) {
				t.Fatalf("seed %d: %d ids, want %d", seed, set.len(), len(order))
			}
		}
		for len(order) > 0 {
			oldest := order[0].id
			set.drop()
			forget()
			if set.has(oldest) || set.len() != len(order) || len(order) > 0 && !set.has(order[0].id) {
				t.Fatalf("seed %d: %x did not go first", seed, oldest)
			}
		}
	}
}

// FuzzHandler: whatever comes in gets an answer of the table, and costs nothing else when that is a refusal.
func FuzzHandler(f *testing.F) {
	for _, pattern := range []string{"testdata/*.json", "testdata/hostile/*"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			f.Fatalf("%s: %d files, %v", pattern, len(files), err)
		}
		for _, file := range files {
			body, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add("POST", "application/json", body)
		}
	}
	f.Add("GET", "", []byte{})
	f.Add("post", "text/json; a=b", []byte("{}"))
	f.Add("POST", "application/+json", []byte(`{"event_id":"\u0065vt","event_id\u0000":1}`))
	f.Fuzz(func(t *testing.T, method, contentType string, body []byte) {
		const limit = 2048
		var ran []*Envelope
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			ran = append(ran, env)
			return nil
		}, WithMaxBodyBytes(limit))
		serve := func() int {
			w := httptest.NewRecorder()
			r.ServeHTTP(w, &http.Request{
				Method: method, URL: new(url.URL), Header: http.Header{"Content-Type": {contentType}},
				Body: io.NopCloser(bytes.NewReader(body)), ContentLength: -1,
			})
			if w.Code >= 300 && (w.Body.Len() == 0 || w.Body.Len() > 120) || w.Code < 300 && w.Body.Len() > 0 {
				t.Errorf("%d with the body %q", w.Code, w.Body)
			}
			return w.Code
		}
		status := serve()
		again := serve()
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		want := 0
		switch {
		case method != "POST":
			want = 405
		case len(body) > limit:
			want = 413
		}
		switch {
		case status == 202 && want == 0:
			expectEqual(t, "the second time", again, 200)
			if len(ran) != 1 || !bytes.Equal(ran[0].Raw, body) || !json.Valid(body) {
				t.Errorf("%d callbacks for %q", len(ran), body)
			}
			expectEqual(t, "handled", r.count(Handled), 1)
			return
		case want == 0 && (status == 400 || status == 415), status == want, want == 413 && status == 415:
			expectEqual(t, "the second time", again, status)
		default:
			t.Errorf("status %d", status)
		}
		expectList(t, "callbacks", r.called())
		expectList(t, "store", r.store.noted())
		told := r.observations("")
		if len(told) != 2 || told[0].Outcome != Refused || told[0].Err == nil || !bytes.HasPrefix(body, told[0].Body) {
			t.Errorf("observed %v", told)
		}
	})
}

// benchBody makes events for a benchmark, each of another case, by changing digits in a prepared body.
type benchBody struct {
	body   []byte
	digits [][]byte
}

// newBenchBody returns a body with head in front of it.
func newBenchBody(b *testing.B, head func(length int) string) *benchBody {
	const caseID = "4fc5904d-0e44-4ed3-aa57-c4a47ad0ae4f" // of the fixture
	body, err := fs.ReadFile(Fixtures, "testdata/case_completed_b.json")
	if err != nil {
		b.Error(err)
	}
	body = append([]byte(head(len(body))), body...)
	made := &benchBody{body: body}
	for at := 0; ; {
		i := bytes.Index(body[at:], []byte(caseID))
		if i < 0 {
			break
		}
		made.digits = append(made.digits, body[at+i:at+i+16])
		at += i + len(caseID)
	}
	if len(made.digits) != 2 {
		b.Errorf("the fixture has its caseId %d times, want in event_id and data", len(made.digits))
	}
	return made
}

// number makes the body that of the nth event.
func (m *benchBody) number(n uint64) {
	for _, digits := range m.digits {
		for i, left := len(digits)-1, n; i >= 0; i-- {
			digits[i] = '0' + byte(left%10)
			left /= 10
		}
	}
}

// contender is a handler to be compared. drain returns when everything that it took is handled.
type contender struct {
	name string
	make func(handled func(c *CaseCompleted)) (handler http.Handler, drain func())
}

var contenders = []contender{
	// The bare floor: read the body, answer.
	{"floor", func(func(*CaseCompleted)) (http.Handler, func()) {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if _, err := io.Copy(io.Discard, req.Body); err != nil {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			w.WriteHeader(http.StatusAccepted)
		}), func() {}
	}},
	// What one writes by hand: no retry, no order, no bound, no end to what is remembered.
	{"by-hand", func(handled func(*CaseCompleted)) (http.Handler, func()) {
		var seen sync.Map
		var running sync.WaitGroup
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			body, err := io.ReadAll(req.Body)
			var env Envelope
			if err == nil {
				err = json.Unmarshal(body, &env)
			}
			var payload CaseCompleted
			if err == nil {
				err = json.Unmarshal(env.Data, &payload)
			}
			if err != nil {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			if _, known := seen.LoadOrStore(env.EventID, struct{}{}); known {
				w.WriteHeader(http.StatusOK)
				return
			}
			running.Go(func() { handled(&payload) })
			w.WriteHeader(http.StatusAccepted)
		}), running.Wait
	}},
	{"ours", func(handled func(*CaseCompleted)) (http.Handler, func()) {
		r := Handler(Callbacks{CaseCompleted: func(_ context.Context, _ *Envelope, c *CaseCompleted) error {
			handled(c)
			return nil
		}})
		return r, func() { _ = r.Shutdown(context.Background()) }
	}},
}

// compare runs send for each contender, with the drain in the time, and reports the time of ours as a share of that of
// the others.
func compare(b *testing.B, send func(b *testing.B, handler http.Handler)) {
	each := make(map[string]float64)
	for _, c := range contenders {
		b.Run(c.name, func(b *testing.B) {
			var handled atomic.Int64
			handler, drain := c.make(func(payload *CaseCompleted) {
				if payload.CaseID != "" {
					handled.Add(1)
				}
			})
			b.ReportAllocs()
			send(b, handler)
			drain()
			b.StopTimer()
			if c.name != "floor" && handled.Load() != int64(b.N) {
				b.Errorf("%d of %d events handled", handled.Load(), b.N)
			}
			each[c.name] = float64(b.Elapsed()) / float64(b.N)
			if c.name == "ours" && each["by-hand"] > 0 && each["floor"] > 0 {
				b.ReportMetric(each["ours"]/each["by-hand"], "time/by-hand")
				b.ReportMetric(each["ours"]/each["floor"], "time/floor")
			}
		})
	}
}

// benchWriter is a ResponseWriter that costs next to nothing.
type benchWriter struct {
	header http.Header
	status int
}

func (w *benchWriter) Header() http.Header         { return w.header }
func (w *benchWriter) Write(p []byte) (int, error) { return len(p), nil }
func (w *benchWriter) WriteHeader(status int)      { w.status = status }

// BenchmarkInProcess is what a receiver costs without the network: events of different cases, one after the other.
func BenchmarkInProcess(b *testing.B) {
	compare(b, func(b *testing.B, handler http.Handler) {
		event := newBenchBody(b, func(int) string { return "" })
		reader := new(bytes.Reader)
		req := &http.Request{
			Method: "POST", URL: new(url.URL), Header: http.Header{"Content-Type": {"application/json"}},
			Body: io.NopCloser(reader), ContentLength: int64(len(event.body)),
		}
		w := &benchWriter{header: make(http.Header)}
		b.ResetTimer()
		for n := range uint64(b.N) { // not b.Loop, which would leave the drain out of the time
			event.number(n)
			reader.Reset(event.body)
			handler.ServeHTTP(w, req)
			if w.status != http.StatusAccepted {
				b.Fatalf("status %d", w.status)
			}
		}
	})
}

// BenchmarkLoopback sends over 32 connections that are kept alive. The clients are as cheap as they can be, so that the
// servers are what is compared.
func BenchmarkLoopback(b *testing.B) {
	const clients = 32
	compare(b, func(b *testing.B, handler http.Handler) {
		srv := httptest.NewServer(handler)
		defer srv.Close()
		var conns []net.Conn
		for range clients {
			conn, err := net.Dial("tcp", srv.Listener.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			defer conn.Close()
			conns = append(conns, conn)
		}
		var next atomic.Uint64
		var sending sync.WaitGroup
		b.ResetTimer()
		for _, conn := range conns {
			sending.Go(func() {
				event := newBenchBody(b, func(length int) string { return post("", length) })
				answers := bufio.NewReader(conn)
				for n := next.Add(1); n <= uint64(b.N); n = next.Add(1) {
					event.number(n)
					if _, err := conn.Write(event.body); err != nil {
						b.Error(err)
						return
					}
					status, err := answers.ReadSlice('\n')
					if err != nil || !bytes.Contains(status, []byte(" 202 ")) {
						b.Errorf("answer %q, %v", status, err)
						return
					}
					for line := status; len(line) > 2 && err == nil; { // to the empty line: a 202 has no body
						line, err = answers.ReadSlice('\n')
					}
				}
			})
		}
		sending.Wait()
	})
}
