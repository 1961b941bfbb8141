package offloadhook

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"iter"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Deduper remembers which events have been taken. Its methods are called concurrently, by one receiver or by many that
// share it, with a context that ends after 5 s, but not when the sender hangs up. They must return then, for the sender
// waits, and must not panic: outside of a request that ends the process.
type Deduper interface {
	// Claim atomically records env.EventID and reports whether it is new. It is called before the 2xx. Together with an
	// error, fresh is false.
	Claim(ctx context.Context, env *Envelope) (fresh bool, err error)
	// Done ends a claim. err nil: handled, remember the id. err non-nil: given up, the id may be claimed again.
	// On a claim that is not held (never granted, ended, or taken over) it changes nothing and returns nil.
	Done(ctx context.Context, env *Envelope, err error) error
}

// Inbox is a Deduper that keeps each event it claims until it is done: with one, a 2xx is a promise (promise 1). The
// event is stored, env.Raw unchanged, when Claim returns; Pending yields what ParseEnvelope makes of it. What was given
// up is claimed anew when it is delivered again, then with its new body and as the newest, or when Pending yields it. An
// Inbox that several receivers share may answer false for a new event that it gives to another of them.
type Inbox interface {
	Deduper
	// Pending yields, oldest first, a snapshot of what was claimed before the call, is not done, and is this receiver's
	// to handle: its own events and those of dead receivers. What was given up is left out until it has rested for ten
	// minutes or an instance starts (its first call). A caller may stop early. It is called every 10 s while the receiver
	// lives, so a shared store may renew its lease there, with a context that ends after 10 s: it must return then, for
	// what is claimed meanwhile waits. An error that wraps ErrClosed says that another has taken the store over. After
	// any other error it may go on with further events.
	Pending(ctx context.Context) iter.Seq2[*Envelope, error]
}

// Memory is the Deduper that a Handler has by default: it remembers ids in the process, at about 60 bytes each, and
// forgets them when that ends. The zero value is ready to use. Set the fields before the first call. Its methods are
// safe for concurrent use and return no errors.
type Memory struct {
	TTL   time.Duration // how long a handled id is remembered, rounded up to a full second; 0 means 24 hours
	Limit int           // ids remembered at most; the oldest handled ones go first; 0 means 1,000,000

	mu      sync.Mutex // protects what follows
	claimed map[digest]struct{}
	done    idSet
}

var _ Deduper = (*Memory)(nil)

// Claim claims the id unless it is being handled or remembered as handled.
func (m *Memory) Claim(_ context.Context, env *Envelope) (fresh bool, err error) {
	d := digestOf(env.EventID)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done.expire(time.Now().Add(-cmp.Or(max(m.TTL, 0), 24*time.Hour)))
	if _, held := m.claimed[d]; held || m.done.has(d) {
		return false, nil
	}
	if m.claimed == nil {
		m.claimed = make(map[digest]struct{})
	}
	m.claimed[d] = struct{}{}
	m.shrink()
	return true, nil
}

// Done remembers the id for TTL, or forgets it if err is not nil.
func (m *Memory) Done(_ context.Context, env *Envelope, err error) error {
	d := digestOf(env.EventID)
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, held := m.claimed[d]; !held {
		return nil
	}
	delete(m.claimed, d)
	if err == nil {
		m.done.add(d, time.Now())
		m.shrink()
	}
	return nil
}

// shrink keeps to Limit. An id being handled never goes (promise 3).
func (m *Memory) shrink() {
	for m.done.len() > 0 && m.done.len()+len(m.claimed) > cmp.Or(max(m.Limit, 0), 1_000_000) {
		m.done.drop()
	}
}

// digest stands for an id: half of its SHA-256, so that no two ids are taken for one, by chance or by design.
type digest [16]byte

func digestOf(id string) digest {
	var room [255]byte // so that id need not be copied to the heap
	sum := sha256.Sum256(append(room[:0], id...))
	return digest(sum[:])
}

// idSet is a set of ids in the order in which they were added, which is the order in which they expire. It holds no
// pointer per id for the garbage collector to follow.
type idSet struct {
	ids   map[digest]struct{}
	queue []idTime // may be read while others are added and dropped
}

