// Send plays Offload's part while you develop a receiver: it sends events to a URL, one POST for each, and takes any
// 2xx for success. As the contract says, it never sends again what was refused.
//
//	go run ./examples/send                                         the fixtures, once each, as they are
//	go run ./examples/send -type case.failed -case case_42         one event made from a fixture
//	go run ./examples/send -n 10000 -c 32 -duplicate 10% -shuffle  a load of events, each of a case of its own
//	go run ./examples/send event.json broken.json                  files, byte for byte
//
// Events that it makes have ids like Offload's, of the present time; the fixtures and files keep theirs, so that they
// are duplicates when sent again. Without -url it sends to http://127.0.0.1:8080/offload. It sends to another machine
// only when told -remote. Without -token, and without a token in -url, it sends the first one of the environment's
// OFFLOAD_TOKEN, where other users of the machine cannot read it. It exits with 1 if anything was refused or not answered.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"offloadhook"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	context.AfterFunc(ctx, stop) // the second interrupt does not wait for the requests under way
	terminal := false
	if info, err := os.Stdout.Stat(); err == nil {
		terminal = info.Mode()&os.ModeCharDevice != 0
	}
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr, terminal))
}

// run is main with its surroundings as parameters. It returns the exit status.
func run(
	ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer, terminal bool,
) int {
	cfg, err := parse(args, getenv, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "send:", err)
		return 2
	}
	events, err := newSource(cfg, time.Now())
	if err != nil {
		fmt.Fprintln(stderr, "send:", err)
		return 2
	}
	t := newTally(events.plan(cfg.duplicate, cfg.shuffle), stdout)
	t.send(ctx, cfg, events, terminal)
	t.summary()
	if t.refused > 0 || t.done < t.total {
		return 1
	}
	return 0
}

type config struct {
	url       string // with the token
	eventType string
	caseID    string
	n         int
	clients   int
	rate      float64
	duplicate float64
	shuffle   bool
	verbose   bool
	files     []string
}

func parse(args []string, getenv func(string) string, stderr io.Writer) (config, error) {
	var cfg config
	flags := flag.NewFlagSet("send", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // run prints the error
	target := flags.String("url", "http://127.0.0.1:8080/offload", "where to send")
	token := flags.String("token", "",
		"added to the URL as ?token=…, where alone a webhook URL can carry a secret (default: the first of OFFLOAD_TOKEN)")
	remote := flags.Bool("remote", false, "allow a URL of another machine")
	flags.StringVar(&cfg.eventType, "type", "", "make events of this type, known or not")
	flags.StringVar(&cfg.caseID, "case", "", "make events of this case, each later than the one before")
	flags.IntVar(&cfg.n, "n", 0, "how many events to make from the fixtures or files (default: as they are, once each)")
	flags.IntVar(&cfg.clients, "c", 1, "how many requests to have under way at once; more than 1 may change the order")
	flags.Float64Var(&cfg.rate, "rate", 0, "requests a second at most (default: as fast as they are answered)")
	flags.Func("duplicate", "share of the events to send twice, as in 10%", func(s string) error {
		share, err := strconv.ParseFloat(strings.TrimSuffix(s, "%"), 64)
		if err != nil || !strings.HasSuffix(s, "%") || !(0 <= share && share <= 100) {
			return errors.New("want a percentage from 0% to 100%")
		}
		cfg.duplicate = share / 100
		return nil
	})
	flags.BoolVar(&cfg.shuffle, "shuffle", false, "send in random order")
	flags.BoolVar(&cfg.verbose, "v", false, "print a line for each request: the status and the event_id")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			flags.SetOutput(stderr)
			fmt.Fprintln(stderr, "usage: send [flags] [file ...]")
			flags.PrintDefaults()
		}
		return config{}, err
	}
	cfg.files = flags.Args()
	switch {
	case cfg.n < 0 || cfg.n > 10_000_000:
		return config{}, errors.New("-n must be from 0 to 10000000")
	case cfg.clients < 1 || cfg.clients > 1000:
		return config{}, errors.New("-c must be from 1 to 1000")
	case !(cfg.rate >= 0):
		return config{}, errors.New("-rate must not be negative")
	case len(cfg.files) > 0 && cfg.eventType != "":
		return config{}, errors.New("-type makes events, but files hold theirs: use one of the two")
	}
	usual, _, _ := strings.Cut(getenv("OFFLOAD_TOKEN"), ",")
	var err error
	cfg.url, err = checkURL(*target, *token, usual, *remote)
	return cfg, err
}

