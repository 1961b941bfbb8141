package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"time"

	"offloadhook"
)

type openSizes struct{ rounds, finished, unfinished int }

var fullOpen = openSizes{rounds: 3, finished: 10_000_000, unfinished: 100_000}

const idsPerLine = 1024 // as a compaction writes them

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// writeJournal makes a journal of finished and unfinished events, in the text format that the Journal documents, which
// is faster than through the library. The finished have the numbers from 0 on, and the unfinished those after them.
func writeJournal(dir string, finished, unfinished int) error {
	body, err := bodies()
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	file, err := os.OpenFile(filepath.Join(dir, "events-00000001.log"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	out, now := bufio.NewWriterSize(file, 1<<18), time.Now().UnixMilli()
	for n := 0; n < finished; {
		var sums []byte
		for end := min(n+idsPerLine, finished); n < end; n++ {
			sum := sha256.Sum256([]byte(eventID(n)))
			sums = append(sums, sum[:16]...)
		}
		writeRecord(out, fmt.Appendf(nil, `{"sha256":"%x","at":%d}`, sums, now))
	}
	for n := range unfinished {
		n += finished
		writeRecord(out, fmt.Appendf(nil, `{"id":"%s","at":%d,"event":%s}`, eventID(n), now, body(n)))
	}
	return errors.Join(out.Flush(), file.Sync())
}

// writeRecord writes a line. If that fails, so does the Flush at the end.
func writeRecord(out *bufio.Writer, record []byte) {
	fmt.Fprintf(out, "%08x %s\n", crc32.Checksum(record, castagnoli), record)
}

// readJournal reads the files in dir and takes their checksum, as cheaply as it can be done.
func readJournal(dir string) (size int64, took time.Duration, err error) {
	start := time.Now()
	paths, err := filepath.Glob(filepath.Join(dir, "events-*.log"))
	if err != nil {
		return 0, 0, err
	}
	sum, buf := crc32.New(castagnoli), make([]byte, 1<<18)
	for _, path := range paths {
		file, err := os.Open(path)
		if err != nil {
			return 0, 0, err
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{sum}, struct{ io.Reader }{file}, buf)
		if err = errors.Join(err, file.Close()); err != nil {
			return 0, 0, err
		}
		size += n
	}
	return size, time.Since(start), nil
}

func (b *bench) openTable() error {
	dir := b.folder()
	if err := b.begin("writing a journal of %s finished ids and %s unfinished events",
		thousands(float64(b.open.finished)), thousands(float64(b.open.unfinished))); err != nil {
		return err
	}
	if err := writeJournal(dir, b.open.finished, b.open.unfinished); err != nil {
		return err
	}
	var reads, opens []time.Duration
	var size int64
	for n := range b.open.rounds {
		if err := b.begin("round %d of %d", n+1, b.open.rounds); err != nil {
			return err
		}
		bytes, read, err := readJournal(dir)
		if err != nil {
			return err
		}
		opened, err := b.openOnce(dir)
		if err != nil {
			return err
		}
		reads, opens, size = append(reads, read), append(opens, opened), bytes
	}
	fmt.Fprintf(b.out, "A journal of %s finished ids and %s unfinished events: %s MB, in the page cache.\n\n",
		thousands(float64(b.open.finished)), thousands(float64(b.open.unfinished)), thousands(float64(size)/1e6))
	b.header("opening", "time", "ratio")
	b.row("read the file, with a checksum", median(reads).Round(time.Millisecond).String(), "1.0")
	b.row("`OpenJournal`", median(opens).Round(time.Millisecond).String(), fmt.Sprintf("%.1f", medianRatio(opens, reads)))
	return nil
}

// openOnce opens the journal, sees that all is there, and closes it.
func (b *bench) openOnce(dir string) (took time.Duration, err error) {
	runtime.GC()
	debug.FreeOSMemory()
	start := time.Now()
	journal, err := offloadhook.OpenJournal(dir, 0)
	if err != nil {
		return 0, err
	}
	took = time.Since(start)
	defer func() { err = errors.Join(err, journal.Close()) }()
	ctx, pending := context.Background(), 0
	for env, err := range journal.Pending(ctx) {
		if err != nil {
			return 0, err
		}
		if want := eventID(b.open.finished + pending); env.EventID != want {
			return 0, fmt.Errorf("unfinished: %s, want %s", env.EventID, want)
		}
		pending++
	}
	if pending != b.open.unfinished {
		return 0, fmt.Errorf("%d events are unfinished, want %d", pending, b.open.unfinished)
	}
	for _, n := range []int{0, b.open.finished / 2, b.open.finished - 1} {
		fresh, err := journal.Claim(ctx, &offloadhook.Envelope{EventID: eventID(n)})
		if err != nil {
			return 0, err
		}
		if fresh {
			return 0, fmt.Errorf("%s is finished, and could be claimed", eventID(n))
		}
	}
	return took, nil
}
