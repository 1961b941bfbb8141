package pginbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"offloadhook"
	"offloadhook/examples/dedupetest"
	"offloadhook/examples/postgres/internal/pgtest"
)

// The environment variable that tells a replica where the database is.
const urlEnv = "PGINBOX_TEST_URL"

func TestMain(m *testing.M) {
	dedupetest.ServeReplica(func(cb offloadhook.Callbacks, opts ...offloadhook.Option) (
		*offloadhook.Receiver, io.Closer, error) {
		in, err := Open(context.Background(), os.Getenv(urlEnv), 0)
		if err != nil {
			return nil, nil, err
		}
		receiver := offloadhook.Handler(cb, append(opts, offloadhook.WithInbox(in))...)
		in.Forward(receiver.Deliver)
		return receiver, in, nil
	})
	os.Exit(pgtest.Main(m))
}

func TestContract(t *testing.T) {
	dedupetest.Run(t, func(t *testing.T) dedupetest.Store {
		url := pgtest.EmptySchema(t)
		return dedupetest.Store{
			Open: func() (offloadhook.Deduper, error) { return open(t.Context(), url, 0, soon) },
			Kill: func(d offloadhook.Deduper) error { d.(*Inbox).die(); return nil },
			Rest: func() error {
				pgtest.Query[int](t, url, `UPDATE offload_events SET gave_up_at = gave_up_at - interval '10 minutes' RETURNING 0`)
				return nil
			},
		}
	})
}