// checkURL returns the URL with the token, or with the usual one where both have none. It does not resolve names: the
// only one that is this machine by definition is localhost.
func checkURL(target, token, usual string, remote bool) (string, error) {
	u, err := url.Parse(target)
	if e := (*url.Error)(nil); errors.As(err, &e) {
		return "", fmt.Errorf("-url: %w", e.Err) // without the URL, which may hold a secret
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return "", errors.New("-url must begin with http:// or https://")
	}
	if u.User != nil {
		return "", errors.New("a URL with a user name is one that Offload refuses: use -token")
	}
	host := u.Hostname()
	if ip := net.ParseIP(host); !remote && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return "", fmt.Errorf("%s is not this machine: say -remote to send to it", host)
	}
	query := u.Query()
	if !query.Has("token") {
		token = cmp.Or(token, usual)
	}
	if token != "" {
		query.Set("token", token)
		u.RawQuery = query.Encode()
	}
	return u.String(), nil
}

// source holds what to send. Its methods are safe for concurrent use.
type source struct {
	bodies [][]byte // what to send, or to make events from
	n      int      // events

	made   bool // events are made, not sent as they are
	of     []template
	caseID string // of all events; "" for a case each
	run    uint64 // sets the cases of this run apart
	start  offloadhook.Millis
}

// template is what made events are made from.
type template struct {
	eventType offloadhook.EventType
	data      map[string]json.RawMessage
}

func newSource(cfg config, now time.Time) (*source, error) {
	s := &source{
		caseID: cfg.caseID,
		made:   cfg.n > 0 || cfg.eventType != "" || cfg.caseID != "",
		run:    rand.Uint64(),
		start:  offloadhook.Millis(now.UnixMilli()),
	}
	for _, name := range cfg.files {
		body, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		s.bodies = append(s.bodies, body)
	}
	if len(cfg.files) == 0 {
		names, err := fs.Glob(offloadhook.Fixtures, "testdata/*.json")
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			body, err := offloadhook.Fixtures.ReadFile(name)
			if err != nil {
				return nil, err
			}
			s.bodies = append(s.bodies, body)
		}
	}
	s.n = cmp.Or(cfg.n, len(s.bodies))
	if !s.made {
		return s, nil
	}
	for _, body := range s.bodies {
		env, err := offloadhook.ParseEnvelope(body)
		if err != nil {
			return nil, fmt.Errorf("cannot make events from this: %w", err)
		}
		t := template{eventType: env.EventType}
		if err := json.Unmarshal(env.Data, &t.data); err != nil {
			return nil, fmt.Errorf("cannot make events from the data of %s: %w", env.EventID, err)
		}
		s.of = append(s.of, t)
	}
	if cfg.eventType != "" {
		wanted := offloadhook.EventType(cfg.eventType)
		s.of = slices.DeleteFunc(s.of, func(t template) bool { return t.eventType != wanted })
		if len(s.of) == 0 { // what a receiver must expect of a sender that is newer than itself
			s.of = []template{{eventType: wanted}}
		}
		s.n = max(cfg.n, 1)
	}
	return s, nil
}

// plan returns the events to send, by number, the duplicates among them.
func (s *source) plan(duplicate float64, shuffle bool) []int {
	var plan []int
	owed := 0.0
	for i := range s.n {
		plan = append(plan, i)
		if owed += duplicate; owed > 1-1e-9 { // a sum of tenths falls short of 1
			owed--
			plan = append(plan, i)
		}
	}
	if shuffle {
		rand.Shuffle(len(plan), func(i, j int) { plan[i], plan[j] = plan[j], plan[i] })
	}
	return plan
}

// body returns the body of event number i, always the same for the same i.
func (s *source) body(i int) ([]byte, error) {
	if !s.made {
		return s.bodies[i], nil
	}
	t := s.of[i%len(s.of)]
	id := s.caseID
	if id == "" { // in the form of a UUID, like Offload's
		r := s.run
		id = fmt.Sprintf("%08x-%04x-4%03x-8%03x-%012x", r>>32, r>>16&0xffff, r>>4&0xfff, r&0xf, i)
	}
	quoted, err := json.Marshal(id)
	if err != nil {
		return nil, err
	}
	data := maps.Clone(t.data)
	if data == nil {
		data = make(map[string]json.RawMessage)
	}
	data["caseId"] = quoted
	raw, err := json.Marshal(data)
	if err != nil {
		return nil, err
	}
	at := s.start + offloadhook.Millis(i)
	return json.Marshal(offloadhook.Envelope{
		EventID:   offloadhook.EventID(id, t.eventType, at),
		EventType: t.eventType,
		Timestamp: at,
		Data:      raw,
	})
}

// tally counts the answers.
type tally struct {
	plan  []int
	total int
	start time.Time
	out   io.Writer

	mu        sync.Mutex // protects what follows
	done      int
	refused   int
	answers   map[string]int // by status, or by the reason for there being none
	latencies []time.Duration
	reasons   []string // of the first refusals
}

func newTally(plan []int, out io.Writer) *tally {
	return &tally{plan: plan, total: len(plan), start: time.Now(), out: out, answers: make(map[string]int)}
}

