package handover

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
	"imdsgate/internal/workload"
)

func init() { runtime.LockOSThread() } // see package main

func TestMain(m *testing.M) {
	os.Exit(testnet.Main(m.Run, func() error { return goleak.Find() }))
}

func listen(t *testing.T) (*Listener, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.sock")
	l, err := Listen(path, os.Getuid())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, path
}

// raw connects as a proxy that says whatever it likes.
func raw(t *testing.T, path string) *conn {
	t.Helper()
	uc, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	c := newConn(uc)
	t.Cleanup(func() { c.close() })
	return c
}

func tcpListener(t *testing.T) *os.File {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestHostileProxy holds what the agent makes of a proxy that breaks the protocol:
// it is disconnected, and nothing that it sent stays open.
func TestHostileProxy(t *testing.T) {
	for _, tc := range []struct {
		name string
		say  func(t *testing.T, c *conn)
		want string
	}{
		{"another_version", func(t *testing.T, c *conn) { c.send(&message{Type: typeHello, Version: 99}) }, "proxy speaks version 99, agent 2: run both from one release"},
		{"older_release", func(t *testing.T, c *conn) { c.send(&message{Type: typeHello, Version: 1}) }, "proxy speaks version 1, agent 2: run both from one release"},
		{"no_version", func(t *testing.T, c *conn) { c.send(&message{Type: typeHello}) }, "proxy speaks version 0, agent 2"},
		{"no_hello", func(t *testing.T, c *conn) { c.send(&message{Type: typeDial, Seq: 1}) }, `protocol error: want hello, got "dial"`},
		{"claims_too_many", func(t *testing.T, c *conn) {
			c.send(&message{Type: typeHello, Version: protocolVersion, Count: maxHeld + 1})
		}, "protocol error"},
		{"negative_count", func(t *testing.T, c *conn) { c.send(&message{Type: typeHello, Version: protocolVersion, Count: -1}) }, "protocol error"},
		{"garbage", func(t *testing.T, c *conn) { c.c.Write([]byte("GET / HTTP/1.1\r\n\r\n")) }, "invalid character"},
		{"descriptors_beside_hello", func(t *testing.T, c *conn) {
			c.send(&message{Type: typeHello, Version: protocolVersion}, tcpListener(t))
		}, `protocol error: "hello" with 1 descriptors`},
		{"held_without_descriptors", func(t *testing.T, c *conn) {
			c.send(&message{Type: typeHello, Version: protocolVersion, Count: 1})
			c.send(&message{Type: typeHeld, ID: 1})
		}, `protocol error: "held" with 0 descriptors`},
		{"held_with_too_few", func(t *testing.T, c *conn) {
			c.send(&message{Type: typeHello, Version: protocolVersion, Count: 1})
			c.send(&message{Type: typeHeld, ID: 1, V6: true, Link: true}, tcpListener(t))
		}, `protocol error: "held" with 1 descriptors`},
		{"too_many_descriptors", func(t *testing.T, c *conn) {
			fds := make([]syscall.Conn, 40)
			for i := range fds {
				fds[i] = tcpListener(t)
			}
			c.send(&message{Type: typeHello, Version: protocolVersion, Count: 1}, fds...)
		}, "message too large"},
		{"held_without_id", func(t *testing.T, c *conn) {
			c.send(&message{Type: typeHello, Version: protocolVersion, Count: 1})
			c.send(&message{Type: typeHeld}, tcpListener(t))
		}, "protocol error: want held"},
		{"hangs_up_in_the_middle", func(t *testing.T, c *conn) {
			c.send(&message{Type: typeHello, Version: protocolVersion, Count: 2})
			c.send(&message{Type: typeHeld, ID: 1}, tcpListener(t))
			c.close()
		}, "EOF"},
		{"larger_than_a_packet", func(t *testing.T, c *conn) {
			c.c.Write([]byte(`{"type":"hello","error":"` + strings.Repeat("x", maxMessage) + `"}`))
		}, "message too large"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l, path := listen(t)
			c := raw(t, path)
			p, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			tc.say(t, c)
			if _, err := p.Hello(); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

// TestHostileProxyLater holds the same for the time after hello.
func TestHostileProxyLater(t *testing.T) {
	l, path := listen(t)
	c := raw(t, path)
	p, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.send(&message{Type: typeHello, Version: protocolVersion})
	if _, err := p.Hello(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- p.Serve(t.Context(), Host{}) }()
	c.send(&message{Type: typeAttach, ID: 3}, tcpListener(t))
	if err := <-done; !errors.Is(err, errProtocol) {
		t.Errorf("got %v, want a protocol error", err)
	}
}

// TestDialsAreBounded has a proxy ask for more connections at once than it gets.
func TestDialsAreBounded(t *testing.T) {
	l, path := listen(t)
	c := raw(t, path)
	p, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.send(&message{Type: typeHello, Version: protocolVersion})
	if _, err := p.Hello(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		p.Serve(ctx, Host{Dial: func(ctx context.Context) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }})
	})
	for i := range maxDials + 1 {
		c.send(&message{Type: typeDial, Seq: uint64(i + 1)})
	}
	m, files, err := c.recv()
	if err != nil {
		t.Fatal(err)
	}
	closeAll(files)
	if m.Type != typeDialed || m.Seq != maxDials+1 || m.Error == "" {
		t.Errorf("got %+v, want number %d refused", m, maxDials+1)
	}
	cancel()
	wg.Wait()
}

// recorder is a Taker that notes.
type recorder struct {
	mu    sync.Mutex
	calls []string
	conns []net.Listener
}

func (r *recorder) note(s string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, s)
}

func (r *recorder) Take(o Offer) {
	r.note("take " + string(o.Workload.ID))
	r.conns = append(r.conns, o.Listeners...)
}
func (r *recorder) Update(_ uint64, w workload.Workload) { r.note("update " + string(w.ID)) }
func (r *recorder) Release(uint64) {
	r.note("release")
	for _, l := range r.conns {
		l.Close()
	}
}

func (r *recorder) seen() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.calls...)
}

