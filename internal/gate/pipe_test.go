package gate

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

// pipes is a listener whose connections are pipes, so that tests can make time
// up (testing/synctest): hours pass at once, and to the second.
type pipes struct {
	accepted chan result
	closed   chan struct{}
	once     sync.Once
}

type result struct {
	c   net.Conn
	err error
}

var (
	serviceAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort("169.254.169.254:80"))
	callerAddr  = net.TCPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:40000"))
)

// pipeConn is the gate's end of a connection to the metadata service's address.
type pipeConn struct{ net.Conn }

func (pipeConn) LocalAddr() net.Addr  { return serviceAddr }
func (pipeConn) RemoteAddr() net.Addr { return callerAddr }

func newPipes() *pipes { return &pipes{accepted: make(chan result), closed: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case r := <-p.accepted:
		return r.c, r.err
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.closed) }); return nil }
func (p *pipes) Addr() net.Addr { return serviceAddr }

// dial connects.
func (p *pipes) dial() *peer {
	client, server := net.Pipe()
	p.accepted <- result{pipeConn{server}, nil}
	return &peer{client, bufio.NewReader(client)}
}

// fail makes Accept return err.
func (p *pipes) fail(err error) { p.accepted <- result{nil, err} }

func (p *pipes) listener() Listener {
	return Listener{Listener: p, Attachment: 1, Method: "sklookup", Proof: workload.Listener, Local: ServiceAddrs()}
}

// inTime runs a test in made-up time, with a gate that serves pipes.
func inTime(t *testing.T, source upstream.Source, set func(*Gate), test func(t *testing.T, g *Gate, sink events, p *pipes)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		g, sink := newGate(t, source)
		if set != nil {
			set(g)
		}
		p := newPipes()
		start(t, g, p.listener())
		test(t, g, sink, p)
		if err := g.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		sink.none(t)
	})
}

// took checks how long ago since was.
func took(t *testing.T, since time.Time, want time.Duration) {
	t.Helper()
	if d := time.Since(since); d != want {
		t.Errorf("took %v, want %v", d, want)
	}
}

func TestUnknownWorkloadIsHeldUntilItIsKnown(t *testing.T) {
	inTime(t, says("{}"), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
		g.Directory.Delete(1)
		c := p.dial()
		c.send(t, request("GET", instance))
		time.Sleep(700 * time.Millisecond)
		sink.none(t)
		g.Directory.Set(1, workload.Workload{ID: "static:late"})
		r, _ := c.response(t, "GET")
		e := sink.next(t)
		if r.StatusCode != 200 || e.Workload != "static:late" || e.Decision != audit.Allow {
			t.Errorf("got %d, %+v, want an answer for the late workload", r.StatusCode, e)
		}
		if e.Duration < 700_000 || e.Duration > 740_000 {
			t.Errorf("held for %d µs, want little more than 700000", e.Duration)
		}
		c.Close()
	})
}

func TestUnknownWorkloadIsRefusedAfterTheHold(t *testing.T) {
	inTime(t, untouched(t), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
		g.Directory.Delete(1)
		c, begin := p.dial(), time.Now()
		c.send(t, request("GET", instance))
		r, body := c.response(t, "GET")
		took(t, begin, time.Second)
		if r.StatusCode != 403 || !strings.Contains(body, "does not know which workload") {
			t.Errorf("got %d %s, want a refusal", r.StatusCode, body)
		}
		if e := sink.next(t); e.Decision != audit.Refuse || e.Workload != "" || e.Rule != "" || !strings.HasPrefix(e.Reason, "forbidden: ") {
			t.Errorf("got %+v, want a refusal that asked no policy", e)
		}
		c.Close()
	})
}

func TestCallerLeavesWhileHeld(t *testing.T) {
	inTime(t, untouched(t), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
		g.Directory.Delete(1)
		c, begin := p.dial(), time.Now()
		c.send(t, request("GET", instance))
		synctest.Wait()
		c.Close()
		if e := sink.next(t); e.Decision != audit.Refuse || e.Status != 0 || e.Reason != "the connection ended before the answer was sent" {
			t.Errorf("got %+v, want a refusal without an answer", e)
		}
		took(t, begin, 0)
	})
}

// Header bytes that trickle in, or stop, do not keep a connection for long.
func TestSlowloris(t *testing.T) {
	for name, bytes := range map[string]int{"stops": 0, "drips": 100} {
		t.Run(name, func(t *testing.T) {
			inTime(t, untouched(t), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
				c, begin := p.dial(), time.Now()
				c.send(t, "GET "+instance+" HTTP/1.1\r\nX-A: ")
				for range bytes {
					if _, err := io.WriteString(c, "a"); err != nil {
						break
					}
					time.Sleep(900 * time.Millisecond)
				}
				c.closed(t)
				e := sink.next(t)
				if e.Decision != audit.Refuse || e.Status != 0 || !strings.HasPrefix(e.Reason, "incomplete: ") {
					t.Errorf("got %+v, want a refusal", e)
				}
				if d := e.Time.Sub(begin); d != 5*time.Second {
					t.Errorf("ended after %v, want 5s", d)
				}
			})
		})
	}
}

func TestSilentConnection(t *testing.T) {
	inTime(t, says("{}"), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
		c, begin := p.dial(), time.Now()
		c.closed(t)
		took(t, begin, 5*time.Second)
		sink.none(t) // nothing was asked

		c = p.dial()
		c.send(t, request("GET", instance))
		c.response(t, "GET")
		sink.next(t)
		begin = time.Now()
		c.closed(t)
		took(t, begin, 2*time.Minute)
	})
}

func TestSlowBody(t *testing.T) {
	inTime(t, untouched(t), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
		c, begin := p.dial(), time.Now()
		c.send(t, request("POST", eventsAt, "Content-Length: 5\r\n")+"he")
		r, _ := c.response(t, "POST")
		took(t, begin, 5*time.Second)
		if e := sink.next(t); r.StatusCode != 408 || e.Status != 408 || e.Decision != audit.Refuse || !strings.HasPrefix(e.Reason, "body_timeout: ") {
			t.Errorf("got %d, %+v, want 408", r.StatusCode, e)
		}
		c.closed(t)
		took(t, begin, 10*time.Second)
	})
}

func TestBodyOverTheLimit(t *testing.T) {
	inTime(t, untouched(t), func(g *Gate) { g.Limits.BodyBytes = 4 }, func(t *testing.T, g *Gate, sink events, p *pipes) {
		c := p.dial()
		c.send(t, request("POST", eventsAt, "Content-Length: 5\r\n"))
		r, _ := c.response(t, "POST")
		if e := sink.next(t); r.StatusCode != 413 || !r.Close || e.Status != 413 || !strings.HasPrefix(e.Reason, "body_too_large: ") {
			t.Errorf("got %d, %+v, want 413 and the end of the connection", r.StatusCode, e)
		}
		c.Close()
	})
}

func TestBodyBrokenOff(t *testing.T) {
	inTime(t, untouched(t), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
		c := p.dial()
		c.send(t, request("POST", eventsAt, "Content-Length: 5\r\n")+"he")
		c.Close()
		if e := sink.next(t); e.Decision != audit.Refuse || e.Status != 0 || e.Upstream {
			t.Errorf("got %+v, want a refusal without an answer", e)
		}
	})
}