// rounds returns how often the faults are brought about: as often as the environment variable OFFLOADHOOK_KILLS says.
func rounds(t *testing.T, usual int) int {
	text := os.Getenv("OFFLOADHOOK_KILLS")
	if text == "" {
		return usual
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestReplicas is three replicas behind a sender that takes them in turn.
func TestReplicas(t *testing.T) {
	// One is killed -9 every three seconds, and the database once.
	t.Run("kills", func(t *testing.T) {
		url := auditedDatabase(t)
		const rate, every = 300, 3
		kills := rounds(t, 5)
		report := dedupetest.Replicas{
			Env:        []string{urlEnv + "=" + url},
			Count:      3,
			Events:     max(5000, rate*every*(kills+1)),
			Rate:       rate,
			Duplicates: 0.2,
			Handling:   200 * time.Millisecond,
			KillEvery:  every * time.Second,
			Disturb:    func() error { pgtest.Kill(); return pgtest.Start() },
			Left:       func() (int, error) { return left(t, url), nil },
			Patience:   time.Minute,
		}.Run(t)
		if report.Kills < kills || report.Reruns == 0 {
			t.Errorf("%d kills and %d reruns: this has not tested what it should", report.Kills, report.Reruns)
		}
		checkAudit(t, url, report)
	})
	// One is told to end every two seconds: no callback runs twice, nor out of order.
	t.Run("deploys", func(t *testing.T) {
		url := auditedDatabase(t)
		report := dedupetest.Replicas{
			Env:        []string{urlEnv + "=" + url},
			Count:      3,
			Events:     3000,
			Rate:       300,
			Duplicates: 0.2,
			Handling:   200 * time.Millisecond,
			KillEvery:  2 * time.Second,
			Gently:     true,
			Left:       func() (int, error) { return left(t, url), nil },
			Patience:   time.Minute,
		}.Run(t)
		if report.Kills < 2 {
			t.Errorf("%d replicas were told to end: this has not tested what it should", report.Kills)
		}
		checkAudit(t, url, report)
	})
	// None dies: the events of a case run in order, though each replica receives only every third.
	t.Run("order", func(t *testing.T) {
		url := auditedDatabase(t)
		report := dedupetest.Replicas{
			Env:        []string{urlEnv + "=" + url},
			Count:      3,
			Events:     5000,
			Duplicates: 0.2,
			Handling:   30 * time.Millisecond,
			Left:       func() (int, error) { return left(t, url), nil },
			Patience:   time.Minute,
		}.Run(t)
		checkAudit(t, url, report)
	})
}

// auditedDatabase returns a database that notes every end of an event.
func auditedDatabase(t *testing.T) (url string) {
	url = pgtest.EmptySchema(t)
	in, err := Open(t.Context(), url, 0)
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	pgtest.Query[int](t, url, `
		CREATE TABLE ends (event_id text);
		CREATE FUNCTION note_end() RETURNS trigger LANGUAGE plpgsql AS $$
			BEGIN INSERT INTO ends VALUES (NEW.event_id); RETURN NULL; END $$;
		CREATE TRIGGER note_end AFTER UPDATE ON offload_events FOR EACH ROW WHEN (NEW.done_at IS NOT NULL)
			EXECUTE FUNCTION note_end();
		SELECT 0`)
	return url
}

// checkAudit checks that of every acknowledged event one end was recorded.
func checkAudit(t *testing.T, url string, report dedupetest.Report) {
	t.Helper()
	ends := pgtest.Query[string](t, url, `SELECT event_id FROM ends ORDER BY event_id COLLATE "C"`)
	if !slices.Equal(ends, report.Acknowledged) {
		t.Errorf("the ends of %d events are recorded, of which %d are different; %d are acknowledged",
			len(ends), len(slices.Compact(slices.Clone(ends))), len(report.Acknowledged))
	}
}

func left(t *testing.T, url string) int {
	return pgtest.Query[int](t, url, `SELECT count(*) FROM offload_events WHERE done_at IS NULL`)[0]
}

// TestKilled kills a process in the middle of a callback: another runs the event.
func TestKilled(t *testing.T) {
	url := pgtest.EmptySchema(t)
	heir := newReceiver(t, url, tidyEvery)
	for i := range rounds(t, 1) {
		id := fmt.Sprintf("evt_%d", i)
		child := dedupetest.StartHanging(t, id, urlEnv+"="+url)
		_ = child.Kill()
		_, _ = child.Wait()
		killed := time.Now()
		heir.await(t, id)
		t.Logf("taken over after %v", time.Since(killed).Round(100*time.Millisecond))
	}
}

// TestFrozen stops a process in the middle of a callback, but does not end it: another runs the event.
func TestFrozen(t *testing.T) {
	url := pgtest.EmptySchema(t)
	heir := newReceiver(t, url, tidyEvery)
	child := dedupetest.StartHanging(t, "evt_0", urlEnv+"="+url)
	if err := child.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	heir.await(t, "evt_0")
}

// TestSlow leaves an event unfinished for longer than it takes to find a dead owner: its owner keeps it.
func TestSlow(t *testing.T) {
	url := pgtest.EmptySchema(t)
	slow, other := newInbox(t, url, never), newInbox(t, url, soon)
	mustClaim(t, slow, "evt_slow", "case_1")
	buryOne(t, url, other)
	if got := pendingIDs(t, slow); !slices.Equal(got, []string{"evt_slow"}) {
		t.Errorf("the slow owner has %q", got)
	}
}

// TestSessionLost ends the session that holds an owner's lock: it takes the lock again, and keeps its events.
func TestSessionLost(t *testing.T) {
	url := pgtest.EmptySchema(t)
	in, other := newInbox(t, url, never), newInbox(t, url, soon)
	mustClaim(t, in, "evt_kept", "case_1")
	for range 3 {
		pgtest.Query[bool](t, url, `SELECT pg_terminate_backend(pid) FROM pg_locks
			WHERE locktype = 'advisory' AND classid = $1 AND objid = $2`, in.table, in.owner)
		buryOne(t, url, other)
	}
	mustClaim(t, in, "evt_more", "case_2")
	if got := pendingIDs(t, in); !slices.Equal(got, []string{"evt_kept", "evt_more"}) {
		t.Errorf("the owner has %q", got)
	}
}

// TestConnectionsLost ends the connections of the pool, as a database that restarts does: a claim is not refused.
func TestConnectionsLost(t *testing.T) {
	url := pgtest.EmptySchema(t)
	in := newInbox(t, url, never)
	mustClaim(t, in, "evt_0", "")
	const others = `SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE backend_type = 'client backend'
		AND pid <> pg_backend_pid() AND pid NOT IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')`
	if ended := pgtest.Query[bool](t, url, others); len(ended) == 0 {
		t.Fatal("there are none")
	}
	mustClaim(t, in, "evt_1", "")
}

// TestSessionInTheWay is an owner whose earlier session is still there for the server, because it broke unnoticed.
func TestSessionInTheWay(t *testing.T) {
	url := pgtest.EmptySchema(t)
	in := newInbox(t, url, never)
	mustClaim(t, in, "evt_kept", "case_1")
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	locked := make(chan error, 1)
	go func() {
		_, err := conn.Exec(t.Context(), `SELECT pg_advisory_lock($1, $2)`, int32(in.table), in.owner)
		locked <- err
	}()
	const waiting = `SELECT count(*) FROM pg_locks
		WHERE locktype = 'advisory' AND classid = $1 AND objid = $2 AND NOT granted`
	for start := time.Now(); pgtest.Query[int](t, url, waiting, in.table, in.owner)[0] == 0; {
		if time.Since(start) > patience {
			t.Fatal("nobody waits for the lock")
		}
	}
	pgtest.Query[bool](t, url, `SELECT pg_terminate_backend(pid) FROM pg_locks
		WHERE locktype = 'advisory' AND classid = $1 AND objid = $2 AND granted`, in.table, in.owner)
	if err := <-locked; err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); conn.Ping(t.Context()) == nil; time.Sleep(soon) {
		if time.Since(start) > patience {
			t.Fatal("the owner does not end the session that is in its way")
		}
	}
	mustClaim(t, in, "evt_more", "case_2")
	if got := pendingIDs(t, in); !slices.Equal(got, []string{"evt_kept", "evt_more"}) {
		t.Errorf("the owner has %q", got)
	}
}

// TestTakeOverOfTheLiving tries to take over from an owner that was thought dead, and is not.
func TestTakeOverOfTheLiving(t *testing.T) {
	url := pgtest.EmptySchema(t)
	living, heir := newInbox(t, url, never), newInbox(t, url, never)
	mustClaim(t, living, "evt_1", "case")
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if err := heir.takeOver(t.Context(), conn, living.owner); err != nil {
		t.Fatal(err)
	}
	if got := pendingIDs(t, living); !slices.Equal(got, []string{"evt_1"}) {
		t.Errorf("the living owner has %q", got)
	}
	living.die()
	for start := time.Now(); len(pendingIDs(t, heir)) == 0; { // when the server has noticed
		if err := heir.takeOver(t.Context(), conn, living.owner); err != nil {
			t.Fatal(err)
		}
		if time.Since(start) > patience {
			t.Fatal("the heir has nothing")
		}
	}
	// What it claimed now would be taken from it, while its callback runs.
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if fresh, err := living.Claim(ctx, newEvent("evt_2", "case_2")); fresh || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Claim by an owner without its lock: %t, %v", fresh, err)
	}
	mustClaim(t, heir, "evt_2", "case_2")
}

