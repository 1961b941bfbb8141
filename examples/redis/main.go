// Redis is examples/server on a Redis that several replicas share, in place of a journal. Each replica runs this
// program; any of them takes an event, and none is lost with it. Put your own work into callbacks.
//
//	OFFLOAD_REDIS=redis://user:password@host:6379/0 OFFLOAD_TOKEN=a-long-secret go run .
//
//	/offload  the webhook
//	/healthz  200 while the process runs
//	/readyz   200 while it reaches Redis
//
// It does not start on a Redis whose settings would lose what it has acknowledged: see the README.
package main

import (
	"context"
	"errors"
	"flag"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"offloadhook"
	"offloadhook/examples/redis/redisinbox"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "address to listen on")
	drain := flag.Duration("drain", 20*time.Second, "how long callbacks may go on after SIGTERM")
	retention := flag.Duration("retention", 30*24*time.Hour, "how long the ids of handled events are remembered")
	allowVolatile := flag.Bool("allow-volatile", false, "use a Redis, too, that may lose what it has acknowledged")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once; Redis allows that
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	slog.SetDefault(log) // for what the receiver logs
	if err := run(ctx, log, *addr, *drain, *retention, *allowVolatile); err != nil {
		log.Error("exit", "error", err)
		os.Exit(1)
	}
}

// run serves until ctx ends.
func run(ctx context.Context, log *slog.Logger, addr string, drain, retention time.Duration, allowVolatile bool) error {
	url := os.Getenv("OFFLOAD_REDIS") // not a flag: others can read the arguments of a process
	if url == "" {
		return errors.New("OFFLOAD_REDIS is not set")
	}
	var opts []offloadhook.Option
	if token := os.Getenv("OFFLOAD_TOKEN"); token != "" {
		tokens := strings.Split(token, ",")
		if slices.ContainsFunc(tokens, func(t string) bool { return t == "" || strings.TrimSpace(t) != t }) {
			return errors.New("OFFLOAD_TOKEN holds an empty token, or white space beside one")
		}
		opts = append(opts, offloadhook.WithToken(tokens...))
	} else {
		log.Warn("no OFFLOAD_TOKEN: whoever finds the URL can forge events")
	}
	// The address before the store: a second start by mistake fails here, and brings back nothing that rests.
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer listener.Close()
	opening, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	inbox, err := redisinbox.Open(opening, url, retention)
	if errors.Is(err, redisinbox.ErrVolatile) && allowVolatile {
		log.Warn("an acknowledged event may be lost", "error", err)
		inbox, err = redisinbox.OpenVolatile(opening, url, retention)
	}
	if err != nil {
		return err
	}
	defer inbox.Close() // last, when nothing uses it any more

	receiver := offloadhook.Handler(callbacks(log), append(opts, offloadhook.WithInbox(inbox))...)
	inbox.Forward(receiver.Deliver)

	mux := http.NewServeMux()
	mux.Handle("/offload", receiver)
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, req *http.Request) {
		ctx, cancel := context.WithTimeout(req.Context(), time.Second)
		defer cancel()
		if err := inbox.Ready(ctx); err != nil {
			http.Error(w, "Redis is away", http.StatusServiceUnavailable)
		}
	})
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       11 * time.Minute, // longer than a proxy keeps its connections
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	log.Info("listening", "addr", listener.Addr().String())

	select {
	case err = <-served: // without having been told to
	case <-ctx.Done():
		log.Info("shutting down")
	}
	// The order matters: first no more requests, then no more callbacks, then no more Redis.
	deadline, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if e := server.Shutdown(deadline); e != nil {
		log.Warn("requests were cut off", "error", e)
		server.Close()
	}
	deadline, cancel = context.WithTimeout(context.Background(), drain)
	defer cancel()
	if e := receiver.Shutdown(deadline); e != nil {
		log.Warn("callbacks were cut off: another replica runs them again", "error", e)
	}
	return err
}

// callbacks is where your own work goes. It may run again after a crash, so it has to be idempotent by env.EventID.
func callbacks(log *slog.Logger) offloadhook.Callbacks {
	return offloadhook.Callbacks{
		CaseCompleted: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseCompleted) error {
			log.Info("completed", "event_id", env.EventID, "case", c.CaseID)
			return nil
		},
		CaseFailed: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseFailed) error {
			log.Info("failed", "event_id", env.EventID, "case", c.CaseID, "status", c.ResultStatus)
			return nil
		},
		CaseInputNeeded: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseInputNeeded) error {
			log.Info("input needed", "event_id", env.EventID, "case", c.CaseID, "request", c.InputRequestID)
			return nil
		},
		Other: func(ctx context.Context, env *offloadhook.Envelope) error { // what this version does not know
			log.Warn("other", "event_id", env.EventID, "type", env.EventType)
			return nil
		},
	}
}
