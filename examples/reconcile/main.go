// Reconcile finds what the webhooks did not bring. Offload sends each event once, so one that was refused, or sent
// while nobody listened, is lost; the contract advises to poll important cases. Given their ids, one a line, this asks
// the API for each case, makes the event that Offload sent or would have sent for its present state, and delivers it.
// The event_id follows from the case, so what the webhook has brought is a duplicate, and what it has not is handled.
//
//	export OFFLOAD_API_URL=https://… OFFLOAD_API_KEY=…
//	go run ./examples/reconcile -dir /var/lib/reconcile/offload cases.txt                         one round
//	go run ./examples/reconcile -dir /var/lib/reconcile/offload -addr :8080 -every 10m cases.txt  beside the webhook
//
// OFFLOAD_TOKEN is the secret that the webhook URL carries; several, parted by commas, for rotation.
//
// A journal belongs to one process: to open it takes it over, with what waits in it, which worker.do would handle here.
// So do not run this on the journal of a server, neither beside it nor between two runs of it; let this serve the webhook
// itself, as in the second line, with your own work in worker.do, or copy reconcile.go into your server. When another
// process takes the journal over, this ends with exit status 3; to be started again it would take it back. With a store
// that replicas share it may be a program of its own, but it cannot know then what the replicas have given up: such an
// event would be replaced by the less that the API tells.
//
// What it cannot do: the API tells only the present state of a case. An event of an earlier state is gone, such as a
// question that has been answered since. A later update of a case is another event_id, so if Offload updates a case
// without sending an event, this makes one more event of a state that you know. And the API does not tell metadata and
// failureReason: the events made here lack them. That is why a case that was updated less than -min-age ago is left
// for the next round, by this machine's clock. To claim its event_id now would turn away the richer webhook that may be
// on its way.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"offloadhook"
)

func main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	err := run(context.Background(), os.Args[1:], os.Getenv, os.Stdin, os.Stdout, log)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		log.Error("exit", "error", err)
		os.Exit(status(err))
	}
}

// status tells a supervisor by 3 that to start this again would take the journal from the process that has it now.
func status(err error) int {
	if errors.Is(err, offloadhook.ErrClosed) {
		return 3
	}
	return 1
}

// retention is how long the journal remembers what was handled.
const retention = 30 * 24 * time.Hour

const usage = "usage: OFFLOAD_API_URL=… OFFLOAD_API_KEY=… [OFFLOAD_TOKEN=…] reconcile -dir DIR " +
	"[-addr ADDR] [-every PAUSE] [-min-age AGE] [-rate N] [file of case ids, one a line]"

