// Package pginbox is an offloadhook.Inbox on PostgreSQL that several replicas share.
//
// Each open Inbox is an owner. It shows that it lives by a session that holds an advisory lock: when its process dies,
// or stands still for 10 s, the connection breaks, the lock is free, and another owner takes over its events. A slow
// owner keeps the lock, and its events, however long its callbacks take. A lock that is free is not taken for a death
// at once, but after six looks, a second apart, because a restart of the database frees all of them: meanwhile the
// living take theirs again.
//
// The events of a case that has unfinished ones go to the owner of those, whichever replica received them, so that they
// run in order; that is why Claim may answer "not fresh", and the sender get a 200, for an event that is new. Forward
// brings it to the receiver that it belongs to.
package pginbox

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"offloadhook"
)

const (
	forwardEvery = 200 * time.Millisecond // between looks for events that other replicas have received for this one
	giveWay      = time.Second            // of forwarding, after which it lets a reading go first
	pingEvery    = 100 * time.Millisecond // between signs that the session lives, and attempts at another
	tidyEvery    = time.Second            // between looks for dead owners and expired rows
	deathLooks   = 6                      // that find an owner's lock free, one after the other, for it to be dead
	timeout      = 5 * time.Second        // for a statement
	longTimeout  = 15 * time.Second       // for one that may change many rows
	pageSize     = 64                     // events read at once
	pageBytes    = 1 << 20                // of their bodies, but for the last
	lockTimeout  = "55P03"                // PostgreSQL's name for a lock that did not come in time
)

// The first halves of the keys of advisory locks, chosen so as not to meet those of other programs. An owner's lock has
// the table's oid there, and the owner as its second half, because owners are numbered by table.
const (
	caseLocks  = 0x6f66_666c // second half: a hash of the case. One claim at a time decides who owns it
	claimsLock = 0x6f66_666d // second half: 0. Shared by claims, exclusive for giving events another owner
)

// lockOf finds the rows of pg_locks for the locks of owners. $1 is the table.
const lockOf = `granted AND locktype = 'advisory' AND classid = $1 AND objsubid = 2
	AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`

// mine finds this owner's event of an id. With owner = $2 the planner could take the index by owner, and read all that the
// owner has not finished.
const mine = `event_id = $1 AND coalesce(owner, 0) = $2`

const (
	setDone   = `UPDATE offload_events SET owner = NULL, done_at = now(), body = NULL WHERE ` + mine
	setGaveUp = `UPDATE offload_events SET owner = NULL, gave_up_at = now() WHERE ` + mine
	setHanded = `UPDATE offload_events SET handed = true WHERE owner = $1 AND seq = ANY($2) AND seq BETWEEN $3 AND $4`
)

// These too are worded so that the planner reads no more than it has to: max(seq), or an OR, could make it read all.
const (
	newest = `SELECT coalesce((SELECT seq FROM offload_events WHERE owner = $1 ORDER BY seq DESC LIMIT 1), 0)`
	// $1 says that all of it has rested.
	rested = `SELECT event_id FROM offload_events WHERE gave_up_at <=
		CASE WHEN $1 THEN 'infinity' ELSE now() - interval '10 minutes' END ORDER BY gave_up_at LIMIT `
	expired = `SELECT event_id FROM offload_events WHERE done_at < now() - make_interval(secs => $1)
		ORDER BY done_at LIMIT 1000 FOR UPDATE SKIP LOCKED`
	// owners goes from each to the next, not through all that they have.
	owners = `WITH RECURSIVE owners AS (
			(SELECT owner FROM offload_events WHERE owner IS NOT NULL ORDER BY owner LIMIT 1)
			UNION ALL
			SELECT next.owner FROM owners AS o, LATERAL (
				SELECT owner FROM offload_events WHERE owner > o.owner ORDER BY owner LIMIT 1) AS next)
		SELECT owner FROM owners`
)

// pageOf reads the first of an owner's events for which a condition is true.
var pageOf = fmt.Sprintf(`SELECT seq, event_id, case_id, handed, body FROM (
		SELECT *, sum(octet_length(body)) OVER (ORDER BY seq) - octet_length(body) AS before FROM (
			SELECT * FROM offload_events WHERE owner = $1 AND %%s ORDER BY seq LIMIT %d) AS e) AS e
	WHERE before < %d ORDER BY seq`, pageSize, pageBytes)

