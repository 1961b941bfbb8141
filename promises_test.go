package offloadhook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

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

func (v *modelView) list(dir string) (names []string, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for path := range v.names {
		names = append(names, filepath.Base(path))
	}
	return names, v.check("readdir", dir)
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
	if e := in.node.model.ids[env.EventID]; err == nil && !in.node.view.dead {
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
	for seed := range count {
		random := rand.New(rand.NewPCG(uint64(seed), 24))
		schedule := make([]byte, 2*(1+random.IntN(40)))
		for i := range schedule {
			schedule[i] = byte(random.Uint32())
		}
		if promiseSchedule(t, schedule); t.Failed() {
			t.Fatalf("seed %d: %v", seed, schedule)
		}
	}
}
