package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"offloadhook"
)

// offload is a stand-in for Offload: its API, and its webhooks.
type offload struct {
	mu     sync.Mutex // protects what follows
	cases  map[string]map[string]any
	faults []func(http.ResponseWriter) // each answers one request to the API
	asked  []time.Time
}

func newOffload() *offload { return &offload{cases: make(map[string]map[string]any)} }

// add adds a case as GET /cases/{id} shows it.
func (o *offload) add(id, status string, updated time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c := map[string]any{
		"caseId": id, "clientReferenceId": nil, "status": status, "channel": "EMAIL", "attemptCount": 1, "maxAttempts": 3,
		"attachments": []any{}, "resultStatus": nil, "result": nil, "goal": "a signed W-9", "inputRequest": nil,
		"createdAt": updated.Add(-time.Hour).UnixMilli(), "updatedAt": updated.UnixMilli(),
	}
	switch status {
	case "COMPLETED":
		c["resultStatus"], c["result"] = "goal_achieved", json.RawMessage(`{"total":12345678901234567890}`)
	case "FAILED":
		c["resultStatus"] = "max_retries"
	case "INPUT_NEEDED":
		c["inputRequest"] = map[string]any{"id": "q1", "question": "Tuesday?", "status": "PENDING",
			"requestedAt": updated.UnixMilli()}
	}
	o.cases[id] = c
}

// webhook returns the webhook of a case, with what the API does not tell.
func (o *offload) webhook(id string) []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	c := o.cases[id]
	t := map[any]offloadhook.EventType{"COMPLETED": offloadhook.TypeCaseCompleted, "FAILED": offloadhook.TypeCaseFailed,
		"INPUT_NEEDED": offloadhook.TypeCaseInputNeeded}[c["status"]]
	body, err := json.Marshal(map[string]any{
		"event_id":   offloadhook.EventID(id, t, offloadhook.Millis(c["updatedAt"].(int64))),
		"event_type": t,
		"timestamp":  c["updatedAt"],
		"data":       map[string]any{"caseId": id, "status": c["status"], "metadata": map[string]any{"by": "webhook"}},
	})
	if err != nil {
		panic(err)
	}
	return body
}

// ServeHTTP is the API.
func (o *offload) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.asked = append(o.asked, time.Now())
	if len(o.faults) > 0 {
		fault := o.faults[0]
		o.faults = o.faults[1:]
		fault(w)
		return
	}
	id, found := strings.CutPrefix(req.URL.Path, "/v1/cases/")
	c := o.cases[id]
	switch {
	case req.Method != http.MethodGet || !found:
		w.WriteHeader(http.StatusBadRequest)
	case req.Header.Get("x-api-key") != "key":
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"ok":false,"error":{"code":"UNAUTHORIZED","message":"bad key"}}`)
	case c == nil:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"ok":false,"error":{"code":"CASE_NOT_FOUND","message":"no such case"}}`)
	default:
		json.NewEncoder(w).Encode(map[string]any{"ok": true, "data": c})
	}
}

// RoundTrip lets a client reach the API without a network, which testing/synctest cannot see through.
func (o *offload) RoundTrip(req *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	o.ServeHTTP(w, req)
	return w.Result(), nil
}

// service is the user's: a receiver, and the events that its callbacks were given.
type service struct {
	*offloadhook.Receiver

	mu      sync.Mutex // protects handled
	handled map[string][]*offloadhook.Envelope
}

func newService() *service {
	s := &service{handled: make(map[string][]*offloadhook.Envelope)}
	s.Receiver = offloadhook.Handler(offloadhook.Callbacks{
		Other: func(_ context.Context, env *offloadhook.Envelope) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.handled[env.EventID] = append(s.handled[env.EventID], env)
			return nil
		},
	})
	return s
}

func newReconciler(o *offload, key string, deliver func(context.Context, []byte) (bool, error)) *reconciler {
	return &reconciler{
		api:     newAPI("https://api.invalid/v1/", key, 5, o),
		deliver: deliver,
		minAge:  5 * time.Minute,
		maxAge:  retention,
		log:     slog.New(slog.DiscardHandler),
	}
}

