package offloadhook

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"
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
		{name: "token behind another", opts: token, target: "/?token=old&token=second", body: good,
			status: 202, field: "CaseCompleted"},
		{name: "token before another", opts: token, target: "/?token=second&token=old", body: good,
			status: 202, field: "CaseCompleted"},
		{name: "token behind an empty one", opts: token, target: "/?token=&token=second", body: good,
			status: 202, field: "CaseCompleted"},
		{name: "tokens wrong", opts: token, target: "/?token=old&token=", body: good,
			status: 401, answer: headers{"WWW-Authenticate": "Bearer"}, unread: true},
		{name: "token in the header", opts: token, request: headers{"Authorization": "Bearer first token"}, body: good,
			status: 202, field: "CaseCompleted"},
		{name: "token after two blanks", opts: token, request: headers{"Authorization": "bearer  first token"}, body: good,
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
				if calls := r.store.noted(); len(calls) > 0 { // it has no part in those that fail
					expectEqual(t, "recorded", calls[len(calls)-1], "done "+ran.EventID+" <nil>")
				}
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

// TestReasons: an answer says why, and of the store only that it failed.
func TestReasons(t *testing.T) {
	for _, test := range []struct {
		err  error
		want string
	}{
		{refusal(http.StatusMethodNotAllowed), "405 offloadhook: Method Not Allowed"},
		{refusal(http.StatusRequestTimeout), "408 offloadhook: Request Timeout"},
		{fmt.Errorf("%w: event_id is missing", ErrMalformed), "400 offloadhook: malformed event: event_id is missing"},
		{fmt.Errorf("%w: 7 wait", ErrBusy), "503 offloadhook: no room"},
		{fmt.Errorf("%w: the journal in /var/lib", ErrClosed), "503 offloadhook: closed"},
		{errTest, "503 offloadhook: the store failed"},
	} {
		w := httptest.NewRecorder()
		refuse(w, httptest.NewRequest("POST", "/", nil), test.err)
		expectEqual(t, test.err.Error(), fmt.Sprintf("%d %s", w.Code, w.Body), test.want+"\n")
	}
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
		time.Sleep(time.Second) // in the bubble; net/http may let a connection linger for half of that
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

	// net/http hides the end of the time within what may follow the last chunk.
	inBubble(t, "within a trailer", func(t *testing.T) {
		r := newRig(t, nil)
		conn := serve(t, &http.Server{Handler: r}).dial(t)
		send(t, conn, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX")
		expectEqual(t, "status", readAnswer(t, conn).StatusCode, 408)
	})

	// HTTP/2 has bodies that come although their length is 0.
	for _, length := range []string{"", "0"} {
		inBubble(t, "over HTTP/2, length="+length, func(t *testing.T) {
			if strings.HasPrefix(runtime.Version(), "go1.25") {
				t.Skip("its net/http shares channels between bubbles")
			}
			r := newRig(t, nil)
			server := &http.Server{Handler: r, Protocols: new(http.Protocols)}
			server.Protocols.SetUnencryptedHTTP2(true)
			conn := serve(t, server).dial(t)
			var head []byte // HPACK, of literals
			for _, field := range []string{
				":method=POST", ":scheme=http", ":authority=x", ":path=/", "content-type=application/json", "content-length=" + length,
			} {
				if name, value, _ := strings.Cut(field, "="); value != "" {
					head = append(append(append(head, 0, byte(len(name))), name...), byte(len(value)))
					head = append(head, value...)
				}
			}
			go func() { _, _ = io.Copy(io.Discard, conn) }()
			settings, headers := "\x00\x00\x00\x04\x00\x00\x00\x00\x00", "\x00\x00"+string([]byte{byte(len(head))})+"\x01\x04\x00\x00\x00\x01"
			send(t, conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+settings+headers+string(head))
			time.Sleep(time.Minute)
			expectList(t, "outcomes", r.outcomes(""), Refused)
			conn.Close()
		})
	}

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
				if held := time.Since(start); held > 10500*time.Millisecond { // net/http may linger for the half
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
		for _, wrapped := range []bool{false, true} {
			inBubble(t, fmt.Sprintf("%s, wrapped=%v", name, wrapped), func(t *testing.T) {
				var h http.Handler = newRig(t, nil)
				if wrapped {
					h = http.MaxBytesHandler(h, 1<<20) // puts a reader of its own in the place of no body
				}
				var err error
				conn := serve(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
					h.ServeHTTP(w, req)
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
}

// TestRefusalLeavesHTTP2: a refused request does not end the connection that it shares with events.
func TestRefusalLeavesHTTP2(t *testing.T) {
	r := newRig(t, nil)
	peers := make(chan string, 2)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		peers <- req.Proto + " " + req.RemoteAddr
		r.ServeHTTP(w, req)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	for range 2 {
		answer, err := server.Client().Get(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		_ = answer.Body.Close()
		expectEqual(t, "status", answer.StatusCode, 405)
	}
	first := <-peers
	expectEqual(t, "protocol", strings.HasPrefix(first, "HTTP/2.0 "), true)
	expectEqual(t, "peer", <-peers, first)
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
		var claimed, done, called, told error
		var r *rig
		r = newRig(t, func(ctx context.Context, _ *Envelope) error {
			called = ctx.Err()
			return nil
		}, WithObserver(func(ctx context.Context, o Observation) {
			r.record(ctx, o)
			if o.Outcome == Accepted {
				told = ctx.Err()
			}
		}))
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
		for what, err := range map[string]error{"Claim": claimed, "Done": done, "callback": called, "observer": told} {
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

// TestDecodeAsJSON: a payload decodes as encoding/json would decode it, and is refused where that refuses it.
func TestDecodeAsJSON(t *testing.T) {
	for i := range journalCount(20_000, 2_000_000) {
		switch data := randomPayload(rand.New(rand.NewPCG(1, uint64(i)))); i % 3 {
		case 0:
			testDecode[CaseCompleted](t, data)
		case 1:
			testDecode[CaseFailed](t, data)
		case 2:
			testDecode[CaseInputNeeded](t, data)
		}
	}
}

// TestDecodeOnItsOwn: what encoding/json would do otherwise.
func TestDecodeOnItsOwn(t *testing.T) {
	for data, want := range map[string][]Attachment{
		`{"attachments":[{"name":"a","size":1},{"name":"b"}],"attachments":[{"name":"c"}]}`: {{Name: "c"}},
		`{"attachments":[{"name":"a"}],"attachments":[]}`:                                   {},
		`{"attachments":[{"name":"a"}],"attachments":null}`:                                 nil,
	} {
		if got, err := decode[CaseFailed](&Envelope{Data: []byte(data)}); err != nil {
			t.Errorf("%s: %v", data, err)
		} else if !reflect.DeepEqual(got.Attachments, want) {
			t.Errorf("%s: %#v, want %#v", data, got.Attachments, want)
		}
	}
	for _, data := range []string{`{`, `{"result"`, `{"result":`, `{"result":}`, `{"caseId":"c",}`, `{"attachments":[{`,
		`{"attachments":[{"name":"a"},]}`, `{"metadata":{"a":1}`} { // of no ParseEnvelope
		if got, err := decode[CaseCompleted](&Envelope{Data: []byte(data)}); err == nil {
			t.Errorf("%s: %#v, want an error", data, got)
		}
	}
}

var arrayIndex = regexp.MustCompile(`\.\d+`)

func testDecode[T any](t *testing.T, data []byte) {
	t.Helper()
	var want T
	wantErr := json.Unmarshal(data, &want)
	got, err := decode[T](&Envelope{Data: data})
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%s: %v, by encoding/json: %v", data, err, wantErr)
	}
	if err == nil && !reflect.DeepEqual(*got, want) {
		t.Fatalf("%s: %#v, by encoding/json: %#v", data, *got, want)
	}
	mismatch := (*json.UnmarshalTypeError)(nil)
	if errors.As(wantErr, &mismatch) {
		field := strings.TrimPrefix(mismatch.Field, "Case.")
		field = arrayIndex.ReplaceAllString(field, "") // which Go 1.27 has in it
		if want := fmt.Sprintf(": %s is a JSON ", field); !strings.Contains(err.Error(), want) {
			t.Fatalf("%s: %v, by encoding/json: %v", data, err, wantErr)
		}
	}
}

// FuzzDecode compares with encoding/json, but for what that does otherwise on purpose: it folds the case of names, and
// merges doubled arrays.
func FuzzDecode(f *testing.F) {
	for _, body := range readFiles(f, "testdata/*.json") {
		env, err := ParseEnvelope(body)
		if err != nil {
			f.Fatal(err)
		}
		f.Add([]byte(env.Data))
	}
	for i := range uint64(50) {
		f.Add(randomPayload(rand.New(rand.NewPCG(2, i))))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if at(data, 0) != '{' || !json.Valid(data) || otherwiseByJSON(data) {
			return
		}
		testDecode[CaseCompleted](t, data)
		testDecode[CaseFailed](t, data)
		testDecode[CaseInputNeeded](t, data)
	})
}

// otherwiseByJSON reports whether data has a name or an array that encoding/json reads otherwise.
func otherwiseByJSON(data []byte) (otherwise bool) {
	arrays := 0
	var known []string
	for _, t := range []reflect.Type{reflect.TypeFor[CaseCompleted](), reflect.TypeFor[CaseFailed](),
		reflect.TypeFor[CaseInputNeeded](), reflect.TypeFor[Attachment]()} {
		known = slices.AppendSeq(known, maps.Keys(fieldsOf(t)))
	}
	var look func(name []byte, i int) int
	look = func(name []byte, i int) int {
		otherwise = otherwise || slices.ContainsFunc(known, func(field string) bool {
			return field != string(name) && strings.EqualFold(field, string(name))
		})
		if string(name) == "attachments" {
			arrays++
		}
		return scan(data, i, nesting, look)
	}
	scan(data, 0, nesting, look)
	return otherwise || arrays > 1
}

// randomPayload returns an object with names that the payloads know, and values that fit them more often than not.
func randomPayload(random *rand.Rand) []byte {
	names := map[string]string{
		"caseId": "string", "clientReferenceId": "string", "status": "string", "channel": "string", "attemptCount": "number",
		"attachments": "array", "resultStatus": "string", "metadata": "object", "result": "object", "failureReason": "string",
		"inputRequest": "string", "inputRequestId": "string", "inputRequestStatus": "string", "inputRequestedAt": "number",
		"": "null", "unknown": "object", `case\u0049d`: "string", `a\"b`: "string", "\x80": "string",
	}
	values := map[string][]string{
		"string": {`""`, `"text"`, `"\u00e9\n\"\\"`, `"\ud800"`, "\"\x80\"", `"ü"`, `"12"`},
		"number": {"0", "7", "-3", "1.0", "1e2", "-0", "9223372036854775807", "9223372036854775808", "0.5", "1E+2"},
		"object": {"{}", `{"a":[{}],"b": null}`, `{"caseId":"inner"}`},
		"array": {"[]", "[ null ]", "[1]", "[[]]", `["a"]`, `[{}, {"size":12,"name":"n"}]`, `[{"size":"12"}]`, `[{"size":1.5},{"name":1}]`,
			` [{"attachmentId":"a","name":"b","size":3,"type":"c","messageId":"d","inboxId":"e","receivedAt":4},{"x":[1]}]`},
		"null": {"null"},
		"bool": {"true", "false"},
	}
	kinds := slices.Sorted(maps.Keys(values))
	keys := slices.Sorted(maps.Keys(names))
	pick := func(list []string) string { return list[random.IntN(len(list))] }
	space := func() string { return pick([]string{"", "", "", " ", "\n\t"}) }
	text := "{" + space()
	for i := range random.IntN(6) {
		if i > 0 {
			text += "," + space()
		}
		name := pick(keys)
		if strings.Contains(text, `"attachments"`) && name == "attachments" {
			name = "status" // encoding/json would merge the two
		}
		kind := names[name]
		if random.IntN(6) == 0 {
			kind = pick(kinds)
		}
		text += `"` + name + `"` + space() + ":" + space() + pick(values[kind]) + space()
	}
	return []byte(text + "}" + space())
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
			for _, o := range r.observations("evt_1")[1:] {
				expectEqual(t, "attempt of "+string(o.Outcome), o.Attempt, 1)
			}
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
		expectList(t, "outcomes", r.outcomes("evt_1"), Refused, Refused)
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
	inBubble(t, "with ErrClosed", func(t *testing.T) { // which ends only an Inbox
		r := newRig(t, nil)
		r.store.onClaim = func(context.Context, *Envelope) error { return ErrClosed }
		for _, id := range []string{"evt_1", "evt_2"} {
			r.deliver(t, id, "case_1")
			synctest.Wait()
			expectList(t, "outcomes", r.outcomes(id)[1:], StoreFailed, Handled)
		}
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
			for _, want := range []bool{true, false} {
				if fresh, err := r.Deliver(t.Context(), body); fresh != want || err != nil {
					t.Fatal(fresh, err)
				}
			}
		}
		synctest.Wait()
		expectEqual(t, "log without problems", log.String(), "")
		logProblems(t.Context(), Observation{Outcome: Handled, Err: errors.New("data does not fit")})
		_, _ = r.Deliver(t.Context(), eventBody("evt_bad", "case_secret"))
		_, _ = r.Deliver(t.Context(), []byte("case_secret"))
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		problems := []string{"data does not fit", string(GaveUp), "evt_bad", "oops", "TestDefaultObserver", string(Refused)}
		for _, want := range problems {
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

// TestSameIDOtherPayload: the first is kept, while its callback runs and after that.
func TestSameIDOtherPayload(t *testing.T) {
	for name, open := range map[string]func(*testing.T) Option{
		"Memory":  func(*testing.T) Option { return WithDeduper(new(Memory)) },
		"Journal": func(t *testing.T) Option { return WithInbox(openOn(t, newDisk().process(), 0)) },
	} {
		inBubble(t, name, func(t *testing.T) {
			const first, other = `{"event_id":"evt_1","data":{"n":1}}`, `{"event_id":"evt_1","data":{"n":2}}`
			var got []string
			r := newRig(t, func(_ context.Context, env *Envelope) error {
				got = append(got, string(env.Raw))
				time.Sleep(time.Minute)
				return nil
			}, open(t))
			synctest.Wait()
			for _, delivery := range []struct {
				body string
				want int
			}{{first, http.StatusAccepted}, {other, http.StatusOK}, {other, http.StatusOK}} {
				answer := httptest.NewRecorder()
				r.ServeHTTP(answer, httptest.NewRequest("POST", "/", strings.NewReader(delivery.body)))
				expectEqual(t, "answer to "+delivery.body, answer.Code, delivery.want)
				time.Sleep(40 * time.Second)
			}
			expectEqual(t, "callbacks", strings.Join(got, ", "), first)
		})
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
			if cut := slices.Contains([]string{"evt_running", "evt_stubborn", "evt_ready1"}, id); (last.Elapsed == time.Second) != cut {
				t.Errorf("%s: elapsed %s", id, last.Elapsed)
			}
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
		over := ended()
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

	inBubble(t, "before a callback has begun", func(t *testing.T) {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // so that none begins before this waits
		var calls atomic.Int32
		ids := new(Memory)
		r := newRig(t, func(context.Context, *Envelope) error { calls.Add(1); return nil }, WithDeduper(ids))
		for i := range 10 {
			r.deliver(t, fmt.Sprint("evt_", i), "")
		}
		if err := r.Shutdown(ended()); !errors.Is(err, context.Canceled) {
			t.Errorf("Shutdown: %v", err)
		}
		before := calls.Load()
		open, _ := ids.Claim(t.Context(), &Envelope{EventID: "evt_9"})
		synctest.Wait()
		expectEqual(t, "callbacks that began after it", calls.Load()-before, 0)
		expectEqual(t, "an id whose callback has not begun is open", open || before > 0, true)
	})

	inBubble(t, "again after its deadline", func(t *testing.T) {
		r := newRig(t, func(context.Context, *Envelope) error { time.Sleep(time.Minute); return nil })
		r.deliver(t, "evt_1", "case_1")
		synctest.Wait()
		over := ended()
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

// stacks returns the stacks of all goroutines, that of the caller first.
func stacks() string {
	all := make([]byte, 4<<20)
	return string(all[:runtime.Stack(all, true)])
}

// ourGoroutines counts the goroutines of this bubble that run, or were started by, a receiver. Others may be those of
// receivers that a test has abandoned: such a one reads its inbox every 10 s.
func ourGoroutines() (n int) {
	all := stacks()
	own, _, _ := strings.Cut(all, "\n")
	_, bubble, found := strings.Cut(own, ", synctest bubble ")
	if !found {
		panic("not in a bubble: " + own)
	}
	for stack := range strings.SplitSeq(all, "\n\n") {
		head, _, _ := strings.Cut(stack, "\n")
		if strings.HasSuffix(head, ", synctest bubble "+bubble) && strings.Contains(stack, "offloadhook.(*Receiver)") {
			n++
		}
	}
	return n
}

// TestNoGoroutines: none while nothing is pending, and none after Shutdown.
func TestNoGoroutines(t *testing.T) {
	for name, opts := range map[string][]Option{"deduper": nil, "inbox": {WithInbox(new(fakeInbox))}} {
		inBubble(t, name, func(t *testing.T) {
			r := newRig(t, nil, opts...)
			for i := range 100 {
				r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i%10))
			}
			synctest.Wait()
			expectEqual(t, "handled", r.count(Handled), 100)
			expectEqual(t, "goroutines at rest", ourGoroutines(), 0)
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
			_, caseID := scanData(env.Data, 0, nesting)
			order[caseID] = append(order[caseID], env.EventID)
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
		over := ended()
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
		r := newRig(t, nil, WithInbox(in), WithConcurrency(1)) // so that two cases have an order
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
		expectList(t, "called", r.called(), "evt_1", "evt_2") // this store had the first, nevertheless
	})

	inBubble(t, "to be read again", func(t *testing.T) { // what comes meanwhile need not wait for that
		in := &fakeInbox{onPending: func(call int) error {
			if call > 1 {
				return errTest
			}
			return nil
		}}
		r := newRig(t, nil, WithInbox(in))
		time.Sleep(sweepEvery)
		synctest.Wait()
		expectEqual(t, "store failures", r.count(StoreFailed), 1)
		r.deliver(t, "evt_1", "case_1")
		synctest.Wait()
		expectList(t, "called at once", r.called(), "evt_1")
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

// thriftyInbox yields the same Envelope each time, with another event in it.
type thriftyInbox struct{ fakeInbox }

func (in *thriftyInbox) Pending(ctx context.Context) iter.Seq2[*Envelope, error] {
	return func(yield func(*Envelope, error) bool) {
		var same Envelope
		for env, err := range in.fakeInbox.Pending(ctx) {
			if same = *env; !yield(&same, err) {
				return
			}
		}
	}
}

// TestThriftyInbox: an Envelope is the inbox's to use again when it has been yielded.
func TestThriftyInbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := new(thriftyInbox)
		for _, id := range []string{"evt_1", "evt_2", "evt_3"} {
			in.put(id, "case_1")
		}
		r := newRig(t, nil, WithInbox(in))
		synctest.Wait()
		expectList(t, "called", r.called(), "evt_1", "evt_2", "evt_3")
		expectList(t, "in the store", in.pending())
		if err := r.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// lockedInbox holds a lock while it yields, as one with a single connection to its database does.
type lockedInbox struct {
	fakeInbox
	lock chan struct{}
}

func (in *lockedInbox) Done(ctx context.Context, env *Envelope, result error) error {
	in.lock <- struct{}{}
	defer func() { <-in.lock }()
	return in.fakeInbox.Done(ctx, env, result)
}

func (in *lockedInbox) Pending(ctx context.Context) iter.Seq2[*Envelope, error] {
	return func(yield func(*Envelope, error) bool) {
		in.lock <- struct{}{}
		defer func() { <-in.lock }()
		in.fakeInbox.Pending(ctx)(yield)
	}
}

// TestLockedInboxLost: what is still to be recorded when the inbox is lost does not wait for the reading that learned it.
func TestLockedInboxLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := &lockedInbox{lock: make(chan struct{}, 1)}
		in.onDone = func(*Envelope) error { return errTest }
		r := newRig(t, func(context.Context, *Envelope) error { return nil }, WithInbox(in))
		r.deliver(t, "evt_1", "case_1")
		synctest.Wait()
		in.change(func() { in.onPending = func(int) error { return ErrClosed } })
		time.Sleep(time.Minute)
		if err := r.Shutdown(ended()); err != nil {
			t.Error(err)
		}
	})
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

	inBubble(t, "leaves what has arrived to the inbox", func(t *testing.T) {
		in := &fakeInbox{onPending: func(int) error { time.Sleep(5 * time.Second); return nil }}
		r := newRig(t, nil, WithInbox(in))
		time.Sleep(sweepEvery + time.Second) // the first reading is over, the second goes on
		r.deliver(t, "evt_1", "case_1")
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		expectList(t, "called", r.called())
		expectList(t, "in the store", in.pending(), "evt_1")
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

	// An event that failed while draining has been reported when the deadline comes.
	inBubble(t, "reports once", func(t *testing.T) {
		var r *rig
		r = newRig(t, func(context.Context, *Envelope) error { time.Sleep(time.Second); return errTest },
			WithInbox(new(fakeInbox)), WithObserver(func(ctx context.Context, o Observation) {
				r.record(ctx, o)
				if o.Outcome == Unfinished {
					time.Sleep(time.Minute)
				}
			}))
		synctest.Wait()
		r.deliver(t, "evt_1", "case_1")
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if err := r.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown = %v", err)
		}
		time.Sleep(time.Hour)
		expectList(t, "evt_1", r.outcomes("evt_1"), Accepted, Unfinished)
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
	for name, open := range map[string]func(*testing.T) Inbox{
		"fake":    func(*testing.T) Inbox { return new(fakeInbox) },
		"Journal": func(t *testing.T) Inbox { return openOn(t, newDisk().process(), 0) },
	} {
		inBubble(t, name, func(t *testing.T) {
			r := newRig(t, func(context.Context, *Envelope) error { return errTest },
				WithInbox(open(t)), WithRetry(2, time.Second))
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

	inBubble(t, "Limit, by claims that are held", func(t *testing.T) {
		m := Memory{Limit: 2}
		for _, id := range []string{"a", "b"} {
			handle(t, &m, id)
		}
		expectEqual(t, "a third", claim(t, &m, "c"), true)
		expectEqual(t, "the oldest, which has gone", claim(t, &m, "a"), true)
		expectEqual(t, "a fourth", claim(t, &m, "d"), true)
		done(t, &m, "c", nil)
		expectEqual(t, "a handled one beyond the limit", claim(t, &m, "c"), true)
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
			now = now.Add(time.Duration(rng.IntN(3000)) * time.Millisecond)
			switch d := pick(); {
			case rng.IntN(200) == 0:
				then := now.Add(-time.Duration(rng.IntN(2*most)) * time.Second)
				set.expire(then)
				for len(order) > 0 && !order[0].at.After(then) {
					if set.has(order[0].id) && order[0].at.After(then.Add(-time.Second)) {
						break // an id may go a second late, and never early
					}
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

// readFiles returns what is in the files whose names match pattern; there must be some.
func readFiles(t testing.TB, pattern string) (contents [][]byte) {
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %d files, %v", pattern, len(files), err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		contents = append(contents, content)
	}
	return contents
}

// FuzzHandler: whatever comes in gets an answer of the table, and costs nothing else when that is a refusal.
func FuzzHandler(f *testing.F) {
	for _, pattern := range []string{"testdata/*.json", "testdata/hostile/*"} {
		for _, body := range readFiles(f, pattern) {
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

func newBenchBody(b *testing.B) *benchBody {
	const caseID = "4fc5904d-0e44-4ed3-aa57-c4a47ad0ae4f" // of the fixture
	body, err := fs.ReadFile(Fixtures, "testdata/case_completed_b.json")
	if err != nil {
		b.Error(err)
	}
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

// benchWriter is a ResponseWriter that costs next to nothing. Like that of net/http it takes a deadline.
type benchWriter struct {
	header http.Header
	status int
}

func (w *benchWriter) Header() http.Header         { return w.header }
func (w *benchWriter) Write(p []byte) (int, error) { return len(p), nil }
func (w *benchWriter) WriteHeader(status int)      { w.status = status }

func (w *benchWriter) SetReadDeadline(time.Time) error { return nil }

// BenchmarkInProcess is what a receiver costs without the network: events of different cases, one after the other.
func BenchmarkInProcess(b *testing.B) {
	compare(b, func(b *testing.B, handler http.Handler) {
		event := newBenchBody(b)
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

// BenchmarkLoopback sends with 32 clients of net/http, over connections that are kept alive.
func BenchmarkLoopback(b *testing.B) {
	const clients = 32
	compare(b, func(b *testing.B, handler http.Handler) {
		srv := httptest.NewServer(handler)
		defer srv.Close()
		client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: clients}}
		defer client.CloseIdleConnections()
		var next atomic.Uint64
		var sending sync.WaitGroup
		b.ResetTimer()
		for range clients {
			sending.Go(func() {
				event := newBenchBody(b)
				for n := next.Add(1); n <= uint64(b.N); n = next.Add(1) {
					event.number(n)
					answer, err := client.Post(srv.URL, "application/json", bytes.NewReader(event.body))
					if err != nil || answer.StatusCode != http.StatusAccepted {
						b.Errorf("answer %v, %v", answer, err)
						return
					}
					_ = answer.Body.Close() // a 202 has none
				}
			})
		}
		sending.Wait()
	})
}

// diskMedium is a disk in memory that loses no less than a real one may: a process that dies leaves what it has
// written, a power loss only what was synced, and of the rest whatever it likes.
type diskMedium struct {
	mu       sync.Mutex           // protects everything on the disk, and the processes that use it
	made     bool                 // the directory
	names    map[string]*diskNode // as they are
	durable  map[string]*diskNode // as they were when the directory was synced
	unsynced []func(names map[string]*diskNode)
	wrongs   []string // what no journal may do
}

const diskSector = 512 // bytes that are written whole or not at all

// diskNode is a file.
type diskNode struct {
	now, synced []byte
	dirty       map[int]bool // the sectors in which they differ
	distrusted  bool         // an fsync of it has failed
}

func newDisk() *diskMedium {
	return &diskMedium{names: make(map[string]*diskNode), durable: make(map[string]*diskNode)}
}

// diskWith returns a disk whose directory has one file, all of it durable.
func diskWith(name string, content []byte) *diskMedium {
	m := newDisk()
	m.made = true
	m.names[name] = &diskNode{now: bytes.Clone(content), synced: bytes.Clone(content), dirty: make(map[int]bool)}
	m.durable = maps.Clone(m.names)
	return m
}

// newest returns the file with the last name that ends in suffix.
func (m *diskMedium) newest(suffix string) (name string, content []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n, node := range m.names {
		if strings.HasSuffix(n, suffix) && n > name {
			name, content = n, bytes.Clone(node.now)
		}
	}
	return name, content
}

// losePower leaves what was synced, and every other change with the probability keep: names one by one, contents sector
// by sector.
func (m *diskMedium) losePower(rng *rand.Rand, keep float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, change := range m.unsynced {
		if rng.Float64() < keep {
			change(m.durable)
		}
	}
	m.unsynced, m.names = nil, maps.Clone(m.durable)
	for _, name := range slices.Sorted(maps.Keys(m.names)) {
		n := m.names[name]
		size := len(n.synced)
		if more := len(n.now) - size; rng.Float64() < keep {
			size += more
		} else if keep > 0 && more > 0 {
			size += rng.IntN(more)
		}
		after := make([]byte, size)
		copy(after, n.synced)
		for _, sector := range slices.Sorted(maps.Keys(n.dirty)) {
			if start := sector * diskSector; rng.Float64() < keep && start < min(size, len(n.now)) {
				copy(after[start:min(start+diskSector, size)], n.now[start:])
			}
		}
		n.now, n.synced, n.distrusted = after, bytes.Clone(after), false
		clear(n.dirty)
	}
}

// diskFault is what happens to an operation that fails.
type diskFault struct {
	from, span int     // the operations that fail, by number
	rate       float64 // the probability that another one fails
	only       string  // the only steps to fail; "" for all
	half       bool    // of a failed write a part is written
	drop       bool    // with a failed fsync the data that were not synced go; else they stay to be read until a crash
	dies       bool    // no later operation succeeds
}

var errDisk = errors.New("the disk failed in this test")

func diskFails(op, path string) error { return &fs.PathError{Op: op, Path: path, Err: errDisk} }

// diskProcess is the disk as one process sees it.
type diskProcess struct {
	*diskMedium
	fault  diskFault
	rng    *rand.Rand
	ops    int
	steps  []string // what they were
	struck int      // how many have failed
	dead   bool
	held   map[string]int              // open files, by path
	hook   func(op, path string) error // called before a stat and what changes something; an error is its outcome
}

func (m *diskMedium) process() *diskProcess {
	return &diskProcess{diskMedium: m, rng: rand.New(rand.NewPCG(1, 2)), held: make(map[string]int)}
}

// onSync makes f the hook of every fsync of a file.
func (p *diskProcess) onSync(f func()) {
	p.hook = func(op, _ string) error {
		if op == "sync" {
			f()
		}
		return nil
	}
}

// failWhere makes the operations fail that match.
func (p *diskProcess) failWhere(match func(op, path string) bool) {
	p.hook = func(op, path string) error {
		if match(op, path) {
			return diskFails(op, path)
		}
		return nil
	}
}

// before calls the hook. mu is not held.
func (p *diskProcess) before(op, path string) error {
	if p.hook == nil {
		return nil
	}
	return p.hook(op, path)
}

// handles returns how many files are open.
func (p *diskProcess) handles() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, open := range p.held {
		n += open
	}
	return n
}

// step counts an operation and decides whether it fails. mu is held.
func (p *diskProcess) step(step, path string) error {
	p.ops++
	p.steps = append(p.steps, step)
	f := p.fault
	strikes := p.ops >= f.from && p.ops < f.from+f.span || f.rate > 0 && p.rng.Float64() < f.rate
	if !p.dead && (!strikes || !strings.HasPrefix(step, f.only)) {
		return nil
	}
	p.struck++
	p.dead = p.dead || f.dies
	return diskFails(step, path)
}

func (p *diskProcess) heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = diskFault{}
}

func (p *diskProcess) die() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dead = true
}

func (p *diskProcess) change(f func(names map[string]*diskNode)) {
	f(p.names)
	p.unsynced = append(p.unsynced, f)
}

func (p *diskProcess) mkdir(dir string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.step("mkdir", dir); err != nil {
		return err
	}
	p.made = true
	return nil
}

func (p *diskProcess) list(dir string) (entries []fs.DirEntry, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.step("list", dir); err != nil {
		return nil, err
	}
	if !p.made {
		return nil, &fs.PathError{Op: "list", Path: dir, Err: fs.ErrNotExist}
	}
	for path := range p.names {
		entries = append(entries, diskEntry{name: filepath.Base(path)})
	}
	return entries, nil
}

// diskEntry is a name in the directory.
type diskEntry struct {
	fs.DirEntry
	name string
}

func (e diskEntry) Name() string { return e.name }

func (p *diskProcess) holds(path string, file diskFile) (bool, error) {
	if err := p.before("stat", path); err != nil {
		return false, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.step("stat", path)
	if err == nil && p.names[path] == nil {
		err = &fs.PathError{Op: "stat", Path: path, Err: fs.ErrNotExist}
	}
	return err == nil && p.names[path] == file.(*diskHandle).node, err
}

func (p *diskProcess) open(path string, flag int) (diskFile, error) {
	step := "open"
	if flag&os.O_CREATE != 0 {
		step = "create"
	}
	if err := p.before(step, path); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.step(step, path); err != nil {
		return nil, err
	}
	node, found := p.names[path]
	switch {
	case found && flag&os.O_EXCL != 0:
		return nil, &fs.PathError{Op: step, Path: path, Err: fs.ErrExist}
	case !found && flag&os.O_CREATE == 0:
		return nil, &fs.PathError{Op: step, Path: path, Err: fs.ErrNotExist}
	case !found:
		node = &diskNode{dirty: make(map[int]bool)}
		p.change(func(names map[string]*diskNode) { names[path] = node })
	}
	p.held[path]++
	return &diskHandle{p, node, path}, nil
}

func (p *diskProcess) rename(from, to string) error {
	if err := p.before("rename", from); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.step("rename", from); err != nil {
		return err
	}
	node := p.names[from]
	if node == nil {
		return &fs.PathError{Op: "rename", Path: from, Err: fs.ErrNotExist}
	}
	if p.names[to] != nil && len(p.names[to].now) > 0 {
		p.wrongs = append(p.wrongs, "renamed over "+to)
	}
	p.change(func(names map[string]*diskNode) {
		delete(names, from)
		names[to] = node
	})
	return nil
}

func (p *diskProcess) remove(path string) error {
	if err := p.before("remove", path); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.step("remove", path); err != nil {
		return err
	}
	if p.names[path] == nil {
		return &fs.PathError{Op: "remove", Path: path, Err: fs.ErrNotExist}
	}
	p.change(func(names map[string]*diskNode) { delete(names, path) })
	return nil
}

func (p *diskProcess) syncDir(dir string) error {
	if err := p.before("syncdir", dir); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.step("syncdir", dir); err != nil {
		return err
	}
	p.durable, p.unsynced = maps.Clone(p.names), nil
	return nil
}

// diskHandle is an open file.
type diskHandle struct {
	p    *diskProcess
	node *diskNode
	path string
}

func (h *diskHandle) ReadAt(b []byte, off int64) (n int, err error) {
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	if err := h.p.step("read", h.path); err != nil {
		return 0, err
	}
	if off < int64(len(h.node.now)) {
		n = copy(b, h.node.now[off:])
	}
	if n < len(b) {
		err = io.EOF
	}
	return n, err
}

func (h *diskHandle) WriteAt(b []byte, off int64) (int, error) {
	if err := h.p.before("write", h.path); err != nil {
		return 0, err
	}
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	if h.node.distrusted && len(b) > 0 && !h.p.dead {
		h.p.wrongs = append(h.p.wrongs, "wrote to a file after its fsync had failed")
	}
	alive := !h.p.dead
	err := h.p.step("write", h.path)
	if err != nil {
		if !h.p.fault.half || !alive || len(b) == 0 {
			return 0, err
		}
		b = b[:h.p.rng.IntN(len(b))]
	}
	n := h.node
	end := int(off) + len(b)
	if end > len(n.now) {
		n.now = append(n.now, make([]byte, end-len(n.now))...)
	}
	copy(n.now[off:], b)
	for sector := int(off) / diskSector; sector*diskSector < end; sector++ {
		n.dirty[sector] = true
	}
	return len(b), err
}

func (h *diskHandle) Truncate(size int64) error {
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	if err := h.p.step("truncate", h.path); err != nil {
		return err
	}
	n := h.node
	if int(size) > len(n.now) {
		if !n.distrusted { // else it has lost what it had
			h.p.wrongs = append(h.p.wrongs, "truncated beyond the end")
		}
		return nil
	}
	for sector := int(size) / diskSector; sector*diskSector < len(n.now); sector++ {
		n.dirty[sector] = true
	}
	n.now = n.now[:size:size]
	return nil
}

func (h *diskHandle) Sync() error {
	if err := h.p.before("sync", h.path); err != nil {
		return err
	}
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	n, alive := h.node, !h.p.dead
	if err := h.p.step("sync", h.path); err != nil {
		if alive && !h.p.dead { // as on Linux: the pages count as clean from now on
			n.distrusted = true
			clear(n.dirty)
			if h.p.fault.drop {
				n.now = bytes.Clone(n.synced)
			}
		}
		return err
	}
	n.synced = n.synced[:min(len(n.synced), len(n.now))]
	n.synced = append(n.synced, make([]byte, len(n.now)-len(n.synced))...)
	for sector := range n.dirty {
		if start := sector * diskSector; start < len(n.now) {
			copy(n.synced[start:min(start+diskSector, len(n.now))], n.now[start:])
		}
	}
	clear(n.dirty)
	return nil
}

func (h *diskHandle) Close() error {
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	h.p.held[h.path]--
	return h.p.step("close", h.path)
}

// journalModel is what a journal owes its user.
type journalModel struct {
	t      testing.TB
	bodies map[string][]byte // of all events that were offered
	order  []string          // those that were acknowledged and not done, oldest first
	done   map[string]bool   // those whose Done returned nil
	doubt  map[string]bool   // those whose Done returned an error
	gaveUp map[string]bool   // in this life
	moved  map[string]bool   // claimed again after that, but refused: after a crash they may have the new place
}

func newJournalModel(t testing.TB) *journalModel {
	return &journalModel{
		t: t, bodies: make(map[string][]byte), done: make(map[string]bool), doubt: make(map[string]bool),
		gaveUp: make(map[string]bool), moved: make(map[string]bool),
	}
}

// record returns the line of an event of the model.
func (m *journalModel) record(id string) []byte {
	m.bodies[id] = journalEvent(id, 0, 100).Raw
	return appendRecord(nil, "id", strconv.AppendQuote(nil, id), 1, m.bodies[id])
}

// journalEvent returns an event whose bytes are easily spoiled: by number of another shape, and size bytes larger.
func journalEvent(id string, shape, size int) *Envelope {
	format := []string{
		"\r\t" + `{"event_id":%q,"event_type":"case.completed","data":{"caseId":"c","result":"%s"}}` + " \r",
		" \t{ \"event_id\" : %q,\r\n\n \"data\" : {\"caseId\":\"c\\u00e9\",\n\"result\":\"%s\"}\n} \n",
		`{"event_id":%q,` + "\n" + `"data":{"caseId":"\"}\\","text":"é𝄞` + "\x7f\xff" + `%s"},"done":"x","at":1e9}`,
	}[shape%3]
	raw := fmt.Appendf(nil, format, id, strings.Repeat("x", size))
	return &Envelope{EventID: id, Raw: raw}
}

// claim claims an event, and reports whether that was acknowledged.
func (m *journalModel) claim(j *Journal, env *Envelope) bool {
	m.t.Helper()
	id := env.EventID
	m.bodies[id] = env.Raw
	fresh, err := j.Claim(context.Background(), env)
	known := m.done[id] || m.doubt[id] || slices.Contains(m.order, id)
	switch {
	case err != nil:
		journalExpectStep(m.t, err)
		m.moved[id] = m.moved[id] || m.gaveUp[id]
		return false
	case fresh && known && !m.gaveUp[id]:
		m.t.Errorf("%s is new a second time", id)
	case !fresh && !known:
		m.t.Errorf("%s is acknowledged as a duplicate of nothing", id)
	case fresh:
		m.order = append(slices.DeleteFunc(m.order, func(s string) bool { return s == id }), id)
		delete(m.moved, id)
	}
	delete(m.gaveUp, id)
	return true
}

// finish ends a claim.
func (m *journalModel) finish(j *Journal, id string, result error) {
	err := j.Done(context.Background(), &Envelope{EventID: id}, result)
	held := slices.Contains(m.order, id) && !m.gaveUp[id]
	switch {
	case err != nil:
		journalExpectStep(m.t, err)
		m.doubt[id] = m.doubt[id] || held
	case held && result != nil:
		m.gaveUp[id] = true
	case held:
		m.done[id] = true
		delete(m.doubt, id)
		m.order = slices.DeleteFunc(m.order, func(s string) bool { return s == id })
	}
}

// journalExpectStep expects an error that names the file and the step.
func journalExpectStep(t testing.TB, err error) {
	t.Helper()
	if !errors.As(err, new(*fs.PathError)) || !strings.HasPrefix(err.Error(), "offloadhook: ") {
		t.Errorf("the error names no file and step: %v", err)
	}
}

// pending reads the journal until that meets no error, twice at most again, and returns the last result.
func (m *journalModel) pending(j *Journal) (ids []string, errs []error) {
	m.t.Helper()
	for range 3 {
		ids = nil
		clean := true
		for env, err := range j.Pending(context.Background()) {
			if err != nil {
				errs = append(errs, err)
				clean = false
				continue
			}
			ids = append(ids, env.EventID)
			if !bytes.Equal(env.Raw, m.bodies[env.EventID]) {
				m.t.Errorf("%s came back as %q, want %q", env.EventID, env.Raw, m.bodies[env.EventID])
			}
		}
		if clean {
			return ids, errs
		}
	}
	m.t.Errorf("Pending finds no end of errors: %v", errs)
	return ids, errs
}

// expectPending expects what was acknowledged and is not done, in order. What was refused may be there only after a
// crash; then it counts as acknowledged from now on. What is done may come back only if lossy.
func (m *journalModel) expectPending(j *Journal, crashed, lossy bool) (errs []error) {
	m.t.Helper()
	ids, errs := m.pending(j)
	var order []string
	for _, id := range ids {
		switch {
		case slices.Contains(order, id):
			m.t.Errorf("%s came out twice", id)
		case m.bodies[id] == nil:
			m.t.Errorf("%s came out of nowhere", id)
		case m.done[id] && !lossy:
			m.t.Errorf("%s came out again, after it was done", id)
		case !crashed && !slices.Contains(m.order, id):
			m.t.Errorf("%s was refused, and came out", id)
		}
		order = append(order, id)
	}
	var want, got []string
	for _, id := range m.order {
		switch found := slices.Contains(ids, id); {
		case !found && m.doubt[id]:
			m.done[id] = crashed
		case !found && !crashed && m.gaveUp[id]: // it rests
		case !found:
			m.t.Errorf("%s was acknowledged and is lost; there are %q", id, ids)
		case !crashed || !m.moved[id]:
			want = append(want, id)
		}
	}
	for _, id := range ids {
		if slices.Contains(m.order, id) && (!crashed || !m.moved[id]) {
			got = append(got, id)
		}
	}
	if !slices.Equal(got, want) {
		m.t.Errorf("the order is %q, want %q", got, want)
	}
	if crashed {
		m.order = order
		clear(m.gaveUp)
		clear(m.moved)
		clear(m.doubt)
		for _, id := range order {
			delete(m.done, id)
		}
		for id := range m.bodies {
			if slices.Contains(order, id) || m.done[id] {
				m.claim(j, &Envelope{EventID: id, Raw: m.bodies[id]}) // is a duplicate
			}
		}
	}
	return errs
}

// journalLife uses a journal as one process does: it opens it, claims, finishes, gives up, reads. heavy events make it
// compact. It returns nil if the journal does not open.
func journalLife(m *journalModel, d *diskProcess, life string, heavy bool) *Journal {
	m.t.Helper()
	j, err := openJournal(d, "journal", 0)
	if err != nil {
		journalExpectStep(m.t, err)
		return nil
	}
	if d.fault == (diskFault{}) { // else the reading may be refused
		m.expectPending(j, true, true)
	} else {
		for range j.Pending(context.Background()) {
			continue
		}
	}
	id := func(i int) string { return fmt.Sprintf("evt_%s_%d", life, i) }
	for i := range 5 {
		m.claim(j, journalEvent(id(i), i, 0))
		if i%2 == 1 {
			m.finish(j, id(i-1), nil)
		}
	}
	m.finish(j, id(3), errTest)
	m.claim(j, journalEvent(id(0), 0, 0))
	m.claim(j, journalEvent(id(3), 0, 0))
	m.finish(j, id(4), errTest)
	if heavy {
		for i := 10; i < 14; i++ {
			m.claim(j, journalEvent(id(i), 0, 600<<10))
		}
		for i := 10; i < 14; i++ {
			m.finish(j, id(i), nil)
			synctest.Wait() // for the compaction
		}
	}
	for range j.Pending(context.Background()) {
		break
	}
	m.claim(j, journalEvent(id(5), 2, 700))
	m.finish(j, id(3), nil)
	m.claim(j, journalEvent(id(6), 1, 0))
	m.finish(j, id(5), nil)
	return j
}

// journalCrash says what a crash leaves of what was not synced: all of it when only the process died.
type journalCrash struct {
	power bool
	keep  float64
	seed  uint64
}

func (c journalCrash) String() string {
	if !c.power {
		return "killed"
	}
	return fmt.Sprintf("power lost, %v kept, seed %d", c.keep, c.seed)
}

var journalKilled = []journalCrash{{}}

func journalPowerLosses(seeds uint64) []journalCrash {
	crashes := []journalCrash{{power: true, keep: 0}, {power: true, keep: 1}}
	for seed := range seeds {
		crashes = append(crashes, journalCrash{true, 0.5, seed})
	}
	return crashes
}

// journalTrial runs a life with a fault on a journal that has had one life already, or on none; crashes; and expects
// that another life finds everything.
func journalTrial(t *testing.T, used, heavy bool, fault diskFault, crash journalCrash) *diskProcess {
	t.Helper()
	medium, m := newDisk(), newJournalModel(t)
	if used {
		before := medium.process()
		journalLife(m, before, "a", false)
		before.die()
	}
	d := medium.process()
	d.fault = fault
	d.rng = rand.New(rand.NewPCG(uint64(fault.from), crash.seed))
	j := journalLife(m, d, "b", heavy)
	if j != nil && !d.dead {
		d.heal()
		extra, accepted := journalEvent("evt_extra", 0, 0), false
		for try := 0; try < 2 && !accepted; try++ {
			accepted = m.claim(j, extra)
		}
		if !accepted {
			t.Error("the journal does not go on when the disk is sound again")
		}
		m.expectPending(j, false, false)
	}
	d.die()
	if j != nil {
		_ = j.Close() // which ends its goroutines; the disk is out of reach
	}
	if crash.power {
		medium.losePower(d.rng, crash.keep)
	}
	after := medium.process()
	j, err := openJournal(after, "journal", 0)
	if err != nil {
		t.Fatal(err)
	}
	errs := m.expectPending(j, true, crash.power || fault.drop)
	if len(errs) > 0 && !crash.power && d.struck == 0 {
		t.Errorf("Pending reports %v", errs)
	}
	m.claim(j, journalEvent("evt_after", 1, 0))
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	j, err = openJournal(medium.process(), "journal", 0)
	if err != nil {
		t.Fatal(err)
	}
	if errs := m.expectPending(j, true, false); len(errs) > 0 {
		t.Errorf("Pending reports again %v", errs)
	}
	if !slices.Contains(m.order, "evt_after") {
		t.Error("what was claimed after the crash is lost")
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	for _, wrong := range medium.wrongs {
		t.Error(wrong)
	}
	return d
}

// journalTrials makes a trial for each operation of a life that the fault may hit, and each crash.
func journalTrials(t *testing.T, name string, heavy bool, fault diskFault, crashes []journalCrash) {
	t.Helper()
	for _, used := range []bool{true, false} {
		if heavy && !used {
			break // it would make no difference
		}
		t.Run(fmt.Sprintf("%s/used=%v", name, used), func(t *testing.T) {
			var steps []string
			synctest.Test(t, func(t *testing.T) {
				steps = journalTrial(t, used, heavy, diskFault{from: 1 << 30, span: 1}, journalCrash{}).steps
			})
			first, last, hits := 0, len(steps), 0
			if heavy { // what comes before and after the compaction is tried elsewhere
				opened := slices.Index(steps, "remove") + 1
				first = opened + slices.Index(steps[opened:], "create")
				last = first + slices.Index(steps[first:], "remove") + 3
				if first < opened || last < first+3 {
					t.Fatalf("there was no compaction: %q", steps)
				}
			}
			for n := first; n < min(last, len(steps)); n++ {
				if !strings.HasPrefix(steps[n], fault.only) {
					continue
				}
				hits++
				for _, crash := range crashes {
					fault := fault
					fault.from = n + 1
					synctest.Test(t, func(t *testing.T) {
						d := journalTrial(t, used, heavy, fault, crash)
						if got := d.steps[:min(n+1, len(d.steps))]; !slices.Equal(got, steps[:n+1]) {
							t.Errorf("the steps are not the same each time: %q, want %q", got, steps[:n+1])
						}
						if t.Failed() {
							t.Fatalf("%s failed: %+v; then %s", steps[n], fault, crash)
						}
					})
				}
			}
			if hits == 0 {
				t.Errorf("nothing of %q is %q", steps, fault.only)
			}
		})
	}
}

// journalFull reports whether the tests are to go to their full length, and not the slice that takes a minute.
var journalFull = os.Getenv("OFFLOADHOOK_FULL") != ""

// journalCount is a number of rounds: of the slice, or in full.
func journalCount(slice, full int) int {
	if journalFull {
		return full
	}
	return slice
}

// The process dies at its nth file operation, for every n; the last write may be a part of one.
func TestRow02DiesAtEveryOperation(t *testing.T) {
	journalTrials(t, "clean", false, diskFault{span: 1, dies: true}, journalKilled)
	journalTrials(t, "torn", false, diskFault{span: 1, dies: true, half: true}, journalKilled)
}

// The power goes at every operation, and with it some, all or nothing of what was not synced.
func TestRow03PowerLoss(t *testing.T) {
	seeds := uint64(journalCount(3, 100))
	journalTrials(t, "torn", false, diskFault{span: 1, dies: true, half: true}, journalPowerLosses(seeds))
}

// Life after life in which anything fails at any time, with a crash of any kind after each.
func TestRow03AnythingFailsAnyTime(t *testing.T) {
	for seed := range uint64(journalCount(100, 5000)) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 3))
			medium, m, drops := newDisk(), newJournalModel(t), false
			for life := range 6 {
				d := medium.process()
				d.rng = rng
				if life%2 == 0 {
					d.fault = diskFault{rate: 0.1 * rng.Float64(), half: rng.IntN(2) == 0, drop: rng.IntN(2) == 0}
				}
				drops = drops || d.fault.drop
				j := journalLife(m, d, fmt.Sprint(life), false)
				d.die()
				if j != nil {
					_ = j.Close()
				}
				lossy := drops || rng.IntN(2) == 0
				if lossy {
					medium.losePower(rng, []float64{0, 0.5, 1}[rng.IntN(3)])
				}
				after := medium.process()
				if j, err := openJournal(after, "journal", 0); err != nil {
					t.Error(err)
				} else {
					m.expectPending(j, true, lossy)
					_ = j.Close()
				}
				if len(medium.wrongs) > 0 || t.Failed() {
					t.Fatalf("seed %d, life %d: %q", seed, life, medium.wrongs)
				}
			}
		})
	}
}

// Every operation fails in turn, once and for a while, and the journal goes on.
func TestEveryOperationFails(t *testing.T) {
	crashes := []journalCrash{{}, {true, 0.5, 1}}
	journalTrials(t, "once", false, diskFault{span: 1}, crashes)
	journalTrials(t, "thrice", false, diskFault{span: 3}, crashes)
	journalTrials(t, "long", false, diskFault{span: 20}, crashes)
}

// An fsync fails, of a file or of the directory: what waits for it is refused, its file is never used again, and the
// journal goes on in another.
func TestRow07FsyncFails(t *testing.T) {
	crashes := append(journalPowerLosses(2), journalKilled...)
	journalTrials(t, "kept", false, diskFault{span: 1, only: "sync"}, crashes)
	journalTrials(t, "dropped", false, diskFault{span: 1, only: "sync", drop: true}, crashes)
	journalTrials(t, "long", false, diskFault{span: 30, only: "sync", drop: true}, crashes)
}

// No write succeeds from some operation on, after a part of one: as when the disk is full.
func TestRow08DiskFull(t *testing.T) {
	crashes := append(journalPowerLosses(1), journalKilled...)
	for _, span := range []int{1, 10, 1000} {
		journalTrials(t, fmt.Sprint("span=", span), false, diskFault{span: span, only: "write", half: true}, crashes)
	}
}

// What a failed write has left behind is cut off, so that a person who reads the file finds whole lines.
func TestRow08TailIsCut(t *testing.T) {
	medium := newDisk()
	d := medium.process()
	j, err := openJournal(d, "journal", 0)
	if err != nil {
		t.Fatal(err)
	}
	m := newJournalModel(t)
	for i := range 100 {
		m.claim(j, journalEvent(fmt.Sprint("evt_", i), i, 0))
		_, before := medium.newest(".log")
		d.fault = diskFault{from: 1, span: 1 << 30, only: "write", half: true}
		if m.claim(j, journalEvent("evt_refused", i, 1000)) {
			t.Fatal("an event was acknowledged that could not be written")
		}
		m.finish(j, fmt.Sprint("evt_", i), nil)
		d.heal()
		if _, after := medium.newest(".log"); !bytes.Equal(after, before) {
			t.Fatalf("after the failures the file is\n%q, want\n%q", after, before)
		}
		m.finish(j, fmt.Sprint("evt_", i), nil)
	}
	m.expectPending(j, false, false)
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	j = openOn(t, d, 0)
	m.expectPending(j, false, false) // nothing that was refused is there

	// Where that fails, too, the journal goes on in another file.
	d.fault = diskFault{from: 1, span: 1 << 30, half: true}
	if m.claim(j, journalEvent("evt_refused", 0, 1000)) {
		t.Fatal("an event was acknowledged that could not be written")
	}
	torn, _ := medium.newest(".log")
	d.heal()
	m.claim(j, journalEvent("evt_last", 0, 0))
	if newest, _ := medium.newest(".log"); newest == torn {
		t.Error("it goes on in a torn file")
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	m.expectPending(openOn(t, d, 0), false, false)
}

// A compaction is cut off at each of its operations, or one of them fails.
func TestRow09Compaction(t *testing.T) {
	journalTrials(t, "killed", true, diskFault{span: 1, dies: true, half: true}, journalKilled)
	journalTrials(t, "power lost", true, diskFault{span: 1, dies: true}, journalPowerLosses(1)[2:])
	journalTrials(t, "fails", true, diskFault{span: 1, half: true}, journalKilled)
	journalTrials(t, "fails, then power lost", true, diskFault{span: 1}, journalPowerLosses(0)[:1])
}

// journalLine is a line of a journal as its documentation tells it.
type journalLine struct {
	off, end int // of its text, without the line break
	id, done string
}

// journalLines reads a journal with encoding/json.
func journalLines(t *testing.T, content []byte) (lines []journalLine) {
	t.Helper()
	for off := 0; off < len(content); {
		end := off + bytes.IndexByte(content[off:], '\n')
		var fields struct {
			ID, Done string
			Event    json.RawMessage
			Base64   []byte
		}
		if err := json.Unmarshal(bytes.ToValidUTF8(content[off+9:end], nil), &fields); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, journalLine{off: off, end: end, id: fields.ID, done: fields.Done})
		off = end + 1
	}
	return lines
}

// journalSample returns the bytes of a small journal, what they hold, and a model that knows the payloads.
func journalSample(t *testing.T) (name string, content []byte, lines []journalLine, m *journalModel) {
	t.Helper()
	medium := newDisk()
	m = newJournalModel(t)
	d := medium.process()
	if journalLife(m, d, "a", false) == nil {
		t.Fatal("the journal does not open")
	}
	d.die()
	name, content = medium.newest(".log")
	return name, content, journalLines(t, content), m
}

// journalAlive returns the ids of the events in lines that are not done, leaving out the lines for which lost is true.
func journalAlive(lines []journalLine, lost func(journalLine) bool) (ids []string) {
	for _, line := range lines {
		switch {
		case lost(line):
		case line.id != "":
			ids = append(slices.DeleteFunc(ids, func(id string) bool { return id == line.id }), line.id)
		case line.done != "":
			ids = slices.DeleteFunc(ids, func(id string) bool { return id == line.done })
		}
	}
	return ids
}

// journalSpoiled opens a journal of these bytes; expects of it the events want, in order and unchanged; and that it
// goes on. It returns what Pending reported.
func journalSpoiled(t *testing.T, m *journalModel, name string, content []byte, want []string) (string, *diskMedium) {
	t.Helper()
	medium := diskWith(name, content)
	j, err := openJournal(medium.process(), "journal", 0)
	if err != nil {
		t.Fatal(err)
	}
	ids, errs := m.pending(j)
	if !slices.Equal(ids, want) {
		t.Errorf("there are %q, want %q", ids, want)
	}
	if fresh, err := j.Claim(t.Context(), journalEvent("evt_new", 0, 0)); !fresh || err != nil {
		t.Errorf("claiming a new event: %v, %v", fresh, err)
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	j, err = openJournal(medium.process(), "journal", 0)
	if err != nil {
		t.Fatal(err)
	}
	m.bodies["evt_new"] = journalEvent("evt_new", 0, 0).Raw
	ids, again := m.pending(j)
	if !slices.Equal(ids, append(slices.Clone(want), "evt_new")) {
		t.Errorf("then there are %q, want %q and the new event", ids, want)
	}
	if len(again) > 0 {
		t.Errorf("Pending reports again %v", again)
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	return fmt.Sprint(errors.Join(errs...)), medium
}

// The journal ends at any byte.
func TestRow04CutAnywhere(t *testing.T) {
	name, content, lines, m := journalSample(t)
	for cut := range len(content) + 1 {
		want := journalAlive(lines, func(line journalLine) bool { return line.end > cut })
		report, _ := journalSpoiled(t, m, name, content[:cut], want)
		if report != "<nil>" {
			t.Errorf("Pending reports %v", report)
		}
		if t.Failed() {
			t.Fatalf("the journal was cut at byte %d of %q", cut, content)
		}
	}
}

// Any bit is flipped. Only the record in which it is may be lost: a line break belongs to none.
func TestRow05FlippedBit(t *testing.T) {
	name, content, lines, m := journalSample(t)
	for bit := 0; bit < 8*len(content); bit += journalCount(7, 1) {
		spoiled := bytes.Clone(content)
		spoiled[bit/8] ^= 1 << (bit % 8)
		hit := func(line journalLine) bool { return line.off <= bit/8 && bit/8 < line.end }
		report, medium := journalSpoiled(t, m, name, spoiled, journalAlive(lines, hit))
		damaged, kept := medium.newest(".damaged")
		off := bit / 8
		if i := slices.IndexFunc(lines, hit); i >= 0 {
			off = lines[i].off
		} // else it is a line break, which is no part of a record
		if off == len(content)-1 { // it might have been torn
			if report != "<nil>" || damaged != "" {
				t.Errorf("behind the last record: Pending reports %v and there is %q", report, damaged)
			}
		} else if at := fmt.Sprintf("%s: damaged record at byte %d;", name, off); strings.Count(report, at) != 1 {
			t.Errorf("Pending reports %v, want once %s", report, at)
		} else if damaged != name+".damaged" || !bytes.Equal(kept, spoiled) {
			t.Errorf("%q was kept: %q", damaged, kept)
		}
		if t.Failed() {
			t.Fatalf("bit %d of byte %d of %q was flipped", bit%8, bit/8, content)
		}
	}
}

// Where a line break is missing, both records are read.
func TestRow05LineBreakMissing(t *testing.T) {
	name, content, lines, m := journalSample(t)
	want := journalAlive(lines, func(journalLine) bool { return false })
	for _, line := range lines {
		report, _ := journalSpoiled(t, m, name, slices.Delete(bytes.Clone(content), line.end, line.end+1), want)
		expectEqual(t, "reported", report, "<nil>")
	}
}

// The journal ends in zeros.
func TestRow06ZeroTail(t *testing.T) {
	name, content, lines, m := journalSample(t)
	half := lines[len(lines)-1].off + 20
	for zeros := 1; zeros <= 4096; zeros += journalCount(7, 1) {
		want := journalAlive(lines, func(journalLine) bool { return false })
		report, _ := journalSpoiled(t, m, name, append(bytes.Clone(content), make([]byte, zeros)...), want)
		if report != "<nil>" {
			t.Errorf("Pending reports %v", report)
		}
		want = journalAlive(lines, func(line journalLine) bool { return line.end > half })
		report, _ = journalSpoiled(t, m, name, append(bytes.Clone(content[:half]), make([]byte, zeros)...), want)
		if report != "<nil>" {
			t.Errorf("after half a record Pending reports %v", report)
		}
		if t.Failed() {
			t.Fatalf("there were %d zeros", zeros)
		}
	}
}

// A duplicate comes while the fsync of the first is failing: neither is acknowledged.
func TestRow11DuplicateDuringFailingFsync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		medium := newDisk()
		d := medium.process()
		j, err := openJournal(d, "journal", 0)
		if err != nil {
			t.Fatal(err)
		}
		for round := range 1000 {
			env := journalEvent(fmt.Sprint("evt_", round), round, 0)
			begun, duplicate := false, make(chan error, 1)
			d.onSync(func() {
				_, content := medium.newest(".log")
				if begun || !bytes.Contains(content, fmt.Appendf(nil, "{\"id\":%q", env.EventID)) {
					return // or it is that of a new file, before the event is in it
				}
				begun = true
				go func() {
					fresh, err := j.Claim(context.Background(), env)
					if fresh {
						err = errors.New("the duplicate is new")
					}
					duplicate <- err
				}()
				synctest.Wait() // for it to wait
				select {
				case err := <-duplicate:
					t.Errorf("the duplicate did not wait: %v", err)
				default:
				}
				medium.mu.Lock()
				d.fault = diskFault{from: 1, span: 1 << 30, only: "sync"}
				medium.mu.Unlock()
			})
			if _, err := j.Claim(t.Context(), env); !errors.Is(err, errDisk) {
				t.Fatalf("round %d: the first got %v", round, err)
			}
			if err := <-duplicate; !errors.Is(err, errDisk) {
				t.Fatalf("round %d: the duplicate got %v", round, err)
			}
			d.hook = nil
			d.heal()
			if fresh, err := j.Claim(t.Context(), env); !fresh || err != nil {
				t.Fatalf("round %d: then it got %v, %v", round, fresh, err)
			}
			if err := j.Done(t.Context(), env, nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestJournalChild is the process that other tests start, and kill.
func TestJournalChild(t *testing.T) {
	dir := os.Getenv("OFFLOADHOOK_DIR")
	switch os.Getenv("OFFLOADHOOK_CHILD") {
	case "":
		return
	case "serve":
		journalServe(dir, os.Getenv("OFFLOADHOOK_HANDLED"))
	case "fill":
		journalFill(dir)
	case "open":
		_, err := OpenJournal(dir, 0)
		fmt.Println("opened:", err)
	}
	os.Exit(0)
}

// journalServe serves events of a journal, with callbacks that append what they get to the file handled, until its
// standard input ends.
func journalServe(dir, handled string) {
	journal, err := OpenJournal(dir, 0)
	if errors.Is(err, ErrClosed) {
		return // another was faster
	}
	journalMust(err)
	out, err := os.OpenFile(handled, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	journalMust(err)
	receiver := Handler(Callbacks{Other: func(_ context.Context, env *Envelope) error {
		_, err := fmt.Fprintf(out, "\n%s %x\n", env.EventID, sha256.Sum256(env.Raw)) // the last line may be cut off by a kill
		return err
	}}, WithInbox(journal), WithConcurrency(4), WithBacklog(16), WithObserver(func(context.Context, Observation) {}))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	journalMust(err)
	server := &http.Server{Handler: receiver}
	go func() { _ = server.Serve(listener) }()
	fmt.Printf("ready http://%s\n", listener.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin)
	_ = server.Close()
	journalMust(receiver.Shutdown(context.Background()))
	_ = journal.Close()
}

// journalFill claims events until that fails three times, and prints those that were acknowledged.
func journalFill(dir string) {
	journal, err := OpenJournal(dir, 0)
	journalMust(err)
	for i, failed := 0, 0; failed < 3 && i < 10000; i++ {
		env := journalEvent(fmt.Sprint("evt_", i), i, 100*i)
		switch fresh, err := journal.Claim(context.Background(), env); {
		case err != nil:
			failed++
			fmt.Println("refused:", err)
		case fresh:
			fmt.Println("acknowledged:", env.EventID)
		}
	}
	for env, err := range journal.Pending(context.Background()) {
		journalMust(err)
		fmt.Println("pending:", env.EventID)
	}
}

func journalMust(err error) {
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
}

// journalChild is a running TestJournalChild.
type journalChild struct {
	*exec.Cmd
	stdin io.WriteCloser
	lines *bufio.Scanner // of its standard output
	url   string
}

// journalStart starts a child. wrap is the command that runs it, if any.
func journalStart(t testing.TB, mode, dir, handled string, wrap ...string) *journalChild {
	t.Helper()
	args := append(wrap, os.Args[0], "-test.run=^TestJournalChild$")
	c := &journalChild{Cmd: exec.Command(args[0], args[1:]...)}
	c.Env = append(os.Environ(), "OFFLOADHOOK_CHILD="+mode, "OFFLOADHOOK_DIR="+dir, "OFFLOADHOOK_HANDLED="+handled)
	c.Stderr = os.Stderr
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	c.stdin, c.lines = stdin, bufio.NewScanner(stdout)
	return c
}

// ready waits until the child serves, and reports whether it does: it may have been killed before.
func (c *journalChild) ready(t testing.TB) bool {
	for c.lines.Scan() {
		if url, found := strings.CutPrefix(c.lines.Text(), "ready "); found {
			c.url = url
			return true
		}
		t.Errorf("a child said %q", c.lines.Text())
	}
	return false
}

func (c *journalChild) kill() {
	_ = c.Process.Kill()
	_ = c.Wait()
}

// journalClients are senders that post events of a case each, one after the other, and never again.
type journalClients struct {
	client *http.Client
	urls   atomic.Pointer[[]string] // where to post: to each in turn
	stop   chan struct{}
	done   sync.WaitGroup

	mu    sync.Mutex // protects what follows
	acked []string
}

func journalSend(n int) *journalClients {
	s := &journalClients{stop: make(chan struct{})}
	s.client = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: n}}
	s.urls.Store(new([]string))
	for c := range n {
		s.done.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-s.stop:
					return
				default:
				}
				urls := *s.urls.Load()
				if len(urls) == 0 {
					time.Sleep(time.Millisecond) // a sender without a receiver
					continue
				}
				if id := fmt.Sprintf("evt_%d_%06d", c, i); !s.post(urls[i%len(urls)], id) {
					time.Sleep(time.Millisecond) // a sender that is refused has something else to do
				}
			}
		})
	}
	return s
}

func journalBody(id string) string {
	client, _, _ := strings.Cut(strings.TrimPrefix(id, "evt_"), "_")
	return fmt.Sprintf("{\"event_id\": %q,\n \"data\": {\"caseId\":\"case_%s\"}} ", id, client)
}

// post reports whether the event was acknowledged.
func (s *journalClients) post(url, id string) bool {
	answer, err := s.client.Post(url, "application/json", strings.NewReader(journalBody(id)))
	if err != nil {
		return false
	}
	_, _ = io.Copy(io.Discard, answer.Body)
	_ = answer.Body.Close()
	if answer.StatusCode/100 != 2 {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.acked = append(s.acked, id)
	return true
}

// expectHandled waits until every acknowledged event is in the file handled: unchanged, and in its case for the first
// time in the order in which it was sent. It returns how many came more than once.
func (s *journalClients) expectHandled(t *testing.T, handled string) (again int) {
	t.Helper()
	var missing []string
	acked := make(map[string]bool)
	for _, id := range s.acked {
		acked[id] = true
	}
	for range 600 {
		content, _ := os.ReadFile(handled)
		seen, last := make(map[string]bool), make(map[string]string)
		again, missing = 0, nil
		for line := range strings.Lines(string(content)) {
			id, sum, _ := strings.Cut(strings.TrimSpace(line), " ")
			if len(sum) < 2*sha256.Size {
				continue // empty, or cut off, or still being written: a read may see half of a write
			}
			if sum != fmt.Sprintf("%x", sha256.Sum256([]byte(journalBody(id)))) {
				t.Fatalf("a callback got other bytes of %s", id)
			}
			if seen[id] {
				again++
				continue
			}
			seen[id] = true
			if !acked[id] {
				continue // it was refused, by one that had just lost the journal or was killed, and was kept all the same
			}
			if client, _, _ := strings.Cut(strings.TrimPrefix(id, "evt_"), "_"); id < last[client] {
				t.Fatalf("%s was handled after %s", id, last[client])
			} else {
				last[client] = id
			}
		}
		for _, id := range s.acked {
			if !seen[id] {
				missing = append(missing, id)
			}
		}
		if len(missing) == 0 {
			return again
		}
		time.Sleep(50 * time.Millisecond) // the child is at work
	}
	t.Fatalf("%d of %d acknowledged events were lost, such as %s", len(missing), len(s.acked), missing[0])
	return again
}

// Processes are killed at random under load, one after the other, some while they open the journal. Every event that
// got a 2xx reaches its callback.
func TestRow01Kill(t *testing.T) {
	dir, handled := filepath.Join(t.TempDir(), "journal"), filepath.Join(t.TempDir(), "handled")
	rounds := journalCount(40, 1000)
	senders := journalSend(8)
	for round := range rounds {
		child := journalStart(t, "serve", dir, handled)
		if round%5 == 4 {
			time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond) // until the kill, which is to come at any time
		} else if child.ready(t) {
			senders.urls.Store(&[]string{child.url})
			time.Sleep(time.Duration(rand.IntN(80)) * time.Millisecond)
		}
		child.kill()
		senders.urls.Store(new([]string))
	}
	close(senders.stop)
	senders.done.Wait()
	child := journalStart(t, "serve", dir, handled)
	defer child.kill()
	child.ready(t)
	again := senders.expectHandled(t, handled)
	t.Logf("%d rounds: %d events acknowledged, none lost, %d handled again", rounds, len(senders.acked), again)
	if len(senders.acked) < rounds {
		t.Errorf("only %d events were acknowledged", len(senders.acked))
	}
	if most := 5 * (rounds + 1); again > most {
		t.Errorf("%d events were handled again, want at most those in hand at each kill: %d", again, most)
	}
}

// A process takes the journal over from another, under load, and some of either are killed meanwhile. From then on the
// other refuses. Every event that either acknowledged reaches a callback.
func TestRow17Takeover(t *testing.T) {
	dir, handled := filepath.Join(t.TempDir(), "journal"), filepath.Join(t.TempDir(), "handled")
	rounds, taken := journalCount(20, 2000), 0
	senders := journalSend(8)
	current := journalStart(t, "serve", dir, handled)
	for round := 0; taken < rounds; round++ {
		if current.url == "" && !current.ready(t) {
			t.Fatal("a child does not serve")
		}
		senders.urls.Store(&[]string{current.url})
		next := journalStart(t, "serve", dir, handled)
		switch round % 4 {
		case 0: // it dies while it takes over, or a little before or after
			time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
			next.kill()
			next = journalStart(t, "serve", dir, handled)
		case 1: // the other dies meanwhile
			time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
			_ = current.Process.Kill()
		}
		if !next.ready(t) {
			t.Fatal("a child does not serve")
		}
		taken++
		senders.urls.Store(&[]string{current.url, next.url}) // some sender has not heard of it
		if id := fmt.Sprintf("evt_probe%d_0", round); senders.post(current.url, id) {
			t.Errorf("round %d: %s was acknowledged by a process that had lost the journal", round, id)
		}
		time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		if round%4 == 2 {
			_ = current.stdin.Close() // it shuts down
			_ = current.Wait()
		} else {
			current.kill()
		}
		current = next
	}
	close(senders.stop)
	senders.done.Wait()
	defer current.kill()
	again := senders.expectHandled(t, handled)
	t.Logf("%d takeovers: %d events acknowledged, none lost, %d handled again", taken, len(senders.acked), again)
}

// The receiver that has lost its journal refuses new events, starts no further callback, and tells the observer.
func TestRow17LoserStops(t *testing.T) {
	dir := t.TempDir()
	first := journalOpen(t, dir)
	release, started := make(chan struct{}), make(chan string, 100)
	var mu sync.Mutex
	var closed []Outcome
	loser := Handler(Callbacks{Other: func(ctx context.Context, env *Envelope) error {
		started <- env.EventID
		<-release
		return ctx.Err()
	}}, WithInbox(first), WithConcurrency(2), WithObserver(func(_ context.Context, o Observation) {
		mu.Lock()
		defer mu.Unlock()
		if errors.Is(o.Err, ErrClosed) {
			closed = append(closed, o.Outcome)
		}
	}))
	var want []string
	for i := range 10 {
		id := fmt.Sprint("evt_", i)
		if fresh, err := loser.Deliver(t.Context(), journalEvent(id, 0, 0).Raw); !fresh || err != nil {
			t.Fatal(fresh, err)
		}
		want = append(want, id)
	}
	second := journalOpen(t, dir)
	answer := httptest.NewRecorder()
	loser.ServeHTTP(answer, httptest.NewRequest("POST", "/", bytes.NewReader(journalEvent("evt_late", 0, 0).Raw)))
	if answer.Code != http.StatusServiceUnavailable {
		t.Errorf("a new event got %d, want 503", answer.Code)
	}
	close(release)
	if err := loser.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if n := len(started); n > 2 {
		t.Errorf("%d callbacks were started, want none besides the 2 that ran", n)
	}
	mu.Lock()
	defer mu.Unlock()
	if !slices.Contains(closed, StoreFailed) || !slices.Contains(closed, Refused) {
		t.Errorf("the observer was told of a closed journal only with %q", closed)
	}
	if got := journalPending(t, second); !slices.Equal(got, want) {
		t.Errorf("the winner has %q, want %q", got, want)
	}
}

// journalOpen opens a journal on the real disk.
func journalOpen(t testing.TB, dir string) *Journal {
	t.Helper()
	j, err := OpenJournal(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	return j
}

// journalPending returns the ids of what j has to hand out.
func journalPending(t testing.TB, j *Journal) (ids []string) {
	t.Helper()
	for env, err := range j.Pending(context.Background()) {
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, env.EventID)
	}
	return ids
}

// An opener is overtaken at its last step. Only the later one has the journal, and it has everything.
func TestRow17OpenerOvertakes(t *testing.T) {
	medium, m := newDisk(), newJournalModel(t)
	before := medium.process()
	journalLife(m, before, "a", false)
	before.die()
	slow, fast := medium.process(), medium.process()
	read, goOn, done := make(chan bool), make(chan bool), make(chan bool)
	var winner *Journal
	var err error
	fast.onSync(func() {
		fast.hook = nil
		close(read) // it has read the files
		<-goOn
	})
	slow.onSync(func() {
		slow.hook = nil
		go func() {
			defer close(done)
			winner, err = openJournal(fast, "journal", 0)
		}()
		<-read
	})
	loser, loserErr := openJournal(slow, "journal", 0)
	close(goOn)
	<-done
	if err != nil {
		t.Fatalf("the later opener failed: %v", err)
	}
	if loserErr == nil {
		_, loserErr = loser.Claim(t.Context(), journalEvent("evt_new", 0, 0))
	}
	if !errors.Is(loserErr, ErrClosed) {
		t.Errorf("the earlier opener got %v, want ErrClosed", loserErr)
	}
	if errs := m.expectPending(winner, true, false); len(errs) > 0 {
		t.Error(errs)
	}
	if !m.claim(winner, journalEvent("evt_new", 0, 0)) {
		t.Error("the later opener does not have the journal")
	}
}

// An opener that finds its files gone, since a later one has copied them, does not try again: it has lost.
func TestRow17OvertakenWhileReading(t *testing.T) {
	record := appendRecord(nil, "id", []byte(`"evt_1"`), 1, journalEvent("evt_1", 0, 0).Raw)
	medium := diskWith(filepath.Join("journal", "events-00000001.log"), record)
	slow := medium.process()
	var winner *Journal
	slow.hook = func(op, path string) error {
		if op == "open" && strings.HasSuffix(path, "events-00000001.log") {
			slow.hook = nil
			winner = openOn(t, medium.process(), 0)
		}
		return nil
	}
	if loser, err := openJournal(slow, "journal", 0); !errors.Is(err, ErrClosed) {
		t.Errorf("the earlier opener got %v, %v, want ErrClosed", loser, err)
	}
	journalClaimed(t, winner, "evt_2")
	expectList(t, "pending", journalPending(t, winner), "evt_1", "evt_2")
}

// Openers race for a directory, each claiming until it has lost it. What they were told is theirs is kept.
func TestRow17OpenersRace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "journal")
	for round := range journalCount(30, 300) {
		var openers sync.WaitGroup
		var acked sync.Map
		for opener := range 8 {
			openers.Go(func() {
				j, err := OpenJournal(dir, 0)
				if errors.Is(err, ErrClosed) {
					return // another has taken it over meanwhile
				}
				if err != nil {
					t.Error(err)
					return
				}
				for i := range 20 {
					env := journalEvent(fmt.Sprintf("evt_%d_%d_%d", round, opener, i), i, 0)
					if _, err := j.Claim(t.Context(), env); err == nil {
						acked.Store(env.EventID, true)
					} else if !errors.Is(err, ErrClosed) {
						t.Error(err)
					}
				}
				_ = j.Close()
			})
		}
		openers.Wait()
		j := journalOpen(t, dir)
		pending := journalPending(t, j)
		n := 0
		for id := range acked.Range {
			if n++; !slices.Contains(pending, id.(string)) {
				t.Errorf("%s was acknowledged and is lost", id)
			}
		}
		if n < 20 {
			t.Errorf("round %d: %d events were acknowledged, want all 20 of the last opener at least", round, n)
		}
		for _, id := range pending {
			_ = j.Done(t.Context(), &Envelope{EventID: id}, nil)
		}
		_ = j.Close()
	}
}

// A real file may grow no longer: the process is under a file-size limit.
func TestRow08FileSizeLimit(t *testing.T) {
	if err := exec.Command("sh", "-c", "ulimit -f 64").Run(); err != nil { // as that of Git on Windows
		t.Skip("there is no shell that could set a limit:", err)
	}
	dir := t.TempDir()
	child := journalStart(t, "fill", dir, "", "sh", "-c", `trap "" XFSZ; ulimit -f 64 && exec "$0" "$@"`)
	said := make(map[string][]string)
	for child.lines.Scan() {
		word, rest, _ := strings.Cut(child.lines.Text(), ": ")
		said[word] = append(said[word], rest)
	}
	_ = child.Wait()
	acked := said["acknowledged"]
	if len(acked) == 0 || len(said["refused"]) != 3 || len(said["failed"]) > 0 {
		t.Fatalf("the child said %q", said)
	}
	for _, text := range said["refused"] {
		if !strings.Contains(text, "write "+dir) {
			t.Errorf("the error names no file and step: %s", text)
		}
	}
	if !slices.Equal(said["pending"], acked) {
		t.Errorf("in the child there were %q, want %q", said["pending"], acked)
	}
	j := journalOpen(t, dir)
	if got := journalPending(t, j); !slices.Equal(got, acked) {
		t.Errorf("there are %q, want %q", got, acked)
	}
	if fresh, err := j.Claim(t.Context(), journalEvent("evt_new", 0, 1<<20)); !fresh || err != nil {
		t.Errorf("without the limit a new event got %v, %v", fresh, err)
	}
}

// A real disk is full, and then no longer.
func TestRow08SmallTmpfs(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("this machine lets the test mount no tmpfs: %v %s", err, out)
	}
	defer func() { _ = exec.Command("umount", "-l", dir).Run() }()
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 128<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	j, err := OpenJournal(filepath.Join(dir, "journal"), 0)
	if err != nil {
		t.Fatal(err)
	}
	m := newJournalModel(t)
	refused := 0
	for i := 0; refused < 5 && i < 1000; i++ {
		if !m.claim(j, journalEvent(fmt.Sprint("evt_", i), i, 5000)) {
			refused++
		}
	}
	if refused != 5 || len(m.order) < 10 {
		t.Fatalf("%d events fitted, and then %d were refused, want 5", len(m.order), refused)
	}
	m.expectPending(j, false, false)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if !m.claim(j, journalEvent("evt_new", 0, 5000)) {
		t.Error("the journal does not go on when there is room again")
	}
	m.finish(j, "evt_0", nil)
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	names, _ := filepath.Glob(filepath.Join(dir, "journal", "*.log"))
	content, err := os.ReadFile(names[len(names)-1])
	if err != nil {
		t.Fatal(err)
	}
	journalLines(t, content) // whole
	// What is alive is copied when a journal is opened, so there must be room for it twice.
	if out, err := exec.Command("mount", "-o", "remount,size=2m", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if j, err = OpenJournal(filepath.Join(dir, "journal"), 0); err != nil {
		t.Fatal(err)
	}
	m.expectPending(j, true, false)
	_ = j.Close()
}

// OpenJournal tells why it cannot, and leaves nothing open to others.
func TestOpenJournal(t *testing.T) {
	t.Run("a file in place of the directory", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "journal")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{path, filepath.Join(path, "below")} {
			j, err := OpenJournal(dir, 0)
			if j != nil || err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, %v; want an error that names %s", j, err, path)
			} else {
				journalExpectStep(t, err)
			}
		}
	})
	t.Run("a directory that cannot be written", func(t *testing.T) {
		dir, err := os.MkdirTemp("", "journal")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		if err := os.Chmod(dir, 0o555); err != nil {
			t.Fatal(err)
		}
		var wrap []string
		if os.Geteuid() == 0 {
			wrap = []string{"setpriv", "--reuid=65534", "--clear-groups"}
			if exec.Command(wrap[0], wrap[1], wrap[2], os.Args[0], "-test.run=^$").Run() != nil {
				t.Skip("root can write everywhere, and this machine lets nobody else run the test")
			}
		} else if runtime.GOOS == "windows" {
			t.Skip("Windows has no such mode")
		}
		child := journalStart(t, "open", dir, "", wrap...)
		child.lines.Scan()
		_ = child.Wait()
		if got := child.lines.Text(); !strings.Contains(got, "offloadhook: opening the journal: open "+dir) ||
			!strings.Contains(got, "permission denied") {
			t.Errorf("the child said %q", got)
		}
	})
	t.Run("modes", func(t *testing.T) {
		if runtime.GOOS == "windows" {
			t.Skip("Windows has no such modes")
		}
		dir := filepath.Join(t.TempDir(), "a", "journal")
		j := journalOpen(t, dir)
		if _, err := j.Claim(t.Context(), journalEvent("evt_1", 0, 0)); err != nil {
			t.Fatal(err)
		}
		files := 0
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			want := fs.FileMode(0o700)
			if !entry.IsDir() {
				want = 0o600
				files++
			}
			if info, infoErr := entry.Info(); err != nil || infoErr != nil || info.Mode().Perm() != want {
				t.Errorf("%s: %v, %v, %v; want %v", path, info.Mode(), err, infoErr, want)
			}
			return nil
		})
		if err != nil || files != 2 { // a copy, and one to go on in
			t.Errorf("there are %d files, %v; want 2", files, err)
		}
	})
}

// A journal that was closed refuses everything.
func TestJournalClosed(t *testing.T) {
	j := journalOpen(t, t.TempDir())
	env := journalClaimed(t, j, "evt_1")
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Errorf("closing it again: %v", err)
	}
	for _, env := range []*Envelope{env, journalEvent("evt_2", 0, 0)} {
		if fresh, err := j.Claim(t.Context(), env); fresh || !errors.Is(err, ErrClosed) {
			t.Errorf("Claim returned %v, %v", fresh, err)
		}
	}
	if err := j.Done(t.Context(), env, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Done returned %v", err)
	}
	n := 0
	for env, err := range j.Pending(t.Context()) {
		if n++; env != nil || !errors.Is(err, ErrClosed) {
			t.Errorf("Pending yields %v, %v", env, err)
		}
	}
	if n != 1 {
		t.Errorf("Pending yields %d times, want once", n)
	}
}

// An id that ParseEnvelope would refuse, which only an Envelope made by hand has, would not come back from the file.
func TestJournalRefusesUnusableIDs(t *testing.T) {
	j := journalOpen(t, t.TempDir())
	for _, id := range []string{"", "evt\n1", "evt\x7f", "evt\xff", strings.Repeat("x", 256)} {
		env := &Envelope{EventID: id, Raw: eventBody("evt_1", "case_1")}
		if fresh, err := j.Claim(t.Context(), env); fresh || !errors.Is(err, ErrMalformed) {
			t.Errorf("Claim of %q returned %v, %v", id, fresh, err)
		}
	}
	expectList(t, "pending", journalPending(t, j))
}

// journalCallbacks returns callbacks that all call f.
func journalCallbacks(f func(ctx context.Context, env *Envelope) error) Callbacks {
	return Callbacks{
		CaseCompleted: func(ctx context.Context, env *Envelope, _ *CaseCompleted) error { return f(ctx, env) },
		Other:         f,
	}
}

// Every id is delivered again when it has been handled and the journal was opened anew.
func TestRow12DuplicateOverRestart(t *testing.T) {
	const senders = 64
	ids, dir := journalCount(5000, 100_000), t.TempDir()
	for _, first := range []bool{true, false} {
		j := journalOpen(t, dir)
		var called, fresh atomic.Int64
		r := Handler(journalCallbacks(func(context.Context, *Envelope) error {
			called.Add(1)
			return nil
		}), WithInbox(j), WithBacklog(ids))
		var sending sync.WaitGroup
		for s := range senders {
			sending.Go(func() {
				for i := s; i < ids; i += senders {
					isNew, err := r.Deliver(t.Context(), journalEvent(fmt.Sprint("evt_", i), i, 0).Raw)
					if err != nil || isNew != first {
						t.Errorf("evt_%d got %v, %v; want %v", i, isNew, err, first)
						return
					}
					fresh.Add(1)
				}
			})
		}
		sending.Wait()
		want := int64(0)
		if first {
			want = int64(ids)
		}
		journalWait(t, "every callback to be called", func() bool { return called.Load() >= want })
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		if called.Load() != want || fresh.Load() != int64(ids) {
			t.Fatalf("%d callbacks for %d events, want %d", called.Load(), fresh.Load(), want)
		}
	}
}

// journalWait waits for something that other goroutines do.
func journalWait(t testing.TB, what string, done func() bool) {
	t.Helper()
	for range 6000 {
		if done() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("waited too long for %s", what)
}

// Every callback blocks, and events flood in: the journal is the queue. When the callbacks go on, all of them run.
func TestRow15Flood(t *testing.T) {
	const senders, cases, concurrency = 64, 640, 8
	events := journalCount(10_000, 100_000)
	j := journalOpen(t, t.TempDir())
	release := make(chan struct{})
	var mu sync.Mutex
	last, handled := make(map[string]int), 0
	r := Handler(Callbacks{CaseCompleted: func(_ context.Context, env *Envelope, c *CaseCompleted) error {
		<-release
		var n int
		if _, err := fmt.Sscanf(env.EventID, "evt_"+c.CaseID+"_%d", &n); err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		if n != last[c.CaseID]+1 {
			t.Errorf("%s was handled after number %d of its case", env.EventID, last[c.CaseID])
		}
		last[c.CaseID] = n
		handled++
		return nil
	}}, WithInbox(j), WithConcurrency(concurrency))

	idle, goroutines := journalMemory(), runtime.NumGoroutine()
	mostMemory, mostGoroutines := int64(0), 0
	var sending sync.WaitGroup
	for s := range senders {
		sending.Go(func() {
			for i := s; i < events; i += senders {
				number, caseID := i/cases+1, fmt.Sprint("case", i%cases)
				body := fmt.Appendf(nil, `{"event_id":"evt_%s_%d","event_type":"case.completed",
					"data":{"caseId":%q,"result":"%s"}}`, caseID, number, caseID, strings.Repeat("x", 500))
				if fresh, err := r.Deliver(t.Context(), body); !fresh || err != nil {
					t.Errorf("number %d of %s got %v, %v", number, caseID, fresh, err)
				}
				if i%1000 == 0 {
					memory := journalMemory() - idle
					mu.Lock()
					mostMemory = max(mostMemory, memory)
					mostGoroutines = max(mostGoroutines, runtime.NumGoroutine()-goroutines-senders)
					mu.Unlock()
				}
			}
		})
	}
	sending.Wait()
	mostMemory = max(mostMemory, journalMemory()-idle)
	t.Logf("%d events in hand: at most %.1f MiB and %d goroutines over idle",
		events, float64(mostMemory)/(1<<20), mostGoroutines)
	if mostMemory > 64<<20 {
		t.Errorf("they took %d bytes over idle, want at most 64 MiB", mostMemory)
	}
	if mostGoroutines > concurrency+20 {
		t.Errorf("they took %d goroutines over idle, want at most %d", mostGoroutines, concurrency+20)
	}
	close(release)
	journalWait(t, "all events to be handled", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return handled >= events
	})
	if err := r.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if handled != events {
		t.Errorf("%d callbacks for %d events", handled, events)
	}
	if left := journalPending(t, j); len(left) > 0 {
		t.Errorf("%d events are left", len(left))
	}
}

// journalMemory returns how many bytes the heap and the stacks take.
func journalMemory() int64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// The receiver shuts down under load, in every other round past its deadline. What was acknowledged has been handled or
// is kept, and the observer is told of each callback that was still running.
func TestRow16ShutdownKeepsTheInbox(t *testing.T) {
	for round := range journalCount(20, 200) {
		late, dir := round%2 == 1, t.TempDir()
		j := journalOpen(t, dir)
		var mu sync.Mutex
		started, handled, unfinished := make(map[string]bool), make(map[string]bool), make(map[string]bool)
		var running sync.WaitGroup
		r := Handler(journalCallbacks(func(ctx context.Context, env *Envelope) error {
			mu.Lock()
			running.Add(1)
			started[env.EventID] = true
			mu.Unlock()
			defer running.Done()
			if late && len(env.EventID)%2 == 0 {
				<-ctx.Done()
				return ctx.Err()
			}
			mu.Lock()
			defer mu.Unlock()
			handled[env.EventID] = true
			return nil
		}), WithInbox(j), WithConcurrency(4), WithBacklog(8), WithObserver(func(_ context.Context, o Observation) {
			mu.Lock()
			defer mu.Unlock()
			if o.Outcome == Unfinished {
				unfinished[o.Envelope.EventID] = true
			}
		}))
		var sending sync.WaitGroup
		acked, enough := make(map[string]bool), make(chan struct{})
		for s := range 8 {
			sending.Go(func() {
				for i := range 100_000 {
					id := fmt.Sprintf("evt_%d_%d", s, i)
					_, err := r.Deliver(t.Context(), journalEvent(id, 0, 0).Raw)
					if errors.Is(err, ErrClosed) {
						return
					}
					if err != nil {
						t.Error(err)
					}
					mu.Lock()
					if acked[id] = true; len(acked) == 10*(round%10)+20 {
						close(enough)
					}
					mu.Unlock()
				}
			})
		}
		<-enough
		ctx, cancel := context.WithCancel(t.Context())
		if late {
			cancel()
		}
		if err := r.Shutdown(ctx); late && err != nil && !errors.Is(err, context.Canceled) || !late && err != nil {
			t.Errorf("Shutdown returned %v", err)
		}
		cancel()
		sending.Wait()
		running.Wait()
		_ = j.Close()
		pending := journalPending(t, journalOpen(t, dir))
		mu.Lock()
		for id := range acked {
			if !handled[id] && !slices.Contains(pending, id) {
				t.Errorf("%s is lost", id)
			}
		}
		for id := range started {
			if !handled[id] && !unfinished[id] {
				t.Errorf("%s was cut off, and the observer was not told", id)
			}
		}
		mu.Unlock()
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
}

// Compaction goes on beside claims and their ends. The files stay within a small multiple of what is alive.
func TestJournalCompactsUnderLoad(t *testing.T) {
	const workers, size = 8, 10 << 10
	dir, each := t.TempDir(), journalCount(300, 3000)
	j := journalOpen(t, dir)
	var mu sync.Mutex
	alive, most := make(map[string]bool), int64(0)
	var working sync.WaitGroup
	for w := range workers {
		working.Go(func() {
			for i := range each {
				env := journalEvent(fmt.Sprintf("evt_%d_%d", w, i), i, size)
				if fresh, err := j.Claim(t.Context(), env); !fresh || err != nil {
					t.Errorf("Claim returned %v, %v", fresh, err)
				}
				if i%100 == 0 {
					mu.Lock()
					alive[env.EventID] = true
					most = max(most, journalSize(dir))
					mu.Unlock()
				} else if err := j.Done(t.Context(), env, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	working.Wait()
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	needed := int64(len(alive))*2*size + int64(workers*each)*100 + 4<<20
	t.Logf("%d bytes went through, %d are alive at most; the files took %d", workers*each*size, needed, most)
	if most > 3*needed {
		t.Errorf("the files took %d bytes, want at most %d", most, 3*needed)
	}
	j = journalOpen(t, dir)
	pending := journalPending(t, j)
	if len(pending) != len(alive) {
		t.Errorf("there are %d events, want %d", len(pending), len(alive))
	}
	for _, id := range pending {
		if !alive[id] {
			t.Errorf("%s came out again", id)
		}
	}
	for w := range workers {
		for i := range each {
			if fresh, err := j.Claim(t.Context(), &Envelope{EventID: fmt.Sprintf("evt_%d_%d", w, i)}); fresh || err != nil {
				t.Fatalf("a duplicate got %v, %v", fresh, err)
			}
		}
	}
}

// journalSize returns how many bytes the files in dir take.
func journalSize(dir string) (size int64) {
	entries, _ := os.ReadDir(dir)
	for _, entry := range entries {
		if info, err := entry.Info(); err == nil {
			size += info.Size()
		}
	}
	return size
}

// What the journal writes can be read by its documentation: payloads as they came, where a line can hold them.
func TestJournalFormat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		medium := newDisk()
		j := openOn(t, medium.process(), 0)
		expect := func(file *logFile, records ...string) {
			t.Helper()
			_, content := medium.newest(j.path(file.gen))
			want := ""
			for _, record := range records {
				want += journalSealed(record)
			}
			expectEqual(t, "written", string(content), want)
		}
		b := &Envelope{EventID: "b", Raw: []byte("{\n\"event_id\":\"b\"}")}
		for _, env := range []*Envelope{{EventID: "a\"é<", Raw: []byte(`{ "event_id":"a\"\u00e9<","data":[1.0,"<"]}`)}, b} {
			if fresh, err := j.Claim(t.Context(), env); !fresh || err != nil {
				t.Fatalf("claiming %q: %v, %v", env.EventID, fresh, err)
			}
		}
		time.Sleep(time.Second)
		if err := j.Done(t.Context(), b, nil); err != nil {
			t.Fatal(err)
		}
		a := `{"id":"a\"é\u003c","at":946684800000,"event":{ "event_id":"a\"\u00e9<","data":[1.0,"<"]}}`
		expect(j.last(), a, `{"id":"b","at":946684800000,"base64":"ewoiZXZlbnRfaWQiOiJiIn0="}`,
			`{"done":"b","at":946684801000}`)
		if err := journalCompact(j); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256([]byte("b"))
		expect(j.files[0], fmt.Sprintf(`{"sha256":"%x","at":946684801000}`, sum[:16]), a)
	})
}

// With 64 clients, a claim costs less than a tenth of an fsync.
func TestGroupCommit(t *testing.T) {
	const clients, each = 64, 50
	d := newDisk().process()
	j, err := openJournal(d, "journal", 0)
	if err != nil {
		t.Fatal(err)
	}
	before := strings.Count(strings.Join(d.steps, " "), "sync")
	d.onSync(func() { time.Sleep(time.Millisecond) }) // as long as a disk takes
	var claiming sync.WaitGroup
	for c := range clients {
		claiming.Go(func() {
			for i := range each {
				if fresh, err := j.Claim(t.Context(), journalEvent(fmt.Sprintf("evt_%d_%d", c, i), i, 0)); !fresh || err != nil {
					t.Errorf("Claim returned %v, %v", fresh, err)
				}
			}
		})
	}
	claiming.Wait()
	perClaim := float64(strings.Count(strings.Join(d.steps, " "), "sync")-before) / (clients * each)
	t.Logf("%.3f fsyncs for each claim", perClaim)
	if perClaim >= 0.1 {
		t.Errorf("a claim costs %.3f fsyncs, want less than 0.1", perClaim)
	}
	expectEqual(t, "bytes alive", j.live, j.size()) // no byte counts for two claims
	if err := j.Close(); err != nil {
		t.Error(err)
	}
}

// journalSealed returns the line that holds a record, by the documentation of the journal.
func journalSealed(record string) string {
	return fmt.Sprintf("%08x %s\n", crc32.Checksum([]byte(record), crc32.MakeTable(crc32.Castagnoli)), record)
}

// journalWrite writes a journal with so many finished ids and unfinished events, by its documentation.
func journalWrite(t testing.TB, dir string, finished, unfinished int) (path string) {
	t.Helper()
	var out bytes.Buffer
	line := func(format string, args ...any) { out.WriteString(journalSealed(fmt.Sprintf(format, args...))) }
	at := time.Now().UnixMilli()
	for i := 0; i < finished; {
		var sums []byte
		for ; i < finished && len(sums) < 16*1024; i++ {
			sum := sha256.Sum256(fmt.Appendf(nil, "evt_done_%d", i))
			sums = append(sums, sum[:16]...)
		}
		line(`{"sha256":"%x","at":%d}`, sums, at)
	}
	for i := range unfinished {
		env := journalEvent(fmt.Sprint("evt_", i), 0, 1000)
		line(`{"id":%q,"at":%d,"event":%s}`, env.EventID, at, env.Raw)
	}
	path = filepath.Join(dir, "events-00000002.log")
	if err := os.WriteFile(path, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// journalReadPlain reads a file as simply as can be, and returns its checksum and how long that took.
func journalReadPlain(t testing.TB, path string) (sum uint32, took time.Duration) {
	t.Helper()
	start := time.Now()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	table, buf := crc32.MakeTable(crc32.Castagnoli), make([]byte, 1<<18)
	for {
		n, err := file.Read(buf)
		sum = crc32.Update(sum, table, buf[:n])
		if err == io.EOF {
			return sum, time.Since(start)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// A journal with a million finished ids takes less than 64 bytes of memory for each.
func TestJournalMemoryPerID(t *testing.T) {
	finished, dir := journalCount(100_000, 1_000_000), t.TempDir()
	path := journalWrite(t, dir, finished, 1000)
	_, plain := journalReadPlain(t, path)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	start := time.Now()
	j := journalOpen(t, dir)
	took := time.Since(start)
	runtime.GC()
	runtime.ReadMemStats(&after)
	perID := (float64(after.HeapAlloc) - float64(before.HeapAlloc)) / float64(finished)
	t.Logf("opening %d finished ids and 1000 events took %v, %.1f times a plain read; %.1f bytes each",
		finished, took, float64(took)/float64(plain), perID)
	if perID >= 64 {
		t.Errorf("a finished id takes %.1f bytes, want less than 64", perID)
	}
	for i := 0; i < finished; i += 999 {
		if fresh, err := j.Claim(t.Context(), &Envelope{EventID: fmt.Sprint("evt_done_", i)}); fresh || err != nil {
			t.Fatalf("a finished id got %v, %v", fresh, err)
		}
	}
	if n := len(journalPending(t, j)); n != 1000 {
		t.Errorf("there are %d events, want 1000", n)
	}
}

// Opening a journal of a million finished ids, beside a plain read of its file with a checksum.
func BenchmarkOpenJournal(b *testing.B) {
	dir := b.TempDir()
	path := journalWrite(b, dir, 1_000_000, 1000)
	content, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	var plain, opening time.Duration
	for b.Loop() {
		b.StopTimer()
		fresh := b.TempDir()
		if err := os.WriteFile(filepath.Join(fresh, filepath.Base(path)), content, 0o600); err != nil {
			b.Fatal(err)
		}
		_, took := journalReadPlain(b, filepath.Join(fresh, filepath.Base(path)))
		plain += took
		b.StartTimer()
		start := time.Now()
		j, err := OpenJournal(fresh, 0)
		if err != nil {
			b.Fatal(err)
		}
		opening += time.Since(start)
		b.StopTimer()
		_ = j.Close()
		b.StartTimer()
	}
	b.SetBytes(int64(len(content)))
	b.ReportMetric(float64(opening)/float64(plain), "x-plain-read")
}

// Any bytes may be in the only file of a journal. It opens, hands out events that parse, and goes on.
func FuzzJournal(f *testing.F) {
	line := journalSealed
	claim := line(`{"id":"evt_1","at":1,"event":{"event_id":"evt_1"}}`)
	for _, seed := range []string{
		"", "\n", claim, claim[:20], claim[:len(claim)-1], claim + claim, "\x00\x00\n" + claim,
		claim + line(`{"done":"evt_1","at":2}`), line(`{"sha256":"00","at":1}`), line(`{"sha256":1}`), line(`{"sha256":""}`),
		line(`{"id":"evt_1","at":1,"base64":"IHsiZXZlbnRfaWQiOiJldnRfMSJ9"}`), line(`{"id":"evt_1","base64":"!"}`),
		line(`{"id":"evt_1","event":[]}`), line(`{"copied":""}`), line(`{"id":7}`), line(`{}`), line(``), line(`"`),
		line(`{"`), line(`{"sha256"0`),
	} {
		f.Add([]byte(seed), false)
		f.Add([]byte(seed), true)
	}
	f.Fuzz(func(t *testing.T, content []byte, sums bool) {
		if sums { // make the checksums right: fuzzing would not find them
			var right []byte
			for text := range bytes.Lines(content) {
				right = append(right, line(string(bytes.TrimSuffix(text[min(9, len(text)):], []byte("\n"))))...)
			}
			content = right
		}
		medium := diskWith(filepath.Join("journal", "events-00000001.log"), content)
		j, err := openJournal(medium.process(), "journal", 0)
		if err != nil {
			t.Fatal(err)
		}
		for env, err := range j.Pending(t.Context()) {
			if (env == nil) == (err == nil) {
				t.Fatalf("Pending yields %v, %v", env, err)
			}
		}
		env := journalEvent("evt_of_the_test", 1, 0)
		if fresh, err := j.Claim(t.Context(), env); !fresh && !bytes.Contains(content, []byte("evt_of_the_test")) {
			t.Fatalf("a new event got %v, %v", fresh, err)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		if j, err = openJournal(medium.process(), "journal", 0); err != nil {
			t.Fatal(err)
		}
		found := false
		for got := range j.Pending(t.Context()) {
			found = found || got != nil && got.EventID == env.EventID && bytes.Equal(got.Raw, env.Raw)
		}
		if !found && !bytes.Contains(content, []byte("evt_of_the_test")) {
			t.Fatal("the new event is lost")
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// Acknowledgments a second, side by side: of a receiver with each store and no HTTP, of one that writes and syncs each
// event by itself, and over HTTP beside a handler written by hand that keeps nothing.
func BenchmarkAcknowledge(b *testing.B) {
	ignore := journalCallbacks(func(context.Context, *Envelope) error { return nil })
	quiet := WithObserver(func(context.Context, Observation) {})
	memory := func(testing.TB) *Receiver { return Handler(ignore, quiet) }
	journal := func(t testing.TB) *Receiver { return Handler(ignore, quiet, WithInbox(journalOpen(t, t.TempDir()))) }
	naive := func(t testing.TB) *Receiver {
		file, err := os.Create(filepath.Join(t.TempDir(), "events"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = file.Close() })
		return Handler(ignore, quiet, WithDeduper(&journalNaive{file: file}))
	}
	for _, store := range []struct {
		name string
		open func(testing.TB) *Receiver
	}{{"Memory", memory}, {"Journal", journal}, {"Naive", naive}} {
		for _, clients := range []int{1, 8, 64} {
			b.Run(fmt.Sprintf("direct/%s/clients=%d", store.name, clients), func(b *testing.B) {
				r := store.open(b)
				journalMeasure(b, clients, func(body []byte) error {
					_, err := r.Deliver(context.Background(), body)
					return err
				})
				_ = r.Shutdown(context.Background())
			})
		}
	}
	byHand := func(testing.TB) http.Handler {
		i := slices.IndexFunc(contenders, func(c contender) bool { return c.name == "by-hand" })
		h, _ := contenders[i].make(func(*CaseCompleted) {})
		return h
	}
	for _, handler := range []struct {
		name string
		open func(testing.TB) http.Handler
	}{
		{"ByHand", byHand},
		{"Memory", func(t testing.TB) http.Handler { return memory(t) }},
		{"Journal", func(t testing.TB) http.Handler { return journal(t) }},
		{"Naive", func(t testing.TB) http.Handler { return naive(t) }},
	} {
		b.Run(fmt.Sprintf("http/%s/clients=64", handler.name), func(b *testing.B) {
			h := handler.open(b)
			server := httptest.NewServer(h)
			defer server.Close()
			client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
			defer client.CloseIdleConnections()
			journalMeasure(b, 64, func(body []byte) error {
				answer, err := client.Post(server.URL, "application/json", bytes.NewReader(body))
				if err != nil {
					return err
				}
				_ = answer.Body.Close() // a 202 has none
				if answer.StatusCode != http.StatusAccepted {
					return errors.New(answer.Status)
				}
				return nil
			})
			if r, ok := h.(*Receiver); ok {
				_ = r.Shutdown(context.Background())
			}
		})
	}
}

// journalMeasure makes so many clients send b.N events in all, and reports how many were acknowledged a second.
func journalMeasure(b *testing.B, clients int, send func(body []byte) error) {
	b.Helper()
	var next atomic.Int64
	var sending sync.WaitGroup
	b.ResetTimer()
	for range clients {
		sending.Go(func() {
			event := newBenchBody(b)
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				event.number(uint64(i))
				if err := send(event.body); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	sending.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "acks/s")
}

// journalNaive writes each event to a file and syncs that, one after the other.
type journalNaive struct {
	Memory
	mu   sync.Mutex // protects file
	file *os.File
}

func (n *journalNaive) Claim(ctx context.Context, env *Envelope) (fresh bool, err error) {
	if fresh, err = n.Memory.Claim(ctx, env); !fresh || err != nil {
		return fresh, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, err := n.file.Write(env.Raw); err != nil {
		return false, err
	}
	return true, n.file.Sync()
}

// A receiver with a journal under all kinds of deliveries, with callbacks that fail and panic, started anew again and
// again: half an hour in full. Memory, goroutines and files stay as they are, and what was acknowledged is handled.
func TestRow23MixedLoad(t *testing.T) {
	length, lifetime := 4*time.Second, time.Second
	if journalFull {
		length, lifetime = 30*time.Minute, 15*time.Second
	}
	dir := t.TempDir()
	var mu sync.Mutex // protects what follows
	lives, owed, tried := 0, make(map[string]bool), make(map[string]int)
	told := make(map[Outcome]int)
	callback := func(env *Envelope) error {
		n, _ := strconv.Atoi(strings.TrimPrefix(env.EventID, "evt_"))
		mu.Lock()
		defer mu.Unlock()
		life, again := tried[env.EventID]
		if !again {
			tried[env.EventID] = lives
		}
		switch {
		case n%16 == 0 && !again:
			return errors.New("not at first")
		case n%16 == 1 && !again:
			panic("not at first")
		case n%64 == 2 && (!again || life == lives):
			return errors.New("not before the next start")
		}
		delete(tried, env.EventID)
		delete(owed, env.EventID)
		return nil
	}
	var current atomic.Pointer[Receiver]
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		current.Load().ServeHTTP(w, req)
	}))
	defer server.Close()
	start := func() (stop func()) {
		j, err := OpenJournal(dir, length/20)
		if err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		lives++
		mu.Unlock()
		r := Handler(journalCallbacks(func(_ context.Context, env *Envelope) error { return callback(env) }), WithInbox(j),
			WithRetry(3, 10*time.Millisecond), WithBacklog(64), WithObserver(func(_ context.Context, o Observation) {
				mu.Lock()
				defer mu.Unlock()
				told[o.Outcome]++
			}))
		current.Store(r)
		return func() { _, _ = r.Shutdown(context.Background()), j.Close() }
	}
	stop := start()

	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4}}
	end := time.Now().Add(length)
	post := func(body string) bool {
		answer, err := client.Post(server.URL, "application/json", strings.NewReader(body))
		if err != nil {
			t.Error(err)
			return false
		}
		_, _ = io.Copy(io.Discard, answer.Body)
		_ = answer.Body.Close()
		return answer.StatusCode/100 == 2
	}
	var next atomic.Int64
	var sending sync.WaitGroup
	for range 4 {
		sending.Go(func() {
			for time.Now().Before(end) && !t.Failed() {
				n := int(next.Add(1))
				id := fmt.Sprint("evt_", n)
				body := string(eventBody(id, fmt.Sprint("case_", n%50)))
				if n%8 == 3 {
					body = strings.Replace(body, `"case.completed"`, `"case.reopened"`, 1)
				}
				mu.Lock()
				owed[id] = true
				mu.Unlock()
				if !post(body) {
					mu.Lock()
					delete(owed, id)
					mu.Unlock()
				} else if n%4 == 0 {
					_ = post(body) // it may be refused, by a receiver that ends
				}
				if n%32 == 0 && post(`{"event_id":`) {
					t.Error("half a body was acknowledged")
				}
				time.Sleep(5 * time.Millisecond) // a rate, of several hundred a second
			}
		})
	}
	var heaps, goroutines, files []float64
	sample := time.NewTicker(max(length/200, 50*time.Millisecond))
	defer sample.Stop()
	for restart := time.Now().Add(lifetime); time.Now().Before(end); {
		<-sample.C
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		heaps, goroutines = append(heaps, float64(m.HeapAlloc)/(1<<20)), append(goroutines, float64(runtime.NumGoroutine()))
		if open, err := os.ReadDir("/proc/self/fd"); err == nil {
			files = append(files, float64(len(open)))
		}
		if time.Now().After(restart) {
			stop()
			stop = start()
			restart = time.Now().Add(lifetime)
		}
	}
	sending.Wait()
	stop()
	stop = start() // what waits for the next start
	journalWait(t, "what was acknowledged to be handled", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(owed) == 0
	})
	stop()
	for _, flat := range []struct {
		name    string
		samples []float64
		slack   float64
	}{{"MiB of heap", heaps, 4}, {"goroutines", goroutines, 12}, {"files", files, 6}} {
		quarter := len(flat.samples) / 4
		if quarter == 0 {
			continue // no /proc
		}
		median := func(of []float64) float64 { return slices.Sorted(slices.Values(of))[len(of)/2] }
		first, last := median(flat.samples[:quarter]), median(flat.samples[len(flat.samples)-quarter:])
		t.Logf("%s: median %.1f in the first quarter, %.1f in the last", flat.name, first, last)
		if last > first*1.2+flat.slack {
			t.Errorf("%s grow", flat.name)
		}
	}
	t.Logf("%d events in %d lives: %v", next.Load(), lives, told)
	for _, want := range []Outcome{Accepted, Duplicate, Refused, Handled, Retrying, GaveUp} {
		if told[want] == 0 {
			t.Errorf("nothing was %s", want)
		}
	}
}

// modelDisk is the disk under FuzzPromises: what a kill -9 leaves is what was written, what a power loss leaves is what
// was synced. Every process has a view of its own, which dies with it.
type modelDisk struct {
	mu             sync.Mutex
	names, durable map[string]*modelFile
}

type modelFile struct{ data, synced []byte }

type modelView struct {
	*modelDisk
	dead              bool
	failSync, failAll bool // the next fsync; every write
}

type modelHandle struct {
	view *modelView
	path string
	file *modelFile
}

func (d *modelDisk) losePower() {
	d.names = maps.Clone(d.durable)
	for _, f := range d.names {
		f.data = bytes.Clone(f.synced)
	}
}

func (v *modelView) check(op, path string) error {
	if v.dead {
		return &fs.PathError{Op: op, Path: path, Err: os.ErrClosed}
	}
	return nil
}

func (v *modelView) mkdir(string) error { return v.check("mkdir", "") }

func (v *modelView) list(dir string) (entries []fs.DirEntry, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for path := range v.names {
		entries = append(entries, diskEntry{name: filepath.Base(path)})
	}
	return entries, v.check("readdir", dir)
}

func (v *modelView) holds(path string, file diskFile) (bool, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	err := v.check("stat", path)
	if err == nil && v.names[path] == nil {
		err = &fs.PathError{Op: "stat", Path: path, Err: fs.ErrNotExist}
	}
	return err == nil && v.names[path] == file.(*modelHandle).file, err
}

func (v *modelView) open(path string, flag int) (diskFile, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	file := v.names[path]
	switch {
	case v.dead:
		return nil, v.check("open", path)
	case file == nil && flag&os.O_CREATE == 0:
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	case file != nil && flag&os.O_EXCL != 0:
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrExist}
	case file == nil:
		file = new(modelFile)
		v.names[path] = file
	}
	return &modelHandle{v, path, file}, nil
}

func (v *modelView) rename(from, to string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.dead {
		return v.check("rename", from)
	}
	v.names[to] = v.names[from]
	delete(v.names, from)
	return nil
}

func (v *modelView) remove(path string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.dead {
		return v.check("remove", path)
	}
	delete(v.names, path)
	return nil
}

func (v *modelView) syncDir(dir string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.dead {
		return v.check("sync", dir)
	}
	v.durable = maps.Clone(v.names)
	return nil
}

func (h *modelHandle) ReadAt(b []byte, off int64) (int, error) {
	h.view.mu.Lock()
	defer h.view.mu.Unlock()
	if h.view.dead {
		return 0, h.view.check("read", h.path)
	}
	if off >= int64(len(h.file.data)) {
		return 0, io.EOF
	}
	n := copy(b, h.file.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (h *modelHandle) WriteAt(b []byte, off int64) (int, error) {
	h.view.mu.Lock()
	defer h.view.mu.Unlock()
	if h.view.dead {
		return 0, h.view.check("write", h.path)
	}
	err := error(nil)
	if h.view.failAll && len(b) > 0 {
		b, err = b[:len(b)/2], &fs.PathError{Op: "write", Path: h.path, Err: errors.New("no space left on device")}
	}
	if need := off + int64(len(b)); need > int64(len(h.file.data)) {
		h.file.data = append(h.file.data, make([]byte, need-int64(len(h.file.data)))...)
	}
	return copy(h.file.data[off:], b), err
}

func (h *modelHandle) Truncate(size int64) error {
	h.view.mu.Lock()
	defer h.view.mu.Unlock()
	if h.view.dead {
		return h.view.check("truncate", h.path)
	}
	h.file.data = h.file.data[:min(size, int64(len(h.file.data)))]
	return nil
}

func (h *modelHandle) Sync() error {
	h.view.mu.Lock()
	defer h.view.mu.Unlock()
	if h.view.dead {
		return h.view.check("sync", h.path)
	}
	if h.view.failSync {
		h.view.failSync = false
		return &fs.PathError{Op: "sync", Path: h.path, Err: errors.New("input/output error")}
	}
	h.file.synced = bytes.Clone(h.file.data)
	return nil
}

func (h *modelHandle) Close() error { return nil }

// promiseModel is what FuzzPromises knows of each event, and what it holds the receiver to.
type promiseModel struct {
	mu     sync.Mutex // held by callbacks while they look around
	t      *testing.T
	disk   *modelDisk
	node   *promiseNode
	events []*promiseEvent
	ids    map[string]*promiseEvent
	acks   int
	trace  []string
}

type promiseEvent struct {
	body     []byte
	id, kase string
	acked    int  // when, in the order of acknowledgments; 0 if it was not
	returned bool // its callback has returned nil
	recorded bool // and Done has recorded that
	gaveUp   bool // it has lost its place
	refused  bool // once; a crash may have kept it all the same, in the place of that delivery
	running  *promiseNode
}

// promiseNode is one process: a journal, a receiver, and the callbacks that run in it.
type promiseNode struct {
	model    *promiseModel
	view     *modelView
	journal  *Journal
	receiver *Receiver
	running  []*promiseRun
	seen     map[Outcome]int
	free     bool // callbacks return nil at once
}

type promiseRun struct {
	event *promiseEvent
	end   chan func() error
}

// promiseInbox sees what is recorded.
type promiseInbox struct {
	*Journal
	node *promiseNode
}

func (in promiseInbox) Pending(ctx context.Context) iter.Seq2[*Envelope, error] {
	return in.Journal.Pending(ctx)
}

func (in promiseInbox) Done(ctx context.Context, env *Envelope, result error) error {
	err := in.Journal.Done(ctx, env, result)
	in.node.model.mu.Lock()
	defer in.node.model.mu.Unlock()
	if e := in.node.model.ids[env.EventID]; e != nil && err == nil && !in.node.view.dead {
		if result == nil {
			e.recorded = true
		} else {
			e.gaveUp = true
		}
	}
	return err
}

func (m *promiseModel) fatalf(format string, args ...any) {
	m.t.Helper()
	m.t.Fatalf("%s\nschedule: %v", fmt.Sprintf(format, args...), m.trace)
}

func (m *promiseModel) start(free bool) {
	n := &promiseNode{model: m, free: free, view: &modelView{modelDisk: m.disk}, seen: make(map[Outcome]int)}
	m.node = n
	var err error
	if n.journal, err = openJournal(n.view, "/journal", 0); err != nil {
		m.fatalf("open: %v", err)
	}
	n.receiver = Handler(Callbacks{Other: n.callback}, WithInbox(promiseInbox{n.journal, n}), WithConcurrency(2), WithBacklog(3),
		WithRetry(2, time.Second), WithObserver(func(_ context.Context, o Observation) {
			m.mu.Lock()
			defer m.mu.Unlock()
			n.seen[o.Outcome]++
		}))
	synctest.Wait()
}

// callback runs an event, and holds promises 3 and 5 against the model when it starts.
func (n *promiseNode) callback(ctx context.Context, env *Envelope) error {
	run, err := n.begin(env)
	if run == nil {
		return err
	}
	return (<-run.end)()
}

// begin holds a callback against the model as it starts. The run is nil if it also ends.
func (n *promiseNode) begin(env *Envelope) (*promiseRun, error) {
	m, e := n.model, n.model.ids[env.EventID]
	m.mu.Lock()
	defer m.mu.Unlock()
	if n.view.dead {
		return nil, errors.New("dead")
	}
	if e == nil && strings.HasPrefix(env.EventID, "late-") {
		return nil, nil // one that had lost the journal wrote it, and refused it
	}
	switch {
	case !bytes.Equal(env.Raw, e.body):
		m.fatalf("%s: the bytes differ: %s", e.id, env.Raw)
	case e.recorded:
		m.fatalf("%s runs again after it was recorded", e.id)
	case e.running == n:
		m.fatalf("%s runs twice at once", e.id)
	}
	for _, f := range m.events {
		if f == e || f.kase != e.kase {
			continue
		}
		if f.running == n {
			m.fatalf("%s and %s run at once", f.id, e.id)
		}
		if f.acked > 0 && f.acked < e.acked && !f.returned && !f.gaveUp && !e.gaveUp && !e.refused {
			m.fatalf("%s overtakes %s", e.id, f.id)
		}
	}
	if n.free {
		e.returned = true
		return nil, nil
	}
	run := &promiseRun{e, make(chan func() error)}
	n.running = append(n.running, run)
	e.running = n
	return run, nil
}

// end lets a running callback return, if there is one.
func (n *promiseNode) end(i int, f func(e *promiseEvent) error) bool {
	n.model.mu.Lock()
	if len(n.running) == 0 {
		n.model.mu.Unlock()
		return false
	}
	i %= len(n.running)
	run := n.running[i]
	n.running = slices.Delete(n.running, i, i+1)
	if run.event.running == n {
		run.event.running = nil
	}
	n.model.mu.Unlock()
	run.end <- func() error { return f(run.event) }
	synctest.Wait()
	return true
}

// stop ends the process, as a kill does: nothing it still does counts, and nothing it writes lasts.
func (n *promiseNode) stop() {
	n.view.mu.Lock()
	n.view.dead = true
	n.view.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = n.receiver.Shutdown(ctx)
	synctest.Wait()
	for n.end(0, func(*promiseEvent) error { return errors.New("killed") }) {
	}
	_ = n.journal.Close()
	synctest.Wait()
}

func (m *promiseModel) deliver(e *promiseEvent) {
	n := m.node
	answers := func() int { return n.seen[Accepted] + n.seen[Duplicate] + n.seen[Refused] }
	before := answers()
	fresh, err := n.receiver.Deliver(context.Background(), e.body)
	synctest.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	if answers() != before+1 {
		m.fatalf("%s: the delivery was not observed", e.id)
	}
	switch {
	case err != nil:
		e.refused = true
	case e.acked == 0 && (fresh || e.refused):
		m.acks++
		e.acked = m.acks
	case fresh && e.recorded:
		m.fatalf("%s is fresh after it was recorded", e.id)
	case e.acked == 0:
		m.fatalf("%s is a duplicate that was never taken", e.id)
	}
}

func (m *promiseModel) step(op, arg byte) {
	n := m.node
	m.trace = append(m.trace, fmt.Sprintf("%d/%d", op%12, arg))
	switch op % 12 {
	case 0, 1, 2: // a new event
		e := &promiseEvent{id: fmt.Sprintf("evt-%d", len(m.events)), kase: fmt.Sprintf("case-%d", arg%3)}
		e.body = fmt.Appendf(nil, `{"event_id":%q,"data":{"caseId":%q}}`, e.id, e.kase)
		if arg&8 != 0 {
			e.body = append(e.body, '\n')
		}
		m.mu.Lock()
		m.events = append(m.events, e)
		m.ids[e.id] = e
		m.mu.Unlock()
		m.deliver(e)
	case 3: // a duplicate
		if len(m.events) > 0 {
			m.deliver(m.events[int(arg)%len(m.events)])
		}
	case 4, 5: // a callback returns nil
		n.end(int(arg), func(e *promiseEvent) error { e.returned = true; return nil })
	case 6: // one fails, or panics
		n.end(int(arg), func(*promiseEvent) error {
			if arg&1 != 0 {
				panic("callback")
			}
			return errors.New("callback")
		})
	case 7: // time passes: a retry, a sweep, the rest of what was given up
		time.Sleep([]time.Duration{time.Second, 11 * time.Second, 11 * time.Minute}[arg%3])
		synctest.Wait()
	case 8: // kill -9
		n.stop()
		m.start(false)
	case 9: // power loss; Done waits for no fsync, so what it recorded may be forgotten
		m.disk.mu.Lock()
		n.view.dead = true
		m.disk.losePower()
		m.disk.mu.Unlock()
		n.stop()
		m.mu.Lock()
		for _, e := range m.events {
			e.recorded = false
		}
		m.mu.Unlock()
		m.start(false)
	case 10: // another process takes over, and this one may notice only when it is used
		old := m.node
		m.start(false)
		if arg&1 != 0 && len(m.events) > 0 {
			late := fmt.Appendf(nil, `{"event_id":"late-%d"}`, len(m.trace))
			if _, err := old.receiver.Deliver(context.Background(), late); err == nil {
				m.fatalf("the one that lost the journal acknowledged an event")
			}
		}
		old.stop()
	case 11: // the disk fails
		m.disk.mu.Lock()
		n.view.failSync, n.view.failAll = arg&1 != 0, arg&2 != 0
		m.disk.mu.Unlock()
	}
	synctest.Wait()
}

// check lets everything run, and holds promises 1, 4 and 6 against the model.
func (m *promiseModel) check() {
	m.node.stop()
	m.start(true)
	time.Sleep(time.Minute)
	synctest.Wait()
	for _, e := range m.events {
		if e.acked > 0 && !e.returned {
			m.fatalf("%s was acknowledged and is lost", e.id)
		}
	}
	if err := m.node.receiver.Shutdown(context.Background()); err != nil {
		m.fatalf("shutdown: %v", err)
	}
	if n := len(m.node.journal.claims); n > 0 {
		m.fatalf("%d claims are left", n)
	}
	if err := m.node.journal.Close(); err != nil {
		m.fatalf("close: %v", err)
	}
}

// promiseSchedule runs a schedule of deliveries, duplicates, returns, failures, sweeps, crashes and takeovers, and holds
// the promises of the package against a small model.
func promiseSchedule(t *testing.T, schedule []byte) {
	synctest.Test(t, func(t *testing.T) {
		m := &promiseModel{t: t, ids: make(map[string]*promiseEvent)}
		m.disk = &modelDisk{names: make(map[string]*modelFile), durable: make(map[string]*modelFile)}
		m.start(false)
		for i := 0; i+1 < min(len(schedule), 120); i += 2 {
			m.step(schedule[i], schedule[i+1])
		}
		m.check()
	})
}

func FuzzPromises(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 4, 0, 8, 0, 3, 0, 4, 0})
	f.Add([]byte{0, 0, 6, 0, 7, 0, 6, 0, 3, 0, 9, 0, 0, 1, 10, 1, 4, 0})
	f.Add([]byte{0, 0, 0, 1, 0, 2, 0, 0, 0, 1, 0, 2, 0, 0, 11, 1, 0, 1, 4, 0, 4, 0, 7, 1, 4, 1, 10, 0, 4, 0, 3, 4})
	f.Add([]byte{0, 0, 11, 2, 4, 0, 0, 1, 11, 0, 7, 0, 7, 1, 3, 0, 8, 0, 11, 1, 4, 0, 0, 0, 7, 1, 9, 0})
	f.Fuzz(promiseSchedule)
}

// TestRow24Promises runs schedules drawn at random, which is quicker than fuzzing: OFFLOADHOOK_FULL=1 runs a million.
func TestRow24Promises(t *testing.T) {
	count := 500
	if os.Getenv("OFFLOADHOOK_FULL") != "" {
		count = 1_000_000
	}
	shards := runtime.GOMAXPROCS(0)
	for shard := range shards {
		t.Run(fmt.Sprint(shard), func(t *testing.T) {
			t.Parallel()
			for seed := shard; seed < count; seed += shards {
				random := rand.New(rand.NewPCG(uint64(seed), 24))
				schedule := make([]byte, 2*(1+random.IntN(40)))
				for i := range schedule {
					schedule[i] = byte(random.Uint32())
				}
				if promiseSchedule(t, schedule); t.Failed() {
					t.Fatalf("seed %d: %v", seed, schedule)
				}
			}
		})
	}
}

// An fsync fails while claims are in line for the next one. All of them are refused, and the journal goes on.
func TestRow07FsyncFailsWithQueue(t *testing.T) {
	for _, waiting := range []int{1, 3} {
		t.Run(fmt.Sprint(waiting), func(t *testing.T) {
			d := newDisk().process()
			j, err := openJournal(d, "journal", 0)
			if err != nil {
				t.Fatal(err)
			}
			begun, goOn := make(chan bool), make(chan bool)
			d.onSync(func() {
				begun <- true
				<-goOn
				d.mu.Lock()
				defer d.mu.Unlock()
				d.fault = diskFault{from: d.ops + 1, span: 1}
			})
			answers := make(chan error, waiting+1)
			claim := func(i int) {
				_, err := j.Claim(context.Background(), journalEvent(fmt.Sprint("evt_", i), i, 0))
				answers <- err
			}
			go claim(0)
			<-begun
			for i := range waiting {
				go claim(1 + i)
			}
			journalWait(t, "the others to be in line", func() bool {
				j.mu.Lock()
				defer j.mu.Unlock()
				return j.group != nil && len(j.group.claims) == waiting
			})
			d.hook = nil
			close(goOn)
			journalWait(t, "every claim to be answered", func() bool { return len(answers) == waiting+1 })
			for range waiting + 1 {
				if err := <-answers; !errors.Is(err, errDisk) {
					t.Errorf("a claim got %v, want %v", err, errDisk)
				}
			}
			m := newJournalModel(t)
			m.expectPending(j, false, false)
			for i := range waiting + 1 {
				if id := fmt.Sprint("evt_", i); !m.claim(j, journalEvent(id, i, 0)) {
					t.Errorf("%s is refused although the disk works again", id)
				}
			}
			m.expectPending(j, false, false)
			if err := j.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A journal is opened while another process that uses it is ending a compaction, which then fails.
func TestRow09TakeoverDuringCompaction(t *testing.T) {
	for _, test := range []struct {
		name  string
		sync  int // of the compaction, during which the other reads
		fault diskFault
	}{
		{name: "before the copy is whole", sync: 1},
		{name: "when its fsync fails", sync: 1, fault: diskFault{from: 1, span: 1 << 30, only: "sync"}},
	} {
		inBubble(t, test.name, func(t *testing.T) {
			medium, m := newDisk(), newJournalModel(t)
			slow, fast := medium.process(), medium.process()
			loser, err := openJournal(slow, "journal", 0)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 3 {
				m.claim(loser, journalEvent(fmt.Sprint("evt_", i), i, 0))
			}
			goOn, done := make(chan bool), make(chan error, 1)
			syncs := 0
			slow.onSync(func() {
				if syncs++; syncs != test.sync {
					return
				}
				<-goOn
				medium.mu.Lock()
				defer medium.mu.Unlock()
				slow.fault = test.fault
			})
			go func() { done <- journalCompact(loser) }()
			synctest.Wait()
			fast.onSync(func() { // it has read the file
				fast.hook = nil
				close(goOn)
				if err := <-done; err == nil {
					t.Error("the compaction succeeded in the end")
				}
			})
			winner, err := openJournal(fast, "journal", 0)
			if err != nil {
				t.Fatal(err)
			}
			if errs := m.expectPending(winner, true, false); len(errs) > 0 {
				t.Error(errs)
			}
			expectEqual(t, "fsyncs of the compaction", syncs, test.sync)
		})
	}
}

// A compaction fails, at every step; what is acknowledged after it outlasts the death of the process, and a power loss.
func TestRow09CompactionFailsThenPowerLoss(t *testing.T) {
	fails := func(step int, powerLoss bool) bool {
		medium, m := newDisk(), newJournalModel(t)
		d := medium.process()
		j, err := openJournal(d, "journal", 0)
		if err != nil {
			t.Fatal(err)
		}
		m.claim(j, journalEvent("evt_1", 0, 0))
		before := len(d.steps)
		d.fault = diskFault{from: before + step, span: 1}
		_ = journalCompact(j)
		d.heal()
		if !m.claim(j, journalEvent("evt_2", 1, 0)) {
			t.Error("nothing is acknowledged although the disk works again")
		}
		d.die()
		if powerLoss {
			medium.losePower(rand.New(rand.NewPCG(1, 1)), 0)
		}
		if j, err = openJournal(medium.process(), "journal", 0); err != nil {
			t.Fatal(err)
		}
		m.expectPending(j, true, false)
		if t.Failed() {
			t.Fatalf("step %d of %q, power loss %v", step, d.steps[before:], powerLoss)
		}
		return d.struck > 0
	}
	for _, powerLoss := range []bool{false, true} {
		step := 1
		for fails(step, powerLoss) {
			step++
		}
		if step < 10 {
			t.Errorf("a compaction took %d steps", step-1)
		}
	}
}

// An id comes again after its retention and is handled again. From then on it is remembered anew, over a restart too.
func TestRow12RetentionAndRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		medium, env := newDisk(), journalEvent("evt_1", 0, 0)
		open := func() *Journal {
			j, err := openJournal(medium.process(), "journal", time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			return j
		}
		expect := func(j *Journal, want bool) {
			t.Helper()
			if fresh, err := j.Claim(t.Context(), env); fresh != want || err != nil {
				t.Errorf("Claim = %v, %v, want %v, nil", fresh, err, want)
			}
		}
		j := open()
		for range 2 {
			time.Sleep(2 * time.Hour)
			expect(j, true)
			if err := j.Done(t.Context(), env, nil); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(59 * time.Minute)
		expect(j, false)
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		j = open()
		expect(j, false)
		time.Sleep(time.Minute)
		expect(j, true)
	})
}

// A callback has failed, and Shutdown comes before its next attempt is planned: the inbox keeps the event.
func TestShutdownBetweenAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in, goOn := new(fakeInbox), make(chan bool)
		r := newRig(t, func(context.Context, *Envelope) error { return errTest },
			WithInbox(in), WithRetry(3, time.Hour), WithObserver(func(_ context.Context, o Observation) {
				if o.Outcome == Retrying {
					<-goOn
				}
			}))
		synctest.Wait()
		r.deliver(t, "evt_1", "case_1")
		synctest.Wait()
		start, done := time.Now(), make(chan error)
		go func() { done <- r.Shutdown(context.Background()) }()
		synctest.Wait()
		close(goOn)
		if err := <-done; err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		expectEqual(t, "took", time.Since(start), 0)
		expectList(t, "called", r.called(), "evt_1")
		expectList(t, "in the store", in.pending(), "evt_1")
	})
}

// The inbox hangs while it is read, which may not keep Shutdown longer than its context.
func TestShutdownWhilePendingHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := &fakeInbox{onPending: func(int) error { time.Sleep(time.Hour); return nil }}
		r := newRig(t, nil, WithInbox(in))
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if err := r.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown: %v", err)
		}
		expectEqual(t, "took", time.Since(start), time.Second)
		time.Sleep(time.Hour)
		synctest.Wait()
		expectEqual(t, "goroutines left", ourGoroutines(), 0)
	})
}

// A store's error is for the observer: the sender is told that the store failed, whatever the error wraps.
func TestStoreErrorStaysInside(t *testing.T) {
	const secret = "db at 10.0.0.7"
	fail := func(context.Context, *Envelope) error { return fmt.Errorf("%s: %w", secret, ErrMalformed) }
	for name, opts := range map[string][]Option{
		"deduper": {WithDeduper(&spyStore{onClaim: fail}), WithFailClosed()},
		"inbox":   {WithInbox(&fakeInbox{onClaim: fail})},
	} {
		inBubble(t, name, func(t *testing.T) {
			r := newRig(t, nil, opts...)
			synctest.Wait()
			w := httptest.NewRecorder()
			r.ServeHTTP(w, httptest.NewRequest("POST", "/", bytes.NewReader(eventBody("evt_1", "case_1"))))
			expectEqual(t, "status", w.Code, http.StatusServiceUnavailable)
			expectEqual(t, "answer", strings.TrimSpace(w.Body.String()), "offloadhook: the store failed")
			told := r.observations("evt_1")
			if len(told) == 0 || told[0].Outcome != StoreFailed || !strings.Contains(told[0].Err.Error(), secret) {
				t.Errorf("the observer was told %v, want the error", told)
			}
		})
	}
}

// OpenJournal fails, at every step, and leaves no file open.
func TestOpenJournalLeaksNoFile(t *testing.T) {
	failures := 0
	for step := 1; ; step++ {
		medium := newDisk()
		journalLife(newJournalModel(t), medium.process(), "a", false)
		d := medium.process()
		d.fault = diskFault{from: step, span: 1}
		j, err := openJournal(d, "journal", 0)
		if err == nil {
			_ = j.Close()
		} else {
			failures++
		}
		open := 0
		for i, s := range d.steps {
			switch {
			case s == "close":
				open++
			case (s == "open" || s == "create") && i+1 != step:
				open--
			}
		}
		if open < 0 { // to close one twice is an error, and nothing worse
			t.Errorf("step %d: %d more files opened than closed: %q", step, -open, d.steps)
		}
		if d.struck == 0 {
			break
		}
	}
	if failures < 8 {
		t.Errorf("the opening failed %d times", failures)
	}
}

func diskNames(m *diskMedium) (names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n, node := range m.names {
		names = append(names, fmt.Sprintf("%s:%d", n[len("journal/"):], len(node.now)))
	}
	slices.Sort(names)
	return names
}

// journalClaimed claims an event that is new.
func journalClaimed(t testing.TB, j *Journal, id string) *Envelope {
	t.Helper()
	env := journalEvent(id, 0, 0)
	if fresh, err := j.Claim(t.Context(), env); !fresh || err != nil {
		t.Fatalf("claiming %s: %v, %v", id, fresh, err)
	}
	return env
}

// journalCompact compacts j, whether or not there is garbage.
func journalCompact(j *Journal) error {
	j.renewal.Lock()
	defer j.renewal.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.renew()
}

// journalAtRename returns when an owner with one event, evt_a, is about to give its copy the name. resume lets it.
func journalAtRename(t testing.TB, medium *diskMedium) (resume func()) {
	t.Helper()
	d := medium.process()
	a := openOn(t, d, 0)
	journalClaimed(t, a, "evt_a")
	atRename, goOn, done := make(chan bool), make(chan bool), make(chan error, 1)
	d.hook = func(op, path string) error {
		if op == "rename" {
			close(atRename)
			<-goOn
		}
		return nil
	}
	go func() { done <- journalCompact(a) }()
	<-atRename
	return func() {
		close(goOn)
		if err := <-done; err != nil {
			t.Error("the owner's compaction:", err)
		}
	}
}

// journalExpectDone closes j, opens it anew, and expects that an event which was done is not handed out.
func journalExpectDone(t testing.TB, j *Journal, medium *diskMedium, id string) {
	t.Helper()
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	j = openOn(t, medium.process(), j.retention)
	if ids := journalPending(t, j); slices.Contains(ids, id) {
		t.Errorf("%s was done before a clean Close, and is handed out again: %q", id, ids)
	}
}

func openOn(t testing.TB, d disk, retention time.Duration) *Journal {
	t.Helper()
	j, err := openJournal(d, "journal", retention)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// An owner stands still before it makes its next files, while another opens the journal. Neither overwrites the other.
func TestRow17OwnerStandsStill(t *testing.T) {
	medium := newDisk()
	da := medium.process()
	a := openOn(t, da, 0)
	journalClaimed(t, a, "evt_a")
	var b *Journal
	da.hook = func(op, path string) error {
		if op == "create" && b == nil { // SIGSTOP of a here
			b = openOn(t, medium.process(), 0)
			journalClaimed(t, b, "evt_b")
		}
		return nil
	}
	_ = journalCompact(a)
	c := openOn(t, medium.process(), 0)
	if ids := journalPending(t, c); !slices.Contains(ids, "evt_b") || !slices.Contains(ids, "evt_a") {
		t.Errorf("acknowledged evt_a, evt_b; kept %q", ids)
	}
}

// An opener has read the directory just before the owner compacts.
func TestRow17OpenerBesideCompaction(t *testing.T) {
	medium := newDisk()
	da, db := medium.process(), medium.process()
	a := openOn(t, da, 0)
	for i := range 3 {
		journalClaimed(t, a, fmt.Sprint("evt_", i))
	}
	atTemp, goOn, done := make(chan bool), make(chan bool), make(chan error, 1)
	da.hook = func(op, path string) error {
		if op == "create" && strings.HasSuffix(path, ".tmp") {
			close(atTemp)
			<-goOn
		}
		return nil
	}
	created, synced := false, false
	db.hook = func(op, path string) error {
		if op == "create" && !created { // it has listed the directory
			created = true
			go func() { done <- journalCompact(a) }()
			<-atTemp
		}
		if op == "sync" && !synced { // it has read the first file
			synced = true
			close(goOn)
			<-done
		}
		return nil
	}
	if _, err := openJournal(db, "journal", 0); err != nil {
		t.Error(err)
	}
	if _, err := a.Claim(t.Context(), journalEvent("evt_3", 0, 0)); !errors.Is(err, ErrClosed) {
		t.Errorf("the earlier owner got %v, want ErrClosed", err)
	}
	c := openOn(t, medium.process(), 0)
	if ids := journalPending(t, c); len(ids) < 3 {
		t.Errorf("3 acknowledged; kept %q", ids)
	}
}

// Close ends every claim that is under way.
func TestJournalClosedBesideClaims(t *testing.T) {
	for range 400 {
		j := openOn(t, newDisk().process(), 0)
		var wg sync.WaitGroup
		var claimed atomic.Int32
		for g := range 8 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer func() {
					if v := recover(); v != nil {
						t.Error("panic:", v)
					}
				}()
				for i := range 50 {
					if _, err := j.Claim(context.Background(), journalEvent(fmt.Sprint(g, "_", i), 0, 0)); err != nil {
						return
					}
					claimed.Add(1)
				}
			}()
		}
		for claimed.Load() < 20 {
			runtime.Gosched()
		}
		_ = j.Close()
		end := make(chan bool)
		go func() { wg.Wait(); close(end) }()
		select {
		case <-end:
		case <-time.After(5 * time.Second):
			t.Fatal("a claim hangs after Close")
		}
		if t.Failed() {
			return
		}
	}
}

// Close while claims wait to go on in a new file.
func TestJournalClosedBesideRenewal(t *testing.T) {
	for range 400 {
		d := newDisk().process()
		j := openOn(t, d, 0)
		d.failWhere(func(op, _ string) bool { return op == "sync" })
		_, _ = j.Claim(context.Background(), journalEvent("evt", 0, 0))
		var wg sync.WaitGroup
		for g := range 20 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer func() {
					if v := recover(); v != nil {
						t.Error("panic:", v)
					}
				}()
				_, _ = j.Claim(context.Background(), journalEvent(fmt.Sprint(g), 0, 0))
			}()
		}
		runtime.Gosched()
		_ = j.Close()
		wg.Wait()
		if t.Failed() {
			return
		}
	}
}

// A thousand times the journal cannot go on in a new file. They leave no files behind.
func TestRow07FailedRenewalsLeaveNothing(t *testing.T) {
	medium := newDisk()
	d := medium.process()
	j := openOn(t, d, 0)
	d.failWhere(func(op, path string) bool { // what fsync does on a full disk with delayed allocation
		return op == "sync" || op == "write" && strings.HasSuffix(path, ".tmp")
	})
	for i := range 1000 {
		_, _ = j.Claim(t.Context(), journalEvent(fmt.Sprint(i), 0, 0))
	}
	if open := d.handles(); open > 20 || len(medium.names) > 20 {
		t.Errorf("after 1000 refused claims %d files are open, %d on disk", open, len(medium.names))
	}
	for _, name := range diskNames(medium) {
		if strings.Contains(name, ".tmp") { // it would take the space that is short
			t.Error("on disk:", name)
		}
	}
}

// journalOrphan compacts while something fails. What is done before a clean end stays done, beyond the retention.
func journalOrphan(t *testing.T, fails func(op, path string) bool) {
	synctest.Test(t, func(t *testing.T) {
		medium := newDisk()
		d := medium.process()
		j := openOn(t, d, time.Hour)
		env := journalClaimed(t, j, "evt_1")
		d.failWhere(fails)
		_ = journalCompact(j)
		d.hook = nil
		if err := j.Done(t.Context(), env, nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		journalClaimed(t, j, "evt_2") // what is beyond the retention expires
		for range 2 {
			_ = journalCompact(j)
		}
		journalExpectDone(t, j, medium, "evt_1")
	})
}
func TestRow09RemoveFailsOnce(t *testing.T) {
	journalOrphan(t, func(op, path string) bool { return op == "remove" && strings.HasSuffix(path, ".log") })
}
func TestRow09SyncDirFailsAfterRename(t *testing.T) {
	renamed := false
	journalOrphan(t, func(op, path string) bool {
		renamed = renamed || op == "rename"
		return op == "syncdir" && renamed
	})
}

// A takeover during the owner's compaction, just before the copy gets its name. The new owner removes it in the end.
func TestRow17CopyOfTheLoser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		medium := newDisk()
		da, db := medium.process(), medium.process()
		a := openOn(t, da, time.Hour)
		env := journalClaimed(t, a, "evt_1")
		var b *Journal
		da.hook = func(op, path string) error {
			if op == "rename" && b == nil { // a is stopped for the time of an opening
				b = openOn(t, db, time.Hour)
			}
			return nil
		}
		_ = journalCompact(a)
		for i := range 5 {
			e := journalClaimed(t, b, fmt.Sprint("evt_b", i))
			_ = journalCompact(b)
			_ = b.Done(t.Context(), e, nil)
			_ = b.Done(t.Context(), env, nil)
			time.Sleep(2 * time.Hour)
			_, _ = b.Claim(t.Context(), env)
			_ = b.Done(t.Context(), env, nil)
		}
		time.Sleep(2 * time.Hour)
		_, _ = b.Claim(t.Context(), journalEvent("evt_last", 0, 0))
		_ = journalCompact(b)
		_ = b.Close()
		c := openOn(t, medium.process(), time.Hour)
		if ids := journalPending(t, c); !slices.Equal(ids, []string{"evt_last"}) {
			t.Errorf("handed out: %q", ids)
		}
	})
}

// What the disk says to an fsync of a directory is heard. A device cannot be synced.
func TestRow07DirectoryFsync(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("wants a file that opens, and that no fsync succeeds on")
	}
	if err := (osDisk{}).syncDir("/dev/null"); err == nil {
		t.Error("no error")
	}
}

// What is to be the copy of a later owner is left alone by the earlier one, which may not know yet that it has lost.
func TestRow17CopyOfALaterOwner(t *testing.T) {
	d := newDisk().process()
	j := openOn(t, d, 0)
	path := j.path(j.last().gen+3) + ".tmp"
	if _, err := d.open(path, os.O_CREATE|os.O_EXCL); err != nil {
		t.Fatal(err)
	}
	if err := journalCompact(j); err != nil {
		t.Fatal(err)
	}
	if d.names[path] == nil {
		t.Error("it is gone")
	}
}

// A later owner whose own first file has gone in a compaction is noticed, also where the earlier one's file could not be
// removed before that, and where all of it happens between two looks at the directory.
func TestRow17LaterOwnerHasCompacted(t *testing.T) {
	for _, when := range []string{"before", "before, and the earlier file stays", "meanwhile"} {
		t.Run(when, func(t *testing.T) {
			medium := newDisk()
			first, second := medium.process(), medium.process()
			a := openOn(t, first, 0)
			earlier := a.path(a.last().gen)
			stays := strings.HasSuffix(when, "stays")
			second.failWhere(func(op, path string) bool { return stays && op == "remove" && path == earlier })
			takeOver := func() {
				b := openOn(t, second, 0)
				for range 2 {
					if err := journalCompact(b); err != nil {
						t.Fatal(err)
					}
				}
				if (medium.names[earlier] != nil) != stays {
					t.Fatal("the earlier file is not as the test wants it")
				}
			}
			if when != "meanwhile" {
				takeOver()
			} else {
				first.hook = func(op, _ string) error {
					if op == "stat" {
						first.hook = nil
						takeOver()
					}
					return nil
				}
			}
			if fresh, err := a.Claim(t.Context(), journalEvent("evt_1", 0, 0)); fresh || !errors.Is(err, ErrClosed) {
				t.Errorf("the earlier owner claims: %v, %v", fresh, err)
			}
			if fresh, err := a.Claim(t.Context(), journalEvent("evt_2", 0, 0)); fresh || !errors.Is(err, ErrClosed) {
				t.Errorf("and then: %v, %v, want ErrClosed", fresh, err)
			}
		})
	}
}

// Two that make the first file at once give it any two numbers. The second one may take over only if it has the higher one,
// and then the first one knows before the second one reads.
func TestRow17FirstOpenersAtOnce(t *testing.T) {
	asked := 0
	for range 40 {
		medium := newDisk()
		first, second := medium.process(), medium.process()
		var a *Journal
		second.hook = func(op, path string) error {
			if op != "create" {
				return nil
			}
			if a == nil { // second has listed an empty directory
				a = openOn(t, first, 0)
			} else if strings.HasSuffix(path, ".tmp") { // second has read what was there
				asked++
				if fresh, err := a.Claim(t.Context(), journalEvent("evt_1", 0, 0)); fresh || !errors.Is(err, ErrClosed) {
					t.Errorf("the earlier owner claims: %v, %v", fresh, err)
				}
			}
			return nil
		}
		if _, err := openJournal(second, "journal", 0); err != nil && !errors.Is(err, ErrClosed) {
			t.Error("the second one opens:", err)
		}
	}
	if asked == 0 {
		t.Error("the second one has never taken over")
	}
}

// What compactions that were killed have left goes with the next.
func TestRow09StrayCopies(t *testing.T) {
	medium := newDisk()
	for range 5 {
		d := medium.process()
		j := openOn(t, d, 0)
		_, _ = j.Claim(t.Context(), journalEvent("evt", 0, 1000))
		d.hook = func(op, path string) error {
			if op == "sync" && strings.HasSuffix(path, ".tmp") {
				d.die()
			}
			return nil
		}
		_ = journalCompact(j)
	}
	j := openOn(t, medium.process(), 0)
	_ = journalCompact(j)
	for _, n := range diskNames(medium) {
		if strings.Contains(n, ".tmp") {
			t.Error("left for ever:", n)
		}
	}
}

// A Done that is recorded while an fsync fails is not forgotten by closing and opening the journal.
func TestRow07DoneBesideFailingFsync(t *testing.T) {
	medium := newDisk()
	d := medium.process()
	j := openOn(t, d, 0)
	env := journalClaimed(t, j, "evt_1")
	d.hook = func(op, path string) error {
		if op == "sync" {
			d.hook = nil
			if err := j.Done(t.Context(), env, nil); err != nil { // Handled
				t.Error(err)
			}
			return diskFails(op, path)
		}
		return nil
	}
	if _, err := j.Claim(t.Context(), journalEvent("evt_2", 0, 0)); err == nil {
		t.Error("acknowledged although the fsync failed")
	}
	journalExpectDone(t, j, medium, "evt_1")
}

// The same when a compaction has begun, and fails too.
func TestRow07DoneBesideFailingCompaction(t *testing.T) {
	medium := newDisk()
	d := medium.process()
	j := openOn(t, d, 0)
	env := journalClaimed(t, j, "evt_1")
	begun, goOn := make(chan bool), make(chan bool)
	var once, evt2 atomic.Bool
	d.hook = func(op, path string) error {
		switch {
		case op == "sync" && once.CompareAndSwap(false, true):
			close(begun)
			<-goOn
			return diskFails(op, path)
		case strings.HasSuffix(path, ".tmp"): // no space for the copy
			if op == "create" && evt2.CompareAndSwap(false, true) {
				close(goOn)
			}
			if op == "write" {
				return diskFails(op, path)
			}
		}
		return nil
	}
	claimed := make(chan error, 1)
	go func() {
		_, err := j.Claim(context.Background(), journalEvent("evt_2", 0, 0))
		claimed <- err
	}()
	<-begun
	if err := j.Done(t.Context(), env, nil); err != nil {
		t.Error(err)
	}
	if journalCompact(j) == nil || <-claimed == nil {
		t.Error("the compaction or the claim succeeded on a failing disk")
	}
	d.hook = nil
	journalClaimed(t, j, "evt_3")
	journalExpectDone(t, j, medium, "evt_1")
}

// lateInbox takes its snapshot, and stores, late.
type lateInbox struct {
	*fakeInbox
	before  func()
	storing func(id string)
}

func (in *lateInbox) Claim(ctx context.Context, env *Envelope) (fresh bool, err error) {
	if in.storing != nil {
		in.storing(env.EventID)
	}
	return in.fakeInbox.Claim(ctx, env)
}

func (in *lateInbox) Pending(ctx context.Context) iter.Seq2[*Envelope, error] {
	return func(yield func(*Envelope, error) bool) {
		if in.before != nil {
			in.before()
		}
		for env, err := range in.fakeInbox.Pending(ctx) {
			if !yield(env, err) {
				return
			}
		}
	}
}

// Two events of a case are accepted before the snapshot: the first into memory, the second not, be it known at once or
// when the snapshot has been read.
func TestInboxArrivalIsNotOvertaken(t *testing.T) {
	for _, undecided := range []time.Duration{0, time.Second} {
		synctest.Test(t, func(t *testing.T) {
			in := &lateInbox{fakeInbox: &fakeInbox{}}
			in.put("evt_R", "case_R")
			release := make(chan bool)
			call := 0
			var r *rig
			in.onClaim = func(_ context.Context, env *Envelope) error {
				if env.EventID == "evt_C" {
					time.Sleep(undecided)
				}
				return nil
			}
			in.before = func() {
				switch call++; call {
				case 2: // the room has 1 of 2 taken by R; the inbox is behind
					r.deliver(t, "evt_A", "case_1")
					_ = r.deliverAsync("evt_C", "case_1") // there is no room, or none is left when it is decided
					synctest.Wait()
					close(release)
					synctest.Wait() // R ends
				}
			}
			r = newRig(t, func(ctx context.Context, env *Envelope) error {
				if env.EventID == "evt_R" {
					<-release
				}
				return nil
			}, WithInbox(in), WithBacklog(2), WithConcurrency(2))
			synctest.Wait()
			r.Receiver.mu.Lock()
			r.Receiver.behind = true // as if an event had been left to the inbox
			r.Receiver.mu.Unlock()
			time.Sleep(22 * time.Second)
			synctest.Wait()
			ids := r.called()
			a, c := slices.Index(ids, "evt_A"), slices.Index(ids, "evt_C")
			if a < 0 || c < 0 || a > c {
				t.Errorf("order %q", ids)
			}
		})
	}
}

// Two deliveries of a case overlap. The first is stored after a reading has taken its snapshot, the second before that.
func TestInboxArrivalsKeepTheirOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := &lateInbox{fakeInbox: new(fakeInbox), storing: func(id string) {
			if id == "evt_0" {
				time.Sleep(2 * time.Second)
			}
		}}
		in.onPending = func(int) error {
			time.Sleep(3 * time.Second)
			return nil
		}
		r := newRig(t, nil, WithInbox(in))
		time.Sleep(sweepEvery - time.Second) // the next reading starts in a second
		first := r.deliverAsync("evt_0", "case_1")
		synctest.Wait()
		second := r.deliverAsync("evt_1", "case_1")
		if !(<-first).fresh || !(<-second).fresh || len(in.readings()) != 2 {
			t.Error("not accepted during a reading")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		expectList(t, "callbacks", r.called(), "evt_0", "evt_1")
	})
}

// What is claimed while Pending yields is not yielded: if it were, a later event of a case could be without an earlier
// one, which was passed over as undecided.
func TestPendingIsASnapshot(t *testing.T) {
	d := newDisk().process()
	j := openOn(t, d, 0)
	journalClaimed(t, j, "evt_0")
	syncing, goOn := make(chan bool), make(chan bool)
	d.onSync(func() { close(syncing); <-goOn })
	claimed := make(chan bool)
	go func() {
		defer close(claimed)
		if fresh, err := j.Claim(t.Context(), journalEvent("evt_1", 0, 0)); !fresh || err != nil {
			t.Errorf("claiming evt_1: %v, %v", fresh, err)
		}
	}()
	<-syncing
	var ids []string
	for env, err := range j.Pending(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if ids = append(ids, env.EventID); len(ids) == 1 {
			close(goOn)
			<-claimed
		}
	}
	expectList(t, "pending", ids, "evt_0")
	expectList(t, "pending after that", journalPending(t, j), "evt_0", "evt_1")
}

// An inbox that replicas share gives this one an event through Pending, while a later one of its case is delivered here.
func TestInboxEventFromAnotherIsNotOvertaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := new(fakeInbox)
		var r *rig
		in.onYield = func(_ int, id string) {
			if id == "evt_0" && r.count(Accepted) == 0 { // the snapshot has been taken
				r.deliver(t, "evt_1", "case_1")
				synctest.Wait()
			}
		}
		r = newRig(t, nil, WithInbox(in))
		synctest.Wait() // it has caught up
		in.change(func() { in.put("evt_0", "case_1") })
		time.Sleep(11 * time.Second)
		synctest.Wait()
		expectList(t, "callbacks", r.called(), "evt_0", "evt_1")
	})
}

// Events without a caseId are in no order, so none waits for the claim of another.
func TestInboxClaimsWithoutCase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := &fakeInbox{onClaim: func(_ context.Context, env *Envelope) error {
			if env.EventID == "evt_0" {
				time.Sleep(time.Second)
			}
			return nil
		}}
		r := newRig(t, nil, WithInbox(in))
		synctest.Wait()
		start, first := time.Now(), r.deliverAsync("evt_0", "")
		synctest.Wait()
		r.deliver(t, "evt_1", "")
		expectEqual(t, "answered after", time.Since(start), 0)
		<-first
	})
}

// Another replica answers a duplicate of evt_0 before this one knows that the event is its own, so a later event of the
// case is delivered here meanwhile; between them comes one that is known to be no new one at once.
func TestInboxClaimIsNotOvertaken(t *testing.T) {
	for name, claim := range map[string]error{"succeeds": nil, "fails": errors.New("the server is away")} {
		inBubble(t, name, func(t *testing.T) {
			answer := make(chan error)
			in := &fakeInbox{onClaim: func(_ context.Context, env *Envelope) error {
				if env.EventID == "evt_0" {
					return <-answer
				}
				return nil
			}}
			in.handled = map[string]bool{"evt_old": true}
			r := newRig(t, nil, WithInbox(in))
			synctest.Wait() // it has caught up
			first := r.deliverAsync("evt_0", "case_1")
			synctest.Wait()
			old := r.deliverAsync("evt_old", "case_1")
			synctest.Wait()
			second := r.deliverAsync("evt_1", "case_1")
			r.deliver(t, "evt_other", "case_2")
			r.deliver(t, "evt_alone", "")
			synctest.Wait()
			expectList(t, "callbacks before the claim is decided", slices.Sorted(slices.Values(r.called())), "evt_alone", "evt_other")
			answer <- claim
			if d := <-first; d.err != nil != (claim != nil) {
				t.Errorf("evt_0: %+v", d)
			}
			if d := <-old; d.fresh || d.err != nil {
				t.Errorf("evt_old: %+v", d)
			}
			if d := <-second; !d.fresh || d.err != nil {
				t.Errorf("evt_1: %+v", d)
			}
			synctest.Wait() // a claim that failed may have been stored, as this one was
			expectList(t, "callbacks after that", r.called()[2:], "evt_0", "evt_1")
		})
	}
}

// A claim that makes a delivery of the same case, itself or through the observer, delays that and does not hang.
func TestInboxClaimDelivers(t *testing.T) {
	for name, claim := range map[string]error{"itself": nil, "through the observer": errTest} {
		inBubble(t, name, func(t *testing.T) {
			in := new(fakeInbox)
			var r *rig
			deliver := func() {
				if fresh, err := r.Deliver(t.Context(), eventBody("evt_1", "case_1")); !fresh || err != nil {
					t.Errorf("evt_1: %t, %v", fresh, err)
				}
			}
			in.onClaim = func(_ context.Context, env *Envelope) error {
				if env.EventID == "evt_1" {
					return nil
				}
				if claim == nil {
					deliver()
				}
				return claim
			}
			r = newRig(t, nil, WithInbox(in), WithObserver(func(_ context.Context, o Observation) {
				if o.Outcome == StoreFailed {
					deliver()
				}
			}))
			synctest.Wait() // it has caught up
			if d := <-r.deliverAsync("evt_0", "case_1"); d.took > storeTimeout || !errors.Is(d.err, claim) {
				t.Errorf("evt_0: %+v", d)
			}
		})
	}
}

// An event is accepted before the snapshot is taken, and another replica puts a later one of its case into that.
func TestInboxArrivalIsNotOvertakenByAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in, rigs := &lateInbox{fakeInbox: new(fakeInbox)}, make(chan *rig, 1)
		in.before = func() {
			if len(in.readings()) == 0 {
				(<-rigs).deliver(t, "evt_0", "case_1")
				in.change(func() { in.put("evt_1", "case_1") })
			}
		}
		r := newRig(t, nil, WithInbox(in))
		rigs <- r
		synctest.Wait()
		expectList(t, "callbacks", r.called(), "evt_0", "evt_1")
	})
}

// An event is read from the inbox while its claim has not returned: what the inbox has of other cases goes on, what it
// has of the same case waits.
func TestInboxUndecidedHoldsItsCaseOnly(t *testing.T) {
	for caseID, before := range map[string][]string{"case_1": {"evt_2"}, "": {"evt_1", "evt_2"}} {
		inBubble(t, "case="+caseID, func(t *testing.T) {
			answer := make(chan error)
			in := &lateInbox{fakeInbox: &fakeInbox{onClaim: func(context.Context, *Envelope) error { return <-answer }}}
			rigs, first := make(chan *rig, 1), make(chan (<-chan delivery), 1)
			in.before = func() {
				if len(in.readings()) == 0 {
					first <- (<-rigs).deliverAsync("evt_0", caseID)
					time.Sleep(time.Second) // it is stored
					in.change(func() {
						in.put("evt_1", caseID)
						in.put("evt_2", "case_2")
					})
				}
			}
			r := newRig(t, nil, WithInbox(in), WithConcurrency(1))
			rigs <- r
			time.Sleep(2 * time.Second)
			expectList(t, "callbacks before the claim has returned", r.called(), before...)
			answer <- nil
			<-<-first
			synctest.Wait()
			after := []string{"evt_0", "evt_1"}
			expectList(t, "callbacks after it", r.called()[len(before):], after[:3-len(before)]...)
		})
	}
}

// As on Windows: an open file can be neither renamed nor removed.
func TestRow09OpenFilesStay(t *testing.T) {
	medium := newDisk()
	d := medium.process()
	d.hook = func(op, path string) error {
		d.mu.Lock()
		defer d.mu.Unlock()
		if (op == "rename" || op == "remove") && d.held[path] > 0 {
			return &fs.PathError{Op: op, Path: path, Err: errors.New("sharing violation")}
		}
		return nil
	}
	j := openOn(t, d, 0)
	journalClaimed(t, j, "evt")
	if err := journalCompact(j); err != nil {
		t.Error(err)
	}
}

// An opener reads the place of a copy before the copy gets its name, and dies before its own copy is whole.
func TestRow17PlaceOfACopy(t *testing.T) {
	for _, how := range []string{"dies", "fails"} {
		medium := newDisk()
		resume := journalAtRename(t, medium)
		d := medium.process()
		creates := 0
		d.hook = func(op, path string) error {
			if op != "create" {
				return nil
			}
			if creates++; creates == 2 { // it has read all
				resume()
			}
			if strings.HasSuffix(path, ".tmp") {
				if how == "dies" {
					d.die()
				}
				return diskFails(op, path)
			}
			return nil
		}
		if _, err := openJournal(d, "journal", 0); err == nil {
			t.Errorf("%s: it opened without a copy", how)
		}
		c := openOn(t, medium.process(), 0)
		if ids := journalPending(t, c); len(ids) != 1 {
			t.Errorf("%s: acknowledged evt_a; kept %q", how, ids)
		}
	}
}

// After a failed fsync, Close writes once more what is done before it syncs.
func TestRow07CloseAfterFailedFsync(t *testing.T) {
	medium := newDisk()
	d := medium.process()
	j := openOn(t, d, 0)
	env := journalClaimed(t, j, "evt_1")
	if err := j.Done(t.Context(), env, nil); err != nil {
		t.Fatal(err)
	}
	d.fault = diskFault{from: d.ops + 1, span: 1 << 30, only: "sync"}
	if _, err := j.Claim(t.Context(), journalEvent("evt_2", 0, 0)); err == nil {
		t.Error("acknowledged although the fsync failed")
	}
	d.heal()
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	medium.losePower(rand.New(rand.NewPCG(1, 2)), 0)
	j2 := openOn(t, medium.process(), 0)
	if ids := journalPending(t, j2); len(ids) > 0 {
		t.Errorf("clean Close, handed out again: %q", ids)
	}
}

// The same where the directory cannot be synced, never or only before the copy gets its name, or the copy not be opened.
func TestRow07FailedStepsLeaveNothing(t *testing.T) {
	dirs := 0
	for name, fails := range map[string]func(op string) bool{
		"syncdir": func(op string) bool { return op == "syncdir" },
		"syncdir after the rename": func(op string) bool {
			if op == "syncdir" {
				dirs++
			}
			return op == "syncdir" && dirs%2 == 0
		},
		"open": func(op string) bool { return op == "open" },
	} {
		t.Run(name, func(t *testing.T) {
			medium := newDisk()
			d := medium.process()
			j := openOn(t, d, 0)
			journalClaimed(t, j, "evt_a")
			bad := false
			d.failWhere(func(op, _ string) bool {
				first := op == "sync" && !bad
				bad = bad || first
				return first || fails(op)
			})
			for i := range 500 {
				if _, err := j.Claim(t.Context(), journalEvent(fmt.Sprint(i), 0, 0)); err == nil {
					t.Error("acknowledged although the fsync failed")
				}
			}
			if open := d.handles(); open > 4 || len(medium.names) > 4 {
				t.Errorf("after 500 refused claims %d files are open, %d on disk", open, len(medium.names))
			}
		})
	}
}

// readdirDisk lists as readdir may: a name that is made, or renamed over, while it lists need not be seen (btrfs).
type readdirDisk struct {
	*diskProcess
	during func(n int)
	n      int
}

func (d *readdirDisk) list(string) (entries []fs.DirEntry, err error) {
	d.mu.Lock()
	before := maps.Clone(d.names)
	d.mu.Unlock()
	d.n++
	d.during(d.n)
	d.mu.Lock()
	defer d.mu.Unlock()
	for path, node := range before {
		if d.names[path] == node {
			entries = append(entries, diskEntry{name: filepath.Base(path)})
		}
	}
	return entries, nil
}

// The copy gets its name while an opener lists the directory.
func TestRow17ListingMissesTheCopy(t *testing.T) {
	for when := 1; when <= 2; when++ { // before it makes its own file, and when it has read the others
		medium := newDisk()
		resume := journalAtRename(t, medium)
		d := &readdirDisk{diskProcess: medium.process()}
		d.during = func(n int) {
			if n == when {
				resume()
			}
		}
		b := openOn(t, d, 0)
		if ids := journalPending(t, b); !slices.Equal(ids, []string{"evt_a"}) {
			t.Errorf("listing %d: acknowledged evt_a; kept %q of %q", when, ids, diskNames(medium))
		}
	}
}

// Under a steady load with little room, what waits in the inbox is handled all the same.
func TestInboxIsNotStarved(t *testing.T) {
	for _, backlog := range []int{1, 4} {
		synctest.Test(t, func(t *testing.T) {
			in := &fakeInbox{}
			in.onPending = func(int) error { time.Sleep(10 * time.Millisecond); return nil }
			r := newRig(t, nil, WithInbox(in), WithBacklog(backlog))
			for i := range 500 {
				time.Sleep(2 * time.Millisecond)
				r.deliver(t, fmt.Sprint("evt_", i), "")
			}
			if n := len(r.called()); n < 50 {
				t.Errorf("backlog %d: %d of 500 events were handled in a second", backlog, n)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			expectEqual(t, "handled in the end", len(r.called()), 500)
		})
	}
}

// The callbacks keep pace with a reading, so that it need not end for want of room; it may not outlast its context, nor
// the lease of a shared store.
func TestInboxLongReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := new(fakeInbox)
		var want []string
		for i := range 300 {
			want = append(want, fmt.Sprint("evt_", i))
			in.put(want[i], "case_1")
		}
		in.onYield = func(int, string) { time.Sleep(100 * time.Millisecond) }
		r := newRig(t, nil, WithInbox(in), WithBacklog(4))
		time.Sleep(time.Minute)
		expectList(t, "called", r.called(), want...)
		expectEqual(t, "store failures", r.count(StoreFailed), 0)
		last := in.readings()[0]
		for _, at := range in.readings() {
			if at.Sub(last) > 10*time.Second {
				t.Errorf("no reading for %v", at.Sub(last))
			}
			last = at
		}
	})
}

