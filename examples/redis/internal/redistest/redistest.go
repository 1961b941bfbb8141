// Package redistest runs Redis servers for tests.
package redistest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// Server is a Redis of the test's own, on a free port of the loopback and a temporary directory.
type Server struct {
	Dir      string   // of its data
	Settings []string // in the form of its command line, for the next start
	port     string
	process  *exec.Cmd
	ended    chan struct{}
	log      *os.File
}

const patience = 30 * time.Second

// New starts a server that is durable, but for what settings say. Where Redis is not
// installed the test is skipped, or, where the environment says CI=true, fails.
func New(t *testing.T, settings ...string) *Server {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		const missing = "Redis is not installed: apt-get install redis-server (macOS: brew install redis)"
		if os.Getenv("CI") == "true" {
			t.Fatal(missing)
		}
		t.Skip(missing)
	}
	s := &Server{Dir: t.TempDir(), Settings: settings}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, s.port, _ = net.SplitHostPort(listener.Addr().String())
	listener.Close()
	if s.log, err = os.Create(filepath.Join(s.Dir, "log")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Kill()
		s.log.Close()
	})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	return s
}

// Start starts the server that was killed, and returns when it takes commands.
func (s *Server) Start() error {
	s.process = exec.Command("redis-server", append([]string{"--port", s.port, "--bind", "127.0.0.1", "--dir", s.Dir,
		"--appendonly", "yes", "--appendfsync", "always", "--save", "", "--auto-aof-rewrite-percentage", "0"},
		s.Settings...)...)
	s.process.Stdout, s.process.Stderr = s.log, s.log
	if err := s.process.Start(); err != nil {
		s.process = nil
		return err
	}
	s.ended = make(chan struct{})
	go func() {
		_ = s.process.Wait()
		close(s.ended)
	}()
	client := s.Client()
	defer client.Close()
	for deadline := time.Now().Add(patience); ; {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		err := client.Ping(ctx).Err()
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-s.ended:
			deadline = time.Now()
		case <-time.After(10 * time.Millisecond):
		}
		if !time.Now().Before(deadline) {
			text, _ := os.ReadFile(s.log.Name())
			return fmt.Errorf("the server does not start: %w: %s", err, text)
		}
	}
}

// Kill is kill -9 for the server.
func (s *Server) Kill() {
	if s.process != nil {
		_ = s.process.Process.Kill()
		<-s.ended
	}
}

// URL returns what a client needs to connect.
func (s *Server) URL() string { return "redis://127.0.0.1:" + s.port }

// Client returns a client that the caller closes.
func (s *Server) Client() *redis.Client {
	return redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + s.port, MaxRetries: -1})
}

// Do sends a command on a connection of its own.
func (s *Server) Do(t *testing.T, args ...any) any {
	t.Helper()
	client := s.Client()
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	answer, err := client.Do(ctx, args...).Result()
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return answer
}

// Keys returns the names of the keys that match pattern.
func (s *Server) Keys(pattern string) ([]string, error) {
	client := s.Client()
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return client.Keys(ctx, pattern).Result()
}