// TestDroppedWebhooks lets Offload drop two webhooks of three: those are repaired, the others are left alone, and in
// the end each event was handled once.
func TestDroppedWebhooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, s := newOffload(), newService()
		r := newReconciler(o, "key", s.Deliver)
		start := time.Now()
		var ids []string
		want := tally{}
		for i := range 30 {
			id := fmt.Sprintf("case_%02d", i)
			ids = append(ids, id)
			o.add(id, []string{"COMPLETED", "FAILED", "INPUT_NEEDED", "RUNNING", "CREATED"}[i%5], start.Add(-time.Hour))
			switch {
			case i%5 > 2:
				want.none++
			case i%3 > 0:
				want.repaired++
			default:
				want.known++
				if fresh, err := s.Deliver(t.Context(), o.webhook(id)); !fresh || err != nil {
					t.Fatalf("the webhook of %s: fresh %v, %v", id, fresh, err)
				}
			}
		}
		if got, err := r.run(t.Context(), ids); got != want || err != nil {
			t.Errorf("the first round: %+v, %v, want %+v", got, err, want)
		}
		if took := time.Since(start); took != 29*time.Second/5 {
			t.Errorf("30 requests at 5 a second took %s", took)
		}
		want.known, want.repaired = want.known+want.repaired, 0
		if got, err := r.run(t.Context(), ids); got != want || err != nil {
			t.Errorf("the second round: %+v, %v, want %+v", got, err, want)
		}
		// The webhooks that were only late are duplicates now.
		for i, id := range ids {
			if i%5 > 2 {
				continue
			}
			if fresh, err := s.Deliver(t.Context(), o.webhook(id)); fresh || err != nil {
				t.Errorf("the late webhook of %s: fresh %v, %v", id, fresh, err)
			}
		}
		if err := s.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(s.handled) != want.known {
			t.Errorf("%d events handled, want %d", len(s.handled), want.known)
		}
		for id, envelopes := range s.handled {
			if len(envelopes) != 1 {
				t.Errorf("%s was handled %d times", id, len(envelopes))
			}
		}
	})
}

// TestYoung leaves a case that was just updated to its webhook, which tells more.
func TestYoung(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, s := newOffload(), newService()
		r := newReconciler(o, "key", s.Deliver)
		o.add("case_1", "FAILED", time.Now())
		time.Sleep(4 * time.Minute)
		if got, err := r.run(t.Context(), []string{"case_1"}); got != (tally{young: 1}) || err != nil {
			t.Errorf("after 4 minutes: %+v, %v, want it left alone", got, err)
		}
		time.Sleep(time.Minute)
		if got, err := r.run(t.Context(), []string{"case_1"}); got != (tally{repaired: 1}) || err != nil {
			t.Errorf("after 5 minutes: %+v, %v, want it repaired", got, err)
		}
		o.add("case_1", "COMPLETED", time.Now().Add(-6*time.Minute)) // a later update is another event
		if got, err := r.run(t.Context(), []string{"case_1"}); got != (tally{repaired: 1}) || err != nil {
			t.Errorf("after another update: %+v, %v, want it repaired", got, err)
		}
		if err := s.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

// TestGivenUp leaves an event alone that a callback gave up: the store has it as the webhook brought it, and brings it
// back.
func TestGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffload()
		o.add("case_1", "FAILED", time.Now().Add(-time.Hour))
		journal, err := offloadhook.OpenJournal(t.TempDir(), 0)
		if err != nil {
			t.Fatal(err)
		}
		r := newReconciler(o, "key", nil)
		var handled []string
		receiver := offloadhook.Handler(offloadhook.Callbacks{
			Other: func(_ context.Context, env *offloadhook.Envelope) error {
				if handled = append(handled, string(env.Raw)); len(handled) == 1 {
					return errors.New("not yet")
				}
				return nil
			},
		}, offloadhook.WithInbox(journal), offloadhook.WithRetry(1, 0),
			offloadhook.WithObserver(func(_ context.Context, o offloadhook.Observation) { r.observe(o) }))
		r.deliver = receiver.Deliver
		if _, err := receiver.Deliver(t.Context(), o.webhook("case_1")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got, err := r.run(t.Context(), []string{"case_1"}); got != (tally{known: 1}) || err != nil {
			t.Errorf("after it was given up: %+v, %v, want it left alone", got, err)
		}
		time.Sleep(11 * time.Minute)
		if err := errors.Join(receiver.Shutdown(t.Context()), journal.Close()); err != nil {
			t.Error(err)
		}
		if want := string(o.webhook("case_1")); !slices.Equal(handled, []string{want, want}) {
			t.Errorf("handled %q, want twice %s", handled, want)
		}
		r.failing.Range(func(id, _ any) bool { t.Errorf("%s counts as failing", id); return true })
	})
}

