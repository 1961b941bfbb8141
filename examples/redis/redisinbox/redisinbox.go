// Package redisinbox is an offloadhook.Inbox on Redis 7 that several replicas share.
//
// Each open Inbox is an owner. It shows that it lives by a lease that it renews every second, whatever its callbacks
// do; when its process dies, another owner takes over its events within seconds. A lease that is over is not taken for
// a death at once, but after five looks, a second apart, because after a restart of Redis all of them are over:
// meanwhile the living renew theirs. Times are those of Redis.
//
// The events of a case that has unfinished ones go to the owner of those, whichever replica received them, so that they
// run in order; that is why Claim may answer "not fresh", and the sender get a 200, for an event that is new. Forward
// brings it to the receiver that it belongs to.
package redisinbox

import (
	"cmp"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"offloadhook"
)

const (
	forwardEvery = 200 * time.Millisecond // between looks for events that other replicas have received for this one
	giveWay      = time.Second            // of forwarding, after which it lets a reading go first
	renewEvery   = time.Second            // between renewals of the lease, and between looks for dead owners
	leaseBeats   = 2                      // renewals that fit into a lease
	deathLooks   = 5                      // that find a lease over, one after the other, for its owner to be dead
	timeout      = 5 * time.Second        // for a step in the background
	retryEvery   = 50 * time.Millisecond  // while the server is away
	rest         = 10 * time.Minute       // of what was given up
	many         = 100                    // events are moved in one step, which nothing can interrupt
	prefix       = "{offload}:"           // of all keys; the braces keep them together in a cluster
)

//go:embed inbox.lua
var source string

// Redis refuses a script with such a first line whole, rather than its first write that it has no room for. When its
// memory is full, an event can still end.
var (
	script       = redis.NewScript("#!lua\n" + source)
	endingScript = redis.NewScript("#!lua flags=allow-oom\n" + source)
)

// ErrVolatile is wrapped by what Open, and later a call, returns when the server would lose what it acknowledged.
var ErrVolatile = errors.New("the server may lose what it has acknowledged")

// durable are the settings that a server needs not to lose what it acknowledged, by their names in redis.conf.
var durable = [...]struct{ name, want string }{
	{"appendonly", "yes"},
	{"appendfsync", "always"},
	{"no-appendfsync-on-rewrite", "no"}, // else nothing is synced while the file is rewritten
	{"maxmemory-policy", "noeviction"},
}

// Inbox is an offloadhook.Inbox. Open makes it. Its methods are safe for concurrent use.
type Inbox struct {
	client    *redis.Client
	owner     string
	retention time.Duration
	beat      time.Duration // renewEvery
	stop      context.CancelFunc
	working   sync.WaitGroup

	handing sync.Mutex // held by Pending, and while events are forwarded, so that one follows the other

	mu      sync.Mutex // protects what follows
	deliver deliverFunc
	called  bool // Pending has brought back what was given up
}

// deliverFunc is the type of (*offloadhook.Receiver).Deliver.
type deliverFunc = func(ctx context.Context, body []byte) (fresh bool, err error)

var _ offloadhook.Inbox = (*Inbox)(nil)

// Open connects to the server at url, redis://user:password@host:port/database, and returns a new owner. The ids of
// events that are done expire after retention; 0 means 30 days. It refuses a server that would lose what it
// acknowledged, and so does every later connection, should another server have come up in its place: the error wraps
// ErrVolatile. It waits for a server that is away until ctx ends. Close the Inbox after the receiver's Shutdown.
func Open(ctx context.Context, url string, retention time.Duration) (*Inbox, error) {
	return open(ctx, url, retention, renewEvery, checkDurable)
}

// OpenVolatile is Open without a look at how durable the server is: for development, or where an event may be lost.
func OpenVolatile(ctx context.Context, url string, retention time.Duration) (*Inbox, error) {
	return open(ctx, url, retention, renewEvery, nil)
}