// TestTakeOverMany takes over in steps, since claims wait meanwhile, and each case in one, lest it have two owners.
func TestTakeOverMany(t *testing.T) {
	url := pgtest.EmptySchema(t)
	dead, in := newInbox(t, url, never), newInbox(t, url, never)
	dead.die()
	pgtest.Query[int](t, url, fmt.Sprintf(`INSERT INTO offload_events (event_id, case_id, body, owner, handed)
		SELECT 'evt_'||i, nullif('case_'||i %% 1000, 'case_0'), convert_to('{"event_id":"evt_'||i||'"}', 'UTF8'), %d, true
		FROM generate_series(1, 5000) AS i RETURNING 0`, dead.owner))
	conn := connect(t, in)
	if err := in.takeOver(t.Context(), conn, dead.owner); err != nil {
		t.Fatal(err)
	}
	// xmin is the transaction that wrote the row.
	if steps := pgtest.Query[int](t, url, `SELECT count(DISTINCT xmin::text) FROM offload_events`)[0]; steps < 2 {
		t.Errorf("took over in %d steps", steps)
	}
	for _, split := range pgtest.Query[string](t, url, `SELECT case_id FROM offload_events
		WHERE case_id IS NOT NULL GROUP BY case_id HAVING count(DISTINCT xmin::text) > 1`) {
		t.Errorf("%s had two owners", split)
	}
	if got := len(pendingIDs(t, in)); got != 5000 {
		t.Errorf("took over %d events", got)
	}
}

// TestTakeOverWaits takes over from an owner that is about to mark some events of a case: all of the case moves at once.
func TestTakeOverWaits(t *testing.T) {
	url := pgtest.EmptySchema(t)
	dead, in := newInbox(t, url, never), newInbox(t, url, never)
	ids := []string{"evt_0", "evt_1", "evt_2", "evt_3"}
	for _, id := range ids {
		mustClaim(t, dead, id, "case")
	}
	dead.die()
	seqs := pgtest.Query[int64](t, url, `UPDATE offload_events SET handed = false RETURNING seq`)
	marking, err := dead.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer marking.Rollback(context.Background())
	if _, err := marking.Exec(t.Context(), setHanded, dead.owner, seqs[1:3], seqs[1], seqs[2]); err != nil {
		t.Fatal(err)
	}
	conn := connect(t, in)
	pid, over := conn.PgConn().PID(), make(chan error, 1)
	go func() { over <- in.takeOver(t.Context(), conn, dead.owner) }()
	for start := time.Now(); len(over) == 0 && time.Since(start) < patience; time.Sleep(soon) {
		if pgtest.Query[int](t, url, fmt.Sprint(`SELECT cardinality(pg_blocking_pids(`, pid, `))`))[0] > 0 {
			break
		}
	}
	if err := marking.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err = <-over; stuck(err) { // the machine is slow
		err = in.takeOver(t.Context(), conn, dead.owner)
	}
	if err != nil {
		t.Fatal(err)
	}
	if steps := pgtest.Query[int](t, url, `SELECT count(DISTINCT xmin::text) FROM offload_events`)[0]; steps != 1 {
		t.Errorf("took over one case in %d steps", steps)
	}
	if got := pendingIDs(t, in); !slices.Equal(got, ids) {
		t.Errorf("pending are %q", got)
	}
}

// buryOne lets an owner die, and returns when in has taken over from it, so it has looked for other dead as well.
func buryOne(t *testing.T, url string, in *Inbox) {
	t.Helper()
	dead := newInbox(t, url, never)
	id := fmt.Sprintf("evt_of_%d", dead.owner)
	mustClaim(t, dead, id, id)
	dead.die()
	awaitPending(t, in, id)
	mustDone(t, in, id, nil)
}