// send sends the plan. When ctx ends it sends no more and waits for the requests under way, because a request that is
// broken off may still have been accepted.
func (t *tally) send(ctx context.Context, cfg config, events *source, terminal bool) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = cfg.clients
	defer transport.CloseIdleConnections()
	client := &http.Client{
		Timeout:   30 * time.Second,
		Transport: transport,
		// A redirect is not a 2xx, and might lead to another machine.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	reporting, stop := context.WithCancel(context.Background())
	var reporter sync.WaitGroup
	if !cfg.verbose { // its lines show the progress
		reporter.Go(func() { t.report(reporting, terminal) })
	}
	next := make(chan int)
	var workers sync.WaitGroup
	for range cfg.clients {
		workers.Go(func() {
			for i := range next {
				body, err := events.body(i)
				status, reason := "", ""
				begin := time.Now()
				if err == nil {
					status, reason, err = post(client, cfg.url, body)
				}
				t.count(body, status, reason, err, time.Since(begin), cfg.verbose)
			}
		})
	}
	pace(ctx, t.plan, cfg.rate, next)
	workers.Wait()
	stop()
	reporter.Wait()
}

// pace passes on the plan, at most rate a second, until ctx ends, and closes next.
func pace(ctx context.Context, plan []int, rate float64, next chan<- int) {
	defer close(next)
	start := time.Now()
	for k, i := range plan {
		if rate > 0 {
			seconds := min(float64(k)/rate, 1e9) // a Duration holds nine times that
			due := time.NewTimer(time.Until(start.Add(time.Duration(seconds * float64(time.Second)))))
			select {
			case <-due.C:
			case <-ctx.Done():
				due.Stop()
				return
			}
		}
		select {
		case next <- i:
		case <-ctx.Done():
			return
		}
	}
}

// post sends one body, once. It returns the status line and what the answer says.
func post(client *http.Client, url string, body []byte) (status, reason string, err error) {
	resp, err := client.Post(url, "application/json", bytes.NewReader(body))
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	// To its end, so that the connection is used again. The status alone counts, whatever becomes of the rest.
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return resp.Status, strings.TrimSpace(string(text[:min(len(text), 200)])), nil
}

func (t *tally) count(body []byte, status, reason string, err error, took time.Duration, verbose bool) {
	id := "(no event_id)"
	if env, err := offloadhook.ParseEnvelope(body); err == nil {
		id = env.EventID
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.done++
	if err != nil {
		if e := (*url.Error)(nil); errors.As(err, &e) {
			err = e.Err // without the URL, which holds the token
		}
		status, reason = "no answer", err.Error()
	} else {
		t.latencies = append(t.latencies, took)
	}
	t.answers[status]++
	if !strings.HasPrefix(status, "2") {
		t.refused++
		if len(t.reasons) < 5 {
			t.reasons = append(t.reasons, fmt.Sprintf("%s: %s: %q", id, status, reason))
		}
	}
	if verbose {
		fmt.Fprintln(t.out, status, id)
	}
}

// report shows how far it is, until ctx ends: on a terminal in one line that is written over, elsewhere in plain lines.
func (t *tally) report(ctx context.Context, terminal bool) {
	every, format := 5*time.Second, "%s\n"
	if terminal {
		every, format = 200*time.Millisecond, "\r\x1b[K%s"
		defer fmt.Fprint(t.out, "\r\x1b[K")
	}
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			t.mu.Lock()
			text := progress(t.done, t.total, t.refused, time.Since(t.start))
			t.mu.Unlock()
			fmt.Fprintf(t.out, format, text)
		}
	}
}

// progress returns one line that says how far it is.
func progress(done, total, refused int, elapsed time.Duration) string {
	rate := float64(done) / max(elapsed.Seconds(), 1e-9)
	eta := "unknown"
	if done > 0 {
		eta = time.Duration(float64(total-done) / rate * float64(time.Second)).Round(time.Second).String()
	}
	return fmt.Sprintf("%d of %d sent, %d refused, %.0f/s, ETA %s", done, total, refused, rate, eta)
}

func (t *tally) summary() {
	elapsed := time.Since(t.start)
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintf(t.out, "%d of %d sent, %d refused, in %s: %.0f/s\n",
		t.done, t.total, t.refused, elapsed.Round(time.Millisecond), float64(t.done)/max(elapsed.Seconds(), 1e-9))
	for _, status := range slices.Sorted(maps.Keys(t.answers)) {
		fmt.Fprintf(t.out, "  %-24s %d\n", status, t.answers[status])
	}
	if len(t.latencies) > 0 {
		slices.Sort(t.latencies)
		fmt.Fprintf(t.out, "latency p50 %s, p99 %s, max %s\n",
			percentile(t.latencies, 50), percentile(t.latencies, 99), percentile(t.latencies, 100))
	}
	for _, reason := range t.reasons {
		fmt.Fprintln(t.out, "refused:", reason)
	}
	if more := t.refused - len(t.reasons); more > 0 {
		fmt.Fprintf(t.out, "and %d more\n", more)
	}
}

// percentile returns the smallest of the sorted values that p percent of them do not exceed.
func percentile(sorted []time.Duration, p int) time.Duration {
	return sorted[(len(sorted)*p+99)/100-1].Round(time.Microsecond)
}
