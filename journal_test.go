package offloadhook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
)

// diskMedium is a disk in memory that loses no less than a real one may: a process that dies leaves what it has written,
// a power loss only what was synced, and of the rest whatever it likes.
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

// diskProcess is the disk as one process sees it.
type diskProcess struct {
	*diskMedium
	fault  diskFault
	rng    *rand.Rand
	ops    int
	steps  []string // what they were
	struck int      // how many have failed
	dead   bool
	onSync func() // called at the beginning of an fsync of a file
}

func (m *diskMedium) process() *diskProcess {
	return &diskProcess{diskMedium: m, rng: rand.New(rand.NewPCG(1, 2))}
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
	return &fs.PathError{Op: step, Path: path, Err: errDisk}
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

func (p *diskProcess) list(dir string) (names []string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.step("list", dir); err != nil {
		return nil, err
	}
	if !p.made {
		return nil, &fs.PathError{Op: "list", Path: dir, Err: fs.ErrNotExist}
	}
	for path := range p.names {
		names = append(names, filepath.Base(path))
	}
	return names, nil
}

func (p *diskProcess) open(path string, flag int) (diskFile, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	step := "open"
	if flag&os.O_CREATE != 0 {
		step = "create"
	}
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
	return &diskHandle{p, node, path}, nil
}

func (p *diskProcess) rename(from, to string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.step("rename", from); err != nil {
		return err
	}
	node := p.names[from]
	if node == nil {
		return &fs.PathError{Op: "rename", Path: from, Err: fs.ErrNotExist}
	}
	if p.names[to] != nil {
		p.wrongs = append(p.wrongs, "renamed over "+to)
	}
	p.change(func(names map[string]*diskNode) {
		delete(names, from)
		names[to] = node
	})
	return nil
}

func (p *diskProcess) remove(path string) error {
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
		h.p.wrongs = append(h.p.wrongs, "truncated beyond the end")
		return nil
	}
	for sector := int(size) / diskSector; sector*diskSector < len(n.now); sector++ {
		n.dirty[sector] = true
	}
	n.now = n.now[:size:size]
	return nil
}

func (h *diskHandle) Sync() error {
	if h.p.onSync != nil {
		h.p.onSync()
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
}

func newJournalModel(t testing.TB) *journalModel {
	return &journalModel{
		t: t, bodies: make(map[string][]byte), done: make(map[string]bool), doubt: make(map[string]bool),
		gaveUp: make(map[string]bool),
	}
}

// journalEvent returns an event whose bytes are easily spoiled: by number of another shape, and size bytes larger.
func journalEvent(id string, shape, size int) *Envelope {
	format := []string{
		`{"event_id":%q,"event_type":"case.completed","data":{"caseId":"c","result":"%s"}}`,
		" \t{ \"event_id\" : %q,\r\n\n \"data\" : {\"caseId\":\"c\\u00e9\",\n\"result\":\"%s\"}\n} \n",
		`{"event_id":%q,"data":{"caseId":"\"}\\","text":"é𝄞` + "\x7f\xff" + `%s"},"done":"x","at":1e9} `,
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
		return false
	case fresh && known && !m.gaveUp[id]:
		m.t.Errorf("%s is new a second time", id)
	case !fresh && !known:
		m.t.Errorf("%s is acknowledged as a duplicate of nothing", id)
	case fresh && !known:
		m.order = append(m.order, id)
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
		default:
			want = append(want, id)
		}
	}
	for _, id := range ids {
		if slices.Contains(m.order, id) {
			got = append(got, id)
		}
	}
	if !slices.Equal(got, want) {
		m.t.Errorf("the order is %q, want %q", got, want)
	}
	if crashed {
		m.order = order
		clear(m.gaveUp)
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
		}
		synctest.Wait() // for the compaction
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
		if extra := journalEvent("evt_extra", 0, 0); !m.claim(j, extra) && !m.claim(j, extra) {
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
				steps = journalTrial(t, used, heavy, diskFault{}, journalCrash{}).steps
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
			for n := first; n < last; n++ {
				if !strings.HasPrefix(steps[n], fault.only) {
					continue
				}
				hits++
				for _, crash := range crashes {
					fault := fault
					fault.from = n + 1
					synctest.Test(t, func(t *testing.T) {
						journalTrial(t, used, heavy, fault, crash)
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

// A compaction is cut off at each of its operations, or one of them fails.
func TestRow09Compaction(t *testing.T) {
	journalTrials(t, "killed", true, diskFault{span: 1, dies: true, half: true}, journalKilled)
	journalTrials(t, "power lost", true, diskFault{span: 1, dies: true}, journalPowerLosses(1)[2:])
	journalTrials(t, "fails", true, diskFault{span: 1, half: true}, journalKilled)
}

// journalLine is a line of a journal as its documentation tells it.
type journalLine struct {
	off, end   int // of its JSON
	id, done   string
	event, raw []byte
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
			ids = append(ids, line.id)
		case line.done != "":
			ids = slices.DeleteFunc(ids, func(id string) bool { return id == line.done })
		}
	}
	return ids
}

// journalSpoiled opens a journal of these bytes; expects of it the events want, in order and unchanged; and that it goes
// on. It returns what Pending reported.
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
	for bit := 0; bit < 8*len(content); bit += journalCount(5, 1) {
		spoiled := bytes.Clone(content)
		spoiled[bit/8] ^= 1 << (bit % 8)
		hit := func(line journalLine) bool { return line.off <= bit/8 && bit/8 < line.end }
		report, medium := journalSpoiled(t, m, name, spoiled, journalAlive(lines, hit))
		damaged, kept := medium.newest(".damaged")
		if i := slices.IndexFunc(lines, hit); i < 0 {
			if report != "<nil>" || damaged != "" {
				t.Errorf("a line break is no record, but Pending reports %v and there is %q", report, damaged)
			}
		} else if off := fmt.Sprintf("%s: damaged record at byte %d;", name, lines[i].off); strings.Count(report, off) != 1 {
			t.Errorf("Pending reports %v, want once %s", report, off)
		} else if damaged != name+".damaged" || !bytes.Equal(kept, spoiled) {
			t.Errorf("%q was kept: %q", damaged, kept)
		}
		if t.Failed() {
			t.Fatalf("bit %d of byte %d of %q was flipped", bit%8, bit/8, content)
		}
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
			d.onSync = func() {
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
			}
			if _, err := j.Claim(t.Context(), env); !errors.Is(err, errDisk) {
				t.Fatalf("round %d: the first got %v", round, err)
			}
			if err := <-duplicate; !errors.Is(err, errDisk) {
				t.Fatalf("round %d: the duplicate got %v", round, err)
			}
			d.onSync = nil
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