// TestForgotten: the journal forgets what was handled long ago. A case that stays in the list is not handled again then.
func TestForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffload()
		o.add("case_1", "COMPLETED", time.Now().Add(-time.Hour))
		const remembered = 24 * time.Hour
		journal, err := offloadhook.OpenJournal(t.TempDir(), remembered)
		if err != nil {
			t.Fatal(err)
		}
		handled := 0
		receiver := offloadhook.Handler(offloadhook.Callbacks{
			Other: func(context.Context, *offloadhook.Envelope) error { handled++; return nil },
		}, offloadhook.WithInbox(journal))
		r := newReconciler(o, "key", nil)
		r.deliver, r.maxAge = receiver.Deliver, remembered-time.Hour
		var sum tally
		for range 40 {
			got, err := r.run(t.Context(), []string{"case_1"})
			if err != nil {
				t.Fatal(err)
			}
			sum = tally{repaired: sum.repaired + got.repaired, known: sum.known + got.known, old: sum.old + got.old}
			time.Sleep(time.Hour)
		}
		if err := errors.Join(receiver.Shutdown(t.Context()), journal.Close()); err != nil {
			t.Error(err)
		}
		if want := (tally{repaired: 1, known: 22, old: 17}); sum != want || handled != 1 {
			t.Errorf("%+v, handled %d times, want %+v, once", sum, handled, want)
		}
	})
}

// TestStatus: a supervisor can tell that another process has the journal now.
func TestStatus(t *testing.T) {
	if a, b := status(fmt.Errorf("life: %w", offloadhook.ErrClosed)), status(errors.New("no space")); a != 3 || b != 1 {
		t.Errorf("%d and %d, want 3 and 1", a, b)
	}
}