// A duplicate of an event that was accepted during a reading is undecided when that ends.
func TestInboxDuplicateOfArrival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in, goOn, slow := new(fakeInbox), make(chan bool), make(chan bool)
		claims := 0
		in.onClaim = func(_ context.Context, env *Envelope) error {
			if env.EventID == "evt_1" {
				if claims++; claims == 2 {
					<-slow
				}
			}
			return nil
		}
		in.onPending = func(call int) error {
			if call == 1 {
				<-goOn
			}
			return nil
		}
		r := newRig(t, func(context.Context, *Envelope) error { time.Sleep(time.Second); return nil }, WithInbox(in))
		synctest.Wait()
		r.deliver(t, "evt_1", "case_1")
		duplicate := r.deliverAsync("evt_1", "case_1")
		synctest.Wait()
		r.deliver(t, "evt_2", "case_2")
		later := r.deliverAsync("evt_3", "case_1") // behind the duplicate
		close(goOn)
		time.Sleep(3 * time.Second)
		close(slow)
		if d := <-duplicate; d.fresh || d.err != nil {
			t.Errorf("the duplicate: %+v", d)
		}
		if d := <-later; !d.fresh || d.err != nil {
			t.Errorf("evt_3: %+v", d)
		}
		time.Sleep(time.Minute)
		called := slices.DeleteFunc(r.called(), func(id string) bool { return id == "evt_2" })
		expectList(t, "case_1", called, "evt_1", "evt_3")
		expectEqual(t, "handled", r.count(Handled), 3)
		expectList(t, "in the store", in.pending())
	})
}

