// Package offloadhook receives the webhooks of Offload, a service that works cases over email, and does not lose them.
//
//	journal, err := offloadhook.OpenJournal("/var/lib/myapp/offload", 0)
//	…
//	mux.Handle("/offload", offloadhook.Handler(offloadhook.Callbacks{
//		CaseCompleted: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseCompleted) error {
//			return store.Finish(ctx, c.CaseID, c.Result)
//		},
//	}, offloadhook.WithInbox(journal)))
//
// Offload sends each event once, unsigned, and drops it unless it gets a 2xx. So this package promises:
//
//  1. A 2xx means ours. With a [Journal], or another [Inbox], an event that got a 2xx reaches its callback at least
//     once, whatever happens to the process.
//  2. The sender never waits for your code. The 2xx goes out before the callback finishes.
//  3. One id, one handling. Once a callback has returned nil and that is recorded, it is not called for the same
//     event_id again, as long as the store remembers it. Only a crash or the loss of the store between return and
//     record, or a stall longer than a shared store's lease, can make it run again: make callbacks idempotent.
//  4. A failed callback is tried again here, since Offload will not send again.
//  5. One case, in order. Within a receiver, events of one caseId run one at a time, in the order in which they were
//     accepted; different cases run side by side. An event that is given up loses its place.
//  6. Nothing is dropped in silence, and nothing real is refused for its form. What is refused, given up, left over or
//     not understood reaches the function of [WithObserver], with as many of its bytes as were read.
//
// Without an Inbox a crash loses the events that are in memory. Nothing is signed: use [WithToken] and HTTPS.
package offloadhook

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"
)

// Handler returns a receiver that hands events to cb. It panics on an invalid option. The options are [WithDeduper],
// [WithInbox], [WithToken], [WithConcurrency], [WithBacklog], [WithRetry], [WithMaxBodyBytes], [WithFailClosed] and
// [WithObserver]. Call Shutdown after the HTTP server has stopped.
func Handler(cb Callbacks, opts ...Option) *Receiver {
	r := &Receiver{
		cb: cb, store: new(Memory), concurrency: 32, backlog: 1024, attempts: 8, backoff: time.Second, maxBody: 1 << 20,
		observe: logProblems,
		tasks:   make(map[string]*task), lastClaims: make(map[string]*task), tails: make(map[string]*task),
	}
	for _, opt := range opts {
		opt.apply(r)
	}
	r.room, r.lobby = make(places, r.backlog), make(places, r.backlog)
	r.alive, r.cancel = context.WithCancelCause(context.Background())
	r.drained, r.drain = context.WithCancel(context.Background())
	if r.inbox != nil {
		r.store, r.behind = r.inbox, true
		r.sweep = time.AfterFunc(sweepEvery, r.readInbox) // not at once, since a reading uses r.sweep
		r.sweep.Reset(0)
	}
	return r
}

// Callbacks are the user's functions. Every field may be nil. They run concurrently, for different cases. The context
// keeps the values of the request, not its cancellation; an event that was read back from an Inbox has no request, so
// its context has no values. The context ends when that of Shutdown does, or when another takes over the Inbox. An
// error or a panic means: try again; for what can never succeed, return nil. env and the payload are read-only.
type Callbacks struct {
	CaseCompleted   func(ctx context.Context, env *Envelope, c *CaseCompleted) error
	CaseFailed      func(ctx context.Context, env *Envelope, c *CaseFailed) error
	CaseInputNeeded func(ctx context.Context, env *Envelope, c *CaseInputNeeded) error
	// Other gets what no field above took: an unknown type, a nil field, or data that does not fit its struct. If it is nil,
	// such data is given up at once, so that an Inbox keeps it for a newer version of this library; the others are done.
	Other func(ctx context.Context, env *Envelope) error
}

// Receiver is the http.Handler. It is safe for concurrent use. Handler makes it; the zero value is not usable.
type Receiver struct {
	cb          Callbacks
	store       Deduper
	inbox       Inbox // the store, where it is one
	tokens      [][sha256.Size]byte
	concurrency int
	backlog     int
	attempts    int
	backoff     time.Duration
	maxBody     int64
	failClosed  bool
	observe     func(context.Context, Observation)

	alive   context.Context // ends with Shutdown, or when the inbox is lost; so do the contexts of the callbacks
	cancel  context.CancelCauseFunc
	sweep   *time.Timer     // reads the inbox
	drained context.Context // ends when nothing is accepted any more, and neither a task nor a reading is left
	drain   context.CancelFunc
	room    places // of events in memory, or about to be: backlog
	lobby   places // of those that wait for room: as many

	mu         sync.Mutex // protects what follows, and every task
	closed     bool
	tasks      map[string]*task // by event id: those being decided and those in memory
	lastClaims map[string]*task // by case id: the last task of each case that is being decided, with an inbox
	tails      map[string]*task // by case id: the last task of each case that has any; the first leads to it by next
	ready      []*task          // those whose turn it is, in order
	running    int              // goroutines that run tasks, at most concurrency; and one for an abandon
	failed     int              // tasks that have failed; as many as backlog take no room

	behind   bool                // the inbox may have events that are not in memory: new ones stay there, behind them
	failing  bool                // the last reading of the inbox met an error
	reading  map[string]struct{} // the ids that ended during this reading; nil while there is none
	arrivals []*task             // accepted during this reading, to follow what it yields
}

