package dedupetest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"iter"
	"path"
	"slices"
	"strings"
	"time"

	"offloadhook"
)

// models are stores in memory, of each kind that the checks tell apart, with the fault of the given name. Without one
// ("") they keep the contract.
var models = map[string]func(fault string) Store{
	// A Deduper with one handle, as Memory.
	"plain": func(fault string) Store {
		h := &handle{s: newStorage(fault)}
		return Store{Open: func() (offloadhook.Deduper, error) { return h, nil }}
	},
	// A Deduper that several replicas share.
	"replicated": func(fault string) Store {
		s := newStorage(fault)
		return Store{Open: func() (offloadhook.Deduper, error) { return &handle{s: s}, nil }}
	},
	// A Deduper whose claims end with their owner.
	"leased": func(fault string) Store {
		s := newStorage(fault)
		return Store{
			Open: func() (offloadhook.Deduper, error) { return &handle{s: s}, nil },
			Kill: func(d offloadhook.Deduper) error { d.(*handle).die(); return nil },
		}
	},
	// An Inbox that several replicas share.
	"shared": func(fault string) Store {
		s := newStorage(fault)
		return Store{
			Open: func() (offloadhook.Deduper, error) { return s.open(), nil },
			Kill: func(d offloadhook.Deduper) error { d.(*inbox).die(); return nil },
			Rest: func() error { s.now += 10 * time.Minute; return nil },
		}
	},
	// An Inbox that belongs to whoever opened it last, as Journal.
	"exclusive": func(fault string) Store {
		s := newStorage(fault)
		var last *inbox
		return Store{Open: func() (offloadhook.Deduper, error) {
			if last != nil {
				last.die()
				last.lost = !s.has("two owners")
			}
			last = s.open()
			return last, nil
		}}
	},
}

type storage struct {
	fault string
	lock  chan struct{} // holds one value while rows are in use; a channel, so that a bubble sees who waits for it
	rows  []*row        // oldest first
	now   time.Duration
}

type row struct {
	id     string
	body   []byte
	owner  *handle // nil when done or given up
	done   bool
	gaveUp time.Duration // when that was
	failed bool          // it was given up, if only once
	hidden bool          // from Pending
}

// handle is a Deduper on a storage, and inbox an Inbox.
type handle struct {
	s          *storage
	dead, lost bool
	called     bool // Pending was
	closed     bool
}

type inbox struct{ handle }

func newStorage(fault string) *storage { return &storage{fault: fault, lock: make(chan struct{}, 1)} }

func (s *storage) open() *inbox {
	switch {
	case s.has("storage is lost"):
		s.rows = nil
	case s.has("what is done is lost"):
		s.rows = slices.DeleteFunc(s.rows, func(r *row) bool { return r.done })
	}
	return &inbox{handle{s: s}}
}

func (s *storage) has(fault string) bool { return s.fault == fault }

func (s *storage) acquire(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case s.lock <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *storage) release() { <-s.lock }

func (s *storage) key(env *offloadhook.Envelope) string {
	id := env.EventID
	switch {
	case s.has("ids fold case"):
		id = strings.ToLower(id)
	case s.has("ids are cut"):
		id = id[:min(len(id), 254)]
	case s.has("ids are trimmed"):
		id = strings.TrimSpace(id)
	case s.has("ids are file names"):
		id = path.Clean(id)
	case s.has("ids are of bodies"):
		id = string(env.Raw)
	case s.has("ids are of cases"):
		id = caseOf(env)
	}
	return id
}

// caseOf returns the case of an event that event made.
func caseOf(env *offloadhook.Envelope) string {
	var data offloadhook.Case
	_ = json.Unmarshal(env.Data, &data)
	return data.CaseID
}

func (s *storage) find(h *handle, id string) *row {
	i := slices.IndexFunc(s.rows, func(r *row) bool {
		return r.id == id && (r.owner == nil || r.owner == h || !s.has("claims are per handle"))
	})
	if i < 0 {
		return nil
	}
	return s.rows[i]
}