func TestFaults(t *testing.T) {
	type faults = []func(http.ResponseWriter)
	status := func(code int, header ...string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) {
			if len(header) > 0 {
				w.Header().Set(header[0], header[1])
			}
			w.WriteHeader(code)
		}
	}
	text := func(s string) faults {
		return faults{func(w http.ResponseWriter) { fmt.Fprint(w, s) }}
	}
	failed := tally{failed: 1}
	for _, test := range []struct {
		name     string
		faults   faults
		want     tally
		asked    int
		min, max time.Duration // from the first request to the end
	}{
		{"429 that says when", slices.Repeat(faults{status(429, "Retry-After", "7")}, 2), tally{repaired: 1}, 3,
			14 * time.Second, 14 * time.Second},
		{"429 that says too much", faults{status(429, "Retry-After", "999999999999")}, tally{repaired: 1}, 2,
			longRest, longRest},
		{"5xx", faults{status(500), status(502), status(503)}, tally{repaired: 1}, 4, 7 * time.Second, 9 * time.Second},
		{"5xx for ever", slices.Repeat(faults{status(500)}, attempts), failed, attempts, 31 * time.Second, 39 * time.Second},
		{"403", faults{status(403)}, failed, 1, 0, 0},
		{"404", faults{status(404)}, failed, 1, 0, 0},
		{"a redirect", faults{status(302, "Location", "https://elsewhere.invalid/")}, failed, 1, 0, 0},
		{"no JSON", text("<html>"), failed, 1, 0, 0},
		{"not ok", text(`{"ok":false,"data":{"caseId":"case_1","status":"FAILED","updatedAt":1}}`), failed, 1, 0, 0},
		{"no data", text(`{"ok":true}`), failed, 1, 0, 0},
		{"another case", text(`{"ok":true,"data":{"caseId":"case_2","status":"FAILED","updatedAt":1}}`), failed, 1, 0, 0},
		{"no updatedAt", text(`{"ok":true,"data":{"caseId":"case_1","status":"FAILED"}}`), failed, 1, 0, 0},
		{"no question", text(`{"ok":true,"data":{"caseId":"case_1","status":"INPUT_NEEDED","updatedAt":1}}`),
			failed, 1, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o, s := newOffload(), newService()
				o.faults = test.faults
				o.add("case_1", "COMPLETED", time.Now().Add(-time.Hour))
				got, err := newReconciler(o, "key", s.Deliver).run(t.Context(), []string{"case_1"})
				if got != test.want || err != nil {
					t.Errorf("%+v, %v, want %+v", got, err, test.want)
				}
				if len(o.asked) != test.asked {
					t.Errorf("%d requests, want %d", len(o.asked), test.asked)
				}
				if took := time.Since(o.asked[0]); took < test.min || took > test.max {
					t.Errorf("took %s, want %s to %s", took, test.min, test.max)
				}
				if err := s.Shutdown(t.Context()); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
	t.Run("away", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			o, s := newOffload(), newService()
			r := newReconciler(o, "key", s.Deliver)
			ids := []string{"case_1", "case_2", "case_3", "case_4", "case_5"}
			for _, id := range ids {
				o.add(id, "COMPLETED", time.Now().Add(-time.Hour))
			}
			// The first case uses up its attempts, the second and third have one each, the fourth shows that the API is
			// back, and the fifth is tried again.
			o.faults = slices.Repeat(faults{status(500)}, attempts+1)
			o.faults = append(o.faults, status(429, "Retry-After", "50"), status(404), status(500))
			got, err := r.run(t.Context(), ids)
			if want := (tally{failed: 4, repaired: 1}); got != want || err != nil {
				t.Errorf("%+v, %v, want %+v", got, err, want)
			}
			if len(o.asked) != attempts+5 {
				t.Fatalf("%d requests, want %d", len(o.asked), attempts+5)
			}
			for i := range attempts + 4 {
				if rest := o.asked[i+1].Sub(o.asked[i]); rest < r.api.pause {
					t.Errorf("a request came %s after the one before", rest)
				}
			}
			if rest := o.asked[attempts+2].Sub(o.asked[attempts+1]); rest != 50*time.Second {
				t.Errorf("the next case was asked for after %s, want the 50s that the API told", rest)
			}
			if err := s.Shutdown(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	})
	t.Run("a wrong key", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			o, s := newOffload(), newService()
			got, err := newReconciler(o, "guessed", s.Deliver).run(t.Context(), []string{"case_1", "case_2"})
			if got != (tally{}) || !errors.Is(err, errKey) || len(o.asked) != 1 {
				t.Errorf("%+v, %v after %d requests, want errKey after one", got, err, len(o.asked))
			}
		})
	})
	t.Run("interrupted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			o, s := newOffload(), newService()
			ctx, cancel := context.WithTimeout(t.Context(), 900*time.Millisecond)
			defer cancel()
			got, err := newReconciler(o, "key", s.Deliver).run(ctx, slices.Repeat([]string{"case_404"}, 100))
			if got.failed != 5 || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%+v, %v, want what the time allows", got, err)
			}
		})
	})
	t.Run("closed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			o, s := newOffload(), newService()
			o.add("case_1", "FAILED", time.Now().Add(-time.Hour))
			if err := s.Shutdown(t.Context()); err != nil {
				t.Fatal(err)
			}
			got, err := newReconciler(o, "key", s.Deliver).run(t.Context(), []string{"case_1", "case_1"})
			if got != (tally{}) || !errors.Is(err, offloadhook.ErrClosed) {
				t.Errorf("%+v, %v, want ErrClosed", got, err)
			}
		})
	})
}

