package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"offloadhook"
)

// newBench is small enough for a test, and writes to out.
func newBench(t *testing.T) (b *bench, out *bytes.Buffer) {
	out = new(bytes.Buffer)
	return &bench{
		ctx: t.Context(), dir: t.TempDir(), out: out, progress: io.Discard,
		sizes: sizes{
			rounds: 1, clients: 8, requests: 300, claiming: 20 * time.Millisecond, claims: 2_000,
			scale: scaleSizes{rounds: 1, ids: []int{100, 1_000}, claims: 200, durable: 160, events: []int{1, 100}, flow: 200},
			open:  openSizes{rounds: 2, finished: 1_000, unfinished: 100},
			p99:   p99Sizes{rounds: 3, requests: 100, sleep: 5 * time.Second, live: 200, slow: 5},
		},
	}, out
}

// A contestant that leaves an event unhandled, or handles one twice, or forgets a claim, is an error.
func TestCompare(t *testing.T) {
	b, out := newBench(t)
	path := filepath.Join(t.TempDir(), "compare.svg")
	if err := b.compare(path); err != nil {
		t.Fatal(err)
	}
	svg, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for dec := xml.NewDecoder(bytes.NewReader(svg)); ; {
		if _, err := dec.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("%v in:\n%s", err, svg)
		}
	}
	names := []string{journalName}
	for _, c := range receivers {
		names = append(names, c.name)
	}
	for _, c := range stores {
		names = append(names, c.name)
	}
	if findPostgres() != "" {
		names = append(names, postgresName)
	} else if os.Getenv("CI") == "true" {
		t.Error(errNoPostgres)
	}
	for _, name := range names {
		if !strings.Contains(out.String(), "| "+name) {
			t.Errorf("the tables have no row for %s:\n%s", name, out)
		}
		if !bytes.Contains(svg, []byte(">"+name)) {
			t.Errorf("the picture has no bar for %s:\n%s", name, svg)
		}
	}
	if !strings.Contains(out.String(), "| by hand | 1.00 |") {
		t.Errorf("by hand is not 1.00 of itself:\n%s", out)
	}
}

func TestScale(t *testing.T) {
	b, out := newBench(t)
	if err := b.scaleTables(); err != nil {
		t.Fatal(err)
	}
	for _, row := range []string{"| 100 |", "| 1,000 |", "| 100 cases share the events |"} {
		if !strings.Contains(out.String(), row) {
			t.Errorf("no row %s in:\n%s", row, out)
		}
	}
}

// That the journal written here is read as what it should be is checked by each opening.
func TestOpen(t *testing.T) {
	b, out := newBench(t)
	if err := b.openTable(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "| `OpenJournal` |") {
		t.Errorf("no row in:\n%s", out)
	}
}

func TestP99(t *testing.T) {
	b, out := newBench(t)
	if err := b.p99Table(); err != nil {
		t.Fatal(err)
	}
	if rows := strings.Count(out.String(), "\n"); rows != 6 {
		t.Errorf("%d lines, want 2 of a head and 4 rows:\n%s", rows, out)
	}
}

func TestTally(t *testing.T) {
	result := []byte("{}")
	handle := func(n int, t *tally) {
		t.handle(&offloadhook.CaseCompleted{Case: offloadhook.Case{CaseID: numberedCase(n)}, Result: result})
	}
	t.Run("each once", func(t *testing.T) {
		all := newTally(2)
		handle(1, all)
		handle(0, all)
		if err := errors.Join(all.wait(), all.check()); err != nil {
			t.Error(err)
		}
	})
	t.Run("one twice", func(t *testing.T) {
		all := newTally(2)
		handle(1, all)
		handle(1, all)
		if err := all.check(); err == nil {
			t.Error("no error")
		}
		if all.left.Load() != 1 {
			t.Errorf("%d left, want 1", all.left.Load())
		}
	})
	t.Run("unknown", func(t *testing.T) {
		all := newTally(2)
		handle(2, all)
		if err := all.check(); err == nil {
			t.Error("no error")
		}
	})
}

// A store that does not keep what it claims is found out.
func TestStoreThatForgets(t *testing.T) {
	b, _ := newBench(t)
	envs, err := envelopes(0, 20)
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.runStore(store{name: "forgetful", open: func(string) (claimFunc, func() error, error) {
		claim := func(context.Context, *offloadhook.Envelope) (bool, error) { return true, nil }
		return claim, func() error { return nil }, nil
	}}, envs[:10:10], envs[10:])
	if err == nil || !strings.Contains(err.Error(), "fresh is true") {
		t.Errorf("error %v", err)
	}
}