// ServeHTTP answers 202 to a new event and 200 to a duplicate, before any callback finishes (promise 2), and 4xx or 503
// to what it refuses.
func (r *Receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	start := time.Now()
	body, err := r.read(w, req, start.Add(bodyTimeout))
	fresh, err := r.deliver(req.Context(), start, body, err)
	switch {
	case err != nil:
		refuse(w, req, err)
	case fresh:
		w.WriteHeader(http.StatusAccepted)
	default:
		w.WriteHeader(http.StatusOK)
	}
}

// Deliver takes an event without HTTP: from a poller, a queue, a replay. It keeps a copy of body, and sets no limit on
// its size. A nil error means what a 2xx means; fresh is false for a duplicate. The errors wrap ErrMalformed, ErrBusy,
// ErrClosed, or what the store returned. Only the values of ctx are used: its end does not stop the delivery.
func (r *Receiver) Deliver(ctx context.Context, body []byte) (fresh bool, err error) {
	return r.deliver(ctx, time.Now(), bytes.Clone(body), nil)
}

// Shutdown refuses new events and waits for those in hand: all that were accepted or, with an Inbox, only the running
// ones, since it keeps the others. When ctx ends it cancels the callbacks, reports what is left as Unfinished, and
// returns the error of ctx, at most 5 s later if the store is slow to record that. Call Shutdown after the HTTP
// server has stopped, and close the Inbox after that.
func (r *Receiver) Shutdown(ctx context.Context) error {
	r.mu.Lock()
	r.closed = true
	if r.inbox != nil {
		r.drop(false)
	}
	r.checkDrained()
	r.mu.Unlock()
	select {
	case <-r.drained.Done():
	case <-ctx.Done():
		if r.drained.Err() == nil {
			r.abandon(ctx.Err())
			return ctx.Err()
		}
	}
	return nil
}

// Option configures a Handler.
type Option struct{ apply func(*Receiver) }

func optionIf(valid bool, want string, apply func(*Receiver)) Option {
	if !valid {
		panic("offloadhook: " + want)
	}
	return Option{apply}
}

// WithDeduper sets what remembers the ids; the default is a new Memory. Next to WithInbox it changes nothing. It panics
// on an Inbox.
func WithDeduper(d Deduper) Option {
	_, isInbox := d.(Inbox)
	valid := d != nil && !isInbox
	return optionIf(valid, "WithDeduper wants a Deduper that is no Inbox", func(r *Receiver) { r.store = d })
}

// WithInbox sets what keeps the events durably, in place of a Deduper. It is an option of its own so that a wrapper
// around an Inbox cannot become a plain Deduper unnoticed.
func WithInbox(in Inbox) Option {
	return optionIf(in != nil, "WithInbox wants an Inbox", func(r *Receiver) { r.inbox = in })
}

// WithToken refuses requests that carry none of the tokens, as ?token=… in the URL, percent-encoded, or as
// Authorization: Bearer …. Several allow for rotation; none may be empty. The default is to accept every request.
func WithToken(tokens ...string) Option {
	var sums [][sha256.Size]byte
	for _, token := range tokens {
		sums = append(sums, sha256.Sum256([]byte(token)))
	}
	valid := len(tokens) > 0 && !slices.Contains(tokens, "")
	return optionIf(valid, "WithToken wants tokens that are not empty", func(r *Receiver) { r.tokens = sums })
}

// WithConcurrency sets how many callbacks run at once, at least 1; the default is 32.
func WithConcurrency(n int) Option {
	return optionIf(n > 0, "WithConcurrency wants at least 1", func(r *Receiver) { r.concurrency = n })
}

// WithBacklog sets how many accepted events are held in memory, running ones included, at least 1; the default is
// 1024. As many again may be held that have failed and will be tried again. Events that wait for an earlier one of their
// case take room, too, so a case that is stuck with as many holds up the others. When the backlog is full, an Inbox keeps
// what comes, in the order in which it was stored; with a plain Deduper up to n deliveries wait for room, 5 s at most.
// Those that wait in vain, and at once any beyond them, get ErrBusy, a 503.
func WithBacklog(n int) Option {
	return optionIf(n > 0, "WithBacklog wants at least 1", func(r *Receiver) { r.backlog = n })
}