const (
	// setClaimed gives an event the owner of its case.
	setClaimed = `
		INSERT INTO offload_events AS e (event_id, case_id, body, owner, handed)
		SELECT $1, $2, $3, coalesce(c.owner, $4), coalesce(c.owner = $4 AND c.handed, true)
		FROM (SELECT max(owner) AS owner, bool_and(handed) AS handed
			FROM offload_events WHERE case_id = $2 AND owner IS NOT NULL) AS c
		ON CONFLICT (event_id) DO UPDATE
			SET case_id = excluded.case_id, body = excluded.body, owner = excluded.owner, handed = excluded.handed,
				seq = DEFAULT, claimed_at = now(), gave_up_at = NULL
			WHERE e.gave_up_at IS NOT NULL
		RETURNING handed`
	// setTaken moves some events, and all the others of their cases. Where it had to wait for a row that somebody else
	// was changing, PostgreSQL checks the conditions again; if these joined anything, it would leave the row out.
	setTaken = `
		UPDATE offload_events SET owner = $3, handed = false
		WHERE (SELECT pg_try_advisory_xact_lock($1, $2)) AND coalesce(owner, 0) = $2 AND event_id = ANY(ARRAY(
			WITH oldest AS MATERIALIZED (SELECT event_id, case_id FROM offload_events WHERE owner = $2 ORDER BY seq LIMIT 500)
			SELECT event_id FROM oldest UNION ALL
			SELECT e.event_id FROM (SELECT DISTINCT case_id FROM oldest) AS c, LATERAL (
				SELECT event_id FROM offload_events WHERE case_id = c.case_id AND owner IS NOT NULL OFFSET 0) AS e))`
)

//go:embed schema.sql
var schema string

// Inbox is an offloadhook.Inbox. Open makes it. Its methods are safe for concurrent use.
type Inbox struct {
	pool      *pgxpool.Pool
	table     uint32 // its oid
	owner     int32
	retention time.Duration
	tidyEvery time.Duration
	stop      context.CancelFunc
	running   sync.WaitGroup // what stop ends

	handing sync.Mutex // held by Pending, and while events are forwarded, so that one follows the other

	mu      sync.Mutex    // protects what follows
	alive   chan struct{} // closed while the lock is held
	failed  error         // why it is not
	deliver deliverFunc
	called  bool // Pending has brought back what was given up
}

// deliverFunc is the type of (*offloadhook.Receiver).Deliver.
type deliverFunc = func(ctx context.Context, body []byte) (fresh bool, err error)

var _ offloadhook.Inbox = (*Inbox)(nil)

// Open connects to the database at url, creates the table where it is missing, in the first schema of the search_path,
// and returns a new owner. Rows of events that are done are deleted after retention; 0 means 30 days. It refuses a
// database that would acknowledge what it can lose. Close the Inbox after the receiver's Shutdown.
func Open(ctx context.Context, url string, retention time.Duration) (*Inbox, error) {
	return open(ctx, url, retention, tidyEvery)
}

func open(ctx context.Context, url string, retention, tidyEvery time.Duration) (*Inbox, error) {
	if retention <= 0 {
		retention = 30 * 24 * time.Hour
	}
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, errors.New("pginbox: cannot use the URL; want one like postgres://user:password@host/db") // err may quote a password
	}
	// Where the first of several hosts has vanished, a session has to come to the next one within its time.
	config.ConnConfig.ConnectTimeout = cmp.Or(config.ConnConfig.ConnectTimeout, timeout/2)
	// A claim has to see what those committed for whose lock it waited.
	params := config.ConnConfig.RuntimeParams
	params["default_transaction_isolation"] = "read committed"
	// A plan that was made while the table was small stays until it is analyzed, which may be long after.
	params["enable_seqscan"] = "off"
	// A machine that vanishes does not close its connections: the server finds that out within 20 s.
	params["tcp_keepalives_idle"] = "5"
	params["tcp_keepalives_interval"] = "5"
	params["tcp_keepalives_count"] = "3"
	params["tcp_user_timeout"] = "20000" // there are no keepalives while an answer is unacknowledged
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("pginbox: %w", err)
	}
	in := &Inbox{
		pool:      pool,
		retention: retention,
		tidyEvery: tidyEvery,
		alive:     make(chan struct{}),
	}
	if err := in.prepare(ctx); err != nil {
		pool.Close()
		return nil, fmt.Errorf("pginbox: %w", err)
	}
	life, stop := context.WithCancel(context.Background())
	in.stop = stop
	in.running.Go(func() { in.live(life) })
	in.running.Go(func() { in.forward(life) })
	if err := in.living(ctx); err != nil {
		in.Close()
		return nil, err
	}
	return in, nil
}

