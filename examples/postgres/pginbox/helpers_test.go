package pginbox

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"offloadhook"
)

const (
	patience = 30 * time.Second
	soon     = 20 * time.Millisecond // in place of tidyEvery
	never    = time.Hour
)

// newInbox opens the database at url. It looks for dead owners every tidyEvery: soon, or never.
func newInbox(t *testing.T, url string, tidyEvery time.Duration) *Inbox {
	t.Helper()
	in, err := open(t.Context(), url, 0, tidyEvery)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	return in
}

// connect makes a connection like those of in, beside its pool.
func connect(t *testing.T, in *Inbox) *pgx.Conn {
	t.Helper()
	conn, err := pgx.ConnectConfig(t.Context(), in.pool.Config().ConnConfig)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// die ends the session that holds the owner's lock, as the death of its process would. The pool goes on.
func (in *Inbox) die() {
	in.stop()
	in.running.Wait()
}

func newEvent(id, caseID string) *offloadhook.Envelope {
	env, err := offloadhook.ParseEnvelope(fmt.Appendf(nil, `{"event_id":%q,"data":{"caseId":%q}}`, id, caseID))
	if err != nil {
		panic(err)
	}
	return env
}

func mustClaim(t *testing.T, in *Inbox, id, caseID string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if fresh, err := in.Claim(ctx, newEvent(id, caseID)); !fresh || err != nil {
		t.Fatalf("Claim of %s: %t, %v", id, fresh, err)
	}
}

// mustGive claims an event of a case that is another owner's.
func mustGive(t *testing.T, in *Inbox, env *offloadhook.Envelope) {
	t.Helper()
	if fresh, err := in.Claim(t.Context(), env); fresh || err != nil {
		t.Fatalf("Claim of %s, of another owner's case: %t, %v", env.EventID, fresh, err)
	}
}

func mustDone(t *testing.T, in *Inbox, id string, result error) {
	t.Helper()
	if err := in.Done(t.Context(), newEvent(id, ""), result); err != nil {
		t.Fatalf("Done of %s: %v", id, err)
	}
}

func pendingIDs(t *testing.T, in *Inbox) (ids []string) {
	t.Helper()
	for env, err := range in.Pending(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, env.EventID)
	}
	return ids
}

// awaitPending waits until in has exactly the events of ids.
func awaitPending(t *testing.T, in *Inbox, ids ...string) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(soon) {
		got := pendingIDs(t, in)
		if slices.Equal(got, ids) {
			return
		}
		if time.Since(start) > patience {
			t.Fatalf("pending are %q, want %q", got, ids)
		}
	}
}

// receiver is a Receiver in this process that counts how often each callback has returned.
type receiver struct {
	*offloadhook.Receiver
	in *Inbox

	mu   sync.Mutex // protects runs
	runs map[string]int
}

func newReceiver(t *testing.T, url string, tidyEvery time.Duration) *receiver {
	t.Helper()
	in, err := open(t.Context(), url, 0, tidyEvery)
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{in: in, runs: make(map[string]int)}
	r.Receiver = offloadhook.Handler(offloadhook.Callbacks{
		Other: func(_ context.Context, env *offloadhook.Envelope) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.runs[env.EventID]++
			return nil
		},
	}, offloadhook.WithInbox(in), offloadhook.WithObserver(func(context.Context, offloadhook.Observation) {}))
	in.Forward(r.Deliver)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := r.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		in.Close()
	})
	return r
}

func (r *receiver) counts() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.runs)
}

// await waits until the callbacks of ids have returned.
func (r *receiver) await(t *testing.T, ids ...string) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(soon) {
		runs := r.counts()
		left := slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return runs[id] > 0 })
		if len(left) == 0 {
			return
		}
		if time.Since(start) > patience {
			t.Fatalf("%d events are not handled: %q", len(left), left[:min(len(left), 10)])
		}
	}
}