// A copy that failed cannot be removed either. The next try is not stopped by it.
func TestRow07FailedCopyStays(t *testing.T) {
	d := newDisk().process()
	j := openOn(t, d, 0)
	d.failWhere(func(op, path string) bool { return op == "sync" || op == "remove" })
	for i := range 3 {
		if _, err := j.Claim(t.Context(), journalEvent(fmt.Sprint(i), 0, 0)); err == nil {
			t.Error("acknowledged although the fsync failed")
		}
	}
	d.hook = nil
	journalClaimed(t, j, "evt")
}

// A Done that comes before its claim is durable ends nothing: that claim is not held yet.
func TestDoneBesideTheClaim(t *testing.T) {
	medium := newDisk()
	d := medium.process()
	j := openOn(t, d, 0)
	env := journalEvent("evt_1", 0, 0)
	d.onSync(func() {
		if err := j.Done(t.Context(), env, nil); err != nil {
			t.Error(err)
		}
	})
	if fresh, err := j.Claim(t.Context(), env); !fresh || err != nil {
		t.Errorf("Claim: %v, %v", fresh, err)
	}
	d.die()
	expectList(t, "kept", journalPending(t, openOn(t, medium.process(), 0)), "evt_1")
}

// unlistableDisk has a directory that can be made, and not be found.
type unlistableDisk struct{ *diskProcess }