type idTime struct {
	id digest
	at uint32 // Unix seconds, rounded up, so that no id goes early
}

func (s *idSet) len() int { return len(s.queue) }

func (s *idSet) has(d digest) bool {
	_, found := s.ids[d]
	return found
}

// add adds d unless it is in the set.
func (s *idSet) add(d digest, at time.Time) {
	if s.ids == nil {
		s.ids = make(map[digest]struct{})
	}
	s.ids[d] = struct{}{}
	if len(s.ids) == len(s.queue) { // it was in the set
		return
	}
	when := uint32(at.Add(time.Second - 1).Unix())
	if n := s.len(); n > 0 {
		when = max(when, s.queue[n-1].at) // the clock may have gone back
	}
	s.queue = append(s.queue, idTime{d, when})
}

// expire drops what was added at or before then.
func (s *idSet) expire(then time.Time) {
	for s.len() > 0 && int64(s.queue[0].at) <= then.Unix() {
		s.drop()
	}
}

// drop drops the oldest id.
func (s *idSet) drop() {
	delete(s.ids, s.queue[0].id)
	s.queue = s.queue[1:]
}

// Journal is the Inbox for one Receiver with a local disk: append-only text files in a directory of its own, one
// record per line: a checksum (CRC-32C in hex), a space, and JSON. {"id":…,"at":…,"event":…} is a claim with the body
// as it was received, or "base64" where that has line breaks; {"done":…,"at":…} is its end; times are Unix
// milliseconds. Of finished events, compaction keeps {"sha256":…,"at":…}: the first halves of the hashes of their ids,
// and the time of the last.
//
// OpenJournal makes one. Its methods are safe for concurrent use, and wait for the disk, not for their context. Claims
// go on during a compaction, except during two fsyncs of the directory. Only one Journal at a time uses a directory: a
// later one takes over, and the earlier one refuses from then on.
type Journal struct {
	disk      disk
	dir       string
	retention time.Duration

	renewal sync.Mutex // held during a renew; locked before commits and mu
	commits sync.Mutex // held during the fsync of a group; locked before mu

	mu      sync.Mutex // protects what follows; held during no fsync of a file but at Close
	closed  error      // set for good when the journal is closed, or another's
	files   []*logFile // by number; the last is the one to write to
	buf     []byte     // records to be written to it
	group   *group     // the claims that the next fsync is for
	claims  map[digest]*claim
	order   []*claim // the claims, oldest first; also some that have ended
	live    int64    // bytes of the claims
	done    idSet
	started bool    // Pending has been called
	reports []error // for Pending to yield
	slack   int64   // bytes of garbage to wait for, after a compaction that failed
	tries   int     // to go on in a new file after a failed fsync
	failed  error   // the last of them, if it failed
	damaged []int   // the numbers of files with damaged records
}

var _ Inbox = (*Journal)(nil)

// logFile is a file of the journal.
type logFile struct {
	diskFile
	gen  int   // its number
	size int64 // of whole records
	bad  error // errNew, or what failed, an fsync or the cutting of a torn record: write nothing, trust no later fsync
}

// claim is an event that is claimed and not done. Its payload stays in the file.
type claim struct {
	id     digest
	file   *logFile
	off    int64 // of its line
	size   int
	group  *group    // until it is durable
	before *claim    // until then, the one of the same id that was given up
	gaveUp time.Time // zero unless it was
	ended  bool
}

// group is a number of claims, at least one, that share a file and its next fsync.
type group struct {
	claims []*claim
	synced chan struct{} // closed when err is set
	err    error
}

// errNew marks a file that is not in use yet: it is empty, and its name may not be durable.
var errNew = errors.New("offloadhook: journal: the file is new")

// OpenJournal opens the journal in dir and takes over from a Journal that uses it. It makes files with mode 0600 and,
// if need be, dir with 0700, since payloads are your customers' data; Windows has no such modes. Events are kept until
// they are done, and then their ids for at least retention, counted from the first time if one is handled anew after
// that; 0 means 30 days. An error names the file and the step that failed.
func OpenJournal(dir string, retention time.Duration) (*Journal, error) {
	return openJournal(osDisk{}, dir, retention)
}

