package main

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
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

var errNoPostgres = errors.New(
	"PostgreSQL is not installed: apt-get install postgresql (macOS: brew install postgresql)")

// postgres is a server of its own, on a free port of the loopback and with a temporary directory.
type postgres struct {
	dir, url, version string
	process           *exec.Cmd
	ended             chan struct{}
}

// findPostgres returns the directory of the newest server's programs.
func findPostgres() (bin string) {
	if initdb, err := exec.LookPath("initdb"); err == nil {
		bin = filepath.Dir(initdb)
	}
	for _, dir := range []string{"/usr/lib/postgresql/*/bin", "/opt/homebrew/opt/postgresql*/bin", "/usr/pgsql-*/bin"} {
		found, _ := filepath.Glob(filepath.Join(dir, "initdb"))
		slices.Sort(found)
		for _, initdb := range found {
			bin = filepath.Dir(initdb)
		}
	}
	return bin
}

// startPostgres creates a database cluster, with the defaults of initdb, and starts its server.
func startPostgres() (s *postgres, err error) {
	bin := findPostgres()
	if bin == "" {
		return nil, errNoPostgres
	}
	s = &postgres{ended: make(chan struct{})}
	// Not in the folder of the other stores, which the server's user may not enter.
	if s.dir, err = os.MkdirTemp("", "compare-postgres"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(s.dir)
		}
	}()
	command := exec.Command
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
		command = func(name string, args ...string) *exec.Cmd {
			as := []string{"--reuid=" + other.Uid, "--regid=" + other.Gid, "--clear-groups", "--", name}
			return exec.Command("setpriv", append(as, args...)...)
		}
	}
	data := filepath.Join(s.dir, "data")
	initdb := command(filepath.Join(bin, "initdb"), "-D", data, "-U", "test", "-A", "trust", "-E", "UTF8",
		"--locale=C", "-N")
	if out, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	_ = listener.Close()
	s.url = fmt.Sprintf("postgres://test@127.0.0.1:%s/postgres?sslmode=disable", port)
	s.process = command(filepath.Join(bin, "postgres"), "-D", data, "-p", port,
		"-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=")
	if err := s.process.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(s.ended)
		_ = s.process.Wait()
	}()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		if s.version, err = s.askVersion(); err == nil {
			return s, nil
		}
		select {
		case <-s.ended:
			return nil, fmt.Errorf("PostgreSQL has ended: %v", s.process.ProcessState)
		case <-time.After(50 * time.Millisecond):
		}
	}
	s.stop()
	return nil, fmt.Errorf("PostgreSQL does not start: %w", err)
}

func (s *postgres) askVersion() (version string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.url)
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	err = conn.QueryRow(ctx, "SHOW server_version").Scan(&version)
	version, _, _ = strings.Cut(version, " ")
	return version, err
}

// stop ends the server, by force when it takes too long.
func (s *postgres) stop() {
	_ = s.process.Process.Signal(os.Interrupt)
	select {
	case <-s.ended:
	case <-time.After(10 * time.Second):
		_ = s.process.Process.Kill()
		<-s.ended
	}
	_ = os.RemoveAll(s.dir)
}
