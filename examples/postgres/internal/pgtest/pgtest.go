// Package pgtest runs a PostgreSQL server for tests.
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Main starts a server, runs the tests, and returns the exit status. Without an installed PostgreSQL the tests that
// need it are skipped, or, where the environment says CI=true, fail.
func Main(m *testing.M) int {
	shared.server, shared.err = newServer()
	if shared.err == nil {
		defer shared.close()
	}
	return m.Run()
}

// Kill is kill -9 for the server.
func Kill() { shared.kill() }

// Start starts the server that was killed, and returns when it takes connections.
func Start() error { return shared.start() }

// server is a PostgreSQL of the test's own, on a free port of the loopback and a temporary directory.
type server struct {
	bin, dir, port string
	run            func(name string, args ...string) *exec.Cmd // as a user that is not root
	process        *exec.Cmd
	log            *os.File
}

var errMissing = errors.New("PostgreSQL is not installed: apt-get install postgresql (macOS: brew install postgresql)")

// newServer creates a database cluster and starts it.
func newServer() (s *server, err error) {
	s = new(server)
	for _, dir := range []string{"/usr/lib/postgresql/*/bin", "/opt/homebrew/opt/postgresql*/bin", "/usr/pgsql-*/bin"} {
		found, _ := filepath.Glob(filepath.Join(dir, "initdb"))
		slices.Sort(found)
		for _, initdb := range found {
			s.bin = filepath.Dir(initdb)
		}
	}
	if initdb, err := exec.LookPath("initdb"); err == nil && s.bin == "" {
		s.bin = filepath.Dir(initdb)
	}
	if s.bin == "" {
		return nil, errMissing
	}
	if s.dir, err = os.MkdirTemp("", "pginbox"); err != nil {
		return nil, err
	}
	if s.log, err = os.Create(filepath.Join(s.dir, "log")); err != nil {
		return nil, err
	}
	s.run = exec.Command
	if os.Geteuid() == 0 { // which PostgreSQL refuses
		other, err := user.Lookup("postgres")
		if err != nil {
			other, err = user.Lookup("nobody")
		}
		if err != nil {
			return nil, err
		}
		uid, _ := strconv.Atoi(other.Uid)
		if err := os.Chown(s.dir, uid, -1); err != nil {
			return nil, err
		}
		s.run = func(name string, args ...string) *exec.Cmd {
			as := []string{"--reuid=" + other.Uid, "--regid=" + other.Gid, "--clear-groups", "--", name}
			return exec.Command("setpriv", append(as, args...)...)
		}
	}
	initdb := s.run(filepath.Join(s.bin, "initdb"), "-D", filepath.Join(s.dir, "data"), "-U", "test", "-A", "trust",
		"-E", "UTF8", "--locale=C", "-N")
	if out, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	_, s.port, _ = net.SplitHostPort(listener.Addr().String())
	listener.Close()
	return s, s.start()
}

// start returns when the server takes connections.
func (s *server) start() error {
	for deadline := time.Now().Add(time.Minute); ; {
		s.process = s.run(filepath.Join(s.bin, "postgres"), "-D", filepath.Join(s.dir, "data"), "-p", s.port,
			"-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "shared_buffers=32MB")
		s.process.Stdout, s.process.Stderr = s.log, s.log
		if err := s.process.Start(); err != nil {
			return err
		}
		ended := make(chan struct{})
		go func() {
			_ = s.process.Wait()
			close(ended)
		}()
		for alive := true; alive; {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			conn, err := pgx.Connect(ctx, s.url("public"))
			if err == nil {
				conn.Close(ctx)
				cancel()
				return nil
			}
			cancel()
			select {
			case <-ended: // perhaps because processes of the one that was killed are still there
				alive = false
			case <-time.After(20 * time.Millisecond):
			}
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(s.log.Name())
			return fmt.Errorf("the server does not start: %s", text)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (s *server) kill() { _ = s.process.Process.Kill() }

func (s *server) close() {
	s.kill()
	_ = s.log.Close()
	_ = os.RemoveAll(s.dir)
}

func (s *server) url(schema string) string {
	return fmt.Sprintf("postgres://test@127.0.0.1:%s/postgres?sslmode=disable&search_path=%s", s.port, schema)
}

// shared is the server of all tests.
var shared struct {
	*server
	err     error
	schemas atomic.Int32
}

// EmptySchema returns the URL of the server with an empty schema.
func EmptySchema(t *testing.T) (url string) {
	t.Helper()
	if errors.Is(shared.err, errMissing) && os.Getenv("CI") != "true" {
		t.Skip(shared.err)
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	schema := fmt.Sprintf("test_%d", shared.schemas.Add(1))
	Query[int](t, shared.url("public"), "CREATE SCHEMA "+schema+"; SELECT 0")
	return shared.url(schema)
}

// Query runs sql on a connection of its own and returns its only column.
func Query[T any](t *testing.T, url, sql string, args ...any) []T {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	if len(args) == 0 { // several statements, of which the last returns rows
		args = append(args, pgx.QueryExecModeSimpleProtocol)
	}
	rows, _ := conn.Query(ctx, sql, args...)
	list, err := pgx.CollectRows(rows, pgx.RowTo[T])
	if err != nil {
		t.Fatal(err)
	}
	return list
}
