package dedupetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"offloadhook"
)

// Forwarder is an Inbox that several replicas share, and that gives its receiver what others have received for it.
type Forwarder interface {
	offloadhook.Inbox
	// Forward sets what takes these events: the Deliver of the receiver, which claims them with the context it was given.
	Forward(deliver func(ctx context.Context, body []byte) (fresh bool, err error))
}

// ofCase returns the body of an event.
func ofCase(caseID, id string) string {
	return fmt.Sprintf(`{"event_id":%q,"data":{"caseId":%q}}`, id, caseID)
}

// receive returns what comes next.
func receive[T any](ctx context.Context, t *testing.T, from <-chan T) (got T) {
	t.Helper()
	select {
	case got = <-from:
	case <-ctx.Done():
		t.Fatal("not all is forwarded")
	}
	return got
}

// claim claims the event of body, which has to be new, or not, to d.
func claim(ctx context.Context, d offloadhook.Inbox, body string, want bool) error {
	env := parse([]byte(body))
	fresh, err := d.Claim(ctx, env)
	if err == nil && fresh != want {
		err = fmt.Errorf("%q is claimed: fresh is %t, want %t", env.EventID, fresh, want)
	}
	return err
}

// Forwarding checks what replicas owe each other that forward events. open returns two owners of one storage, which is
// empty at first.
func Forwarding(t *testing.T, open func(t *testing.T) (a, b Forwarder)) {
	for name, check := range map[string]func(t *testing.T, a, b Forwarder){
		"context":       forwardedContext,
		"between pages": forwardedBetweenPages,
		"anew":          forwardedAnew,
		"held":          func(t *testing.T, a, b Forwarder) { forwardedInTurn(t, a, b, nil) },
		"refused":       func(t *testing.T, a, b Forwarder) { forwardedInTurn(t, a, b, context.DeadlineExceeded) },
		"closed":        forwardedClosed,
	} {
		t.Run(name, func(t *testing.T) {
			a, b := open(t)
			check(t, a, b)
		})
	}
}

// forwardedContext checks that the events of a case go to a when that has an unfinished one of it, and that the context
// with which such an event is forwarded stands for its first claim only. The callback has that context, and so has who is
// told that the event was given up; both may deliver with it.
func forwardedContext(t *testing.T, a, b Forwarder) {
	first, second, another := ofCase("case", "evt_1"), ofCase("case", "evt_2"), ofCase("another case", "evt_3")
	const alike = `{"event_id":"evt_4","data":{"caseId":"case","CaseID":"another"}}`
	ctx, cancel := context.WithTimeout(t.Context(), takeover)
	defer cancel()
	if err := errors.Join(claim(ctx, a, first, true), claim(ctx, b, second, false)); err != nil {
		t.Fatal(err)
	}
	claimed := make(chan error, 1)
	a.Forward(func(ctx context.Context, body []byte) (bool, error) {
		if string(body) != second {
			return true, nil
		}
		err := errors.Join(claim(ctx, a, another, true), claim(ctx, a, second, true),
			a.Done(ctx, parse(body), errGaveUp), claim(ctx, a, second, true))
		claimed <- err
		return err == nil, err
	})
	if err := receive(ctx, t, claimed); err != nil {
		t.Error(err)
	}
	if err := claim(ctx, b, alike, false); err != nil {
		t.Error(err)
	}
}

