package dedupetest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"offloadhook"
)

// Replicas tests a store that several processes share: it starts replicas of a service, sends them events in turn,
// kills them, and checks what their callbacks have seen. The replicas are the test binary itself, whose TestMain has to
// call ServeReplica.
type Replicas struct {
	Env        []string            // for the replicas, besides the environment: where their store is
	Count      int                 // of replicas
	Events     int                 // in all, ten to a case, each sent when the one before of its case was acknowledged
	Rate       int                 // events a second; 0 means as fast as it goes
	Duplicates float64             // how many of the events are sent a second time: at once, or up to a second later
	Handling   time.Duration       // a callback takes up to this long
	KillEvery  time.Duration       // one replica is killed -9 and started again, in turn; 0 means never
	Gently     bool                // instead of being killed it is told to end, as in a deploy
	Disturb    func() error        // is called when half of the events are sent: to restart the database
	Left       func() (int, error) // how many events the store has that are not done
	Patience   time.Duration       // for Left to return 0 and the last callback to return, when all is sent
}

// Report says what a run of Replicas has seen.
type Report struct {
	Acknowledged []string // the ids that got a 2xx, sorted
	Refused      int      // deliveries that got none: each was sent again, to the next replica
	Kills        int      // or ends, if Gently
	Reruns       int      // callbacks that ran again, because their replica was killed before they were recorded
}

const (
	replicaEnv  = "OFFLOADHOOK_REPLICA_LOG"      // the file in which the replicas note what they do
	handlingEnv = "OFFLOADHOOK_REPLICA_HANDLING" // Replicas.Handling
	hangingEnv  = "OFFLOADHOOK_REPLICA_HANGING"  // the event of StartHanging
	perCase     = 10
)

// serveFunc is the type of what ServeReplica is given.
type serveFunc = func(offloadhook.Callbacks, ...offloadhook.Option) (*offloadhook.Receiver, io.Closer, error)

// ServeReplica makes this process a replica, and ends it, if Replicas or StartHanging has started it; otherwise it does
// nothing. serve returns the receiver, on the store under test, and what closes the store.
func ServeReplica(serve serveFunc) {
	name, id := os.Getenv(replicaEnv), os.Getenv(hangingEnv)
	var err error
	switch {
	case name != "":
		err = serveReplica(name, serve)
	case id != "":
		err = hang(id, serve)
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "replica:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serveReplica(name string, serve serveFunc) error {
	handling, err := time.ParseDuration(os.Getenv(handlingEnv))
	if err != nil {
		return err
	}
	// One write is one line, whichever processes write: that makes it an order of what they do.
	log, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	note := func(what string, env *offloadhook.Envelope) {
		fmt.Fprintf(log, "%s %s %d\n", what, env.EventID, os.Getpid())
	}
	receiver, store, err := serve(offloadhook.Callbacks{
		Other: func(ctx context.Context, env *offloadhook.Envelope) error {
			note("start", env)
			select {
			case <-time.After(rand.N(handling + 1)):
			case <-ctx.Done():
				return ctx.Err()
			}
			note("end", env)
			return nil
		},
	})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: receiver}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	fmt.Println(listener.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin) // until whoever started this wants it to end, or is gone
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err = errors.Join(server.Shutdown(ctx), receiver.Shutdown(ctx), store.Close())
	if e := <-served; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// inCallback is what a process says that StartHanging has started.
const inCallback = "running\n"

// hang delivers an event whose callback does not return.
func hang(id string, serve serveFunc) error {
	receiver, _, err := serve(offloadhook.Callbacks{
		Other: func(context.Context, *offloadhook.Envelope) error {
			fmt.Print(inCallback)
			select {}
		},
	})
	if err != nil {
		return err
	}
	if fresh, err := receiver.Deliver(context.Background(), []byte(ofCase(id, id))); !fresh {
		return fmt.Errorf("the event is not new: %w", err)
	}
	select {}
}

// StartHanging starts a process, with env besides the environment, that is in the middle of the callback of the event id
// when it returns. It is killed at the end of the test, if not before that.
func StartHanging(t *testing.T, id string, env ...string) *os.Process {
	t.Helper()
	p, line, err := startReplica(append(env, hangingEnv+"="+id))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.kill() })
	if line != inCallback {
		t.Fatalf("the process says %q", line)
	}
	return p.cmd.Process
}

// replica is a process that was started.
type replica struct {
	cmd   *exec.Cmd
	stdin io.Closer
	url   string
	err   bytes.Buffer
}

