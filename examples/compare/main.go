// Compare measures offloadhook beside what one would use in its place: receivers of webhooks by the requests they take,
// and stores by the durable claims they make. It prints a Markdown table and draws compare.svg.
//
//	go run .          the table and the picture, about two minutes
//	go run . -scale   what a claim costs with 1,000 to 10,000,000 remembered ids, an event beside 100,000 others
//	go run . -open    opening a journal of 10,000,000 ids against reading its file
//	go run . -p99     the slowest answers, with slow callbacks and beside slow clients
//
// Machines are noisy, and disks more so. So the contestants take turns in short rounds, and what counts is the median
// over the rounds of their ratio to one of them.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// sizes says how much is measured.
type sizes struct {
	rounds   int
	clients  int
	requests int           // in a round of a receiver
	claiming time.Duration // a round of a store, unless it makes this many
	claims   int
	scale    scaleSizes
	open     openSizes
	p99      p99Sizes
}

var fullSizes = sizes{
	rounds: 7, clients: 64, requests: 6_000, claiming: 300 * time.Millisecond, claims: 50_000,
	scale: fullScale, open: fullOpen, p99: fullP99,
}

func main() {
	scale := flag.Bool("scale", false, "measure costs against the number of ids, events and cases: needs 4 GB of memory")
	open := flag.Bool("open", false, "measure the opening of a large journal: needs 3 GB of memory and of disk")
	p99 := flag.Bool("p99", false, "measure the slowest answers")
	dir := flag.String("dir", "", "where the stores write, on a real disk (default the system's `directory` for such)")
	most := flag.Int("ids", 10_000_000, "the largest `number` of remembered ids for -scale and -open, at least 1,000")
	picture := flag.String("svg", "compare.svg", "where to draw the picture")
	flag.Parse()
	log.SetFlags(0)
	work, err := os.MkdirTemp(*dir, "compare")
	if err != nil {
		log.Fatal(err)
	}
	// An interrupt ends the run after the round, so that no server and no file is left behind.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b := bench{sizes: fullSizes, ctx: ctx, dir: work, out: os.Stdout, progress: os.Stderr}
	b.scale.ids = slices.DeleteFunc(slices.Clone(b.scale.ids), func(ids int) bool { return ids > max(*most, 1_000) })
	b.open.finished = min(b.open.finished, max(*most, 1_000))
	switch {
	case *scale:
		err = b.scaleTables()
	case *open:
		err = b.openTable()
	case *p99:
		err = b.p99Table()
	default:
		err = b.compare(*picture)
	}
	_ = os.RemoveAll(work)
	if err != nil {
		log.Fatal(err)
	}
}

// bench is a run of this program.
type bench struct {
	sizes
	ctx      context.Context
	dir      string // for the stores, a folder to each
	folders  int
	out      io.Writer
	progress io.Writer
}

// folder returns the path of a folder that does not exist yet.
func (b *bench) folder() string {
	b.folders++
	return fmt.Sprintf("%s/%d", b.dir, b.folders)
}

func (b *bench) compare(picture string) error {
	receivers, err := b.compareReceivers()
	if err != nil {
		return err
	}
	stores, err := b.compareStores()
	if err != nil {
		return err
	}
	sync, err := b.fsyncTime()
	if err != nil {
		return err
	}
	fmt.Fprintf(b.out, "%s, %d processors, %s/%s. An fsync of 4 KiB takes %v.\n\n",
		runtime.Version(), runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, sync.Round(10*time.Microsecond))
	b.printReceivers(receivers)
	fmt.Fprintln(b.out)
	b.printStores(stores)
	if picture == "" {
		return nil
	}
	svg, err := draw(receivers, stores)
	if err != nil {
		return err
	}
	return os.WriteFile(picture, svg, 0o644)
}

// fsyncTime returns the median of what a small append and its fsync take in dir, which tells whether that is a disk.
func (b *bench) fsyncTime() (time.Duration, error) {
	file, err := os.CreateTemp(b.dir, "fsync")
	if err != nil {
		return 0, err
	}
	defer file.Close()
	var times []time.Duration
	for range 51 {
		start := time.Now()
		if _, err := file.Write(make([]byte, 4096)); err != nil {
			return 0, err
		}
		if err := file.Sync(); err != nil {
			return 0, err
		}
		times = append(times, time.Since(start))
	}
	return median(times), nil
}

// begin tells what comes next, unless the run is to end.
func (b *bench) begin(format string, args ...any) error {
	fmt.Fprintf(b.progress, format+"\n", args...)
	return b.ctx.Err()
}

func median[T int | int64 | float64 | time.Duration](values []T) T {
	sorted := slices.Sorted(slices.Values(values))
	if len(sorted) == 0 {
		return 0
	}
	return sorted[len(sorted)/2]
}

// medianRatio returns the median over the rounds of what values are in units of base.
func medianRatio[T int | int64 | float64 | time.Duration](values, base []T) float64 {
	var ratios []float64
	for round := range min(len(values), len(base)) {
		ratios = append(ratios, float64(values[round])/float64(base[round]))
	}
	return median(ratios)
}

// turns returns the order of n contestants in a round: each round another one begins, since the first may pay for what
// the last one left behind.
func turns(n, round int) (order []int) {
	for i := range n {
		order = append(order, (i+round)%n)
	}
	return order
}

// thousands writes n as 1,234,567.
func thousands(n float64) string {
	s := fmt.Sprintf("%.0f", n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// row prints a row of a Markdown table.
func (b *bench) row(cells ...string) {
	fmt.Fprintf(b.out, "| %s |\n", strings.Join(cells, " | "))
}

// header prints the head of a Markdown table, of which the first column is text and the others are numbers, but for
// those that end in a space.
func (b *bench) header(cells ...string) {
	b.row(cells...)
	line := "|"
	for i, cell := range cells {
		if i == 0 || strings.HasSuffix(cell, " ") {
			line += " --- |"
		} else {
			line += " ---: |"
		}
	}
	fmt.Fprintln(b.out, line)
}
