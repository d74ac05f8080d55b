package gate

import (
	"context"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// tap is a listener while it is served, and until its last connection is
// closed. To the http.Server it is a listener whose Accept hands out only
// connections that may come in.
type tap struct {
	Listener
	gate     *Gate
	share    *share
	stopping atomic.Bool
	gone     chan struct{} // closed when nothing is left

	over, astray tally // of the goroutine that accepts

	mu     sync.Mutex
	conns  map[*conn]http.ConnState
	closed bool // the listener is
	ended  bool // no more connections will be accepted
}

func newTap(g *Gate, l Listener) *tap {
	return &tap{Listener: l, gate: g, gone: make(chan struct{})}
}

// share is what the listeners of one workload, one for each address family, may
// have together.
type share struct {
	slots chan struct{} // see Limits.InFlight
	conns atomic.Int64  // see Limits.Conns
	taps  int           // guarded by the gate's mu

	viewed atomic.Pointer[view]
}

// serve accepts until the listener is stopped or lost.
func (t *tap) serve(ctx context.Context) error {
	// It stays when the listener is lost: the connections that it leaves end when
	// ctx does.
	context.AfterFunc(ctx, t.stop)
	err := t.gate.server.Serve(t)
	t.end()
	if !t.stopping.Load() {
		return err
	}
	drain := time.NewTimer(t.gate.limits.DrainTime)
	defer drain.Stop()
	select {
	case <-t.gone:
	case <-drain.C:
		t.cut()
		<-t.gone
	}
	return nil
}

// stop closes the listener and what is idle. Requests in flight are the last of
// their connections.
func (t *tap) stop() {
	t.stopping.Store(true)
	t.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	for c, s := range t.conns {
		if s == http.StateIdle {
			c.Close()
		}
	}
}

// Close closes the listener's own descriptor. It never calls shutdown(2), which
// would end the socket for every process that holds it.
func (t *tap) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	return t.Listener.Close()
}

// end is called when no more connections will be accepted.
func (t *tap) end() {
	t.recordRest()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
	t.checkGone()
}

// cut closes all connections. Their requests see their context end, so that
// every source lets go of them.
func (t *tap) cut() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.conns {
		c.Close()
	}
}

// add counts a connection in, unless there are too many.
func (t *tap) add(c *conn) bool {
	if !t.take() {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conns == nil {
		t.conns = make(map[*conn]http.ConnState)
	}
	t.conns[c] = http.StateNew
	return true
}

// take counts a connection for the workload and for the whole gate, or does not.
func (t *tap) take() bool {
	l := &t.gate.limits
	if t.share.conns.Add(1) > int64(l.Conns) {
		t.share.conns.Add(-1)
		return false
	}
	if n := t.gate.open.Add(1); l.AllConns > 0 && n > int64(l.AllConns) {
		t.give()
		return false
	}
	return true
}

func (t *tap) give() {
	t.share.conns.Add(-1)
	t.gate.open.Add(-1)
}

// state follows a connection through the http.Server. One that falls idle while
// its listener stops has nothing to wait for.
func (t *tap) state(c *conn, s http.ConnState) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s == http.StateClosed {
		if _, ok := t.conns[c]; ok {
			t.give()
		}
		delete(t.conns, c)
		t.checkGone()
		return
	}
	t.conns[c] = s
	if s == http.StateIdle && t.stopping.Load() {
		c.Close()
	}
}

// checkGone is called with mu held, after what it looks at has changed.
func (t *tap) checkGone() {
	if t.ended && len(t.conns) == 0 {
		t.gate.forget(t)
		close(t.gone)
	}
}

var _ net.Listener = (*tap)(nil)
