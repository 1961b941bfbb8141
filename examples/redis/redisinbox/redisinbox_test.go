package redisinbox

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9/logging"

	"offloadhook"
	"offloadhook/examples/dedupetest"
	"offloadhook/examples/redis/internal/redistest"
)

// The environment variable that tells a replica where Redis is.
const urlEnv = "REDISINBOX_TEST_URL"

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
	logging.Disable() // of each server that is not there
	os.Exit(m.Run())
}

func TestContract(t *testing.T) {
	dedupetest.Run(t, func(t *testing.T) dedupetest.Store {
		s := redistest.New(t)
		return dedupetest.Store{
			Open: func() (offloadhook.Deduper, error) {
				return open(t.Context(), s.URL(), 0, soon, checkDurable)
			},
			Kill: func(d offloadhook.Deduper) error { d.(*Inbox).die(); return nil },
			Rest: func() error {
				client := s.Client()
				defer client.Close()
				ids, err := client.ZRange(t.Context(), prefix+"gave_up", 0, -1).Result()
				for _, id := range ids {
					err = errors.Join(err, client.ZIncrBy(t.Context(), prefix+"gave_up", -rest.Seconds()*1000, id).Err())
				}
				return err
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
	// One is killed -9 every three seconds, and Redis once.
	t.Run("kills", func(t *testing.T) {
		s := redistest.New(t)
		const rate, every = 300, 3
		kills := rounds(t, 5)
		report := dedupetest.Replicas{
			Env:        []string{urlEnv + "=" + s.URL()},
			Count:      3,
			Events:     max(5000, rate*every*(kills+1)),
			Rate:       rate,
			Duplicates: 0.2,
			Handling:   200 * time.Millisecond,
			KillEvery:  every * time.Second,
			Disturb:    func() error { s.Kill(); return s.Start() },
			Left:       func() (int, error) { return left(s) },
			Patience:   time.Minute,
		}.Run(t)
		if report.Kills < kills || report.Reruns == 0 {
			t.Errorf("%d kills and %d reruns: this has not tested what it should", report.Kills, report.Reruns)
		}
		checkAudit(t, s, report)
	})
	// One is told to end every two seconds: no callback runs twice, nor out of order.
	t.Run("deploys", func(t *testing.T) {
		s := redistest.New(t)
		report := dedupetest.Replicas{
			Env:        []string{urlEnv + "=" + s.URL()},
			Count:      3,
			Events:     3000,
			Rate:       300,
			Duplicates: 0.2,
			Handling:   200 * time.Millisecond,
			KillEvery:  2 * time.Second,
			Gently:     true,
			Left:       func() (int, error) { return left(s) },
			Patience:   time.Minute,
		}.Run(t)
		if report.Kills < 2 {
			t.Errorf("%d replicas were told to end: this has not tested what it should", report.Kills)
		}
		checkAudit(t, s, report)
	})
	// None dies: the events of a case run in order, though each replica receives only every third.
	t.Run("order", func(t *testing.T) {
		s := redistest.New(t)
		report := dedupetest.Replicas{
			Env:        []string{urlEnv + "=" + s.URL()},
			Count:      3,
			Events:     5000,
			Duplicates: 0.2,
			Handling:   30 * time.Millisecond,
			Left:       func() (int, error) { return left(s) },
			Patience:   time.Minute,
		}.Run(t)
		checkAudit(t, s, report)
	})
}

// checkAudit reads in the server's log of all that was ever written that of every acknowledged event one end was
// recorded, and checks that nothing else is left.
func checkAudit(t *testing.T, s *redistest.Server, report dedupetest.Report) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.Dir, "appendonlydir", "*.incr.aof"))
	if err != nil || len(files) != 1 {
		t.Fatalf("the logs are %q: %v", files, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	var ends []string
	for line := range strings.Lines(string(text)) {
		if id, ok := strings.CutPrefix(strings.TrimSpace(line), prefix+"done:"); ok {
			ends = append(ends, id)
		}
	}
	slices.Sort(ends)
	if !slices.Equal(ends, report.Acknowledged) {
		t.Errorf("the ends of %d events are recorded, of which %d are different; %d are acknowledged",
			len(ends), len(slices.Compact(slices.Clone(ends))), len(report.Acknowledged))
	}
	for _, pattern := range []string{"case:*", "owner:*", "new:*", "gave_up"} {
		if keys, err := s.Keys(prefix + pattern); len(keys) > 0 || err != nil {
			t.Errorf("left behind are %q: %v", keys, err)
		}
	}
}

func left(s *redistest.Server) (int, error) {
	keys, err := s.Keys(prefix + "event:*")
	return len(keys), err
}

// TestKilled kills a process in the middle of a callback: another runs the event.
func TestKilled(t *testing.T) {
	t.Parallel()
	s := redistest.New(t)
	heir := newReceiver(t, s)
	for i := range rounds(t, 1) {
		id := fmt.Sprintf("evt_%d", i)
		child := dedupetest.StartHanging(t, id, urlEnv+"="+s.URL())
		_ = child.Kill()
		_, _ = child.Wait()
		killed := time.Now()
		heir.await(t, id)
		t.Logf("taken over after %v", time.Since(killed).Round(100*time.Millisecond))
	}
}

// TestSlow leaves an event unfinished for longer than it takes to find a dead owner: its owner keeps it.
func TestSlow(t *testing.T) {
	s := redistest.New(t)
	slow, _ := newInbox(t, s, soon), newInbox(t, s, soon)
	mustClaim(t, slow, "evt_slow", "case_1")
	for range 2 { // so that the heir of one, whoever that was, has looked for other dead as well
		buryOne(t, s)
	}
	// What comes to an owner from another is new to it, even what had been its own.
	mine := s.Do(t, "ZRANGE", prefix+"owner:"+slow.owner, 0, 0)
	others := s.Do(t, "ZRANGE", prefix+"new:"+slow.owner, 0, 0)
	if fmt.Sprint(mine) != "[evt_slow]" || fmt.Sprint(others) == "[evt_slow]" {
		t.Errorf("the slow owner's first event is %v, the first that came to it from another %v", mine, others)
	}
}

// buryOne lets an owner die, and returns when one of the others has taken over from it.
func buryOne(t *testing.T, s *redistest.Server) {
	t.Helper()
	dead := newInbox(t, s, soon)
	mustClaim(t, dead, "evt_of_"+dead.owner, dead.owner)
	dead.die()
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		owners, _ := s.Do(t, "ZRANGE", prefix+"owners", 0, -1).([]any)
		if !slices.Contains(owners, any(dead.owner)) {
			return
		}
		if time.Since(start) > patience {
			t.Fatal("nobody takes over from the dead")
		}
	}
}

// TestServerAway keeps the server away for longer than a lease, killed or stalled: everyone has what they had, and a
// claim that was under way gets its answer when the server is back.
func TestServerAway(t *testing.T) {
	for name, leave := range map[string]func(t *testing.T, s *redistest.Server) (back func()){
		"killed": func(t *testing.T, s *redistest.Server) func() {
			s.Kill()
			return func() {
				if err := s.Start(); err != nil {
					t.Fatal(err)
				}
			}
		},
		"stalled": func(t *testing.T, s *redistest.Server) func() {
			s.Do(t, "CLIENT", "PAUSE", (4 * leaseBeats * renewEvery).Milliseconds())
			return func() {}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.New(t)
			// At their real pace, because the client takes a second to find that a server is back.
			a, b := newInbox(t, s, renewEvery), newInbox(t, s, renewEvery)
			mustClaim(t, a, "evt_a", "case_1")
			mustClaim(t, b, "evt_b", "case_2")
			back := leave(t, s)
			claimed := make(chan error)
			go func() {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				fresh, err := a.Claim(ctx, newEvent("evt_late", "case_1"))
				if err == nil && !fresh {
					err = errors.New("not fresh")
				}
				claimed <- err
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 2*leaseBeats*renewEvery)
			defer cancel()
			if fresh, err := b.Claim(ctx, newEvent("evt_refused", "case_3")); fresh || err == nil {
				t.Errorf("Claim while the server is away: %t, %v", fresh, err)
			}
			back()
			if err := <-claimed; err != nil {
				t.Errorf("a claim that was waiting for the server: %v", err)
			}
			buryOne(t, s)
			got := pendingIDs(t, a)
			if i, j := slices.Index(got, "evt_a"), slices.Index(got, "evt_late"); i < 0 || j < i {
				t.Errorf("one owner has %q", got)
			}
			if got := pendingIDs(t, b); !slices.Contains(got, "evt_b") {
				t.Errorf("the other owner has %q", got)
			}
		})
	}
}

// TestRepeatedClaim repeats a claim whose answer was lost: it is the same one, and not a duplicate.
func TestRepeatedClaim(t *testing.T) {
	in := newInbox(t, redistest.New(t), soon)
	for i, want := range []struct{ claim, answer string }{{"first", "1"}, {"first", "1"}, {"second", "0"}} {
		answer, err := in.do(t.Context(), script, "claim", "evt_1", "case", "{}", want.claim)
		if fmt.Sprint(answer) != want.answer || err != nil {
			t.Errorf("claim %d: %v, %v, want %s", i, answer, err, want.answer)
		}
	}
}

// TestOneOwnerPerCase gives the events of a case to the replica that has unfinished ones of it, in the order of their
// claims.
func TestOneOwnerPerCase(t *testing.T) {
	s := redistest.New(t)
	a, b := newInbox(t, s, soon), newInbox(t, s, soon)
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
	mustClaim(t, a, "evt_5", "case")
	for _, id := range []string{"evt_1", "evt_2", "evt_3", "evt_4", "evt_5"} {
		mustDone(t, a, id, nil)
	}
	mustClaim(t, b, "evt_6", "case")
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
		t.Errorf("forwarded are %.100q, want %.100q", delivered, ids)
	}
	in.handing.Lock() // until the last page is noted
	defer in.handing.Unlock()
}