// WithRetry sets how often a callback is called at most, and how long it rests after its first failure. The rest
// doubles with each failure, up to an hour, with a jitter of a quarter. The default of 8 and 1 s takes about two
// minutes; 1 means never retry. After the last attempt the event is given up; an Inbox brings it back until it is
// handled.
func WithRetry(attempts int, backoff time.Duration) Option {
	return optionIf(attempts > 0 && backoff >= 0, "WithRetry wants at least 1 attempt and no negative backoff",
		func(r *Receiver) { r.attempts, r.backoff = attempts, backoff })
}

// WithMaxBodyBytes sets the largest body that ServeHTTP takes, in bytes, at least 1; the default is 1 MiB.
func WithMaxBodyBytes(n int64) Option {
	return optionIf(n > 0, "WithMaxBodyBytes wants at least 1", func(r *Receiver) { r.maxBody = n })
}

// WithFailClosed answers 503 when a plain Deduper fails. The default is to accept the event and to handle it without
// the Deduper, because a refused event is lost. With an Inbox the answer is always 503.
func WithFailClosed() Option {
	return Option{func(r *Receiver) { r.failClosed = true }}
}

// WithObserver sets what is told of every outcome, in place of the default, which logs problems to slog.Default,
// without the bodies. f is called in line and concurrently, so that Handled may come before the Accepted of the same
// event, and GaveUp after the outcome of a redelivery; f must return quickly, not panic, and not deliver the event of
// a StoreFailed.
func WithObserver(f func(context.Context, Observation)) Option {
	return optionIf(f != nil, "WithObserver wants a function", func(r *Receiver) { r.observe = f })
}

// Observation is something that happened to an event, for logs, metrics and error reports. Envelope and Body are
// read-only, and may be kept.
type Observation struct {
	Outcome  Outcome
	Envelope *Envelope     // nil when the body held none
	Body     []byte        // the bytes received, as far as they were read
	Attempt  int           // 1 for the first call of the callback, 0 before
	Elapsed  time.Duration // to the answer (Accepted, Duplicate, Refused), or of the attempt
	Err      error
}

// Outcome says what happened.
type Outcome string

// The outcomes. After a StoreFailed of an event, Handled, Ignored and GaveUp may be told before the store records them.
const (
	Accepted    Outcome = "accepted"     // got a 202
	Duplicate   Outcome = "duplicate"    // got a 200
	Refused     Outcome = "refused"      // got a 4xx or a 503: the event is lost unless Body, if it was read, is kept
	Handled     Outcome = "handled"      // its callback returned nil; Err is set where the data did not fit
	Ignored     Outcome = "ignored"      // no callback takes its type
	Retrying    Outcome = "retrying"     // its callback failed and will be called again
	GaveUp      Outcome = "gave_up"      // its callback failed for the last time, or none takes its data: the id is open again
	Unfinished  Outcome = "unfinished"   // cut off by Shutdown or the loss of the inbox, or left waiting without an inbox
	StoreFailed Outcome = "store_failed" // the Deduper or Inbox failed; Envelope is nil when it was not about one event
)

// PanicError is the panic of a callback, as an error.
type PanicError struct {
	Value any
	Stack []byte
}

func (e *PanicError) Error() string {
	return fmt.Sprintf("offloadhook: callback panicked: %v", e.Value)
}

// Unwrap returns Value if that is an error, else nil.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// The errors of Deliver, which wraps them with detail. Test with errors.Is.
var (
	ErrMalformed = errors.New("offloadhook: malformed event") // it can never be accepted
	ErrBusy      = errors.New("offloadhook: no room")         // the backlog is full
	ErrClosed    = errors.New("offloadhook: closed")          // after Shutdown; from an Inbox: it is closed, or another's now
)

var (
	errGoexit   = errors.New("offloadhook: callback called runtime.Goexit")
	errPanicked = errors.New("offloadhook: the store panicked")
)

const (
	bodyTimeout  = 10 * time.Second // for a request's body to come in
	storeTimeout = 5 * time.Second  // for each call of the store
	roomTimeout  = 5 * time.Second  // for room in memory
	sweepEvery   = 10 * time.Second // between calls of Inbox.Pending
	storeRest    = time.Second      // after the store has failed for the first time
	longestRest  = time.Hour        // between two attempts
	doneAttempts = 8                // to record the end of an event in a plain Deduper
)

// logProblems is the default observer. It logs nothing of a body but its event_id.
func logProblems(ctx context.Context, o Observation) {
	fine := o.Outcome == Accepted || o.Outcome == Duplicate || o.Outcome == Handled || o.Outcome == Ignored
	if fine && o.Err == nil {
		return
	}
	attrs := []any{"outcome", o.Outcome, "attempt", o.Attempt, "error", o.Err}
	if o.Envelope != nil {
		attrs = append(attrs, "event_id", o.Envelope.EventID)
	}
	if p := (*PanicError)(nil); errors.As(o.Err, &p) {
		attrs = append(attrs, "stack", string(p.Stack))
	}
	slog.WarnContext(ctx, "offloadhook", attrs...)
}

