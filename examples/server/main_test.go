package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"offloadhook"
)

const patience = 30 * time.Second

// eventually waits for a condition of another process.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s in vain: %s", patience, what)
		}
	}
}

// The programs, built once.
var server, sender string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "offloadhook")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		suffix := ""
		if runtime.GOOS == "windows" {
			suffix = ".exe"
		}
		server, sender = filepath.Join(dir, "server"+suffix), filepath.Join(dir, "send"+suffix)
		for program, source := range map[string]string{server: ".", sender: "../send"} {
			// To look at the source tells go test that a result in its cache depends on it.
			if _, err := os.Stat(filepath.Join(source, "main.go")); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			if out, err := exec.Command("go", "build", "-o", program, source).CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
				return 1
			}
		}
		return m.Run()
	}())
}

// process is a server that runs.
type process struct {
	cmd  *exec.Cmd
	url  string
	exit chan error

	mu  sync.Mutex // protects what follows
	log bytes.Buffer
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

// record is a line of the log.
type record struct {
	Msg, Addr, Outcome, Error string
	EventID                   string `json:"event_id"`
}

// records returns the whole lines logged so far.
func (p *process) records(t *testing.T) (all []record) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for line := range bytes.Lines(p.log.Bytes()) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break
		}
		var r record
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%v in the log line %s", err, line)
		}
		all = append(all, r)
	}
	return all
}

// handled counts how often each event was handled.
func (p *process) handled(t *testing.T) map[string]int {
	count := make(map[string]int)
	for _, r := range p.records(t) {
		if r.Outcome == string(offloadhook.Handled) {
			count[r.EventID]++
		}
	}
	return count
}

// environ is the environment without settings for the server.
func environ() []string {
	return slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "OFFLOAD_") })
}

func start(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{exit: make(chan error, 1)}
	p.cmd = exec.Command(server, append([]string{"-addr", "127.0.0.1:0"}, args...)...)
	p.cmd.Env = append(environ(), "OFFLOAD_TOKEN=old,new")
	p.cmd.Stderr = p
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.exit <- p.cmd.Wait() }()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.exit
		if lines := strings.Split(p.log.String(), "\n"); t.Failed() {
			t.Logf("end of the log of process %d:\n%s", p.cmd.Process.Pid, strings.Join(lines[max(0, len(lines)-30):], "\n"))
		}
	})
	eventually(t, "the server listens", func() bool {
		for _, r := range p.records(t) {
			if r.Msg == "listening" {
				p.url = "http://" + r.Addr
			}
		}
		return p.url != ""
	})
	return p
}

// terminate sends SIGTERM.
func (p *process) terminate(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
}

// ended waits for a graceful end.
func (p *process) ended(t *testing.T) {
	t.Helper()
	select {
	case err := <-p.exit:
		p.exit <- err
		if err != nil {
			t.Fatalf("after SIGTERM: %v, want exit status 0", err)
		}
	case <-time.After(patience):
		t.Fatal("still there after SIGTERM")
	}
}

// send runs the sender and returns the ids of the events that got a 2xx, each with how often it did.
func send(t *testing.T, url string, args ...string) (acknowledged map[string]int, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	args = append([]string{"-v", "-url", url + "/offload", "-token", "new"}, args...)
	out, err := exec.CommandContext(ctx, sender, args...).CombinedOutput()
	acknowledged = make(map[string]int)
	for line := range strings.Lines(string(out)) {
		if fields := strings.Fields(line); strings.HasPrefix(line, "2") && strings.HasPrefix(fields[len(fields)-1], "evt_") {
			acknowledged[fields[len(fields)-1]]++
		}
	}
	if err != nil {
		err = fmt.Errorf("send: %w\n%s", err, out)
	}
	return acknowledged, err
}

func get(t *testing.T, url string) (status int, body string) {
	t.Helper()
	client := &http.Client{Timeout: patience}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// inside is the internal service to which the events are forwarded.
type inside struct {
	*httptest.Server
	open chan struct{} // closed when it answers

	mu      sync.Mutex // protects what follows
	running int
	served  map[string]int // by event id
}

func newInside(t *testing.T) *inside {
	in := &inside{open: make(chan struct{}), served: make(map[string]int)}
	in.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return
		}
		env, err := offloadhook.ParseEnvelope(body)
		if err != nil || env.EventID != req.Header.Get("Idempotency-Key") {
			t.Errorf("forwarded %q under the key %q: %v", body, req.Header.Get("Idempotency-Key"), err)
			return
		}
		in.mu.Lock()
		in.running++
		in.mu.Unlock()
		defer func() {
			in.mu.Lock()
			defer in.mu.Unlock()
			in.running--
		}()
		select {
		case <-in.open:
			in.mu.Lock()
			defer in.mu.Unlock()
			in.served[env.EventID]++
		case <-req.Context().Done():
		}
	}))
	t.Cleanup(in.Close)
	return in
}

