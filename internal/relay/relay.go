// Package relay carries bytes between two sockets, without looking at them.
package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// ErrListenerLost is returned by Run when the listener can accept nothing more
// and nobody has cancelled: it was closed or destroyed from outside.
var ErrListenerLost = errors.New("listener lost")

// What zero means for DialTime and Conns.
const (
	defaultDialTime = 5 * time.Second
	defaultConns    = 1024
)

// Relay carries the connections of a listener to where Dial leads. The fields
// must not be changed once Run was called.
//
// What one side says last is passed on as just that: its half-close is the
// other's half-close, and its reset is the other's reset. A side that reads
// slowly is waited for, with at most 64 KiB of it held here.
type Relay struct {
	// Dial connects to the target. It is called once for each connection, so a
	// target that changes counts for new connections alone. Its context ends
	// after DialTime, and with Run. Never nil. When it fails the caller is reset.
	Dial func(ctx context.Context) (net.Conn, error)

	DialTime time.Duration // at most for a dial; 0 means 5 s
	IdleTime time.Duration // after so long without a byte either way both sides are reset; 0 means never
	Conns    int           // of each listener at the same time, further ones wait in its queue; 0 means 1024

	// Failed is told of each connection that could not be passed on, from a
	// goroutine of that connection; nil tells nobody.
	Failed func(error)

	accepted, failed, idle atomic.Uint64
	toTarget, toCaller     atomic.Uint64 // of connections that have ended

	mu   sync.Mutex
	open map[*pair]struct{}
}

// Stats are counts since the relay was made.
type Stats struct {
	Open     int    // connections at this moment that were passed on
	Accepted uint64 // connections taken from listeners
	Failed   uint64 // those that could not be passed on, as Dial failed
	Idle     uint64 // those that were cut after IdleTime
	ToTarget uint64 // bytes
	ToCaller uint64 // bytes
}

// Stats counts. It may be called at any time.
func (r *Relay) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := Stats{
		Open: len(r.open), Accepted: r.accepted.Load(), Failed: r.failed.Load(), Idle: r.idle.Load(),
		ToTarget: r.toTarget.Load(), ToCaller: r.toCaller.Load(),
	}
	for p := range r.open {
		s.ToTarget += p.toTarget.Load()
		s.ToCaller += p.toCaller.Load()
	}
	return s
}

// Run passes on what l accepts until ctx is cancelled, then resets what is open,
// and returns nil when no connection and no goroutine of it is left. It closes l
// in any case. The error is ErrListenerLost if l failed by itself. Run may be
// called for several listeners, at once too.
func (r *Relay) Run(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer func() {
		cancel()
		all.Wait()
	}()
	defer context.AfterFunc(ctx, func() { l.Close() })() // wakes Accept
	defer l.Close()
	if r.IdleTime > 0 {
		all.Go(func() { r.sweep(ctx) })
	}
	slots := make(chan struct{}, orDefault(r.Conns, defaultConns))
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := accept(ctx, l)
		switch {
		case ctx.Err() != nil:
			if err == nil {
				reset(c)
			}
			return nil
		case err != nil:
			return fmt.Errorf("%w: %w", ErrListenerLost, err)
		}
		r.accepted.Add(1)
		all.Go(func() {
			r.pass(ctx, c)
			<-slots
		})
	}
}

func orDefault[T int | time.Duration](v, zero T) T {
	if v == 0 {
		return zero
	}
	return v
}

// Pauses of accept when the machine is short of something.
const (
	shortPause = 5 * time.Millisecond
	longPause  = time.Second
)

// accept waits out errors that are not the listener's end.
func accept(ctx context.Context, l net.Listener) (net.Conn, error) {
	for pause := shortPause; ; pause = min(2*pause, longPause) {
		c, err := l.Accept()
		if err == nil || !passing(err) {
			return c, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// passing reports whether the machine is short of something, or a connection in
// the queue had an error of its own.
func passing(err error) bool {
	return slices.ContainsFunc(passingErrors, func(e error) bool { return errors.Is(err, e) })
}

// pass carries one connection to its end.
func (r *Relay) pass(ctx context.Context, caller net.Conn) {
	target, err := r.dial(ctx)
	if err != nil {
		reset(caller) // to the caller it is as if nobody listened
		if ctx.Err() == nil {
			r.failed.Add(1)
			if r.Failed != nil {
				r.Failed(err)
			}
		}
		return
	}
	p := &pair{caller: caller, target: target}
	r.add(p)
	defer context.AfterFunc(ctx, p.reset)()
	p.carry()
	r.remove(p)
}

func (r *Relay) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, orDefault(r.DialTime, defaultDialTime))
	defer cancel()
	return r.Dial(ctx)
}

func (r *Relay) add(p *pair) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open == nil {
		r.open = make(map[*pair]struct{})
	}
	r.open[p] = struct{}{}
}

func (r *Relay) remove(p *pair) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.open, p)
	r.toTarget.Add(p.toTarget.Load())
	r.toCaller.Add(p.toCaller.Load())
}

// sweep resets connections that carry nothing. Looking at all of them now and
// then costs less than a timer for each read.
func (r *Relay) sweep(ctx context.Context) {
	tick := time.NewTicker(max(r.IdleTime/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			for _, p := range r.still(now) {
				r.idle.Add(1)
				p.reset()
			}
		}
	}
}

// still lists what has been so for IdleTime.
func (r *Relay) still(now time.Time) (ps []*pair) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p := range r.open {
		if p.still(now) >= r.IdleTime {
			ps = append(ps, p)
			p.since = now // once is enough
		}
	}
	return ps
}
