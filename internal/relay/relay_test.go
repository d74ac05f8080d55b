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

func TestDialFails(t *testing.T) {
	boom := errors.New("boom")
	for _, tc := range []struct {
		name string
		dial func(context.Context) (net.Conn, error)
		want error
	}{
		{"refused", func(context.Context) (net.Conn, error) { return nil, boom }, boom},
		{"target_says_nothing", func(ctx context.Context) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}, context.DeadlineExceeded},
	} {
		t.Run(tc.name, func(t *testing.T) {
			failed := make(chan error, 1)
			g := newRig(t, &Relay{Dial: tc.dial, DialTime: 10 * time.Millisecond, Failed: func(err error) { failed <- err }})
			if c, err := net.Dial("tcp", g.address); err == nil {
				hearReset(t, patient(t, c))
			} else if !isReset(err) { // it can be as fast as that
				t.Error(err)
			}
			if err := <-failed; !errors.Is(err, tc.want) {
				t.Errorf("Failed was told %v, want %v", err, tc.want)
			}
			if s, want := g.Stats(), (Stats{Accepted: 1, Failed: 1}); s != want {
				t.Errorf("got %+v, want %+v", s, want)
			}
		})
	}
}

// TestTargetChanges leaves the connection that there is alone.
func TestTargetChanges(t *testing.T) {
	second := listen(t)
	var address atomic.Value
	g := newRig(t, &Relay{Dial: func(ctx context.Context) (net.Conn, error) {
		return dialTo(address.Load().(string))(ctx)
	}})
	first := listen(t)
	go g.arrive(first)
	address.Store(first.Addr().String())
	caller1, target1 := g.both(t)
	address.Store(second.Addr().String())
	go g.arrive(second)
	caller2, target2 := g.both(t)
	if got := target2.LocalAddr().String(); got != second.Addr().String() {
		t.Errorf("new connection arrived at %s, want %v", got, second.Addr())
	}
	for _, c := range []struct{ caller, target net.Conn }{{caller1, target1}, {caller2, target2}} {
		say(t, c.caller, "question")
		hear(t, c.target, "question")
	}
}

func TestIdle(t *testing.T) {
	g := newRig(t, &Relay{IdleTime: 50 * time.Millisecond})
	caller, target := g.both(t)
	hearReset(t, caller)
	hearReset(t, target)
	if s := g.awaitStats(t, func(s Stats) bool { return s.Open == 0 }); s.Idle != 1 {
		t.Errorf("counted %d idle connections, want 1", s.Idle)
	}
}

// TestStill has one way carry something now and then: that is not idle.
func TestStill(t *testing.T) {
	start := time.Now()
	p := &pair{}
	for _, step := range []struct {
		at                 time.Duration
		toTarget, toCaller uint64
		want               time.Duration
	}{
		{at: 3, want: 0}, {at: 5, want: 2}, {at: 9, want: 6},
		{at: 10, toTarget: 1, want: 0}, {at: 14, want: 4}, {at: 15, toCaller: 1, want: 0}, {at: 18, want: 3},
	} {
		p.toTarget.Add(step.toTarget)
		p.toCaller.Add(step.toCaller)
		if got := p.still(start.Add(step.at)); got != step.want {
			t.Errorf("at %d: still for %d, want %d", step.at, got, step.want)
		}
	}
}

// TestFull has one connection more than may be: it waits, and is not refused.
func TestFull(t *testing.T) {
	g := newRig(t, &Relay{Conns: 1})
	caller, target := g.both(t)
	next := g.call(t)
	say(t, next, "patience")
	say(t, caller, "x")
	hear(t, target, "x")
	select {
	case <-g.arrived:
		t.Error("two connections at once, want 1")
	default:
	}
	caller.Close()
	target.Close()
	select {
	case c := <-g.arrived:
		hear(t, patient(t, c), "patience")
	case <-time.After(patience):
		t.Error("the waiting connection was forgotten")
	}
}

// TestCancel ends the relay with connections in every state.
func TestCancel(t *testing.T) {
	hang := make(chan struct{}, 1)
	var hanging atomic.Bool
	target := listen(t)
	g := newRig(t, &Relay{Dial: func(ctx context.Context) (net.Conn, error) {
		if hanging.Load() {
			hang <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return dialTo(target.Addr().String())(ctx)
	}, Failed: func(err error) { t.Errorf("Failed was told of the end: %v", err) }})
	go g.arrive(target)
	caller, far := g.both(t)
	hanging.Store(true)
	dialling := g.call(t)
	<-hang
	g.end()
	g.wantEnded(t, nil)
	hearReset(t, caller)
	hearReset(t, far)
	hearReset(t, dialling)
	if c, err := net.Dial("tcp", g.address); err == nil {
		c.Close()
		t.Error("the listener is still open")
	}
	if s := g.Stats(); s.Open != 0 {
		t.Errorf("%d connections open at the end", s.Open)
	}
}

func TestListenerLost(t *testing.T) {
	g := newRig(t, &Relay{})
	caller, _ := g.both(t)
	g.l.Close()
	g.wantEnded(t, ErrListenerLost)
	hearReset(t, caller)
}

// brief is a listener that is short of descriptors for a while.
type brief struct {
	net.Listener
	errs []error
}

func (b *brief) Accept() (net.Conn, error) {
	if len(b.errs) == 0 {
		return b.Listener.Accept()
	}
	err := b.errs[0]
	b.errs = b.errs[1:]
	return nil, err
}

func TestShortOfDescriptors(t *testing.T) {
	g := newRig(t, &Relay{})
	l := &brief{Listener: listen(t), errs: []error{syscall.EMFILE, syscall.ECONNABORTED, syscall.EMFILE}}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- g.Run(ctx, l) }()
	g.address = l.Addr().String()
	caller, target := g.both(t)
	say(t, caller, "x")
	hear(t, target, "x")
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestOneWayConnection resets what cannot be closed one way, instead of leaving
// the other side without its end.
func TestOneWayConnection(t *testing.T) {
	here, there := net.Pipe() // has no CloseWrite
	defer there.Close()
	g := newRig(t, &Relay{Dial: func(context.Context) (net.Conn, error) { return here, nil }})
	caller := g.call(t)
	caller.CloseWrite()
	there.SetDeadline(time.Now().Add(patience))
	if _, err := there.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("got %v, want the end", err)
	}
	hearReset(t, caller)
}