func (in *inside) busy() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.running > 0
}

func (in *inside) idle() bool { return !in.busy() }

func skipWithoutSignals(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no SIGTERM")
	}
}

// TestRestart ends the server by SIGTERM in the middle of its callbacks: every event that was acknowledged is handled
// by the next one, once.
func TestRestart(t *testing.T) {
	skipWithoutSignals(t)
	journal := filepath.Join(t.TempDir(), "journal")
	in := newInside(t)

	first := start(t, "-dir", journal, "-forward", in.URL, "-drain", "100ms")
	acknowledged, err := send(t, first.url, "-n", "200", "-c", "8", "-duplicate", "10%", "-shuffle")
	if err != nil || len(acknowledged) != 200 {
		t.Fatalf("%d events acknowledged, want 200: %v", len(acknowledged), err)
	}
	eventually(t, "callbacks run", in.busy)
	first.terminate(t)
	first.ended(t)
	if n := len(first.handled(t)); n != 0 {
		t.Fatalf("the first server handled %d events, but nobody let it", n)
	}

	eventually(t, "the requests of the first server are over", in.idle)
	close(in.open)
	second := start(t, "-dir", journal, "-forward", in.URL)
	eventually(t, "the second server handles what the first one left", func() bool {
		return len(second.handled(t)) == len(acknowledged)
	})
	// New events beside the old ones: the fixtures, and a type that the library does not know.
	fixtures, err := send(t, second.url)
	if err != nil || len(fixtures) != 6 {
		t.Fatalf("%d fixtures acknowledged, want 6: %v", len(fixtures), err)
	}
	unknown, err := send(t, second.url, "-type", "case.paused", "-n", "3")
	if err != nil || len(unknown) != 3 {
		t.Fatalf("%d events of an unknown type acknowledged, want 3: %v", len(unknown), err)
	}
	maps.Copy(acknowledged, fixtures)
	maps.Copy(acknowledged, unknown)
	eventually(t, "the second server handles the new ones", func() bool {
		return len(second.handled(t)) == len(acknowledged)
	})
	second.terminate(t)
	second.ended(t)

	// What was handled stays handled, over a restart.
	third := start(t, "-dir", journal, "-forward", in.URL)
	if _, err := send(t, third.url); err != nil {
		t.Fatal(err)
	}
	third.terminate(t)
	third.ended(t)
	handled := second.handled(t)
	for id, n := range third.handled(t) {
		handled[id] += n
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	for id := range acknowledged {
		if handled[id] != 1 || in.served[id] != 1 {
			t.Errorf("%s was handled %d times and forwarded %d times, want once", id, handled[id], in.served[id])
		}
	}
	if len(handled) != len(acknowledged) {
		t.Errorf("%d events handled, but %d acknowledged", len(handled), len(acknowledged))
	}
}

// TestDrain ends the server by SIGTERM in the middle of its callbacks, which then get the time to return.
func TestDrain(t *testing.T) {
	skipWithoutSignals(t)
	in := newInside(t)
	p := start(t, "-dir", t.TempDir(), "-forward", in.URL)
	acknowledged, err := send(t, p.url, "-c", "6")
	if err != nil || len(acknowledged) != 6 {
		t.Fatalf("%d events acknowledged, want 6: %v", len(acknowledged), err)
	}
	eventually(t, "callbacks run", in.busy)
	p.terminate(t)
	eventually(t, "the server shuts down", func() bool {
		records := p.records(t)
		return records[len(records)-1].Msg == "shutting down"
	})
	close(in.open)
	p.ended(t)
	for _, r := range p.records(t) {
		if r.Msg == "event" && r.Outcome != string(offloadhook.Handled) {
			t.Errorf("%+v: a callback was not let finish, or not recorded", r)
		}
	}
	if len(p.handled(t)) == 0 {
		t.Error("no event was handled")
	}
}

// TestTakeover starts a second server on the journal of the first, which must not acknowledge events any more.
func TestTakeover(t *testing.T) {
	journal := t.TempDir()
	first := start(t, "-dir", journal)
	for _, path := range []string{"/healthz", "/readyz"} {
		if status, body := get(t, first.url+path); status != http.StatusOK {
			t.Errorf("%s: %d %s, want 200", path, status, body)
		}
	}
	if acknowledged, err := send(t, first.url, "-n", "10"); err != nil || len(acknowledged) != 10 {
		t.Fatalf("%d events acknowledged, want 10: %v", len(acknowledged), err)
	}

	second := start(t, "-dir", journal)
	if acknowledged, err := send(t, first.url, "-n", "10"); err == nil || len(acknowledged) > 0 {
		t.Errorf("the first server acknowledged %d events without having a journal", len(acknowledged))
	}
	eventually(t, "the first server is not ready", func() bool {
		status, _ := get(t, first.url+"/readyz")
		return status == http.StatusServiceUnavailable
	})
	if status, _ := get(t, first.url+"/healthz"); status != http.StatusOK {
		t.Errorf("/healthz: %d, want 200: a restart would take the journal back", status)
	}
	if acknowledged, err := send(t, second.url, "-n", "10"); err != nil || len(acknowledged) != 10 {
		t.Errorf("the second server acknowledged %d events, want 10: %v", len(acknowledged), err)
	}
}

func TestCounters(t *testing.T) {
	p := start(t, "-dir", t.TempDir())
	if _, err := send(t, p.url, "-n", "20", "-duplicate", "50%"); err != nil {
		t.Fatal(err)
	}
	if _, err := send(t, p.url, "-token", "forged"); err == nil {
		t.Error("a wrong token was let in")
	}
	want := map[string]int{"accepted": 20, "duplicate": 10, "refused": 6, "handled": 20}
	eventually(t, "the counters are right", func() bool {
		_, body := get(t, p.url+"/debug/vars")
		var got map[string]int
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Fatalf("%v in %s", err, body)
		}
		return fmt.Sprint(got) == fmt.Sprint(want)
	})
}

