package gate

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

// One event a request, whoever asks, however many at once.
func TestConcurrentClients(t *testing.T) {
	const clients, each = 64, 20
	source := service(t, func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("{}")) })
	g, _ := newGate(t, source)
	sink := make(events, clients*each+1)
	g.Audit = sink
	g.Directory.Set(2, workload.Workload{ID: "static:db"})
	first, second := listen(t), listen(t)
	second.Attachment = 2
	addrs := []string{start(t, g, first).addr, start(t, g, second).addr}
	var wg sync.WaitGroup
	for i := range clients {
		p := dial(t, addrs[i%2])
		wg.Go(func() {
			for k := range each {
				target, status := instance, 200
				switch k % 4 {
				case 1:
					target, status = "/metadata/reprovisiondata", 403
				case 2:
					target, status = "/metadata/..", 400
				}
				if _, err := p.Write([]byte(request("GET", target))); err != nil {
					t.Error(err)
					return
				}
				if r, _ := p.response(t, "GET"); r.StatusCode != status {
					t.Errorf("%s: got %d, want %d", target, r.StatusCode, status)
				}
			}
		})
	}
	wg.Wait()
	ids, who, what := make(map[uint64]bool), make(map[workload.ID]int), make(map[audit.Decision]int)
	for range clients * each {
		e := sink.next(t)
		ids[e.ID] = true
		who[e.Workload]++
		what[e.Decision]++
	}
	if err := g.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	sink.none(t)
	if len(ids) != clients*each || who["static:web"] != clients*each/2 || who["static:db"] != clients*each/2 ||
		what[audit.Allow] != clients*each/2 || what[audit.Deny] != clients*each/4 || what[audit.Refuse] != clients*each/4 {
		t.Errorf("got %d ids, %v, %v", len(ids), who, what)
	}
}

func TestStopOneListenerOfTwo(t *testing.T) {
	g, sink := newGate(t, says("{}"))
	a, b := start(t, g, listen(t)), start(t, g, listen(t))
	toA, toB := dial(t, a.addr), dial(t, b.addr)
	ask := func(p *peer) {
		t.Helper()
		p.send(t, request("GET", instance))
		if r, _ := p.response(t, "GET"); r.StatusCode != 200 {
			t.Errorf("got %d, want 200", r.StatusCode)
		}
		sink.next(t)
	}
	ask(toA)
	ask(toB)
	a.stop()
	if err := <-a.done; err != nil {
		t.Errorf("serve: %v", err)
	}
	toA.closed(t)
	if _, err := net.Dial("tcp", a.addr); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial the stopped one: got %v, want connection refused", err)
	}
	ask(toB)
	ask(dial(t, b.addr))
	if n := held(g); n != 1 {
		t.Errorf("the gate keeps %d listeners, want 1", n)
	}
}

func held(g *Gate) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.taps)
}

// Reached by its own address, a gate knows callers by theirs and no better.
func TestByHand(t *testing.T) {
	g, sink := newGate(t, says("{}"))
	g.Hosts = []string{"imds.test"}
	l := listen(t)
	l.Local, l.Attachment, l.Proof, l.Method, l.Hosts = nil, 0, workload.Address, "listen", []string{"proxy"}
	s := start(t, g, l)
	p := dial(t, s.addr)
	for host, status := range map[string]int{
		"169.254.169.254": 200, s.addr: 200, "127.0.0.1": 200, "proxy": 200, "imds.test": 200, "imds.test:80": 200,
		"localhost": 400, "evil.example": 400, "127.0.0.1:1": 400,
	} {
		p.send(t, strings.Replace(request("GET", instance), "169.254.169.254", host, 1))
		r, _ := p.response(t, "GET")
		e := sink.next(t)
		if r.StatusCode != status || e.Workload != "address:127.0.0.1" || e.Proof != workload.Address || e.Method != "listen" {
			t.Errorf("host %s: got %d, %+v, want %d", host, r.StatusCode, e, status)
		}
		if !e.Peer.IsValid() || e.Peer != addrPort(p.LocalAddr()) {
			t.Errorf("got peer %v, want %v", e.Peer, p.LocalAddr())
		}
	}
}

func TestOwnAddressIsNoHostOfACaptureListener(t *testing.T) {
	_, sink, s := serving(t, untouched(t))
	p := dial(t, s.addr)
	p.send(t, strings.Replace(request("GET", instance), "169.254.169.254", s.addr, 1))
	if r, _ := p.response(t, "GET"); r.StatusCode != 400 || !strings.HasPrefix(sink.next(t).Reason, "host: ") {
		t.Errorf("got %d, want 400", r.StatusCode)
	}
}

