package gate

import (
	"context"
	"net"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

func TestRequestsInFlightAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		source := func(ctx context.Context, _ upstream.Request) (*upstream.Answer, error) {
			select {
			case <-release:
				return answer("{}"), nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		g, sink := newGate(t, sourceFunc(source))
		g.Limits.InFlight = 1
		p := newPipes()
		start(t, g, p.listener())
		ask := func() *peer {
			c := p.dial()
			c.send(t, request("GET", instance))
			synctest.Wait()
			return c
		}
		first, late, gone := ask(), ask(), ask()
		gone.Close()
		if e := sink.next(t); e.Decision != audit.Refuse || e.Status != 0 || e.Rule != "p.yaml:1" {
			t.Errorf("left in the queue: got %+v, want a refusal without an answer", e)
		}
		begin := time.Now()
		if r, _ := late.response(t, "GET"); r.StatusCode != 429 {
			t.Errorf("too late: got %d, want 429", r.StatusCode)
		}
		took(t, begin, 5*time.Second)
		if e := sink.next(t); e.Decision != audit.Refuse || e.Status != 429 || !strings.HasPrefix(e.Reason, "busy: ") {
			t.Errorf("too late: got %+v, want a refusal", e)
		}
		second := ask()
		for _, c := range []*peer{first, second} { // one at a time
			release <- struct{}{}
			if r, _ := c.response(t, "GET"); r.StatusCode != 200 {
				t.Errorf("got %d, want 200", r.StatusCode)
			}
			if e := sink.next(t); e.Decision != audit.Allow {
				t.Errorf("got %+v", e)
			}
		}
		for _, c := range []*peer{first, second, late} {
			c.Close()
		}
		g.Shutdown(context.Background())
		sink.none(t)
	})
}

func TestConnectionsAreBounded(t *testing.T) {
	inTime(t, says("{}"), func(g *Gate) { g.Limits.Conns = 2 }, func(t *testing.T, g *Gate, sink events, p *pipes) {
		a, b := p.dial(), p.dial()
		for range 5 {
			p.dial().closed(t)
		}
		time.Sleep(time.Second)
		p.dial().closed(t)
		for i, want := range []int{1, 5} { // the flood makes one event a second
			e := sink.next(t)
			if e.Decision != audit.Refuse || e.Reason != "the listener has as many connections as it may" || e.Count != want || e.Workload != "static:web" {
				t.Errorf("event %d: got %+v, want a refusal of %d connections", i, e, want)
			}
		}
		b.Close()
		synctest.Wait()
		c := p.dial() // there is room again
		for _, c := range []*peer{a, c} {
			c.send(t, request("GET", instance))
			if r, _ := c.response(t, "GET"); r.StatusCode != 200 || sink.next(t).Decision != audit.Allow {
				t.Errorf("got %d, want 200", r.StatusCode)
			}
			c.Close()
		}
	})
}

// TestListenersOfOneWorkloadShareItsLimits: a workload has a listener for each
// address family, and not twice the connections for that. The bound of the whole
// gate is for everybody.
func TestListenersOfOneWorkloadShareItsLimits(t *testing.T) {
	limit := func(g *Gate) {
		g.Limits.Conns, g.Limits.AllConns = 2, 3
		g.Directory.Set(2, workload.Workload{ID: "static:db"})
	}
	inTime(t, says("{}"), limit, func(t *testing.T, g *Gate, sink events, v4 *pipes) {
		v6, other := newPipes(), newPipes()
		start(t, g, v6.listener())
		l := other.listener()
		l.Attachment = 2
		start(t, g, l)
		synctest.Wait()
		a, b := v4.dial(), v6.dial()
		synctest.Wait()
		v4.dial().closed(t) // the workload has two
		v6.dial().closed(t)
		c := other.dial()
		synctest.Wait()
		other.dial().closed(t) // the gate has three
		a.Close()
		synctest.Wait()
		d := v6.dial() // there is room again, on either
		d.send(t, request("GET", instance))
		if r, _ := d.response(t, "GET"); r.StatusCode != 200 {
			t.Errorf("got %d, want 200", r.StatusCode)
		}
		for _, c := range []*peer{b, c, d} {
			c.Close()
		}
		for range 4 { // three were turned away, one was answered
			sink.next(t)
		}
	})
}

func TestShortageOfDescriptorsIsWaitedOut(t *testing.T) {
	inTime(t, says("{}"), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
		begin := time.Now()
		emfile := &net.OpError{Op: "accept", Err: syscall.EMFILE}
		for range 12 {
			p.fail(emfile)
		}
		c := p.dial()
		// 5, 10, 20 … 640 ms, then once a second: it does not spin.
		took(t, begin, 1275*time.Millisecond+4*time.Second)
		for _, err := range []error{syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EPROTO} {
			p.fail(&net.OpError{Op: "accept", Err: err})
		}
		c.send(t, request("GET", instance))
		if r, _ := c.response(t, "GET"); r.StatusCode != 200 || sink.next(t).Decision != audit.Allow {
			t.Errorf("got %d, want 200", r.StatusCode)
		}
		c.Close()
	})
}