func (unlistableDisk) list(string) ([]fs.DirEntry, error) { return nil, fs.ErrNotExist }

func TestUnlistableDirectory(t *testing.T) {
	if _, err := openJournal(unlistableDisk{newDisk().process()}, "journal", 0); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opening: %v", err)
	}
}

// A compaction begins while claims wait for the fsync after the one that runs. Later claims are in another file. If the
// fsync that runs fails, no later one of that file is trusted.
func TestRow09CompactionBesideAnFsync(t *testing.T) {
	t.Run("that succeeds", func(t *testing.T) { testCompactionBesideAnFsync(t, false) })
	t.Run("that fails", func(t *testing.T) { testCompactionBesideAnFsync(t, true) })
}

func testCompactionBesideAnFsync(t *testing.T, fails bool) {
	medium := newDisk()
	d := medium.process()
	j := openOn(t, d, 0)
	want := []string{"evt_0", "evt_1", "evt_2"}
	if fails {
		want = want[2:]
	}
	entered, release := make(chan bool), make(chan bool)
	var first sync.Once
	d.onSync(func() {
		first.Do(func() {
			close(entered)
			<-release
			if fails {
				d.mu.Lock()
				defer d.mu.Unlock()
				d.fault = diskFault{from: d.ops + 1, span: 1}
			}
		})
	})
	var claims sync.WaitGroup
	claim := func(id string) {
		accepted := slices.Contains(want, id)
		claims.Go(func() {
			if fresh, err := j.Claim(t.Context(), journalEvent(id, 0, 0)); fresh != accepted || (err == nil) != accepted {
				t.Errorf("claiming %s: %v, %v", id, fresh, err)
			}
		})
	}
	locked := func(ok func() bool) func() bool {
		return func() bool {
			j.mu.Lock()
			defer j.mu.Unlock()
			return ok()
		}
	}
	claim("evt_0")
	<-entered
	claim("evt_1")
	journalWait(t, "a claim to wait", locked(func() bool { return len(j.claims) == 2 && j.group != nil }))
	gen := j.last().gen
	claims.Go(func() {
		if err := journalCompact(j); err != nil {
			t.Error(err)
		}
	})
	journalWait(t, "a new file", locked(func() bool { return j.last().gen > gen }))
	claim("evt_2")
	journalWait(t, "a claim to wait", locked(func() bool { return len(j.claims) == 3 }))
	waits := regexp.MustCompile(`\[chan receive\]:\n\S*offloadhook\.\(\*Journal\)\.copyTo\(`)
	journalWait(t, "the copying to wait for the fsync", func() bool { return waits.MatchString(stacks()) })
	close(release)
	claims.Wait()
	d.die()
	medium.losePower(rand.New(rand.NewPCG(1, 1)), 0)
	ids := journalPending(t, openOn(t, medium.process(), 0))
	slices.Sort(ids)
	expectList(t, "acknowledged", ids, want...)
}