func openJournal(d disk, dir string, retention time.Duration) (*Journal, error) {
	retention = cmp.Or(max(retention, 0), 30*24*time.Hour)
	for tries := 100; ; tries-- {
		j := &Journal{disk: d, dir: dir, retention: retention, claims: make(map[digest]*claim)}
		err := j.open()
		if err == nil {
			return j, nil
		}
		j.closed = err
		_ = j.Close()
		// Another opener may have been faster, or the earlier owner has just ended a compaction.
		if again := errors.Is(err, fs.ErrExist) || errors.Is(err, fs.ErrNotExist); !again || tries == 0 {
			return nil, fmt.Errorf("offloadhook: opening the journal: %w", err)
		}
	}
}

// Close ends the use of the journal: from then on it refuses, with ErrClosed. Shut the receiver down first.
func (j *Journal) Close() (err error) {
	if err = j.lock(); err != nil { // after a failed fsync what is done has to be written once more
		j.mu.Lock()
	}
	if j.closed != nil {
		err = nil
	}
	j.closed = cmp.Or(j.closed, fmt.Errorf("%w: the journal in %s", ErrClosed, j.dir))
	j.mu.Unlock()
	j.renewal.Lock() // and so waits for a compaction
	defer j.renewal.Unlock()
	j.commits.Lock()
	defer j.commits.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	j.refuse(j.closed)
	for _, file := range j.files {
		if file.bad != errNew { // which is no failure of its own: err tells what was
			err = errors.Join(err, file.bad)
		}
		err = errors.Join(err, file.Sync(), file.Close())
	}
	err = errors.Join(append(j.reports, err)...)
	j.files, j.reports = nil, nil
	return named(err)
}

// lock locks mu where the journal can be written to. When an fsync has failed, it first goes on in a new file.
func (j *Journal) lock() (err error) {
	j.mu.Lock()
	for err == nil && j.closed == nil && j.bad() {
		tried := j.tries
		j.mu.Unlock()
		j.renewal.Lock()
		j.mu.Lock()
		if j.bad() && j.tries == tried { // else another has tried meanwhile
			failure := j.renew()
			j.failed, j.tries = cmp.Or(j.owns(), failure), j.tries+1
		}
		if j.bad() {
			err = j.failed
		}
		j.renewal.Unlock()
	}
	if err = cmp.Or(j.closed, err); err != nil {
		j.mu.Unlock()
	}
	return err
}

// Claim returns when the event is durable: written and synced, together with the claims that came meanwhile. It stores
// env.Raw, which must be an event with that id.
func (j *Journal) Claim(ctx context.Context, env *Envelope) (fresh bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if !usableID(env.EventID) {
		return false, fmt.Errorf("%w: the event_id is unusable", ErrMalformed)
	}
	id, _ := json.Marshal(env.EventID)
	if err := j.lock(); err != nil {
		return false, named(err)
	}
	d, now := digestOf(env.EventID), time.Now()
	j.done.expire(now.Add(-j.retention))
	c := j.claims[d]
	if c != nil && c.group == nil && c.gaveUp.IsZero() || c == nil && j.done.has(d) {
		defer j.mu.Unlock()
		return false, named(j.owns())
	}
	fresh = c == nil || !c.gaveUp.IsZero()
	leads := fresh && j.group == nil
	if leads {
		j.group = &group{synced: make(chan struct{})}
	}
	if fresh {
		start := len(j.buf)
		j.buf = appendRecord(j.buf, "id", id, now.UnixMilli(), env.Raw)
		off := j.last().size + int64(start)
		c = &claim{id: d, group: j.group, before: c, file: j.last(), off: off, size: len(j.buf) - start}
		j.add(c)
		j.group.claims = append(j.group.claims, c)
	}
	g := c.group
	j.mu.Unlock()
	if leads {
		j.commit(g)
	}
	<-g.synced
	return fresh && g.err == nil, named(g.err)
}