// TestOneOwnerPerCase gives the events of a case to the replica that has unfinished ones of it, in the order of their
// claims.
func TestOneOwnerPerCase(t *testing.T) {
	url := pgtest.EmptySchema(t)
	a, b := newInbox(t, url, never), newInbox(t, url, never)
	mustClaim(t, a, "evt_1", "case")
	for _, id := range []string{"evt_2", "evt_3"} {
		mustGive(t, b, newEvent(id, "case"))
	}
	// At the replica that has evt_1, too, the next event has to wait until its receiver knows of those between.
	if fresh, err := a.Claim(t.Context(), newEvent("evt_4", "case")); fresh || err != nil {
		t.Errorf("evt_4, behind others that are not handed over: %t, %v", fresh, err)
	}
	if got := pendingIDs(t, b); len(got) > 0 {
		t.Errorf("the other replica has %q", got)
	}
	forwardAll(t, a, "evt_2", "evt_3", "evt_4")
	for _, id := range []string{"evt_1", "evt_2", "evt_3", "evt_4"} {
		mustDone(t, a, id, nil)
	}
	mustClaim(t, b, "evt_5", "case")
}

// forwardAll lets in forward the events of ids, and checks that it does so in that order.
func forwardAll(t *testing.T, in *Inbox, ids ...string) {
	t.Helper()
	var delivered []string
	all := make(chan struct{})
	in.Forward(func(ctx context.Context, body []byte) (bool, error) {
		env, err := offloadhook.ParseEnvelope(body)
		if err != nil {
			return false, err
		}
		if delivered = append(delivered, env.EventID); len(delivered) == len(ids) {
			close(all)
		}
		return in.Claim(ctx, env)
	})
	select {
	case <-all:
	case <-time.After(patience):
		t.Fatal("not all is forwarded")
	}
	if !slices.Equal(delivered, ids) {
		t.Errorf("forwarded are %q, want %q", delivered, ids)
	}
}

func TestForwarding(t *testing.T) {
	dedupetest.Forwarding(t, func(t *testing.T) (a, b dedupetest.Forwarder) {
		url := pgtest.EmptySchema(t)
		return newInbox(t, url, never), newInbox(t, url, never)
	})
}

// TestLooks finds an owner's lock free, and its owner alive after all: only one that was found so six times in a row is
// a dead one's.
func TestLooks(t *testing.T) {
	url := pgtest.EmptySchema(t)
	in, other := newInbox(t, url, never), newInbox(t, url, never)
	mustClaim(t, other, "evt_1", "case")
	other.die()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	lock := func(call string) {
		if _, err := conn.Exec(t.Context(), `SELECT `+call+`($1, $2)`, int32(in.table), other.owner); err != nil {
			t.Fatal(err)
		}
	}
	lock("pg_advisory_lock") // waits until the server has noticed
	lock("pg_advisory_unlock")
	free := make(map[int32]int)
	look := func(n int) {
		for range n {
			if err := in.tidy(t.Context(), conn, free); err != nil {
				t.Fatal(err)
			}
		}
	}
	look(deathLooks - 1)
	lock("pg_advisory_lock")
	look(1)
	lock("pg_advisory_unlock")
	look(deathLooks - 1)
	if got := pendingIDs(t, in); len(got) > 0 {
		t.Errorf("after %d looks in a row %q is taken over", deathLooks-1, got)
	}
	look(1)
	if got := pendingIDs(t, in); !slices.Equal(got, []string{"evt_1"}) {
		t.Errorf("after %d looks in a row: %q", deathLooks, got)
	}
}

// TestForwardPages reads no more than a page at once: bodies of a megabyte may come over a slow link.
func TestForwardPages(t *testing.T) {
	url := pgtest.EmptySchema(t)
	a, b := newInbox(t, url, never), newInbox(t, url, never)
	mustClaim(t, a, "evt_0", "case")
	text := strings.Repeat("x", 600<<10)
	want := []string{"evt_0"}
	for i := range 5 {
		id := fmt.Sprint("evt_", i+1)
		want = append(want, id)
		env := newEvent(id, "case")
		env.Raw = fmt.Appendf(nil, `{"event_id":%q,"data":{"caseId":"case","text":%q}}`, id, text)
		mustGive(t, b, env)
	}
	if page, err := a.read(t.Context(), "NOT handed"); len(page) != 2 || err != nil {
		t.Errorf("%d events in a page, want 2: %v", len(page), err)
	}
	forwardAll(t, a, want[1:]...)
	awaitPending(t, a, want...)
}