// TestSession goes through all that agent and proxy say to each other, and a
// second session in which the proxy says what it holds.
func TestSession(t *testing.T) {
	l, path := listen(t)
	rec := &recorder{}
	c := &Client{Path: path, Taker: rec, Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	p, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if held, err := p.Hello(); len(held) != 0 || err != nil {
		t.Fatalf("Hello = %v, %v", held, err)
	}
	if p.PID != os.Getpid() || p.UID != os.Getuid() {
		t.Errorf("peer is pid %d uid %d", p.PID, p.UID)
	}
	web := workload.Workload{ID: "static:web", Name: "web", Labels: map[string]string{"a": "b"}}
	sent := &Attachment{ID: 7, Netns: netns.ID{Inode: 1, Cookie: 2}, Method: "nftables", Workload: web, V4: tcpListener(t), V6: tcpListener(t)}
	for _, err := range []error{p.Attach(sent), p.Sync(netip.AddrPort{})} {
		if err != nil {
			t.Fatal(err)
		}
	}
	<-c.Synced()
	left := make(chan struct{})
	go p.Serve(t.Context(), Host{
		Dial:    func(context.Context) (net.Conn, error) { return nil, errors.New("the service is away") },
		Leaving: func() { close(left) },
	})
	if _, err := c.Dial(ctx); err == nil || !strings.Contains(err.Error(), "the service is away") {
		t.Errorf("Dial: %v", err)
	}
	c.Leave()
	<-left
	if err := p.Update(7, workload.Workload{ID: "static:huge", Name: strings.Repeat("x", maxMessage)}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a description of more than a message: %v, want ErrTooLarge", err)
	}
	if _, err := c.Dial(ctx); err == nil || !strings.Contains(err.Error(), "the service is away") {
		t.Errorf("Dial after that: %v: the connection must go on", err)
	}
	p.Close() // the agent dies

	p, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	held, err := p.Hello()
	if err != nil || len(held) != 1 {
		t.Fatalf("Hello = %v, %v, want one", held, err)
	}
	got := held[0]
	if got.ID != 7 || got.Netns != sent.Netns || got.Method != "nftables" || got.V6 == nil || got.Link != nil || !netns.Listening(got.V4) {
		t.Errorf("held %+v", got)
	}
	got.Discard()
	db := workload.Workload{ID: "static:db"}
	for _, err := range []error{p.Keep(7, db), p.Update(7, web), p.Sync(netip.AddrPort{}), p.Detach(7)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"take static:web", "update static:db", "update static:web", "release"}
	for deadline := time.Now().Add(5 * time.Second); len(rec.seen()) < len(want) && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if diff := cmp.Diff(want, rec.seen()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	p.Close()
}

// pair is an agent and a proxy that have said hello; the proxy says nothing more.
func pair(t *testing.T) (*Proxy, *conn) {
	t.Helper()
	l, path := listen(t)
	c := raw(t, path)
	p, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	c.send(&message{Type: typeHello, Version: protocolVersion})
	if _, err := p.Hello(); err != nil {
		t.Fatal(err)
	}
	return p, c
}

// heard reads what the agent says next.
func (c *conn) heard(t *testing.T) *message {
	t.Helper()
	m, files, err := c.recv()
	if err != nil {
		t.Fatal(err)
	}
	closeAll(files)
	return m
}

// TestLargestDescription sends as much as is allowed, in every kind of message that
// carries a workload, and a byte more.
func TestLargestDescription(t *testing.T) {
	p, c := pair(t)
	v4, v6 := tcpListener(t), tcpListener(t)
	filled := func(m *message) workload.Workload { // so that m has maxMessage bytes
		w := workload.Workload{ID: "docker:a+docker:b", Members: []workload.Workload{{ID: "docker:a", Pod: &workload.Pod{Namespace: "shop"}}, {ID: "docker:b"}}}
		m.Workload = &w
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		w.Members[1].ImageLabels = map[string]string{"x": ""}
		w.Members[1].ImageLabels["x"] = strings.Repeat("x", maxMessage-len(b)-len(`,"image_labels":{"x":""}`))
		return w
	}
	attach := &message{Type: typeAttach, ID: 7, Netns: netns.ID{Inode: 1, Cookie: 2}, Method: "nftables", V6: true}
	for _, tc := range []struct {
		name string
		w    workload.Workload
		send func(w workload.Workload) error
	}{
		{"attach", filled(attach), func(w workload.Workload) error {
			return p.Attach(&Attachment{ID: 7, Netns: attach.Netns, Method: "nftables", Workload: w, V4: v4, V6: v6})
		}},
		{"keep", filled(&message{Type: typeKeep, ID: 7}), func(w workload.Workload) error { return p.Keep(7, w) }},
		{"update", filled(&message{Type: typeUpdate, ID: 7}), func(w workload.Workload) error { return p.Update(7, w) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := tc.send(tc.w); err != nil {
				t.Fatal(err)
			}
			if m := c.heard(t); m.Type != tc.name || m.Workload == nil || !cmp.Equal(*m.Workload, tc.w) {
				t.Errorf("heard another %s", m.Type)
			}
			tc.w.Name = "x" // and its key
			if err := tc.send(tc.w); !errors.Is(err, ErrTooLarge) {
				t.Errorf("got %v, want ErrTooLarge", err)
			}
		})
	}
	if err := p.Detach(7); err != nil {
		t.Errorf("after that: %v", err)
	}
	if m := c.heard(t); m.Type != typeDetach {
		t.Errorf("heard %s, want that nothing of what was too large was sent", m.Type)
	}
}

// TestKernelTakesLess has a host whose socket buffers are small: what does not fit is
// one workload's trouble, not the connection's.
func TestKernelTakesLess(t *testing.T) {
	p, c := pair(t)
	if err := p.c.c.SetWriteBuffer(16 << 10); err != nil {
		t.Fatal(err)
	}
	w := workload.Workload{ID: "static:web", Labels: map[string]string{"long": strings.Repeat("x", 64<<10)}}
	if err := p.Update(7, w); !errors.Is(err, ErrTooLarge) {
		t.Errorf("got %v, want ErrTooLarge", err)
	}
	if err := p.Update(8, workload.Workload{ID: "static:db"}); err != nil {
		t.Errorf("another workload: %v", err)
	}
	if m := c.heard(t); m.ID != 8 {
		t.Errorf("heard of %d, want 8", m.ID)
	}
}

// TestProxyHasNoSayInWhoItIs has one describe what it holds.
func TestProxyHasNoSayInWhoItIs(t *testing.T) {
	l, path := listen(t)
	c := raw(t, path)
	p, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c.send(&message{Type: typeHello, Version: protocolVersion, Count: 1})
	c.send(&message{Type: typeHeld, ID: 1, Workload: &workload.Workload{ID: "static:admin"}}, tcpListener(t))
	held, err := p.Hello()
	if err != nil || len(held) != 1 {
		t.Fatalf("held %v, %v", held, err)
	}
	if w := held[0].Workload; w.ID != "" {
		t.Errorf("the proxy says that it is %s", w.ID)
	}
	held[0].Discard()
}

// TestOlderReleaseIsToldWhy has a proxy of an older release come to an agent that
// refuses as agents do.
func TestOlderReleaseIsToldWhy(t *testing.T) {
	l, path := listen(t)
	c := raw(t, path)
	p, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.send(&message{Type: typeHello, Version: protocolVersion - 1})
	_, err = p.Hello()
	if err == nil {
		t.Fatal("taken")
	}
	p.Refuse(err.Error())
	if m := c.heard(t); m.Type != typeRefused || !strings.Contains(m.Error, "run both from one release") {
		t.Errorf("told %q: %q", m.Type, m.Error)
	}
}

// TestUnconfirmedIsReleased has an agent that does not mention what the proxy
// holds.
func TestUnconfirmedIsReleased(t *testing.T) {
	l, path := listen(t)
	rec := &recorder{}
	c := &Client{Path: path, Taker: rec, Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	for i := range 2 {
		p, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		held, err := p.Hello()
		if err != nil || len(held) != i {
			t.Fatalf("session %d: held %d, %v", i, len(held), err)
		}
		for _, h := range held {
			h.Discard()
		}
		if i == 0 {
			p.Attach(&Attachment{ID: 1, Workload: workload.Workload{ID: "static:web"}, V4: tcpListener(t)})
		}
		p.Sync(netip.AddrPort{})
		if i == 0 {
			<-c.Synced()
		} else {
			for len(rec.seen()) < 2 {
				time.Sleep(time.Millisecond)
			}
		}
		p.Close()
	}
	if diff := cmp.Diff([]string{"take static:web", "release"}, rec.seen()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	cancel()
	<-done
}

// TestDialWaitsForTheNextAgent has the agent die between question and answer.
func TestDialWaitsForTheNextAgent(t *testing.T) {
	l, path := listen(t)
	c := &Client{Path: path, Taker: &recorder{}, Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	service, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	go testnet.Say(service, "upstream")

	first, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	first.Hello()
	first.Sync(netip.AddrPort{})
	<-c.Synced()
	type result struct {
		c   net.Conn
		err error
	}
	got := make(chan result, 1)
	go func() {
		nc, err := c.Dial(ctx)
		got <- result{nc, err}
	}()
	if m, _, err := first.c.recv(); err != nil || m.Type != typeDial {
		t.Fatalf("got %v, %v, want a dial", m, err)
	}
	first.Close()
	second, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	second.Hello()
	second.Sync(netip.AddrPort{})
	var wg sync.WaitGroup
	wg.Go(func() {
		second.Serve(ctx, Host{Dial: func(ctx context.Context) (net.Conn, error) { return net.Dial("tcp", service.Addr().String()) }})
	})
	r := <-got
	if r.err != nil {
		t.Fatal(r.err)
	}
	b, err := io.ReadAll(r.c)
	if string(b) != "upstream" || err != nil {
		t.Errorf("read %q, %v", b, err)
	}
	r.c.Close()
	cancel()
	<-done
	wg.Wait()
}

// TestNeverReads has a proxy that does not read: the agent's write fails within
// its bound, and no other waits behind it.
func TestNeverReads(t *testing.T) {
	l, path := listen(t)
	c := raw(t, path)
	p, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	start := time.Now()
	w := workload.Workload{ID: "static:web", Labels: map[string]string{"long": strings.Repeat("x", 8<<10)}}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for p.Update(1, w) == nil {
			}
		})
	}
	wg.Wait()
	if took := time.Since(start); took > 5*writeTimeout {
		t.Errorf("50 writers waited %v for a proxy that does not read", took)
	}
	_ = c
}

// TestDescriptorsThatBlock sends a connection whose closing would block: nobody
// waits for it.
func TestDescriptorsThatBlock(t *testing.T) {
	l, path := listen(t)
	c := raw(t, path)
	p, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	service, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	full, err := net.Dial("tcp", service.Addr().String()) // never accepted, never read
	if err != nil {
		t.Fatal(err)
	}
	tc := full.(*net.TCPConn)
	tc.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	for err == nil {
		_, err = tc.Write(make([]byte, 64<<10))
	}
	tc.SetLinger(1 << 20)
	c.send(&message{Type: typeHello, Version: protocolVersion}, tc)
	f, err := tc.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	start := time.Now()
	if _, err := p.Hello(); err == nil {
		t.Error("a hello with a descriptor was taken")
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("hello took %v", took)
	}
	tc.SetLinger(0)
	tc.Close()
}

// TestUpstreamIsTheAgents has agent and proxy set up for one upstream, or for two.
func TestUpstreamIsTheAgents(t *testing.T) {
	imds, local := netip.MustParseAddrPort("169.254.169.254:80"), netip.MustParseAddrPort("127.0.0.1:8169")
	for _, tc := range []struct {
		name         string
		agent, proxy netip.AddrPort
		refused      bool
	}{
		{"the_same", imds, imds, false},
		{"agent_says_nothing", netip.AddrPort{}, imds, false},
		{"proxy_takes_any", local, netip.AddrPort{}, false},
		{"another", local, imds, true},
		{"another_port", netip.AddrPortFrom(imds.Addr(), 81), imds, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l, path := listen(t)
			c := &Client{Path: path, Upstream: tc.proxy, Taker: &recorder{}, Log: slog.New(slog.DiscardHandler)}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- c.Run(ctx) }()
			p, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			p.Hello()
			p.Sync(tc.agent)
			if !tc.refused {
				<-c.Synced()
				cancel()
				if err := <-done; err != nil {
					t.Errorf("Run: %v", err)
				}
				return
			}
			defer cancel()
			var other *UpstreamError
			if err := <-done; !errors.As(err, &other) || other.Agent != tc.agent || other.Proxy != tc.proxy {
				t.Errorf("Run: %v, want UpstreamError with %v and %v", err, tc.agent, tc.proxy)
			}
			select {
			case <-c.Synced():
				t.Error("synced all the same")
			default:
			}
		})
	}
}