// TestSecondStart starts the server a second time by mistake: that must not take the journal from the first.
func TestSecondStart(t *testing.T) {
	journal := t.TempDir()
	first := start(t, "-dir", journal)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	second := exec.CommandContext(ctx, server, "-addr", strings.TrimPrefix(first.url, "http://"), "-dir", journal)
	second.Env = environ()
	if out, err := second.CombinedOutput(); second.ProcessState.ExitCode() != 1 {
		t.Errorf("the second server: %v, want exit status 1\n%s", err, out)
	}
	if acknowledged, err := send(t, first.url, "-n", "10"); err != nil || len(acknowledged) != 10 {
		t.Errorf("%d events acknowledged, want 10: %v", len(acknowledged), err)
	}
}

func TestForward(t *testing.T) {
	for _, test := range []struct {
		status int
		ok     bool
	}{{200, true}, {204, true}, {302, false}, {404, false}, {503, false}} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(test.status)
		}))
		a := &app{forwardURL: s.URL, client: s.Client()}
		if err := a.forward(t.Context(), &offloadhook.Envelope{EventID: "evt_1"}); (err == nil) != test.ok {
			t.Errorf("answered %d: %v, want ok %v", test.status, err, test.ok)
		}
		s.Close()
	}
}

func TestParse(t *testing.T) {
	env := map[string]string{"OFFLOAD_ADDR": ":1", "OFFLOAD_DIR": "there", "OFFLOAD_TOKEN": "a,b", "OFFLOAD_DRAIN": "3s"}
	cfg, err := parse([]string{"-addr", ":2"}, func(name string) string { return env[name] })
	want := config{addr: ":2", dir: "there", tokens: []string{"a", "b"}, drain: 3 * time.Second}
	if err != nil || fmt.Sprint(cfg) != fmt.Sprint(want) {
		t.Errorf("parse = %+v, %v, want %+v", cfg, err, want)
	}
	for _, test := range []struct {
		name string
		args []string
		env  map[string]string
	}{
		{"no directory", nil, nil},
		{"an argument", []string{"-dir", "d", "more"}, nil},
		{"a drain that is no duration", []string{"-dir", "d"}, map[string]string{"OFFLOAD_DRAIN": "3"}},
	} {
		if cfg, err := parse(test.args, func(name string) string { return test.env[name] }); err == nil {
			t.Errorf("%s: parse = %+v, want an error", test.name, cfg)
		}
	}
}

