// Package dedupetest checks implementations of offloadhook.Deduper and offloadhook.Inbox against their contract, in the
// manner of testing/fstest. Run takes any Deduper; one that is an Inbox too is checked as such. Let go test run it with
// -race and a -count, since a narrow race may pass once, and with its -timeout of 10 minutes: a store that fails may take
// some of them.
//
//	func TestStore(t *testing.T) {
//		dedupetest.Run(t, func(t *testing.T) dedupetest.Store {
//			url := emptyDatabase(t)
//			return dedupetest.Store{Open: func() (offloadhook.Deduper, error) { return mystore.Open(url) }}
//		})
//	}
package dedupetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"offloadhook"
)

// Store is one storage, empty at first, and what the checks may do to it.
type Store struct {
	// Open opens the storage as one more instance of the service would, and returns its handle. Where what is stored
	// lives in the handle, as with offloadhook.Memory, it returns the same one each time. Handles can be compared, as
	// pointers can. One that is an io.Closer is closed, once, at the latest at the end of the check; an Inbox claims
	// nothing after that.
	Open func() (offloadhook.Deduper, error)

	// Kill makes the owner of a handle dead in the eyes of the others, as if its process had been killed; the handle
	// must still take calls, like those of a process that was only cut off. With Kill, open handles live side by side.
	// Without it, an Inbox belongs to the handle that was opened last, whose predecessors answer offloadhook.ErrClosed;
	// of a plain Deduper no takeover is expected.
	Kill func(offloadhook.Deduper) error

	// Rest lets ten minutes pass for what was given up. Without it that is not checked.
	Rest func() error
}

// Run runs each check as a subtest on a storage of its own, which open makes.
func Run(t *testing.T, open func(t *testing.T) Store) {
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) {
			errs, skipped := c.run(open(t))
			for _, err := range errs {
				t.Error(err)
			}
			if skipped != "" {
				t.Skip(skipped)
			}
		})
	}
}

const (
	callTimeout = 5 * time.Second  // what a Receiver gives a call of its store
	readTimeout = 10 * time.Second // and a reading of Pending
	patience    = 15 * time.Second // a call that has not returned by then hangs
	takeover    = 30 * time.Second // for the events of a dead owner to come to another
)

type check struct {
	name  string
	inbox bool // it is about Inbox
	f     func(*probe)
}

var checks = []check{
	{"one winner", false, oneWinner},
	{"done", false, done},
	{"done that is not held", false, doneNotHeld},
	{"ids", false, ids},
	{"cancelled claim", false, cancelledClaim},
	{"cancelled done", false, cancelledDone},
	{"reopen", false, reopen},
	{"late done", false, lateDone},
	{"bytes", true, payloads},
	{"order", true, order},
	{"snapshot", true, snapshot},
	{"left early", true, leftEarly},
	{"give-up", true, giveUp},
	{"cancelled pending", true, cancelledPending},
	{"owners", true, owners},
	{"takeover", true, takeOver},
	{"one heir", true, oneHeir},
}

// run returns what c found wrong with s, or why it does not apply.
func (c check) run(s Store) (errs []error, skipped string) {
	p := &probe{store: s}
	skipped = p.guard(func() {
		if _, ok := p.open().(offloadhook.Inbox); c.inbox && !ok {
			panic(skip("not an Inbox"))
		}
		c.f(p)
	})
	p.guard(func() {
		for _, d := range p.handles {
			p.close(d)
		}
	})
	return p.errs, skipped
}

// probe is a check at work on a storage.
type probe struct {
	store   Store
	handles []offloadhook.Deduper // those opened, nil where closed
	closed  []offloadhook.Deduper // those closed
	errs    []error
}

type (
	stopped struct{} // panicked with when a check cannot go on
	skip    string   // when it does not apply
)

const oneHandle = skip("the storage has one handle only")

// guard calls f, which may stop early.
func (p *probe) guard(f func()) (skipped string) {
	defer func() {
		switch v := recover().(type) {
		case nil, stopped:
		case skip:
			skipped = string(v)
		default:
			panic(v)
		}
	}()
	f()
	return ""
}

func (p *probe) errorf(format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf(format, args...))
}

func (p *probe) fatalf(format string, args ...any) {
	p.errorf(format, args...)
	panic(stopped{})
}

// first returns the handle with which the check began.
func (p *probe) first() offloadhook.Deduper { return p.handles[0] }