// TestLooks finds a lease over, and its owner alive after all: only one that was found so five times is a dead one's.
func TestLooks(t *testing.T) {
	s := redistest.New(t)
	in, other := newInbox(t, s, soon), newInbox(t, s, soon)
	in.die() // so that nothing looks but this test
	other.die()
	mustClaim(t, other, "evt_1", "case")
	var seen map[lease]int
	for renewed := range 2 {
		s.Do(t, "ZADD", prefix+"owners", 1+renewed, other.owner)
		for range deathLooks - 1 {
			seen = in.bury(t.Context(), seen)
		}
		if got := pendingIDs(t, in); len(got) > 0 {
			t.Errorf("after %d looks, lease %d: %q is taken over", deathLooks-1, renewed, got)
		}
	}
	in.bury(t.Context(), seen)
	if got := pendingIDs(t, in); !slices.Equal(got, []string{"evt_1"}) {
		t.Errorf("after %d looks: %q", deathLooks, got)
	}
}

// TestClockSetBack: a lease that was renewed before the clock was set back does not last until that time comes again.
func TestClockSetBack(t *testing.T) {
	s := redistest.New(t)
	in, other := newInbox(t, s, soon), newInbox(t, s, soon)
	in.die() // so that nothing looks but this test
	other.die()
	mustClaim(t, other, "evt_1", "case")
	s.Do(t, "ZADD", prefix+"owners", time.Now().Add(time.Hour).UnixMilli(), other.owner)
	var seen map[lease]int
	for range deathLooks {
		seen = in.bury(t.Context(), seen)
	}
	if got := pendingIDs(t, in); !slices.Equal(got, []string{"evt_1"}) {
		t.Errorf("after %d looks: %q", deathLooks, got)
	}
}