// TestPause holds that a proxy whose predecessor was just killed is in soon, and that
// one beside another asks seldom.
func TestPause(t *testing.T) {
	for _, tc := range []struct{ refused, want time.Duration }{
		{0, retry}, {retry, retry}, {patience, retry}, {patience + 1, retryRefused}, {time.Hour, retryRefused},
	} {
		if got := pause(tc.refused); got != tc.want {
			t.Errorf("refused for %v: got %v, want %v", tc.refused, got, tc.want)
		}
	}
}

func TestDialGivesUp(t *testing.T) {
	c := &Client{Path: filepath.Join(t.TempDir(), "none"), Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.Dial(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no agent at") {
		t.Errorf("got %v", err)
	}
}

func TestSocketPathIsAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, os.Getuid()); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("got %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "data" {
		t.Error("the file was touched")
	}
}

func TestMissingFolderIsNotMade(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	if _, err := Listen(filepath.Join(dir, "agent.sock"), os.Getuid()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want os.ErrNotExist", err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("the folder was made")
	}
}

func TestSocketIsPrivateAndTellsItsSuccessor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	for i, stale := range []bool{false, true} {
		l, err := Listen(path, os.Getuid())
		if err != nil {
			t.Fatal(err)
		}
		if l.Stale != stale {
			t.Errorf("listen %d: Stale = %v", i, l.Stale)
		}
		st, err := os.Stat(path)
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v, want 0600", st.Mode(), err)
		}
		l.Close()
	}
}