// refusal is why a request was refused before its body was read whole.
type refusal int

func (status refusal) Error() string { return "offloadhook: " + http.StatusText(int(status)) }

// read returns the body of a request that may carry an event. The deadline is set before the checks, because net/http
// drains the body of a request that was refused unread.
func (r *Receiver) read(w http.ResponseWriter, req *http.Request, deadline time.Time) (body []byte, err error) {
	// Without a body, an expiring deadline would cancel the request. Server.ReadTimeout has set one that may be stricter.
	if req.ContentLength != 0 || req.ProtoMajor > 1 { // HTTP/2 has bodies behind a length of 0, and no such cancelling
		server, _ := req.Context().Value(http.ServerContextKey).(*http.Server)
		if server == nil || server.ReadTimeout <= 0 || server.ReadTimeout > bodyTimeout {
			// Recorders do not support it. It ends with the body, so nothing need be reset.
			_ = http.NewResponseController(w).SetReadDeadline(deadline)
		}
	}
	switch {
	case req.Method != http.MethodPost:
		return nil, refusal(http.StatusMethodNotAllowed)
	case len(r.tokens) > 0 && !r.authorized(req):
		return nil, refusal(http.StatusUnauthorized)
	case !isJSON(req.Header.Get("Content-Type")):
		return nil, refusal(http.StatusUnsupportedMediaType)
	case req.ContentLength > r.maxBody:
		return nil, refusal(http.StatusRequestEntityTooLarge)
	case req.Body == nil:
		return nil, nil
	}
	// A declared length is only a claim: the buffer follows what comes in.
	body = make([]byte, 0, 1+min(max(req.ContentLength, 511), 16<<10))
	for src := http.MaxBytesReader(w, req.Body, r.maxBody); err == nil; {
		var n int
		body = slices.Grow(body, 1)
		n, err = src.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
	}
	switch {
	case err == io.EOF:
		return body, nil
	case errors.As(err, new(*http.MaxBytesError)):
		return body, refusal(http.StatusRequestEntityTooLarge)
	case errors.Is(err, os.ErrDeadlineExceeded) || !time.Now().Before(deadline): // within trailers net/http hides it
		return body, refusal(http.StatusRequestTimeout)
	}
	return body, refusal(http.StatusBadRequest) // to return in silence would be a 200
}

// authorized reports whether req carries one of the tokens, in a time that tells nothing about them.
func (r *Receiver) authorized(req *http.Request) bool {
	scheme, bearer, _ := strings.Cut(req.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		bearer = ""
	}
	found := 0
	for _, candidate := range append(req.URL.Query()["token"], strings.TrimLeft(bearer, " ")) {
		sum := sha256.Sum256([]byte(candidate))
		for _, token := range r.tokens {
			found |= subtle.ConstantTimeCompare(token[:], sum[:])
		}
	}
	return found == 1
}

// isJSON reports whether a content type is JSON. A missing one passes: the body will tell.
func isJSON(contentType string) bool {
	media, _, _ := strings.Cut(strings.ToLower(contentType), ";")
	subtype, found := strings.CutPrefix(strings.TrimSpace(media), "application/")
	return contentType == "" || found && (subtype == "json" || strings.HasSuffix(subtype, "+json"))
}

// refuse writes the answer to a refused request. It carries no internal error and nothing of the body.
func refuse(w http.ResponseWriter, req *http.Request, err error) {
	status, reason := refusal(http.StatusServiceUnavailable), "offloadhook: the store failed"
	switch {
	case errors.As(err, &status):
		reason = err.Error()
		if req.ProtoMajor < 2 { // else it would end the connection that events of others share
			w.Header().Set("Connection", "close") // the body may be unread
		}
	case errors.Is(err, ErrMalformed):
		status, reason = http.StatusBadRequest, err.Error()
	case errors.Is(err, ErrBusy):
		reason = ErrBusy.Error()
	case errors.Is(err, ErrClosed):
		reason = ErrClosed.Error()
		w.Header().Set("Connection", "close")
	}
	switch status {
	case http.StatusMethodNotAllowed:
		w.Header().Set("Allow", http.MethodPost)
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", "Bearer")
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	}
	http.Error(w, reason, int(status))
}

// task is an event on its way from the claim to the record of its end.
type task struct {
	env     *Envelope
	ctx     context.Context // of the request, without its cancellation; Background for an event from the inbox
	caseID  string
	state   state
	decided chan struct{} // closed when err is set
	err     error         // why the event was not accepted

	next    *task // of the same case, to run after this one
	attempt int
	start   time.Time   // of the attempt
	timer   *time.Timer // ends the waiting; nil until it, or its Done, has failed
	told    bool        // it was reported as Unfinished
	ended   bool        // nothing is left to do but to record result
	result  error       // what Done is given
	records int         // how often Done has failed
}

