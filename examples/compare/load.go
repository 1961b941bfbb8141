package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"offloadhook"
)

// caseID is that of the fixture. Its last 12 digits make room for a number.
const caseID = "4fc5904d-0e44-4ed3-aa57-c4a47ad0ae4f"

func numberedCase(n int) string { return fmt.Sprintf("%s%012d", caseID[:len(caseID)-12], n) }

func eventID(n int) string {
	return offloadhook.EventID(numberedCase(n), offloadhook.TypeCaseCompleted, 1774131900000)
}

// bodies makes the body of the nth event.
func bodies() (func(n int) []byte, error) {
	fixture, err := offloadhook.Fixtures.ReadFile("testdata/case_completed_b.json")
	if err != nil {
		return nil, err
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, fixture); err != nil {
		return nil, err
	}
	return func(n int) []byte {
		return bytes.ReplaceAll(compact.Bytes(), []byte(caseID), []byte(numberedCase(n)))
	}, nil
}

// event is one request: as a handler gets it and as it goes over the wire.
type event struct {
	id      string
	body    []byte
	header  http.Header
	request *http.Request
	wire    []byte
}

// newEvents makes n requests. dress may give them other headers and another body.
func newEvents(n int, dress func(e *event) error) ([]event, error) {
	body, err := bodies()
	if err != nil {
		return nil, err
	}
	events := make([]event, n)
	for i := range events {
		e := &events[i]
		*e = event{id: eventID(i), body: body(i), header: http.Header{"Content-Type": {"application/json"}}}
		if dress != nil {
			if err := dress(e); err != nil {
				return nil, err
			}
		}
		var wire bytes.Buffer
		fmt.Fprintf(&wire, "POST /offload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n", len(e.body))
		if err := e.header.Write(&wire); err != nil {
			return nil, err
		}
		wire.WriteString("\r\n")
		wire.Write(e.body)
		e.wire = wire.Bytes()
		e.request = &http.Request{
			Method: http.MethodPost, URL: &url.URL{Path: "/offload"}, RequestURI: "/offload", Host: "127.0.0.1",
			Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: e.header,
			Body: io.NopCloser(bytes.NewReader(e.body)), ContentLength: int64(len(e.body)),
		}
	}
	return events, nil
}

// sendAll sends the events from clients at once and returns when each is answered.
func sendAll(events []event, clients int, send func(client int, e *event) error) error {
	var next atomic.Int64
	var sending sync.WaitGroup
	failed := make([]error, clients)
	for client := range clients {
		sending.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(events)) && failed[client] == nil; i = next.Add(1) - 1 {
				failed[client] = send(client, &events[i])
			}
		})
	}
	sending.Wait()
	return errors.Join(failed...)
}

// loopback is a server with clients that keep their connections. They are as cheap as can be, so that what is left to
// compare is the server.
type loopback struct {
	server *http.Server
	addr   string
	conns  []net.Conn
	in     []*bufio.Reader
	served chan struct{}
}

func newLoopback(handler http.Handler, clients int) (*loopback, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l := &loopback{server: &http.Server{Handler: handler}, addr: listener.Addr().String(), served: make(chan struct{})}
	go func() {
		defer close(l.served)
		_ = l.server.Serve(listener)
	}()
	for range clients {
		conn, err := net.Dial("tcp", l.addr)
		if err != nil {
			l.close()
			return nil, err
		}
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
		l.conns, l.in = append(l.conns, conn), append(l.in, bufio.NewReader(conn))
	}
	return l, nil
}

func (l *loopback) close() {
	for _, conn := range l.conns {
		_ = conn.Close()
	}
	_ = l.server.Close()
	<-l.served
}

func (l *loopback) send(client int, e *event) error {
	if _, err := l.conns[client].Write(e.wire); err != nil {
		return err
	}
	in := l.in[client]
	status, err := in.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(status, []byte("HTTP/1.1 2")) {
		return fmt.Errorf("answer: %s", bytes.TrimSpace(status))
	}
	var length int
	for {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return err
		}
		name, value, found := bytes.Cut(bytes.TrimSpace(line), []byte(": "))
		if !found {
			break
		}
		if string(name) == "Content-Length" {
			length, _ = strconv.Atoi(string(value))
		}
	}
	_, err = in.Discard(length)
	return err
}

// inProcess calls a handler without a network.
type inProcess struct {
	handler http.Handler
	writers []answer
}

func newInProcess(handler http.Handler, clients int) *inProcess {
	p := &inProcess{handler: handler, writers: make([]answer, clients)}
	for client := range p.writers {
		p.writers[client].header = make(http.Header)
	}
	return p
}

func (p *inProcess) send(client int, e *event) error {
	w := &p.writers[client]
	clear(w.header)
	w.status = 0
	p.handler.ServeHTTP(w, e.request)
	if w.status/100 != 2 {
		return fmt.Errorf("answer: %d", w.status)
	}
	return nil
}

// answer is a ResponseWriter that costs next to nothing. Like that of net/http it takes a deadline.
type answer struct {
	header http.Header
	status int
}

func (w *answer) Header() http.Header { return w.header }

func (w *answer) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return len(p), nil
}

func (w *answer) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
}

func (w *answer) SetReadDeadline(time.Time) error { return nil }

// tally counts the events that reach the callback. Each must, once.
type tally struct {
	seen  []atomic.Bool
	left  atomic.Int64
	wrong atomic.Int64
	all   chan struct{} // closed when none is left
}

func newTally(n int) *tally {
	t := &tally{seen: make([]atomic.Bool, n), all: make(chan struct{})}
	t.left.Store(int64(n))
	return t
}

// handle is the callback of all contestants.
func (t *tally) handle(c *offloadhook.CaseCompleted) {
	digits, _ := strings.CutPrefix(c.CaseID, caseID[:len(caseID)-12])
	n, err := strconv.Atoi(digits)
	if err != nil || n >= len(t.seen) || len(c.Result) == 0 || t.seen[n].Swap(true) {
		t.wrong.Add(1)
		return
	}
	if t.left.Add(-1) == 0 {
		close(t.all)
	}
}

// wait returns when all events have been handled.
func (t *tally) wait() error {
	select {
	case <-t.all:
		return nil
	case <-time.After(time.Minute):
		return fmt.Errorf("%d of %d events were not handled", t.left.Load(), len(t.seen))
	}
}

// check returns an error if an event was handled twice, or came out another than it went in.
func (t *tally) check() error {
	if wrong := t.wrong.Load(); wrong > 0 {
		return fmt.Errorf("%d callbacks too many", wrong)
	}
	return nil
}

// trickle is a client that sends its body a byte at a time, until stop is closed.
func trickle(addr string, stop <-chan struct{}) error {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	head := textproto.MIMEHeader{"Host": {addr}, "Content-Type": {"application/json"}, "Content-Length": {"1000"}}
	text := "POST /offload HTTP/1.1\r\n"
	for name, values := range head {
		text += name + ": " + values[0] + "\r\n"
	}
	_, err = io.WriteString(conn, text+"\r\n{")
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	for err == nil {
		select {
		case <-stop:
			return nil
		case <-ticker.C:
			_, err = conn.Write([]byte(" "))
		}
	}
	return nil // the server has had enough of it
}