// Done writes the end of an event at once, and does not wait until that is durable.
func (j *Journal) Done(_ context.Context, env *Envelope, result error) error {
	if err := j.lock(); err != nil {
		return named(err)
	}
	defer j.mu.Unlock()
	c, now := j.claims[digestOf(env.EventID)], time.Now()
	switch {
	case c == nil || c.group != nil || !c.gaveUp.IsZero():
		return nil
	case result != nil:
		c.gaveUp = now
		return nil
	}
	id, _ := json.Marshal(env.EventID)
	j.buf = appendRecord(j.buf, "done", id, now.UnixMilli(), nil)
	if err := j.write(); err != nil {
		return named(err)
	}
	j.end(c)
	j.done.add(c.id, now)
	j.tidy()
	return nil
}

// tidy starts a compaction if there is more garbage than what is alive. mu is held.
func (j *Journal) tidy() {
	alive := j.live + 33*int64(j.done.len()) // what a copy takes
	if j.size() > 2*alive+1<<20+j.slack && j.renewal.TryLock() {
		go j.compact()
	}
}

// Pending yields the unfinished events, oldest first, after what has been found damaged since the last call. It is for
// the receiver alone, which would miss what another caller is told.
func (j *Journal) Pending(ctx context.Context) iter.Seq2[*Envelope, error] {
	return func(yield func(*Envelope, error) bool) {
		if err := j.lock(); err != nil {
			yield(nil, named(err))
			return
		}
		err := j.owns()
		if err == nil {
			err, j.reports = errors.Join(j.reports...), nil
		}
		closed, all := j.closed, !j.started
		order := slices.DeleteFunc(slices.Clone(j.order), func(c *claim) bool { return c.group != nil })
		j.started = true
		j.mu.Unlock()
		if err != nil && !yield(nil, named(err)) || closed != nil {
			return
		}
		for _, c := range order {
			j.mu.Lock()
			env, err := (*Envelope)(nil), cmp.Or(j.closed, ctx.Err())
			stop := err != nil
			rested := time.Since(c.gaveUp) >= 10*time.Minute // or was not given up
			if !stop && j.claims[c.id] == c && (all || rested) {
				c.gaveUp = time.Time{}
				_, env, err = j.read(c)
			}
			j.mu.Unlock()
			if (env != nil || err != nil) && !yield(env, named(err)) || stop {
				return
			}
		}
	}
}

// named returns err, which a user gets, with the name of what failed.
func named(err error) error {
	if err == nil || strings.HasPrefix(err.Error(), "offloadhook: ") {
		return err
	}
	return fmt.Errorf("offloadhook: journal: %w", err)
}

// add appends c to the claims. mu is held.
func (j *Journal) add(c *claim) {
	j.claims[c.id] = c
	j.order = append(j.order, c)
	j.live += int64(c.size)
}

// end takes c out of the claims. mu is held.
func (j *Journal) end(c *claim) {
	c.ended = true
	if j.claims[c.id] == c {
		delete(j.claims, c.id)
	}
	j.live -= int64(c.size)
	for len(j.order) > 0 && j.order[0].ended {
		j.order[0] = nil // for the garbage collector
		j.order = j.order[1:]
	}
	if len(j.order) > 2*len(j.claims)+1000 {
		j.order = slices.DeleteFunc(j.order, func(c *claim) bool { return c.ended })
	}
}

// read reads the line of c, which is durable, and its event. If it is damaged, or holds none, c is lost: it ends, and the
// error says so. mu is held.
func (j *Journal) read(c *claim) (line []byte, env *Envelope, err error) {
	line = make([]byte, c.size)
	if _, err := c.file.ReadAt(line, c.off); err != nil && err != io.EOF {
		return nil, nil, err
	}
	rec := parseRecord(line)
	if env, err = ParseEnvelope(rec.event); err == nil {
		return append(rec.line, '\n'), env, nil
	}
	j.end(c)
	return nil, nil, j.damageAt(c.file, c.off)
}

func (j *Journal) damageAt(file *logFile, off int64) error {
	j.damaged = append(j.damaged, file.gen)
	return fmt.Errorf("offloadhook: journal: %s: damaged record at byte %d; will be kept as *.damaged", j.path(file.gen), off)
}

