package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"offloadhook"
	"offloadhook/examples/postgres/internal/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

// TestProgram builds the program, sends it an event over HTTP, ends it in the orderly way and starts it again: the
// event is a duplicate then.
func TestProgram(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("there is no SIGTERM on Windows")
	}
	url := pgtest.EmptySchema(t)
	program := filepath.Join(t.TempDir(), "postgres")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	body, err := offloadhook.Fixtures.ReadFile("testdata/case_completed_b.json")
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int{http.StatusAccepted, http.StatusOK} {
		cmd := exec.Command(program, "-addr", "127.0.0.1:0")
		cmd.Env = append(os.Environ(), "OFFLOAD_DATABASE="+url, "OFFLOAD_TOKEN=secret")
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Process.Kill()
		stuck := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() }) // ends the reading of its log
		log := bufio.NewScanner(stderr)
		next := func(msg string) (line map[string]string) {
			for log.Scan() {
				if line = nil; json.Unmarshal(log.Bytes(), &line) == nil && line["msg"] == msg {
					return line
				}
			}
			t.Fatalf("the program ends without %q", msg)
			return nil
		}
		base := "http://" + next("listening")["addr"]
		post := func(query string) int {
			resp, err := http.Post(base+"/offload"+query, "application/json", bytes.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			return resp.StatusCode
		}
		if got := post(""); got != http.StatusUnauthorized {
			t.Errorf("without the token: %d", got)
		}
		if got := post("?token=secret"); got != want {
			t.Errorf("start %d: %d, want %d", i, got, want)
		}
		if want == http.StatusAccepted {
			if line := next("completed"); line["event_id"] == "" {
				t.Errorf("the log of the callback: %v", line)
			}
		}
		resp, err := http.Get(base + "/readyz")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Errorf("/readyz: %d", resp.StatusCode)
		}
		cmd.Process.Signal(syscall.SIGTERM)
		next("shutting down")
		if err := cmd.Wait(); err != nil {
			t.Errorf("start %d: %v", i, err)
		}
		stuck.Stop()
	}
}

// TestWrongStart: what is wrong with the address or the tokens is found before the store is opened.
func TestWrongStart(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	t.Setenv("OFFLOAD_DATABASE", "postgres://test@127.0.0.1:1/postgres?sslmode=disable")
	for token, want := range map[string]string{"token": "in use", "one,,two": "empty token", "one\n": "white space"} {
		t.Setenv("OFFLOAD_TOKEN", token)
		err := run(t.Context(), slog.New(slog.DiscardHandler), taken.Addr().String(), 0, 0)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("token %q, on an address that is taken: %v, want %q", token, err, want)
		}
	}
}