// start starts a replica, again and again if it ends at once, because the store is being disturbed.
func (r *Replicas) start(log string) (*replica, error) {
	for start := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		p, err := r.tryStart(log)
		if err == nil || time.Since(start) > 30*time.Second {
			return p, err
		}
	}
}

func (r *Replicas) tryStart(log string) (*replica, error) {
	p, address, err := startReplica(append(slices.Clone(r.Env), replicaEnv+"="+log, handlingEnv+"="+r.Handling.String()))
	if err != nil {
		return nil, err
	}
	p.url = "http://" + strings.TrimSpace(address)
	return p, nil
}

// startReplica starts this program with env besides the environment, and returns the first line that it says.
func startReplica(env []string) (p *replica, line string, err error) {
	program, err := os.Executable()
	if err != nil {
		return nil, "", err
	}
	p = &replica{cmd: exec.Command(program)}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stderr = &p.err
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, "", err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, "", err
	}
	if line, err = bufio.NewReader(stdout).ReadString('\n'); err != nil {
		_ = p.kill()
		return nil, "", fmt.Errorf("a replica does not start: %w: %s", err, p.err.String())
	}
	return p, line, nil
}

// kill kills p, and waits for that.
func (p *replica) kill() error {
	err := p.cmd.Process.Kill()
	_ = p.cmd.Wait()
	p.stdin.Close()
	return err
}

// end tells p to end, and waits for that.
func (p *replica) end(t *testing.T) {
	p.stdin.Close()
	if err := p.cmd.Wait(); err != nil && !t.Failed() {
		t.Errorf("a replica that was told to end: %v: %s", err, p.err.String())
	}
}

// Run runs the test.
func (r Replicas) Run(t *testing.T) Report {
	f, err := os.CreateTemp(t.TempDir(), "log")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	run := &replicasRun{
		Replicas: r,
		log:      f.Name(),
		replicas: make([]*replica, r.Count),
		killed:   make(map[int]bool),
		client:   &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}},
	}
	defer run.client.CloseIdleConnections()
	for i := range run.replicas {
		p, err := r.start(run.log)
		if err != nil {
			t.Fatal(err)
		}
		run.replicas[i] = p
	}
	sent := make(chan struct{})
	var killer sync.WaitGroup
	killer.Go(func() { run.kill(t, sent) })
	run.send(t)
	close(sent)
	killer.Wait()
	run.await(t)
	for _, p := range run.replicas {
		p.end(t)
	}
	run.check(t)
	slices.Sort(run.report.Acknowledged)
	t.Logf("%d events acknowledged, %d deliveries refused, %d kills, %d reruns",
		len(run.report.Acknowledged), run.report.Refused, run.report.Kills, run.report.Reruns)
	return run.report
}

type replicasRun struct {
	Replicas
	log    string
	client *http.Client
	turn   atomic.Int64

	mu       sync.Mutex // protects what follows
	replicas []*replica
	killed   map[int]bool // processes
	report   Report
}

// kill kills one replica after the other until all is sent.
func (run *replicasRun) kill(t *testing.T, sent <-chan struct{}) {
	if run.KillEvery == 0 {
		return
	}
	for i := 0; ; i = (i + 1) % len(run.replicas) {
		select {
		case <-sent:
			return
		case <-time.After(run.KillEvery):
		}
		p := run.replicas[i]
		if run.Gently {
			p.end(t)
		} else if err := p.kill(); err != nil {
			t.Error(err)
			return
		}
		next, err := run.start(run.log)
		run.mu.Lock()
		run.killed[p.cmd.Process.Pid] = !run.Gently
		run.report.Kills++
		if err == nil {
			run.replicas[i] = next
		}
		run.mu.Unlock()
		if err != nil {
			t.Error(err)
			return
		}
	}
}

