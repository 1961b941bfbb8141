package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"offloadhook"
)

type scaleSizes struct {
	rounds  int
	ids     []int // remembered
	claims  int   // in a round of Memory
	durable int   // in a round of a Journal
	events  []int // that wait
	flow    int   // events that are handled beside them
}

var fullScale = scaleSizes{
	rounds: 5, ids: []int{1_000, 100_000, 1_000_000, 10_000_000}, claims: 50_000, durable: 4_000,
	events: []int{1, 1_000, 100_000}, flow: 20_000,
}

func (b *bench) scaleTables() error {
	idle := gcTime()
	memory, err := b.scaleMemory()
	if err != nil {
		return err
	}
	journal, err := b.scaleJournal()
	if err != nil {
		return err
	}
	last := len(b.scale.ids) - 1
	fmt.Fprintf(b.out, "Claim and Done of an event, for Memory one after the other, for Journal %d at once, "+
		"as a multiple of what it takes with %s remembered ids: the median of %d rounds.\n\n",
		b.clients, thousands(float64(b.scale.ids[0])), b.scale.rounds)
	b.header("remembered ids", "Memory", "ratio", "bytes an id", "Journal", "ratio", "bytes an id")
	for i, ids := range b.scale.ids {
		m, j := memory[i], journal[i]
		b.row(thousands(float64(ids)),
			median(m.took).String(), fmt.Sprintf("%.2f", medianRatio(m.took, memory[0].took)),
			fmt.Sprintf("%.0f", m.bytes),
			median(j.took).String(), fmt.Sprintf("%.2f", medianRatio(j.took, journal[0].took)),
			fmt.Sprintf("%.0f", j.bytes))
	}
	fmt.Fprintln(b.out)
	b.header("a forced garbage collection", "time", "the world stopped for")
	b.row("without ids", idle.whole.String(), idle.pause.String())
	many := thousands(float64(b.scale.ids[last]))
	b.row(many+" ids in Memory", memory[last].gc.whole.String(), memory[last].gc.pause.String())
	b.row(many+" ids in a Journal", journal[last].gc.whole.String(), journal[last].gc.pause.String())
	fmt.Fprintf(b.out, "\nTime for an event, accepted and handled, as a multiple of the first.\n\n")
	return b.scaleEvents()
}

// scaled is what a store took with a number of ids.
type scaled struct {
	took  []time.Duration // for a claim and its end
	bytes float64         // for each remembered id
	gc    collection
}

// collection is the median of forced garbage collections.
type collection struct{ whole, pause time.Duration }

func gcTime() collection {
	var whole, pause []time.Duration
	var stats runtime.MemStats
	for range 15 {
		start := time.Now()
		runtime.GC()
		whole = append(whole, time.Since(start))
		runtime.ReadMemStats(&stats)
		pause = append(pause, time.Duration(stats.PauseNs[(stats.NumGC+255)%256]))
	}
	return collection{median(whole).Round(time.Microsecond), median(pause).Round(time.Microsecond)}
}

func heap() float64 {
	var stats runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&stats)
	return float64(stats.HeapAlloc)
}

// scaleMemory gives each Memory a limit, so that the number of its ids stays what it is.
func (b *bench) scaleMemory() ([]scaled, error) {
	ctx := context.Background()
	results, stores := make([]scaled, len(b.scale.ids)), make([]*offloadhook.Memory, len(b.scale.ids))
	claim := func(m *offloadhook.Memory, id string) error {
		env := offloadhook.Envelope{EventID: id}
		fresh, err := m.Claim(ctx, &env)
		if err == nil && !fresh {
			err = fmt.Errorf("%s is not new", env.EventID)
		}
		return errors.Join(err, m.Done(ctx, &env, nil))
	}
	for i, ids := range b.scale.ids {
		if err := b.begin("Memory: %s ids", thousands(float64(ids))); err != nil {
			return nil, err
		}
		before := heap()
		stores[i] = &offloadhook.Memory{Limit: ids}
		for n := range ids {
			if err := claim(stores[i], eventID(n)); err != nil {
				return nil, err
			}
		}
		results[i].bytes = (heap() - before) / float64(ids)
	}
	for round := range b.scale.rounds {
		for _, i := range turns(len(stores), round) {
			ids := make([]string, b.scale.claims)
			for n := range ids {
				ids[n] = eventID(b.scale.ids[i] + round*len(ids) + n)
			}
			runtime.GC()
			start := time.Now()
			for _, id := range ids {
				if err := claim(stores[i], id); err != nil {
					return nil, err
				}
			}
			results[i].took = append(results[i].took, time.Since(start)/time.Duration(b.scale.claims))
		}
	}
	last := len(stores) - 1
	clear(stores[:last])
	results[last].gc = gcTime()
	runtime.KeepAlive(stores[last])
	return results, nil
}