// commit makes durable the claims of g, and those that come until it is its turn.
func (j *Journal) commit(g *group) {
	j.commits.Lock()
	defer j.commits.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.group == g {
		_ = j.write() // if that fails, g is refused
		j.group = nil
	}
	if g.err != nil { // refused, now or meanwhile
		return
	}
	file := g.claims[0].file
	err := cmp.Or(j.closed, file.bad)
	if err == nil {
		j.mu.Unlock()
		err = file.Sync()
		j.mu.Lock()
		if err == nil {
			err = j.owns()
		} else if file.bad = err; file == j.last() {
			j.refuse(err)
		}
	}
	j.settle(g, err)
	if err == nil {
		j.tidy() // a claim may have left one behind that was given up
	}
}

// write writes buf. If that fails it cuts the file back to its last whole record. mu is held.
func (j *Journal) write() error {
	file := j.last()
	n, err := file.WriteAt(j.buf, file.size)
	if err == nil {
		file.size += int64(n)
		j.buf = j.buf[:0]
		if cap(j.buf) > 1<<20 {
			j.buf = nil
		}
		return nil
	}
	if file.Truncate(file.size) != nil {
		file.bad = err
	}
	j.refuse(err)
	return err
}

// refuse refuses the claims that no fsync has begun for. mu is held.
func (j *Journal) refuse(err error) {
	if g := j.group; g != nil {
		j.group = nil
		j.settle(g, err)
	}
	j.buf = j.buf[:0]
}

// settle ends the wait of the claims of g. mu is held.
func (j *Journal) settle(g *group, err error) {
	for _, c := range g.claims {
		before := c.before
		c.group, c.before = nil, nil
		if err != nil {
			j.end(c)
		}
		switch {
		case before == nil || before.ended:
		case err != nil:
			j.claims[c.id] = before
		default:
			j.end(before)
		}
	}
	g.err = err
	close(g.synced)
}

// owns returns an error unless the last file is the newest, and has its name still. Files are made exclusively, under a
// number that is higher than any, and go when newer ones have all that is alive. So whoever takes over after this look
// reads what was synced before it. mu is held.
func (j *Journal) owns() error {
	if j.closed != nil {
		return j.closed
	}
	gens, err := j.numbers(".log")
	if err != nil {
		return err
	}
	last := j.last()
	ours := slices.Max(append(gens, 0)) == last.gen
	if ours {
		ours, err = j.disk.holds(j.path(last.gen), last.diskFile)
	}
	if !ours && (err == nil || errors.Is(err, fs.ErrNotExist)) { // a later owner may remove it after the listing
		j.closed = fmt.Errorf("%w: the journal in %s has been taken over", ErrClosed, j.dir)
	}
	return cmp.Or(j.closed, err)
}

// bad reports whether a file is not to be trusted. mu is held.
func (j *Journal) bad() bool {
	return slices.ContainsFunc(j.files, func(file *logFile) bool { return file.bad != nil })
}

func (j *Journal) last() *logFile { return j.files[len(j.files)-1] }

func (j *Journal) path(gen int) string {
	return filepath.Join(j.dir, fmt.Sprintf("events-%08d.log", gen))
}

// numbers returns the numbers of the files whose names end so, in ascending order.
func (j *Journal) numbers(suffix string) (gens []int, err error) {
	entries, err := j.disk.list(j.dir)
	for _, entry := range entries {
		gen := 0
		_, _ = fmt.Sscanf(entry.Name(), "events-%d", &gen)
		if gen > 0 && entry.Name() == fmt.Sprintf("events-%08d%s", gen, suffix) {
			gens = append(gens, gen)
		}
	}
	slices.Sort(gens)
	return gens, err
}

