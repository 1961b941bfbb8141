package offloadhook

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
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
	"testing"
	"testing/synctest"
	"time"
)

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

// diskProcess is the disk as one process sees it.
type diskProcess struct {
	*diskMedium
	fault   diskFault
	rng     *rand.Rand
	ops     int
	steps   []string // what they were
	struck  int      // how many have failed
	dead    bool
	onSync  func() // called at the beginning of an fsync of a file
	onWrite func(b []byte)
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
	if h.p.onWrite != nil {
		h.p.onWrite(b)
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
			ids = append(ids, line.id)
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
		_, err := fmt.Fprintf(out, "%s %x\n", env.EventID, sha256.Sum256(env.Raw))
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
	for range 600 {
		content, _ := os.ReadFile(handled)
		seen, last := make(map[string]bool), make(map[string]string)
		again, missing = 0, nil
		for line := range strings.Lines(string(content)) {
			id, sum, _ := strings.Cut(strings.TrimSpace(line), " ")
			if sum != fmt.Sprintf("%x", sha256.Sum256([]byte(journalBody(id)))) {
				t.Fatalf("a callback got other bytes of %s", id)
			}
			if seen[id] {
				again++
				continue
			}
			seen[id] = true
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
	fast.onSync = func() {
		fast.onSync = nil
		close(read) // it has read the files
		<-goOn
	}
	slow.onWrite = func(b []byte) {
		if !bytes.Contains(b, []byte(`{"copied"`)) {
			return
		}
		slow.onWrite = nil
		go func() {
			defer close(done)
			winner, err = openJournal(fast, "journal", 0)
		}()
		<-read
	}
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
	if _, err := exec.LookPath("sh"); err != nil {
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
		for _, path := range []string{path, filepath.Join(path, "below")} {
			j, err := OpenJournal(path, 0)
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
		if err != nil || files != 1 {
			t.Errorf("there are %d files, %v; want 1", files, err)
		}
	})
}

// A journal that was closed refuses everything.
func TestJournalClosed(t *testing.T) {
	j := journalOpen(t, t.TempDir())
	env := journalEvent("evt_1", 0, 0)
	if _, err := j.Claim(t.Context(), env); err != nil {
		t.Fatal(err)
	}
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

// With 64 clients, a claim costs less than a tenth of an fsync.
func TestGroupCommit(t *testing.T) {
	const clients, each = 64, 50
	d := newDisk().process()
	j, err := openJournal(d, "journal", 0)
	if err != nil {
		t.Fatal(err)
	}
	before := strings.Count(strings.Join(d.steps, " "), "sync")
	d.onSync = func() { time.Sleep(time.Millisecond) } // as long as a disk takes
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
	if err := j.Close(); err != nil {
		t.Error(err)
	}
}

// journalWrite writes a journal with so many finished ids and unfinished events, by its documentation.
func journalWrite(t testing.TB, dir string, finished, unfinished int) (path string) {
	t.Helper()
	var out bytes.Buffer
	line := func(format string, args ...any) {
		text := fmt.Appendf(nil, format, args...)
		fmt.Fprintf(&out, "%08x %s\n", crc32.Checksum(text, crc32.MakeTable(crc32.Castagnoli)), text)
	}
	at := time.Now().UnixMilli()
	for i := range finished {
		sum := sha256.Sum256(fmt.Appendf(nil, "evt_done_%d", i))
		line(`{"sha256":"%x","at":%d}`, sum[:16], at)
	}
	for i := range unfinished {
		env := journalEvent(fmt.Sprint("evt_", i), 0, 1000)
		line(`{"id":%q,"at":%d,"event":%s}`, env.EventID, at, env.Raw)
	}
	line(`{"copied":"events-00000001.log","at":%d}`, at)
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
	line := func(text string) string {
		return fmt.Sprintf("%08x %s\n", crc32.Checksum([]byte(text), crc32.MakeTable(crc32.Castagnoli)), text)
	}
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
		var mu sync.Mutex
		seen := make(map[string]bool)
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			var event Envelope
			body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, 1<<20))
			if err != nil || json.Unmarshal(body, &event) != nil || event.EventID == "" {
				http.Error(w, "bad event", http.StatusBadRequest)
				return
			}
			mu.Lock()
			known := seen[event.EventID]
			seen[event.EventID] = true
			mu.Unlock()
			if !known {
				go func() {
					if err := json.Unmarshal(event.Data, new(CaseCompleted)); err != nil {
						panic(err)
					}
				}()
			}
			w.WriteHeader(http.StatusAccepted)
		})
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
				_, _ = io.Copy(io.Discard, answer.Body)
				if answer.StatusCode != http.StatusAccepted {
					return errors.New(answer.Status)
				}
				return answer.Body.Close()
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
	format, err := Fixtures.ReadFile("testdata/case_completed_b.json")
	if err != nil {
		b.Fatal(err)
	}
	env, err := ParseEnvelope(format)
	if err != nil {
		b.Fatal(err)
	}
	var next atomic.Int64
	var sending sync.WaitGroup
	b.ResetTimer()
	for range clients {
		sending.Go(func() {
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				body := bytes.Replace(format, []byte(env.EventID), fmt.Append(nil, "evt_", i), 1)
				body = bytes.Replace(body, []byte(`"caseId": "`), fmt.Append(nil, `"caseId": "`, i), 1)
				if err := send(body); err != nil {
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
