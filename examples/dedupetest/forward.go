package dedupetest

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"offloadhook"
)

// Forwarder is an Inbox that several replicas share, and that gives its receiver what others have received for it.
type Forwarder interface {
	offloadhook.Inbox
	// Forward sets what takes these events: the Deliver of the receiver, which claims them with the context it was given.
	Forward(deliver func(ctx context.Context, body []byte) (fresh bool, err error))
}

// Forwarded checks that the events of a case go to a when that has an unfinished one of it, and that the context with
// which such an event is forwarded stands for its first claim only. The callback has that context, and so has who is told
// that the event was given up; both may deliver with it. a and b are two owners of one storage, empty at first.
func Forwarded(t *testing.T, a, b Forwarder) {
	claim := func(ctx context.Context, d offloadhook.Inbox, body string, want bool) error {
		env := parse([]byte(body))
		fresh, err := d.Claim(ctx, env)
		if err == nil && fresh != want {
			err = fmt.Errorf("%q is claimed: fresh is %t, want %t", env.EventID, fresh, want)
		}
		return err
	}
	const (
		first   = `{"event_id":"evt_1","data":{"caseId":"case"}}`
		second  = `{"event_id":"evt_2","data":{"caseId":"case"}}`
		another = `{"event_id":"evt_3","data":{"caseId":"another case"}}`
		alike   = `{"event_id":"evt_4","data":{"caseId":"case","CaseID":"another"}}`
	)
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
	select {
	case err := <-claimed:
		if err != nil {
			t.Error(err)
		}
	case <-ctx.Done():
		t.Fatal("nothing is forwarded")
	}
	if err := claim(ctx, b, alike, false); err != nil {
		t.Error(err)
	}
}