// create adds a file to write to, under an even number: the number before it is for the copy to come. mu is held.
func (j *Journal) create(newest int) error {
	gen := newest + 2 + newest%2
	file, err := j.disk.open(j.path(gen), os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err == nil {
		j.files = append(j.files, &logFile{diskFile: file, gen: gen, bad: errNew})
	}
	return err
}

// open takes over what is in dir, with a file of its own. Some of what it reads may not be durable, so all of it is
// copied.
func (j *Journal) open() error {
	err := j.disk.mkdir(j.dir)
	gens, listErr := j.numbers(".log")
	if err = cmp.Or(err, listErr); err == nil {
		newest := rand.IntN(5e7) // so that a directory made anew does not reuse numbers that a former owner still uses
		if len(gens) > 0 {
			newest = gens[len(gens)-1]
		}
		err = j.create(newest)
	}
	if err != nil {
		return err
	}
	if err = j.load(gens); err != nil {
		return cmp.Or(j.owns(), err)
	}
	if err = j.lock(); err == nil { // the file is new
		j.mu.Unlock()
	}
	return err
}

// load reads the files under the numbers gens, which are all before the last.
func (j *Journal) load(gens []int) (err error) {
	for _, gen := range gens {
		file := &logFile{gen: gen}
		if file.diskFile, err = j.disk.open(j.path(gen), os.O_RDWR); err != nil {
			return err
		}
		j.files = slices.Insert(j.files, len(j.files)-1, file)
		if err = j.replay(file); err != nil {
			return err
		}
	}
	again, err := j.numbers(".log")
	if err == nil && !slices.Equal(again, append(gens, j.last().gen)) {
		err = fs.ErrNotExist // what gets its name while a directory is listed need not be seen
	}
	return err
}

// replay reads a file. The last word on an id counts. If the file ends within a record, that was never acknowledged.
func (j *Journal) replay(file *logFile) error {
	now := time.Now()
	latest := now.Add(j.retention).UnixMilli()
	in := bufio.NewReaderSize(io.NewSectionReader(file, 0, math.MaxInt64), 1<<16)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil && err != io.EOF {
			return err
		}
		for len(line) > 0 {
			rec := parseRecord(line)
			if rec.kind == "" && err == io.EOF && rec.size == len(line) {
				return nil
			}
			if rec.kind == "" {
				j.reports = append(j.reports, j.damageAt(file, file.size))
			}
			at := time.UnixMilli(min(rec.at, latest)) // the clock may have been ahead then, or be behind now
			fresh := now.Sub(at) < j.retention
			for _, id := range rec.ids {
				if c := j.claims[id]; c != nil {
					j.end(c)
				}
				if rec.kind == "id" {
					j.add(&claim{id: id, file: file, off: file.size, size: rec.size})
				} else if fresh {
					j.done.add(id, at)
				}
			}
			file.size += int64(rec.size)
			line = line[rec.size:]
		}
		if err == io.EOF {
			return nil
		}
	}
}

// size returns the size of all files. mu is held.
func (j *Journal) size() (total int64) {
	for _, file := range j.files {
		total += file.size
	}
	return total
}

// compact leaves the garbage behind. renewal is held, until it is done.
func (j *Journal) compact() {
	j.mu.Lock()
	err := j.renew()
	j.slack = 0
	if err != nil && j.closed == nil {
		j.slack = j.size() // until the files have doubled
		j.reports = append(j.reports, named(err))
	}
	j.mu.Unlock()
	j.renewal.Unlock()
}

// renew goes on in a new file and copies what is alive to another, which comes before that by its number, so that the
// order of the files stays that of the events. When the copy is durable, the older files go. At the opening and after a
// failed fsync nothing is written to the new file before that; else claims go on. renewal and mu are held.
func (j *Journal) renew() (err error) {
	sound := !j.bad()
	if j.last().bad != errNew { // else a renewal has failed before
		if err = j.owns(); err == nil {
			err = j.write()
		}
		if err == nil {
			j.group = nil // who leads it will sync its file
			err = j.create(j.last().gen)
		}
	}
	if err == nil {
		err = j.disk.syncDir(j.dir)
	}
	if err = cmp.Or(err, j.owns()); err != nil {
		return err
	}
	old, live := j.files[:len(j.files)-1], j.last()
	if sound {
		live.bad = nil
	}
	dst := &logFile{gen: live.gen - 1}
	path, ids, claims := j.path(dst.gen), j.done.queue, slices.Clone(j.order)
	j.mu.Unlock()
	offs, err := j.copyTo(dst, ids, claims)
	j.mu.Lock()
	if err = cmp.Or(err, j.owns()); err == nil {
		err = j.disk.rename(path+".tmp", path)
	}
	if err != nil {
		_ = j.disk.remove(path + ".tmp")
		return err
	}
	if err = j.disk.syncDir(j.dir); err == nil {
		dst.diskFile, err = j.disk.open(path, os.O_RDWR)
	}
	if live.bad == errNew && (err == nil || j.disk.remove(path) != nil) {
		live.bad = err // if the copy stays, no longer errNew, lest the next one overwrite it
	}
	if err != nil {
		return err
	}
	for i, c := range claims {
		c.file, c.off = dst, offs[i]
	}
	j.files = []*logFile{dst, live}
	damaged := slices.Clone(j.damaged)
	j.mu.Unlock() // it takes a while to remove a large file
	j.clear(old, dst.gen, damaged)
	j.mu.Lock()
	return nil
}

