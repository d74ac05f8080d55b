package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"imdsgate/internal/relay"
)

// capture is how the calls made here come to listeners of ours.
type capture interface {
	Listeners() ([]net.Listener, error) // the caller closes them
	Ensure() (repaired bool, err error) // puts back what is missing
	Detach() error                      // takes everything back
}

const (
	// captureCheck is between looks whether everything is in its place.
	captureCheck = 2 * time.Second
	// captureRetry is until a capture that was destroyed is tried again.
	captureRetry = time.Second
)

// forwarder captures, relays, and follows the target.
type forwarder struct {
	open   func(context.Context) (capture, error)
	target *target
	relay  relay.Relay
	log    *slog.Logger

	failing atomic.Bool // the last dial did
}

// Run forwards until ctx is cancelled, calls ready once it does, and leaves
// nothing behind. An error is one of the start, or of cleaning up.
func (f *forwarder) Run(ctx context.Context, ready func()) error {
	c, err := f.open(ctx)
	switch {
	case err != nil && ctx.Err() != nil: // it was to end before it had begun
		f.log.Warn("capture cannot be made", "error", err)
		return nil
	case err != nil:
		return captureOwnError(err)
	}
	f.relay.Dial = f.dial
	following, stop := context.WithCancel(ctx)
	var done sync.WaitGroup
	done.Go(func() { f.target.follow(following, f.log) })
	defer done.Wait()
	defer stop()
	f.log.Info("forwarding", "to", f.target.now().addr.String())
	ready()
	for {
		err := f.serve(ctx, c)
		derr := c.Detach()
		if ctx.Err() != nil {
			return derr
		}
		f.log.Warn("capture was destroyed: making it again", "error", errors.Join(err, derr))
		if c = f.reopen(ctx); c == nil {
			return nil
		}
	}
}

// reopen tries until it succeeds. It returns nil if ctx is cancelled before.
func (f *forwarder) reopen(ctx context.Context) capture {
	for {
		c, err := f.open(ctx)
		if err == nil {
			f.log.Info("forwarding again", "to", f.target.now().addr.String())
			return c
		}
		f.log.Warn("capture cannot be made", "error", err)
		select {
		case <-time.After(captureRetry):
		case <-ctx.Done():
			return nil
		}
	}
}

// serve relays what c captures, and keeps c whole, until ctx is cancelled or a
// listener is lost.
func (f *forwarder) serve(ctx context.Context, c capture) error {
	ls, err := c.Listeners()
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range ls {
		g.Go(func() error { return f.relay.Run(ctx, l) })
	}
	g.Go(func() error { f.keep(ctx, c); return nil })
	return g.Wait()
}

// keep puts back what others take away.
func (f *forwarder) keep(ctx context.Context, c capture) {
	tick := time.NewTicker(captureCheck)
	defer tick.Stop()
	failed := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		repaired, err := c.Ensure()
		switch {
		case err != nil && !failed:
			f.log.Warn("capture cannot be checked", "error", err)
		case repaired:
			f.log.Warn("capture was taken away: put back")
		}
		failed = err != nil
	}
}

// dial connects to the target; if that changes meanwhile, to the new one.
func (f *forwarder) dial(ctx context.Context) (net.Conn, error) {
	for {
		to := f.target.now()
		c, err := to.dial(ctx)
		switch {
		case err == nil:
			if f.failing.Swap(false) {
				f.log.Info("the proxy answers again", "to", to.addr.String())
			}
			return c, nil
		case to.replaced() && ctx.Err() == nil:
			continue
		case !f.failing.Swap(true) && !errors.Is(err, context.Canceled):
			f.log.Warn("the proxy does not answer: callers are reset", "error", err)
		}
		return nil, err
	}
}
