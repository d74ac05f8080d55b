package audit_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/audit"
)

// gated is a writer that takes a line for each that comes from open, and all once
// that is closed.
type gated struct {
	open  chan struct{}
	calls []string
}

func (g *gated) Write(b []byte) (int, error) {
	<-g.open
	g.calls = append(g.calls, string(b))
	return len(b), nil
}

func (g *gated) verify(t *testing.T) audit.Summary {
	t.Helper()
	s, err := audit.Verify([]audit.Part{{Name: "x", R: strings.NewReader(strings.Join(g.calls, ""))}}, audit.Check{})
	if err != nil {
		t.Error(err)
	}
	return s
}

func TestSinkThatBlocksHoldsUpNobodyForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gated{open: make(chan struct{})}
		l := &audit.Log{Out: audit.NewStream(g), Queue: 4, Patience: time.Second}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); l.Run(ctx) }()
		begin := time.Now()
		for i := range 5 { // one that is being written, four that wait
			if err := l.Record(full()); err != nil || time.Since(begin) > 0 {
				t.Fatalf("event %d: %v after %v", i, err, time.Since(begin))
			}
			synctest.Wait()
		}
		for i, want := range []time.Duration{time.Second, 0, 0} { // only the first waits
			begin := time.Now()
			if err := l.Record(full()); !errors.Is(err, audit.ErrFull) || time.Since(begin) != want {
				t.Errorf("event %d of a full queue: %v after %v, want ErrFull after %v", i, err, time.Since(begin), want)
			}
		}
		for range 6 { // the start record and all that waits
			g.open <- struct{}{}
		}
		synctest.Wait()
		for range 5 {
			if err := l.Record(full()); err != nil {
				t.Errorf("once the sink works again: %v", err)
			}
			synctest.Wait()
		}
		begin = time.Now()
		if err := l.Record(full()); !errors.Is(err, audit.ErrFull) || time.Since(begin) != time.Second {
			t.Errorf("when it blocks again: %v after %v, want ErrFull after a second", err, time.Since(begin))
		}
		close(g.open)
		cancel()
		<-ended
		if s := g.verify(t); s.Records != 11 || s.Lost != 4 || l.Lost() != 4 {
			t.Errorf("got %d records and %d lost, %d counted; want 11, 4, 4", s.Records, s.Lost, l.Lost())
		}
	})
}

// Whoever records goes on as soon as there is room.
func TestRecordWaitsForRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gated{open: make(chan struct{})}
		l := &audit.Log{Out: audit.NewStream(g), Queue: 1}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); l.Run(ctx) }()
		time.AfterFunc(300*time.Millisecond, func() { close(g.open) })
		begin := time.Now()
		for range 3 {
			if err := l.Record(full()); err != nil {
				t.Error(err)
			}
		}
		if d := time.Since(begin); d != 300*time.Millisecond {
			t.Errorf("waited %v, want 300ms", d)
		}
		cancel()
		<-ended
		if s := g.verify(t); s.Records != 4 || s.Lost != 0 {
			t.Errorf("got %d records and %d lost, want 4 and 0", s.Records, s.Lost)
		}
	})
}

func TestOneWriteForOneLine(t *testing.T) {
	g := &gated{open: make(chan struct{})}
	close(g.open)
	l := &audit.Log{Out: audit.NewStream(g)}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); l.Run(ctx) }()
	const workers, each = 8, 50
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			for k := range each {
				e := full()
				e.ID, e.Reason = uint64(i*each+k), strings.Repeat("\u2028", 1+k*200)
				if err := l.Record(e); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	cancel()
	<-ended
	seen := make(map[uint64]bool)
	for _, call := range g.calls[1:] {
		var e audit.Event
		if err := json.Unmarshal([]byte(call), &e); err != nil || !strings.HasSuffix(call, "}\n") {
			t.Fatalf("not one whole line: %q: %v", call, err)
		}
		seen[e.ID] = true
	}
	if len(g.calls) != workers*each+1 || len(seen) != workers*each {
		t.Errorf("got %d writes of %d events, want %d and a start", len(g.calls), len(seen), workers*each)
	}
	if s := g.verify(t); s.Records != workers*each+1 {
		t.Errorf("got %d records in the chain", s.Records)
	}
}

// An event is not shared with the next one that uses its space.
func TestSpaceIsUsedAgainClean(t *testing.T) {
	var buf bytes.Buffer
	big := full()
	big.Reason = strings.Repeat("x", 64<<10)
	written(t, new(audit.Log), audit.NewStream(&buf), full(), big, audit.Event{ID: 2}, full())
	lines := strings.Split(buf.String(), "\n")
	var e audit.Line
	if err := json.Unmarshal([]byte(lines[3]), &e); err != nil || e.ID != 2 || e.Name != "" || e.Cut != nil {
		t.Errorf("got %+v (%v), want event 2 alone", e, err)
	}
}

func BenchmarkRecord(b *testing.B) {
	l, e := &audit.Log{Out: audit.NewStream(io.Discard)}, full()
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); l.Run(ctx) }()
	b.ReportAllocs()
	for b.Loop() {
		if err := l.Record(e); err != nil {
			b.Fatal(err)
		}
	}
	cancel()
	<-ended
}