// clear closes old and removes the files before number gen, which is a copy of what is alive, but keeps the damaged ones
// aside. What cannot be removed goes with the next copy.
func (j *Journal) clear(old []*logFile, gen int, damaged []int) {
	for _, file := range old {
		_ = file.Close()
	}
	temps, _ := j.numbers(".log.tmp")
	for _, n := range temps {
		if n < gen { // of a copying that did not end
			_ = j.disk.remove(j.path(n) + ".tmp")
		}
	}
	gens, err := j.numbers(".log")
	for _, n := range gens { // the oldest first, lest an event's end go before its claim
		switch {
		case n >= gen || err != nil && !errors.Is(err, fs.ErrNotExist):
			return
		case slices.Contains(damaged, n):
			err = j.disk.rename(j.path(n), j.path(n)+".damaged")
		default:
			err = j.disk.remove(j.path(n))
		}
		err = cmp.Or(err, j.disk.syncDir(j.dir))
	}
}

// copyTo writes the ids, and those of the claims that are alive, to what is to be dst, and returns where they are.
func (j *Journal) copyTo(dst *logFile, ids []idTime, claims []*claim) (offs []int64, err error) {
	_ = j.disk.remove(j.path(dst.gen) + ".tmp") // of an earlier try
	file, err := j.disk.open(j.path(dst.gen)+".tmp", os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, err
	}
	out := bufio.NewWriterSize(io.NewOffsetWriter(file, 0), 1<<17)
	write := func(line []byte) {
		_, err = out.Write(line)
		dst.size += int64(len(line))
	}
	var halves, buf []byte
	for block := range slices.Chunk(ids, 1024) {
		halves = append(halves[:0], '"')
		for _, id := range block {
			halves = hex.AppendEncode(halves, id.id[:])
		}
		buf = appendRecord(buf[:0], "sha256", append(halves, '"'), int64(block[len(block)-1].at)*1000, nil)
		write(buf)
	}
	for _, c := range claims {
		j.mu.Lock()
		if g := c.group; g != nil {
			j.mu.Unlock()
			<-g.synced
			j.mu.Lock()
		}
		var line []byte
		if err == nil && !c.ended {
			if line, _, err = j.read(c); c.ended {
				j.reports, err = append(j.reports, err), nil
			}
		}
		j.mu.Unlock()
		offs = append(offs, dst.size)
		if err == nil {
			write(line)
		}
	}
	if err == nil {
		err = cmp.Or(out.Flush(), file.Sync())
	}
	return offs, errors.Join(err, file.Close())
}

// record is a line of the journal.
type record struct {
	size  int    // up to the next one
	line  []byte // without its line break
	kind  string // the name of the first member of its JSON; "" if it is damaged
	ids   []digest
	at    int64 // Unix milliseconds
	event []byte
}

// recordStart is how a record starts, and is found in no JSON: in a string, its first quote would be the end.
var recordStart = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`[0-9a-f]{8} \{"(id|done|sha256)"`)
})

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum returns what stands before record in a line.
func checksum(record []byte) (sum [9]byte) {
	var crc [4]byte
	binary.BigEndian.PutUint32(crc[:], crc32.Checksum(record, castagnoli))
	hex.Encode(sum[:], crc[:])
	sum[8] = ' '
	return sum
}