func open(ctx context.Context, url string, retention, beat time.Duration,
	check func(context.Context, *redis.Conn) error) (*Inbox, error) {
	options, err := redis.ParseURL(url)
	if err != nil {
		return nil, errors.New("redisinbox: want a URL like redis://user:password@host:6379/0") // err may quote a password
	}
	options.ContextTimeoutEnabled = true
	options.MaxRetries = -1 // do repeats calls: the client would repeat the start of a connection on the same one, dead or not
	options.DialerRetries = 1
	options.OnConnect = check
	in := &Inbox{
		client:    redis.NewClient(options),
		owner:     rand.Text(),
		retention: cmp.Or(max(retention, 0), 30*24*time.Hour),
		beat:      beat,
	}
	if err := in.Ready(ctx); err != nil {
		in.client.Close()
		return nil, err
	}
	background, stop := context.WithCancel(context.Background())
	in.stop = stop
	in.working.Go(func() { in.renew(background) })
	in.working.Go(func() { in.work(background) })
	return in, nil
}

// checkDurable returns an error unless the server at conn is durable. It joins it with nothing because the client takes
// off what wraps a single error.
func checkDurable(ctx context.Context, conn *redis.Conn) error {
	args := []any{"config", "get"}
	for _, setting := range durable {
		args = append(args, setting.name)
	}
	answer := redis.NewMapStringStringCmd(ctx, args...)
	if err := conn.Process(ctx, answer); err != nil {
		if _, refused := err.(redis.Error); !refused || redis.HasErrorPrefix(err, "LOADING") {
			return err
		}
		return errors.Join(fmt.Errorf("%w: it does not tell its settings: %w", ErrVolatile, err))
	}
	var wrong []string
	for _, setting := range durable {
		if is := answer.Val()[setting.name]; is != setting.want {
			wrong = append(wrong, fmt.Sprintf("%s is %q, want %q", setting.name, is, setting.want))
		}
	}
	if len(wrong) > 0 {
		return errors.Join(fmt.Errorf("%w: %s", ErrVolatile, strings.Join(wrong, "; ")))
	}
	return nil
}

// Close ends the owner. What it has not finished, others take over at once, or the next one that opens.
func (in *Inbox) Close() error {
	in.stop()
	in.working.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, err := in.end(ctx, "leave") // if that fails, the lease runs out
	return errors.Join(err, in.client.Close())
}

// Forward sets what takes the events that other replicas have received for this one: the Deliver of the receiver that
// uses the Inbox. Without it, they wait for the next reading of Pending, as do those of dead owners. One that comes while
// the receiver shuts down is observed as Refused there, and goes to another replica.
func (in *Inbox) Forward(deliver deliverFunc) {
	in.mu.Lock()
	in.deliver = deliver
	in.mu.Unlock()
}

// Ready returns nil when the server answers, an error when ctx ends before that.
func (in *Inbox) Ready(ctx context.Context) error {
	_, err := in.end(ctx, "renew")
	return err
}

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
	var answer any
	if m, _ := ctx.Value(forwarded{in}).(*mark); m != nil && m.id == env.EventID && m.used.CompareAndSwap(false, true) {
		answer, err = in.end(ctx, "holds", env.EventID)
	} else {
		answer, err = in.do(ctx, script, "claim", env.EventID, caseOf(env), env.Raw, rand.Text())
	}
	return answer == int64(1), err
}

// caseOf returns the caseId of an event, "" where there is none.
func caseOf(env *offloadhook.Envelope) string {
	var data map[string]json.RawMessage // the names of a struct would match in any letter case
	var id string
	_ = json.Unmarshal(env.Data, &data)
	_ = json.Unmarshal(data["caseId"], &id)
	return id
}

// Done records the end of an event, if it is still this owner's.
func (in *Inbox) Done(ctx context.Context, env *offloadhook.Envelope, result error) error {
	var retention any = max(in.retention.Milliseconds(), 1)
	if result != nil {
		retention = ""
	}
	_, err := in.end(ctx, "done", env.EventID, retention)
	return err
}

// Pending yields this owner's events; those of the dead become its own every second. Where Forward is in use, it leaves
// out what that has yet to deliver, and forwarding waits for its end; so do not call Close within it.
func (in *Inbox) Pending(ctx context.Context) iter.Seq2[*offloadhook.Envelope, error] {
	return func(yield func(*offloadhook.Envelope, error) bool) {
		if err := in.revive(ctx); err != nil {
			yield(nil, err)
			return
		}
		in.handing.Lock() // for all pages: a later event of a case may be on a later one
		defer in.handing.Unlock()
		// The bound makes it a snapshot; pages, because it may be left early, with megabytes to come.
		newest, err := in.end(ctx, "last")
		for last := "0"; err == nil && last != newest; {
			var page []event
			if last, page, err = in.known(ctx, last, newest); last == "" {
				break
			}
			for _, e := range page {
				env, err := offloadhook.ParseEnvelope(e.body)
				if err != nil {
					err = fmt.Errorf("redisinbox: the server has lost the body of %q: %w", e.id, err)
				}
				if !yield(env, err) {
					return
				}
			}
		}
		if err != nil {
			yield(nil, err)
		}
	}
}