// The fsync that is under way when Close begins fails, and the disk reports that once.
func TestRow07CloseBesideAFailingFsync(t *testing.T) {
	medium := newDisk()
	d := medium.process()
	j := openOn(t, d, 0)
	env := journalClaimed(t, j, "evt_a")
	atSync, goOn := make(chan bool), make(chan bool)
	var first sync.Once
	d.hook = func(op, path string) (err error) {
		if op == "sync" {
			first.Do(func() {
				close(atSync)
				<-goOn
				err = diskFails(op, path)
			})
		}
		return err
	}
	if err := j.Done(t.Context(), env, nil); err != nil {
		t.Fatal(err)
	}
	var ended sync.WaitGroup
	ended.Go(func() {
		if _, err := j.Claim(t.Context(), journalEvent("evt_b", 0, 0)); err == nil {
			t.Error("acknowledged although the fsync failed")
		}
	})
	<-atSync
	ended.Go(func() {
		if err := j.Close(); err == nil {
			t.Error("Close reports nothing")
		}
	})
	journalWait(t, "Close to begin", func() bool {
		j.mu.Lock()
		defer j.mu.Unlock()
		return j.closed != nil
	})
	close(goOn)
	ended.Wait()
}

// A power loss keeps the removal of the file with the end of an event, but not that of the file with its claim, if the
// disk may choose.
func TestRow09RemovalsAreOrdered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		medium := newDisk()
		j := openOn(t, medium.process(), time.Second)
		env := journalClaimed(t, j, "evt_a")
		if err := journalCompact(j); err != nil { // the claim is in the copy
			t.Fatal(err)
		}
		if err := j.Done(t.Context(), env, nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		journalClaimed(t, j, "evt_b") // evt_a is over its retention: the next copy knows nothing of it
		if err := journalCompact(j); err != nil {
			t.Fatal(err)
		}
		if len(medium.unsynced) > 0 {
			medium.unsynced = medium.unsynced[1:]
		}
		medium.losePower(rand.New(rand.NewPCG(1, 2)), 1)
		expectList(t, "pending", journalPending(t, openOn(t, medium.process(), time.Second)), "evt_b")
	})
}

