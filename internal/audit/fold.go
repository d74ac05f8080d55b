package audit

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"time"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// Fold is a Sink over a Sink that puts events together where a workload makes a
// flood of them, so that no workload fills the record, or pushes others out of it.
//
// A workload has Burst events by themselves, and Rate more each second. Beyond
// that, events that differ in nothing but time, connection and size become one,
// with Count and Until, handed on within a second. It tells 32 kinds of a flood
// apart at a time; of further ones it keeps all but method, target, identity and reason.
//
// The fields are set before the first Record. Run hands on what waits.
type Fold struct {
	Sink Sink

	Rate, Burst float64          // 0: 40 events/s, and 400
	Now         func() time.Time // nil: time.Now

	mu  sync.Mutex
	all map[workload.ID]*flood
}

const (
	foldRate, foldBurst = 40, 400
	foldEvery           = time.Second
	maxKinds            = 32
	maxFloods           = 4096 // workloads; those beyond share one
)

// flood is what is known of one workload.
type flood struct {
	left  float64 // events that may still go by themselves
	at    time.Time
	kinds map[alike]*Event
}

// alike is what events have in common that become one.
type alike struct {
	name, member, method, verb, target, identity, rule, reason, mode, would, cache string
	action                                                                         imds.Action
	decision                                                                       Decision
	proof                                                                          workload.Proof
	snapshot                                                                       uint64
	status                                                                         int
	upstream                                                                       bool
}

func alikeOf(e *Event) alike {
	return alike{
		name: e.Name, member: e.Member, method: e.Method, verb: e.Verb, target: e.Target, identity: e.Identity, rule: e.Rule, reason: e.Reason,
		mode: e.Mode, would: e.Would, cache: e.Cache, action: e.Action, decision: e.Decision, proof: e.Proof,
		snapshot: e.Snapshot, status: e.Status, upstream: e.Upstream,
	}
}

// Record hands the event on, or keeps it for Run.
func (f *Fold) Record(e Event) error {
	if f.keep(&e) {
		return nil
	}
	return f.Sink.Record(e)
}

// keep reports whether the event waits to be handed on with others.
func (f *Fold) keep(e *Event) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	x := f.of(e.Workload)
	now := f.now()
	x.left = min(x.left+now.Sub(x.at).Seconds()*cmp.Or(f.Rate, foldRate), cmp.Or(f.Burst, foldBurst))
	x.at = now
	if x.left >= 1 {
		x.left--
		return false
	}
	k := alikeOf(e)
	first := x.kinds[k]
	if first == nil && len(x.kinds) >= maxKinds {
		// Nothing is left in it that a caller words.
		k.verb, k.target, k.identity, k.reason = "", "", "", "more kinds of requests than are told apart in a flood"
		e.Verb, e.Target, e.Identity, e.Reason = k.verb, k.target, k.identity, k.reason
		first = x.kinds[k]
	}
	n := max(e.Count, 1)
	if first == nil {
		if x.kinds == nil {
			x.kinds = make(map[alike]*Event)
		}
		kept := *e
		kept.Count, kept.Until = n, e.Time
		x.kinds[k] = &kept
		return true
	}
	first.Count += n
	first.Bytes += e.Bytes
	first.Duration = max(first.Duration, e.Duration)
	if e.Time.After(first.Until) {
		first.Until = e.Time
	}
	return true
}

func (f *Fold) now() time.Time {
	if f.Now != nil {
		return f.Now()
	}
	return time.Now()
}

func (f *Fold) of(id workload.ID) *flood {
	if f.all == nil {
		f.all = make(map[workload.ID]*flood)
	}
	x := f.all[id]
	if x == nil && len(f.all) >= maxFloods {
		id = ""
		x = f.all[id]
	}
	if x == nil {
		x = &flood{left: cmp.Or(f.Burst, foldBurst), at: f.now()}
		f.all[id] = x
	}
	return x
}

// Run hands on what waits, every second until ctx ends, and then the rest.
func (f *Fold) Run(ctx context.Context) {
	t := time.NewTicker(foldEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			f.Flush()
			return
		case <-t.C:
			f.Flush()
		}
	}
}

// Flush hands on what waits, at once, and returns the errors of the Sink, joined.
func (f *Fold) Flush() error {
	var errs []error
	for _, e := range f.take() {
		if e.Count == 1 {
			e.Count, e.Until = 0, time.Time{}
		}
		errs = append(errs, f.Sink.Record(*e))
	}
	return errors.Join(errs...)
}

// take empties what waits, and forgets workloads that have been quiet.
func (f *Fold) take() (waiting []*Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.now()
	for id, x := range f.all {
		for _, e := range x.kinds {
			waiting = append(waiting, e)
		}
		quiet := len(x.kinds) == 0
		clear(x.kinds)
		if quiet && x.left+now.Sub(x.at).Seconds()*cmp.Or(f.Rate, foldRate) >= cmp.Or(f.Burst, foldBurst) {
			delete(f.all, id)
		}
	}
	return waiting
}
