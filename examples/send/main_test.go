package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
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

// target is a server that keeps what it is sent and answers with status.
type target struct {
	*httptest.Server

	mu      sync.Mutex // protects what follows
	bodies  []string
	queries []string
}

func noEnv(string) string { return "" }

func newTarget(t *testing.T, status int) *target {
	target := new(target)
	target.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		if err != nil || req.Method != http.MethodPost || req.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s of %q: %v", req.Method, req.Header.Get("Content-Type"), err)
		}
		target.mu.Lock()
		target.bodies = append(target.bodies, string(body))
		target.queries = append(target.queries, req.URL.RawQuery)
		target.mu.Unlock()
		w.Header().Set("Location", "/elsewhere")
		http.Error(w, "said the target", status)
	}))
	t.Cleanup(target.Close)
	return target
}

func (s *target) runSend(t *testing.T, args ...string) (exit int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	exit = run(t.Context(), append([]string{"-url", s.URL + "/offload"}, args...), noEnv, &out, &errs, false)
	return exit, out.String(), errs.String()
}

func TestFixturesAsTheyAre(t *testing.T) {
	s := newTarget(t, http.StatusAccepted)
	if exit, out, errs := s.runSend(t); exit != 0 || !strings.Contains(out, "6 of 6 sent, 0 refused") {
		t.Fatalf("exit %d\n%s%s", exit, out, errs)
	}
	want, err := offloadhook.Fixtures.ReadFile("testdata/case_failed_b.json")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(s.bodies, string(want)) {
		t.Error("case_failed_b.json was not sent byte for byte")
	}
}

func TestFilesByteForByte(t *testing.T) {
	dir := t.TempDir()
	var files []string
	for i, body := range []string{" {\"event_id\" : \"evt_1\"}\n", "no JSON"} {
		file := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(file, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	s := newTarget(t, http.StatusOK)
	if exit, out, errs := s.runSend(t, files...); exit != 0 {
		t.Fatalf("exit %d\n%s%s", exit, out, errs)
	}
	if want := []string{" {\"event_id\" : \"evt_1\"}\n", "no JSON"}; !slices.Equal(s.bodies, want) {
		t.Errorf("sent %q, want %q", s.bodies, want)
	}
	if exit, _, _ := s.runSend(t, filepath.Join(dir, "missing")); exit != 2 {
		t.Errorf("a file that is missing: exit %d, want 2", exit)
	}
}

func TestMadeEvents(t *testing.T) {
	for _, test := range []struct {
		name  string
		args  []string
		want  int
		types []offloadhook.EventType
		cases int // distinct ones
	}{
		{"one of a case", []string{"-type", "case.failed", "-case", "case_42"}, 1,
			[]offloadhook.EventType{offloadhook.TypeCaseFailed}, 1},
		{"many of a case", []string{"-type", "case.input_needed", "-case", `a "quoted" case`, "-n", "20"}, 20,
			[]offloadhook.EventType{offloadhook.TypeCaseInputNeeded}, 1},
		{"an unknown type", []string{"-type", "case.paused", "-n", "3"}, 3, []offloadhook.EventType{"case.paused"}, 3},
		{"all types", []string{"-n", "30", "-c", "5", "-shuffle"}, 30, []offloadhook.EventType{offloadhook.TypeCaseCompleted,
			offloadhook.TypeCaseFailed, offloadhook.TypeCaseInputNeeded}, 30},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newTarget(t, http.StatusNoContent)
			if exit, out, errs := s.runSend(t, test.args...); exit != 0 {
				t.Fatalf("exit %d\n%s%s", exit, out, errs)
			}
			ids, types, cases := make(map[string]bool), make(map[offloadhook.EventType]bool), make(map[string]bool)
			for _, body := range s.bodies {
				env, err := offloadhook.ParseEnvelope([]byte(body))
				if err != nil {
					t.Fatal(err)
				}
				var c offloadhook.Case
				if err := json.Unmarshal(env.Data, &c); err != nil {
					t.Fatal(err)
				}
				if want := offloadhook.EventID(c.CaseID, env.EventType, env.Timestamp); env.EventID != want {
					t.Errorf("event_id %q, want %q", env.EventID, want)
				}
				ids[env.EventID], types[env.EventType], cases[c.CaseID] = true, true, true
			}
			if len(s.bodies) != test.want || len(ids) != test.want {
				t.Errorf("%d requests with %d ids, want %d", len(s.bodies), len(ids), test.want)
			}
			if len(cases) != test.cases {
				t.Errorf("%d cases, want %d", len(cases), test.cases)
			}
			if len(types) != len(test.types) {
				t.Errorf("types %v, want %v", types, test.types)
			}
			for _, want := range test.types {
				if !types[want] {
					t.Errorf("no event of type %s", want)
				}
			}
		})
	}
}