// TestSecrets checks that no payload and no token is logged or shown.
func TestSecrets(t *testing.T) {
	var log bytes.Buffer
	a := &app{log: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	long := offloadhook.EventType(strings.Repeat("t", 64) + "private")
	env := &offloadhook.Envelope{EventID: "evt_1", EventType: long, Raw: []byte("private"), Data: []byte(`"private"`)}
	for _, o := range []offloadhook.Observation{
		{Outcome: offloadhook.Refused, Body: env.Raw, Err: errors.New("reason")},
		{Outcome: offloadhook.Handled, Envelope: env, Body: env.Raw, Attempt: 1},
		{Outcome: offloadhook.GaveUp, Envelope: env, Body: env.Raw, Err: &offloadhook.PanicError{Value: "reason"}},
	} {
		a.observe(t.Context(), o)
	}
	if strings.Contains(log.String(), "private") || strings.Count(log.String(), "reason") != 2 {
		t.Errorf("log:\n%s", log.String())
	}
}

// forwarded delivers an event to an app that forwards to url, and returns the outcome of it, and what was logged.
func forwarded(t *testing.T, url string) (outcome offloadhook.Outcome, log string) {
	t.Helper()
	var out bytes.Buffer
	a := &app{log: slog.New(slog.NewTextHandler(&out, nil)), forwardURL: url, client: newClient()}
	r := offloadhook.Handler(a.callbacks(), offloadhook.WithRetry(1, 0),
		offloadhook.WithObserver(func(ctx context.Context, o offloadhook.Observation) {
			a.observe(ctx, o)
			if o.Attempt > 0 {
				outcome = o.Outcome
			}
		}))
	if _, err := r.Deliver(t.Context(), []byte(`{"event_id":"evt_1","data":{}}`)); err != nil {
		t.Fatal(err)
	}
	if err := r.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	return outcome, out.String()
}

// TestForwardConnections: events that are forwarded side by side use the connections of those before.
func TestForwardConnections(t *testing.T) {
	const callbacks = 32
	var here sync.WaitGroup
	var conns atomic.Int32
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		here.Done()
		here.Wait() // until all are
	}))
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			conns.Add(1)
		}
	}
	s.Start()
	defer s.Close()
	a := &app{forwardURL: s.URL, client: newClient()}
	for range 3 {
		here.Add(callbacks)
		var all sync.WaitGroup
		for range callbacks {
			all.Go(func() {
				if err := a.forward(t.Context(), &offloadhook.Envelope{EventID: "evt_1"}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
	if n := conns.Load(); n != callbacks {
		t.Errorf("%d connections, want %d", n, callbacks)
	}
	a.client.CloseIdleConnections()
}

// TestForwardRedirect: an event is forwarded to the URL that was given, or not at all.
func TestForwardRedirect(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("it was followed") }))
	defer other.Close()
	for _, code := range []int{301, 302, 303, 307, 308} {
		inner := httptest.NewServer(http.RedirectHandler(other.URL, code))
		if outcome, _ := forwarded(t, inner.URL); outcome != offloadhook.GaveUp {
			t.Errorf("with a redirect by %d the outcome is %s", code, outcome)
		}
		inner.Close()
	}
}

// TestForwardSecret: what stands in the forward URL is not logged.
func TestForwardSecret(t *testing.T) {
	if outcome, log := forwarded(t, "http://127.0.0.1:1/?token=hunter2"); outcome != offloadhook.GaveUp || strings.Contains(log, "hunter2") {
		t.Errorf("%s: %s", outcome, log)
	}
}

// TestBadSettings: what cannot be used is told before the journal is taken over, and without quoting it.
func TestBadSettings(t *testing.T) {
	dir := t.TempDir()
	serving, err := offloadhook.OpenJournal(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer serving.Close()
	ctx, stop := context.WithCancel(t.Context())
	stop() // a server that starts all the same ends at once
	for _, bad := range []string{
		"-addr=", "-token=hunter2,", "-token=new, hunter2", "-token=hunter2\n",
		"-forward=http://127.0.0.1:90o0/?token=hunter2", "-forward=127.0.0.1:9000/?token=hunter2",
		"-forward=http://127.0.0.1:1/%zz?token=hunter2", "-forward=localhost:9000/hunter2",
		"-forward=ftp://127.0.0.1/hunter2",
	} {
		args := []string{"-dir", dir, "-addr", "127.0.0.1:0", bad}
		err := run(ctx, args, func(string) string { return "" }, slog.New(slog.DiscardHandler))
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", bad, err)
		}
	}
	env, err := offloadhook.ParseEnvelope([]byte(`{"event_id":"evt_1"}`))
	if err != nil {
		t.Fatal(err)
	}
	if fresh, err := serving.Claim(t.Context(), env); !fresh || err != nil {
		t.Errorf("who had the journal claims: %v, %v", fresh, err)
	}
}