// TestForwardOrder takes over from a dead owner while events are forwarded: two of a case, with a page of others between
// them, come in their order.
func TestForwardOrder(t *testing.T) {
	url := pgtest.EmptySchema(t)
	a, b, dead := newInbox(t, url, never), newInbox(t, url, never), newInbox(t, url, never)
	mustClaim(t, dead, "evt_first", "case")
	for i := range pageSize {
		caseID := fmt.Sprint("case_", i)
		mustClaim(t, a, fmt.Sprint("evt_a", i), caseID)
		mustGive(t, b, newEvent(fmt.Sprint("evt_b", i), caseID))
	}
	mustClaim(t, dead, "evt_second", "case")
	ofCase := make(chan string, 2)
	delivered := 0
	a.Forward(func(_ context.Context, body []byte) (bool, error) {
		env, err := offloadhook.ParseEnvelope(body)
		if err != nil {
			return false, err
		}
		if delivered++; delivered == 1 {
			pgtest.Query[int](t, url, `UPDATE offload_events SET owner = $1, handed = false WHERE owner = $2 RETURNING 0`,
				a.owner, dead.owner)
		}
		if caseID := caseOf(env); caseID != nil && *caseID == "case" {
			ofCase <- env.EventID
		}
		return true, nil
	})
	for _, want := range []string{"evt_first", "evt_second"} {
		select {
		case got := <-ofCase:
			if got != want {
				t.Errorf("forwarded is %s, want %s", got, want)
			}
		case <-time.After(patience):
			t.Fatal("not all is forwarded")
		}
	}
}

// TestHandEnds forwards slowly: what waits for handing gets its turn in the midst of a page.
func TestHandEnds(t *testing.T) {
	url := pgtest.EmptySchema(t)
	a, b := newInbox(t, url, never), newInbox(t, url, never)
	mustClaim(t, a, "evt_0", "case")
	for _, id := range []string{"evt_1", "evt_2", "evt_3"} {
		mustGive(t, b, newEvent(id, "case"))
	}
	forwarded := 0
	deliver := func(context.Context, []byte) (bool, error) {
		if forwarded++; forwarded == 2 {
			time.Sleep(giveWay)
		}
		return true, nil
	}
	if more := a.hand(t.Context(), deliver); more || forwarded != 2 {
		t.Errorf("%d events are forwarded, and it goes on: %t", forwarded, more)
	}
	if more := a.hand(t.Context(), deliver); !more || forwarded != 3 {
		t.Errorf("after that, %d events are forwarded, and it goes on: %t", forwarded, more)
	}
}

// TestDamaged has a row that cannot be read before an event that is to be forwarded: it is reported, and holds up nothing.
func TestDamaged(t *testing.T) {
	url := pgtest.EmptySchema(t)
	heir, dead := newReceiver(t, url, soon), newInbox(t, url, never)
	mustClaim(t, dead, "evt_damaged", "case_1")
	mustClaim(t, dead, "evt_sound", "case_2")
	pgtest.Query[int](t, url, `UPDATE offload_events SET body = '{' WHERE event_id = 'evt_damaged' RETURNING 0`)
	dead.die()
	heir.await(t, "evt_sound")
	for _, err := range heir.in.Pending(t.Context()) {
		if errors.Is(err, offloadhook.ErrMalformed) {
			return
		}
	}
	t.Error("Pending does not report it")
}

// TestPlans asks the planner how it finds what it has to: by an index that leads there, not by reading the table, or all
// that an owner has. It may have planned that when the table was empty, or have the statistics of a time when all was done.
func TestPlans(t *testing.T) {
	url := pgtest.EmptySchema(t)
	in := newInbox(t, url, never)
	pgtest.Query[int](t, url, `ALTER TABLE offload_events SET (autovacuum_enabled = false); ANALYZE offload_events; SELECT 0`)
	checkPlans(t, in, "empty")
	pgtest.Query[int](t, url, fmt.Sprintf(`INSERT INTO offload_events (event_id, handed, done_at)
		SELECT 'old_'||i, true, now() FROM generate_series(1, 100000) AS i;
		ANALYZE offload_events;
		INSERT INTO offload_events (event_id, case_id, body, owner, handed)
		SELECT 'evt_'||i, 'case_'||i, '{}', %d, true FROM generate_series(1, 50000) AS i;
		INSERT INTO offload_events (event_id, handed, gave_up_at)
		SELECT 'failed_'||i, true, now() FROM generate_series(1, 50000) AS i RETURNING 0`, in.owner))
	checkPlans(t, in, "large")
}