// TestReceiver drives a real receiver: every made event is new to it and fits its struct, and the duplicates are known.
func TestReceiver(t *testing.T) {
	var mu sync.Mutex
	outcomes := make(map[offloadhook.Outcome]int)
	receiver := offloadhook.Handler(offloadhook.Callbacks{
		CaseCompleted:   func(context.Context, *offloadhook.Envelope, *offloadhook.CaseCompleted) error { return nil },
		CaseFailed:      func(context.Context, *offloadhook.Envelope, *offloadhook.CaseFailed) error { return nil },
		CaseInputNeeded: func(context.Context, *offloadhook.Envelope, *offloadhook.CaseInputNeeded) error { return nil },
	}, offloadhook.WithToken("a&b c"), offloadhook.WithObserver(func(_ context.Context, o offloadhook.Observation) {
		mu.Lock()
		defer mu.Unlock()
		outcomes[o.Outcome]++
	}))
	s := httptest.NewServer(receiver)
	defer s.Close()
	var out strings.Builder
	args := []string{"-url", s.URL, "-token", "a&b c", "-n", "200", "-c", "8", "-duplicate", "10%", "-shuffle"}
	exit := run(t.Context(), args, noEnv, &out, &out, false)
	s.Close()
	if err := receiver.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := map[offloadhook.Outcome]int{offloadhook.Accepted: 200, offloadhook.Duplicate: 20, offloadhook.Handled: 200}
	if exit != 0 || fmt.Sprint(outcomes) != fmt.Sprint(want) {
		t.Errorf("exit %d, outcomes %v, want %v\n%s", exit, outcomes, want, out.String())
	}
	for _, want := range []string{"220 of 220 sent, 0 refused", "202 Accepted             200\n",
		"200 OK                   20\n", "latency p50 "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the summary lacks %q:\n%s", want, out.String())
		}
	}
}

func TestRefused(t *testing.T) {
	for _, test := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"503", nil, http.StatusServiceUnavailable, "503 Service Unavailable  6\n"},
		{"401", []string{"-n", "10"}, http.StatusUnauthorized, "and 5 more\n"},
		{"a redirect", nil, http.StatusTemporaryRedirect, "307 Temporary Redirect   6\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newTarget(t, test.code)
			exit, out, errs := s.runSend(t, test.args...)
			if exit != 1 || !strings.Contains(out, test.want) || !strings.Contains(out, `: "said the target"`) {
				t.Errorf("exit %d, want 1 and %q\n%s%s", exit, test.want, out, errs)
			}
			if want := max(6, len(test.args)*5); len(s.bodies) != want {
				t.Errorf("%d requests, want %d: a refused one is never sent again", len(s.bodies), want)
			}
		})
	}
	t.Run("no answer", func(t *testing.T) {
		s := newTarget(t, http.StatusOK)
		s.Close()
		exit, out, _ := s.runSend(t, "-token", "secret")
		if exit != 1 || !strings.Contains(out, "no answer                6\n") || strings.Contains(out, "secret") {
			t.Errorf("exit %d\n%s", exit, out)
		}
	})
	t.Run("an answer that breaks off", func(t *testing.T) {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "10")
			w.WriteHeader(http.StatusAccepted)
			io.WriteString(w, "ok")
		}))
		defer s.Close()
		var out strings.Builder
		if exit := run(t.Context(), []string{"-url", s.URL}, noEnv, &out, &out, false); exit != 0 {
			t.Errorf("exit %d, want 0: the status is there\n%s", exit, out.String())
		}
	})
	t.Run("the token of the environment", func(t *testing.T) {
		s := newTarget(t, http.StatusAccepted)
		var out strings.Builder
		getenv := func(name string) string { return map[string]string{"OFFLOAD_TOKEN": "first,second"}[name] }
		exit := run(t.Context(), []string{"-url", s.URL}, getenv, &out, &out, false)
		if exit != 0 || len(s.queries) != 6 || s.queries[0] != "token=first" {
			t.Errorf("exit %d, sent with %q\n%s", exit, s.queries, out.String())
		}
	})
	t.Run("interrupted", func(t *testing.T) {
		s := newTarget(t, http.StatusOK)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		var out strings.Builder
		if exit := run(ctx, []string{"-url", s.URL, "-n", "1000", "-rate", "1"}, noEnv, &out, &out, false); exit != 1 {
			t.Errorf("exit %d, want 1\n%s", exit, out.String())
		}
	})
}

func TestVerbose(t *testing.T) {
	s := newTarget(t, http.StatusAccepted)
	_, out, _ := s.runSend(t, "-v")
	if !strings.Contains(out, "202 Accepted evt_case_123_case_completed_1774131900000\n") {
		t.Errorf("no line for an event:\n%s", out)
	}
}