// A later version may write records of other kinds.
func TestJournalPassesOverUnknownRecords(t *testing.T) {
	medium := newDisk()
	j := openOn(t, medium.process(), 0)
	journalClaimed(t, j, "evt_a")
	j.mu.Lock()
	for _, record := range []string{`{"note":"x"}`, `{"tries":3,"id":"evt_a","at":1}`} {
		j.buf = appendSealed(j.buf, record)
	}
	err := j.write()
	j.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	expectList(t, "pending", journalPending(t, openOn(t, medium.process(), 0)), "evt_a")
}

// appendSealed appends a line with a checksum that is right.
func appendSealed(lines []byte, record string) []byte {
	sum := checksum([]byte(record))
	return append(append(append(lines, sum[:]...), record...), '\n')
}

// TestJournalSealedNonsense: a line that is no record is damage, even if its checksum is right.
func TestJournalSealedNonsense(t *testing.T) {
	for _, record := range []string{``, `{`, `{}`, `{"id"`, `{"id":`, `{"id":}`, `{"done":evt_a,"at":1}`, `["id","evt_a"]`} {
		m := newJournalModel(t)
		content := append(appendSealed(m.record("evt_a"), record), m.record("evt_b")...)
		j := openOn(t, diskWith(filepath.Join("journal", "events-00000001.log"), content).process(), 0)
		if ids, damages := m.pending(j); len(damages) != 1 || !slices.Equal(ids, []string{"evt_a", "evt_b"}) {
			t.Errorf("%s: %q, %q", record, ids, damages)
		}
	}
}

