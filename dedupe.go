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
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Deduper remembers which events have been taken. Its methods are called concurrently, by one receiver or by many that
// share it, with a context that ends after 5 s and not when the sender hangs up.
type Deduper interface {
	// Claim atomically records env.EventID and reports whether it is new. It is called before the 2xx.
	Claim(ctx context.Context, env *Envelope) (fresh bool, err error)
	// Done ends a claim. err nil: handled, remember the id. err non-nil: given up, the id may be claimed again.
	// On a claim that is not held (never granted, or taken over) it changes nothing and returns nil.
	Done(ctx context.Context, env *Envelope, err error) error
}

// Inbox is a Deduper that keeps what it claims, until it is done: with one, a 2xx is a promise (promise 1). The event is
// stored, env.Raw unchanged, when Claim returns. One that several receivers share may answer false for a new event that
// it gives to another of them.
type Inbox interface {
	Deduper
	// Pending yields, oldest first, a snapshot of what was claimed before the call, is not done, and is this receiver's
	// to handle: its own events and those of dead receivers. What was given up is left out until it has rested for ten
	// minutes or an instance starts (its first call). It may be left early. It is called every 10 s while the receiver
	// lives, so a shared store may renew its lease there. An error that wraps ErrClosed says that the store is another's
	// now. After any other error it may go on with further events.
	Pending(ctx context.Context) iter.Seq2[*Envelope, error]
}

// Memory is the Deduper that a Handler has by default: it remembers ids within the process, about 60 bytes for each, and
// forgets them with it. The zero value is ready to use. Set the fields before the first call. Its methods are safe for
// concurrent use and return no errors.
type Memory struct {
	TTL   time.Duration // how long a handled id is remembered; 0 means 24 hours
	Limit int           // ids remembered at most, the oldest handled ones go first; 0 means 1,000,000

	mu      sync.Mutex // protects what follows
	claimed map[digest]struct{}
	done    idSet
}

var _ Deduper = (*Memory)(nil)