func checkPlans(t *testing.T, in *Inbox, table string) {
	t.Helper()
	conn := connect(t, in)
	owner := fmt.Sprint(in.owner)
	for _, test := range []struct{ name, statement, args, want string }{
		{"claimed", setClaimed, "'evt_new','case_1','{}'," + owner, `Index Cond: \(case_id = `},
		{"taken over", setTaken, "1," + owner + ",0", `(?s)using offload_events_owner .*Cond: \(case_id = .*Cond: \(event_id = ANY`},
		{"done", setDone, "'evt_1'," + owner, `Index Cond: \(event_id = `},
		{"given up", setGaveUp, "'evt_1'," + owner, `Index Cond: \(event_id = `},
		{"handed", setHanded, owner + ",'{7,9}',7,9", `Index Cond: .*seq >= .*seq <= `},
		{"to hand", fmt.Sprintf(pageOf, "NOT handed"), owner, `Index Scan using offload_events_to_hand `},
		{"newest", newest, owner, `Limit.*\n.*Index Only Scan Backward using offload_events_owner `},
		{"rested", rested + "1", "false", `Index Cond: \(gave_up_at <= `},
		{"expired", expired, "3600", `Index Cond: \(done_at < `},
		{"owners", owners, "", `Index Cond: \(owner > `},
	} {
		for _, mode := range []string{"custom", "generic"} { // the server chooses between them
			sql := fmt.Sprintf("SET plan_cache_mode = force_%s_plan; PREPARE p AS %s; EXPLAIN EXECUTE p", mode, test.statement)
			if test.args != "" {
				sql += "(" + test.args + ")"
			}
			results, err := conn.PgConn().Exec(t.Context(), sql+"; DEALLOCATE p").ReadAll()
			if err != nil {
				t.Fatalf("%s: %v", test.name, err)
			}
			plan := ""
			for _, row := range results[2].Rows {
				plan += string(row[0]) + "\n"
			}
			if !regexp.MustCompile(test.want).MatchString(plan) || strings.Contains(plan, "Seq Scan") {
				t.Errorf("%s, %s plan, %s table: want %s in\n%s", test.name, mode, table, test.want, plan)
			}
		}
	}
}

// TestReviveMany brings back more than are changed in one step.
func TestReviveMany(t *testing.T) {
	url := pgtest.EmptySchema(t)
	newInbox(t, url, never)
	pgtest.Query[int](t, url, `INSERT INTO offload_events (event_id, case_id, body, handed, gave_up_at)
		SELECT 'evt_'||i, 'case_'||i, convert_to('{"event_id":"evt_'||i||'"}', 'UTF8'), true, now()
		FROM generate_series(1, 2500) AS i RETURNING 0`)
	if got := pendingIDs(t, newInbox(t, url, never)); len(got) != 2500 {
		t.Errorf("%d events come back, want 2500", len(got))
	}
}