// scaleJournal opens small journals anew in each round, so that the number of their ids stays about what it is.
func (b *bench) scaleJournal() (results []scaled, err error) {
	results = make([]scaled, len(b.scale.ids))
	journals, dirs := make([]*offloadhook.Journal, len(b.scale.ids)), make([]string, len(b.scale.ids))
	defer func() {
		for _, journal := range journals {
			if journal != nil {
				err = errors.Join(err, journal.Close())
			}
		}
	}()
	for i, ids := range b.scale.ids {
		if err := b.begin("Journal: %s ids", thousands(float64(ids))); err != nil {
			return nil, err
		}
		dirs[i] = b.folder()
		if err := writeJournal(dirs[i], ids, 0); err != nil {
			return nil, err
		}
		before := heap()
		if journals[i], err = offloadhook.OpenJournal(dirs[i], 0); err != nil {
			return nil, err
		}
		results[i].bytes = (heap() - before) / float64(ids)
	}
	for round := range b.scale.rounds {
		if err := b.begin("Journal: round %d of %d", round+1, b.scale.rounds); err != nil {
			return nil, err
		}
		for _, i := range turns(len(journals), round) {
			if b.scale.ids[i] <= 100*b.scale.durable && round > 0 {
				if err := journals[i].Close(); err != nil {
					return nil, err
				}
				dir := b.folder()
				if err := writeJournal(dir, b.scale.ids[i], 0); err != nil {
					return nil, err
				}
				if journals[i], err = offloadhook.OpenJournal(dir, 0); err != nil {
					return nil, err
				}
			}
			took, err := b.claimAndFinish(journals[i], b.scale.ids[i]+round*b.scale.durable)
			if err != nil {
				return nil, err
			}
			results[i].took = append(results[i].took, took)
		}
	}
	last := len(journals) - 1
	for i := range last {
		err = errors.Join(err, journals[i].Close())
		journals[i] = nil
	}
	results[last].gc = gcTime()
	return results, err
}

// claimAndFinish claims events from number first on, clients at once, and returns what one took.
func (b *bench) claimAndFinish(journal *offloadhook.Journal, first int) (time.Duration, error) {
	envs, err := envelopes(first, b.scale.durable)
	if err != nil {
		return 0, err
	}
	claim := func(ctx context.Context, env *offloadhook.Envelope) (bool, error) {
		fresh, err := journal.Claim(ctx, env)
		return fresh, errors.Join(err, journal.Done(ctx, env, nil))
	}
	runtime.GC()
	start := time.Now()
	n, err := claimAll(claim, envs, b.clients, time.Minute, true)
	if err != nil {
		return 0, err
	}
	return time.Since(start) / time.Duration(n), nil
}

// scaleEvents measures a flow of events beside others that wait.
func (b *bench) scaleEvents() error {
	kinds := []struct {
		name    string
		measure func(n int) (time.Duration, error)
	}{
		{"events of one case wait", func(n int) (time.Duration, error) { return b.beside(n, 1) }},
		{"cases wait, an event each", func(n int) (time.Duration, error) { return b.beside(n, n) }},
		{"cases share the events", b.sharing},
	}
	b.header("how many", "time", "ratio")
	for _, kind := range kinds {
		took := make([][]time.Duration, len(b.scale.events))
		for round := range b.scale.rounds {
			if err := b.begin("%s: round %d of %d", kind.name, round+1, b.scale.rounds); err != nil {
				return err
			}
			for _, i := range turns(len(b.scale.events), round) {
				runtime.GC()
				one, err := kind.measure(b.scale.events[i])
				if err != nil {
					return err
				}
				took[i] = append(took[i], one)
			}
		}
		for i, n := range b.scale.events {
			b.row(thousands(float64(n))+" "+kind.name, median(took[i]).String(),
				fmt.Sprintf("%.2f", medianRatio(took[i], took[0])))
		}
	}
	return nil
}

// eventOf makes the nth event, of a case.
func eventOf(n, ofCase int) []byte {
	return fmt.Appendf(nil, `{"event_id":%q,"event_type":%q,"timestamp":1774131900000,`+
		`"data":{"caseId":%q,"result":{"n":%d}}}`, eventID(n), offloadhook.TypeCaseCompleted, numberedCase(ofCase), n)
}

var errLater = errors.New("later")

// beside returns what an event takes while others wait, of so many cases: the first of each case has failed, and rests
// for an hour before its next attempt.
func (b *bench) beside(waiting, cases int) (took time.Duration, err error) {
	var handled, failed sync.WaitGroup
	failed.Add(cases)
	handled.Add(b.scale.flow)
	r := offloadhook.Handler(offloadhook.Callbacks{
		CaseCompleted: func(_ context.Context, env *offloadhook.Envelope, c *offloadhook.CaseCompleted) error {
			if c.CaseID < numberedCase(cases) {
				failed.Done()
				return errLater
			}
			handled.Done()
			return nil
		},
	}, offloadhook.WithBacklog(2*(waiting+b.scale.flow)), offloadhook.WithRetry(2, time.Hour),
		offloadhook.WithObserver(silent))
	defer func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = r.Shutdown(ctx) // which does not wait for the hour
	}()
	ctx := context.Background()
	for n := range waiting {
		if _, err := r.Deliver(ctx, eventOf(n, n%cases)); err != nil {
			return 0, err
		}
	}
	failed.Wait()
	start := time.Now()
	for n := range b.scale.flow {
		if _, err := r.Deliver(ctx, eventOf(waiting+n, cases+n)); err != nil {
			return 0, err
		}
	}
	handled.Wait()
	return time.Since(start) / time.Duration(b.scale.flow), nil
}

// sharing returns what an event takes when all belong to so many cases.
func (b *bench) sharing(cases int) (took time.Duration, err error) {
	n := max(b.scale.flow, b.scale.events[len(b.scale.events)-1])
	r := offloadhook.Handler(offloadhook.Callbacks{
		CaseCompleted: func(context.Context, *offloadhook.Envelope, *offloadhook.CaseCompleted) error { return nil },
	}, offloadhook.WithBacklog(n), offloadhook.WithObserver(silent))
	ctx := context.Background()
	start := time.Now()
	for n := range n {
		if _, err := r.Deliver(ctx, eventOf(n, n%cases)); err != nil {
			return 0, err
		}
	}
	err = r.Shutdown(ctx) // which waits until all are handled
	return time.Since(start) / time.Duration(n), err
}

func silent(context.Context, offloadhook.Observation) {}