// TestGaveUpDeliver: who is told that an event was given up can deliver it again at once.
func TestGaveUpDeliver(t *testing.T) {
	for name, store := range map[string]func() Option{
		"Memory": func() Option { return WithDeduper(new(Memory)) },
		"Inbox":  func() Option { return WithInbox(new(fakeInbox)) },
	} {
		inBubble(t, name, func(t *testing.T) {
			failures := 0
			var r *rig
			r = newRig(t, func(context.Context, *Envelope) error {
				if failures++; failures == 1 {
					return errTest
				}
				return nil
			}, store(), WithRetry(1, 0), WithObserver(func(ctx context.Context, o Observation) {
				r.record(ctx, o)
				if o.Outcome == GaveUp {
					if fresh, err := r.Deliver(ctx, o.Body); !fresh || err != nil {
						t.Errorf("Deliver = %v, %v", fresh, err)
					}
				}
			}))
			synctest.Wait()
			r.deliver(t, "evt_1", "case_1")
			time.Sleep(time.Minute)
			expectList(t, "called", r.called(), "evt_1", "evt_1")
			expectEqual(t, "handled", r.count(Handled), 1)
		})
	}
}

// TestAppendIsSafe: what an append to the bytes of an event writes must not be seen by another.
func TestAppendIsSafe(t *testing.T) {
	clipped := func(what string, b []byte) {
		if len(b) == 0 || len(b) < cap(b) {
			t.Errorf("%s has %d bytes, and room for %d more", what, len(b), cap(b)-len(b))
		}
	}
	payload, err := decode[CaseCompleted](&Envelope{Data: []byte(`{"result":[1],"metadata":{},"caseId":"c"}`)})
	if err != nil {
		t.Fatal(err)
	}
	clipped("Result", payload.Result)
	clipped("Metadata", payload.Metadata)
	for _, store := range []Option{WithDeduper(new(Memory)), WithInbox(openOn(t, newDisk().process(), 0))} {
		called := make(chan bool, 10)
		r := Handler(journalCallbacks(func(_ context.Context, env *Envelope) error {
			clipped("Raw", env.Raw)
			clipped("Data", env.Data)
			called <- true
			return errTest
		}), store, WithRetry(1, 0), WithObserver(func(_ context.Context, o Observation) {
			clipped("Body", o.Body)
		}))
		_, _ = r.Deliver(t.Context(), append(make([]byte, 0, 1000), eventBody("evt_1", "case_1")...))
		w := httptest.NewRecorder()
		r.ServeHTTP(w, httptest.NewRequest("POST", "/", bytes.NewReader(eventBody("evt_2", "case_2"))))
		w = httptest.NewRecorder()
		r.ServeHTTP(w, httptest.NewRequest("POST", "/", strings.NewReader("no event")))
		<-called
		<-called
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCaseID: an event belongs to the case whose id its callback gets.
func TestCaseID(t *testing.T) {
	for data, want := range map[string]string{
		``: "", `null`: "", `[]`: "", `{}`: "", `{"caseid":"c"}`: "", `{"caseId":7}`: "", `{"data":{"caseId":"c"}}`: "",
		`{"caseId":"c"}`: "c", `{"case\u0049d" : "c\n"}`: "c\n", `{"caseId":"b","caseId":"c"}`: "c",
		`{"caseId":"c","caseId":null}`: "c",
	} {
		_, got := scanData([]byte(data), 0, nesting)
		expectEqual(t, data, got, want)
		if data != "" {
			body := `{"data":{"caseId":"first"},"event_id":"evt_1","data":` + data + `,"next":{"caseId":"last"}}`
			_, got, err := parse([]byte(body))
			expectEqual(t, body, got, want)
			expectEqual(t, body, err, nil)
		}
	}
}

// TestDrainedFlood: compaction waits until there is more garbage than what is alive, and then leaves little of a flood,
// whether that is in the file that is written to or in a copy.
func TestDrainedFlood(t *testing.T) {
	const count, size = 100, 50_000
	for _, copied := range []bool{false, true} {
		t.Run(fmt.Sprintf("copied=%v", copied), func(t *testing.T) {
			medium := newDisk()
			j := openOn(t, medium.process(), 0)
			defer func() { _ = j.Close() }()
			onDisk := func() (total int) {
				medium.mu.Lock()
				defer medium.mu.Unlock()
				for _, file := range medium.names {
					total += len(file.now)
				}
				return total
			}
			var events []*Envelope
			for i := range count {
				events = append(events, journalEvent(fmt.Sprintf("evt_%03d", i), 0, size))
				if fresh, err := j.Claim(t.Context(), events[i]); !fresh || err != nil {
					t.Fatal(fresh, err)
				}
			}
			if copied {
				if err := journalCompact(j); err != nil {
					t.Fatal(err)
				}
			}
			full := onDisk()
			for i, env := range events {
				if err := j.Done(t.Context(), env, nil); err != nil {
					t.Fatal(err)
				}
				j.renewal.Lock() // so no compaction runs
				if i == count/4 && onDisk() < full {
					t.Error("compacted with three quarters alive")
				}
				j.renewal.Unlock()
			}
			if left := onDisk(); left > 3<<19 {
				t.Errorf("%d bytes are left of %d", left, full)
			}
		})
	}
}

// A file that is put in the place of the journal's own, as an editor or a restored backup does, is another's.
func TestFileReplaced(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows does not let go of a name while the file is open")
	}
	dir := t.TempDir()
	j := journalOpen(t, dir)
	journalClaimed(t, j, "evt_1")
	path := j.path(j.last().gen)
	content, err := os.ReadFile(path)
	if err == nil {
		err = errors.Join(os.Remove(path), os.WriteFile(path, content, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	if fresh, err := j.Claim(t.Context(), journalEvent("evt_2", 0, 0)); fresh || !errors.Is(err, ErrClosed) {
		t.Errorf("claiming: %v, %v, want ErrClosed", fresh, err)
	}
	_ = j.Close()
	expectList(t, "kept", journalPending(t, journalOpen(t, dir)), "evt_1")
}

// A directory that is made anew under a running journal is another's: only that one acknowledges.
func TestDirectoryMadeAnew(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows neither removes nor moves a directory with open files in it")
	}
	for _, way := range []string{"removed", "moved"} {
		t.Run(way, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "journal")
			a := journalOpen(t, dir)
			err := os.RemoveAll(dir)
			if way == "moved" {
				err = errors.Join(os.MkdirAll(dir, 0o700), os.Rename(dir, dir+".old"))
			}
			if err != nil {
				t.Fatal(err)
			}
			b := journalOpen(t, dir)
			journalClaimed(t, b, "evt_b")
			if err := journalCompact(a); !errors.Is(err, ErrClosed) {
				t.Errorf("the earlier one compacts: %v", err)
			}
			if fresh, err := a.Claim(t.Context(), journalEvent("evt_a", 0, 0)); fresh || !errors.Is(err, ErrClosed) {
				t.Errorf("the earlier one claims: %v, %v", fresh, err)
			}
			if ids := journalPending(t, journalOpen(t, dir)); !slices.Equal(ids, []string{"evt_b"}) {
				t.Errorf("kept %q", ids)
			}
		})
	}
}

// The first file of a journal has any number, and each opening the next.
func TestNumbersGoOn(t *testing.T) {
	medium := newDisk()
	last := 0
	for i := range 10 {
		j := openOn(t, medium.process(), 0)
		if gen := j.last().gen; i > 0 && gen != last+2 || gen%2 != 0 {
			t.Errorf("opening %d has file %d, after %d", i, gen, last)
		}
		last = j.last().gen
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestRow05ZeroedRange: what lies behind a damaged stretch is read, wherever that ends.
func TestRow05ZeroedRange(t *testing.T) {
	name, content, lines, m := journalSample(t)
	last := lines[len(lines)-4] // the last of the claims that are alive
	for from := 0; from < last.off; from += journalCount(97, 7) {
		for to := from + 1; to <= last.off; to++ {
			if boundary := content[to-1] == '\n' || content[to] == '\n'; !boundary && to%journalCount(31, 1) != 0 {
				continue
			}
			spoiled := bytes.Clone(content)
			clear(spoiled[from:to])
			want := journalAlive(lines, func(line journalLine) bool { return line.off < to && from < line.end })
			journalSpoiled(t, m, name, spoiled, want)
			if t.Failed() {
				t.Fatalf("bytes %d to %d of %q were zeroed", from, to, content)
			}
		}
	}
}

// An event that was given up may be claimed again with another body, which then counts; if that claim is refused, the
// first does.
func TestClaimedAnew(t *testing.T) {
	first, second := journalEvent("evt_1", 0, 0), journalEvent("evt_1", 1, 10)
	for _, test := range []struct {
		refused, compacted bool
		want               *Envelope
	}{{false, false, second}, {false, true, second}, {true, false, first}, {true, true, first}} {
		t.Run(fmt.Sprintf("refused=%v,compacted=%v", test.refused, test.compacted), func(t *testing.T) {
			medium := newDisk()
			d := medium.process()
			j := openOn(t, d, 0)
			for _, id := range []string{"evt_1", "evt_2"} {
				journalClaimed(t, j, id)
			}
			if err := j.Done(t.Context(), first, errTest); err != nil {
				t.Fatal(err)
			}
			if test.refused {
				d.failWhere(func(op, _ string) bool { return op == "write" })
			}
			if fresh, err := j.Claim(t.Context(), second); fresh == test.refused || (err != nil) != test.refused {
				t.Fatalf("claimed again: %v, %v", fresh, err)
			}
			d.hook = nil
			want := []string{"evt_2", "evt_1"}
			if test.refused {
				want = []string{"evt_1", "evt_2"}
				if fresh, err := j.Claim(t.Context(), first); !fresh || err != nil { // it is open still
					t.Fatalf("claimed at last: %v, %v", fresh, err)
				}
				slices.Reverse(want)
			}
			if test.compacted {
				if err := journalCompact(j); err != nil {
					t.Fatal(err)
				}
			}
			journalExpectLive(t, j)
			d.die()
			j = openOn(t, medium.process(), 0)
			var got []string
			for env, err := range j.Pending(t.Context()) {
				if err != nil {
					t.Fatal(err)
				}
				if got = append(got, env.EventID); env.EventID == "evt_1" && !bytes.Equal(env.Raw, test.want.Raw) {
					t.Errorf("kept %q, want %q", env.Raw, test.want.Raw)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("kept %q, want %q", got, want)
			}
		})
	}
}

// journalExpectLive expects that the bytes that are alive are those of the claims.
func journalExpectLive(t testing.TB, j *Journal) {
	t.Helper()
	want := int64(0)
	for _, c := range j.claims {
		want += int64(c.size)
	}
	expectEqual(t, "live", j.live, want)
}

// While an event that was given up is claimed again, a compaction finds its first record damaged.
func TestClaimedAnewWhileDamaged(t *testing.T) {
	for _, refused := range []bool{false, true} {
		medium := newDisk()
		d := medium.process()
		j := openOn(t, d, 0)
		env := journalClaimed(t, j, "evt_1")
		if err := j.Done(t.Context(), env, errTest); err != nil {
			t.Fatal(err)
		}
		compacted, beside := make(chan error, 1), make(chan bool, 1)
		d.hook = func(op, path string) error {
			if op != "sync" {
				return nil
			}
			d.hook = nil
			if ids := journalPending(t, j); len(ids) > 0 {
				t.Errorf("Pending yields %q, of which it is not known which body counts", ids)
			}
			medium.names[path].now[20] ^= 1
			go func() { compacted <- journalCompact(j) }()
			journalWait(t, "the damage", func() bool {
				j.mu.Lock()
				defer j.mu.Unlock()
				return len(j.reports) > 0
			})
			go func() {
				fresh, _ := j.Claim(t.Context(), env)
				beside <- fresh
			}()
			journalWait(t, "the second claim", func() bool {
				return strings.Count(stacks(), "offloadhook.(*Journal).Claim(") > 1
			})
			if refused {
				return diskFails(op, path)
			}
			return nil
		}
		if fresh, err := j.Claim(t.Context(), env); fresh == refused || (err != nil) != refused {
			t.Fatalf("claimed again: %v, %v", fresh, err)
		}
		if err := <-compacted; err != nil {
			t.Error(err)
		}
		again := <-beside
		if again && !refused {
			t.Error("claimed twice")
		}
		if refused && !again {
			journalClaimed(t, j, "evt_1")
		}
		journalExpectLive(t, j)
		m := newJournalModel(t)
		m.bodies["evt_1"] = env.Raw
		if ids, errs := m.pending(j); len(errs) != 1 || !slices.Equal(ids, []string{"evt_1"}) {
			t.Errorf("Pending yields %q, %v", ids, errs)
		}
	}
}

// journalDamaged returns a disk with a journal of two events, the first of them damaged, and the name of its file.
func journalDamaged(t testing.TB) (medium *diskMedium, name string) {
	medium = newDisk()
	j := openOn(t, medium.process(), 0)
	journalClaimed(t, j, "evt_1")
	journalClaimed(t, j, "evt_2")
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	name, content := medium.newest(".log")
	content[20] ^= 1
	return diskWith(name, content), name
}

// Damage that Pending had no time to report is reported by Close.
func TestDamageReportedAtClose(t *testing.T) {
	medium, _ := journalDamaged(t)
	if err := openOn(t, medium.process(), 0).Close(); err == nil || !strings.Contains(err.Error(), "damaged record at byte 0") {
		t.Errorf("Close returns %v", err)
	}
	if err := openOn(t, medium.process(), 0).Close(); err != nil {
		t.Errorf("then Close returns %v", err)
	}
}

// A damaged file that could not be renamed is kept, and is renamed after the next compaction.
func TestDamagedIsKept(t *testing.T) {
	medium, name := journalDamaged(t)
	d, failed := medium.process(), false
	d.failWhere(func(op, path string) bool {
		strikes := op == "rename" && path == name && !failed
		failed = failed || strikes
		return strikes
	})
	j := openOn(t, d, 0)
	if medium.names[name] == nil {
		t.Error("the damaged file is gone:", diskNames(medium))
	}
	if err := journalCompact(j); err != nil {
		t.Fatal(err)
	}
	if medium.names[name+".damaged"] == nil || medium.names[name] != nil {
		t.Error("the damaged file was not kept aside:", diskNames(medium))
	}
}

// A large event does not stay in memory when it is done.
func TestLargeEventLeavesMemory(t *testing.T) {
	j := journalOpen(t, t.TempDir())
	env := journalEvent("evt_1", 0, 2<<20)
	if fresh, err := j.Claim(t.Context(), env); !fresh || err != nil {
		t.Fatal(fresh, err)
	}
	if cap(j.buf) > 1<<20 {
		t.Errorf("a buffer of %d bytes stays", cap(j.buf))
	}
}

// A record of a clock that was ahead does not keep the ids behind it for longer than twice the retention.
func TestClockWasAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ahead := string(appendRecord(nil, "done", []byte(`"evt_ahead"`), time.Now().AddDate(10, 0, 0).UnixMilli(), nil))
		medium := diskWith(filepath.Join("journal", "events-00000001.log"), []byte(ahead))
		j := openOn(t, medium.process(), time.Hour)
		env := journalClaimed(t, j, "evt_1")
		if err := j.Done(t.Context(), env, nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		journalClaimed(t, j, "evt_1")
		if n := j.done.len(); n != 0 {
			t.Errorf("%d ids are remembered", n)
		}
	})
}

// A clock that is behind at a start, or was behind for one id, makes no id be forgotten early.
func TestClockWasBehind(t *testing.T) {
	remembered := func(t *testing.T, j *Journal, id string) {
		t.Helper()
		if fresh, err := j.Claim(t.Context(), journalEvent(id, 0, 0)); fresh || err != nil {
			t.Errorf("%s, done within the retention: %t, %v", id, fresh, err)
		}
	}
	inBubble(t, "at a start", func(t *testing.T) {
		done := appendRecord(nil, "done", []byte(`"evt_1"`), time.Now().Add(2*time.Hour).UnixMilli(), nil)
		j := openOn(t, diskWith(filepath.Join("journal", "events-00000001.log"), done).process(), 3*time.Hour)
		time.Sleep(3*time.Hour + time.Minute) // an hour and what the clock was behind
		remembered(t, j, "evt_1")
	})
	inBubble(t, "for one id", func(t *testing.T) {
		time.Sleep(24 * time.Hour)
		done := appendRecord(nil, "done", []byte(`"evt_1"`), time.Now().Add(-time.Minute).UnixMilli(), nil)
		done = appendRecord(done, "done", []byte(`"evt_behind"`), time.Now().Add(-59*time.Minute).UnixMilli(), nil)
		medium := diskWith(filepath.Join("journal", "events-00000001.log"), done)
		openOn(t, medium.process(), time.Hour).Close()
		time.Sleep(2 * time.Minute)
		remembered(t, openOn(t, medium.process(), time.Hour), "evt_1")
	})
}

// TestDamageBeforeTear: a damaged line break joins a record to the torn one behind it. That is damage all the same.
func TestDamageBeforeTear(t *testing.T) {
	m := newJournalModel(t)
	content, last := append(m.record("evt_0"), m.record("evt_1")...), m.record("evt_2")
	clear(content[len(content)-60:])
	for cut := len(`00000000 {"id"`); cut < len(last); cut++ {
		medium := diskWith(filepath.Join("journal", "events-00000001.log"), append(bytes.Clone(content), last[:cut]...))
		j := openOn(t, medium.process(), 0)
		want := []string{"evt_0"}
		if cut == len(last)-1 { // it lacks only its line break
			want = append(want, "evt_2")
		}
		if ids, damages := m.pending(j); len(damages) != 1 || !slices.Equal(ids, want) {
			t.Errorf("cut at byte %d of the last record: %q, %q, want 1 damage, %q", cut, damages, ids, want)
		}
		if !strings.Contains(fmt.Sprint(diskNames(medium)), ".damaged") {
			t.Errorf("cut at byte %d of the last record: %q", cut, diskNames(medium))
		}
		j.Close()
	}
}

// TestClaimedAnewGrows: of an event that is given up and claimed again and again one record is alive.
func TestClaimedAnewGrows(t *testing.T) {
	dir := t.TempDir()
	j := journalOpen(t, dir)
	env := journalEvent("evt_1", 0, 100<<10)
	for range 100 {
		if fresh, err := j.Claim(t.Context(), env); !fresh || err != nil {
			t.Fatal(fresh, err)
		}
		if err := j.Done(t.Context(), env, errTest); err != nil {
			t.Fatal(err)
		}
		j.renewal.Lock() // when a compaction is done
		size := journalSize(dir)
		j.renewal.Unlock()
		if size > 3<<20 {
			t.Fatalf("for an event of 100 KiB the journal has %d bytes", size)
		}
	}
}

// TestLostWhileCompacting: to be taken over from is no failure of Close, wherever a compaction is.
func TestLostWhileCompacting(t *testing.T) {
	medium := newDisk()
	d := medium.process()
	j := openOn(t, d, 0)
	journalClaimed(t, j, "evt_1")
	d.hook = func(op, _ string) error {
		if op == "syncdir" {
			d.hook = nil
			openOn(t, medium.process(), 0)
		}
		return nil
	}
	if err := journalCompact(j); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// While an fsync fails slowly, who waits for a new file shares the failure of the one who tried to make it.
func TestSlowFailure(t *testing.T) {
	const count = 100
	medium := newDisk()
	d := medium.process()
	j := openOn(t, d, 0)
	tries := 0
	d.hook = func(op, path string) error {
		if op != "sync" {
			return nil
		}
		if tries++; tries == 2 { // the first is that of the claim
			journalWait(t, "the claims", func() bool {
				return strings.Count(stacks(), "[sync.Mutex.Lock") >= count-1
			})
		}
		return diskFails(op, path)
	}
	if fresh, err := j.Claim(t.Context(), journalEvent("evt_1", 0, 0)); fresh || err == nil {
		t.Fatal(fresh, err)
	}
	var claims sync.WaitGroup
	for i := range count {
		claims.Go(func() {
			fresh, err := j.Claim(t.Context(), journalEvent(fmt.Sprint("evt_", i), 0, 0))
			if fresh {
				t.Error("an event was claimed")
			}
			journalExpectStep(t, err)
		})
	}
	claims.Wait()
	if tries != 2 {
		t.Errorf("%d fsyncs were tried", tries)
	}
	d.hook = nil
	journalClaimed(t, j, "evt_1")
}

// ended returns a context that has ended.
func ended() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// TestHangingDeduper: handling an event without its Deduper takes one attempt to record the end, not one for each of the
// times that the end of a claim is worth.
func TestHangingDeduper(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil, WithConcurrency(1))
		hang := func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}
		r.store.onClaim = func(ctx context.Context, _ *Envelope) error { return hang(ctx) }
		r.store.onDone = func(ctx context.Context, _ *Envelope, _ error) error { return hang(ctx) }
		r.deliver(t, "evt_1", "case_1")
		time.Sleep(time.Hour)
		expectList(t, "store", r.store.noted(), "claim evt_1", "done evt_1 <nil>")
		expectList(t, "callbacks", r.called(), "evt_1")
	})
}

