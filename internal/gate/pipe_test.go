package gate

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
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

// After its body was read in time, a request may take as long as it needs.
func TestSlowAnswerToAPost(t *testing.T) {
	slow := func(context.Context, upstream.Request) (*upstream.Answer, error) {
		time.Sleep(2 * time.Minute)
		return answer("{}"), nil
	}
	inTime(t, sourceFunc(slow), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
		c := p.dial()
		c.send(t, request("POST", eventsAt, "Content-Length: 2\r\n")+"{}")
		if r, _ := c.response(t, "POST"); r.StatusCode != 200 {
			t.Errorf("got %d, want 200", r.StatusCode)
		}
		sink.next(t)
		c.Close()
	})
}

// drip is a body that comes in pieces, with pauses.
type drip struct {
	pieces []string
	pause  time.Duration
	closed chan struct{}
}

func (d *drip) Read(p []byte) (int, error) {
	if len(d.pieces) == 0 {
		return 0, io.EOF
	}
	time.Sleep(d.pause)
	n := copy(p, d.pieces[0])
	d.pieces = d.pieces[1:]
	return n, nil
}

func (d *drip) Close() error { close(d.closed); return nil }

// A long poll is passed on as it comes, and nothing cuts it short.
func TestLongPollStreams(t *testing.T) {
	for name, size := range map[string]int64{"length_unknown": -1, "length_known": 6} {
		t.Run(name, func(t *testing.T) {
			body := &drip{pieces: []string{"ab", "cd", "ef"}, pause: time.Hour, closed: make(chan struct{})}
			source := func(context.Context, upstream.Request) (*upstream.Answer, error) {
				a := answer("")
				a.Body, a.Size = body, size
				return a, nil
			}
			inTime(t, sourceFunc(source), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
				c, begin := p.dial(), time.Now()
				c.send(t, request("GET", eventsAt))
				var head strings.Builder
				for !strings.HasSuffix(head.String(), "\r\n\r\n") {
					line, err := c.r.ReadString('\n')
					if err != nil {
						t.Fatal(err)
					}
					head.WriteString(line)
				}
				if size < 0 {
					took(t, begin, 0)
				}
				for i, want := range []string{"ab", "cd", "ef"} {
					if size < 0 {
						want = "2\r\n" + want + "\r\n"
					}
					got := make([]byte, len(want))
					if _, err := io.ReadFull(c.r, got); err != nil || string(got) != want {
						t.Errorf("got %q, %v, want %q", got, err, want)
					}
					took(t, begin, time.Duration(i+1)*time.Hour)
				}
				if size < 0 {
					io.ReadFull(c.r, make([]byte, len("0\r\n\r\n")))
				}
				if e := sink.next(t); e.Decision != audit.Allow || e.Bytes != 6 || e.Duration != (3*time.Hour).Microseconds() {
					t.Errorf("got %+v, want 6 bytes in 3 hours", e)
				}
				<-body.closed
				c.Close()
			})
		})
	}
}

// A caller that does not read gives up its connection; one that reads slowly
// but reads does not.
func TestCallerThatDoesNotRead(t *testing.T) {
	inTime(t, says(strings.Repeat("x", 100<<10)), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
		c := p.dial()
		c.send(t, request("GET", token))
		time.Sleep(time.Minute)
		e := sink.next(t)
		if e.Duration != (30*time.Second).Microseconds() || e.Decision != audit.Error || e.Status != 200 || e.Reason != "the connection ended before the answer was sent" {
			t.Errorf("got %+v, want an answer that was broken off after 30s", e)
		}
		c.Close()

		c, begin := p.dial(), time.Now()
		c.send(t, request("GET", token))
		for n := 0; n < 100<<10; {
			time.Sleep(29 * time.Second)
			m, err := c.Read(make([]byte, 5000))
			if n += m; err != nil {
				t.Fatalf("after %d bytes and %v: %v", n, time.Since(begin), err)
			}
		}
		go io.Copy(io.Discard, c)
		if e := sink.next(t); e.Decision != audit.Allow || e.Bytes != 100<<10 {
			t.Errorf("got %+v, want the whole answer", e)
		}
		c.Close()
	})
}

func TestRequestsInFlightAreBounded(t *testing.T) {
	release := make(chan struct{})
	source := func(ctx context.Context, _ upstream.Request) (*upstream.Answer, error) {
		select {
		case <-release:
			return answer("{}"), nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	synctest.Test(t, func(t *testing.T) {
		release = make(chan struct{})
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

func TestRequestInFlightEndsWithItsListener(t *testing.T) {
	for name, tc := range map[string]struct {
		needs, took time.Duration
		decision    audit.Decision
	}{
		"in_time":  {9 * time.Second, 9 * time.Second, audit.Allow},
		"too_slow": {time.Hour, 10 * time.Second, audit.Error},
	} {
		t.Run(name, func(t *testing.T) {
			slow := func(ctx context.Context, _ upstream.Request) (*upstream.Answer, error) {
				if !wait(ctx.Done(), tc.needs) {
					return nil, ctx.Err()
				}
				return answer("{}"), nil
			}
			synctest.Test(t, func(t *testing.T) {
				g, sink := newGate(t, sourceFunc(slow))
				p := newPipes()
				s := start(t, g, p.listener())
				busy, idle, fresh := p.dial(), p.dial(), p.dial()
				idle.send(t, request("GET", "/metadata/identity/info"))
				idle.response(t, "GET")
				sink.next(t)
				busy.send(t, request("GET", instance))
				synctest.Wait()
				begin := time.Now()
				s.stop()
				idle.closed(t)
				took(t, begin, 0)
				fresh.closed(t) // it may have been about to ask
				took(t, begin, 5*time.Second)
				if tc.decision == audit.Allow {
					if r, _ := busy.response(t, "GET"); r.StatusCode != 200 || !r.Close {
						t.Errorf("got %d, close %v, want 200 and the end of the connection", r.StatusCode, r.Close)
					}
				}
				busy.closed(t)
				if err := <-s.done; err != nil {
					t.Errorf("serve: %v", err)
				}
				took(t, begin, tc.took)
				if e := sink.next(t); e.Decision != tc.decision {
					t.Errorf("got %+v, want %s", e, tc.decision)
				}
				sink.none(t)
			})
		})
	}
}

func TestShutdownIsAsPatientAsItsContext(t *testing.T) {
	hang := func(ctx context.Context, _ upstream.Request) (*upstream.Answer, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	synctest.Test(t, func(t *testing.T) {
		g, sink := newGate(t, sourceFunc(hang))
		p := newPipes()
		s := start(t, g, p.listener())
		c := p.dial()
		c.send(t, request("GET", instance))
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		begin := time.Now()
		if err := g.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
		}
		took(t, begin, 3*time.Second)
		c.closed(t)
		if err := <-s.done; err != nil {
			t.Errorf("serve: %v", err)
		}
		if e := sink.next(t); e.Decision != audit.Error || e.Action != imds.InstanceRead {
			t.Errorf("got %+v, want an error", e)
		}
		l := newPipes()
		if err := g.Serve(t.Context(), l.listener()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("serve after it: got %v, want %v", err, net.ErrClosed)
		}
		<-l.closed
		if err := g.Shutdown(t.Context()); err != nil {
			t.Errorf("again: %v", err)
		}
	})
}
