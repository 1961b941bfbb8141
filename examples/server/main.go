// Server is a receiver as it runs in production: a journal, a token, timeouts, logs, counters, health checks, and a
// shutdown in the right order. What it does with an event is to forward it to an internal URL; put your own work there.
//
//	export OFFLOAD_TOKEN=a-long-secret
//	go run ./examples/server -dir /var/lib/myapp/offload -forward http://127.0.0.1:9000/
//	go run ./examples/send
//
// Every flag can be given as an environment variable: -dir as OFFLOAD_DIR. Give the token so, because other users of a
// machine can read the arguments of a process. The webhook URL for Offload is https://your.host/offload?token=… behind
// a proxy that ends TLS.
//
//	/offload     the webhook
//	/healthz     200 while the process runs
//	/readyz      200, and 503 once another process has taken the journal over
//	/debug/vars  how often each outcome was observed; let the proxy keep it inside
package main

import (
	"bytes"
	"context"
	"errors"
	"expvar"
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
	"sync/atomic"
	"syscall"
	"time"

	"offloadhook"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once; the journal allows that
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	err := run(ctx, os.Args[1:], os.Getenv, log)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		log.Error("exit", "error", err)
		os.Exit(1)
	}
}

type config struct {
	addr    string
	dir     string
	tokens  []string
	forward string
	drain   time.Duration
}

func parse(args []string, getenv func(string) string) (config, error) {
	var cfg config
	flags := flag.NewFlagSet("server", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: server -dir DIR [flags]; each may be given as in OFFLOAD_DIR=DIR, too")
		flags.PrintDefaults()
	}
	flags.StringVar(&cfg.addr, "addr", "127.0.0.1:8080", "address to listen on")
	flags.StringVar(&cfg.dir, "dir", "", "directory of the journal, on a disk that outlives the process")
	token := flags.String("token", "", "secret that the webhook URL carries; several, parted by commas, for rotation")
	flags.StringVar(&cfg.forward, "forward", "", "URL to POST each event to; without one they are only logged")
	flags.DurationVar(&cfg.drain, "drain", 20*time.Second,
		"how long callbacks may go on after the last request; SIGTERM gives requests 10s")
	if err := flags.Parse(args); err != nil {
		return config{}, err
	}
	given := make(map[string]bool)
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	var err error
	flags.VisitAll(func(f *flag.Flag) {
		name := "OFFLOAD_" + strings.ToUpper(f.Name)
		if value := getenv(name); value != "" && !given[f.Name] {
			if e := flags.Set(f.Name, value); e != nil {
				err = fmt.Errorf("%s: %w", name, e)
			}
		}
	})
	switch {
	case err != nil:
		return config{}, err
	case flags.NArg() > 0:
		return config{}, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case cfg.dir == "":
		return config{}, errors.New("-dir is missing")
	case cfg.addr == "": // any free port, so that a second start by mistake would take the journal over
		return config{}, errors.New("-addr is empty")
	}
	if *token != "" {
		// Now, not when the journal is taken over. A newline comes with a secret that is read from a file.
		cfg.tokens = strings.Split(*token, ",")
		if slices.ContainsFunc(cfg.tokens, func(t string) bool { return t == "" || strings.TrimSpace(t) != t }) {
			return config{}, errors.New("-token holds an empty token, or white space beside one")
		}
	}
	u, err := url.Parse(cfg.forward)
	if cfg.forward != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "") {
		return config{}, errors.New("-forward is not an http or https URL") // which may hold a secret
	}
	return cfg, nil
}

// run serves until ctx ends.
func run(ctx context.Context, args []string, getenv func(string) string, log *slog.Logger) error {
	cfg, err := parse(args, getenv)
	if err != nil {
		return err
	}
	// The address before the journal: a second start by mistake fails here, and takes nothing from the first.
	listener, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return err
	}
	defer listener.Close()
	journal, err := offloadhook.OpenJournal(cfg.dir, 0)
	if err != nil {
		return err
	}

	app := &app{log: log, forwardURL: cfg.forward, client: newClient()}
	opts := []offloadhook.Option{offloadhook.WithInbox(journal), offloadhook.WithObserver(app.observe)}
	if len(cfg.tokens) > 0 {
		opts = append(opts, offloadhook.WithToken(cfg.tokens...))
	} else {
		log.Warn("no -token: whoever finds the URL can forge events")
	}
	receiver := offloadhook.Handler(app.callbacks(), opts...)
	server := &http.Server{
		Handler:           app.routes(receiver),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		WriteTimeout:      30 * time.Second, // counts from the end of the header: the body, the claim and the answer
		IdleTimeout:       11 * time.Minute, // longer than a proxy keeps its connections
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	log.Info("listening", "addr", listener.Addr().String(), "dir", cfg.dir)

	select {
	case err = <-served: // without having been told to
	case <-ctx.Done():
		log.Info("shutting down")
	}
	// The order matters: first no more requests, then no more callbacks, then no more journal.
	deadline, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if e := server.Shutdown(deadline); e != nil {
		log.Warn("requests were cut off", "error", e)
		server.Close()
	}
	deadline, cancel = context.WithTimeout(context.Background(), cfg.drain)
	defer cancel()
	if e := receiver.Shutdown(deadline); e != nil {
		log.Warn("callbacks were cut off: they run again at the next start", "error", e)
	}
	return errors.Join(err, journal.Close())
}