// TestBusyPool: an owner whose connections are all in use renews its lease.
func TestBusyPool(t *testing.T) {
	s := redistest.New(t)
	in := newInbox(t, s, soon)
	for range in.client.Options().PoolSize {
		conn := in.client.Conn()
		defer conn.Close()
		if err := conn.Ping(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
	}
	awaitRenewal(t, s, in)
}

// awaitRenewal waits until the lease of in is renewed.
func awaitRenewal(t *testing.T, s *redistest.Server, in *Inbox) {
	t.Helper()
	score := func() any { return s.Do(t, "ZSCORE", prefix+"owners", in.owner) }
	for start, before := time.Now(), score(); score() == before; time.Sleep(soon / 4) {
		if time.Since(start) > patience {
			t.Fatal("the lease is not renewed")
		}
	}
}

// TestOneHeir lets two owners inherit at once: the second gets nothing, even when the first is not done.
func TestOneHeir(t *testing.T) {
	s := redistest.New(t)
	dead, first, second := newInbox(t, s, soon), newInbox(t, s, soon), newInbox(t, s, soon)
	for _, in := range []*Inbox{dead, first, second} {
		in.die()
	}
	for _, id := range []string{"evt_1", "evt_2", "evt_3"} {
		mustClaim(t, dead, id, "case")
	}
	s.Do(t, "ZREM", prefix+"owners", first.owner) // it was itself taken for dead
	s.Do(t, "ZADD", prefix+"owners", 1, dead.owner)
	renewed, err := first.end(t.Context(), "inherit", dead.owner, "1", 2)
	if renewed == "" || err != nil {
		t.Fatalf("the first heir: %v, %v", renewed, err)
	}
	if answer, err := second.end(t.Context(), "inherit", dead.owner, "1", 2); answer != "" || err != nil {
		t.Errorf("the second heir: %v, %v", answer, err)
	}
	if _, err := first.end(t.Context(), "inherit", dead.owner, renewed, 2); err != nil {
		t.Error(err)
	}
	if got := pendingIDs(t, first); !slices.Equal(got, []string{"evt_1", "evt_2", "evt_3"}) {
		t.Errorf("the first heir has %q", got)
	}
	s.Do(t, "ZSCORE", prefix+"owners", first.owner) // fails where nobody would find its events
}

func TestForwarding(t *testing.T) {
	dedupetest.Forwarding(t, func(t *testing.T) (a, b dedupetest.Forwarder) {
		s := redistest.New(t)
		return newInbox(t, s, soon), newInbox(t, s, soon)
	})
}

// TestSlowPage forwards large events over a slow way: the time for the page does not count.
func TestSlowPage(t *testing.T) {
	s := redistest.New(t)
	a, err := open(t.Context(), newProxy(t, s, giveWay/10, nil).url(), 0, renewEvery, checkDurable)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	a.die() // so that nothing else holds handing
	b := newInbox(t, s, renewEvery)
	b.die() // and nothing taken over
	mustClaim(t, a, "evt_0", "case")
	for i := range 16 {
		body := fmt.Appendf(nil, `{"event_id":"evt_%d","data":{"caseId":"case","text":"%065536d"}}`, i+1, 0)
		env, err := offloadhook.ParseEnvelope(body)
		if err != nil {
			t.Fatal(err)
		}
		mustGive(t, b, env)
	}
	forwarded := 0
	start := time.Now()
	a.hand(t.Context(), "0", make(map[string]bool), func(context.Context, []byte) (bool, error) {
		forwarded++
		return true, nil
	})
	if took := time.Since(start); took < giveWay || forwarded == 0 {
		t.Errorf("%d events are forwarded, in %v", forwarded, took)
	}
}

// TestHandEnds forwards slowly: what waits for handing gets its turn in the midst of a page.
func TestHandEnds(t *testing.T) {
	s := redistest.New(t)
	a, b := newInbox(t, s, soon), newInbox(t, s, soon)
	a.die() // so that nothing else holds handing
	b.die() // and nothing taken over
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
	held := make(map[string]bool)
	if last := a.hand(t.Context(), "0", held, deliver); last != "" || forwarded != 2 {
		t.Errorf("%d events are forwarded, up to %q", forwarded, last)
	}
	if last := a.hand(t.Context(), "0", held, deliver); last == "" || forwarded != 3 {
		t.Errorf("after that, %d events are forwarded, up to %q", forwarded, last)
	}
}

// proxy is a way to a server, which a test can make slow or cut.
type proxy struct {
	listener net.Listener
	server   string
	slow     time.Duration // for each answer
	secure   *tls.Config   // nil for none

	mu     sync.Mutex // protects what follows
	hangs  bool       // what comes is accepted, and nothing else
	closes bool       // what comes is accepted, and closed
	conns  []net.Conn
}

func newProxy(t *testing.T, s *redistest.Server, slow time.Duration, secure *tls.Config) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: listener, server: strings.TrimPrefix(s.URL(), "redis://"), slow: slow, secure: secure}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			p.mu.Lock()
			hangs, closes := p.hangs, p.closes
			p.conns = append(p.conns, conn)
			p.mu.Unlock()
			switch {
			case closes:
				conn.Close()
			case !hangs:
				serving.Go(func() { p.serve(conn) })
			}
		}
	})
	t.Cleanup(func() {
		listener.Close()
		p.cut(true)
		serving.Wait()
	})
	return p
}

