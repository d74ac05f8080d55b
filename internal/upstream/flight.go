package upstream

import (
	"context"
	"errors"
	"time"

	"imdsgate/internal/imds"
)

// flight is one call for all who want its answer. It goes on for as long as one
// of them waits, or something is to be renewed. One for an identity goes on when it
// has had its turn: the service works on it in any case, and counts it among the
// few at once.
type flight struct {
	key    string
	short  bool // it gets less time than a caller would give it
	lasts  bool // once it has had a turn it goes on without waiters
	ctx    context.Context
	cancel context.CancelCauseFunc
	party  party
	done   chan struct{} // closed when one of the results is there

	// These belong to Cache.mu.
	waiters int
	behind  bool // it goes on without waiters
	over    bool // done is closed
	taken   bool // large is somebody's, and with it the right to cancel

	// The results, readable once done is closed.
	entry    *entry
	err      error
	panicked any
	large    *Answer // its body is too large to be shared; under Cache.mu: there is one taker
}

// fetch gets the answer by a flight. One that somebody else leads may fail for
// that one's reasons: then there is one of our own, whatever others have begun meanwhile.
func (c *Cache) fetch(ctx context.Context, k *keys, r *Request) (*Answer, error) {
	for last := false; ; last = true {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		f, led, kept := c.join(k, r, last)
		switch {
		case kept != nil:
			return kept, nil
		case f == nil:
			return c.Source.Answer(ctx, *r)
		}
		a, err := c.wait(ctx, f, k, r, led)
		if led || !isOwn(err) && !(f.short && errors.Is(err, ErrTimeout)) {
			return a, err
		}
	}
}

// isOwn reports whether the error is about who asked, not about the service.
func isOwn(err error) bool {
	return errors.Is(err, ErrBusy) || errors.Is(err, ErrAway) || errors.Is(err, ErrGone)
}

// join adds a waiter to the flight that is under way, or to a new one, which led
// says, and which lead demands. It is an answer instead if that has come in the meantime, and nothing at
// all once the cache is closed.
func (c *Cache) join(k *keys, r *Request, lead bool) (f *flight, led bool, kept *Answer) {
	c.mu.Lock()
	f = c.flights[k.flight]
	if f == nil || lead {
		if c.closed {
			c.mu.Unlock()
			return nil, false, nil
		}
		// A flight leaves the table after its answer has come to the store.
		if e, ok := c.store.GetIfPresent(k.slot); ok && !k.bypass {
			mono, wall := c.now()
			age := mono.Sub(e.at)
			if left := e.left(age, wall); e.isFresh(age, left, c.margin()) {
				c.mu.Unlock()
				return nil, false, e.worded(left, Hit)
			}
		}
		f, led = c.start(k, r, flightTime), true
	}
	f.waiters++
	c.mu.Unlock()
	if !led {
		f.party.join(r.Workload)
	}
	return f, led, nil
}

// behind renews what is kept, with nobody waiting.
func (c *Cache) behind(k *keys, r *Request, limit time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flights[k.flight] == nil && !c.closed {
		c.start(k, r, limit).behind = true
	}
}

// alongside has a call that is under way wait in the line of one more workload,
// which is served what there is meanwhile: who had it begin may be the last to
// have its turn.
func (c *Cache) alongside(k *keys, r *Request) {
	c.mu.Lock()
	f := c.flights[k.flight]
	c.mu.Unlock()
	if f != nil {
		f.party.join(r.Workload)
	}
}

// start begins a flight; c.mu is held.
func (c *Cache) start(k *keys, r *Request, limit time.Duration) *flight {
	f := &flight{key: k.flight, short: limit < flightTime, lasts: r.Query.Family == imds.Identity, done: make(chan struct{})}
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	f.party.join(r.Workload)
	c.flights[f.key] = f
	c.all[f] = struct{}{}
	c.run.Add(1)
	go c.fly(f, *k, shared(*r), limit)
	return f
}

