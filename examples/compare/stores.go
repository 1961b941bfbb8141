package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.etcd.io/bbolt"
	_ "modernc.org/sqlite"

	"offloadhook"
)

// store is a contestant: it keeps an event's id and body durably, and says whether it is new.
type store struct {
	name  string
	lacks string // what it does not do
	open  func(dir string) (claim claimFunc, end func() error, err error)
}

type claimFunc func(ctx context.Context, env *offloadhook.Envelope) (fresh bool, err error)

const journalName = "Journal.Claim"

var stores = []store{
	{journalName, "one process at a time; no queries", openJournal},
	{"SQLite, WAL, synchronous=FULL", "share an fsync between claims", openSQLite},
	{"bbolt, Update", "share an fsync between claims; no second process", openBolt(false, 0)},
	{"bbolt, Batch", "answer at once: waits up to 10 ms for company; no second process", openBolt(true, 0)},
	{"bbolt, Batch, MaxBatchSize 64", "answer a single client at once; no second process", openBolt(true, 64)},
}

const postgresName = "PostgreSQL"

func openJournal(dir string) (claimFunc, func() error, error) {
	journal, err := offloadhook.OpenJournal(dir, 0)
	if err != nil {
		return nil, nil, err
	}
	return journal.Claim, journal.Close, nil
}

// openSQLite uses one connection: SQLite has one writer at a time, and several would wait for each other in a loop.
func openSQLite(dir string) (claimFunc, func() error, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, nil, err
	}
	db, err := sql.Open("sqlite", "file:"+filepath.ToSlash(filepath.Join(dir, "events.db"))+
		"?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)")
	if err != nil {
		return nil, nil, err
	}
	db.SetMaxOpenConns(1)
	_, err = db.Exec("CREATE TABLE IF NOT EXISTS events (id TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID")
	if err != nil {
		return nil, nil, errors.Join(err, db.Close())
	}
	insert, err := db.Prepare("INSERT INTO events (id, body) VALUES (?, ?) ON CONFLICT DO NOTHING")
	if err != nil {
		return nil, nil, errors.Join(err, db.Close())
	}
	claim := func(ctx context.Context, env *offloadhook.Envelope) (bool, error) {
		result, err := insert.ExecContext(ctx, env.EventID, env.Raw)
		if err != nil {
			return false, err
		}
		n, err := result.RowsAffected()
		return n == 1, err
	}
	return claim, func() error { return errors.Join(insert.Close(), db.Close()) }, nil
}

// openBolt opens a bbolt database. A batch ends when it has size claims, 0 being the default of 1,000, or 10 ms after its
// first.
func openBolt(batch bool, size int) func(dir string) (claimFunc, func() error, error) {
	return func(dir string) (claimFunc, func() error, error) {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, nil, err
		}
		db, err := bbolt.Open(filepath.Join(dir, "events.db"), 0o600, nil)
		if err != nil {
			return nil, nil, err
		}
		if size > 0 {
			db.MaxBatchSize = size
		}
		bucket := []byte("events")
		err = db.Update(func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucketIfNotExists(bucket)
			return err
		})
		if err != nil {
			return nil, nil, errors.Join(err, db.Close())
		}
		write := db.Update
		if batch {
			write = db.Batch
		}
		claim := func(_ context.Context, env *offloadhook.Envelope) (fresh bool, err error) {
			id := []byte(env.EventID)
			err = write(func(tx *bbolt.Tx) error {
				events := tx.Bucket(bucket)
				if fresh = events.Get(id) == nil; !fresh {
					return nil
				}
				return events.Put(id, env.Raw)
			})
			return fresh && err == nil, err
		}
		return claim, db.Close, nil
	}
}

// openPostgres makes a table of its own in a running server.
func openPostgres(server *postgres, clients int) func(dir string) (claimFunc, func() error, error) {
	return func(dir string) (claimFunc, func() error, error) {
		ctx := context.Background()
		config, err := pgxpool.ParseConfig(server.url)
		if err != nil {
			return nil, nil, err
		}
		config.MaxConns = int32(clients)
		pool, err := pgxpool.NewWithConfig(ctx, config)
		if err != nil {
			return nil, nil, err
		}
		table := "events_" + filepath.Base(dir)
		if _, err := pool.Exec(ctx, "CREATE TABLE "+table+" (id text PRIMARY KEY, body bytea NOT NULL)"); err != nil {
			pool.Close()
			return nil, nil, err
		}
		insert := "INSERT INTO " + table + " (id, body) VALUES ($1, $2) ON CONFLICT DO NOTHING"
		claim := func(ctx context.Context, env *offloadhook.Envelope) (bool, error) {
			tag, err := pool.Exec(ctx, insert, env.EventID, env.Raw)
			return tag.RowsAffected() == 1, err
		}
		end := func() error {
			_, err := pool.Exec(ctx, "DROP TABLE "+table)
			pool.Close()
			return err
		}
		return claim, end, nil
	}
}