func (p *probe) open() offloadhook.Deduper {
	var d offloadhook.Deduper
	var err error
	p.within("Open", func() { d, err = p.store.Open() })
	if err != nil {
		p.fatalf("Open: %v", err)
	}
	if slices.Contains(p.closed, d) {
		panic(oneHandle)
	}
	if !slices.Contains(p.handles, d) {
		p.handles = append(p.handles, d)
	}
	return d
}

// another opens the storage once more, and skips the check where there is but one handle.
func (p *probe) another() offloadhook.Deduper {
	d := p.open()
	if d == p.first() {
		panic(oneHandle)
	}
	return d
}

// sideBySide reports whether handles live beside each other.
func (p *probe) sideBySide() bool {
	_, inbox := p.first().(offloadhook.Inbox)
	return p.store.Kill != nil || !inbox
}

func (p *probe) close(d offloadhook.Deduper) {
	i := slices.Index(p.handles, d)
	if c, ok := d.(io.Closer); ok && d != nil {
		p.handles[i], p.closed = nil, append(p.closed, d)
		p.within("Close", func() { _ = c.Close() }) // one that lost its storage may say so
	}
}

// bury makes the owner of d dead. Without Kill, the next one that opens the storage does that.
func (p *probe) bury(d offloadhook.Deduper) {
	if p.store.Kill == nil {
		return
	}
	if err := p.store.Kill(d); err != nil {
		p.fatalf("Kill: %v", err)
	}
}

// within calls f, which must not take long, whatever it was asked.
func (p *probe) within(what string, f func()) {
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		f()
	}()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	select {
	case <-returned:
	case <-timeout.C:
		clear(p.handles) // to close them might hang as well
		p.errorf("%s has not returned after %v", what, patience)
		panic(stopped{})
	}
}

func (p *probe) claim(d offloadhook.Deduper, env *offloadhook.Envelope) (fresh bool) {
	fresh, err := p.tryClaim(context.Background(), d, env)
	if err != nil {
		p.fatalf("Claim of %q: %v", env.EventID, err)
	}
	return fresh
}

func (p *probe) tryClaim(ctx context.Context, d offloadhook.Deduper, env *offloadhook.Envelope) (
	fresh bool, err error) {
	p.within("Claim", func() {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		fresh, err = d.Claim(ctx, env)
	})
	return fresh, err
}

// wantClaim claims env and says, if the answer is not want, what had been before.
func (p *probe) wantClaim(d offloadhook.Deduper, env *offloadhook.Envelope, want bool, before string) {
	if fresh := p.claim(d, env); fresh != want {
		p.errorf("Claim of %q, %s: fresh is %t, want %t", env.EventID, before, fresh, want)
	}
}

func (p *probe) done(d offloadhook.Deduper, env *offloadhook.Envelope, result error) {
	if err := p.tryDone(context.Background(), d, env, result); err != nil {
		p.fatalf("Done of %q with %v: %v", env.EventID, result, err)
	}
}

func (p *probe) tryDone(ctx context.Context, d offloadhook.Deduper, env *offloadhook.Envelope, result error) (
	err error) {
	p.within("Done", func() {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		err = d.Done(ctx, env, result)
	})
	return err
}

// read ranges over Pending and calls each, unless that is nil, with every event.
func (p *probe) read(ctx context.Context, d offloadhook.Deduper, each func(*offloadhook.Envelope) bool) (
	all []*offloadhook.Envelope, errs []error) {
	p.within("Pending", func() {
		ctx, cancel := context.WithTimeout(ctx, readTimeout)
		defer cancel()
		for env, err := range d.(offloadhook.Inbox).Pending(ctx) {
			if err != nil {
				errs = append(errs, err)
				continue
			}
			all = append(all, env)
			if each != nil && !each(env) {
				return
			}
		}
	})
	return all, errs
}

func (p *probe) pending(d offloadhook.Deduper) []*offloadhook.Envelope {
	all, errs := p.read(context.Background(), d, nil)
	if len(errs) > 0 {
		p.fatalf("Pending: %v", errors.Join(errs...))
	}
	return all
}

// wantPending checks that Pending yields the ids of want in their order.
func (p *probe) wantPending(d offloadhook.Deduper, what string, want ...*offloadhook.Envelope) {
	if got := p.pending(d); !slices.Equal(idsOf(got), idsOf(want)) {
		p.errorf("Pending, %s: %q, want %q", what, idsOf(got), idsOf(want))
	}
}