func (in *Inbox) prepare(ctx context.Context) error {
	var encoding, fsync, commit string
	err := in.pool.QueryRow(ctx, `SELECT current_setting('server_encoding'), current_setting('fsync'),
		current_setting('synchronous_commit')`).Scan(&encoding, &fsync, &commit)
	switch {
	case err != nil:
		return err
	case encoding != "UTF8":
		return fmt.Errorf("the database's encoding is %s, which cannot hold every event_id: want UTF8", encoding)
	case fsync == "off" || commit == "off":
		return fmt.Errorf("fsync is %s, synchronous_commit %s: the database would lose what it acknowledged", fsync, commit)
	}
	// To create what is there would wait for a VACUUM, and all claims for that.
	var there bool
	err = in.pool.QueryRow(ctx, `SELECT to_regclass(quote_ident(current_schema()) || '.offload_owners') IS NOT NULL`).Scan(&there)
	if err == nil && !there { // replicas that start at once must not create the table at once
		_, err = in.pool.Exec(ctx, fmt.Sprintf("SELECT pg_advisory_xact_lock(%d, 1); %s", claimsLock, schema))
	}
	if err != nil {
		return err
	}
	return in.pool.QueryRow(ctx, `SELECT 'offload_events'::regclass::oid, nextval('offload_owners')`).Scan(
		&in.table, &in.owner)
}

// Close ends the owner. What it has not finished, others take over, or the next one that opens.
func (in *Inbox) Close() error {
	in.stop()
	in.running.Wait()
	in.pool.Close()
	return nil
}

// Forward sets what takes the events that other replicas have received for this one: the Deliver of the receiver that
// uses the Inbox. Without it, they wait for the next reading of Pending, as do those of dead owners. One that comes while
// the receiver shuts down is observed as Refused there, and goes to another replica.
func (in *Inbox) Forward(deliver deliverFunc) {
	in.mu.Lock()
	in.deliver = deliver
	in.mu.Unlock()
}

// Ready returns nil when the Inbox can take events, an error when ctx ends before that.
func (in *Inbox) Ready(ctx context.Context) error { return in.living(ctx) }

// forwarded marks the context of what Forward delivers, with a mark as its value.
type forwarded struct{ in *Inbox }

// mark is for the first claim of an event: its callback has that context, too, and so has who is told that it was given
// up, and may deliver other events with it, or the same again.
type mark struct {
	id   string
	used atomic.Bool
}