type state uint8

const (
	deciding state = iota // the store is being asked, or room waited for
	arrived               // accepted while the inbox is read, to follow what that yields
	queued                // in memory, until its turn or the time for its next attempt comes
	running               // its callback runs, or its end is being recorded
	gone                  // no longer in memory
)

// deliver takes one delivery: parse, accept, observe. err is why its body could not be read.
func (r *Receiver) deliver(ctx context.Context, start time.Time, body []byte, err error) (fresh bool, _ error) {
	t := &task{ctx: context.WithoutCancel(ctx), decided: make(chan struct{})}
	o := Observation{Outcome: Refused, Body: slices.Clip(body), Err: err} // clipped, so that an append is nobody else's
	defer func() {
		o.Elapsed = time.Since(start)
		r.observe(t.ctx, o)
	}()
	if err == nil {
		o.Envelope, t.caseID, o.Err = parse(o.Body)
	}
	if o.Err == nil {
		t.env, o.Err = o.Envelope, errPanicked // unless accept returns
		fresh, o.Err = r.accept(t)
	}
	if fresh {
		o.Outcome = Accepted
	} else if o.Err == nil {
		o.Outcome = Duplicate
	}
	return fresh, o.Err
}

// accept claims the event of t and puts it where its turn will come. A delivery of the same id that comes meanwhile
// shares the outcome, whichever it is: none is answered before the claim is held (promise 3).
func (r *Receiver) accept(t *task) (fresh bool, err error) {
	r.mu.Lock()
	first, before, closed := r.tasks[t.env.EventID], r.lastClaims[t.caseID], r.closed
	if first == nil && !closed {
		r.tasks[t.env.EventID] = t
		if r.inbox != nil && t.caseID != "" {
			r.lastClaims[t.caseID] = t
		}
	}
	r.mu.Unlock()
	switch {
	case closed:
		return false, ErrClosed
	case first != nil:
		<-first.decided
		return false, first.err
	}
	err = errPanicked // unless the store returns
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if t.state == deciding {
			delete(r.tasks, t.env.EventID)
			r.checkDrained()
		}
		r.behind = r.behind || err != nil && r.inbox != nil // it may be there after all
		if r.lastClaims[t.caseID] == t {
			delete(r.lastClaims, t.caseID)
		}
		t.err = err
		close(t.decided)
	}()
	ctx, cancel := r.storeContext(t.ctx)
	defer cancel()
	fresh, err = r.store.Claim(ctx, t.env)
	if before != nil { // a replica that shares the inbox may have acknowledged that one before this one was sent
		select {
		case <-before.decided:
		case <-time.After(storeTimeout): // that claim may be what makes this delivery, and wait for it
		}
	}
	if err != nil {
		err = r.storeFailed(t, "claim", err)
		if r.inbox != nil {
			return false, err
		}
		if fresh = !r.failClosed; fresh {
			err, t.records = nil, doneAttempts-1 // one Done will do, for there may be no claim
		}
	}
	if fresh && r.inbox == nil {
		err = r.waitForRoom()
	}
	if fresh && err == nil {
		err = r.place(t)
	}
	if err != nil {
		_ = r.done(t.ctx, t, err) // after a failed claim too: it may have been recorded after all
	}
	return fresh && err == nil, err
}

// storeContext bounds a call of the store, unless that never waits for its context.
func (r *Receiver) storeContext(ctx context.Context) (context.Context, context.CancelFunc) {
	switch r.store.(type) {
	case *Memory, *Journal:
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, storeTimeout)
}

// done ends the claim of t.
func (r *Receiver) done(ctx context.Context, t *task, result error) error {
	ctx, cancel := r.storeContext(ctx)
	defer cancel()
	err := r.store.Done(ctx, t.env, result)
	if err != nil {
		err = r.storeFailed(t, "done", err)
	}
	return err
}

// storeFailed reports a failure of the store. If the inbox is closed or another's, that is the end.
func (r *Receiver) storeFailed(t *task, step string, err error) error {
	if errors.Is(err, ErrMalformed) {
		err = errors.New(err.Error()) // it is not the sender's fault, and not for the sender to read
	}
	err = fmt.Errorf("offloadhook: %s: %w", step, err)
	o, ctx := Observation{Outcome: StoreFailed, Err: err}, r.alive
	if t != nil {
		o.Envelope, o.Body, o.Attempt, ctx = t.env, t.env.Raw, t.attempt, t.ctx
	}
	r.observe(ctx, o)
	if r.inbox != nil && errors.Is(err, ErrClosed) {
		r.abandon(err)
	}
	return err
}

// places has an element for each place that is taken. Those who wait for one get it in turn.
type places chan struct{}