func (h *handle) die() {
	h.dead = !h.s.has("takeover fails")
}

// Close is the end of a process that was told to end.
func (h *inbox) Close() error {
	if h.s.has("close marks all done") {
		for _, r := range h.s.rows {
			r.owner, r.done = nil, r.owner != nil || r.done
		}
	}
	h.die()
	h.closed = true
	return nil
}

func (h *handle) Claim(ctx context.Context, env *offloadhook.Envelope) (fresh bool, err error) {
	s := h.s
	if h.lost || h.closed {
		return false, offloadhook.ErrClosed
	}
	cancelled := ctx.Err() != nil
	if cancelled {
		switch {
		case s.has("a cancelled claim is fresh and an error"):
			return true, ctx.Err()
		case s.has("a cancelled claim is no claim"):
			return false, nil
		case s.has("a cancelled claim hangs"):
			time.Sleep(time.Hour)
		case strings.HasPrefix(s.fault, "a cancelled claim is"):
			ctx = context.Background()
		}
	}
	if err := s.acquire(ctx); err != nil {
		return false, err
	}
	defer s.release()
	if s.has("bodies are touched") {
		env.Raw[0] = ' '
	}
	r := s.find(h, s.key(env))
	if s.has("claims race") {
		s.release()
		time.Sleep(time.Millisecond)
		s.lock <- struct{}{}
	}
	switch {
	case r == nil:
		r = &row{id: s.key(env), body: bytes.Clone(env.Raw)}
		s.rows = append(s.rows, r)
	case r.done, r.owner != nil && (!r.owner.dead || h.called):
		return false, nil
	}
	if r.owner == nil { // given up, or new
		s.rows = append(slices.DeleteFunc(s.rows, func(other *row) bool { return other == r }), r)
		r.body = bytes.Clone(env.Raw)
	}
	r.owner = h
	r.hidden = h.dead && s.has("claims of the dead are lost")
	if cancelled {
		switch {
		case s.has("a cancelled claim is kept"):
			r.hidden = true
		case s.has("a cancelled claim is kept for ever"):
			r.owner = new(handle)
		case s.has("a cancelled claim is pending and free"):
			s.rows = append(s.rows, &row{id: r.id + "?", body: r.body, owner: h})
			s.rows = slices.DeleteFunc(s.rows, func(other *row) bool { return other == r })
		}
		return false, context.Canceled
	}
	return true, nil
}