// known returns a page of what this owner's receiver may know of.
func (in *Inbox) known(ctx context.Context, last string, newest any) (string, []event, error) {
	in.mu.Lock()
	which := "known"
	if in.deliver == nil {
		which = "owner"
	}
	in.mu.Unlock()
	last, page, err := in.page(ctx, which, last, newest)
	if err == nil && which == "owner" {
		err = in.know(ctx, page)
	}
	return last, page, err
}

type event struct {
	seq, id, caseID string
	body            []byte
}

// page reads some events after number last, and returns the number of the last one, "" if there was none.
func (in *Inbox) page(ctx context.Context, which, last string, newest any) (string, []event, error) {
	answer, err := in.end(ctx, "page", which, last, newest)
	list, _ := answer.([]any)
	if err != nil || len(list)%4 != 1 {
		return "", nil, err
	}
	var page []event
	text := func(v any) string { s, _ := v.(string); return s }
	for e := range slices.Chunk(list[1:], 4) {
		page = append(page, event{text(e[0]), text(e[1]), text(e[2]), []byte(text(e[3]))})
	}
	return text(list[0]), page, nil
}

// know notes that the receiver knows of these events, by their numbers, since a later claim of the same id has another.
func (in *Inbox) know(ctx context.Context, page []event) error {
	if len(page) == 0 {
		return nil
	}
	var known []any
	for _, e := range page {
		known = append(known, e.seq, e.id)
	}
	_, err := in.end(ctx, "know", known...)
	return err
}

// revive brings back what was given up and has rested: all of it when an owner asks for the first time. Each event goes
// to the owner of its case, or to this one.
func (in *Inbox) revive(ctx context.Context) error {
	in.mu.Lock()
	pause := rest
	if !in.called {
		pause = 0
	}
	in.mu.Unlock()
	for more := true; more; {
		answer, err := in.end(ctx, "revive", pause.Milliseconds(), many)
		if err != nil {
			return err
		}
		more = answer == int64(many)
	}
	in.mu.Lock()
	in.called = true
	in.mu.Unlock()
	return nil
}

// do runs a step of the script. An event that is refused is lost, so it rides out an absence of the server, as long as
// ctx allows. A step answers a repetition like the first time; but to give up an event twice can end a claim that came
// between, so that it rests, too.
func (in *Inbox) do(ctx context.Context, s *redis.Script, step string, args ...any) (answer any, err error) {
	args = append([]any{step, in.owner}, args...)
	for {
		before := err
		answer, err = s.Run(ctx, in.client, []string{prefix}, args...).Result()
		if !away(err) {
			break
		}
		if ctx.Err() != nil {
			err = cmp.Or(before, err) // why it is away, rather than that the time is over
			break
		}
		time.Sleep(retryEvery)
	}
	switch {
	case errors.Is(err, redis.Nil): // the step has no answer
		return nil, nil
	case errors.Is(err, redis.ErrClosed):
		return nil, fmt.Errorf("redisinbox: %w", offloadhook.ErrClosed)
	case err != nil && ctx.Err() != nil:
		return nil, fmt.Errorf("redisinbox: the server does not answer: %w", err)
	case err != nil:
		return nil, fmt.Errorf("redisinbox: %w", err)
	}
	return answer, nil
}

// away reports whether err says that there was no answer, or that of a server that is not ready.
func away(err error) bool {
	var answer redis.Error
	if errors.As(err, &answer) {
		return redis.IsLoadingError(err) || redis.IsReadOnlyError(err) || redis.IsMaxClientsError(err) ||
			redis.IsMasterDownError(err) || redis.IsNoReplicasError(err)
	}
	return err != nil && !errors.Is(err, redis.ErrClosed) && !errors.Is(err, ErrVolatile)
}

// end runs a step that may go on when the server's memory is full.
func (in *Inbox) end(ctx context.Context, step string, args ...any) (any, error) {
	return in.do(ctx, endingScript, step, args...)
}