// run is main with its surroundings as parameters.
func run(
	ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout io.Writer, log *slog.Logger,
) error {
	flags := flag.NewFlagSet("reconcile", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), usage)
		flags.PrintDefaults()
	}
	dir := flags.String("dir", "", "directory of the journal, which this takes over from a process that uses it")
	addr := flags.String("addr", "", "address on which to serve the webhook, at /offload (default: do not)")
	every := flags.Duration("every", 0, "pause between two rounds (default: one round)")
	minAge := flags.Duration("min-age", 5*time.Minute, "how long ago a case must have been updated")
	rate := flags.Float64("rate", 5, "requests to the API a second at most")
	if err := flags.Parse(args); err != nil {
		return err
	}
	base, key := getenv("OFFLOAD_API_URL"), getenv("OFFLOAD_API_KEY")
	u, err := url.Parse(base)
	tokens := strings.Split(getenv("OFFLOAD_TOKEN"), ",")
	switch {
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || key == "":
		return errors.New("OFFLOAD_API_URL and OFFLOAD_API_KEY must be set, the first to an http or https URL")
	case *dir == "" || flags.NArg() > 1 || !(*rate > 0) || *every < 0:
		return errors.New(usage)
	case *every > 0 && flags.NArg() == 0:
		return errors.New("-every needs a file, which is read anew for each round")
	case *addr != "" && *every == 0:
		return errors.New("-addr needs -every: after one round nobody would listen")
	case len(tokens) > 1 && slices.Contains(tokens, ""):
		return errors.New("OFFLOAD_TOKEN holds an empty token")
	case slices.ContainsFunc(append(tokens, key), func(s string) bool { return strings.TrimSpace(s) != s }):
		return errors.New("OFFLOAD_API_KEY or OFFLOAD_TOKEN begins or ends with white space") // a newline from a file
	}

	ids, err := readIDs(stdin, flags.Arg(0))
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM) // until now a signal harms nothing
	context.AfterFunc(ctx, stop)
	defer stop()
	// The address before the journal: a second start by mistake fails here, and takes nothing from the first.
	var listener net.Listener
	if *addr != "" {
		if listener, err = net.Listen("tcp", *addr); err != nil {
			return err
		}
		defer listener.Close()
	}
	journal, err := offloadhook.OpenJournal(*dir, retention)
	if err != nil {
		return err
	}
	work := worker{out: stdout}
	life, lost := context.WithCancelCause(ctx)
	defer lost(nil)
	r := &reconciler{
		api:    newAPI(base, key, *rate, http.DefaultTransport),
		minAge: *minAge,
		maxAge: retention - 24*time.Hour, // a day for clocks that differ
		log:    log,
	}
	observe := func(_ context.Context, o offloadhook.Observation) {
		r.observe(o)
		if o.Err == nil {
			return
		}
		id := ""
		if o.Envelope != nil {
			id = o.Envelope.EventID
		}
		log.Warn("offloadhook", "outcome", o.Outcome, "event_id", id, "error", o.Err)
		if o.Outcome == offloadhook.StoreFailed && errors.Is(o.Err, offloadhook.ErrClosed) {
			lost(o.Err) // another process has the journal
		}
	}
	opts := []offloadhook.Option{offloadhook.WithInbox(journal), offloadhook.WithObserver(observe)}
	if tokens[0] != "" {
		opts = append(opts, offloadhook.WithToken(tokens...))
	} else if listener != nil {
		log.Warn("no OFFLOAD_TOKEN: whoever finds the URL can forge events")
	}
	receiver := offloadhook.Handler(offloadhook.Callbacks{Other: work.do}, opts...) // it needs no typed payload
	stopServing := func() {}
	if listener != nil {
		stopServing = serve(listener, receiver, log, lost)
	}
	r.deliver = receiver.Deliver
	for {
		if err == nil {
			err = r.round(life, ids)
		}
		if *every == 0 || errors.Is(err, offloadhook.ErrClosed) {
			break
		}
		if err != nil && life.Err() == nil {
			log.Error("not all is reconciled", "error", err)
		}
		if err = nil; sleep(life, *every) != nil {
			break
		}
		ids, err = readIDs(nil, flags.Arg(0))
	}
	if ctx.Err() == nil {
		err = errors.Join(err, context.Cause(life))
	}
	if *every == 0 {
		err = errors.Join(err, settle(ctx, journal))
	}
	// The order matters: first no more requests, then no more callbacks, then no more journal.
	stopServing()
	deadline, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	err = errors.Join(err, receiver.Shutdown(deadline), journal.Close())
	failing := 0
	r.failing.Range(func(_, _ any) bool { failing++; return true })
	if *every == 0 && failing > 0 {
		err = errors.Join(err, fmt.Errorf("not handled, and kept in the journal: %d failing events", failing))
	}
	return err
}

// readIDs returns the ids in the file, or in stdin when there is no file.
func readIDs(stdin io.Reader, file string) (ids []string, err error) {
	in := stdin
	if file != "" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		if id := strings.TrimSpace(lines.Text()); id != "" && !strings.HasPrefix(id, "#") {
			ids = append(ids, id)
		}
	}
	return ids, lines.Err()
}

// round goes once through the ids.
func (r *reconciler) round(ctx context.Context, ids []string) error {
	t, err := r.run(ctx, ids)
	asked := t.repaired + t.known + t.young + t.old + t.none + t.failed
	r.log.Info("reconciled", "cases", len(ids), "asked", asked, "repaired", t.repaired, "known", t.known,
		"too_young", t.young, "too_old", t.old, "no_event", t.none, "failed", t.failed)
	if err == nil && t.failed > 0 {
		err = fmt.Errorf("%d cases could not be asked for or delivered", t.failed)
	}
	return err
}

// settle waits until the journal holds nothing that is to be handled. What was given up stays in it for later. An error
// of Pending that is met here never reaches the observer, so it is that of the program.
func settle(ctx context.Context, journal offloadhook.Inbox) error {
	for {
		waiting := false
		for _, err := range journal.Pending(ctx) {
			if err != nil {
				return err
			}
			waiting = true
			break
		}
		if !waiting {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.New("interrupted: the journal keeps what waits")
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// serve serves the webhook until stop is called. It calls lost if the server stops before that.
func serve(
	listener net.Listener, receiver http.Handler, log *slog.Logger, lost context.CancelCauseFunc,
) (stop func()) {
	mux := http.NewServeMux()
	mux.Handle("/offload", receiver)
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       11 * time.Minute, // longer than a proxy keeps its connections
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			lost(err)
		}
	})
	log.Info("listening", "addr", listener.Addr().String())
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			log.Warn("requests were cut off", "error", err)
			server.Close()
		}
		serving.Wait()
	}
}

// worker writes each event as a line of JSON. Put your own work here.
type worker struct {
	mu  sync.Mutex // protects out
	out io.Writer
}

func (w *worker) do(_ context.Context, env *offloadhook.Envelope) error {
	var line bytes.Buffer
	if err := json.Compact(&line, env.Raw); err != nil {
		return err
	}
	line.WriteByte('\n')
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := w.out.Write(line.Bytes())
	return err
}