func (h *handle) Done(ctx context.Context, env *offloadhook.Envelope, result error) error {
	s := h.s
	if ctx.Err() != nil {
		switch {
		case s.has("a cancelled done hangs"):
			time.Sleep(time.Hour)
		case s.has("a cancelled done does nothing"):
			return nil
		}
	}
	if h.lost && !s.has("done needs no owner") {
		return offloadhook.ErrClosed
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	r := s.find(h, s.key(env))
	if r == nil && s.has("done needs no claim") {
		s.rows = append(s.rows, &row{id: s.key(env), done: result == nil})
	}
	switch {
	case r != nil && r.owner == h:
	case r != nil && (r.owner != nil && s.has("done needs no owner") || s.has("done needs no claim")):
	case s.has("done of what is not held errs"), s.has("late done errs") && h.dead:
		return errors.New("not held")
	default:
		return nil
	}
	switch {
	case s.has("done is never recorded") && result == nil:
	case s.has("done forgets") && result == nil:
		s.rows = slices.DeleteFunc(s.rows, func(other *row) bool { return other == r })
	case s.has("done ends the case"):
		for _, other := range s.rows {
			other.done = other.done || bytes.Contains(other.body, []byte(caseOf(env)))
		}
	case result == nil, s.has("give-up is done"):
		r.owner, r.done = nil, true
	case s.has("give-up keeps the claim"):
	default:
		r.owner, r.done, r.gaveUp, r.failed = nil, false, s.now, true
	}
	return nil
}

// Pending serves the given up to whoever asks for the first time or after their rest, and takes over from the dead.
func (h *inbox) Pending(ctx context.Context) iter.Seq2[*offloadhook.Envelope, error] {
	s := h.s
	return func(yield func(*offloadhook.Envelope, error) bool) {
		if h.lost {
			yield(nil, offloadhook.ErrClosed)
			return
		}
		if s.has("a cancelled pending hangs") && ctx.Err() != nil {
			time.Sleep(time.Hour)
		}
		if err := s.acquire(ctx); err != nil {
			if !s.has("a cancelled pending ends in silence") {
				yield(nil, err)
			}
			return
		}
		var mine []*row
		for _, r := range s.rows {
			rested := !h.called || s.now-r.gaveUp >= 10*time.Minute
			switch {
			case s.has("give-up does not rest"), s.has("give-up comes back at every call") && h.called:
				rested = true
			case s.has("give-up rests for ever"):
				rested = !h.called
			case s.has("give-up is lost"):
				rested = false
			}
			if s.has("give-up is remembered") && r.failed && !h.called {
				r.done = false
			}
			switch {
			case r.done, r.hidden, s.has("a cancelled claim is pending and free") && r.owner == nil:
			case r.owner == nil && !rested:
			case r.owner == nil, r.owner.dead, r.owner == &h.handle:
				if r.owner != &h.handle && s.has("takeover revives") {
					for _, done := range s.rows {
						if done.done {
							done.done, done.owner = false, &h.handle
						}
					}
				}
				if r.owner == nil || !s.has("heirs share") {
					r.owner = &h.handle
				}
				mine = append(mine, r)
			case s.has("owners share"):
				mine = append(mine, r)
			}
		}
		reversed := s.has("newest first") || s.has("takeover reverses") && !h.called && len(mine) > 0
		h.called = true
		switch {
		case reversed:
			slices.Reverse(mine)
		case s.has("order of ids"):
			slices.SortFunc(mine, func(a, b *row) int { return strings.Compare(a.id, b.id) })
		case s.has("twice") && len(mine) > 0:
			mine = append(mine, mine[0])
		}
		if !s.has("locked while read") && !s.has("left early, locked") {
			s.release()
		}
		var buffer []byte
		before := len(s.rows)
		for i := 0; i < len(mine); i++ {
			r := mine[i]
			if ctx.Err() != nil {
				r.hidden = s.has("a cancelled pending forgets")
				if !s.has("a cancelled pending ends in silence") {
					yield(nil, ctx.Err())
				}
				return
			}
			body := r.body
			switch {
			case s.has("bodies are overwritten"):
				buffer = append(buffer[:0], body...)
				body = buffer
			case s.has("bodies are trimmed"):
				body = bytes.TrimSpace(body)
			case s.has("bodies are made valid"):
				body = bytes.ToValidUTF8(body, []byte("\ufffd"))
			case s.has("bodies are compacted"):
				var compact bytes.Buffer
				_ = json.Compact(&compact, body)
				body = compact.Bytes()
			case s.has("bodies are cut"):
				body = body[:min(len(body), 64<<10)]
			}
			env, err := offloadhook.ParseEnvelope(body)
			if err != nil {
				yield(nil, err)
				return
			}
			if s.has("envelopes are bare") {
				env = &offloadhook.Envelope{EventID: env.EventID, Raw: env.Raw}
			}
			if !yield(env, nil) {
				if s.has("left early, gone") {
					r.hidden = true
				}
				return
			}
			if s.has("no snapshot") && i == len(mine)-1 && len(s.rows) > before {
				mine = append(mine, s.rows[before:]...)
				before = len(s.rows)
			}
		}
		if s.has("locked while read") || s.has("left early, locked") {
			s.release()
		}
	}
}
