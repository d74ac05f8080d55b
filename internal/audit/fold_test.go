package audit_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// gathered keeps what comes.
type gathered struct {
	mu     sync.Mutex
	events []audit.Event
	err    error
}

func (r *gathered) Record(e audit.Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
	return r.err
}

func (r *gathered) count(keep func(audit.Event) bool) (lines, requests int) {
	for _, e := range r.events {
		if keep(e) {
			lines++
			requests += max(e.Count, 1)
		}
	}
	return lines, requests
}

func denied(who string, target string, at time.Time) audit.Event {
	return audit.Event{Time: at, Workload: workload.ID(who), Name: who, Verb: "GET", Action: imds.Unknown, Target: target, Decision: audit.Deny, Status: 403, Bytes: 100, Duration: 7}
}

func of(who string) func(audit.Event) bool {
	return func(e audit.Event) bool { return e.Name == who }
}

// A flood is a few lines that count all of it; a workload beside it has a line for
// each request, and so has the flooder when it is quiet again.
func TestFloodIsFolded(t *testing.T) {
	now := time.Unix(1000, 0).UTC()
	var r gathered
	f := &audit.Fold{Sink: &r, Now: func() time.Time { return now }}
	for i := range 10_000 {
		f.Record(denied("noisy", "/metadata/x", now.Add(time.Duration(i))))
		if i%100 == 0 {
			f.Record(denied("quiet", fmt.Sprint("/metadata/", i), now))
		}
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if lines, requests := r.count(of("noisy")); lines != 401 || requests != 10_000 {
		t.Errorf("noisy: %d lines for %d requests, want 401 for 10000", lines, requests)
	}
	if lines, requests := r.count(of("quiet")); lines != 100 || requests != 100 {
		t.Errorf("quiet: %d lines for %d requests, want 100 for 100", lines, requests)
	}
	last := r.events[len(r.events)-1]
	if last.Count != 9600 || last.Bytes != 960_000 || last.Until != now.Add(9999) || last.Time != now.Add(400) || last.Target != "/metadata/x" {
		t.Errorf("got %+v", last)
	}
	now = now.Add(time.Minute)
	r.events = nil
	f.Record(denied("noisy", "/metadata/y", now))
	if len(r.events) != 1 || r.events[0].Count != 0 {
		t.Errorf("when it is quiet again: got %+v", r.events)
	}
}

// Whoever varies the target is not told apart for ever, and is counted all the same.
func TestFloodOfManyKinds(t *testing.T) {
	now := time.Unix(1000, 0)
	var r gathered
	f := &audit.Fold{Sink: &r, Now: func() time.Time { return now }, Burst: 1, Rate: 1}
	for i := range 1000 {
		f.Record(denied("noisy", fmt.Sprint("/metadata/", i), now))
	}
	f.Flush()
	lines, requests := r.count(of("noisy"))
	if lines != 1+32+1 || requests != 1000 {
		t.Errorf("%d lines for %d requests, want 34 for 1000", lines, requests)
	}
	rest := 0
	for _, e := range r.events {
		if e.Target == "" {
			rest = e.Count
			if e.Action != imds.Unknown || e.Decision != audit.Deny || !strings.HasPrefix(e.Reason, "more kinds") {
				t.Errorf("got %+v", e)
			}
		}
	}
	if rest != 967 {
		t.Errorf("%d are counted without target, want 967", rest)
	}
}

// Nor is whoever varies what else it words: the method, the identity.
func TestFloodOfManyWords(t *testing.T) {
	now := time.Unix(1000, 0)
	for name, vary := range map[string]func(*audit.Event, int){
		"method":   func(e *audit.Event, i int) { e.Verb = fmt.Sprint("M", i) },
		"identity": func(e *audit.Event, i int) { e.Identity = fmt.Sprint("client_id=", i) },
		"all": func(e *audit.Event, i int) {
			e.Verb, e.Target, e.Identity, e.Reason = fmt.Sprint("M", i), fmt.Sprint("/", i), fmt.Sprint("object_id=", i), fmt.Sprint(i)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var r gathered
			f := &audit.Fold{Sink: &r, Now: func() time.Time { return now }, Burst: 1, Rate: 1}
			for i := range 1000 {
				e := denied("noisy", "/t", now)
				vary(&e, i)
				f.Record(e)
			}
			f.Flush()
			if lines, requests := r.count(of("noisy")); lines != 34 || requests != 1000 {
				t.Errorf("%d lines for %d requests, want 34 for 1000", lines, requests)
			}
		})
	}
}