// envelopes makes n events, from number first on.
func envelopes(first, n int) ([]*offloadhook.Envelope, error) {
	body, err := bodies()
	if err != nil {
		return nil, err
	}
	envs := make([]*offloadhook.Envelope, n)
	for i := range envs {
		if envs[i], err = offloadhook.ParseEnvelope(body(first + i)); err != nil {
			return nil, err
		}
	}
	return envs, nil
}

// claimAll claims events, clients at once, until the time is over, and returns how many.
func claimAll(
	claim claimFunc, envs []*offloadhook.Envelope, clients int, limit time.Duration, fresh bool,
) (int, error) {
	ctx, start := context.Background(), time.Now()
	var next atomic.Int64
	var claiming sync.WaitGroup
	failed, claimed := make([]error, clients), make([]int, clients)
	for client := range clients {
		claiming.Go(func() {
			for failed[client] == nil && time.Since(start) < limit {
				i := next.Add(1) - 1
				if i >= int64(len(envs)) {
					return
				}
				got, err := claim(ctx, envs[i])
				if err == nil && got != fresh {
					err = fmt.Errorf("claim of %s: fresh is %v", envs[i].EventID, got)
				}
				failed[client] = err
				claimed[client]++
			}
		})
	}
	claiming.Wait()
	n := 0
	for _, some := range claimed {
		n += some
	}
	return n, errors.Join(failed...)
}

// runStore claims envs for a while and returns how many a second. Each must be new, and known from then on. The claims
// of warm come first, to open connections and files.
func (b *bench) runStore(c store, warm, envs []*offloadhook.Envelope) (perSecond float64, err error) {
	claim, end, err := c.open(b.folder())
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, end()) }()
	if _, err := claimAll(claim, warm, b.clients, time.Minute, true); err != nil {
		return 0, err
	}
	runtime.GC()
	start := time.Now()
	n, err := claimAll(claim, envs, b.clients, b.claiming, true)
	perSecond = float64(n) / time.Since(start).Seconds()
	if err != nil {
		return 0, err
	}
	_, err = claimAll(claim, append(warm, envs[:min(n, b.clients)]...), b.clients, time.Minute, false)
	return perSecond, err
}

// storeResult is what a store did in all rounds.
type storeResult struct {
	store
	claims []float64 // a second
}

func (b *bench) compareStores() ([]storeResult, error) {
	contestants := append([]store(nil), stores...)
	server, err := startPostgres()
	switch {
	case errors.Is(err, errNoPostgres):
		if err := b.begin("%s is left out: %v", postgresName, err); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	default:
		defer server.stop()
		name := postgresName + " " + server.version
		lacks := "come without a server; but replicas can share it"
		contestants = append(contestants, store{name, lacks, openPostgres(server, b.clients)})
	}
	envs, err := envelopes(0, b.clients+b.claims)
	if err != nil {
		return nil, err
	}
	warm, envs := envs[:b.clients:b.clients], envs[b.clients:]
	results := make([]storeResult, len(contestants))
	for n := range b.rounds {
		if err := b.begin("stores: round %d of %d", n+1, b.rounds); err != nil {
			return nil, err
		}
		for _, i := range turns(len(contestants), n) {
			perSecond, err := b.runStore(contestants[i], warm, envs)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", contestants[i].name, err)
			}
			results[i].store = contestants[i]
			results[i].claims = append(results[i].claims, perSecond)
		}
	}
	return results, nil
}

func (b *bench) printStores(results []storeResult) {
	fmt.Fprintf(b.out, "Durable claims of an id with its body, %d at once: the median of %d rounds of %v.\n\n",
		b.clients, b.rounds, b.claiming)
	b.header("store", "claims/s", "Journal does", "does not ")
	for _, r := range results {
		times := fmt.Sprintf("%.1f times", medianRatio(results[0].claims, r.claims))
		b.row(r.name, thousands(median(r.claims)), times, r.lacks)
	}
}