// await reads Pending until it yields the ids of want, in any order: a takeover may need its time.
func (p *probe) await(d offloadhook.Deduper, what string, want ...*offloadhook.Envelope) []*offloadhook.Envelope {
	sorted := slices.Sorted(slices.Values(idsOf(want)))
	for start := time.Now(); ; time.Sleep(takeover / 100) {
		got := p.pending(d)
		if slices.Equal(slices.Sorted(slices.Values(idsOf(got))), sorted) {
			return got
		}
		if len(got) > len(want) || time.Since(start) > takeover {
			p.fatalf("Pending, %s: %q, want %q", what, idsOf(got), idsOf(want))
		}
	}
}

func idsOf(envs []*offloadhook.Envelope) []string {
	list := make([]string, 0, len(envs))
	for _, env := range envs {
		list = append(list, env.EventID)
	}
	return list
}

var errGaveUp = errors.New("dedupetest: the callback failed")

// event returns an event of its own case.
func event(id string) *offloadhook.Envelope {
	quoted, err := json.Marshal(id)
	if err != nil {
		panic(err)
	}
	return parse(fmt.Appendf(nil, `{"event_id":%s,"event_type":"case.completed","timestamp":1774131900000,`+
		`"data":{"caseId":%s,"status":"COMPLETED"}}`, quoted, quoted))
}

func parse(body []byte) *offloadhook.Envelope {
	env, err := offloadhook.ParseEnvelope(body)
	if err != nil {
		panic(err)
	}
	return env
}

// claimed returns n events that d has claimed one after the other.
func (p *probe) claimed(d offloadhook.Deduper, n int) []*offloadhook.Envelope {
	var list []*offloadhook.Envelope
	for i := range n {
		env := event(fmt.Sprintf("evt_%d", i))
		p.wantClaim(d, env, true, "the first")
		list = append(list, env)
	}
	return list
}

// oneWinner: of many claims of an id at once exactly one is fresh, over all handles; none once it is done; again one
// when it was given up.
func oneWinner(p *probe) {
	handles := []offloadhook.Deduper{p.first()}
	if p.sideBySide() {
		handles = append(handles, p.open())
	}
	envs := make([]*offloadhook.Envelope, 50)
	for i := range envs {
		envs[i] = event(fmt.Sprintf("evt_%d", i))
	}
	race := func() (winners [][]offloadhook.Deduper) {
		winners = make([][]offloadhook.Deduper, len(envs))
		var mu sync.Mutex // protects winners and failed
		var failed error
		p.within("Claim, by many at once,", func() {
			var group sync.WaitGroup
			for g := range 16 {
				group.Go(func() {
					d := handles[g%len(handles)]
					for i := range envs {
						ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
						fresh, err := d.Claim(ctx, envs[i])
						cancel()
						mu.Lock()
						if fresh {
							winners[i] = append(winners[i], d)
						}
						failed = errors.Join(failed, err)
						mu.Unlock()
					}
				})
			}
			group.Wait()
		})
		if failed != nil {
			p.fatalf("Claim, by many at once: %v", failed)
		}
		return winners
	}

	first, errs := race(), make([]error, len(envs))
	p.within("Done, by many at once,", func() {
		var group sync.WaitGroup
		for i, winners := range first {
			if len(winners) == 1 {
				group.Go(func() {
					ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
					defer cancel()
					errs[i] = winners[0].Done(ctx, envs[i], []error{errGaveUp, nil}[i%2])
				})
			}
		}
		group.Wait()
	})
	for i, winners := range first {
		if len(winners) != 1 || errs[i] != nil {
			p.fatalf("16 claims of %q at once: %d are fresh, want 1; Done: %v", envs[i].EventID, len(winners), errs[i])
		}
	}
	for i, winners := range race() {
		if want := (i + 1) % 2; len(winners) != want {
			p.errorf("16 claims of %q at once, after it was done or given up: %d are fresh, want %d",
				envs[i].EventID, len(winners), want)
		}
	}
}

// done: a handled id is remembered; one that was given up is open again, as often as that happens.
func done(p *probe) {
	d := p.first()
	handled, failed := event("evt_handled"), event("evt_failed")
	p.wantClaim(d, handled, true, "the first")
	p.wantClaim(d, handled, false, "which is held")
	p.done(d, handled, nil)
	p.wantClaim(d, handled, false, "which is done")
	p.wantClaim(d, parse([]byte(`{"event_id":"evt_handled","data":"another"}`)), false, "which is done, with another body")
	p.wantClaim(d, parse(bytes.Replace(handled.Raw, []byte("evt_handled"), []byte("evt_sibling"), 1)), true,
		"the first, but like another of its case in all but the id")
	for range 3 {
		p.wantClaim(d, failed, true, "new or given up")
		p.wantClaim(d, failed, false, "which is held")
		p.done(d, failed, errGaveUp)
	}
	p.wantClaim(d, failed, true, "which was given up")
	p.done(d, failed, nil)
	p.wantClaim(d, failed, false, "which is done at last")

	list := p.claimed(d, 300)
	for _, env := range list {
		p.wantClaim(d, env, false, "which is held, as many are")
	}
	for _, env := range list {
		p.done(d, env, nil)
	}
	for _, env := range list {
		p.wantClaim(d, env, false, "which is done, as many are")
	}
}