// take takes a place, if there is one.
func (p places) take() bool {
	select {
	case p <- struct{}{}:
		return true
	default:
		return false
	}
}

// waitForRoom takes room in memory for one event, as soon as there is any.
func (r *Receiver) waitForRoom() error {
	if r.room.take() {
		return nil
	}
	if !r.lobby.take() {
		return ErrBusy
	}
	defer func() { <-r.lobby }()
	ctx, cancel := context.WithTimeoutCause(r.alive, roomTimeout, ErrBusy)
	defer cancel()
	select {
	case r.room <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// place puts t, which is claimed, where its turn will come: into memory, or with an inbox behind what waits there. The
// inbox is the queue: what finds no room stays in it, and so does what comes after. mu is not held.
func (r *Receiver) place(t *task) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.inbox == nil && r.alive.Err() != nil:
		<-r.room
		return ErrClosed
	case r.inbox != nil && (r.closed || r.behind || len(r.room)+len(r.arrivals) >= r.backlog):
		r.behind = true
		r.checkWake()
	case r.reading != nil:
		t.state = arrived
		r.arrivals = append(r.arrivals, t)
	default:
		if r.inbox != nil {
			r.room.take() // there is some
		}
		r.enqueue(t)
	}
	return nil
}

// enqueue puts t behind the other events of its case (promise 5). mu is held.
func (r *Receiver) enqueue(t *task) {
	t.state = queued
	if t.caseID != "" {
		last := r.tails[t.caseID]
		r.tails[t.caseID] = t
		if last != nil {
			last.next = t
			return
		}
	}
	r.makeReady(t)
}

// makeReady lets t run as soon as concurrency allows. mu is held.
func (r *Receiver) makeReady(t *task) {
	r.ready = append(r.ready, t)
	if r.running < r.concurrency {
		r.running++
		go r.work()
	}
}

// work runs what is ready.
func (r *Receiver) work() {
	growStack()
	idle := false
	defer func() {
		if !idle { // a callback has called runtime.Goexit, which ends this goroutine
			go r.work()
		}
	}()
	for {
		r.mu.Lock()
		if idle = len(r.ready) == 0; idle {
			r.running--
			r.checkDrained()
			r.mu.Unlock()
			return
		}
		t := r.ready[0]
		r.ready[0] = nil
		r.ready = r.ready[1:]
		t.state = running
		if !t.ended {
			t.attempt++
			t.start = time.Now()
		}
		r.mu.Unlock()
		if t.ended {
			r.settle(t, r.record(t))
		} else {
			r.run(t)
		}
	}
}

// growStack makes room on the stack for the decoding of a payload at once, which would otherwise copy it several times.
//
//go:noinline
func growStack() {
	var room [12 << 10]byte
	runtime.KeepAlive(&room)
}

// run makes one attempt at t.
func (r *Receiver) run(t *task) {
	outcome, err := Retrying, errGoexit // unless the callback returns
	var drift error
	defer func() {
		if v := recover(); v != nil {
			err = &PanicError{v, debug.Stack()}
		}
		if outcome == Retrying && drift != nil {
			err = errors.Join(err, drift)
		}
		r.finish(t, Observation{outcome, t.env, t.env.Raw, t.attempt, time.Since(t.start), err})
	}()
	outcome, err = r.cb.call(&callbackContext{r.alive, t.ctx}, t.env, &drift)
}

// callbackContext has the end of a receiver and the values of a request.
type callbackContext struct {
	context.Context
	values context.Context
}

func (c *callbackContext) Value(key any) any {
	if v := c.Context.Value(key); v != nil { // what package context looks for, to spare each child a goroutine
		return v
	}
	return c.values.Value(key)
}

// call calls the callback for env. The outcome is Retrying if that failed. drift is set where the data does not fit.
func (cb *Callbacks) call(ctx context.Context, env *Envelope, drift *error) (outcome Outcome, err error) {
	var taken bool
	switch env.EventType {
	case TypeCaseCompleted:
		taken, *drift, err = callTyped(ctx, env, cb.CaseCompleted)
	case TypeCaseFailed:
		taken, *drift, err = callTyped(ctx, env, cb.CaseFailed)
	case TypeCaseInputNeeded:
		taken, *drift, err = callTyped(ctx, env, cb.CaseInputNeeded)
	}
	switch {
	case taken:
	case cb.Other != nil:
		err = cb.Other(ctx, env)
	case *drift != nil:
		return GaveUp, *drift // a newer version of this library may understand it
	default:
		return Ignored, nil
	}
	if err != nil {
		return Retrying, err
	}
	return Handled, *drift
}

func callTyped[T any](ctx context.Context, env *Envelope, f func(context.Context, *Envelope, *T) error) (
	taken bool, drift, err error) {
	payload, drift := decode[T](env)
	if drift != nil || f == nil {
		return false, drift, nil
	}
	return true, nil, f(ctx, env, payload)
}

