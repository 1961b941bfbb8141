package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"offloadhook"
)

// crash runs a receiver with a journal in a process of its own, kills that in the middle of a callback, and starts it
// again: what got a 2xx is handled all the same, once (promises 1 and 3). program is this program.
func crash(out io.Writer, program string) (err error) {
	dir, err := os.MkdirTemp("", "offloadhook-quickstart")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	body, err := offloadhook.Fixtures.ReadFile("testdata/case_completed_b.json")
	if err != nil {
		return err
	}
	env, err := offloadhook.ParseEnvelope(body)
	if err != nil {
		return err
	}
	d := delivery{name: "case_completed_b.json", body: body, status: http.StatusAccepted}

	first, err := startChild(program, dir)
	if err != nil {
		return err
	}
	defer first.kill()
	fmt.Fprintf(out, "\nNow with a journal: process %d serves %s.\n\n", first.pid(), first.url)
	if err := send(out, first.url, d); err != nil {
		return err
	}
	if err := first.expect("running " + env.EventID); err != nil {
		return err
	}
	fmt.Fprintf(out, "CaseCompleted runs in process %d\n", first.pid())
	first.kill()
	fmt.Fprintf(out, "process %d killed, in the middle of the callback\n", first.pid())

	second, err := startChild(program, dir)
	if err != nil {
		return err
	}
	defer second.kill()
	fmt.Fprintf(out, "process %d started, with the same journal\n", second.pid())
	if err := second.expect("running " + env.EventID); err != nil {
		return fmt.Errorf("BROKEN: what got a 202 is lost: %w", err)
	}
	fmt.Fprintf(out, "CaseCompleted runs in process %d, though nobody sent the event again\n", second.pid())
	if _, err := io.WriteString(second.stdin, "go on\n"); err != nil {
		return err
	}
	if err := second.expect("handled " + env.EventID); err != nil {
		return err
	}
	fmt.Fprintln(out, "handled")
	d.name, d.status = d.name+" again", http.StatusOK
	if err := send(out, second.url, d); err != nil {
		return err
	}
	if said, err := second.stop(); err != nil || len(said) > 0 {
		return fmt.Errorf("BROKEN: the receiver ended with %v, after %q", err, said)
	}
	return nil
}

// send posts d and shows the answer.
func send(out io.Writer, url string, d delivery) error {
	status, err := post(url, d)
	if err == nil {
		err = check(d, status, call{})
	}
	if err != nil {
		return fmt.Errorf("BROKEN: %s: %w", d.name, err)
	}
	fmt.Fprintf(out, "%-30s  %d %s\n", d.name, status, http.StatusText(status))
	return nil
}

// child is a receiver in a process of its own.
type child struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan string // what it says; closed at its end
	url   string
}

func startChild(program, dir string) (*child, error) {
	c := &child{cmd: exec.Command(program, "receiver", dir), lines: make(chan string, 16)}
	c.cmd.Stderr = os.Stderr
	stdin, err := c.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	c.stdin = stdin
	go func() { // ends with the process
		defer close(c.lines)
		for scanner := bufio.NewScanner(stdout); scanner.Scan(); {
			c.lines <- scanner.Text()
		}
	}()
	line, err := c.next()
	if err != nil {
		c.kill()
		return nil, err
	}
	c.url = strings.TrimPrefix(line, "serving ")
	return c, nil
}

func (c *child) pid() int { return c.cmd.Process.Pid }

func (c *child) next() (string, error) {
	select {
	case line, ok := <-c.lines:
		if !ok {
			return "", errors.New("the receiver has ended")
		}
		return line, nil
	case <-time.After(patience):
		return "", fmt.Errorf("the receiver says nothing for %s", patience)
	}
}

func (c *child) expect(want string) error {
	if line, err := c.next(); err != nil || line != want {
		return fmt.Errorf("the receiver says %q (%v), expected is %q", line, err, want)
	}
	return nil
}

// kill ends the process as kill -9 does. It has no chance to tidy up.
func (c *child) kill() {
	c.cmd.Process.Kill()
	for range c.lines {
	}
	c.cmd.Wait()
}

// stop lets the process shut down, and returns what it still said.
func (c *child) stop() (said []string, err error) {
	c.stdin.Close()
	timeout := time.AfterFunc(patience, func() { c.cmd.Process.Kill() })
	defer timeout.Stop()
	for line := range c.lines {
		said = append(said, line)
	}
	return said, c.cmd.Wait()
}

// receive is the other side: it serves a receiver whose callback waits for a line on stdin, until stdin ends.
func receive(stdin io.Reader, stdout io.Writer, opts ...offloadhook.Option) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	goOn := make(chan struct{})
	var mu sync.Mutex
	say := func(word, id string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintln(stdout, word, id)
	}
	// Before the receiver: that begins at once with what is left in its inbox.
	say("serving", "http://"+listener.Addr().String()+"/offload")
	receiver := offloadhook.Handler(offloadhook.Callbacks{
		CaseCompleted: func(ctx context.Context, env *offloadhook.Envelope, _ *offloadhook.CaseCompleted) error {
			say("running", env.EventID)
			select {
			case <-goOn:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		},
	}, append(opts, offloadhook.WithObserver(func(_ context.Context, o offloadhook.Observation) {
		switch {
		case o.Outcome == offloadhook.Handled:
			say("handled", o.Envelope.EventID)
		case o.Err != nil:
			fmt.Fprintln(os.Stderr, "quickstart:", o.Outcome, o.Err)
		}
	}))...)
	mux := http.NewServeMux()
	mux.Handle("/offload", receiver)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: patience}
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(listener) })

	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for lines := bufio.NewScanner(stdin); lines.Scan(); {
		select {
		case goOn <- struct{}{}:
		case <-ctx.Done():
		}
	}
	err = errors.Join(server.Shutdown(ctx), receiver.Shutdown(ctx))
	serving.Wait()
	return err
}

// receiveWithJournal is receive as the tour runs it.
func receiveWithJournal(dir string) error {
	journal, err := offloadhook.OpenJournal(dir, 0)
	if err != nil {
		return err
	}
	return errors.Join(receive(os.Stdin, os.Stdout, offloadhook.WithInbox(journal)), journal.Close())
}