// What differs in more than time and size is never put together.
func TestOtherThingsStayApart(t *testing.T) {
	now := time.Unix(1000, 0)
	var r gathered
	f := &audit.Fold{Sink: &r, Now: func() time.Time { return now }, Burst: 1, Rate: 1}
	base := denied("w", "/t", now)
	f.Record(base) // by itself
	edits := []func(*audit.Event){
		func(*audit.Event) {}, func(e *audit.Event) { e.Decision = audit.Allow }, func(e *audit.Event) { e.Status = 200 },
		func(e *audit.Event) { e.Identity = "client_id=x" }, func(e *audit.Event) { e.Snapshot = 2 }, func(e *audit.Event) { e.Rule = "r" },
		func(e *audit.Event) { e.Action = imds.IdentityToken }, func(e *audit.Event) { e.Verb = "POST" }, func(e *audit.Event) { e.Would = "deny" },
		func(e *audit.Event) { e.Proof = workload.Listener }, func(e *audit.Event) { e.Upstream = true }, func(e *audit.Event) { e.Member = "m" },
	}
	for range 3 {
		for _, edit := range edits {
			e := base
			edit(&e)
			f.Record(e)
		}
	}
	f.Flush()
	if len(r.events) != 1+len(edits) {
		t.Errorf("got %d events, want %d", len(r.events), 1+len(edits))
	}
	for _, e := range r.events[1:] {
		if e.Count != 3 {
			t.Errorf("got %+v, want 3 of each", e)
		}
	}
}

// Many workloads, addresses for instance, are not remembered for ever.
func TestFoldForgets(t *testing.T) {
	now := time.Unix(1000, 0)
	var r gathered
	f := &audit.Fold{Sink: &r, Now: func() time.Time { return now }, Burst: 10}
	for i := range 10_000 {
		f.Record(denied(fmt.Sprint("w", i), "/t", now))
	}
	f.Flush()
	if _, requests := r.count(func(audit.Event) bool { return true }); requests != 10_000 {
		t.Errorf("got %d requests, want all", requests)
	}
}

func TestFoldTellsOfLoss(t *testing.T) {
	full := errors.New("full")
	r := gathered{err: full}
	f := &audit.Fold{Sink: &r, Burst: 1}
	if err := f.Record(denied("w", "/t", time.Now())); !errors.Is(err, full) {
		t.Errorf("record: got %v", err)
	}
	if err := f.Record(denied("w", "/t", time.Now())); err != nil {
		t.Errorf("kept: got %v", err)
	}
	if err := f.Flush(); !errors.Is(err, full) {
		t.Errorf("flush: got %v", err)
	}
}

// Nothing is lost between many callers and the end of Run.
func TestFoldCountsAll(t *testing.T) {
	var r gathered
	f := &audit.Fold{Sink: &r, Burst: 3, Rate: 1}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); f.Run(ctx) }()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 2000 {
				f.Record(denied(fmt.Sprint("w", rand.IntN(3)), fmt.Sprint("/", rand.IntN(40)), time.Now()))
			}
		})
	}
	wg.Wait()
	cancel()
	<-ended
	if lines, requests := r.count(func(audit.Event) bool { return true }); requests != 16_000 || lines > 1000 {
		t.Errorf("%d lines for %d requests, want 16000 requests", lines, requests)
	}
}

func BenchmarkFold(b *testing.B) {
	f := &audit.Fold{Sink: audit.Tee{}, Burst: 1, Rate: 1}
	e := denied("w", "/metadata/instance/compute", time.Now())
	b.ReportAllocs()
	for b.Loop() {
		f.Record(e)
	}
}