func TestUsage(t *testing.T) {
	for _, test := range []struct {
		name string
		args []string
		want int
	}{
		{"another machine", []string{"-url", "http://192.0.2.1/offload"}, 2},
		{"a name", []string{"-url", "http://localhost.example/offload"}, 2},
		{"a user", []string{"-url", "http://me:hunter2@127.0.0.1/offload"}, 2},
		{"a user in a broken URL", []string{"-url", "http://me:hunter2@[127.0.0.1/offload"}, 2},
		{"no scheme", []string{"-url", "127.0.0.1:8080"}, 2},
		{"another scheme", []string{"-url", "ftp://127.0.0.1/"}, 2},
		{"a share without unit", []string{"-duplicate", "0.1"}, 2},
		{"a share over all", []string{"-duplicate", "101%"}, 2},
		{"no share", []string{"-duplicate", "NaN%"}, 2},
		{"no clients", []string{"-c", "0"}, 2},
		{"a negative rate", []string{"-rate", "-1"}, 2},
		{"a type and a file", []string{"-type", "case.failed", "main.go"}, 2},
		{"help", []string{"-h"}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out, errs strings.Builder
			exit := run(t.Context(), test.args, noEnv, &out, &errs, false)
			if exit != test.want || out.Len() > 0 || errs.Len() == 0 {
				t.Errorf("exit %d, want %d\n%s%s", exit, test.want, out.String(), errs.String())
			}
			if strings.Contains(errs.String(), "hunter2") {
				t.Errorf("the password is shown:\n%s", errs.String())
			}
		})
	}
}

func TestCheckURL(t *testing.T) {
	for _, test := range []struct{ url, token, usual, want string }{
		{"http://127.0.0.1:8080/offload", "", "", "http://127.0.0.1:8080/offload"},
		{"http://[::1]/offload", "a&b", "usual", "http://[::1]/offload?token=a%26b"},
		{"https://localhost/offload?x=1", "t", "", "https://localhost/offload?token=t&x=1"},
		{"http://localhost/?token=given", "t", "usual", "http://localhost/?token=t"},
		{"http://localhost/?token=given", "", "usual", "http://localhost/?token=given"},
		{"http://localhost/", "", "usual", "http://localhost/?token=usual"},
	} {
		got, err := checkURL(test.url, test.token, test.usual, false)
		if got != test.want || err != nil {
			t.Errorf("checkURL(%q, %q, %q) = %q, %v, want %q", test.url, test.token, test.usual, got, err, test.want)
		}
	}
	if _, err := checkURL("https://hooks.example.com/offload", "", "", true); err != nil {
		t.Errorf("with -remote: %v", err)
	}
}

func TestPlan(t *testing.T) {
	s := &source{n: 10}
	if got, want := s.plan(0.3, false), []int{0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9}; !slices.Equal(got, want) {
		t.Errorf("plan = %v, want %v", got, want)
	}
	if got := len(s.plan(1, false)); got != 20 {
		t.Errorf("with 100%%: %d, want 20", got)
	}
	s.n = 1000
	plan := s.plan(0.1, true)
	if len(plan) != 1100 || slices.IsSorted(plan) {
		t.Errorf("%d events, shuffled %v, want 1100, true", len(plan), !slices.IsSorted(plan))
	}
}

func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		next := make(chan int)
		go pace(t.Context(), make([]int, 11), 2, next)
		for range next {
		}
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("11 events at 2 a second took %s, want 5s", took)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
		defer cancel()
		next := make(chan int, 10)
		if pace(ctx, make([]int, 10), 1e-12, next); len(next) != 1 {
			t.Errorf("%d events in a day at one in 30,000 years", len(next))
		}
	})
}

func TestReport(t *testing.T) {
	report := func(t *testing.T, terminal bool) string {
		var out strings.Builder
		tally := newTally(make([]int, 20), &out)
		tally.done, tally.refused = 5, 1
		ctx, cancel := context.WithTimeout(t.Context(), 10100*time.Millisecond)
		defer cancel()
		tally.report(ctx, terminal)
		return out.String()
	}
	t.Run("terminal", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			got := report(t, true)
			if n := strings.Count(got, "\r\x1b[K5 of 20 sent, 1 refused, "); n != 50 || strings.Contains(got, "\n") {
				t.Errorf("want one line, written 50 times, not %d: %q", n, got)
			}
			if !strings.HasSuffix(got, "s\r\x1b[K") {
				t.Errorf("the line was left there: %q", got)
			}
		})
	})
	t.Run("elsewhere", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			want := "5 of 20 sent, 1 refused, 1/s, ETA 15s\n5 of 20 sent, 1 refused, 0/s, ETA 30s\n"
			if got := report(t, false); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	})
}

func TestPercentile(t *testing.T) {
	var hundred []time.Duration
	for i := range 100 {
		hundred = append(hundred, time.Duration(i+1)*time.Millisecond)
	}
	for _, test := range []struct {
		sorted []time.Duration
		p      int
		want   time.Duration
	}{
		{hundred, 50, 50 * time.Millisecond},
		{hundred, 99, 99 * time.Millisecond},
		{hundred, 100, 100 * time.Millisecond},
		{hundred[:1], 50, time.Millisecond},
		{hundred[:2], 99, 2 * time.Millisecond},
	} {
		if got := percentile(test.sorted, test.p); got != test.want {
			t.Errorf("percentile %d of %d = %s, want %s", test.p, len(test.sorted), got, test.want)
		}
	}
}