// forwardedBetweenPages checks that Pending is a snapshot where it is read in pages: two events of a case that are
// forwarded to a when it has read the first page are not in it, or both are. If the later one were alone, it would
// overtake. A page has less than 200 events.
func forwardedBetweenPages(t *testing.T, a, b Forwarder) {
	ctx, cancel := context.WithTimeout(t.Context(), takeover)
	defer cancel()
	var open atomic.Bool
	forwarded := make(chan bool, 2)
	a.Forward(func(context.Context, []byte) (bool, error) {
		if !open.Load() {
			return false, errors.New("not yet")
		}
		forwarded <- true
		return true, nil
	})
	err := errors.Join(claim(ctx, a, ofCase("case", "evt_0"), true), claim(ctx, b, ofCase("case", "evt_1"), false))
	for i := range 200 {
		err = errors.Join(err, claim(ctx, a, ofCase("", fmt.Sprint("evt_of_a_", i)), true))
	}
	if err = errors.Join(err, claim(ctx, b, ofCase("case", "evt_2"), false)); err != nil {
		t.Fatal(err)
	}
	left := 2
	await := func(limit time.Duration) {
		for late := time.After(limit); left > 0; left-- {
			select {
			case <-forwarded:
			case <-late:
				return
			}
		}
	}
	var ids []string
	for env, err := range a.Pending(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		if ids = append(ids, env.EventID); len(ids) == 1 {
			open.Store(true)
			await(time.Second) // they may have to wait for the end of the reading
		}
	}
	if slices.Contains(ids, "evt_2") && !slices.Contains(ids, "evt_1") {
		t.Error("Pending yields evt_2, and not evt_1, which came before it in its case")
	}
	if await(patience); left > 0 {
		t.Errorf("%d of 2 events are not forwarded", left)
	}
}

// forwardedAnew checks that an event which is given up as soon as it is forwarded, and claimed anew elsewhere, is
// forwarded once more.
func forwardedAnew(t *testing.T, a, b Forwarder) {
	first, second := ofCase("case", "evt_1"), ofCase("case", "evt_2")
	ctx, cancel := context.WithTimeout(t.Context(), takeover)
	defer cancel()
	for _, err := range a.Pending(ctx) { // what is given up from now on rests
		t.Error(err)
	}
	if err := errors.Join(claim(ctx, a, first, true), claim(ctx, b, second, false)); err != nil {
		t.Fatal(err)
	}
	claimed := make(chan error, 100)
	anew := false
	a.Forward(func(ctx context.Context, body []byte) (bool, error) {
		err := claim(ctx, a, string(body), true)
		if !anew {
			anew = true
			err = errors.Join(err, a.Done(ctx, parse(body), errGaveUp), claim(ctx, b, second, false))
		}
		claimed <- err
		return err == nil, err
	})
	for range 2 {
		if err := receive(ctx, t, claimed); err != nil {
			t.Error(err)
		}
	}
}

// forwardedInTurn checks that an event waits for the one before it in its case when that is not taken: because another
// delivery of it is on its way, or with an error.
func forwardedInTurn(t *testing.T, a, b Forwarder, refusal error) {
	ctx, cancel := context.WithTimeout(t.Context(), takeover)
	defer cancel()
	bodies := []string{ofCase("case", "evt_0"), ofCase("case", "evt_1"), ofCase("case", "evt_2")}
	for i, d := range []Forwarder{a, b, b} {
		if err := claim(ctx, d, bodies[i], i == 0); err != nil {
			t.Fatal(err)
		}
	}
	forwarded := make(chan string, 100)
	first := true
	a.Forward(func(_ context.Context, body []byte) (bool, error) {
		forwarded <- string(body)
		if first {
			first = false
			return false, refusal
		}
		return true, nil
	})
	for _, i := range []int{1, 1, 2} {
		if got := receive(ctx, t, forwarded); got != bodies[i] {
			t.Fatalf("forwarded is %s, want evt_%d", got, i)
		}
	}
}

// forwardedClosed checks that a receiver which shuts down is not asked again, and that Pending has what it was to get.
func forwardedClosed(t *testing.T, a, b Forwarder) {
	ctx, cancel := context.WithTimeout(t.Context(), takeover)
	defer cancel()
	var calls atomic.Int32
	a.Forward(func(context.Context, []byte) (bool, error) {
		calls.Add(1)
		return false, offloadhook.ErrClosed
	})
	err := errors.Join(claim(ctx, a, ofCase("case", "evt_0"), true),
		claim(ctx, b, ofCase("case", "evt_1"), false))
	if err != nil {
		t.Fatal(err)
	}
	for found := false; !found; time.Sleep(time.Second) { // the last time, so that it could be asked again
		for env, err := range a.Pending(ctx) {
			if err != nil {
				t.Fatal(err)
			}
			found = found || env.EventID == "evt_1"
		}
	}
	if n := calls.Load(); n != 1 {
		t.Errorf("a closed receiver is asked %d times", n)
	}
}