// finish decides what follows an attempt at t.
func (r *Receiver) finish(t *task, o Observation) {
	r.mu.Lock()
	switch {
	case o.Outcome != Retrying:
	case r.alive.Err() != nil:
		o.Outcome = "" // abandon has reported it
	case r.closed && r.inbox != nil:
		o.Outcome, t.told = Unfinished, true // the inbox keeps it; abandon need not report it again
	case t.attempt == r.attempts:
		o.Outcome = GaveUp
	}
	t.ended = o.Outcome == Handled || o.Outcome == Ignored || o.Outcome == GaveUp
	r.mu.Unlock()
	if o.Outcome == GaveUp {
		t.result = o.Err
	}
	over := t.ended && r.record(t)
	if over && o.Outcome == GaveUp { // so that who is told can deliver it again
		defer r.observe(t.ctx, o)
	} else if o.Outcome != "" {
		r.observe(t.ctx, o)
	}
	r.settle(t, over)
}

// record tells the store how t ended, and reports whether that is over. If not it is tried again, never the callback.
func (r *Receiver) record(t *task) (over bool) {
	err := r.done(t.ctx, t, t.result)
	if err != nil {
		t.records++
	}
	return err == nil || r.inbox == nil && t.records == doneAttempts
}

// settle ends t, or lets it rest until the next attempt (promise 4). While it rests it takes no part of the concurrency
// and, up to a number, no room: it holds back the later events of its case, and nothing else unless those fill the
// backlog. mu is not held.
func (r *Receiver) settle(t *task, over bool) {
	r.mu.Lock()
	dead := r.alive.Err() != nil
	if over || dead || r.closed && r.inbox != nil && !t.ended { // Shutdown came meanwhile; the inbox keeps it
		r.forget(t)
		if t.next == nil {
			delete(r.tails, t.caseID)
		} else if t.next.state != gone {
			r.makeReady(t.next)
		}
	} else {
		pause := jitter(r.backoff, t.attempt, longestRest)
		if t.ended {
			pause = jitter(storeRest, t.records, sweepEvery)
		}
		t.state = queued
		if t.timer == nil {
			r.failed++
			if r.failed <= r.backlog {
				<-r.room
			}
		}
		t.timer = time.AfterFunc(pause, func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			if t.state != gone {
				r.makeReady(t)
			}
		})
	}
	r.checkWake()
	r.mu.Unlock()
	if dead && !t.ended && r.inbox == nil {
		_ = r.done(t.ctx, t, ErrClosed) // abandon came between; it has reported t
	}
}

// jitter returns a rest after the nth failure: first, doubled with each, up to limit, and a quarter more or less.
func jitter(first time.Duration, n int, limit time.Duration) time.Duration {
	d := first
	for ; n > 1 && 0 < d && d < limit; n-- {
		d *= 2
	}
	d = min(d, max(first, limit), math.MaxInt64/4)
	return d*3/4 + rand.N(d/2+1)
}

// forget takes t out of memory. mu is held.
func (r *Receiver) forget(t *task) {
	delete(r.tasks, t.env.EventID)
	if r.reading != nil {
		r.reading[t.env.EventID] = struct{}{}
	}
	if t.timer != nil {
		r.failed--
	}
	if t.state != arrived && (t.timer == nil || r.failed >= r.backlog) {
		<-r.room
	}
	t.state = gone
}

// checkWake asks for a reading of the inbox when there is room again: half of the backlog, so that a long inbox is not
// read anew for every event. mu is held.
func (r *Receiver) checkWake() {
	if r.behind && !r.failing && r.reading == nil && !r.closed && len(r.room) <= r.backlog/2 {
		r.sweep.Reset(0)
	}
}

// checkDrained ends a reading when no task is left to wait for, and drained after it. mu is held.
func (r *Receiver) checkDrained() {
	if r.closed && len(r.tasks) == 0 && r.running == 0 {
		if r.cancel(ErrClosed); r.reading == nil {
			r.drain()
		}
	}
}

// drop takes out of memory what does not run; unless all is true, not what only waits for its end to be recorded. mu is
// held.
func (r *Receiver) drop(all bool) (dropped []*task) {
	for _, t := range r.tasks {
		if t.state == arrived || t.state == queued && (all || !t.ended) {
			if t.timer != nil {
				t.timer.Stop()
			}
			r.forget(t)
			dropped = append(dropped, t)
		}
	}
	r.ready = slices.DeleteFunc(r.ready, func(t *task) bool { return t.state == gone })
	return dropped
}

