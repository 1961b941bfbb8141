package offloadhook

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"iter"
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
// stored, env.Raw unchanged, when Claim returns.
type Inbox interface {
	Deduper
	// Pending yields, oldest first, a snapshot of what was claimed before the call, is not done, and is this receiver's
	// to handle: its own events and those of dead receivers. What was given up is left out until it has rested for ten
	// minutes or an instance starts (its first call). It may be left early. It is called every 10 s while the receiver
	// lives, so a shared store may renew its lease there. An error that wraps ErrClosed says that the store is another's
	// now. After any other error it may go on with further events.
	Pending(ctx context.Context) iter.Seq2[*Envelope, error]
}

// Memory is the Deduper that a Handler has by default: it remembers ids within the process, about 40 bytes for each, and
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
type digest struct{ hi, lo uint64 }

func digestOf(id string) digest {
	sum := sha256.Sum256([]byte(id))
	return digest{binary.BigEndian.Uint64(sum[:]), binary.BigEndian.Uint64(sum[8:])}
}

// idSet is a set of ids in the order in which they were added, which is the order in which they expire: lazily, on the
// next call. It holds no pointer per id for the garbage collector to follow, and takes about 40 bytes for each.
type idSet struct {
	blocks     [][]idTime // the ids by sequence number, idBlock of them to a block
	first      uint32     // sequence number of blocks[0][0]
	head, tail uint32     // the ids in the set are those from head up to tail; the numbers may wrap
	index      []uint64   // a hash table with linear probing: tag<<32 | sequence number, 0 where free
}

type idTime struct {
	id digest
	at int64 // Unix milliseconds
}

const idBlock = 4096

func (s *idSet) len() int { return int(s.tail - s.head) }

func (s *idSet) at(seq uint32) *idTime {
	i := seq - s.first
	return &s.blocks[i/idBlock][i%idBlock]
}

// tag is the part of a digest that the index holds. It places the id in the table and is never 0.
func tag(d digest) uint64 { return d.hi>>32 | 1<<31 }

// slot returns where d is in the index, or where it would be.
func (s *idSet) slot(d digest) (i uint64, found bool) {
	mask := uint64(len(s.index) - 1)
	for i = tag(d) & mask; s.index[i] != 0; i = (i + 1) & mask {
		if s.index[i]>>32 == tag(d) && s.at(uint32(s.index[i])).id == d {
			return i, true
		}
	}
	return i, false
}

func (s *idSet) has(d digest) bool {
	if s.len() == 0 {
		return false
	}
	_, found := s.slot(d)
	return found
}

// add adds d, which must not be in the set.
func (s *idSet) add(d digest, now time.Time) {
	if s.len() >= len(s.index)/4*3 {
		s.grow()
	}
	i, _ := s.slot(d)
	s.index[i] = tag(d)<<32 | uint64(s.tail)
	if n := len(s.blocks); n == 0 || len(s.blocks[n-1]) == idBlock {
		s.blocks = append(s.blocks, make([]idTime, 0, idBlock))
	}
	last := &s.blocks[len(s.blocks)-1]
	*last = append(*last, idTime{d, now.UnixMilli()})
	s.tail++
}

// grow doubles the index. The tags suffice to place the entries anew.
func (s *idSet) grow() {
	old := s.index
	s.index = make([]uint64, max(2*len(old), 64))
	mask := uint64(len(s.index) - 1)
	for _, entry := range old {
		if entry == 0 {
			continue
		}
		i := entry >> 32 & mask
		for s.index[i] != 0 {
			i = (i + 1) & mask
		}
		s.index[i] = entry
	}
}

// expire drops what was added at or before then.
func (s *idSet) expire(then time.Time) {
	for s.len() > 0 && s.at(s.head).at <= then.UnixMilli() {
		s.drop()
	}
}

// drop drops the oldest id. The entries behind it in the index move up, so that a search that stops at a free slot still
// finds them.
func (s *idSet) drop() {
	mask := uint64(len(s.index) - 1)
	free, _ := s.slot(s.at(s.head).id)
	for i := (free + 1) & mask; s.index[i] != 0; i = (i + 1) & mask {
		if home := s.index[i] >> 32 & mask; (i-home)&mask >= (i-free)&mask {
			s.index[free] = s.index[i]
			free = i
		}
	}
	s.index[free] = 0
	if s.head++; s.head-s.first == idBlock {
		s.blocks = s.blocks[1:]
		s.first = s.head
	}
}
