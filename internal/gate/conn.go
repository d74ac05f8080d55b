package gate

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/workload"
)

// conn is an accepted connection with what is known about it from outside. The
// evidence is bound here, once; nothing the peer sends can change it.
type conn struct {
	net.Conn
	id       uint64
	tap      *tap
	evidence workload.Evidence
	hosts    []string             // accepted values of Host
	viewed   atomic.Pointer[view] // of a workload that no listener stands for

	// These follow what net/http does with the connection, so that a request
	// which it could not read, and so never gave to the handler, is recorded
	// too. They belong to the connection's goroutine.
	handled bool // the handler runs, or has run since the connection was idle
	unread  bool // bytes came, but the handler has not run for them
	status  int  // what net/http answered of its own accord
}

type connKey struct{}

func connContext(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// connState follows a connection through the http.Server.
func connState(c net.Conn, s http.ConnState) { c.(*conn).state(s) }

func (c *conn) state(s http.ConnState) {
	switch s {
	case http.StateActive:
		c.unread = true
	case http.StateIdle:
		c.handled = false
	case http.StateClosed:
		if c.unread || c.status != 0 {
			c.recordUnread()
		}
	}
	c.tap.state(c, s)
}

// handling notes that a request was read and given to the handler.
func (c *conn) handling() { c.handled, c.unread = true, false }

// Write sends all of p, for as long as the peer takes at least a byte of it
// every WriteTime.
func (c *conn) Write(p []byte) (int, error) {
	if !c.handled {
		c.status = statusOf(p)
	}
	for sent := 0; ; {
		c.SetWriteDeadline(time.Now().Add(c.tap.gate.limits.WriteTime))
		n, err := c.Conn.Write(p[sent:])
		sent += n
		if n == 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return sent, err
		}
	}
}

// CloseWrite lets net/http end its side first, so that a client which is still
// sending gets to read why it was refused.
func (c *conn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// statusOf reads the status out of "HTTP/1.1 400 …".
func statusOf(p []byte) int {
	const at = len("HTTP/1.1 ")
	if len(p) < at+3 {
		return 0
	}
	n := 0
	for _, b := range p[at : at+3] {
		n = 10*n + int(b-'0')
	}
	return n
}

// recordUnread tells of a request that never became one.
func (c *conn) recordUnread() {
	e := c.event()
	c.name(&e)
	e.Decision = audit.Refuse
	e.Status = c.status
	switch c.status {
	case 0:
		e.Reason = "incomplete: the connection ended before a whole request had come"
	case http.StatusRequestHeaderFieldsTooLarge:
		e.Reason = "header_too_large: the header of the request is too large"
	default:
		e.Reason = "malformed: the request is not proper HTTP/1.1"
	}
	c.tap.gate.record(e)
}

// event is the part of an event that the connection itself knows.
func (c *conn) event() audit.Event {
	return audit.Event{
		Time:   time.Now().UTC(),
		Conn:   c.id,
		Proof:  c.evidence.Proof,
		Method: c.evidence.Method,
		Peer:   c.evidence.Peer,
	}
}

// name adds who stands behind the connection, if that is known.
func (c *conn) name(e *audit.Event) {
	if c.tap == nil {
		return
	}
	if w, ok := c.tap.gate.Directory.Lookup(c.evidence); ok {
		describe(e, w)
	}
}

// stopping reports whether the connection's listener is to end.
func (c *conn) stopping() bool { return c.tap != nil && c.tap.stopping.Load() }

// slots are the places for requests to the source; nil, for a request that came
// by no listener of ours, has none.
func (c *conn) slots() chan struct{} {
	if c.tap == nil {
		return nil
	}
	return c.tap.share.slots
}

// addrPort is an address in the one form that is compared: no IPv4 in IPv6.
func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := t.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}