// renew renews the lease until ctx ends.
func (in *Inbox) renew(ctx context.Context) {
	options := *in.client.Options()
	options.MaxRetries = -1                                             // as in open; the client has made a 0 of it
	options.PoolSize, options.DialTimeout = 1, renewEvery               // no call is made beside a dial, so none may take long
	options.Dialer, options.OnConnect = nil, nil                        // Dialer has the other timeout; a lease acknowledges nothing
	alone := &Inbox{client: redis.NewClient(&options), owner: in.owner} // since claims may fill the pool of in
	defer alone.client.Close()
	tick := time.NewTicker(in.beat)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		within, cancel := context.WithTimeout(ctx, 3*renewEvery)
		_, _ = alone.end(within, "renew") // its error is that of the claims, too
		cancel()
	}
}

// work takes over from the dead, and forwards, until ctx ends.
func (in *Inbox) work(ctx context.Context) {
	seen := make(map[lease]int)
	tick := time.NewTicker(min(in.beat, forwardEvery))
	defer tick.Stop()
	for looked := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if time.Since(looked) >= in.beat {
			looked = time.Now()
			seen = in.bury(ctx, seen)
		}
		in.forward(ctx)
	}
}

// lease is one that is over. Its owner may renew it; then it is another.
type lease struct{ owner, renewed string }

// bury looks for leases that are over, and takes over from those that were found so deathLooks times in a row. seen
// counts them, and is returned for the next look.
func (in *Inbox) bury(ctx context.Context, seen map[lease]int) map[lease]int {
	step := func(name string, args ...any) (any, error) {
		within, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		return in.end(within, name, args...)
	}
	answer, err := step("expired", (leaseBeats * in.beat).Milliseconds())
	list, _ := answer.([]any)
	if err != nil {
		return nil
	}
	again := make(map[lease]int)
	for pair := range slices.Chunk(list, 2) {
		var dead lease
		dead.owner, _ = pair[0].(string)
		dead.renewed, _ = pair[1].(string)
		again[dead] = seen[dead] + 1
		if dead.owner == in.owner || again[dead] < deathLooks && dead.renewed != "0" {
			continue
		}
		// Nothing is forwarded before all of it is here, lest a case gets out of order.
		in.handing.Lock()
		for renewed := any(dead.renewed); err == nil && renewed != ""; {
			renewed, err = step("inherit", dead.owner, renewed, many)
		}
		in.handing.Unlock()
	}
	return again
}

// forward delivers what other replicas have received for this one, or others had not finished when they died.
func (in *Inbox) forward(ctx context.Context) {
	in.mu.Lock()
	deliver := in.deliver
	in.mu.Unlock()
	if deliver == nil {
		return
	}
	held := make(map[string]bool) // cases that have to wait
	start, last := time.Now(), "0"
	for last != "" && (last == "0" || time.Since(start) < in.beat) { // lest the dead wait for long
		last = in.hand(ctx, last, held, deliver)
	}
}

// hand delivers a page of what comes after number last, and returns the number of its last event: "" when it was empty,
// failed, or took long.
func (in *Inbox) hand(ctx context.Context, last string, held map[string]bool, deliver deliverFunc) string {
	in.handing.Lock()
	defer in.handing.Unlock()
	within, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	last, page, err := in.page(within, "new", last, "+inf")
	start := time.Now() // after the page, so that one of its events at least is delivered
	var taken []event
	for _, e := range page {
		if held[e.caseID] {
			continue
		}
		if time.Since(start) > giveWay {
			last = ""
			break
		}
		fresh := true
		if len(e.body) > 0 { // else Pending will tell, as of one that is damaged
			fresh, err = deliver(context.WithValue(ctx, forwarded{in}, &mark{id: e.id}), e.body)
		}
		if errors.Is(err, offloadhook.ErrMalformed) {
			fresh, err = true, nil
		}
		if errors.Is(err, offloadhook.ErrClosed) {
			in.Forward(nil) // the receiver shuts down
		}
		if err != nil {
			break
		}
		if fresh {
			taken = append(taken, e)
		} else if e.caseID != "" { // another delivery of the same event is on its way
			held[e.caseID] = true
		}
	}
	within, cancel = context.WithTimeout(ctx, timeout)
	defer cancel()
	if in.know(within, taken) != nil || err != nil {
		return ""
	}
	return last
}
