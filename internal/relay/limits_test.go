package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

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
	l := &brief{Listener: listen(t), errs: []error{passingErrors[0], passingErrors[1], passingErrors[0]}}
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