func (p *proxy) url() string {
	if p.secure != nil {
		return "rediss://" + p.listener.Addr().String() + "?skip_verify=true"
	}
	return "redis://" + p.listener.Addr().String()
}

func (p *proxy) serve(conn net.Conn) {
	if p.secure != nil {
		conn = tls.Server(conn, p.secure)
	}
	defer conn.Close()
	up, err := net.Dial("tcp", p.server)
	if err != nil {
		return
	}
	go func() {
		io.Copy(up, conn)
		up.Close()
	}()
	for buf := make([]byte, 1<<16); err == nil; {
		var n int
		if n, err = up.Read(buf); n > 0 {
			time.Sleep(p.slow)
			_, err = conn.Write(buf[:n])
		}
	}
}

// cut breaks all connections, and lets later ones hang.
func (p *proxy) cut(hangs bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hangs = hangs
	for _, conn := range p.conns {
		conn.Close()
	}
	p.conns = nil
}

// TestRefusedConnections closes new connections as they begin, for a while, as a proxy does whose server is away: what is
// asked for meanwhile waits for the end of that.
func TestRefusedConnections(t *testing.T) {
	s := redistest.New(t)
	p := newProxy(t, s, 0, nil)
	in, err := open(t.Context(), p.url(), 0, renewEvery, checkDurable)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	for name, call := range map[string]func(ctx context.Context) error{
		"Claim": func(ctx context.Context) error {
			fresh, err := in.Claim(ctx, newEvent("evt_1", "case"))
			if err == nil && !fresh {
				err = errors.New("not fresh")
			}
			return err
		},
		"Open": func(ctx context.Context) error {
			in, err := Open(ctx, p.url(), 0)
			if err == nil {
				in.Close()
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			set := func(closes bool) {
				p.mu.Lock()
				p.closes = closes
				p.mu.Unlock()
			}
			set(true)
			p.cut(false)
			time.AfterFunc(time.Second, func() { set(false) })
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			if err := call(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	awaitRenewal(t, s, in)
}

// TestNotReady claims while the server takes no other client, or no write, for a while.
func TestNotReady(t *testing.T) {
	for setting, values := range map[string]struct{ notReady, ready string }{
		"maxclients":            {"1", "1000"},
		"min-replicas-to-write": {"1", "0"},
	} {
		t.Run(setting, func(t *testing.T) {
			s := redistest.New(t)
			in := newInbox(t, s, renewEvery)
			in.die() // so that it has no connections
			admin := s.Client()
			defer admin.Close()
			for _, args := range [][]any{
				{"CONFIG", "SET", setting, values.notReady}, {"CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"},
			} {
				if err := admin.Do(t.Context(), args...).Err(); err != nil {
					t.Fatal(err)
				}
			}
			time.AfterFunc(time.Second, func() { admin.Do(context.Background(), "CONFIG", "SET", setting, values.ready) })
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			if _, err := in.Claim(ctx, newEvent("evt_1", "case")); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRights uses a role with the rights that the README names, and one that lacks a command of a claim: then nothing is
// claimed.
func TestRights(t *testing.T) {
	s := redistest.New(t)
	url := strings.Replace(s.URL(), "redis://", "redis://hook:secret@", 1)
	s.Do(t, "ACL", "SETUSER", "hook", "on", ">secret", "~{offload}:*", "+@all", "-@dangerous", "-@admin", "+config|get")
	in, err := open(t.Context(), url, 0, renewEvery, checkDurable)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	mustClaim(t, in, "evt_1", "case")
	mustDone(t, in, "evt_1", errors.New("failed"))
	awaitPending(t, in, "evt_1")
	mustDone(t, in, "evt_1", nil)
	s.Do(t, "ACL", "SETUSER", "hook", "-incr")
	if fresh, err := in.Claim(t.Context(), newEvent("evt_2", "case")); fresh || err == nil {
		t.Errorf("without INCR: %t, %v", fresh, err)
	}
	s.Do(t, "ACL", "SETUSER", "hook", "+incr")
	mustClaim(t, in, "evt_2", "case")
}

// TestSlowServer: an owner renews its lease where an answer takes more than half a second, and a new connection some.
func TestSlowServer(t *testing.T) {
	s := redistest.New(t)
	a, err := open(t.Context(), newProxy(t, s, 600*time.Millisecond, nil).url(), 0, 3*soon, checkDurable)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b := newInbox(t, s, 3*soon)
	mustClaim(t, a, "evt_1", "case")
	for start := time.Now(); time.Since(start) < 2*(leaseBeats+deathLooks)*3*soon; time.Sleep(soon) {
		if ids := pendingIDs(t, b); len(ids) > 0 {
			t.Fatalf("%q is taken over from an owner that lives", ids)
		}
	}
}

// TestRenewalOfTheVolatile: an owner that has to connect anew to a server which has become volatile keeps what it holds.
func TestRenewalOfTheVolatile(t *testing.T) {
	s := redistest.New(t)
	in := newInbox(t, s, soon)
	s.Do(t, "CONFIG", "SET", "appendfsync", "everysec")
	s.Do(t, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
	awaitRenewal(t, s, in)
}

// TestHangingDial cuts off an owner for so long that what it dials hangs: the renewal does not wait for that, over TLS
// as without.
func TestHangingDial(t *testing.T) {
	web := httptest.NewTLSServer(nil)
	defer web.Close()
	for scheme, secure := range map[string]*tls.Config{
		"redis": nil, "rediss": {Certificates: web.TLS.Certificates},
	} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			s := redistest.New(t)
			p := newProxy(t, s, 0, secure)
			in, err := open(t.Context(), p.url(), 0, renewEvery, checkDurable)
			if err != nil {
				t.Fatal(err)
			}
			defer in.Close()
			p.cut(true)
			start := time.Now()
			time.Sleep(renewEvery + renewEvery/2)
			p.mu.Lock()
			p.hangs = false // but what hangs goes on to
			p.mu.Unlock()
			awaitRenewal(t, s, in)
			if took := time.Since(start); took > timeout+3*renewEvery/2 { // in seven an owner is dead
				t.Errorf("the lease is renewed after %v", took)
			}
		})
	}
}

// TestOwnLease: an owner whose own lease is over, since only its renewal hangs, takes over nothing from itself.
func TestOwnLease(t *testing.T) {
	s := redistest.New(t)
	in := newInbox(t, s, soon)
	in.die() // so that nothing looks but this test
	mustClaim(t, in, "evt_1", "case")
	s.Do(t, "ZADD", prefix+"owners", 1, in.owner)
	var seen map[lease]int
	for range deathLooks + 1 {
		seen = in.bury(t.Context(), seen)
	}
	if n := s.Do(t, "ZCARD", prefix+"new:"+in.owner); n != int64(0) {
		t.Errorf("%v of its own events are new to it", n)
	}
	s.Do(t, "ZSCORE", prefix+"owners", in.owner) // fails where nobody would find its events
}

// TestBuryWaits: nothing is inherited while events are forwarded.
func TestBuryWaits(t *testing.T) {
	s := redistest.New(t)
	in, dead := newInbox(t, s, soon), newInbox(t, s, soon)
	in.die() // so that nothing looks but this test
	dead.die()
	mustClaim(t, dead, "evt_1", "case")
	s.Do(t, "ZADD", prefix+"owners", 0, dead.owner)
	in.handing.Lock()
	buried := make(chan struct{})
	go func() { in.bury(t.Context(), nil); close(buried) }()
	select {
	case <-buried:
		t.Error("it does not wait")
	case <-time.After(200 * time.Millisecond): // far longer than it takes
	}
	in.handing.Unlock()
	<-buried
	if got := pendingIDs(t, in); !slices.Equal(got, []string{"evt_1"}) {
		t.Errorf("taken over is %q", got)
	}
}

// TestForwardPages reads no more than about a megabyte at once.
func TestForwardPages(t *testing.T) {
	s := redistest.New(t)
	a, b := newInbox(t, s, soon), newInbox(t, s, soon)
	mustClaim(t, a, "evt_0", "case")
	text := strings.Repeat("x", 600<<10)
	var want []string
	for i := range 5 {
		id := fmt.Sprint("evt_", i+1)
		want = append(want, id)
		env := newEvent(id, "case")
		env.Raw = fmt.Appendf(nil, `{"event_id":%q,"data":{"caseId":"case","text":%q}}`, id, text)
		mustGive(t, b, env)
	}
	if _, page, err := a.page(t.Context(), "new", "0", "+inf"); len(page) != 2 || err != nil {
		t.Errorf("%d events in a page, want 2: %v", len(page), err)
	}
	forwardAll(t, a, want...)
}

// TestForwardEnds: forwarding of many events lets the look for dead owners go first from time to time.
func TestForwardEnds(t *testing.T) {
	s := redistest.New(t)
	a, b := newInbox(t, s, soon), newInbox(t, s, soon)
	a.die() // so that nothing forwards but this test
	a.beat = 0
	mustClaim(t, a, "evt_0", "case")
	for i := range 65 { // one more than a page
		mustGive(t, b, newEvent(fmt.Sprint("evt_", i+1), "case"))
	}
	forwarded := 0
	a.Forward(func(context.Context, []byte) (bool, error) {
		forwarded++
		return true, nil
	})
	for _, want := range []int{64, 65} {
		if a.forward(t.Context()); forwarded != want {
			t.Errorf("%d events are forwarded, want %d", forwarded, want)
		}
	}
}

// TestForwardDamaged has an event that cannot be read before another that is to be forwarded: it holds up nothing.
func TestForwardDamaged(t *testing.T) {
	s := redistest.New(t)
	dead := newInbox(t, s, soon)
	mustClaim(t, dead, "evt_damaged", "case_1")
	mustClaim(t, dead, "evt_sound", "case_2")
	s.Do(t, "HSET", prefix+"event:evt_damaged", "body", "{")
	dead.die()
	heir := newReceiver(t, s)
	heir.await(t, "evt_sound")
	for _, err := range heir.in.Pending(t.Context()) {
		if errors.Is(err, offloadhook.ErrMalformed) {
			return
		}
	}
	t.Error("Pending does not report it")
}

// TestForwardLostBody forwards what comes behind an event that the server has dropped; Pending reports that.
func TestForwardLostBody(t *testing.T) {
	s := redistest.New(t)
	a, b := newInbox(t, s, soon), newInbox(t, s, soon)
	mustClaim(t, a, "evt_0", "case")
	for _, id := range []string{"evt_1", "evt_2"} {
		mustGive(t, b, newEvent(id, "case"))
	}
	s.Do(t, "DEL", prefix+"event:evt_1")
	forwardAll(t, a, "evt_2")
	reported := 0
	for _, err := range a.Pending(t.Context()) {
		if err != nil {
			reported++
		}
	}
	if reported != 1 {
		t.Errorf("it is reported %d times", reported)
	}
}

// TestInheritedCase: after a takeover a case belongs to the heir.
func TestInheritedCase(t *testing.T) {
	s := redistest.New(t)
	heir, other, dead := newInbox(t, s, soon), newInbox(t, s, soon), newInbox(t, s, soon)
	for _, in := range []*Inbox{heir, other, dead} {
		in.die() // so that nothing looks but this test
	}
	mustClaim(t, dead, "evt_1", "case")
	s.Do(t, "ZADD", prefix+"owners", 0, dead.owner)
	heir.bury(t.Context(), nil)
	if got := pendingIDs(t, heir); !slices.Equal(got, []string{"evt_1"}) {
		t.Fatalf("taken over is %q", got)
	}
	mustGive(t, other, newEvent("evt_2", "case"))
	if got := pendingIDs(t, heir); !slices.Equal(got, []string{"evt_1", "evt_2"}) {
		t.Errorf("the heir has %q", got)
	}
}

// TestWithoutForward reads from Pending what another replica has received: then the receiver knows of it.
func TestWithoutForward(t *testing.T) {
	s := redistest.New(t)
	a, b := newInbox(t, s, soon), newInbox(t, s, soon)
	mustClaim(t, a, "evt_1", "case")
	mustGive(t, b, newEvent("evt_2", "case"))
	if got := pendingIDs(t, a); !slices.Equal(got, []string{"evt_1", "evt_2"}) {
		t.Errorf("pending are %q", got)
	}
	mustClaim(t, a, "evt_3", "case")
}

// TestInheritMany takes over more events than are moved in one step: none is forwarded out of order.
func TestInheritMany(t *testing.T) {
	s := redistest.New(t)
	dead, heir := newInbox(t, s, soon), newInbox(t, s, soon)
	var ids []string
	for i := range 2*many + 10 {
		id := fmt.Sprintf("evt_%04d", i)
		mustClaim(t, dead, id, fmt.Sprintf("case_%d", i%7))
		ids = append(ids, id)
	}
	dead.die()
	for start := time.Now(); s.Do(t, "ZCARD", prefix+"owners") != int64(1); time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatal("nobody takes over from the dead")
		}
	}
	if fresh, err := heir.Claim(t.Context(), newEvent("evt_late", "case_0")); fresh || err != nil {
		t.Errorf("an event behind those that were inherited: %t, %v", fresh, err)
	}
	ids = append(ids, "evt_late")
	forwardAll(t, heir, ids...)
	if got := pendingIDs(t, heir); !slices.Equal(got, ids) {
		t.Errorf("the heir has %d events, want %d in order", len(got), len(ids))
	}
}

// TestServerKilled kills Redis in the middle of requests: they are refused while it is away, and what was acknowledged
// is handled, once.
func TestServerKilled(t *testing.T) {
	t.Parallel()
	s := redistest.New(t)
	r := newReceiver(t, s)
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
		for n := range 8 {
			senders.Go(func() {
				for i := 0; ; i++ {
					id := fmt.Sprintf("evt_%d_%d_%d", round, n, i)
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
		s.Kill()
		senders.Wait() // each has met a 503
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		last := fmt.Sprintf("evt_%d_last", round)
		for start := time.Now(); post(last)/100 != 2; time.Sleep(20 * time.Millisecond) {
			if time.Since(start) > patience {
				t.Fatal("Redis is back, and events are still refused")
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

// TestServerFull fills the memory of Redis: events are refused whole, and those that are in can still end.
func TestServerFull(t *testing.T) {
	s := redistest.New(t)
	in := newInbox(t, s, soon)
	mustClaim(t, in, "evt_in", "case")
	mustClaim(t, in, "evt_failing", "case")
	s.Do(t, "CONFIG", "SET", "maxmemory", "1")
	before, err := s.Keys("*")
	if err != nil {
		t.Fatal(err)
	}
	if fresh, err := in.Claim(t.Context(), newEvent("evt_out", "case")); fresh || err == nil {
		t.Errorf("Claim: %t, %v", fresh, err)
	}
	if after, err := s.Keys("*"); len(after) != len(before) || err != nil {
		t.Errorf("a refused claim has left something: %q, %q, %v", before, after, err)
	}
	mustDone(t, in, "evt_in", nil)
	mustDone(t, in, "evt_failing", errors.New("failed"))
	awaitPending(t, newInbox(t, s, soon), "evt_failing")
	s.Do(t, "CONFIG", "SET", "maxmemory", "0")
	mustClaim(t, in, "evt_out", "another case")
}

// TestRetention lets the ids of events that are done expire, and nothing else.
func TestRetention(t *testing.T) {
	s := redistest.New(t)
	in, err := open(t.Context(), s.URL(), 50*time.Millisecond, soon, checkDurable)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	mustClaim(t, in, "evt_done", "case_1")
	mustClaim(t, in, "evt_open", "case_2")
	mustClaim(t, in, "evt_failed", "case_3")
	mustDone(t, in, "evt_done", nil)
	mustDone(t, in, "evt_failed", errors.New("failed"))
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		done, err := s.Keys(prefix + "done:*")
		if err != nil {
			t.Fatal(err)
		}
		if len(done) == 0 {
			break
		}
		if time.Since(start) > patience {
			t.Fatalf("left are %q", done)
		}
	}
	mustClaim(t, in, "evt_done", "case_1")
	for _, key := range []string{
		"event:evt_open", "event:evt_failed", "case:case_2", "gave_up", "seq", "owner:" + in.owner,
	} {
		if ttl := s.Do(t, "PTTL", prefix+key); ttl != int64(-1) {
			t.Errorf("PTTL of %s: %v, want -1, for ever", key, ttl)
		}
	}
	thirtyDays := newInbox(t, s, soon)
	mustClaim(t, thirtyDays, "evt_kept", "case_4")
	mustDone(t, thirtyDays, "evt_kept", nil)
	const day = int64(24 * time.Hour / time.Millisecond)
	if ttl, _ := s.Do(t, "PTTL", prefix+"done:evt_kept").(int64); ttl < 29*day || ttl > 30*day {
		t.Errorf("PTTL by default: %v, want about 30 days", ttl)
	}
}

// TestLostBody reports an event that the server has dropped, once, and goes on.
func TestLostBody(t *testing.T) {
	s := redistest.New(t)
	in := newInbox(t, s, soon)
	mustClaim(t, in, "evt_lost", "case_1")
	mustClaim(t, in, "evt_kept", "case_2")
	s.Do(t, "DEL", prefix+"event:evt_lost")
	for i, want := range []int{1, 0} {
		var reported int
		var ids []string
		for env, err := range in.Pending(t.Context()) {
			if err != nil {
				reported++
				continue
			}
			ids = append(ids, env.EventID)
		}
		if reported != want || !slices.Equal(ids, []string{"evt_kept"}) {
			t.Errorf("reading %d: %d errors and %q", i, reported, ids)
		}
	}
}

// TestCaseOfTheDead gives an event to nobody who is not there any more, though the case still has that owner.
func TestCaseOfTheDead(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, s *redistest.Server, a *Inbox){
		"a lost body": func(t *testing.T, s *redistest.Server, a *Inbox) {
			s.Do(t, "DEL", prefix+"event:evt_1")
			for range a.Pending(t.Context()) {
				continue
			}
		},
		"claimed again without its case": func(t *testing.T, s *redistest.Server, a *Inbox) {
			mustDone(t, a, "evt_1", errors.New("failed"))
			mustClaim(t, a, "evt_1", "")
			mustDone(t, a, "evt_1", nil)
			if n := s.Do(t, "EXISTS", prefix+"case:case"); n != int64(0) {
				t.Errorf("the case is there %v times, without events", n)
			}
			mustClaim(t, a, "evt_2", "case")
			mustDone(t, a, "evt_2", nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := redistest.New(t)
			a, b := newInbox(t, s, soon), newInbox(t, s, soon)
			mustClaim(t, a, "evt_1", "case")
			spoil(t, s, a)
			if err := a.Close(); err != nil {
				t.Fatal(err)
			}
			mustClaim(t, b, "evt_b", "") // so that it is an owner
			for start := time.Now(); s.Do(t, "ZCARD", prefix+"owners") != int64(1); time.Sleep(soon) {
				if time.Since(start) > patience {
					t.Fatal("nobody inherits")
				}
			}
			mustClaim(t, b, "evt_3", "case")
		})
	}
}

// TestVolatile refuses servers that would lose what they acknowledge.
func TestVolatile(t *testing.T) {
	for _, test := range []struct {
		setting, value, text string // what is wrong, and what the error says of it
	}{
		{"appendonly", "no", `appendonly is "no", want "yes"`},
		{"appendfsync", "everysec", `appendfsync is "everysec", want "always"`},
		{"appendfsync", "no", `appendfsync is "no", want "always"`},
		{"no-appendfsync-on-rewrite", "yes", `no-appendfsync-on-rewrite is "yes", want "no"`},
		{"maxmemory-policy", "allkeys-lru", `maxmemory-policy is "allkeys-lru", want "noeviction"`},
		{"maxmemory-policy", "volatile-ttl", `maxmemory-policy is "volatile-ttl", want "noeviction"`},
		{"rename-command", "CONFIG hidden", "does not tell its settings"},
	} {
		t.Run(test.setting+" "+test.value, func(t *testing.T) {
			s := redistest.New(t, append([]string{"--" + test.setting}, strings.Fields(test.value)...)...)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			in, err := Open(ctx, s.URL(), 0)
			if err == nil {
				in.Close()
			}
			if !errors.Is(err, ErrVolatile) || !strings.Contains(fmt.Sprint(err), test.text) {
				t.Errorf("Open: %v, want %q", err, test.text)
			}
			if in, err = OpenVolatile(ctx, s.URL(), 0); err != nil {
				t.Fatalf("OpenVolatile: %v", err)
			}
			defer in.Close()
			mustClaim(t, in, "evt_1", "case")
		})
	}
	t.Run("after a restart", func(t *testing.T) {
		s := redistest.New(t)
		in := newInbox(t, s, soon)
		mustClaim(t, in, "evt_1", "case_1")
		s.Kill()
		s.Settings = []string{"--appendfsync", "everysec"}
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		if fresh, err := in.Claim(t.Context(), newEvent("evt_2", "case_2")); fresh || !errors.Is(err, ErrVolatile) {
			t.Errorf("Claim: %t, %v", fresh, err)
		}
	})
}

// TestOpen fails where there is no server, and says nothing of a password.
func TestOpen(t *testing.T) {
	for _, url := range []string{"redis://user:secret@127.0.0.1:1/0", "postgres://user:secret@127.0.0.1/0", ":secret"} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		in, err := Open(ctx, url, 0)
		cancel()
		if err == nil {
			in.Close()
		}
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("Open: %v", err)
		}
		if strings.HasPrefix(url, "redis:") && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("Open: %v, which does not say why", err)
		}
	}
}

// TestClose refuses what comes later, and leaves the events to others at once.
func TestClose(t *testing.T) {
	s := redistest.New(t)
	in, next := newInbox(t, s, renewEvery), newInbox(t, s, renewEvery)
	mustClaim(t, in, "evt_1", "case_1")
	if err := in.Close(); err != nil {
		t.Error(err)
	}
	if _, err := in.Claim(t.Context(), newEvent("evt_2", "case_2")); !errors.Is(err, offloadhook.ErrClosed) {
		t.Errorf("Claim: %v, want ErrClosed", err)
	}
	start := time.Now()
	awaitPending(t, next, "evt_1")
	if took := time.Since(start); took > (deathLooks-1)*renewEvery {
		t.Errorf("taken over after %v", took)
	}
}
