package gate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/workload"
)

// Pauses of Accept when the machine is short of something.
const (
	shortPause = 5 * time.Millisecond
	longPause  = time.Second
)

// Accept returns the next connection that may come in. It waits out temporary
// errors itself; every other one means that the listener is lost.
func (t *tap) Accept() (net.Conn, error) {
	for pause := time.Duration(0); ; {
		nc, err := t.Listener.Accept()
		switch {
		case err == nil:
			if c := t.admit(nc); c != nil {
				return c, nil
			}
			pause = 0
		case t.stopping.Load():
			return nil, net.ErrClosed
		case !temporary(err):
			return nil, fmt.Errorf("gate: %w: %w", ErrListenerLost, err)
		default:
			if pause == 0 {
				t.gate.Log.Warn("connections cannot be accepted for the moment", "err", err)
			}
			pause = min(max(2*pause, shortPause), longPause)
			time.Sleep(pause)
		}
	}
}

// passing are the errors of accept(2) that do not mean the end of the listener:
// the machine is short of something, or the connection in the queue had an
// error of its own, which Linux reports here (accept(2), "Error handling").
var passing = []error{
	syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
	syscall.ECONNABORTED, syscall.EPROTO, syscall.ENETDOWN, syscall.ENETUNREACH, syscall.EHOSTUNREACH,
}

func temporary(err error) bool {
	var t interface{ Temporary() bool }
	if errors.As(err, &t) && t.Temporary() {
		return true
	}
	return slices.ContainsFunc(passing, func(e error) bool { return errors.Is(err, e) })
}

// admit binds the evidence to a connection, or closes it and returns nil.
func (t *tap) admit(nc net.Conn) *conn {
	c := t.newConn(addrPort(nc.RemoteAddr()))
	c.Conn = nc
	c.id = t.gate.conns.Add(1)
	local := addrPort(nc.LocalAddr())
	switch {
	case t.Local != nil && !slices.Contains(t.Local, local):
		nc.Close()
		t.turnedAway(c, &t.astray, "the connection was made to the gate's own port, not to the metadata service")
		return nil
	case !t.add(c):
		nc.Close()
		t.turnedAway(c, &t.over, "the listener has as many connections as it may")
		return nil
	}
	c.hosts = t.hosts(local)
	return c
}

func (t *tap) newConn(peer netip.AddrPort) *conn {
	return &conn{tap: t, evidence: workload.Evidence{
		Proof: t.Proof, Method: t.Method, Attachment: t.Attachment, Peer: peer,
	}}
}

// hosts are the values of Host that a connection may name beside the cloud's
// own. Who dials the gate's own address may name that.
func (t *tap) hosts(local netip.AddrPort) []string {
	var own []string
	if t.Local == nil && local.IsValid() {
		a := local.Addr().WithZone("")
		bare := a.String()
		if a.Is6() {
			bare = "[" + bare + "]"
		}
		own = []string{bare, netip.AddrPortFrom(a, local.Port()).String()}
	}
	if len(t.Hosts) == 0 && len(own) == 0 {
		return t.gate.Hosts
	}
	return slices.Concat(t.gate.Hosts, t.Hosts, own)
}

// tally puts a flood of like events together.
type tally struct {
	reason string
	count  int // since the last event
	last   time.Time
}

// turnedAway records connections that were closed at once: at most one event a
// second, which also stands for those before it that had none.
func (t *tap) turnedAway(c *conn, n *tally, reason string) {
	n.reason = reason
	n.count++
	if now := time.Now(); now.Sub(n.last) >= time.Second {
		n.last = now
		t.record(c, n)
	}
}

func (t *tap) record(c *conn, n *tally) {
	e := c.event()
	c.name(&e)
	if n == &t.astray {
		e.Proof = workload.None // the name is the listener's, not the caller's
	}
	e.Decision, e.Reason, e.Count = audit.Refuse, n.reason, n.count
	n.count = 0
	t.gate.record(e)
}

// recordRest records those that no event stands for yet.
func (t *tap) recordRest() {
	for _, n := range []*tally{&t.over, &t.astray} {
		if n.count > 0 {
			t.record(t.newConn(netip.AddrPort{}), n)
		}
	}
}