// Claim stores the event, and reports whether it is new and this owner's to handle now.
func (in *Inbox) Claim(ctx context.Context, env *offloadhook.Envelope) (fresh bool, err error) {
	if err := in.living(ctx); err != nil {
		return false, err
	}
	if m, _ := ctx.Value(forwarded{in}).(*mark); m != nil && m.id == env.EventID && m.used.CompareAndSwap(false, true) {
		err := in.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM offload_events WHERE `+mine+`)`,
			env.EventID, in.owner).Scan(&fresh)
		return fresh, err
	}
	for {
		if fresh, err = in.store(ctx, env); !away(err) {
			return fresh, err
		}
		select { // a session that broke with the connection is noticed by then
		case <-ctx.Done():
			return false, err
		case <-time.After(pingEvery):
		}
		if err := in.living(ctx); err != nil {
			return false, err
		}
	}
}

// away reports whether err says that the database took no part in a statement: it shut down, or was not there. An event
// that is refused is lost, so a claim rides that out.
func away(err error) bool {
	var failed *pgconn.PgError
	var unconnected *pgconn.ConnectError
	return errors.As(err, &unconnected) || errors.As(err, &failed) && strings.HasPrefix(failed.Code, "57P")
}

// store is a claim that is tried once.
func (in *Inbox) store(ctx context.Context, env *offloadhook.Envelope) (fresh bool, err error) {
	caseID := caseOf(env)
	alike := env.EventID
	if caseID != nil {
		alike = *caseID
	}
	// A batch is one round trip and one transaction. The locks are a statement of their own because a statement sees the
	// rows that had been there when it began.
	var batch pgx.Batch
	batch.Queue(`SELECT pg_advisory_xact_lock_shared($1, 0), pg_advisory_xact_lock($2, hashtext($3))`,
		claimsLock, caseLocks, alike)
	batch.Queue(setClaimed, env.EventID, caseID, env.Raw, in.owner).QueryRow(func(row pgx.Row) error {
		if err := row.Scan(&fresh); !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
		return nil
	})
	if err := in.pool.SendBatch(ctx, &batch).Close(); err != nil {
		return false, err
	}
	return fresh, nil
}

// caseOf returns the caseId of an event as a text that PostgreSQL can hold, nil where there is none.
func caseOf(env *offloadhook.Envelope) *string {
	var data map[string]json.RawMessage // the names of a struct would match in any letter case
	var id string
	_ = json.Unmarshal(env.Data, &data)
	if _ = json.Unmarshal(data["caseId"], &id); id == "" {
		return nil
	}
	id = strings.ReplaceAll(id, "\x00", "\ufffd")
	return &id
}

// Done records the end of an event, if it is still this owner's.
func (in *Inbox) Done(ctx context.Context, env *offloadhook.Envelope, result error) error {
	end := setDone
	if result != nil {
		end = setGaveUp
	}
	_, err := in.pool.Exec(ctx, end, env.EventID, in.owner)
	return err
}

// Pending yields this owner's events; those of the dead become its own every second. Where Forward is in use, it leaves
// out what that has yet to deliver, and forwarding waits for its end; so do not call Close within it.
func (in *Inbox) Pending(ctx context.Context) iter.Seq2[*offloadhook.Envelope, error] {
	return func(yield func(*offloadhook.Envelope, error) bool) {
		if err := in.living(ctx); err != nil {
			yield(nil, err)
			return
		}
		if err := in.revive(ctx); err != nil {
			yield(nil, err)
			return
		}
		in.handing.Lock() // for all pages: a later event of a case may be on a later one
		defer in.handing.Unlock()
		// The bound makes it a snapshot; pages, because it may be left early, with megabytes to come.
		var last, end int64
		if err := in.pool.QueryRow(ctx, newest, in.owner).Scan(&end); err != nil {
			yield(nil, err)
			return
		}
		for last < end {
			page, err := in.page(ctx, last, end)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, e := range page {
				if env, err := offloadhook.ParseEnvelope(e.body); !yield(env, err) {
					return
				}
				last = e.seq
			}
			if len(page) == 0 {
				return
			}
		}
	}
}

type event struct {
	seq    int64
	id     string
	caseID *string
	handed bool
	body   []byte
}

func (in *Inbox) page(ctx context.Context, last, end int64) ([]event, error) {
	in.mu.Lock()
	all := in.deliver == nil
	in.mu.Unlock()
	page, err := in.read(ctx, `seq > $2 AND seq <= $3 AND (handed OR $4)`, last, end, all)
	if err != nil {
		return nil, err
	}
	var fresh []int64
	for _, e := range page {
		if !e.handed {
			fresh = append(fresh, e.seq)
		}
	}
	return page, in.markHanded(ctx, fresh)
}

// read reads the first of this owner's events for which the condition is true: up to pageBytes, but at least one.
func (in *Inbox) read(ctx context.Context, condition string, args ...any) ([]event, error) {
	rows, _ := in.pool.Query(ctx, fmt.Sprintf(pageOf, condition), append([]any{in.owner}, args...)...)
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (e event, err error) {
		err = row.Scan(&e.seq, &e.id, &e.caseID, &e.handed, &e.body)
		return e, err
	})
}

// revive gives what was given up, and has rested, to the owner of its case, or to this one. All of it has rested when
// an owner asks for the first time.
func (in *Inbox) revive(ctx context.Context) error {
	in.mu.Lock()
	first := !in.called
	in.mu.Unlock()
	for {
		var some bool
		err := in.pool.QueryRow(ctx, `SELECT (`+rested+`1) IS NOT NULL`, first).Scan(&some)
		if err != nil {
			return err
		}
		if !some {
			in.mu.Lock()
			in.called = true
			in.mu.Unlock()
			return nil
		}
		batch := claimsStop()
		batch.Queue(`UPDATE offload_events AS e SET gave_up_at = NULL, handed = false, seq = DEFAULT, owner = coalesce((
			SELECT max(o.owner) FROM offload_events AS o WHERE o.case_id = e.case_id AND o.owner IS NOT NULL), $2)
			WHERE event_id IN (`+rested+`200)`, first, in.owner)
		if err := in.pool.SendBatch(ctx, batch).Close(); stuck(err) {
			return nil // this owner's own events need not wait for that
		} else if err != nil {
			return err
		}
	}
}

// claimsStop begins a transaction during which no owner claims. Where a claim does not end it fails, since all others
// wait meanwhile, and stuck is true of the error.
func claimsStop() *pgx.Batch {
	batch := new(pgx.Batch)
	batch.Queue(`SELECT set_config('lock_timeout', '1s', true)`)
	batch.Queue(`SELECT pg_advisory_xact_lock($1, 0)`, claimsLock)
	return batch
}

func stuck(err error) bool {
	var failed *pgconn.PgError
	return errors.As(err, &failed) && failed.Code == lockTimeout
}

// living waits until the lock is held: what this owner claimed without it would be taken for a dead one's.
func (in *Inbox) living(ctx context.Context) error {
	in.mu.Lock()
	alive := in.alive
	in.mu.Unlock()
	select {
	case <-alive:
		return nil
	default:
	}
	select {
	case <-alive:
		return nil
	case <-ctx.Done():
		in.mu.Lock()
		defer in.mu.Unlock()
		return fmt.Errorf("pginbox: no session with the database: %w", errors.Join(ctx.Err(), in.failed))
	}
}

// live holds the lock until ctx ends.
func (in *Inbox) live(ctx context.Context) {
	for ctx.Err() == nil {
		err := in.session(ctx)
		in.mu.Lock()
		in.failed = err
		select {
		case <-in.alive:
			in.alive = make(chan struct{})
		default:
		}
		in.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(pingEvery):
		}
	}
}

// session connects, takes the lock, and looks after the table, until one of these fails. Nothing here waits for the
// pool or the receiver: a session that breaks has to be followed by another before the owner is taken for dead.
func (in *Inbox) session(ctx context.Context) error {
	within, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(within, in.pool.Config().ConnConfig)
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(closing)
	}()
	// Whoever holds the lock is an earlier session that broke without the server's notice, or an heir in the act.
	_, err = conn.Exec(within, `SELECT pg_terminate_backend(pid) FROM pg_locks WHERE objid = $2 AND `+lockOf,
		in.table, in.owner)
	if err != nil {
		return err
	}
	// A process that stands still keeps its connection, and so its lock. PostgreSQL before 14 has no such setting, which
	// is no reason to fail.
	_, _ = conn.Exec(within, `SET idle_session_timeout = '10s'`)
	if _, err := conn.Exec(within, `SELECT pg_advisory_lock($1, $2)`, int32(in.table), in.owner); err != nil {
		return err
	}
	in.pool.Reset() // what broke this session may have broken others
	in.mu.Lock()
	close(in.alive)
	in.mu.Unlock()

	free := make(map[int32]int)
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	var tidied time.Time
	for {
		if time.Since(tidied) >= in.tidyEvery {
			tidied = time.Now()
			err = in.tidy(ctx, conn, free)
		} else {
			err = ping(ctx, conn)
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// ping notices that the session is lost.
func ping(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return conn.Ping(ctx)
}

// tidy deletes rows that have been done for as long as the retention, and takes over from owners that were found dead
// deathLooks times in a row, as free counts them. Before the server does, it has to notice that the session is lost.
func (in *Inbox) tidy(ctx context.Context, conn *pgx.Conn, free map[int32]int) error {
	within, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := conn.Exec(within, `DELETE FROM offload_events WHERE event_id IN (`+expired+`)`, in.retention.Seconds())
	if err != nil {
		return err
	}
	rows, _ := conn.Query(within, owners+` WHERE owner NOT IN (SELECT objid::bigint FROM pg_locks WHERE `+lockOf+`)`, in.table)
	dead, err := pgx.CollectRows(rows, pgx.RowTo[int32])
	if err != nil {
		return err
	}
	maps.DeleteFunc(free, func(owner int32, _ int) bool { return !slices.Contains(dead, owner) })
	for _, owner := range dead {
		if free[owner]++; free[owner] < deathLooks {
			continue
		}
		if err := in.takeOver(ctx, conn, owner); err != nil && !stuck(err) {
			return err
		}
	}
	return nil
}

// takeOver gives the events of dead another owner, unless it lives after all: its lock is tried once more each time, and
// kept meanwhile. Claims go on between the steps, each of some events and all the others of their cases, so that none is
// split.
func (in *Inbox) takeOver(ctx context.Context, conn *pgx.Conn, dead int32) error {
	for {
		batch, more := claimsStop(), false
		batch.Queue(setTaken, int32(in.table), dead, in.owner).Exec(func(done pgconn.CommandTag) error {
			more = done.RowsAffected() > 0
			return nil
		})
		within, cancel := context.WithTimeout(ctx, longTimeout)
		err := conn.SendBatch(within, batch).Close()
		cancel()
		if err != nil || !more {
			return err
		}
	}
}

// forward delivers what other replicas have received for this one, and what the dead had not finished.
func (in *Inbox) forward(ctx context.Context) {
	tick := time.NewTicker(forwardEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		in.mu.Lock()
		deliver := in.deliver
		in.mu.Unlock()
		for more := deliver != nil; more; {
			more = in.hand(ctx, deliver)
		}
	}
}

// hand delivers the oldest events that are to be forwarded, a page of them, and reports whether to go on: not when one of
// them has to wait, or it took long. It never reads on behind a page. An event there could be of a case of which an
// earlier one, with a number within the page, has only just come: from a claim that was slow, or from a dead owner.
func (in *Inbox) hand(ctx context.Context, deliver deliverFunc) (more bool) {
	in.handing.Lock()
	defer in.handing.Unlock()
	within, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	page, err := in.read(within, `NOT handed`)
	if err != nil {
		return false // the next tick tries again
	}
	start := time.Now()
	var handed []int64
	held := make(map[string]bool) // cases that have to wait
	for _, e := range page {
		if e.caseID != nil && held[*e.caseID] {
			continue
		}
		if time.Since(start) > giveWay {
			break
		}
		fresh, err := deliver(context.WithValue(ctx, forwarded{in}, &mark{id: e.id}), e.body)
		if errors.Is(err, offloadhook.ErrClosed) {
			in.Forward(nil) // the receiver shuts down
		}
		damaged := errors.Is(err, offloadhook.ErrMalformed)
		if err != nil && !damaged {
			break
		}
		switch {
		case fresh || damaged: // which Pending reports
			handed = append(handed, e.seq)
		case e.caseID != nil: // another delivery of the same event is on its way
			held[*e.caseID] = true
		}
	}
	return in.markHanded(ctx, handed) == nil && len(handed) > 0 && len(handed) == len(page)
}

// markHanded marks events by their numbers, in ascending order, since a later claim of the same id has another one.
func (in *Inbox) markHanded(ctx context.Context, seqs []int64) error {
	if len(seqs) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := in.pool.Exec(ctx, setHanded, in.owner, seqs, seqs[0], seqs[len(seqs)-1])
	return err
}
