package gate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"imdsgate/internal/workload"
)

// Listener is a listener together with what is known about whoever reaches it.
type Listener struct {
	net.Listener

	Attachment uint64         // what the directory knows it by; 0 unless Proof is Listener
	Method     string         // the capture method, for the record
	Proof      workload.Proof // what a connection from this listener proves

	// Local are the addresses that callers must have dialled, the metadata
	// service's own. A connection to another one, such as the port that the
	// listener really has, is closed at once: only what the kernel steered here
	// carries the proof.
	//
	// Nil means a listener that is reached by its own address (proxy --listen):
	// all connections are taken, and that address is accepted as Host. It
	// cannot prove more than where a connection comes from.
	Local []netip.AddrPort

	Hosts []string // further accepted values of Host
}

// ServiceAddrs are the addresses of metadata services that callers are steered
// from: Listener.Local of a capture listener. The caller owns the slice.
func ServiceAddrs() []netip.AddrPort {
	return []netip.AddrPort{
		netip.MustParseAddrPort("169.254.169.254:80"),
		netip.MustParseAddrPort("[fd00:ec2::254]:80"),
	}
}

func (l *Listener) check() error {
	switch {
	case l.Listener == nil:
		return errors.New("gate: serve: no listener")
	case l.Proof > workload.Address && len(l.Local) == 0:
		return fmt.Errorf("gate: serve: proof %v needs the addresses that callers dial", l.Proof)
	}
	return nil
}

// check names what a gate cannot do without.
func (g *Gate) check() error {
	switch {
	case g.Directory == nil:
		return errors.New("gate: no directory")
	case g.Source == nil:
		return errors.New("gate: no source")
	case g.Audit == nil:
		return errors.New("gate: no audit sink")
	}
	return nil
}

// Serve answers the connections of one listener until ctx is cancelled, and
// closes it. It only closes its own descriptor: a listening socket that another
// process holds too goes on to queue connections.
//
// Cancelling lets requests in flight end, within DrainTime, and closes idle
// connections; then Serve returns nil. When the listener is lost it returns
// ErrListenerLost at once, and leaves the connections it has to their end, or to
// that of ctx.
// After Shutdown it returns net.ErrClosed.
func (g *Gate) Serve(ctx context.Context, l Listener) error {
	g.init()
	err := errors.Join(g.check(), l.check())
	if err == nil {
		t := newTap(g, l)
		if g.adopt(t) {
			return t.serve(ctx)
		}
		err = fmt.Errorf("gate: serve: %w", net.ErrClosed)
	}
	if l.Listener != nil {
		l.Close()
	}
	return err
}

// Shutdown ends the gate: it stops all listeners as cancelling Serve does, and
// cuts the requests that are still in flight when ctx is done; the error is
// ctx's then. When it returns no connection is left.
func (g *Gate) Shutdown(ctx context.Context) error {
	g.init()
	var err error
	taps := g.close()
	for _, t := range taps {
		t.stop()
	}
	for _, t := range taps {
		select {
		case <-t.gone:
		case <-ctx.Done():
			err = context.Cause(ctx)
			t.cut()
			<-t.gone
		}
	}
	return err
}

// adopt reports false when the gate takes no more listeners.
func (g *Gate) adopt(t *tap) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stopped {
		return false
	}
	if g.taps == nil {
		g.taps = make(map[*tap]struct{})
	}
	g.taps[t] = struct{}{}
	t.share = g.shareOf(t.Attachment)
	return true
}

// shareOf is called with mu held. Listeners without attachment share nothing.
func (g *Gate) shareOf(attachment uint64) *share {
	s := g.shares[attachment]
	if s == nil {
		s = &share{slots: make(chan struct{}, g.limits.InFlight)}
		if attachment != 0 {
			if g.shares == nil {
				g.shares = make(map[uint64]*share)
			}
			g.shares[attachment] = s
		}
	}
	s.taps++
	return s
}

func (g *Gate) forget(t *tap) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.taps, t)
	if t.share.taps--; t.share.taps == 0 {
		delete(g.shares, t.Attachment)
	}
}

// close makes adopt refuse, and returns the listeners adopted before.
func (g *Gate) close() []*tap {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stopped = true
	taps := make([]*tap, 0, len(g.taps))
	for t := range g.taps {
		taps = append(taps, t)
	}
	return taps
}
