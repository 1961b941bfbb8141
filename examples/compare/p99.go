package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"offloadhook"
)

type p99Sizes struct {
	rounds   int
	requests int // in a round with slow callbacks: less than the backlog
	sleep    time.Duration
	live     int // requests in a round beside slow clients
	slow     int // such clients
}

var fullP99 = p99Sizes{rounds: 15, requests: 1_000, sleep: 5 * time.Second, live: 20_000, slow: 500}

func (b *bench) p99Table() error {
	b.header("the slowest answers", "p99 without", "p99 with", "ratio")
	for _, inbox := range []bool{true, false} {
		name := "Memory"
		if inbox {
			name = "Journal"
		}
		var quick, slow []time.Duration
		for n := range b.p99.rounds {
			if err := b.begin("%s: round %d of %d", name, n+1, b.p99.rounds); err != nil {
				return err
			}
			for _, i := range turns(2, n) {
				took, err := b.answers(inbox, b.p99.requests, []time.Duration{0, b.p99.sleep}[i], 0)
				if err != nil {
					return err
				}
				if i == 0 {
					quick = append(quick, took)
				} else {
					slow = append(slow, took)
				}
			}
		}
		b.p99Row(fmt.Sprintf("%s, callbacks that sleep %v", name, b.p99.sleep), quick, slow)
		var alone, beside []time.Duration
		for n := range b.p99.rounds / 3 {
			if err := b.begin("%s, slow clients: round %d of %d", name, n+1, b.p99.rounds/3); err != nil {
				return err
			}
			for _, i := range turns(2, n) {
				took, err := b.answers(inbox, b.p99.live, 0, []int{0, b.p99.slow}[i])
				if err != nil {
					return err
				}
				if i == 0 {
					alone = append(alone, took)
				} else {
					beside = append(beside, took)
				}
			}
		}
		b.p99Row(fmt.Sprintf("%s, %d slow clients", name, b.p99.slow), alone, beside)
	}
	return nil
}

func (b *bench) p99Row(name string, without, with []time.Duration) {
	b.row(name, median(without).Round(10*time.Microsecond).String(), median(with).Round(10*time.Microsecond).String(),
		fmt.Sprintf("%.2f", medianRatio(with, without)))
}

// answers returns the p99 of the time to the answer, with callbacks that take sleep, beside slow clients.
func (b *bench) answers(inbox bool, requests int, sleep time.Duration, slow int) (p99 time.Duration, err error) {
	events, err := newEvents(requests, nil)
	if err != nil {
		return 0, err
	}
	t := newTally(requests)
	options := []offloadhook.Option{offloadhook.WithObserver(func(context.Context, offloadhook.Observation) {})}
	if inbox {
		journal, err := offloadhook.OpenJournal(b.folder(), 0)
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, journal.Close()) }()
		options = append(options, offloadhook.WithInbox(journal))
	}
	r := offloadhook.Handler(offloadhook.Callbacks{
		CaseCompleted: func(ctx context.Context, _ *offloadhook.Envelope, c *offloadhook.CaseCompleted) error {
			if sleep > 0 {
				select {
				case <-time.After(sleep):
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			t.handle(c)
			return nil
		},
	}, options...)
	defer func() {
		// The callbacks that sleep are not waited for: the answers are out.
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		if sleep > 0 {
			cancel()
		}
		defer cancel()
		if ended := r.Shutdown(ctx); sleep == 0 {
			err = errors.Join(err, ended)
		}
	}()
	l, err := newLoopback(r, b.clients)
	if err != nil {
		return 0, err
	}
	defer l.close()
	var trickling sync.WaitGroup
	stop := make(chan struct{})
	failed := make([]error, slow)
	for i := range slow {
		trickling.Go(func() {
			for ended := false; !ended && failed[i] == nil; {
				failed[i] = trickle(l.addr, stop)
				select {
				case <-stop:
					ended = true
				default:
				}
			}
		})
	}
	if slow > 0 {
		time.Sleep(time.Second) // they do not arrive together in the middle of the traffic
	}
	took := make([][]time.Duration, b.clients)
	err = sendAll(events, b.clients, func(client int, e *event) error {
		start := time.Now()
		err := l.send(client, e)
		took[client] = append(took[client], time.Since(start))
		return err
	})
	close(stop)
	trickling.Wait()
	if err == nil && sleep == 0 {
		err = t.wait()
	}
	all := slices.Sorted(slices.Values(slices.Concat(took...)))
	return all[len(all)*99/100], errors.Join(append(failed, err)...)
}
