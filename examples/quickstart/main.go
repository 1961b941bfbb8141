// Quickstart is a tour of the receiver in one command:
//
//	go run ./examples/quickstart
//
// It serves a receiver on a loopback port and plays Offload's part: it sends an example of every event of both
// published contracts, some of them twice, an event of an unknown type, and a forged one. Line by line it prints what
// was answered and which callback ran. Then it kills a receiver in the middle of a callback and starts it again. It
// exits with 1 if an answer or a callback was not as the package promises; what a callback was given it only prints.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"offloadhook"
)

// patience bounds every wait of the tour.
const patience = 20 * time.Second

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 2 && args[0] == "receiver" { // started by crash
		return receiveWithJournal(args[1])
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	if err := tour(os.Stdout); err != nil {
		return err
	}
	if err := crash(os.Stdout, program); err != nil {
		return err
	}
	fmt.Println("\nEverything was as promised.")
	return nil
}

// delivery is one POST, and what the package promises for it.
type delivery struct {
	name     string
	token    string
	body     []byte
	status   int
	callback string // "" for none
	eventID  string // that the callback must be given
}

// call is one run of a callback.
type call struct {
	callback string
	eventID  string
	detail   string
}

// tour serves a receiver, sends it every delivery, and returns what was not as promised. The options come after the
// tour's own: a test breaks a promise with one.
func tour(out io.Writer, opts ...offloadhook.Option) error {
	token := rand.Text()
	plan, err := plan(token)
	if err != nil {
		return err
	}

	// Nobody receives from calls until the answer is there. A receiver that waited for its callback would never answer.
	calls := make(chan call)
	ran := func(ctx context.Context, callback string, env *offloadhook.Envelope, detail string) error {
		select {
		case calls <- call{callback, env.EventID, detail}:
			return nil
		case <-ctx.Done(): // the tour has not asked for this one
			return ctx.Err()
		}
	}
	callbacks := offloadhook.Callbacks{
		CaseCompleted: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseCompleted) error {
			return ran(ctx, "CaseCompleted", env, fmt.Sprintf("%s, %d bytes of result", c.ResultStatus, len(c.Result)))
		},
		CaseFailed: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseFailed) error {
			return ran(ctx, "CaseFailed", env, cmp.Or(c.FailureReason, string(c.ResultStatus)))
		},
		CaseInputNeeded: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseInputNeeded) error {
			return ran(ctx, "CaseInputNeeded", env, c.InputRequest)
		},
		Other: func(ctx context.Context, env *offloadhook.Envelope) error {
			return ran(ctx, "Other", env, string(env.EventType))
		},
	}

	var problems problems
	receiver := offloadhook.Handler(callbacks, append([]offloadhook.Option{
		offloadhook.WithToken(token),
		offloadhook.WithObserver(problems.observe),
	}, opts...)...)
	mux := http.NewServeMux()
	mux.Handle("/offload", receiver)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: patience}
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			problems.add(err)
		}
	})

	url := "http://" + listener.Addr().String() + "/offload"
	fmt.Fprintf(out, "The receiver serves %s.\n\n", url)
	fmt.Fprintf(out, line, "delivery", "answer", "callback")
	for _, d := range plan {
		status, err := post(url, d)
		var got call
		if err == nil {
			got = wait(calls, status)
			err = check(d, status, got)
		}
		show(out, d, status, got, err)
		if err != nil {
			problems.add(fmt.Errorf("%s: %w", d.name, err))
		}
	}

	// First the server, so that no request comes any more, then the receiver, which waits for its callbacks.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	problems.add(server.Shutdown(ctx))
	problems.add(receiver.Shutdown(ctx))
	serving.Wait()
	return problems.all()
}

