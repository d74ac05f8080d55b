package upstream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"time"
)

// flight is one call for all who want its answer. It goes on for as long as one
// of them waits, or something is to be renewed.
type flight struct {
	key    string
	short  bool // it gets less time than a caller would give it
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
// that one's reasons: then there is one of our own.
func (c *Cache) fetch(ctx context.Context, k *keys, r *Request) (*Answer, error) {
	for last := false; ; last = true {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		f, led, kept := c.join(k, r)
		switch {
		case kept != nil:
			return kept, nil
		case f == nil:
			return c.Source.Answer(ctx, *r)
		}
		a, err := c.wait(ctx, f, k, r, led)
		if led || last || !isOwn(err) && !(f.short && errors.Is(err, ErrTimeout)) {
			return a, err
		}
	}
}

// isOwn reports whether the error is about who asked, not about the service.
func isOwn(err error) bool {
	return errors.Is(err, ErrBusy) || errors.Is(err, ErrAway) || errors.Is(err, ErrGone)
}

// join adds a waiter to the flight that is under way, or to a new one, which led
// says. It is an answer instead if that has come in the meantime, and nothing at
// all once the cache is closed.
func (c *Cache) join(k *keys, r *Request) (f *flight, led bool, kept *Answer) {
	c.mu.Lock()
	f = c.flights[k.flight]
	if f == nil {
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

// start begins a flight; c.mu is held.
func (c *Cache) start(k *keys, r *Request, limit time.Duration) *flight {
	f := &flight{key: k.flight, short: limit < flightTime, done: make(chan struct{})}
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	f.party.join(r.Workload)
	c.flights[f.key] = f
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
	late := time.AfterFunc(limit, func() { f.cancel(ErrTimeout) })
	defer late.Stop()
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
		if f.ctx.Err() == nil || errors.Is(err, ErrTimeout) {
			c.failed(&k)
		}
	}
}

// load reads an answer into memory. If it is too large for that, it is given
// back, to be read on.
func (c *Cache) load(a *Answer, begun time.Time) (*entry, *Answer, error) {
	limit := c.maxBody()
	if a.Size > limit {
		return nil, a, nil
	}
	var buf bytes.Buffer
	buf.Grow(int(max(a.Size, 0)) + bytes.MinRead)
	_, err := buf.ReadFrom(io.LimitReader(a.Body, limit+1))
	body := buf.Bytes()
	if err == nil && int64(len(body)) > limit {
		rest := *a
		rest.Body = &resumed{read: body, Closer: a.Body, rest: a.Body}
		return nil, &rest, nil
	}
	if cerr := a.Body.Close(); err == nil {
		err = cerr
	}
	switch {
	case err != nil:
		return nil, nil, err
	case a.Size >= 0 && int64(len(body)) != a.Size:
		return nil, nil, ErrProtocol
	}
	return &entry{status: a.Status, header: a.Header.Clone(), body: bytes.Clone(body), at: begun}, nil, nil
}

// resumed is a body of which a part was read already.
type resumed struct {
	read []byte
	rest io.Reader
	io.Closer
}

func (b *resumed) Read(p []byte) (int, error) {
	if len(b.read) > 0 {
		n := copy(p, b.read)
		b.read = b.read[n:]
		return n, nil
	}
	return b.rest.Read(p)
}

// land ends a flight: who comes now begins another.
func (c *Cache) land(f *flight) {
	c.mu.Lock()
	f.over, f.behind = true, false
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
		c.failed(k)
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
	case f.entry != nil:
		return f.entry.asItCame(Flight), nil
	case large != nil:
		return large, nil
	default:
		return c.Source.Answer(ctx, *r) // somebody else took it
	}
}

// takeLarge makes the one body that cannot be shared its taker's, who is the
// one that can cancel it from then on.
func (c *Cache) takeLarge(ctx context.Context, f *flight) *Answer {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.large == nil {
		return nil
	}
	a := *f.large
	f.large, f.taken = nil, true
	stop := context.AfterFunc(ctx, func() { f.cancel(context.Cause(ctx)) })
	a.Body = &closer{ReadCloser: a.Body, then: func() {
		stop()
		f.cancel(context.Canceled)
	}}
	return &a
}

// leave is the end of a waiter's part, who may want the call to go on for those
// who come after.
func (c *Cache) leave(f *flight, goOn bool) {
	c.mu.Lock()
	f.waiters--
	f.behind = (f.behind || goOn) && !f.over
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