// TestEvent checks that an event made here fits the structs, and says what the API says.
func TestEvent(t *testing.T) {
	updated := time.UnixMilli(1774131900000)
	o := newOffload()
	parsed := func(t *testing.T, text string) *offloadhook.Envelope {
		t.Helper()
		var c state
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Fatal(err)
		}
		id, body, err := event(&c)
		if err != nil {
			t.Fatal(err)
		}
		env, err := offloadhook.ParseEnvelope(body)
		if err != nil || env.EventID != id {
			t.Fatalf("%s: %+v, %v", id, env, err)
		}
		return env
	}
	get := func(t *testing.T, status string) *offloadhook.Envelope {
		t.Helper()
		o.add("case_1", status, updated)
		text, err := json.Marshal(o.cases["case_1"])
		if err != nil {
			t.Fatal(err)
		}
		return parsed(t, string(text))
	}
	t.Run("completed", func(t *testing.T) {
		env := get(t, "COMPLETED")
		var c offloadhook.CaseCompleted
		if err := json.Unmarshal(env.Data, &c); err != nil || string(c.Result) != `{"total":12345678901234567890}` ||
			c.ResultStatus != offloadhook.ResultGoalAchieved || c.Metadata != nil {
			t.Errorf("%+v, %v", c, err)
		}
		if env.EventID != "evt_case_1_case_completed_1774131900000" || env.Timestamp != 1774131900000 {
			t.Errorf("%+v", env)
		}
	})
	t.Run("completed without a result", func(t *testing.T) {
		if env := parsed(t, `{"caseId":"c","status":"COMPLETED","updatedAt":1,"result":null}`); string(env.Data) !=
			`{"caseId":"c","status":"COMPLETED"}` {
			t.Errorf("%s, want no result", env.Data)
		}
	})
	t.Run("drifted", func(t *testing.T) {
		const data = `{"attachments":[{"new":1}],"attemptCount":"2","caseId":"c","channel":["EMAIL"],"status":"FAILED"}`
		env := parsed(t, `{"updatedAt":1,"goal":{},"clientReferenceId":null,`+data[1:])
		if string(env.Data) != data {
			t.Errorf("%s, want %s", env.Data, data)
		}
	})
	t.Run("failed", func(t *testing.T) {
		env := get(t, "FAILED")
		var c offloadhook.CaseFailed
		err := json.Unmarshal(env.Data, &c)
		if err != nil || c.ResultStatus != offloadhook.ResultMaxRetries || c.FailureReason != "" {
			t.Errorf("%+v, %v", c, err)
		}
	})
	t.Run("input needed", func(t *testing.T) {
		env := get(t, "INPUT_NEEDED")
		want := offloadhook.CaseInputNeeded{InputRequest: "Tuesday?", InputRequestID: "q1", InputRequestStatus: "PENDING",
			InputRequestedAt: 1774131900000}
		var c offloadhook.CaseInputNeeded
		if err := json.Unmarshal(env.Data, &c); err != nil {
			t.Fatal(err)
		}
		want.Case = c.Case
		if fmt.Sprint(c) != fmt.Sprint(want) || c.CaseID != "case_1" || env.EventType != offloadhook.TypeCaseInputNeeded {
			t.Errorf("%+v, want %+v", c, want)
		}
	})
}

