package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// patience is how long a test waits for what should happen at once.
const patience = 20 * time.Second

// rig is a relay that runs, and the target that it leads to.
type rig struct {
	*Relay
	address string        // of the relay
	arrived chan net.Conn // at the target
	ended   chan error    // Run's result
	end     context.CancelFunc
	l       net.Listener // the relay's
}

// newRig starts a relay. Its Dial leads to the rig's target unless it is set.
func newRig(t *testing.T, r *Relay) *rig {
	t.Helper()
	target := listen(t)
	g := &rig{Relay: r, arrived: make(chan net.Conn, 16), ended: make(chan error, 1), l: listen(t)}
	g.address = g.l.Addr().String()
	if r.Dial == nil {
		r.Dial = dialTo(target.Addr().String())
	}
	go g.arrive(target)
	ctx, cancel := context.WithCancel(t.Context())
	g.end = cancel
	go func() { g.ended <- r.Run(ctx, g.l) }()
	t.Cleanup(cancel)
	return g
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func (g *rig) arrive(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		g.arrived <- c
	}
}

// call connects to the relay.
func (g *rig) call(t *testing.T) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", g.address)
	if err != nil {
		t.Fatal(err)
	}
	return patient(t, c)
}

// both connects to the relay and returns this end and the target's.
func (g *rig) both(t *testing.T) (caller, target *net.TCPConn) {
	t.Helper()
	caller = g.call(t)
	select {
	case c := <-g.arrived:
		return caller, patient(t, c)
	case <-time.After(patience):
		t.Fatal("nothing arrived at the target")
	}
	return nil, nil
}

func patient(t *testing.T, c net.Conn) *net.TCPConn {
	t.Helper()
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

func say(t *testing.T, c net.Conn, words string) {
	t.Helper()
	if _, err := c.Write([]byte(words)); err != nil {
		t.Error(err)
	}
}

// hear wants these words next.
func hear(t *testing.T, c net.Conn, words string) {
	t.Helper()
	buf := make([]byte, len(words))
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != words {
		t.Errorf("heard %q, %v, want %q", buf, err, words)
	}
}

// hearEnd wants a good end next.
func hearEnd(t *testing.T, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("heard %d bytes, %v, want the end", n, err)
	}
}

// hearReset wants a reset next.
func hearReset(t *testing.T, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("heard %d bytes, %v, want a reset", n, err)
	}
}

// wsaeconnreset is Windows' name for it, which is not syscall.ECONNRESET there.
const wsaeconnreset = syscall.Errno(10054)

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, wsaeconnreset)
}

func (g *rig) wantEnded(t *testing.T, want error) {
	t.Helper()
	select {
	case err := <-g.ended:
		if !errors.Is(err, want) {
			t.Errorf("Run returned %v, want %v", err, want)
		}
	case <-time.After(patience):
		t.Fatal("Run does not return")
	}
}

// awaitStats polls the counts, which are the relay's only sign of some events.
func (g *rig) awaitStats(t *testing.T, ok func(Stats) bool) Stats {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s := g.Stats()
		if ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("counts stay at %+v", s)
		}
	}
}

func TestBothWays(t *testing.T) {
	g := newRig(t, &Relay{})
	caller, target := g.both(t)
	for range 3 { // kept alive
		say(t, caller, "question")
		hear(t, target, "question")
		say(t, target, "a longer answer")
		hear(t, caller, "a longer answer")
	}
	if got, want := g.Stats(), (Stats{Open: 1, Accepted: 1, ToTarget: 24, ToCaller: 45}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	caller.Close()
	hearEnd(t, target)
	target.Close()
	s := g.awaitStats(t, func(s Stats) bool { return s.Open == 0 })
	if want := (Stats{Accepted: 1, ToTarget: 24, ToCaller: 45}); s != want {
		t.Errorf("got %+v at the end, want %+v", s, want)
	}
}

func TestHalfClose(t *testing.T) {
	for _, tc := range []struct {
		name  string
		first func(caller, target *net.TCPConn) (*net.TCPConn, *net.TCPConn)
	}{
		{"caller_ends_first", func(c, t *net.TCPConn) (*net.TCPConn, *net.TCPConn) { return c, t }},
		{"target_ends_first", func(c, t *net.TCPConn) (*net.TCPConn, *net.TCPConn) { return t, c }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newRig(t, &Relay{})
			first, second := tc.first(g.both(t))
			say(t, first, "last words")
			first.CloseWrite()
			hear(t, second, "last words")
			hearEnd(t, second)
			say(t, second, "still here") // the other way is open
			hear(t, first, "still here")
			if s := g.Stats(); s.Open != 1 {
				t.Errorf("%d connections open, want 1: one way is left", s.Open)
			}
			second.CloseWrite()
			hearEnd(t, first)
			g.awaitStats(t, func(s Stats) bool { return s.Open == 0 })
		})
	}
}

func TestReset(t *testing.T) {
	for _, tc := range []struct {
		name string
		pick func(caller, target *net.TCPConn) (*net.TCPConn, *net.TCPConn)
	}{
		{"caller_resets", func(c, t *net.TCPConn) (*net.TCPConn, *net.TCPConn) { return c, t }},
		{"target_resets", func(c, t *net.TCPConn) (*net.TCPConn, *net.TCPConn) { return t, c }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newRig(t, &Relay{})
			bad, other := tc.pick(g.both(t))
			say(t, bad, "x")
			hear(t, other, "x")
			bad.SetLinger(0)
			bad.Close()
			hearReset(t, other)
			g.awaitStats(t, func(s Stats) bool { return s.Open == 0 })
		})
	}
}

// TestSlowReader sends more than all buffers hold to somebody who reads nothing
// at first: the sender is held up, and then all of it arrives.
func TestSlowReader(t *testing.T) {
	g := newRig(t, &Relay{})
	caller, target := g.both(t)
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<20) // 16 MiB
	wrote := make(chan error, 1)
	var done atomic.Bool
	go func() {
		_, err := target.Write(sent)
		done.Store(true)
		target.CloseWrite()
		wrote <- err
	}()
	g.awaitStats(t, func(s Stats) bool { return s.ToCaller > 1<<16 })
	if done.Load() {
		t.Error("16 MiB vanished into buffers: the sender was not held up")
	}
	got, err := io.ReadAll(caller)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("got %d bytes, %v, want the %d that were sent", len(got), err, len(sent))
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
}