func newClient() *http.Client {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 32 // as many as there are callbacks at once
	return &http.Client{
		Timeout:   30 * time.Second,
		Transport: transport,
		// A redirect is not a 2xx, and net/http would follow most of them with a GET, without the event.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

type app struct {
	log        *slog.Logger
	forwardURL string
	client     *http.Client
	counters   expvar.Map
	lost       atomic.Bool // the journal belongs to another process now
}

func (a *app) routes(receiver http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/offload", receiver)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "ok\n")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if a.lost.Load() {
			http.Error(w, "the journal is lost", http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "ready\n")
	})
	// Not expvar.Handler, which shows the command line too, and with it perhaps the token.
	mux.HandleFunc("GET /debug/vars", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, a.counters.String())
	})
	return mux
}

// callbacks is where your own work goes. It may run again after a crash, so it has to be idempotent by env.EventID.
func (a *app) callbacks() offloadhook.Callbacks {
	return offloadhook.Callbacks{
		CaseCompleted: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseCompleted) error {
			return a.forward(ctx, env)
		},
		CaseFailed: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseFailed) error {
			return a.forward(ctx, env)
		},
		CaseInputNeeded: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseInputNeeded) error {
			return a.forward(ctx, env)
		},
		Other: a.forward, // types and fields that this version of the library does not know
	}
}

// forward posts the event as it was received. An error makes the receiver try again.
func (a *app) forward(ctx context.Context, env *offloadhook.Envelope) error {
	if a.forwardURL == "" {
		return nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.forwardURL, bytes.NewReader(env.Raw))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", env.EventID)
	resp, err := a.client.Do(req)
	if e := (*url.Error)(nil); errors.As(err, &e) {
		return fmt.Errorf("forward: %w", e.Err) // without the URL, which may hold a secret
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // to its end, so that the connection is used again
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("forward: %s", resp.Status)
	}
	return nil
}

// observe counts and logs. It logs nothing of a payload: that is customers' data.
func (a *app) observe(ctx context.Context, o offloadhook.Observation) {
	a.counters.Add(string(o.Outcome), 1)
	if o.Outcome == offloadhook.StoreFailed && errors.Is(o.Err, offloadhook.ErrClosed) {
		a.lost.Store(true)
	}
	level := slog.LevelWarn
	switch o.Outcome {
	case offloadhook.Accepted, offloadhook.Duplicate:
		level = slog.LevelDebug
	case offloadhook.Handled, offloadhook.Ignored:
		if o.Err == nil { // else the data did not fit its struct
			level = slog.LevelInfo
		}
	case offloadhook.GaveUp, offloadhook.StoreFailed:
		level = slog.LevelError
	}
	attrs := []slog.Attr{slog.String("outcome", string(o.Outcome)), slog.Duration("elapsed", o.Elapsed)}
	if o.Envelope != nil {
		// Only the id has a limit to its length.
		t := fmt.Sprintf("%.64s", o.Envelope.EventType)
		attrs = append(attrs, slog.String("event_id", o.Envelope.EventID), slog.String("type", t))
	}
	if o.Attempt > 0 {
		attrs = append(attrs, slog.Int("attempt", o.Attempt))
	}
	if o.Err != nil {
		attrs = append(attrs, slog.String("error", o.Err.Error()))
	}
	if p := (*offloadhook.PanicError)(nil); errors.As(o.Err, &p) {
		attrs = append(attrs, slog.String("stack", string(p.Stack)))
	}
	a.log.LogAttrs(ctx, level, "event", attrs...)
}