// TestRun runs the program, with a journal and over a loopback connection.
func TestRun(t *testing.T) {
	o := newOffload()
	for i, status := range []string{"COMPLETED", "FAILED", "INPUT_NEEDED", "RUNNING"} {
		o.add(fmt.Sprintf("case_%d", i), status, time.Now().Add(-time.Hour))
	}
	server := httptest.NewServer(o)
	defer server.Close()
	env := map[string]string{"OFFLOAD_API_URL": server.URL + "/v1", "OFFLOAD_API_KEY": "key"}
	getenv := func(name string) string { return env[name] }
	dir := filepath.Join(t.TempDir(), "journal")
	round := func(stdin string, args ...string) (events []string, log string, err error) {
		var out, logged bytes.Buffer
		args = append([]string{"-dir", dir, "-rate", "1000"}, args...)
		err = run(t.Context(), args, getenv, strings.NewReader(stdin), &out, slog.New(slog.NewTextHandler(&logged, nil)))
		for line := range bytes.Lines(out.Bytes()) {
			env, err := offloadhook.ParseEnvelope(line)
			if err != nil {
				t.Fatal(err)
			}
			events = append(events, env.EventID)
		}
		return events, logged.String(), err
	}

	events, log, err := round("# the important ones\ncase_0\n\n case_1 \ncase_2\ncase_3\n")
	if err != nil || len(events) != 3 || !strings.Contains(log, "repaired=3 known=0 too_young=0 too_old=0 no_event=1 failed=0") {
		t.Fatalf("the first round: %v, events %v\n%s", err, events, log)
	}
	file := filepath.Join(t.TempDir(), "cases.txt")
	if err := os.WriteFile(file, []byte("case_0\ncase_1\ncase_9\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	events, log, err = round("", file)
	if err == nil || len(events) != 0 || !strings.Contains(log, "repaired=0 known=2 too_young=0 too_old=0 no_event=0 failed=1") {
		t.Fatalf("the second round, with a case that is missing: %v, events %v\n%s", err, events, log)
	}
	for _, args := range [][]string{
		{"-every", "1m"}, {"-rate", "0"}, {"one", "two"}, {"-dir", ""}, {"-addr", "127.0.0.1:0", file},
	} {
		if _, log, err := round("", args...); err == nil || strings.Contains(log, "reconciled") {
			t.Errorf("%v: no error\n%s", args, log)
		}
	}
	env["OFFLOAD_TOKEN"] = "one,,two"
	if _, _, err := round("case_0\n"); err == nil {
		t.Error("with an empty token: no error")
	}
	delete(env, "OFFLOAD_TOKEN")
	for _, bad := range []struct{ name, value string }{
		{"OFFLOAD_API_KEY", ""}, {"OFFLOAD_API_KEY", "hunter2\n"}, {"OFFLOAD_API_URL", "api.example.com"},
		{"OFFLOAD_TOKEN", "hunter2\n"}, {"OFFLOAD_TOKEN", "new, hunter2"},
	} {
		before := env[bad.name]
		env[bad.name] = bad.value
		_, _, err := round("case_0\n")
		if err == nil || !strings.Contains(err.Error(), bad.name) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("with %q as %s: %v", bad.value, bad.name, err)
		}
		env[bad.name] = before
	}
}

// TestIDsFirst: until the ids are read the journal is left alone, which another process may be using.
func TestIDsFirst(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	log := slog.New(slog.DiscardHandler)
	if err := run(t.Context(), []string{"-dir", dir, filepath.Join(dir, "missing")}, someAPI, nil, io.Discard, log); err == nil {
		t.Error("a file that is missing: no error")
	}
	stdin := readerFunc(func([]byte) (int, error) { return 0, errors.New("broken") })
	if err := run(t.Context(), []string{"-dir", dir}, someAPI, stdin, io.Discard, log); err == nil {
		t.Error("ids that cannot be read: no error")
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory of the journal: %v, want none", err)
	}
}

// readerFunc is called to read.
type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestUnhandled: one round whose events are not handled ends with an error.
func TestUnhandled(t *testing.T) {
	dir := t.TempDir()
	journal, err := offloadhook.OpenJournal(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	env, err := offloadhook.ParseEnvelope([]byte(`{"event_id":"evt_1"}`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := journal.Claim(t.Context(), env); err != nil {
		t.Fatal(err)
	}
	if err := journal.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	out := writerFunc(func([]byte) {
		stop() // rather than wait for all attempts
		panic("no space")
	})
	err = run(ctx, []string{"-dir", dir}, someAPI, strings.NewReader(""), out, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "1 failing events") {
		t.Errorf("run = %v", err)
	}
}

// TestSettle checks that one round ends when every event is handled, not when every event is delivered.
func TestSettle(t *testing.T) {
	o := newOffload()
	var ids strings.Builder
	for i := range 100 {
		o.add(fmt.Sprintf("case_%d", i), "FAILED", time.Now().Add(-time.Hour))
		fmt.Fprintf(&ids, "case_%d\n", i)
	}
	server := httptest.NewServer(o)
	defer server.Close()
	env := map[string]string{"OFFLOAD_API_URL": server.URL + "/v1", "OFFLOAD_API_KEY": "key"}
	delivered := make(chan struct{})
	log := slog.New(slog.NewTextHandler(writerFunc(func(line []byte) {
		if bytes.Contains(line, []byte("repaired=100")) {
			close(delivered)
		}
	}), nil))
	handled := 0
	out := writerFunc(func([]byte) { // one at a time: worker sees to that
		<-delivered
		handled++
	})
	args := []string{"-dir", t.TempDir(), "-rate", "10000"}
	err := run(t.Context(), args, func(name string) string { return env[name] }, strings.NewReader(ids.String()), out, log)
	if err != nil || handled != 100 {
		t.Errorf("%d events handled, want 100: %v", handled, err)
	}
}

// TestInterrupted: to be interrupted while events wait is an error.
func TestInterrupted(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := settle(ctx, neverEmpty{}); err == nil {
		t.Error("no error")
	}
}

// neverEmpty is an Inbox of which only Pending may be called.
type neverEmpty struct{ offloadhook.Inbox }

func (neverEmpty) Pending(context.Context) iter.Seq2[*offloadhook.Envelope, error] {
	return func(yield func(*offloadhook.Envelope, error) bool) { yield(new(offloadhook.Envelope), nil) }
}

// TestStop stops the program in the middle of a round.
func TestStop(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cases.txt")
	if err := os.WriteFile(file, []byte("case_1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name  string
		every string
		ok    bool
	}{
		{"the only one", "0s", false},
		{"one of many", "1h", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { stop() }))
			defer server.Close()
			env := map[string]string{"OFFLOAD_API_URL": server.URL, "OFFLOAD_API_KEY": "key"}
			getenv := func(name string) string { return env[name] }
			args := []string{"-dir", t.TempDir(), "-every", test.every, file}
			err := run(ctx, args, getenv, nil, io.Discard, slog.New(slog.DiscardHandler))
			if (err == nil) != test.ok {
				t.Errorf("run = %v, want ok %v", err, test.ok)
			}
		})
	}
}

// writerFunc is called with what is written.
type writerFunc func(p []byte)

func (f writerFunc) Write(p []byte) (int, error) {
	f(p)
	return len(p), nil
}

// TestBesideWebhook serves the webhook and reconciles until it is stopped.
func TestBesideWebhook(t *testing.T) {
	o := newOffload()
	for i := range 20 {
		o.add(fmt.Sprintf("case_%02d", i), "COMPLETED", time.Now().Add(-time.Hour))
	}
	server := httptest.NewServer(o)
	defer server.Close()
	env := map[string]string{"OFFLOAD_API_URL": server.URL + "/v1", "OFFLOAD_API_KEY": "key", "OFFLOAD_TOKEN": "token,older"}
	file := filepath.Join(t.TempDir(), "cases.txt")
	write := func(ids string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(ids), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	log, lines := newLog()
	ended := make(chan error, 1)
	args := []string{"-dir", t.TempDir(), "-addr", "127.0.0.1:0", "-every", "10ms", "-rate", "1000", file}
	handled := make(chan string, 10)
	out := writerFunc(func(p []byte) { handled <- string(p) })
	go func() {
		ended <- run(ctx, args, func(name string) string { return env[name] }, nil, out, log)
	}()
	wait := func(what string) (line string) {
		t.Helper()
		deadline := time.After(30 * time.Second)
		for {
			select {
			case line = <-lines:
				if strings.Contains(line, what) {
					return line
				}
			case err := <-ended:
				t.Fatalf("ended: %v", err)
			case <-deadline:
				t.Fatalf("waited in vain for %q", what)
			}
		}
	}
	_, addr, _ := strings.Cut(strings.TrimSpace(wait("msg=listening")), "addr=")
	client := &http.Client{Timeout: 30 * time.Second}
	post := func(token string) int {
		t.Helper()
		body := bytes.NewReader(o.webhook("case_00"))
		resp, err := client.Post("http://"+addr+"/offload?token="+token, "application/json", body)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	if forged, real := post("guessed"), post("token"); forged != 401 || real != 202 {
		t.Errorf("a forged webhook got %d, a real one %d, want 401 and 202", forged, real)
	}
	if again := post("older"); again != 200 {
		t.Errorf("the same with the older token got %d, want 200", again)
	}
	write("case_00\ncase_01\n") // read anew in each round
	wait("repaired=1 known=1 ")
	write("case_00\ncase_01\ncase_02\n")
	wait("repaired=1 known=2 ")
	for n := 0; n < 3; {
		select {
		case <-handled:
			n++
		case <-lines:
		case <-time.After(30 * time.Second):
			t.Fatal("not every event was handled")
		}
	}
	stop()
	for {
		select {
		case <-lines:
			continue
		case err := <-ended:
			if err != nil {
				t.Errorf("stopped: %v", err)
			}
		}
		break
	}
	if len(handled) > 0 {
		t.Errorf("an event was handled twice: %s", <-handled)
	}
}

// newLog returns a logger and its lines.
func newLog() (*slog.Logger, <-chan string) {
	lines := make(chan string, 1000)
	return slog.New(slog.NewTextHandler(writerFunc(func(p []byte) { lines <- string(p) }), nil)), lines
}

// started runs reconcile with an address, -every and more, and returns the address and what run returns in the end.
func started(t *testing.T, ctx context.Context, dir string) (addr string, ended <-chan error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "cases")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	log, lines := newLog()
	result := make(chan error, 1)
	go func() {
		result <- run(ctx, []string{"-dir", dir, "-addr", "127.0.0.1:0", "-every", "1h", file}, someAPI, nil, io.Discard, log)
	}()
	for addr == "" {
		_, addr, _ = strings.Cut(strings.TrimSpace(<-lines), "addr=")
	}
	return addr, result
}

func someAPI(name string) string {
	return map[string]string{"OFFLOAD_API_URL": "http://127.0.0.1:1", "OFFLOAD_API_KEY": "key"}[name]
}

// postEvent sends an event to addr, and returns the status of the answer.
func postEvent(addr string) (int, error) {
	resp, err := http.Post("http://"+addr+"/offload", "application/json", strings.NewReader(`{"event_id":"evt_1","data":{}}`))
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	return resp.StatusCode, nil
}

// TestSecondStart: a second start by mistake takes nothing from the first.
func TestSecondStart(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	dir := t.TempDir()
	addr, ended := started(t, ctx, dir)
	args := []string{"-dir", dir, "-addr", addr, "-every", "1h", os.DevNull}
	if err := run(t.Context(), args, someAPI, nil, io.Discard, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("the second start ended without an error")
	}
	if status, err := postEvent(addr); status != http.StatusAccepted {
		t.Errorf("the first answers %d, %v", status, err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestLostJournal: it ends, with an error, when another process has taken the journal.
func TestLostJournal(t *testing.T) {
	dir := t.TempDir()
	addr, ended := started(t, t.Context(), dir)
	j, err := offloadhook.OpenJournal(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	if status, err := postEvent(addr); err == nil && status != http.StatusServiceUnavailable { // else it has ended
		t.Errorf("it answers %d", status)
	}
	if err := <-ended; !errors.Is(err, offloadhook.ErrClosed) {
		t.Errorf("it ended with %v", err)
	}
}