func appendRecord(buf []byte, kind string, value []byte, at int64, event []byte) []byte {
	start := len(buf)
	buf = append(append(buf, "00000000 {\""...), kind...)
	buf = append(append(buf, "\":"...), value...)
	buf = strconv.AppendInt(append(buf, `,"at":`...), at, 10)
	if bytes.IndexByte(event, '\n') >= 0 {
		buf = append(base64.StdEncoding.AppendEncode(append(buf, `,"base64":"`...), event), '"')
	} else if event != nil {
		buf = append(append(buf, `,"event":`...), event...)
	}
	buf = append(buf, '}')
	sum := checksum(buf[start+9:])
	copy(buf[start:], sum[:])
	return append(buf, '\n')
}

// parseRecord reads the record at the start of line, which ends where a line or the file does.
func parseRecord(line []byte) (rec record) {
	rec.size = len(line)
	if len(line) < 10 {
		return rec
	}
	end := len(line) - 1
	if checksum(line[9:end]) != [9]byte(line) {
		end = 9 + scan(line[9:], 0, nesting+1, nil) // a damaged line break costs no record
		if end < 9 || checksum(line[9:end]) != [9]byte(line) {
			if next := recordStart().FindIndex(line[1:]); next != nil {
				rec.size = 1 + next[0]
			}
			return rec
		}
	}
	rec.size, rec.line = end, line[:end]
	if at(line, end) == '\n' { // else the next record may start here
		rec.size++
	}
	head, event, _ := bytes.Cut(line[9:end], []byte(`,"event":`)) // in a string the quotes would be escaped
	rec.event = bytes.TrimSuffix(event, []byte("}"))
	scan(head, 0, nesting, func(name []byte, i int) int {
		end := scan(head, i, nesting-1, nil)
		if end < 0 {
			return end
		}
		rec.kind = cmp.Or(rec.kind, string(name))
		switch value := head[i:end]; string(name) {
		case "id", "done":
			rec.ids = []digest{digestOf(text(value))}
		case "sha256":
			halves, _ := hex.AppendDecode(nil, bytes.Trim(value, `"`))
			for ; len(halves) >= len(digest{}); halves = halves[len(digest{}):] {
				rec.ids = append(rec.ids, digest(halves))
			}
		case "at":
			rec.at, _ = strconv.ParseInt(string(value), 10, 64)
		case "base64":
			rec.event, _ = base64.StdEncoding.DecodeString(text(value))
		}
		return end
	})
	if !slices.Contains([]string{"id", "done", "sha256"}, rec.kind) {
		rec.ids = nil // of a later version, which may mean anything
	}
	return rec
}

// disk is what the journal needs of a file system. Tests put others in its place.
type disk interface {
	mkdir(dir string) error
	list(dir string) ([]fs.DirEntry, error)
	holds(path string, file diskFile) (bool, error) // the name is that of the file still
	open(path string, flag int) (diskFile, error)
	rename(from, to string) error
	remove(path string) error
	syncDir(dir string) error
}

type diskFile interface {
	io.ReaderAt
	io.WriterAt
	Truncate(size int64) error
	Sync() error
	Close() error
}

type osDisk struct{}

func (d osDisk) mkdir(dir string) error {
	err := os.MkdirAll(dir, 0o700)
	for parent := filepath.Dir(dir); err == nil && parent != dir; dir, parent = parent, filepath.Dir(parent) {
		_ = d.syncDir(parent) // so that dir itself lasts; as far as that is permitted
	}
	return err
}

func (osDisk) list(dir string) ([]fs.DirEntry, error)       { return os.ReadDir(dir) }
func (osDisk) open(path string, flag int) (diskFile, error) { return os.OpenFile(path, flag, 0o600) }
func (osDisk) rename(from, to string) error                 { return os.Rename(from, to) }
func (osDisk) remove(path string) error                     { return os.Remove(path) }

func (osDisk) holds(path string, file diskFile) (bool, error) {
	there, err := os.Stat(path)
	here, hereErr := file.(*os.File).Stat()
	return os.SameFile(there, here), cmp.Or(err, hereErr)
}

// syncDir makes the names in dir durable. Windows has no call for that.
func (osDisk) syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	file, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close())
}