// Claim reports whether the id is neither being handled nor remembered as handled.
func (m *Memory) Claim(_ context.Context, env *Envelope) (fresh bool, err error) {
	d := digestOf(env.EventID)
	ttl := m.TTL
	if ttl <= 0 {
		ttl = 24 * time.Hour
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done.expire(time.Now().Add(-ttl))
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
	limit := m.Limit
	if limit <= 0 {
		limit = 1_000_000
	}
	for m.done.len() > 0 && m.done.len()+len(m.claimed) > limit {
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
	ids     map[digest]struct{}
	queue   [][]idTime // idBlock to a block, so that a queue that grows holds no room for as much again
	head    int        // how many of the first block have been dropped
	dropped uint64     // how many have been in all
}

type idTime struct {
	id digest
	at int64 // Unix milliseconds
}

const idBlock = 1024

func (s *idSet) len() int { return len(s.ids) }

func (s *idSet) has(d digest) bool {
	_, found := s.ids[d]
	return found
}

// nth returns the nth oldest id, from 0.
func (s *idSet) nth(n int) idTime {
	n += s.head
	return s.queue[n/idBlock][n%idBlock]
}

// add adds d unless it is in the set.
func (s *idSet) add(d digest, at time.Time) {
	if s.ids == nil {
		s.ids = make(map[digest]struct{})
	}
	before := len(s.ids)
	if s.ids[d] = struct{}{}; len(s.ids) == before {
		return
	}
	last := len(s.queue) - 1
	if last < 0 || len(s.queue[last]) == idBlock {
		s.queue = append(s.queue, make([]idTime, 0, idBlock))
		last++
	}
	s.queue[last] = append(s.queue[last], idTime{d, at.UnixMilli()})
}

// expire drops what was added at or before then.
func (s *idSet) expire(then time.Time) {
	for s.len() > 0 && s.nth(0).at <= then.UnixMilli() {
		s.drop()
	}
}

// drop drops the oldest id.
func (s *idSet) drop() {
	delete(s.ids, s.nth(0).id)
	s.dropped++
	if s.head++; s.head == idBlock {
		s.queue[0] = nil
		s.queue, s.head = s.queue[1:], 0
	}
}

// Journal is the Inbox for one process with a local disk: an append-only text file in a directory of its own, a record
// a line: a checksum (CRC-32C in hex), a space, and JSON. {"id":…,"at":…,"event":…} is a claim with the body as it was
// received, or "base64" where that has line breaks or white space around it; {"done":…,"at":…} is its end; times are Unix
// milliseconds. Compaction keeps of a finished event {"sha256":…,"at":…}, the first half of the hash of its id, and ends
// the copy with {"copied":…}.
//
// OpenJournal makes one. Its methods are safe for concurrent use, and wait for the disk, not for their context. While a
// compaction runs, claims go on; at its end they wait for the three syncs that make the copy whole. One Journal at a
// time uses a directory: a later one takes over, and the earlier one refuses from then on.
type Journal struct {
	disk      disk
	dir       string
	retention time.Duration

	commits    sync.Mutex // held while the file is synced or replaced; locked before mu
	compaction sync.WaitGroup

	mu         sync.Mutex // protects what follows; held during no fsync but those that end a compaction
	closed     error      // set for good when the journal is closed, or another's
	bad        error      // an fsync has failed, or a torn record could not be cut off: never use file again
	file       diskFile
	gen, top   int    // the number of file, and of the newest file that this journal has made
	size       int64  // of file: whole records
	buf        []byte // records to be written
	group      *group // the claims that the next fsync is for
	claims     map[digest]*claim
	order      []*claim // the claims, oldest first; also some that have ended
	count      uint64   // of all claims so far
	live       int64    // bytes in file of the claims
	done       idSet
	started    bool         // Pending has been called
	reports    []error      // for Pending to yield
	damaged    map[int]bool // files that have damaged records, by number
	slack      int64        // bytes of garbage that are not worth a compaction
	compacting bool         // a compaction is under way
}

var _ Inbox = (*Journal)(nil)

// claim is an event that is claimed and not done. Its payload stays in the file.
type claim struct {
	id     digest
	seq    uint64
	file   diskFile
	off    int64 // of its line
	size   int
	copied int64  // off, in the file that a compaction writes
	group  *group // until it is durable
	gaveUp int64  // when, in Unix milliseconds; 0 if it was not
	ended  bool
}

// group is a number of claims that share one fsync.
type group struct {
	claims []*claim
	synced chan struct{} // closed when err is set
	err    error
}

const (
	restAfterGivingUp = 10 * time.Minute
	doneBytes         = 70      // what compaction keeps of a finished event
	smallGarbage      = 1 << 20 // bytes
)

// OpenJournal opens the journal in dir, which it makes if need be, and takes over from the Journal that uses it. The
// directory is made 0700 and its files 0600, for payloads are your customers' data. Unfinished events are kept, and
// the ids of those that were done within retention; 0 means 30 days. An error names the file and the step that failed.
func OpenJournal(dir string, retention time.Duration) (*Journal, error) {
	return openJournal(osDisk{}, dir, retention)
}

func openJournal(d disk, dir string, retention time.Duration) (*Journal, error) {
	if retention <= 0 {
		retention = 30 * 24 * time.Hour
	}
	j := &Journal{
		disk: d, dir: dir, retention: retention, slack: smallGarbage,
		claims: make(map[digest]*claim), damaged: make(map[int]bool),
	}
	if err := j.open(); err != nil {
		if j.file != nil {
			_ = j.file.Close()
		}
		return nil, fmt.Errorf("offloadhook: opening the journal: %w", err)
	}
	return j, nil
}

// Close ends the use of the journal: from then on it refuses, with ErrClosed. Shut the receiver down first.
func (j *Journal) Close() error {
	j.mu.Lock()
	if j.closed == nil {
		j.closed = fmt.Errorf("%w: the journal in %s", ErrClosed, j.dir)
	}
	j.mu.Unlock()
	j.compaction.Wait()
	j.commits.Lock()
	defer j.commits.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	file := j.file
	if file == nil {
		return nil
	}
	j.file = nil
	return errors.Join(file.Sync(), file.Close())
}

// Claim returns when the event is durable: written and synced, together with the claims that came meanwhile.
func (j *Journal) Claim(ctx context.Context, env *Envelope) (fresh bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if !usableID(env.EventID) {
		return false, fmt.Errorf("%w: the event_id is unusable", ErrMalformed)
	}
	d := digestOf(env.EventID)
	j.mu.Lock()
	now := time.Now()
	j.done.expire(now.Add(-j.retention))
	c := j.claims[d]
	switch {
	case j.closed != nil:
		defer j.mu.Unlock()
		return false, j.closed
	case c != nil && c.group != nil:
		g := c.group
		j.mu.Unlock()
		<-g.synced
		return false, g.err
	case c != nil || j.done.has(d):
		defer j.mu.Unlock()
		if err := j.owns(); err != nil || c == nil || c.gaveUp == 0 {
			return false, err
		}
		c.gaveUp = 0 // it is durable already
		return true, nil
	}
	g, leads := j.group, j.group == nil
	if leads {
		g = &group{synced: make(chan struct{})}
		j.group = g
	}
	start := len(j.buf)
	j.buf = appendRecord(j.buf, "id", quote(env.EventID), now.UnixMilli(), env.Raw)
	c = &claim{id: d, group: g, file: j.file, off: j.size + int64(start), size: len(j.buf) - start}
	j.add(c)
	g.claims = append(g.claims, c)
	j.mu.Unlock()
	if leads {
		j.commit(g)
	}
	<-g.synced
	return g.err == nil, g.err
}

// Done records the end of an event at once. It does not wait until that is durable.
func (j *Journal) Done(_ context.Context, env *Envelope, result error) error {
	d := digestOf(env.EventID)
	j.mu.Lock()
	defer j.mu.Unlock()
	c, now := j.claims[d], time.Now()
	switch {
	case j.closed != nil:
		return j.closed
	case c == nil || c.group != nil || c.gaveUp != 0:
		return nil
	case result != nil:
		c.gaveUp = now.UnixMilli()
		return nil
	case j.bad != nil:
		return j.bad
	}
	j.buf = appendRecord(j.buf, "done", quote(env.EventID), now.UnixMilli(), nil)
	if err := j.write(); err != nil {
		return err
	}
	j.end(c)
	j.done.add(d, now)
	if garbage := j.size - j.live - doneBytes*int64(j.done.len()); garbage > j.size/2+j.slack && !j.compacting {
		j.compacting = true
		j.compaction.Go(j.compact)
	}
	return nil
}

// Pending yields the unfinished events, oldest first, after what has been found damaged since the last call.
func (j *Journal) Pending(ctx context.Context) iter.Seq2[*Envelope, error] {
	return func(yield func(*Envelope, error) bool) {
		j.mu.Lock()
		if j.bad != nil {
			j.mu.Unlock()
			j.commit(&group{synced: make(chan struct{})}) // which replaces the file
			j.mu.Lock()
		}
		err := j.owns()
		owned := err == nil
		if owned {
			err, j.reports = errors.Join(j.reports...), nil
		}
		all, newest, seq := !j.started, j.count, uint64(0)
		j.started = true
		j.mu.Unlock()
		if err != nil && !yield(nil, err) || !owned {
			return
		}
		for {
			j.mu.Lock()
			c, env, err := j.after(seq), (*Envelope)(nil), cmp.Or(j.closed, ctx.Err())
			if err != nil || c == nil || c.seq > newest {
				j.mu.Unlock()
				if err != nil {
					yield(nil, err)
				}
				return
			}
			seq = c.seq
			if rested := time.Since(time.UnixMilli(c.gaveUp)) >= restAfterGivingUp; c.group == nil && (all || rested) {
				c.gaveUp = 0
				var rec record
				if rec, err = j.read(c); err == nil {
					env, err = ParseEnvelope(rec.event)
				}
			}
			j.mu.Unlock()
			if (env != nil || err != nil) && !yield(env, err) {
				return
			}
		}
	}
}

// add appends c to the claims. mu is held.
func (j *Journal) add(c *claim) {
	j.count++
	c.seq = j.count
	j.claims[c.id] = c
	j.order = append(j.order, c)
	j.live += int64(c.size)
}

// end takes c out of the claims. mu is held.
func (j *Journal) end(c *claim) {
	c.ended = true
	delete(j.claims, c.id)
	j.live -= int64(c.size)
	if len(j.order) > 2*len(j.claims)+1000 {
		j.order = slices.DeleteFunc(j.order, func(c *claim) bool { return c.ended })
	}
}

// after returns the first claim after number seq, nil if there is none. mu is held.
func (j *Journal) after(seq uint64) *claim {
	i := sort.Search(len(j.order), func(i int) bool { return j.order[i].seq > seq })
	for ; i < len(j.order); i++ {
		if !j.order[i].ended {
			return j.order[i]
		}
	}
	return nil
}

// read reads the record of c. If it is damaged, c is lost: it ends, and the error tells. mu is held.
func (j *Journal) read(c *claim) (record, error) {
	line := make([]byte, c.size)
	if unwritten := c.off - j.size; c.group != nil && unwritten >= 0 {
		copy(line, j.buf[unwritten:])
	} else if _, err := c.file.ReadAt(line, c.off); err != nil && err != io.EOF {
		return record{}, fmt.Errorf("offloadhook: journal: %w", err)
	}
	if rec := parseRecord(line); rec.size == c.size && rec.kind == "id" {
		return rec, nil
	}
	j.end(c)
	j.damaged[j.gen] = true
	return record{}, j.damageAt(j.gen, c.off)
}

func (j *Journal) damageAt(gen int, off int64) error {
	return fmt.Errorf("offloadhook: journal: %s: damaged record at byte %d; will be kept as *.damaged", j.path(gen), off)
}

// commit makes durable the claims of g, and those that come until it is its turn.
func (j *Journal) commit(g *group) {
	j.commits.Lock()
	defer j.commits.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	err := j.closed
	if j.bad != nil {
		j.mu.Unlock()
		err = j.renew(true)
		j.mu.Lock()
	}
	if err != nil {
		j.refuse(err)
	} else if g.err == nil {
		err = j.write()
	}
	if err != nil || g.err != nil { // refused
		return
	}
	if j.group == g {
		j.group = nil
	}
	file := j.file
	j.mu.Unlock()
	err = file.Sync()
	j.mu.Lock()
	if err == nil {
		err = j.owns()
	} else {
		err = fmt.Errorf("offloadhook: journal: %w", err)
		j.bad = err
		j.refuse(err)
	}
	j.settle(g, err)
}

// write writes buf. If that fails it cuts the file back to its last whole record. mu is held.
func (j *Journal) write() error {
	n, err := j.file.WriteAt(j.buf, j.size)
	if err == nil {
		j.size += int64(n)
		j.buf = j.buf[:0]
		return nil
	}
	err = fmt.Errorf("offloadhook: journal: %w", err)
	if cut := j.file.Truncate(j.size); cut != nil {
		j.bad = fmt.Errorf("%w, and then: %w", err, cut)
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
		c.group = nil
		if err != nil {
			j.end(c)
		}
	}
	g.err = err
	close(g.synced)
}

// owns returns an error unless the newest file is ours. A file is made exclusively, under a number that is one higher
// than any; and files go, in ascending order, when a newer one has a copy of all that is alive. So whoever takes over
// after this look reads what was synced before it. mu is held.
func (j *Journal) owns() error {
	if j.closed != nil {
		return j.closed
	}
	gens, err := j.generations()
	if err != nil {
		return fmt.Errorf("offloadhook: journal: %w", err)
	}
	ours := j.size == 0 || slices.Contains(gens, j.gen) // while opening, what was read may go
	if len(gens) == 0 || gens[len(gens)-1] != j.top || !ours {
		j.closed = fmt.Errorf("%w: the journal in %s has been taken over", ErrClosed, j.dir)
	}
	return j.closed
}

func (j *Journal) path(gen int) string {
	return filepath.Join(j.dir, fmt.Sprintf("events-%08d.log", gen))
}

// generations returns the numbers of the files, in ascending order.
func (j *Journal) generations() (gens []int, err error) {
	names, err := j.disk.list(j.dir)
	for _, name := range names {
		digits := strings.TrimSuffix(strings.TrimPrefix(name, "events-"), ".log")
		if gen, _ := strconv.Atoi(digits); gen > 0 && name == filepath.Base(j.path(gen)) {
			gens = append(gens, gen)
		}
	}
	slices.Sort(gens)
	return gens, err
}

// create makes the next file. mu is held.
func (j *Journal) create() (*copying, error) {
	file, err := j.disk.open(j.path(j.top+1), os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, err
	}
	j.top++
	return &copying{file: file, gen: j.top}, nil
}

// open takes over what is in dir, with a file of its own.
func (j *Journal) open() error {
	if err := j.disk.mkdir(j.dir); err != nil {
		return err
	}
	var dst *copying
	for dst == nil {
		gens, err := j.generations()
		if err != nil {
			return err
		}
		j.top = append([]int{0}, gens...)[len(gens)]
		if dst, err = j.create(); err != nil && !errors.Is(err, fs.ErrExist) { // else another opener was faster
			return err
		}
	}
	err := j.load(dst.gen)
	for i := 0; i < 10 && errors.Is(err, fs.ErrNotExist); i++ { // another opener has just ended its copy
		err = j.load(dst.gen)
	}
	if err != nil {
		return errors.Join(err, dst.file.Close())
	}
	return j.replace(dst, true)
}

// load reads the newest whole file below number top. A copy is whole when it says so, and the oldest file always is: its
// predecessors are gone.
func (j *Journal) load(top int) error {
	gens, err := j.generations()
	gens = slices.DeleteFunc(gens, func(gen int) bool { return gen >= top })
	j.gen = top
	whole, oldest := false, time.Now().Add(-j.retention)
	for i := len(gens) - 1; i >= 0 && err == nil && !whole; i-- {
		if j.file != nil {
			_ = j.file.Close()
		}
		j.gen, j.order, j.live, j.done, j.reports, whole = gens[i], nil, 0, idSet{}, nil, i == 0
		clear(j.claims)
		if j.file, err = j.disk.open(j.path(j.gen), os.O_RDONLY); err != nil {
			break
		}
		for rec, readErr := range records(j.file) {
			c := j.claims[rec.id]
			switch err = readErr; rec.kind {
			case "id":
				if c != nil {
					j.end(c) // it was refused after all, and has been claimed again
				}
				j.add(&claim{id: rec.id, file: j.file, off: rec.off, size: len(rec.line) + 1})
			case "done", "sha256":
				if c != nil {
					j.end(c)
				}
				if at := time.UnixMilli(rec.at); at.After(oldest) {
					j.done.add(rec.id, at)
				}
			case "copied":
				whole = true
			case "":
				if err == nil {
					j.damaged[j.gen] = true
					j.reports = append(j.reports, j.damageAt(j.gen, rec.off))
				}
			}
		}
	}
	return err
}

// compact leaves the garbage behind.
func (j *Journal) compact() {
	err := j.renew(false)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.compacting, j.slack = false, smallGarbage
	if err != nil && j.closed == nil {
		j.slack = j.size // until the file has doubled
		j.reports = append(j.reports, err)
	}
}

// renew goes on in a new file. still is true when commits is held; if not, commits go on during most of it.
func (j *Journal) renew(still bool) error {
	j.mu.Lock()
	err := j.owns()
	var dst *copying
	if err == nil {
		dst, err = j.create()
	}
	j.mu.Unlock()
	if err == nil {
		err = j.replace(dst, still)
	}
	if err != nil {
		err = fmt.Errorf("offloadhook: journal: %w", err)
	}
	return err
}

// replace copies what is alive to dst, and makes that the file. Claims stop for the syncs at the end of it.
func (j *Journal) replace(dst *copying, still bool) (err error) {
	whole := false
	defer func() {
		if err == nil {
			return
		}
		if !whole { // its number stays taken, as another process may have seen it; its room on the disk does not
			_ = dst.file.Truncate(0)
		}
		_ = dst.file.Close()
	}()
	var src diskFile
	for more := true; more && err == nil; {
		j.mu.Lock()
		src = cmp.Or(src, j.file)
		more, err = j.copySome(dst, false)
		j.mu.Unlock() // claims go on
	}
	if err = cmp.Or(err, dst.file.Sync()); err != nil {
		return err
	}
	if !still {
		j.commits.Lock()
		defer j.commits.Unlock()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.file != src || j.bad != nil && !still {
		return errors.New("the file has failed meanwhile")
	}
	for more := true; more && err == nil; {
		more, err = j.copySome(dst, true)
	}
	if err = cmp.Or(err, dst.file.Sync(), j.disk.syncDir(j.dir), j.owns()); err != nil {
		return err
	}
	whole = true // from here on it may be read in place of src, so nothing may be acknowledged outside of it
	end := appendRecord(nil, "copied", quote(filepath.Base(j.path(j.gen))), time.Now().UnixMilli(), nil)
	if _, err = dst.file.WriteAt(end, dst.size); err == nil {
		err = dst.file.Sync()
	}
	if err != nil {
		j.bad = fmt.Errorf("offloadhook: journal: %w", err)
		return err
	}
	for _, c := range j.claims {
		c.file, c.off = dst.file, c.copied
	}
	j.file, j.gen, j.size, j.buf, j.bad = dst.file, dst.gen, dst.size+int64(len(end)), j.buf[:0], nil
	if src != nil {
		_ = src.Close()
	}
	gens, err := j.generations()
	for i := 0; err == nil && i < len(gens) && gens[i] < j.gen; i++ { // in ascending order: see owns
		if old := j.path(gens[i]); j.damaged[gens[i]] {
			err = j.disk.rename(old, old+".damaged")
		} else {
			err = j.disk.remove(old)
		}
	}
	return nil // what could not be removed will be, by the next copy
}

// copying is a file in the making: what has been copied ends before the id of number ids and with the claim of number
// claims.
type copying struct {
	file        diskFile
	gen         int
	size        int64
	ids, claims uint64
}

// copySome appends to dst some of what is alive and not in it yet, and reports whether there may be more. Unless all is
// true, it stops before claims that are not durable. mu is held.
func (j *Journal) copySome(dst *copying, all bool) (more bool, err error) {
	var buf []byte
	for more = true; more && err == nil && len(buf) < 1<<17; {
		if dst.ids = max(dst.ids, j.done.dropped); dst.ids < j.done.dropped+uint64(j.done.len()) {
			id := j.done.nth(int(dst.ids - j.done.dropped))
			dst.ids++
			quoted := hex.AppendEncode(append(make([]byte, 0, 34), '"'), id.id[:])
			buf = appendRecord(buf, "sha256", append(quoted, '"'), id.at, nil)
			continue
		}
		c := j.after(dst.claims)
		if more = c != nil && (all || c.group == nil); !more {
			break
		}
		dst.claims, c.copied = c.seq, dst.size+int64(len(buf))
		rec, damage := j.read(c)
		switch {
		case damage == nil:
			buf = append(append(buf, rec.line...), '\n')
		case c.ended:
			j.reports = append(j.reports, damage)
		default:
			err = damage
		}
	}
	n, writeErr := dst.file.WriteAt(buf, dst.size)
	dst.size += int64(n)
	return more, cmp.Or(err, writeErr)
}

// record is a line of the journal.
type record struct {
	off   int64
	size  int
	line  []byte // without its line break
	kind  string // the name of the first member of its JSON; "" if it is damaged
	id    digest
	at    int64 // Unix milliseconds
	event []byte
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum returns what stands before json in a line.
func checksum(json []byte) (sum [9]byte) {
	var crc [4]byte
	binary.BigEndian.PutUint32(crc[:], crc32.Checksum(json, castagnoli))
	hex.Encode(sum[:], crc[:])
	sum[8] = ' '
	return sum
}

func quote(s string) []byte {
	quoted, _ := json.Marshal(s)
	return quoted
}

func appendRecord(buf []byte, kind string, quoted []byte, at int64, event []byte) []byte {
	start := len(buf)
	buf = append(append(buf, "00000000 {\""...), kind...)
	buf = append(append(buf, "\":"...), quoted...)
	buf = strconv.AppendInt(append(buf, `,"at":`...), at, 10)
	if bytes.IndexByte(event, '\n') >= 0 || len(bytes.TrimSpace(event)) < len(event) {
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
	if len(line) < 10 {
		return record{}
	}
	end := len(line) - 1
	if checksum(line[9:end]) != [9]byte(line) {
		end = 9 + skipValue(line[9:], 0) // a damaged line break costs no record
		if checksum(line[9:end]) != [9]byte(line) {
			return record{}
		}
	}
	rec.size = min(end+1, len(line))
	rec.line = line[:end]
	for name, value := range members(line[9:end]) {
		switch string(name) {
		case "at":
			rec.at, _ = strconv.ParseInt(string(value), 10, 64)
		case "event":
			rec.event = value
		case "base64":
			rec.event, _ = base64.StdEncoding.DecodeString(text(value))
		case "sha256":
			if len(value) == 34 {
				rec.kind = "sha256"
				_, _ = hex.Decode(rec.id[:], value[1:33])
			}
		default:
			rec.kind, rec.id = string(name), digestOf(text(value))
		}
	}
	return rec
}

// records yields the records of a file. Where a line is none it yields one without a kind; if the file ends within it,
// it was never acknowledged and is passed over.
func records(file io.ReaderAt) iter.Seq2[record, error] {
	return func(yield func(record, error) bool) {
		in := bufio.NewReaderSize(io.NewSectionReader(file, 0, math.MaxInt64), 1<<18)
		for off, err := int64(0), error(nil); err == nil; {
			var line []byte
			if line, err = in.ReadSlice('\n'); err == bufio.ErrBufferFull {
				var rest []byte
				line = bytes.Clone(line)
				rest, err = in.ReadBytes('\n')
				line = append(line, rest...)
			}
			if err != nil && err != io.EOF {
				yield(record{}, err)
				return
			}
			for len(line) > 0 {
				rec := parseRecord(line)
				if rec.kind == "" && err == io.EOF {
					return
				}
				if rec.off = off; rec.kind == "" {
					rec.size = len(line)
				}
				if !yield(rec, nil) {
					return
				}
				off += int64(rec.size)
				line = line[rec.size:]
			}
		}
	}
}

// disk is what the journal needs of a file system. Tests put others in its place.
type disk interface {
	mkdir(dir string) error
	list(dir string) (names []string, err error)
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

func (osDisk) list(dir string) (names []string, err error) {
	entries, err := os.ReadDir(dir)
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names, err
}

func (osDisk) open(path string, flag int) (diskFile, error) { return os.OpenFile(path, flag, 0o600) }

func (osDisk) rename(from, to string) error { return os.Rename(from, to) }

func (osDisk) remove(path string) error { return os.Remove(path) }

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