// TestStuckClaim: a claim that does not end, since its machine has vanished in the midst of it, holds up a takeover, but
// neither the session nor the claims of others.
func TestStuckClaim(t *testing.T) {
	url := pgtest.EmptySchema(t)
	in, dead := newInbox(t, url, soon), newInbox(t, url, never)
	mustClaim(t, dead, "evt_dead", "case_dead")
	mustClaim(t, dead, "evt_rested", "case_rested")
	mustDone(t, dead, "evt_rested", errors.New("given up"))
	for setting, want := range map[string]string{
		"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3", "tcp_user_timeout": "20000",
	} {
		var got string
		if err := in.pool.QueryRow(t.Context(), "SHOW "+setting).Scan(&got); got != want || err != nil {
			t.Errorf("connections of a machine that has vanished stay: %s is %q, %v", setting, got, err)
		}
	}
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), `BEGIN`); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), `SELECT pg_advisory_xact_lock_shared($1, 0)`, claimsLock); err != nil {
		t.Fatal(err)
	}
	session := func() chan struct{} {
		in.mu.Lock()
		defer in.mu.Unlock()
		return in.alive
	}
	before := session()
	dead.die()
	const waits = `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1 AND NOT granted`
	waiting := func() (n int) {
		_ = conn.QueryRow(t.Context(), waits, claimsLock).Scan(&n)
		return n
	}
	for try := range 2 {
		for _, want := range []bool{true, false} {
			for start := time.Now(); (waiting() > 0) != want; {
				if time.Since(start) > patience {
					t.Fatalf("takeover %d begins or ends: %t", try, want)
				}
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		if fresh, err := in.Claim(ctx, newEvent(fmt.Sprint("evt_", try), "")); !fresh || err != nil {
			t.Errorf("Claim beside one that is stuck: %t, %v", fresh, err)
		}
		cancel()
	}
	if session() != before {
		t.Error("the session has ended")
	}
	if got := pendingIDs(t, in); !slices.Equal(got, []string{"evt_0", "evt_1"}) {
		t.Errorf("Pending beside a claim that is stuck: %q", got)
	}
	if _, err := conn.Exec(t.Context(), `COMMIT`); err != nil {
		t.Fatal(err)
	}
	awaitPending(t, in, "evt_dead", "evt_0", "evt_1", "evt_rested")
}

// TestOneOwnerPerCaseRace brings new events, and some that were given up, to cases from all sides at once: no case has
// two owners.
func TestOneOwnerPerCaseRace(t *testing.T) {
	url := pgtest.EmptySchema(t)
	a, b := newInbox(t, url, never), newInbox(t, url, never)
	const cases = 100
	for i := range cases {
		id, caseID := fmt.Sprintf("evt_failed_%d", i), fmt.Sprintf("case_%d", i)
		mustClaim(t, a, id, caseID)
		mustDone(t, a, id, errors.New("failed"))
	}
	var group sync.WaitGroup
	for name, in := range map[string]*Inbox{"a": a, "b": b} {
		for half := range 2 {
			group.Go(func() {
				for i := half; i < cases; i += 2 {
					id, caseID := fmt.Sprintf("evt_%s_%d", name, i), fmt.Sprintf("case_%d", i)
					if _, err := in.Claim(t.Context(), newEvent(id, caseID)); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	for range 10 { // each brings back what was given up by then
		pendingIDs(t, newInbox(t, url, never))
	}
	group.Wait()
	split := pgtest.Query[string](t, url, `SELECT case_id FROM offload_events WHERE owner IS NOT NULL
		GROUP BY case_id HAVING count(DISTINCT owner) > 1`)
	if len(split) > 0 {
		t.Errorf("%d cases have two owners: %q", len(split), split)
	}
}

// TestIsolation claims in a database whose sessions are stricter than what Claim relies on.
func TestIsolation(t *testing.T) {
	for _, level := range []string{"repeatable%20read", "serializable"} {
		url := pgtest.EmptySchema(t) + "&default_transaction_isolation=" + level
		ins := []*Inbox{newInbox(t, url, never), newInbox(t, url, never)}
		for c := range 100 {
			var claims sync.WaitGroup
			for i := range 4 {
				claims.Go(func() {
					event := newEvent(fmt.Sprintf("evt_%d_%d", c, i), fmt.Sprint("case_", c))
					if _, err := ins[i%2].Claim(t.Context(), event); err != nil {
						t.Errorf("%s: %v", level, err)
					}
				})
			}
			claims.Wait()
		}
		split := pgtest.Query[string](t, url, `SELECT case_id FROM offload_events GROUP BY case_id HAVING count(DISTINCT owner) > 1`)
		if len(split) > 0 {
			t.Errorf("%s: %d cases have two owners", level, len(split))
		}
	}
}

// TestGivenUpCase brings an event that was given up back to the owner of its case, whichever instance starts.
func TestGivenUpCase(t *testing.T) {
	url := pgtest.EmptySchema(t)
	a := newInbox(t, url, never)
	pendingIDs(t, a)
	mustClaim(t, a, "evt_1", "case")
	mustDone(t, a, "evt_1", errors.New("failed"))
	mustClaim(t, a, "evt_2", "case")
	if got := pendingIDs(t, newInbox(t, url, never)); len(got) > 0 {
		t.Errorf("the instance that starts has %q", got)
	}
	if got := pendingIDs(t, a); !slices.Equal(got, []string{"evt_2", "evt_1"}) {
		t.Errorf("the owner of the case has %q", got)
	}
}

// TestPendingWaitsForForward reads Pending while an event is being handed over: the receiver may leave it to the Inbox,
// so the reading must have it.
func TestPendingWaitsForForward(t *testing.T) {
	url := pgtest.EmptySchema(t)
	a, b := newInbox(t, url, never), newInbox(t, url, never)
	mustClaim(t, a, "evt_1", "case")
	read := make(chan []string, 1)
	early := make(chan bool, 1)
	a.Forward(func(ctx context.Context, body []byte) (bool, error) {
		go func() { read <- pendingIDs(t, a) }()
		select {
		case got := <-read:
			read <- got
			early <- true
		case <-time.After(200 * time.Millisecond): // far longer than it takes
			early <- false
		}
		return true, nil
	})
	mustGive(t, b, newEvent("evt_2", "case"))
	if <-early {
		t.Error("Pending did not wait")
	}
	if got := <-read; !slices.Equal(got, []string{"evt_1", "evt_2"}) {
		t.Errorf("Pending has %q", got)
	}
}

// TestDatabaseKilled kills the database in the middle of requests: they are refused while it is away, and what was
// acknowledged is handled, once.
func TestDatabaseKilled(t *testing.T) {
	url := pgtest.EmptySchema(t)
	r := newReceiver(t, url, tidyEvery)
	web := httptest.NewServer(r)
	defer web.Close()
	post := func(id string) int {
		resp, err := web.Client().Post(web.URL, "application/json", bytes.NewReader(newEvent(id, id).Raw))
		if err != nil {
			t.Error(err)
			return 0
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	for round := range rounds(t, 2) {
		var senders sync.WaitGroup
		var mu sync.Mutex // protects what follows
		var acknowledged []string
		var refused int
		half := make(chan struct{})
		for s := range 8 {
			senders.Go(func() {
				for i := 0; ; i++ {
					id := fmt.Sprintf("evt_%d_%d_%d", round, s, i)
					status := post(id)
					mu.Lock()
					switch status {
					case http.StatusAccepted:
						acknowledged = append(acknowledged, id)
						if len(acknowledged) == 200 {
							close(half)
						}
					case http.StatusServiceUnavailable:
						refused++
					default:
						t.Errorf("%s: status %d", id, status)
					}
					enough := status != http.StatusAccepted
					mu.Unlock()
					if enough {
						return
					}
				}
			})
		}
		<-half
		pgtest.Kill()
		senders.Wait() // each has met a 503
		if err := pgtest.Start(); err != nil {
			t.Fatal(err)
		}
		last := fmt.Sprintf("evt_%d_last", round)
		for start := time.Now(); post(last)/100 != 2; time.Sleep(20 * time.Millisecond) {
			if time.Since(start) > patience {
				t.Fatal("the database is back, and events are still refused")
			}
		}
		r.await(t, append(acknowledged, last)...)
		t.Logf("%d acknowledged, %d refused", len(acknowledged), refused)
	}
	for id, n := range r.counts() {
		if n != 1 {
			t.Errorf("the callback of %s ran %d times", id, n)
		}
	}
}

// TestRetention deletes the rows of events that have been done for long enough, and no others.
func TestRetention(t *testing.T) {
	url := pgtest.EmptySchema(t)
	in := newInbox(t, url, soon)
	mustClaim(t, in, "evt_old", "case_1")
	mustDone(t, in, "evt_old", nil)
	mustClaim(t, in, "evt_done", "case_2")
	mustDone(t, in, "evt_done", nil)
	mustClaim(t, in, "evt_open", "case_3")
	mustClaim(t, in, "evt_failed", "case_4")
	mustDone(t, in, "evt_failed", errors.New("failed"))
	const bodies = `SELECT event_id FROM offload_events WHERE body IS NOT NULL ORDER BY event_id`
	if got := pgtest.Query[string](t, url, bodies); !slices.Equal(got, []string{"evt_failed", "evt_open"}) {
		t.Errorf("the bodies of %q are kept", got)
	}
	pgtest.Query[int](t, url, `UPDATE offload_events SET claimed_at = claimed_at - interval '30 days',
		gave_up_at = gave_up_at - interval '30 days',
		done_at = done_at - CASE event_id WHEN 'evt_old' THEN interval '30 days' ELSE interval '29 days' END RETURNING 0`)
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		got := pgtest.Query[string](t, url, `SELECT event_id FROM offload_events ORDER BY event_id`)
		if slices.Equal(got, []string{"evt_done", "evt_failed", "evt_open"}) {
			break
		}
		if time.Since(start) > patience {
			t.Fatalf("left are %q", got)
		}
	}
	if fresh, err := in.Claim(t.Context(), newEvent("evt_old", "case_1")); !fresh || err != nil {
		t.Errorf("Claim of an event that is forgotten: %t, %v", fresh, err)
	}
}

// TestOpen refuses databases that would lose what they acknowledge, and lets many replicas start at once.
func TestOpen(t *testing.T) {
	t.Run("many at once", func(t *testing.T) {
		url := pgtest.EmptySchema(t)
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				in, err := Open(t.Context(), url, 0)
				if err != nil {
					t.Error(err)
					return
				}
				in.Close()
			})
		}
		group.Wait()
	})
	t.Run("no database", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if in, err := Open(ctx, "postgres://test@127.0.0.1:1/postgres?sslmode=disable", 0); err == nil {
			in.Close()
			t.Error("no error")
		}
	})
	// The first of two hosts has vanished: it takes the connection, and never answers.
	t.Run("another host", func(t *testing.T) {
		vanished, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer vanished.Close()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		in, err := Open(ctx, strings.Replace(pgtest.EmptySchema(t), "@", "@"+vanished.Addr().String()+",", 1), 0)
		if err != nil {
			t.Fatal(err)
		}
		in.Close()
	})
	t.Run("beside VACUUM, without the right to create", func(t *testing.T) {
		url := pgtest.EmptySchema(t)
		in := newInbox(t, url, never)
		schema := url[strings.LastIndex(url, "=")+1:]
		role := "role_of_" + schema
		pgtest.Query[int](t, url, fmt.Sprintf(`CREATE ROLE %[2]s LOGIN; GRANT USAGE ON SCHEMA %[1]s TO %[2]s;
			GRANT SELECT, INSERT, UPDATE, DELETE ON offload_events TO %[2]s; GRANT USAGE ON SEQUENCE offload_owners TO %[2]s;
			SELECT 0`, schema, role))
		conn, err := pgx.Connect(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		const vacuum = `BEGIN; LOCK TABLE offload_events IN SHARE UPDATE EXCLUSIVE MODE` // the lock that it takes
		if _, err := conn.Exec(t.Context(), vacuum); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		another, err := Open(ctx, strings.Replace(url, "test@", role+"@", 1), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer another.Close()
		mustClaim(t, in, "evt_1", "case_1")
		mustClaim(t, another, "evt_2", "case_2")
		mustDone(t, another, "evt_2", errors.New("failed"))
		awaitPending(t, another, "evt_2")
	})
	t.Run("no URL", func(t *testing.T) {
		in, err := Open(t.Context(), "host=127.0.0.1 password = 'my secret' sslmode=bogus", 0)
		if err == nil {
			in.Close()
			t.Fatal("no error")
		}
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("the password is told: %v", err)
		}
	})
	t.Run("asynchronous commit", func(t *testing.T) {
		url := pgtest.EmptySchema(t) + "&synchronous_commit=off"
		if in, err := Open(t.Context(), url, 0); err == nil {
			in.Close()
			t.Error("no error")
		}
	})
}