// plan returns what the tour sends.
func plan(token string) ([]delivery, error) {
	names, err := fs.Glob(offloadhook.Fixtures, "testdata/*.json")
	if err != nil {
		return nil, err
	}
	var plan []delivery
	for _, name := range names {
		body, err := offloadhook.Fixtures.ReadFile(name)
		if err != nil {
			return nil, err
		}
		env, err := offloadhook.ParseEnvelope(body)
		if err != nil {
			return nil, err
		}
		d := delivery{
			name:     path.Base(name),
			token:    token,
			body:     body,
			status:   http.StatusAccepted,
			callback: callbackOf(env.EventType),
			eventID:  env.EventID,
		}
		if len(plan) == 0 {
			// Ids can be guessed. A forged event must not take the place of the real one that comes next.
			forged := d
			forged.name, forged.token = "a forgery of the next one", "guessed"
			forged.status, forged.callback = http.StatusUnauthorized, ""
			plan = append(plan, forged)
		}
		plan = append(plan, d)
		if strings.HasSuffix(name, "_a.json") { // contract a says: expect retries
			again := d
			again.name += " again"
			again.status, again.callback = http.StatusOK, ""
			plan = append(plan, again)
		}
	}
	id := offloadhook.EventID("case_123", "case.paused", 1774131900000)
	return append(plan, delivery{
		name:     "an event of an unknown type",
		token:    token,
		body:     []byte(`{"event_id":"` + id + `","event_type":"case.paused","timestamp":1774131900000,"data":{}}`),
		status:   http.StatusAccepted,
		callback: "Other",
		eventID:  id,
	}), nil
}

func callbackOf(t offloadhook.EventType) string {
	switch t {
	case offloadhook.TypeCaseCompleted:
		return "CaseCompleted"
	case offloadhook.TypeCaseFailed:
		return "CaseFailed"
	case offloadhook.TypeCaseInputNeeded:
		return "CaseInputNeeded"
	}
	return "Other"
}

// post sends d the way Offload does: one POST, its secret in the query, because nothing else of a webhook URL reaches
// the receiver.
func post(url string, d delivery) (status int, err error) {
	client := &http.Client{Timeout: patience}
	resp, err := client.Post(url+"?token="+d.token, "application/json", bytes.NewReader(d.body))
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// wait returns the callback that follows a 202, the zero call if there is none. Another answer is followed by none; if
// one runs all the same, it turns up in place of the next, or is left over at the end.
func wait(calls <-chan call, status int) call {
	if status != http.StatusAccepted {
		return call{}
	}
	select {
	case c := <-calls:
		return c
	case <-time.After(patience):
		return call{}
	}
}

// check compares what happened to d with what is promised.
func check(d delivery, status int, got call) error {
	switch {
	case status != d.status:
		return fmt.Errorf("answered %d, promised is %d", status, d.status)
	case got.callback != d.callback:
		return fmt.Errorf("callback %q ran, promised is %q", got.callback, d.callback)
	case got.callback != "" && got.eventID != d.eventID:
		return fmt.Errorf("the callback was given %s, promised is %s", got.eventID, d.eventID)
	}
	return nil
}

const line = "%-30s  %-16s  %s\n"

func show(out io.Writer, d delivery, status int, got call, err error) {
	callback := "none"
	switch {
	case err != nil:
		callback = "BROKEN: " + err.Error()
	case got.callback != "":
		callback = got.callback + ": " + got.detail
	}
	fmt.Fprintf(out, line, d.name, strings.TrimSpace(fmt.Sprintf("%d %s", status, http.StatusText(status))), callback)
}

// problems collects what went wrong. Its methods may be called concurrently.
type problems struct {
	mu   sync.Mutex
	errs []error
}

func (p *problems) add(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.errs = append(p.errs, err)
}

func (p *problems) all() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return errors.Join(p.errs...)
}

// observe takes note of what must not happen on the tour. The refusal of the forgery must: its answer shows it.
func (p *problems) observe(_ context.Context, o offloadhook.Observation) {
	switch o.Outcome {
	case offloadhook.Accepted, offloadhook.Duplicate, offloadhook.Refused:
		return
	case offloadhook.Handled:
		if o.Err == nil { // else the data did not fit its struct
			return
		}
	}
	id := ""
	if o.Envelope != nil {
		id = o.Envelope.EventID
	}
	p.add(fmt.Errorf("%s %s: %w", o.Outcome, id, o.Err))
}
