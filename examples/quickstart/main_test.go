package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"offloadhook"
)

// TestMain lets the test binary stand in for the program that crash starts.
func TestMain(m *testing.M) {
	if len(os.Args) != 3 || os.Args[1] != "receiver" {
		os.Exit(m.Run())
	}
	var err error
	switch os.Getenv("QUICKSTART_BROKEN") {
	case "":
		err = run(os.Args[1:])
	case "forgets events":
		var stdin io.Reader = os.Stdin
		if os.Mkdir(filepath.Join(os.Args[2], "started"), 0o700) != nil {
			stdin = strings.NewReader("") // the second one has nothing to wait for
		}
		err = receive(stdin, os.Stdout)
	case "refuses events":
		err = receive(os.Stdin, os.Stdout, offloadhook.WithToken("unknown"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// TestCrash shows the crash with a receiver that keeps its promises, and with others that do not.
func TestCrash(t *testing.T) {
	for _, test := range []struct {
		broken string
		want   string
	}{
		{"", ""},
		{"forgets events", "what got a 202 is lost"},
		{"refuses events", "case_completed_b.json: answered 401"},
	} {
		t.Run(test.broken, func(t *testing.T) {
			t.Setenv("QUICKSTART_BROKEN", test.broken)
			program, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			err = crash(&out, program)
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("crash = %v, want %q\n%s", err, test.want, out.String())
			}
		})
	}
}

// TestRun runs the command of the README.
func TestRun(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "run", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("go run: %v\n%s", err, out)
	}
	names, err := fs.Glob(offloadhook.Fixtures, "testdata/*.json")
	if err != nil || len(names) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	for _, name := range names {
		if !bytes.Contains(out, []byte("\n"+path.Base(name)+" ")) {
			t.Errorf("the output does not mention %s:\n%s", path.Base(name), out)
		}
	}
	for _, want := range []string{"200 OK", "202 Accepted", "401 Unauthorized", "CaseCompleted:", "CaseFailed:",
		"CaseInputNeeded:", "Other: case.paused", "killed, in the middle", "nobody sent the event again",
		"Everything was as promised."} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("the output does not mention %q:\n%s", want, out)
		}
	}
}

func TestCheck(t *testing.T) {
	accepted := delivery{status: 202, callback: "CaseFailed", eventID: "evt_1"}
	duplicate := delivery{status: 200, eventID: "evt_1"}
	for _, test := range []struct {
		name   string
		d      delivery
		status int
		got    call
		ok     bool
	}{
		{"as promised", accepted, 202, call{"CaseFailed", "evt_1", "why"}, true},
		{"wrong answer", accepted, 200, call{"CaseFailed", "evt_1", "why"}, false},
		{"no answer", accepted, 0, call{"CaseFailed", "evt_1", "why"}, false},
		{"no callback", accepted, 202, call{}, false},
		{"wrong callback", accepted, 202, call{"Other", "evt_1", "why"}, false},
		{"wrong event", accepted, 202, call{"CaseFailed", "evt_2", "why"}, false},
		{"duplicate", duplicate, 200, call{}, true},
		{"duplicate accepted", duplicate, 202, call{}, false},
		{"duplicate handled", duplicate, 200, call{"CaseFailed", "evt_1", "why"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := check(test.d, test.status, test.got); (err == nil) != test.ok {
				t.Errorf("check = %v, want ok %v", err, test.ok)
			}
		})
	}
}

// TestBroken takes the tour with receivers that break a promise.
func TestBroken(t *testing.T) {
	for _, test := range []struct {
		name   string
		broken offloadhook.Option
		want   string
	}{
		// Not each of them: a receiver knows what it has in hand without its deduper.
		{"runs duplicates", offloadhook.WithDeduper(deduper(true)), ".json again: answered 202"},
		{"takes every event for a duplicate", offloadhook.WithDeduper(deduper(false)), "case_completed_a.json: answered 200"},
		{"refuses the token", offloadhook.WithToken("another"), "case_completed_a.json: answered 401"},
		{"takes the forgery", offloadhook.WithToken("guessed"), "a forgery of the next one: answered 202"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out strings.Builder
			err := tour(&out, test.broken)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("tour = %v, want an error with %q", err, test.want)
			}
			if !strings.Contains(out.String(), "BROKEN") {
				t.Errorf("the output shows nothing broken:\n%s", out.String())
			}
		})
	}
}

// deduper takes every event for new, or none.
type deduper bool

func (d deduper) Claim(context.Context, *offloadhook.Envelope) (bool, error) { return bool(d), nil }

func (d deduper) Done(context.Context, *offloadhook.Envelope, error) error { return nil }