// doneNotHeld: Done on a claim that is not held changes nothing and returns nil.
func doneNotHeld(p *probe) {
	d := p.first()
	never, handled, failed := event("evt_never"), event("evt_handled"), event("evt_failed")
	p.done(d, never, nil)
	p.wantClaim(d, never, true, "after Done without a claim")
	p.done(d, never, errGaveUp)

	p.wantClaim(d, handled, true, "the first")
	p.done(d, handled, nil)
	p.done(d, handled, errGaveUp)
	p.wantClaim(d, handled, false, "which is done, and then was given up")

	p.wantClaim(d, failed, true, "the first")
	p.done(d, failed, errGaveUp)
	p.done(d, failed, nil)
	p.wantClaim(d, failed, true, "which was given up, and then done")
	p.done(d, failed, nil)

	if !p.sideBySide() {
		return
	}
	if other := p.open(); other != d {
		held := event("evt_held")
		p.wantClaim(d, held, true, "the first")
		p.done(other, held, errGaveUp)
		p.wantClaim(other, held, false, "which was given up by one that does not hold it")
		p.done(other, held, nil)
		p.done(d, held, errGaveUp)
		p.wantClaim(other, held, true, "which was done by one that does not hold it, then given up by the one that does")
	}
}

// oddIDs are ids, as long and as strange as an event may have, that a store might take for another or choke on.
var oddIDs = []string{
	"evt_a", "EVT_A", "evt_a ", " evt_a", "evt_ä", "evt_a\u0308", "evt_\u00a0", "ｅｖｔ_a",
	`"`, `\`, `\"`, `\n`, `\u0041`, "A", "'", "''", "'; DROP TABLE offload_events; --", "`",
	"$1", "%s", "%", "_", "?", "*", "{}",
	"null", "NULL", "0", "00", "-1", "1e3", "true",
	".", "..", "/", "../../evt", "evt/..", "C:\\evt", "nul", "evt:1", "evt|1", "evt,1",
	"\u2028", "\ufeff", "\u200b", "\U0001F4E8", "\U0010FFFF", "\ufffd", "\u202eevt",
	strings.Repeat("x", 254), strings.Repeat("x", 254) + "y", strings.Repeat("x", 254) + "z",
	strings.Repeat("\U0001F4E8", 63),
}

// ids: no two ids are taken for one, and every one that can occur is taken.
func ids(p *probe) {
	d := p.first()
	for _, id := range oddIDs {
		p.wantClaim(d, event(id), true, "the first")
	}
	for i, id := range oddIDs {
		p.wantClaim(d, event(id), false, "which is held")
		var result error
		if i%2 == 0 {
			result = errGaveUp
		}
		p.done(d, event(id), result)
	}
	for i, id := range oddIDs {
		p.wantClaim(d, event(id), i%2 == 0, "after Done")
	}
}

// cancelledClaim: a Claim whose context ends returns; an error means that the id is not claimed, or that Pending hands
// the event out. A plain Deduper is told Done after the error, in case.
func cancelledClaim(p *probe) {
	d := p.first()
	inbox, isInbox := d.(offloadhook.Inbox)
	var held, unsure []*offloadhook.Envelope
	for i := range 40 {
		env := event(fmt.Sprintf("evt_%d", i))
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*50*time.Microsecond)
		if i%4 == 0 {
			cancel()
		}
		fresh, err := p.tryClaim(ctx, d, env)
		cancel()
		switch {
		case err != nil && fresh:
			p.errorf("Claim of %q returns fresh and an error: %v", env.EventID, err)
		case err != nil:
			unsure = append(unsure, env)
		case !fresh:
			p.errorf("Claim of %q, the first, with a context that ends: neither fresh nor an error", env.EventID)
		default:
			held = append(held, env)
		}
	}
	for _, env := range held {
		p.wantClaim(d, env, false, "which is held")
	}
	if !isInbox {
		for _, env := range unsure {
			p.done(d, env, errGaveUp)
			p.wantClaim(d, env, true, "which failed and then was given up")
		}
		return
	}
	listed := func() []string { return idsOf(p.pending(inbox)) }
	before := listed()
	for _, env := range held {
		if !slices.Contains(before, env.EventID) {
			p.errorf("Claim of %q returned in time and fresh, yet Pending does not yield it", env.EventID)
		}
	}
	for _, env := range unsure {
		fresh := p.claim(d, env)
		switch was := slices.Contains(before, env.EventID); {
		case fresh && was:
			p.errorf("Claim of %q failed, Pending yields it, and yet it can be claimed again", env.EventID)
		case !fresh && !was && !slices.Contains(listed(), env.EventID):
			p.errorf("Claim of %q failed, it cannot be claimed again and Pending does not yield it", env.EventID)
		}
	}
}

// cancelledDone: a Done whose context ends returns, and after an error it can be repeated.
func cancelledDone(p *probe) {
	d := p.first()
	for i, env := range p.claimed(d, 20) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*50*time.Microsecond)
		if i%4 == 0 {
			cancel()
		}
		err := p.tryDone(ctx, d, env, nil)
		cancel()
		if err != nil {
			p.done(d, env, nil)
		}
		p.wantClaim(d, env, false, "which is done")
	}
	if _, ok := d.(offloadhook.Inbox); ok {
		p.wantPending(d, "when all is done")
	}
}

// reopen: what is done stays done, and from an Inbox what was claimed and not done comes back, whether the handle
// before was closed or its owner died.
func reopen(p *probe) {
	for _, end := range []string{"was closed", "died"} {
		d := p.handles[len(p.handles)-1]
		prefix := "evt_" + end
		a, b, c, gone := event(prefix+"_a"), event(prefix+"_b"), event(prefix+"_c"), event(prefix+"_gone")
		for _, env := range []*offloadhook.Envelope{a, b, c, gone} {
			p.wantClaim(d, env, true, "the first")
		}
		p.done(d, gone, nil)
		p.done(d, b, errGaveUp)
		if end == "died" {
			p.bury(d)
		} else {
			p.close(d)
			_, closes := d.(io.Closer)
			if _, isInbox := d.(offloadhook.Inbox); closes && isInbox {
				if fresh, err := p.tryClaim(context.Background(), d, event(prefix+"_late")); err == nil {
					p.errorf("Claim by a closed handle: fresh is %t, want an error", fresh)
				}
			}
		}
		next := p.open()
		when := "when the one before " + end
		p.wantClaim(next, gone, false, "which was done "+when)
		inbox, ok := next.(offloadhook.Inbox)
		if !ok || next == d {
			p.wantClaim(next, b, true, "which was given up "+when)
			p.done(next, b, nil)
			continue
		}
		got := p.await(inbox, when, a, b, c)
		if list := idsOf(got); slices.Index(list, a.EventID) > slices.Index(list, c.EventID) {
			p.errorf("Pending, %s: %q, want %q before %q", when, list, a.EventID, c.EventID)
		}
		for _, env := range []*offloadhook.Envelope{a, b, c} {
			p.wantClaim(next, env, false, "which came back "+when)
			p.done(next, env, nil)
			p.wantClaim(next, env, false, "which came back and is done")
		}
		p.wantPending(inbox, "when all that came back is done")
	}
}

// lateDone: once another has taken over, the Done of the dead owner changes nothing.
func lateDone(p *probe) {
	dead := p.first()
	_, isInbox := dead.(offloadhook.Inbox)
	if p.store.Kill == nil && !isInbox {
		panic(skip("no owner can die"))
	}
	list := p.claimed(dead, 4)
	p.bury(dead)
	heir := p.another()
	p.inherit(heir, list)
	late := func(env *offloadhook.Envelope, result error) {
		if err := p.tryDone(context.Background(), dead, env, result); err != nil && !errors.Is(err, offloadhook.ErrClosed) {
			p.errorf("Done of %q by a dead owner: %v, want nil or ErrClosed", env.EventID, err)
		}
	}
	handled, failed, again, open := list[0], list[1], list[2], list[3]
	late(handled, nil)
	late(failed, errGaveUp)
	p.wantClaim(heir, failed, false, "which a dead owner gave up")
	if isInbox {
		p.wantPending(heir, "after the late Done of a dead owner", list...)
	}
	p.done(heir, handled, errGaveUp)
	p.wantClaim(heir, handled, true, "which a dead owner called done and its heir gave up")
	p.done(heir, again, nil)
	late(again, errGaveUp)
	p.wantClaim(heir, again, false, "which its heir has done and a dead owner gave up")
	p.done(heir, open, errGaveUp)
	late(open, nil)
	p.wantClaim(heir, open, true, "which its heir gave up and a dead owner called done")
}

// inherit waits until heir holds the claims of a dead owner.
func (p *probe) inherit(heir offloadhook.Deduper, list []*offloadhook.Envelope) {
	if inbox, ok := heir.(offloadhook.Inbox); ok {
		p.await(inbox, "after the owner died", list...)
		return
	}
	for _, env := range list {
		for start := time.Now(); !p.claim(heir, env); time.Sleep(takeover / 100) {
			if time.Since(start) > takeover {
				p.fatalf("Claim of %q is never fresh after its owner died", env.EventID)
			}
		}
	}
}

// oddBodies are events as they may come over the wire: an Inbox returns them byte for byte.
var oddBodies = []string{
	`{"event_id":"evt_plain","event_type":"case.failed","timestamp":1774131900000,"data":{"caseId":"c"}}`,
	"\r\n\t {\r\n\t\"event_id\" :\t\"evt_space\" ,\n\n\"data\" : {\r\"caseId\"\n:\n\"c\"\t}\n } \t\r\n\n",
	"{\"event_id\":\"evt_lines\",\n\"data\":{}}\n",
	"{\"event_id\":\"evt_utf8\",\"data\":{\"caseId\":\"\xff\",\"a\":\"\xfe\xc3\x28\xed\xa0\x80 \xf0\x9f\"}}",
	`{"event_id":"evt_nul","data":{"caseId":"\u0000","a":"\u0000 \ud800 \u2028` + "\u2028\u2029\x7f" + `"}}`,
	`{"event_id":"evt_num","timestamp":-0,"data":{"n":1.00000000000000000001e-400,"m":123456789012345678901234567890}}`,
	`{"z":1,"data":{"b":1,"a":2,"b":3,"caseId":"c"},"event_id":"evt_keys","a":{},"event_type":12,"timestamp":"later"}`,
	`{"event_id":"evt_none"}`,
	`{"event_id":"evt_data","data":[null,{"caseId":5},"<script>&amp;"]}`,
	`{"event_id":"evt_\u0061\"\\\/\ud83d\udce8","data":{"caseId":"\ud83d\udce8"}}`,
	`{"event_id":"evt_case","data":{"caseId":"` + incompressible(20<<10) + `"}}`,
	`{"event_id":"evt_large","data":{"caseId":"c","text":"` + strings.Repeat("lines\\n\xff\\\"", 30<<10) + `",
		"list":[` + strings.Repeat(" 1,\n", 1<<10) + `2]}}`,
}

func incompressible(n int) string {
	var text strings.Builder
	for digest := sha256.Sum256(nil); text.Len() < n; digest = sha256.Sum256(digest[:]) {
		text.WriteString(hex.EncodeToString(digest[:]))
	}
	return text.String()
}

// payloads: Pending yields each event as it was received, every byte of it, and keeps the first of two bodies with one
// id. What it has yielded stays as it was when it goes on.
func payloads(p *probe) {
	d := p.first()
	all := slices.Clone(oddBodies)
	for _, id := range oddIDs {
		all = append(all, string(event(id).Raw))
	}
	bodies := make(map[string]string)
	for _, body := range all {
		env := parse([]byte(body))
		p.wantClaim(d, env, true, "the first")
		if string(env.Raw) != body {
			p.errorf("Claim has changed the body of %q", env.EventID)
		}
		bodies[env.EventID] = body
	}
	p.wantClaim(d, parse([]byte(`{"event_id":"evt_plain","data":"another"}`)), false, "with another body")
	for range 2 {
		seen := make(map[string]bool)
		for _, env := range p.pending(d) {
			seen[env.EventID] = true
			switch body := bodies[env.EventID]; {
			case string(env.Raw) != body:
				p.errorf("Pending yields for %q the body %.100q, want %.100q", env.EventID, env.Raw, body)
			case !reflect.DeepEqual(env, parse([]byte(body))):
				p.errorf("Pending yields for %q an envelope that is not that of its body", env.EventID)
			}
		}
		if len(seen) != len(bodies) {
			p.errorf("Pending yields %d events, want %d", len(seen), len(bodies))
		}
		if next := p.open(); p.store.Kill == nil { // the same from storage, where there is another handle
			d = next
		}
		if d == p.first() {
			break
		}
	}
	p.pending(d) // makes them the handle's
	p.done(d, parse([]byte(oddBodies[0])), nil)
	if n := len(p.pending(d)); n != len(bodies)-1 {
		p.errorf("Pending, when one event of a case is done: %d events, want %d", n, len(bodies)-1)
	}
}

// order: Pending yields the oldest first, what is done no more, and each event once.
func order(p *probe) {
	d := p.first()
	p.wantPending(d, "of an empty storage")
	list := p.claimed(d, 200)
	p.wantPending(d, "in the order of the claims", list...)
	for i := 0; i < len(list); i += 3 {
		p.done(d, list[i], nil)
	}
	var left []*offloadhook.Envelope
	for i, env := range list {
		if i%3 != 0 {
			left = append(left, env)
		}
	}
	p.wantPending(d, "when every third is done", left...)
}

// snapshot: Pending yields what was claimed before the call, also when the storage changes meanwhile: by the one who
// reads, among others.
func snapshot(p *probe) {
	d := p.first()
	list := p.claimed(d, 150)
	late := event("evt_late")
	var fresh bool
	var errs []error
	got, failed := p.read(context.Background(), d, func(env *offloadhook.Envelope) bool {
		if env.EventID != list[0].EventID {
			return true
		}
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		var err error
		fresh, err = d.Claim(ctx, late)
		errs = append(errs, err, d.Done(ctx, list[0], nil))
		return true
	})
	if err := errors.Join(append(failed, errs...)...); err != nil {
		p.fatalf("Claim and Done while Pending is read: %v", err)
	}
	if !fresh {
		p.errorf("Claim of %q while Pending is read: not fresh", late.EventID)
	}
	if !slices.Equal(idsOf(got), idsOf(list)) {
		p.errorf("Pending, while another event is claimed: %q, want %q", idsOf(got), idsOf(list))
	}
	p.wantPending(d, "after that", append(list[1:], late)...)
}

// leftEarly: whoever reads Pending may stop at any event. Nothing is lost by that, and nothing stays behind that could
// run out.
func leftEarly(p *probe) {
	d := p.first()
	list := p.claimed(d, 150)
	for range 50 {
		got, errs := p.read(context.Background(), d, func(*offloadhook.Envelope) bool { return false })
		if len(errs) > 0 || !slices.Equal(idsOf(got), idsOf(list[:1])) {
			p.fatalf("Pending, left at the first event: %q and %v, want %q", idsOf(got), errs, idsOf(list[:1]))
		}
	}
	p.wantPending(d, "after it was left early", list...)
	p.wantClaim(d, event("evt_late"), true, "after Pending was left early")
}

// giveUp: what was given up is not in Pending, can be claimed again, and comes back at the first call of a new instance
// or after ten minutes.
func giveUp(p *probe) {
	d := p.first()
	p.wantPending(d, "of an empty storage") // the first call is special
	list := p.claimed(d, 3)
	failed, kept := list[0], list[1:]
	p.done(d, failed, errGaveUp)
	p.wantPending(d, "while the first rests", kept...)
	again := parse([]byte(`{"event_id":"evt_0","data":"another"}`))
	p.wantClaim(d, again, true, "which was given up")
	if got := p.pending(d); len(got) != 3 || !reflect.DeepEqual(got[2], again) {
		p.errorf("Pending, when the first was given up and claimed again: %q, want it last, with its new body", idsOf(got))
	}
	p.done(d, failed, errGaveUp)
	p.wantPending(d, "while the first rests again", kept...)
	if p.store.Rest != nil {
		if err := p.store.Rest(); err != nil {
			p.fatalf("Rest: %v", err)
		}
		p.await(d, "when the first has rested", list...)
		p.wantClaim(d, failed, false, "which has come back after its rest")
		p.done(d, failed, errGaveUp)
		p.wantPending(d, "when the first has come back and was given up", kept...)
	}
	redone := event("evt_redone")
	for _, result := range []error{errGaveUp, nil} {
		p.wantClaim(d, redone, true, "the first, or given up")
		p.done(d, redone, result)
	}
	next := p.another()
	want := list
	if p.store.Kill != nil {
		want = list[:1] // the others are still the first handle's
	}
	first := idsOf(p.pending(next))
	if !slices.Contains(first, failed.EventID) {
		p.errorf("Pending, the first call of a new instance: %q, want what was given up", first)
	}
	p.await(next, "of a new instance", want...)
	p.wantClaim(next, failed, false, "which came back to a new instance")
	p.done(next, failed, nil)
	p.wantClaim(next, failed, false, "which came back and is done")
}

// cancelledPending: when the context ends, Pending does too; if it has not yielded everything by then, it says so, lest
// the reader takes itself for caught up.
func cancelledPending(p *probe) {
	d := p.first()
	list := p.claimed(d, 150)
	for _, after := range []int{0, 1, 70} {
		ctx, cancel := context.WithCancel(context.Background())
		if after == 0 {
			cancel()
		}
		seen := 0
		got, errs := p.read(ctx, d, func(*offloadhook.Envelope) bool {
			if seen++; seen == after {
				cancel()
			}
			return true
		})
		cancel()
		if len(errs) == 0 && len(got) != len(list) {
			p.errorf("Pending, cancelled at event %d: %d of %d events and no error", after, len(got), len(list))
		}
		if n := min(len(got), len(list)); !slices.Equal(idsOf(got[:n]), idsOf(list[:n])) {
			p.errorf("Pending, cancelled at event %d, is out of order", after)
		}
	}
	p.wantPending(d, "after it was cancelled", list...)
}

// owners: handles that live side by side keep their own; of handles that follow each other the earlier ones are closed.
func owners(p *probe) {
	a := p.first()
	list := p.claimed(a, 3)
	b := p.another()
	if p.store.Kill != nil {
		p.wantPending(b, "while the owner of all events lives")
		mine := event("evt_mine")
		p.wantClaim(b, mine, true, "the first")
		p.wantClaim(a, mine, false, "which another holds")
		p.wantPending(b, "beside another owner", mine)
		p.wantPending(a, "beside another owner", list...)
		p.bury(a)
		list = append(list, mine)
		if got := idsOf(p.await(b, "after the other owner died", list...)); !slices.Equal(got, idsOf(list)) {
			p.errorf("Pending, after the other owner died: %q, want %q", got, idsOf(list))
		}
		return
	}
	// Each call notices the takeover, whichever is the first to meet it.
	closed := func(d offloadhook.Deduper, env *offloadhook.Envelope) {
		if fresh, err := p.tryClaim(context.Background(), d, env); !errors.Is(err, offloadhook.ErrClosed) {
			p.errorf("Claim by a handle that was taken over from: fresh is %t, error %v, want ErrClosed", fresh, err)
		}
	}
	closed(a, list[0])
	c := p.open()
	late := event("evt_late")
	closed(b, late)
	b = p.open()
	got, errs := p.read(context.Background(), c, nil)
	if err := errors.Join(errs...); !errors.Is(err, offloadhook.ErrClosed) || len(got) > 0 {
		p.errorf("Pending of a handle that was taken over from: %q and %v, want ErrClosed", idsOf(got), err)
	}
	p.wantPending(b, "after it took over", list...)
	p.wantClaim(b, late, true, "which was refused by a handle that was taken over from")
}

// takeOver: the events of a dead owner come to another, oldest first, and from that one to the next.
func takeOver(p *probe) {
	d := p.first()
	list := p.claimed(d, 100)
	p.done(d, list[1], nil)
	list = slices.Delete(list, 1, 2)
	for _, which := range []string{"first", "second"} {
		p.bury(d)
		heir := p.another()
		if got := p.await(heir, "after the "+which+" owner died", list...); !slices.Equal(idsOf(got), idsOf(list)) {
			p.errorf("Pending, after the %s owner died: %q, want %q", which, idsOf(got), idsOf(list))
		}
		p.wantPending(heir, "again after the "+which+" owner died", list...)
		p.wantClaim(heir, list[0], false, "which was taken over")
		p.done(heir, list[0], nil)
		list, d = list[1:], heir
	}
	p.wantPending(d, "after two takeovers", list...)
	if late := event("evt_late"); p.store.Kill != nil {
		if fresh, err := p.tryClaim(context.Background(), p.first(), late); fresh && err == nil {
			p.await(d, "when one that was taken over from has claimed another", append(list, late)...)
		}
	}
}

// oneHeir: each event of a dead owner comes to one of the others, not to several.
func oneHeir(p *probe) {
	if p.store.Kill == nil {
		panic(skip("no owner can die"))
	}
	d := p.first()
	list := p.claimed(d, 20)
	heirs := []offloadhook.Deduper{p.open(), p.open()}
	p.bury(d)
	for start, rounds := time.Now(), 0; rounds < 10; time.Sleep(takeover / 100) { // some after they have them all
		n := len(p.pending(heirs[0])) + len(p.pending(heirs[1]))
		if n == len(list) {
			rounds++
		} else if n > len(list) || time.Since(start) > takeover {
			p.fatalf("Pending of two heirs of %d events: %d in all", len(list), n)
		}
	}
}