// TestGoexitAndPanic: a callback that ends its goroutine costs no more than that, whatever else it does; and one that
// returns the error that stands for it ends none.
func TestGoexitAndPanic(t *testing.T) {
	for name, f := range map[string]func() error{
		"Goexit": func() error { runtime.Goexit(); return nil },
		"a panic in a deferred function": func() error {
			defer func() { panic("deferred") }()
			runtime.Goexit()
			return nil
		},
		"the error of another's Goexit": func() error { return errGoexit },
	} {
		inBubble(t, name, func(t *testing.T) {
			running, most := 0, 0
			r := newRig(t, func(_ context.Context, env *Envelope) error {
				if env.EventID == "evt_1" {
					return f()
				}
				running++
				most = max(most, running)
				time.Sleep(time.Second)
				running--
				return nil
			}, WithConcurrency(1), WithRetry(1, 0))
			r.deliver(t, "evt_1", "case_1")
			synctest.Wait()
			r.deliver(t, "evt_2", "case_2")
			r.deliver(t, "evt_3", "case_3")
			deadline, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			if err := r.Shutdown(deadline); err != nil {
				t.Error("Shutdown:", err)
			}
			expectList(t, "callbacks", r.called(), "evt_1", "evt_2", "evt_3")
			expectEqual(t, "callbacks at once", most, 1)
		})
	}
}

// TestRoomOfFailed: as many events as the backlog holds take no room once they have failed, whichever failed first.
func TestRoomOfFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := make(map[string]int)
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			if calls[env.EventID]++; calls[env.EventID] == 1 && env.EventID != "evt_0" {
				return errTest
			}
			return nil
		}, WithBacklog(1), WithRetry(2, time.Hour))
		r.deliver(t, "evt_0", "case_0")
		synctest.Wait()
		r.deliver(t, "evt_1", "case_1") // rests for 45 to 75 minutes
		time.Sleep(40 * time.Minute)
		r.deliver(t, "evt_2", "case_2")
		time.Sleep(40 * time.Minute)
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Retrying, Handled)
		r.deliver(t, "evt_3", "case_3")
		if err := r.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		expectEqual(t, "room taken", len(r.room), 0)
		expectEqual(t, "failed", r.failed, 0)
	})
}

// TestShutdownWaitsForTheObserver: whoever waits for Shutdown has been told everything.
func TestShutdownWaitsForTheObserver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		told := false
		r := Handler(Callbacks{Other: func(context.Context, *Envelope) error { return errTest }}, WithRetry(1, 0),
			WithObserver(func(_ context.Context, o Observation) {
				if o.Outcome == GaveUp {
					time.Sleep(time.Second)
					told = true
				}
			}))
		_, _ = r.Deliver(t.Context(), []byte(`{"event_id":"evt_1"}`))
		synctest.Wait() // the event has ended, but for that
		if err := r.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		expectEqual(t, "told that it gave up", told, true)
	})
}

// TestShutdownRecords: when its time is over, Shutdown tries once more to record what has ended.
func TestShutdownRecords(t *testing.T) {
	for want, result := range map[string]error{"<nil>": nil, errTest.Error(): errTest} {
		inBubble(t, want, func(t *testing.T) {
			away := true
			r := newRig(t, func(context.Context, *Envelope) error { return result }, WithRetry(1, 0))
			r.store.onDone = func(context.Context, *Envelope, error) error {
				if away {
					return errors.New("the store is away")
				}
				return nil
			}
			r.deliver(t, "evt_1", "case_1")
			synctest.Wait()
			away = false
			_ = r.Shutdown(ended())
			expectList(t, "store", r.store.noted(), "claim evt_1", "done evt_1 "+want, "done evt_1 "+want)
			expectEqual(t, "told as unfinished", r.count(Unfinished), 0)
		})
	}
	inBubble(t, "slowly", func(t *testing.T) {
		const events, callbacks = 1000, 32
		wait := func(ctx context.Context, _ *Envelope) error { <-ctx.Done(); return ctx.Err() }
		r := newRig(t, wait, WithConcurrency(callbacks))
		var atOnce, crowds atomic.Int32
		r.store.onDone = func(ctx context.Context, _ *Envelope, _ error) error {
			if atOnce.Add(1) > 2*callbacks { // those of the callbacks that end, and as many for those that wait
				crowds.Add(1)
			}
			defer atOnce.Add(-1)
			time.Sleep(100 * time.Millisecond)
			return ctx.Err()
		}
		for i := range events {
			r.deliver(t, fmt.Sprint("evt_", i), "")
		}
		start := time.Now()
		_ = r.Shutdown(ended())
		if took := time.Since(start); took > 4*time.Second {
			t.Errorf("Shutdown took %s", took)
		}
		time.Sleep(time.Minute)
		expectEqual(t, "open again", strings.Count(strings.Join(r.store.noted(), " "), "done"), events)
		expectEqual(t, "told as unfinished", r.count(Unfinished), events)
		expectEqual(t, "too many calls at once", crowds.Load(), 0)
	})
	inBubble(t, "being recorded", func(t *testing.T) {
		r := newRig(t, nil)
		r.store.onDone = func(context.Context, *Envelope, error) error { time.Sleep(time.Second); return nil }
		r.deliver(t, "evt_1", "case_1")
		synctest.Wait()
		_ = r.Shutdown(ended())
		time.Sleep(time.Minute)
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Handled)
	})
	inBubble(t, "inbox", func(t *testing.T) {
		in := &fakeInbox{onDone: func(*Envelope) error { return errors.New("the store is away") }}
		for want := 1; want >= 0; want-- {
			r := newRig(t, nil, WithInbox(in))
			if want == 1 {
				r.deliver(t, "evt_1", "case_1")
			}
			synctest.Wait()
			in.change(func() { in.onDone = nil })
			_ = r.Shutdown(ended())
			expectEqual(t, "callbacks", len(r.called()), want)
		}
	})
}

// TestTwoShutdowns: one that waits returns when the other has told what is left. The ids are opened with the values of
// the requests, and a store that does not heed its context holds that up once.
func TestTwoShutdowns(t *testing.T) {
	for _, slow := range []time.Duration{time.Second, time.Minute} {
		inBubble(t, slow.String(), func(t *testing.T) {
			type key struct{}
			r := newRig(t, func(context.Context, *Envelope) error { return errTest }, WithRetry(2, time.Hour), WithConcurrency(1))
			r.store.onDone = func(ctx context.Context, env *Envelope, _ error) error {
				time.Sleep(slow)
				expectEqual(t, "value", ctx.Value(key{}), any(env.EventID))
				return nil
			}
			for _, id := range []string{"evt_1", "evt_2", "evt_3"} {
				ctx := context.WithValue(t.Context(), key{}, id)
				if _, err := r.Deliver(ctx, eventBody(id, id)); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
			var waiting sync.WaitGroup
			waiting.Go(func() {
				if err := r.Shutdown(context.Background()); err != nil {
					t.Error(err)
				}
				expectEqual(t, "told as unfinished", r.count(Unfinished), 3)
			})
			synctest.Wait()
			start := time.Now()
			if err := r.Shutdown(ended()); err != context.Canceled {
				t.Errorf("Shutdown returns %v", err)
			}
			expectEqual(t, "Shutdown took", time.Since(start), min(3*slow, time.Minute))
			waiting.Wait()
		})
	}
}

// TestDriftAndPanic: the observer is told of drift also where Other panics.
func TestDriftAndPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(_ context.Context, env *Envelope) error {
			if env.EventID == "evt_1" {
				panic("surprised")
			}
			return nil
		}, WithRetry(2, 0))
		for _, id := range []string{"evt_1", "evt_2"} {
			body := `{"event_id":"` + id + `","event_type":"case.completed","data":{"caseId":7}}`
			if _, err := r.Deliver(t.Context(), []byte(body)); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		told := r.observations("evt_2")
		expectEqual(t, "outcome", told[1].Outcome, Handled)
		expectEqual(t, "its error", told[1].Err.Error(), "offloadhook: data does not fit: caseId is a JSON number, want string")
		expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Retrying, GaveUp)
		for _, o := range r.observations("evt_1")[1:] {
			if p := (*PanicError)(nil); !errors.As(o.Err, &p) || !strings.Contains(o.Err.Error(), "data does not fit") {
				t.Errorf("%s: %v", o.Outcome, o.Err)
			}
		}
	})
}

// TestInboxSlowPending: while a reading is slow, events that are in memory do not keep it from those behind them.
func TestInboxSlowPending(t *testing.T) {
	for name, in := range map[string]*fakeInbox{
		"first": {onPending: func(int) error { time.Sleep(6 * time.Second); return nil }},
		"each":  {onYield: func(int, string) { time.Sleep(100 * time.Millisecond) }},
	} {
		inBubble(t, name, func(t *testing.T) {
			r := newRig(t, func(_ context.Context, env *Envelope) error {
				if strings.HasPrefix(env.EventID, "evt_stuck") {
					return errTest
				}
				return nil
			}, WithInbox(in), WithRetry(1000, time.Second))
			for i := range 60 {
				r.deliver(t, fmt.Sprint("evt_stuck_", i), fmt.Sprint("case_stuck_", i))
			}
			time.Sleep(time.Hour)
			r.deliver(t, "evt_1", "case_1")
			time.Sleep(time.Minute)
			expectList(t, "outcomes", r.outcomes("evt_1"), Accepted, Handled)
			_ = r.Shutdown(ended())
		})
	}
}

// Retrying at once costs the same for each attempt: jitter would else count them with the receiver locked.
func TestNoRest(t *testing.T) {
	expectEqual(t, "rest", jitter(0, math.MaxInt, longestRest), 0)
}

// What has ended is not read over again and again: it leaves the order as soon as nothing older is left.
func TestOrderFollows(t *testing.T) {
	j := openOn(t, newDisk().process(), 0)
	for i := range 10 {
		journalClaimed(t, j, fmt.Sprint("evt_", i))
	}
	first := weak.Make(j.order[0])
	for i := range 10 {
		if err := j.Done(t.Context(), journalEvent(fmt.Sprint("evt_", i), 0, 0), nil); err != nil {
			t.Fatal(err)
		}
		expectEqual(t, "in order", len(j.order), 9-i)
	}
	if runtime.GC(); first.Value() != nil {
		t.Error("a claim that has ended stays in memory")
	}
	journalClaimed(t, j, "evt_first") // it stays, and those behind it end
	for range 5000 {
		if err := j.Done(t.Context(), journalClaimed(t, j, "evt_second"), errTest); err != nil {
			t.Fatal(err)
		}
	}
	if len(j.order) > 2000 {
		t.Errorf("%d claims are in order, of which 2 are alive", len(j.order))
	}
}

// Three deliveries of a case at once: the third waits for the second, though the first is decided.
func TestInboxThirdClaimIsNotOvertaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		answers := map[string]chan error{"evt_0": make(chan error), "evt_1": make(chan error)}
		in := &fakeInbox{onClaim: func(_ context.Context, env *Envelope) error {
			if answer := answers[env.EventID]; answer != nil {
				return <-answer
			}
			return nil
		}}
		r := newRig(t, nil, WithInbox(in))
		synctest.Wait() // it has caught up
		first := r.deliverAsync("evt_0", "case_1")
		synctest.Wait()
		second := r.deliverAsync("evt_1", "case_1")
		synctest.Wait()
		answers["evt_0"] <- nil
		<-first
		third := r.deliverAsync("evt_2", "case_1")
		synctest.Wait()
		answers["evt_1"] <- nil
		if !(<-second).fresh || !(<-third).fresh {
			t.Error("not accepted")
		}
		synctest.Wait()
		expectList(t, "callbacks", r.called(), "evt_0", "evt_1", "evt_2")
	})
}

// What is over leaves nothing in memory.
func TestInboxForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil, WithInbox(new(fakeInbox)))
		synctest.Wait()
		for i := range 100 {
			r.deliver(t, fmt.Sprint("evt_", i), fmt.Sprint("case_", i))
		}
		synctest.Wait()
		r.Receiver.mu.Lock()
		defer r.Receiver.mu.Unlock()
		expectEqual(t, "left in memory", len(r.tasks)+len(r.tails)+len(r.lastClaims)+len(r.ready)+len(r.room), 0)
	})
}

// Of two stores the last counts, but an Inbox before any plain Deduper (promise 1).
func TestTwoStores(t *testing.T) {
	inbox, other := new(fakeInbox), new(fakeInbox)
	first, last := new(spyStore), new(spyStore)
	for _, test := range []struct {
		name string
		opts []Option
		want Deduper
	}{
		{"two Dedupers", []Option{WithDeduper(first), WithDeduper(last)}, last},
		{"two Inboxes", []Option{WithInbox(other), WithInbox(inbox)}, inbox},
		{"an Inbox last", []Option{WithDeduper(first), WithInbox(inbox)}, inbox},
		{"an Inbox first", []Option{WithInbox(inbox), WithDeduper(last)}, inbox},
	} {
		inBubble(t, test.name, func(t *testing.T) {
			r := Handler(Callbacks{}, test.opts...)
			if _, isInbox := test.want.(Inbox); r.store != test.want || (r.inbox != nil) != isInbox {
				t.Errorf("got %T and the Inbox %v, want %T", r.store, r.inbox, test.want)
			}
			if err := r.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// What arrives during a long reading takes room, too: what finds none stays in the inbox, and is handled later.
func TestInboxArrivalsTakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const backlog, events = 10, 100
		in := &fakeInbox{onPending: func(int) error { time.Sleep(5 * time.Second); return nil }}
		r := newRig(t, nil, WithInbox(in), WithBacklog(backlog))
		time.Sleep(sweepEvery + time.Second) // the first reading is over, the second goes on
		synctest.Wait()
		for i := range events {
			r.deliver(t, fmt.Sprint("evt_", i), "")
		}
		r.Receiver.mu.Lock()
		if held := len(r.tasks); held == 0 || held > backlog {
			t.Errorf("%d events in memory, want at most %d", held, backlog)
		}
		r.Receiver.mu.Unlock()
		time.Sleep(time.Hour)
		synctest.Wait()
		expectEqual(t, "callbacks", len(r.called()), events)
	})
}

// A reading fails while an event arrives behind one that it has not come to.
func TestInboxFailedReadingIsNotOvertaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r *rig
		in := new(fakeInbox)
		in.onPending = func(call int) error {
			if call != 2 {
				return nil
			}
			r.deliver(t, "evt_1", "case_1")
			return errTest
		}
		r = newRig(t, nil, WithInbox(in))
		synctest.Wait() // it has caught up
		in.change(func() { in.put("evt_0", "case_1") })
		time.Sleep(sweepEvery + 2*storeRest)
		synctest.Wait()
		expectList(t, "callbacks", r.called(), "evt_0", "evt_1")
	})
}

// An inbox that fails is not read anew for every event that ends.
func TestFailingInboxRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := &fakeInbox{goesOn: true, onPending: func(int) error { return errTest }}
		for i := range 20 {
			in.put(fmt.Sprint("evt_", i), "case_1")
		}
		r := newRig(t, func(context.Context, *Envelope) error { time.Sleep(10 * time.Millisecond); return nil }, WithInbox(in))
		time.Sleep(storeRest - time.Millisecond)
		synctest.Wait()
		expectEqual(t, "callbacks", len(r.called()), 20)
		expectEqual(t, "readings", len(in.readings()), 1)
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		expectEqual(t, "readings after the rest", len(in.readings()), 2)
	})
}

// A claim that hangs holds up no later reading: a shared store renews its lease there.
func TestHangingClaimAndReadings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		in := &fakeInbox{onClaim: func(context.Context, *Envelope) error { <-release; return nil }}
		r := newRig(t, nil, WithInbox(in))
		synctest.Wait() // it has caught up
		first := r.deliverAsync("evt_1", "case_1")
		time.Sleep(3*sweepEvery + time.Second)
		expectEqual(t, "readings", len(in.readings()), 4)
		close(release)
		<-first
		time.Sleep(sweepEvery)
		synctest.Wait()
		expectList(t, "callbacks", r.called(), "evt_1")
	})
}

// Of a block of ids that compaction keeps, none is forgotten before its time.
func TestBlockKeepsTheLastTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk().process()
		j := openOn(t, d, 24*time.Hour)
		for _, id := range []string{"evt_1", "evt_2"} {
			if err := j.Done(t.Context(), journalClaimed(t, j, id), nil); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Hour)
		}
		openOn(t, d, 24*time.Hour) // which compacts
		time.Sleep(13 * time.Hour) // 23 since evt_2 was done
		j = openOn(t, d, 24*time.Hour)
		if fresh, err := j.Claim(t.Context(), journalEvent("evt_2", 0, 0)); fresh || err != nil {
			t.Errorf("Claim of evt_2: %t, %v, want a duplicate", fresh, err)
		}
	})
}

// Compactions take no more than a small multiple of what they leave behind: neither many finished ids nor a compaction
// that fails bring on one after another.
func TestCompactionsAreFew(t *testing.T) {
	for _, test := range []struct {
		name  string
		fails bool
		most  int
	}{
		{"that succeed", false, 10}, // each leaves more than 1 MiB of garbage behind, of about 5 MB in all
		{"that fail", true, 10},     // each time twice as much
	} {
		t.Run(test.name, func(t *testing.T) {
			d := newDisk().process()
			j := openOn(t, d, 0)
			tries := 0 // renewal is held
			d.hook = func(op, path string) error {
				if op == "create" && strings.HasSuffix(path, ".tmp") {
					if tries++; test.fails {
						return diskFails(op, path)
					}
				}
				return nil
			}
			n := 0
			for i := 0; i < 30_000 && n <= test.most; i++ {
				env := journalClaimed(t, j, fmt.Sprintf("evt_%d", i))
				if err := j.Done(t.Context(), env, nil); err != nil {
					t.Fatal(err)
				}
				j.renewal.Lock() // until a compaction that this began has ended
				n = tries
				j.renewal.Unlock()
			}
			if n < 2 || n > test.most {
				t.Errorf("%d compactions, want 2 to %d", n, test.most)
			}
		})
	}
}

// A compaction that succeeds ends the waiting after one that failed.
func TestSlackEnds(t *testing.T) {
	d := newDisk().process()
	j := openOn(t, d, 0)
	m := newJournalModel(t)
	m.claim(j, journalEvent("evt_1", 0, 0))
	d.failWhere(func(op, _ string) bool { return op == "rename" })
	j.renewal.Lock()
	j.compact()
	if j.slack == 0 {
		t.Fatal("it has not failed")
	}
	if _, told := m.pending(j); len(told) != 1 || !errors.Is(told[0], errDisk) {
		t.Errorf("Pending yields the errors %v, want that of the disk", told)
	}
	d.hook = nil
	j.renewal.Lock()
	j.compact()
	expectEqual(t, "slack", j.slack, int64(0))
}