// fly makes the call and hands its results to the waiters.
func (c *Cache) fly(f *flight, k keys, r Request, limit time.Duration) {
	defer c.run.Done()
	defer c.land(f)
	defer func() {
		if f.panicked = recover(); f.panicked != nil {
			f.err = ErrProtocol
		}
	}()
	f.party.clock(limit, func() { f.cancel(ErrTimeout) })
	defer f.party.stop()
	begun := time.Now()
	r.party = &f.party
	a, err := c.Source.Answer(f.ctx, r)
	if err == nil {
		f.entry, f.large, err = c.load(a, begun)
	}
	switch {
	case f.large != nil:
	case err == nil:
		c.keep(&k, &r, f.entry)
	default:
		f.err = err
		switch {
		case isOwn(err) || f.party.turnless():
			c.unclaim(&k) // nobody has asked the service
		case f.ctx.Err() == nil || errors.Is(err, ErrTimeout):
			c.failed(&k)
		}
	}
}

// land ends a flight: who comes now begins another.
func (c *Cache) land(f *flight) {
	c.mu.Lock()
	f.over, f.behind = true, false
	delete(c.all, f)
	end := c.settle(f)
	close(f.done)
	c.mu.Unlock()
	end()
}

// wait is a waiter's part of a flight: to its end, or its own. What there is
// already is served if the flight brings nothing, or takes long.
func (c *Cache) wait(ctx context.Context, f *flight, k *keys, r *Request, led bool) (*Answer, error) {
	var long <-chan time.Time
	if e, left := c.alive(k); e != nil {
		patience := staleAfter
		if k.life.token && left <= c.margin() {
			patience = left / 2 // a better one is worth more, but not the last there is
		}
		t := time.NewTimer(patience)
		defer t.Stop()
		long = t.C
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		c.leave(f, false)
		return nil, context.Cause(ctx)
	case <-long:
		if !f.party.turnless() {
			c.failed(k)
		}
		if e, left := c.alive(k); e != nil {
			c.leave(f, true)
			return e.worded(left, Stale), nil
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			c.leave(f, false)
			return nil, context.Cause(ctx)
		}
	}
	return c.result(ctx, f, k, r, led)
}

// result is what a flight has brought for one of its waiters, who leaves it.
func (c *Cache) result(ctx context.Context, f *flight, k *keys, r *Request, led bool) (*Answer, error) {
	large := c.takeLarge(ctx, f)
	c.leave(f, false)
	if f.panicked != nil {
		panic(f.panicked)
	}
	if f.err != nil || f.entry != nil && isAway(f.entry.status) {
		if e, left := c.alive(k); e != nil {
			return e.worded(left, Stale), nil
		}
	}
	switch {
	case f.err != nil:
		return nil, f.err
	case f.entry != nil && led:
		return f.entry.asItCame(""), nil
	case f.entry != nil && plain(f.entry.header):
		return f.entry.asItCame(Flight), nil
	case large != nil:
		return large, nil
	default:
		return c.Source.Answer(ctx, *r) // it is somebody else's alone
	}
}

// leave is the end of a waiter's part, who may want the call to go on for those
// who come after.
func (c *Cache) leave(f *flight, goOn bool) {
	c.mu.Lock()
	f.waiters--
	f.behind = (f.behind || goOn || f.lasts && f.party.hasBegun()) && !f.over
	end := c.settle(f)
	c.mu.Unlock()
	end()
}

// settle ends what nobody waits for; c.mu is held. What it returns is to be
// called without.
func (c *Cache) settle(f *flight) func() {
	idle := f.waiters == 0 && !f.behind
	if (idle || f.over) && c.flights[f.key] == f {
		delete(c.flights, f.key)
	}
	var large *Answer
	if idle && f.over {
		large, f.large = f.large, nil
	}
	idle = idle && !f.taken
	return func() {
		if large != nil {
			large.Body.Close() // nobody is left to hear of an error
		}
		if idle {
			f.cancel(context.Canceled)
		}
	}
}
