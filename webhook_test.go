package offloadhook

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
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

// observations returns what the observer was told of id, and of nothing in particular for "".
func (r *rig) observations(id string) (os []Observation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range r.observed {
		if o.Envelope == nil && id == "" || o.Envelope != nil && o.Envelope.EventID == id {
			os = append(os, o)
		}
	}
	return os
}

// outcomes returns the outcomes that the observer was told of id. A callback may end before the observer has been told
// that its event was accepted; here Accepted comes first.
func (r *rig) outcomes(id string) (outcomes []Outcome) {
	for _, o := range r.observations(id) {
		if o.Outcome == Accepted {
			outcomes = slices.Insert(outcomes, 0, Accepted)
		} else {
			outcomes = append(outcomes, o.Outcome)
		}
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
		"declared": post(body[:20], len(body)),
		"chunked":  "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n14\r\n" + body[:20] + "\r\n",
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
			expectList(t, "outcomes", r.outcomes(""), Refused)
			expectEqual(t, "body observed", string(r.observations("")[0].Body), body[:20])
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
		"no body":     post("", 0),
		"with a body": post(body, len(body)),
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

// TestSameIDAtOnce: 1,000 ids, 100 deliveries of each: one callback for each (promise 3).
func TestSameIDAtOnce(t *testing.T) {
	const ids, times = 1000, 100
	r := newRig(t, nil)
	var fresh atomic.Int32
	var senders sync.WaitGroup
	for i := range times {
		senders.Go(func() {
			for n := range ids {
				id := fmt.Sprint("evt_", (n+i/10)%ids) // ten abreast, ten waves
				ok, err := r.Deliver(t.Context(), eventBody(id, id))
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
	called := r.called()
	slices.Sort(called)
	expectEqual(t, "callbacks", len(called), ids)
	expectEqual(t, "different ones", len(slices.Compact(called)), ids)
}