func TestHostsOfAnIPv6Listener(t *testing.T) {
	tap := &tap{gate: &Gate{Hosts: []string{"a"}}, Listener: Listener{Hosts: []string{"b"}}}
	got := strings.Join(tap.hosts(netip.MustParseAddrPort("[fe80::1%eth0]:8080")), " ")
	if want := "a b [fe80::1] [fe80::1]:8080"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestServeRefusesWhatItCannotVouchFor(t *testing.T) {
	whole := func() *Gate {
		return &Gate{Cloud: imds.Azure, Directory: new(workload.Directory), Source: says("{}"), Audit: make(events, 1)}
	}
	for name, tc := range map[string]struct {
		g    func(*Gate)
		l    func(*Listener)
		want string
	}{
		"no_directory":          {func(g *Gate) { g.Directory = nil }, nil, "gate: no directory"},
		"no_source":             {func(g *Gate) { g.Source = nil }, nil, "gate: no source"},
		"no_audit":              {func(g *Gate) { g.Audit = nil }, nil, "gate: no audit sink"},
		"proof_without_address": {nil, func(l *Listener) { l.Local = nil }, "gate: serve: proof listener needs the addresses that callers dial"},
		"no_listener":           {nil, func(l *Listener) { l.Listener = nil }, "gate: serve: no listener"},
	} {
		t.Run(name, func(t *testing.T) {
			g, p := whole(), newPipes()
			l := p.listener()
			if tc.g != nil {
				tc.g(g)
			}
			if tc.l != nil {
				tc.l(&l)
			}
			if err := g.Serve(t.Context(), l); err == nil || err.Error() != tc.want {
				t.Errorf("got %v, want %s", err, tc.want)
			}
			if l.Listener != nil {
				<-p.closed
			}
		})
	}
}

func TestGateWithoutPolicyDeniesEverything(t *testing.T) {
	g, sink := newGate(t, untouched(t))
	g.Policy = nil
	s := start(t, g, listen(t))
	p := dial(t, s.addr)
	p.send(t, request("GET", "/metadata/versions"))
	if r, _ := p.response(t, "GET"); r.StatusCode != 403 || sink.next(t).Decision != audit.Deny {
		t.Errorf("got %d, want 403", r.StatusCode)
	}
}

func TestHeaderUpToTheLimitIsRead(t *testing.T) {
	_, sink, s := serving(t, says("{}"))
	p := dial(t, s.addr)
	p.send(t, request("GET", instance, "X-A: "+strings.Repeat("a", 15<<10)+"\r\n"))
	if r, _ := p.response(t, "GET"); r.StatusCode != 200 || sink.next(t).Decision != audit.Allow {
		t.Errorf("got %d, want 200", r.StatusCode)
	}
}

func TestServeWithADeadContext(t *testing.T) {
	g, _ := newGate(t, untouched(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Serve(ctx, listen(t)); err != nil {
		t.Errorf("got %v, want nil", err)
	}
}

func BenchmarkHandler(b *testing.B) {
	for name, target := range map[string]string{"allowed": token, "refused": "//"} {
		b.Run(name, func(b *testing.B) {
			body := `{"access_token":"` + strings.Repeat("x", 1500) + `"}`
			g, _ := newGate(b, sourceFunc(func(context.Context, upstream.Request) (*upstream.Answer, error) { return answer(body), nil }))
			g.Audit = audit.Tee{}
			g.init()
			t := newTap(g, Listener{Attachment: 1, Method: "sklookup", Proof: workload.Listener})
			t.share = g.shareOf(t.Attachment)
			r, err := http.NewRequest("GET", "http://169.254.169.254", nil)
			if err != nil {
				b.Fatal(err)
			}
			r.RequestURI, r.Header = target, http.Header{"Metadata": {"true"}, "User-Agent": {"sdk/1"}}
			r = r.WithContext(connContext(b.Context(), t.newConn(netip.MustParseAddrPort("127.0.0.1:40000"))))
			b.ReportAllocs()
			for b.Loop() {
				g.ServeHTTP(&written{header: make(http.Header, 8)}, r)
			}
		})
	}
}

// BenchmarkKeepAlive is a request through a connection, by net/http on both
// sides of the gate.
func BenchmarkKeepAlive(b *testing.B) {
	g, _ := newGate(b, says("{}"))
	g.Audit = audit.Tee{}
	keepAlive(b, g)
}

func keepAlive(b *testing.B, g *Gate) {
	s := start(b, g, listen(b))
	p, text := dial(b, s.addr), []byte(request("GET", token))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.Write(text); err != nil {
			b.Fatal(err)
		}
		if r, err := http.ReadResponse(p.r, nil); err != nil || r.StatusCode != 200 {
			b.Fatal(r, err)
		} else if _, err := p.r.Discard(int(r.ContentLength)); err != nil {
			b.Fatal(err)
		}
	}
}