// send sends all events, by many senders at once, each of which takes one case after the other.
func (run *replicasRun) send(t *testing.T) {
	var pace <-chan time.Time
	if run.Rate > 0 {
		ticker := time.NewTicker(time.Second / time.Duration(run.Rate))
		defer ticker.Stop()
		pace = ticker.C
	}
	cases := make(chan int)
	var senders, again sync.WaitGroup
	var sent atomic.Int64
	for range 32 {
		senders.Go(func() {
			for c := range cases {
				for i := range perCase {
					if pace != nil {
						<-pace
					}
					id := fmt.Sprintf("evt_%d_%d", c, i)
					body := fmt.Sprintf(`{"event_id":%q,"event_type":"test","data":{"caseId":"case_%d"}}`, id, c)
					if rand.Float64() < run.Duplicates {
						delay := rand.N(time.Second) * time.Duration(rand.N(2)) // half of them at once
						again.Go(func() {
							time.Sleep(delay)
							run.deliver(t, id, body)
						})
					}
					if !run.deliver(t, id, body) {
						return
					}
					if run.Disturb != nil && sent.Add(1) == int64(run.Events/2) {
						if err := run.Disturb(); err != nil {
							t.Error(err)
						}
					}
				}
			}
		})
	}
	for c := range run.Events / perCase {
		if t.Failed() {
			break
		}
		cases <- c
	}
	close(cases)
	senders.Wait()
	again.Wait()
}

// deliver posts one event until a replica answers 2xx.
func (run *replicasRun) deliver(t *testing.T, id, body string) bool {
	for start := time.Now(); time.Since(start) < time.Minute; time.Sleep(20 * time.Millisecond) {
		run.mu.Lock()
		url := run.replicas[int(run.turn.Add(1))%len(run.replicas)].url
		run.mu.Unlock()
		resp, err := run.client.Post(url, "application/json", strings.NewReader(body))
		ok := false
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			ok = resp.StatusCode/100 == 2
		}
		run.mu.Lock()
		if ok {
			run.report.Acknowledged = append(run.report.Acknowledged, id)
		} else {
			run.report.Refused++
		}
		run.mu.Unlock()
		if ok {
			return true
		}
	}
	t.Errorf("no replica takes %s", id)
	return false
}

// await waits until the callback of each acknowledged event has returned, and the store has nothing left to do.
func (run *replicasRun) await(t *testing.T) {
	slices.Sort(run.report.Acknowledged)
	run.report.Acknowledged = slices.Compact(run.report.Acknowledged)
	for start := time.Now(); !t.Failed(); time.Sleep(100 * time.Millisecond) {
		ended := make(map[string]bool)
		for _, n := range run.notes(t) {
			ended[n.id] = ended[n.id] || n.what == "end"
		}
		late := slices.DeleteFunc(slices.Clone(run.report.Acknowledged), func(id string) bool { return ended[id] })
		left, err := run.Left()
		if err != nil {
			t.Error(err)
		}
		if len(late) == 0 && left == 0 {
			return
		}
		if time.Since(start) > run.Patience {
			t.Errorf("%v after the last was sent, the callbacks of %d acknowledged events have not returned nil (%q), "+
				"and the store has %d that are not done", run.Patience, len(late), late[:min(len(late), 10)], left)
		}
	}
}

// note is a line of the log.
type note struct {
	what, id string
	pid      int
}

func (run *replicasRun) notes(t *testing.T) (list []note) {
	text, err := os.ReadFile(run.log)
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(string(text)) {
		var n note
		if _, err := fmt.Sscan(line, &n.what, &n.id, &n.pid); err == nil { // else it was cut off by a kill
			list = append(list, n)
		}
	}
	return list
}

// check reads the log: callbacks run again only after the replica that ran them was killed, and before that had gone on
// to a later event of the case; while none is killed, the events of a case run one after the other, in order.
func (run *replicasRun) check(t *testing.T) {
	type place struct {
		caseID string
		pid    int
	}
	runs := make(map[string]int)       // by event: the process that ran it last
	latest := make(map[place]string)   // by case and process: the event that started last
	running := make(map[string]string) // by case
	last := make(map[string]string)    // by case
	orderly := run.KillEvery == 0 || run.Gently
	for _, n := range run.notes(t) {
		caseID := n.id[:strings.LastIndex(n.id, "_")]
		if n.what == "end" {
			running[caseID] = ""
			continue
		}
		if before, again := runs[n.id]; again {
			run.report.Reruns++
			if !run.killed[before] {
				t.Errorf("%s runs again, though process %d, which ran it before, was not killed", n.id, before)
			}
			if latest[place{caseID, before}] != n.id {
				t.Errorf("%s runs again, though process %d, which ran it before, had gone on to %s",
					n.id, before, latest[place{caseID, before}])
			}
		}
		if orderly && running[caseID] != "" {
			t.Errorf("%s starts while %s is running", n.id, running[caseID])
		}
		if orderly && n.id <= last[caseID] {
			t.Errorf("%s starts after %s", n.id, last[caseID])
		}
		runs[n.id], latest[place{caseID, n.pid}] = n.pid, n.id
		running[caseID], last[caseID] = n.id, n.id
	}
}
