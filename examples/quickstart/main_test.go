package main

import (
	"bytes"
	"context"
	"io/fs"
	"os/exec"
	"path"
	"strings"
	"testing"

	"offloadhook"
)

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
		"CaseInputNeeded:", "Other: case.paused", "Everything was as promised."} {
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
		{"runs duplicates", offloadhook.WithDeduper(deduper(true)), "case_completed_a.json again: answered 202"},
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