// abandon cancels the callbacks and reports what nobody will finish.
func (r *Receiver) abandon(reason error) {
	r.mu.Lock()
	if r.alive.Err() != nil {
		r.mu.Unlock()
		return
	}
	r.closed = true
	r.cancel(ErrClosed)
	r.running++ // so that no other Shutdown returns nil before this has told what is left
	// An inbox keeps what waits, unless it is only to be recorded.
	waiting := slices.DeleteFunc(r.drop(true), func(t *task) bool { return r.inbox != nil && !t.ended })
	var cut []*task
	for _, t := range r.tasks {
		if t.state == running && !t.ended && !t.told {
			cut = append(cut, t)
		}
	}
	r.mu.Unlock()
	tell := func(t *task, elapsed time.Duration) {
		r.observe(t.ctx, Observation{Unfinished, t.env, t.env.Raw, t.attempt, elapsed, reason})
	}
	for _, t := range cut { // first, since a store may be slow
		tell(t, time.Since(t.start))
	}
	ctx, cancel := context.WithTimeout(context.Background(), storeTimeout)
	defer cancel()
	end := func(t *task) {
		if !t.ended {
			t.result = ErrClosed
		}
		if ctx.Err() == nil {
			_ = r.done(&callbackContext{ctx, t.ctx}, t, t.result)
		}
		if !t.ended {
			tell(t, 0)
		}
	}
	for some := range slices.Chunk(waiting, r.concurrency) {
		var ending sync.WaitGroup
		for _, t := range some {
			ending.Go(func() { end(t) })
		}
		ending.Wait()
	}
	r.mu.Lock()
	r.running--
	r.checkDrained()
	r.mu.Unlock()
}

// readInbox brings the events of the inbox into memory, as far as there is room, and in its order; what is accepted
// meanwhile follows. The next reading comes when there is room again, and after sweepEvery, so that what dead receivers
// left is found, and a lease renewed, even while there is no room.
func (r *Receiver) readInbox() {
	start := time.Now()
	ctx, cancel := context.WithTimeout(r.alive, sweepEvery)
	defer cancel()
	r.mu.Lock()
	if r.reading != nil || r.alive.Err() != nil {
		r.mu.Unlock()
		return
	}
	wasBehind := r.behind
	r.behind, r.reading = false, make(map[string]struct{})
	r.mu.Unlock()
	whole, failing := true, false
	var lost error
	var undecided []*task
	for env, err := range r.inbox.Pending(ctx) {
		if errors.Is(err, ErrClosed) {
			lost = err // told below, since the inbox may have to be free for what is to be recorded
			break
		}
		if err == nil {
			whole = r.readBack(env, start, &undecided)
		} else if failing = true; r.alive.Err() == nil {
			_ = r.storeFailed(nil, "pending", err)
		}
		if whole = whole && r.alive.Err() == nil; !whole {
			break
		}
	}
	if lost != nil && r.alive.Err() == nil {
		_ = r.storeFailed(nil, "pending", lost)
	}
	for _, t := range undecided { // not before, since the inbox may have to be free for the decision
		select {
		case <-t.decided:
		case <-ctx.Done():
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	passedOver := slices.ContainsFunc(undecided, func(t *task) bool { return t.state == deciding })
	r.behind = r.behind || !whole || passedOver || failing && (wasBehind || len(r.arrivals) > 0)
	for _, t := range r.arrivals {
		switch {
		case t.state != arrived: // Shutdown or abandon has dropped it
		case !r.behind && r.room.take():
			r.enqueue(t)
		default:
			r.behind = true
			r.forget(t) // it stays in the inbox
		}
	}
	r.reading, r.arrivals, r.failing = nil, nil, failing
	if failing {
		r.sweep.Reset(storeRest)
	} else {
		r.sweep.Reset(time.Until(start.Add(sweepEvery)))
		r.checkWake()
	}
	r.checkDrained()
}

// readBack takes an event that was read from the inbox into memory, if it is to be handled and not there, and reports
// whether to go on: there was room, and after an event that was taken, time. It passes over one that is being decided
// or has arrived, and then leaves the later ones of its case.
func (r *Receiver) readBack(env *Envelope, start time.Time, undecided *[]*task) (ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.tasks[env.EventID]
	_, ended := r.reading[env.EventID]
	if t != nil && (t.state == deciding || t.state == arrived) { // what has arrived follows this reading
		*undecided = append(*undecided, t)
	}
	if t != nil || ended {
		return true
	}
	copied := *env // the struct is the inbox's to use again
	_, caseID := scanData(env.Data, 0, nesting)
	t = &task{env: &copied, ctx: context.Background(), caseID: caseID, decided: make(chan struct{})}
	close(t.decided)
	if slices.ContainsFunc(*undecided, func(u *task) bool { return t.caseID != "" && t.caseID == u.caseID }) {
		r.behind = true
		return true
	}
	if r.closed || !r.room.take() {
		return false
	}
	r.tasks[env.EventID] = t
	r.enqueue(t)
	return time.Since(start) < sweepEvery/2 // lest the reading outlast its context
}
