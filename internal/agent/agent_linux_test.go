package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"imdsgate/internal/bpf"
	"imdsgate/internal/discover"
	"imdsgate/internal/handover"
	"imdsgate/internal/netns"
	"imdsgate/internal/redirect"
	"imdsgate/internal/testnet"
	"imdsgate/internal/workload"
)

// host is what a test moves: namespaces, a source, an agent and a proxy's end.
type host struct {
	t       *testing.T
	socket  string
	method  redirect.Method
	source  *listed
	sources chan Source
	log     *lines
	stop    func() // the running agent
	proxy   *taker
	client  *handover.Client
	hangUp  func() // the running proxy
}

// listed is a source that a test changes.
type listed struct {
	mu      sync.Mutex
	m       map[string]discover.Found
	missing []discover.Missing
	changed chan struct{}
}

func (l *listed) Changed() <-chan struct{} { return l.changed }

func (l *listed) set(name, path string, labels map[string]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.m == nil {
		l.m = make(map[string]discover.Found)
	}
	if path == "" {
		delete(l.m, name)
		return
	}
	l.m[name] = discover.Found{Workload: workload.Workload{ID: workload.ID("test:" + name), Name: name, Labels: labels}, Netns: path}
}

func (l *listed) Find() (found []discover.Found, missing []discover.Missing) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range l.m {
		found = append(found, f)
	}
	return found, l.missing
}

// lines is a log that can be searched.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) has(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.b.String(), s)
}

// taker serves as a proxy does: every connection is told whose listener it came
// through.
type taker struct {
	mu     sync.Mutex
	offers map[uint64]handover.Offer
	takes  int
}

func (k *taker) Take(o handover.Offer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.offers[o.ID] = o
	k.takes++
	for _, l := range o.Listeners {
		go k.serve(o.ID, l)
	}
}

func (k *taker) serve(id uint64, l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		fmt.Fprint(c, k.name(id))
		c.Close()
	}
}

func (k *taker) name(id uint64) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.offers[id].Workload.Name
}

func (k *taker) Update(id uint64, w workload.Workload) {
	k.mu.Lock()
	defer k.mu.Unlock()
	o := k.offers[id]
	o.Workload = w
	k.offers[id] = o
}

func (k *taker) Release(id uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, l := range k.offers[id].Listeners {
		l.Close()
	}
	delete(k.offers, id)
}

func (k *taker) counts() (held, takes int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.offers), k.takes
}

func newHost(t *testing.T, m redirect.Method) *host {
	t.Helper()
	testnet.Require(t, testnet.Namespaces)
	if m == redirect.SkLookup {
		testnet.Require(t, testnet.BPF)
	}
	h := &host{t: t, socket: filepath.Join(t.TempDir(), "agent.sock"), method: m, source: &listed{}, sources: make(chan Source, 1), log: &lines{}}
	before := descriptors(t)
	t.Cleanup(func() {
		h.hang()
		h.halt()
		eventually(t, "descriptors as before", func() bool { return descriptors(t) <= before })
		goleak.VerifyNone(t, goleak.IgnoreTopFunction("os/signal.signal_recv"))
	})
	return h
}

func descriptors(t *testing.T) int {
	t.Helper()
	return len(must[[]os.DirEntry](t)(os.ReadDir("/proc/self/fd")))
}

func (h *host) start() {
	h.t.Helper()
	l := must[*handover.Listener](h.t)(handover.Listen(h.socket, os.Getuid()))
	r := must[*redirect.Redirector](h.t)(redirect.New(h.method))
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan int, 1), make(chan error, 1)
	a := &Agent{
		Socket: l, Redirector: r, Sources: h.sources, Interval: 20 * time.Millisecond,
		Log: slog.New(slog.NewTextHandler(h.log, nil)), Ready: func(n int) { ready <- n },
		Dial: func(context.Context) (net.Conn, error) { return nil, errors.New("no upstream in this test") },
	}
	h.sources <- h.source
	go func() { done <- a.Run(ctx) }()
	h.stop = func() {
		cancel()
		if err := <-done; err != nil {
			h.t.Errorf("agent: %v", err)
		}
	}
	<-ready
}

func (h *host) halt() {
	if h.stop != nil {
		h.stop()
		h.stop = nil
	}
}

func (h *host) connect() {
	h.proxy = &taker{offers: make(map[uint64]handover.Offer)}
	h.client = &handover.Client{Path: h.socket, Taker: h.proxy, Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.client.Run(ctx) }()
	k := h.proxy
	h.hangUp = func() {
		cancel()
		<-done
		k.mu.Lock()
		defer k.mu.Unlock()
		for _, o := range k.offers { // as the death of the process does
			for _, l := range o.Listeners {
				l.Close()
			}
		}
	}
	<-h.client.Synced()
}

func (h *host) hang() {
	if h.hangUp != nil {
		h.hangUp()
		h.client.Forget()
		h.hangUp = nil
	}
}

func (h *host) namespace(name string) *netns.Handle {
	h.t.Helper()
	ns := must[*netns.Handle](h.t)(netns.New())
	h.t.Cleanup(func() { ns.Close() })
	return ns
}

// answers waits until a call from the namespace is answered as wanted.
func (h *host) answers(ns *netns.Handle, want string) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("a call is answered %q", want), func() bool {
		said, _, _ := testnet.Ask(ns, "tcp", redirect.IMDS4.String())
		return said == want
	})
}

// exactlyOne checks that the namespace has one set of our things, no more.
func (h *host) exactlyOne(ns *netns.Handle) {
	h.t.Helper()
	state := must[string](h.t)(testnet.State(ns))
	if n := strings.Count(state, "listener "); n != 2 {
		h.t.Errorf("%d listeners, want 2:\n%s", n, state)
	}
	if n := strings.Count(state, "table=169"); n != 2 {
		h.t.Errorf("%d routes in our table, want 2", n)
	}
	if h.method != redirect.SkLookup {
		return
	}
	if n := must[int](h.t)(bpf.NetnsLinks(ns.ID().Inode)); n != 1 {
		h.t.Errorf("%d sk_lookup links, want 1", n)
	}
}

// eventually waits for what other processes and the kernel do in their own time.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func eachMethod(t *testing.T, test func(t *testing.T, h *host)) {
	for _, m := range []redirect.Method{redirect.SkLookup, redirect.NFTables} {
		t.Run(string(m), func(t *testing.T) { test(t, newHost(t, m)) })
	}
}

func TestWorkloadsComeAndGo(t *testing.T) {
	eachMethod(t, func(t *testing.T, h *host) {
		web, db := h.namespace("web"), h.namespace("db")
		h.source.set("web", web.Path(), nil)
		h.start()
		h.connect()
		h.answers(web, "web")
		h.source.set("db", db.Path(), nil)
		h.answers(db, "db")
		h.exactlyOne(web)
		h.source.set("db", db.Path(), map[string]string{"team": "shop"})
		eventually(t, "the label arrives", func() bool {
			h.proxy.mu.Lock()
			defer h.proxy.mu.Unlock()
			for _, o := range h.proxy.offers {
				if o.Workload.Labels["team"] == "shop" {
					return true
				}
			}
			return false
		})
		h.source.set("web", "", nil)
		eventually(t, "web is left as it was", func() bool {
			state := must[string](t)(testnet.State(web))
			return !strings.Contains(state, "169") && !strings.Contains(state, "listener")
		})
		h.answers(db, "db")
	})
}

// TestHeldUntilNamed has a namespace show up before anybody knows whose it is: it
// is attached at once, its calls wait, and are answered when the name is known.
func TestHeldUntilNamed(t *testing.T) {
	eachMethod(t, func(t *testing.T, h *host) {
		ns := h.namespace("early")
		h.source.changed = make(chan struct{})
		h.start()
		h.connect()
		h.source.mu.Lock()
		h.source.m = map[string]discover.Found{"early": {Netns: ns.Path()}}
		h.source.mu.Unlock()
		h.source.changed <- struct{}{}
		eventually(t, "it is attached", func() bool {
			return strings.Contains(must[string](t)(testnet.State(ns)), "table=169")
		})
		waiting := make(chan string, 1)
		go func() {
			said, _, _ := testnet.Ask(ns, "tcp", redirect.IMDS4.String())
			waiting <- said
		}()
		eventually(t, "a caller is queued", func() bool { return strings.Contains(h.established(ns), "169.254.169.254:80") })
		if _, takes := h.proxy.counts(); takes != 0 {
			t.Error("handed over without a name")
		}
		h.source.set("early", ns.Path(), nil)
		h.source.changed <- struct{}{}
		if said := <-waiting; said != "early" {
			t.Errorf("queued caller got %q", said)
		}
		h.exactlyOne(ns)
	})
}

func TestSharedNamespaceIsOneWorkload(t *testing.T) {
	eachMethod(t, func(t *testing.T, h *host) {
		ns := h.namespace("pod")
		h.source.set("b", ns.Path(), nil)
		h.source.set("a", ns.Path(), nil)
		h.start()
		h.connect()
		h.answers(ns, "a+b")
		h.exactlyOne(ns)
	})
}

// TestHugeDescriptionStopsNobodyElse has a workload get more labels than can be
// handed over, among others and in a shared namespace: nobody answers it any more,
// and not under what was known before; all others are served.
func TestHugeDescriptionStopsNobodyElse(t *testing.T) {
	h := newHost(t, redirect.NFTables)
	web, pod, db := h.namespace("web"), h.namespace("pod"), h.namespace("db")
	huge := map[string]string{"a": strings.Repeat("x", 200<<10)}
	h.source.set("web", web.Path(), nil)
	h.source.set("a", pod.Path(), nil)
	h.start()
	h.connect()
	h.answers(web, "web")
	h.answers(pod, "a")
	h.source.set("web", web.Path(), huge)
	h.source.set("b", pod.Path(), huge)
	eventually(t, "both are let go", func() bool { held, _ := h.proxy.counts(); return held == 0 })
	h.source.set("db", db.Path(), nil)
	h.answers(db, "db")
	if said, _, _ := testnet.Ask(web, "tcp", redirect.IMDS4.String()); said != "" {
		t.Errorf("answered %q without a description", said)
	}
	for _, want := range []string{"workload=test:web error=", "workload=test:a+test:b error=", "description too large to hand over"} {
		if !h.log.has(want) {
			t.Errorf("log lacks %q", want)
		}
	}
	h.hang()
	h.connect() // another proxy is not told either
	h.answers(db, "db")
	if held, _ := h.proxy.counts(); held != 1 {
		t.Errorf("the next proxy holds %d, want 1", held)
	}
	h.source.set("web", web.Path(), map[string]string{"a": "b"})
	h.source.set("b", "", nil)
	h.answers(web, "web")
	h.answers(pod, "a")
}

// TestOptOutIsSaidOnce has a container that gets no metadata, and a log that says why.
func TestOptOutIsSaidOnce(t *testing.T) {
	h := newHost(t, redirect.NFTables)
	h.source.missing = []discover.Missing{{ID: "test:out", Err: fmt.Errorf("%w: container out", discover.ErrOptedOut)}}
	h.start()
	h.source.set("web", h.namespace("web").Path(), nil)
	h.connect()
	eventually(t, "a later look", func() bool { held, _ := h.proxy.counts(); return held == 1 })
	h.log.mu.Lock()
	text := h.log.b.String()
	h.log.mu.Unlock()
	want := `level=INFO msg="workload opted out: it gets no metadata" workload=test:out why="not covered: the label imdsgate.enable=false: container out"`
	if strings.Count(text, want) != 1 || strings.Count(text, "test:out") != 1 {
		t.Errorf("want once: %s\n%s", want, text)
	}
}

func TestListenerKilledFromInside(t *testing.T) {
	eachMethod(t, func(t *testing.T, h *host) {
		ns := h.namespace("web")
		h.source.set("web", ns.Path(), nil)
		h.start()
		h.connect()
		h.answers(ns, "web")
		for range 2 { // the second time after a back-off
			destroyListeners(t, ns)
			h.answers(ns, "web")
			h.exactlyOne(ns)
		}
		if held, takes := h.proxy.counts(); held != 1 || takes != 3 {
			t.Errorf("proxy holds %d and was given %d, want 1 and 3", held, takes)
		}
	})
}

// destroyListeners kills every listener from inside, as root in a container may.
func destroyListeners(t *testing.T, ns *netns.Handle) {
	t.Helper()
	testnet.Require(t, testnet.Command("ss"))
	cmd := exec.Command("ss", "-H", "-K", "-t", "state", "listening")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := testnet.Start(ns, cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || strings.Count(out.String(), ":") < 2 {
		t.Fatalf("ss -K: %v: %s", err, out.String())
	}
}

func TestAgentComesBack(t *testing.T) {
	eachMethod(t, func(t *testing.T, h *host) {
		web, db := h.namespace("web"), h.namespace("db")
		h.source.set("web", web.Path(), nil)
		h.source.set("db", db.Path(), nil)
		h.start()
		h.connect()
		h.answers(web, "web")
		h.answers(db, "db")
		for range 3 {
			h.halt()
			h.answers(web, "web") // without an agent
			h.start()
			h.answers(web, "web")
			h.answers(db, "db")
			h.exactlyOne(web)
			h.exactlyOne(db)
		}
		if held, takes := h.proxy.counts(); held != 2 || takes != 2 {
			t.Errorf("proxy holds %d and was given %d, want 2 and 2", held, takes)
		}
		h.halt()
		h.source.set("db", "", nil)
		h.start() // adopts, then detaches what is no longer wanted
		eventually(t, "db is let go", func() bool { held, _ := h.proxy.counts(); return held == 1 })
		if state := must[string](t)(testnet.State(db)); strings.Contains(state, "169") {
			t.Errorf("db is still steered:\n%s", state)
		}
	})
}

func TestProxyComesBack(t *testing.T) {
	eachMethod(t, func(t *testing.T, h *host) {
		web := h.namespace("web")
		h.source.set("web", web.Path(), nil)
		h.start() // nobody to hand over to: callers wait in the kernel
		waiting := make(chan string, 1)
		go func() {
			said, _, _ := testnet.Ask(web, "tcp", redirect.IMDS4.String())
			waiting <- said
		}()
		eventually(t, "a caller is queued", func() bool {
			return strings.Contains(h.established(web), "169.254.169.254:80")
		})
		h.connect()
		if said := <-waiting; said != "web" {
			t.Errorf("queued caller got %q", said)
		}
		for range 3 {
			h.hang()
			h.connect()
			h.answers(web, "web")
			h.exactlyOne(web)
		}
	})
}

// established lists the peers of the namespace's TCP connections.
func (h *host) established(ns *netns.Handle) string {
	var peers []string
	ns.Do(func() error {
		socks, err := netlink.SocketDiagTCP(unix.AF_INET)
		for _, s := range socks {
			peers = append(peers, fmt.Sprintf("%v:%d", s.ID.Destination, s.ID.DestinationPort))
		}
		return err
	})
	return strings.Join(peers, " ")
}

func TestSecondProxyIsRefused(t *testing.T) {
	h := newHost(t, redirect.NFTables)
	h.source.set("web", h.namespace("web").Path(), nil)
	h.start()
	h.connect()
	second := &handover.Client{Path: h.socket, Taker: &taker{offers: make(map[uint64]handover.Offer)}, Log: slog.New(slog.NewTextHandler(h.log, nil))}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- second.Run(ctx) }()
	eventually(t, "the second proxy is told", func() bool {
		return h.log.has(fmt.Sprintf("agent refused this proxy: a proxy is connected already: pid %d", os.Getpid()))
	})
	cancel()
	<-done
	if held, _ := h.proxy.counts(); held != 1 {
		t.Errorf("the first proxy holds %d, want 1", held)
	}
}

func TestSecondAgentIsRefused(t *testing.T) {
	h := newHost(t, redirect.NFTables)
	h.start()
	_, err := handover.Listen(h.socket, os.Getuid())
	var used *handover.InUseError
	if !errors.As(err, &used) || used.PID != fmt.Sprint(os.Getpid()) {
		t.Errorf("got %v, want InUseError with pid %d", err, os.Getpid())
	}
}

func TestHostNamespaceIsReported(t *testing.T) {
	h := newHost(t, redirect.NFTables)
	h.source.set("host", "/proc/self/ns/net", nil)
	h.source.set("file", filepath.Join(t.TempDir(), "x"), nil)
	h.start()
	for _, want := range []string{"host's own network namespace", "no such file"} {
		if !h.log.has(want) {
			t.Errorf("log lacks %q", want)
		}
	}
}

// TestVanishesWhileAttached lists a namespace that is gone at the next look.
func TestVanishesWhileAttached(t *testing.T) {
	h := newHost(t, redirect.NFTables)
	ns := must[*netns.Handle](t)(netns.New())
	h.source.set("web", ns.Path(), nil)
	h.start()
	h.connect()
	h.answers(ns, "web")
	inode := ns.ID().Inode
	path := ns.Path()
	ns.Close()
	eventually(t, "it is let go", func() bool { held, _ := h.proxy.counts(); return held == 0 })
	if n, err := bpf.NetnsLinks(inode); err == nil && n != 0 {
		t.Errorf("%d links left", n)
	}
	if !h.log.has("workload not attached") {
		t.Errorf("%s is gone and nothing was logged", path)
	}
}

// TestLyingProxy has a proxy say what it holds, with one lie in each row: nothing of
// it is adopted, and its descriptors are closed.
func TestLyingProxy(t *testing.T) {
	for _, tc := range []struct {
		name string
		lie  func(t *testing.T, ag *Agent, h, other *handover.Attachment)
		want string // in the log; empty: adopted
	}{
		{"truth", func(*testing.T, *Agent, *handover.Attachment, *handover.Attachment) {}, ""},
		{"another_namespaces_listener", func(_ *testing.T, _ *Agent, h, o *handover.Attachment) { h.V6, o.V6 = o.V6, h.V6 }, "listener belongs to another namespace"},
		{"another_namespaces_link", func(_ *testing.T, _ *Agent, h, o *handover.Attachment) { h.Link, o.Link = o.Link, h.Link }, "link belongs to"},
		{"link_is_a_listener", func(_ *testing.T, _ *Agent, h, o *handover.Attachment) { h.Link, o.V4 = o.V4, h.Link }, "link"},
		{"no_link", func(_ *testing.T, _ *Agent, h, _ *handover.Attachment) { h.Link.Close(); h.Link = nil }, "descriptors missing"},
		{"another_method", func(_ *testing.T, _ *Agent, h, _ *handover.Attachment) { h.Method = "nftables" }, "attached by nftables"},
		{"dead_listener", func(t *testing.T, ag *Agent, h, _ *handover.Attachment) {
			rc := must[syscall.RawConn](t)(h.V4.SyscallConn())
			rc.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RD) })
		}, "no longer listens"},
		{"id_of_another", func(_ *testing.T, ag *Agent, h, _ *handover.Attachment) {
			ag.held[Key{1, 1}] = &entry{id: h.ID}
		}, "another attachment has this id"},
		{"older_than_ours", func(_ *testing.T, ag *Agent, h, _ *handover.Attachment) {
			ag.held[keyOf(h.Netns)] = &entry{id: h.ID + 1}
		}, "newer attachment"},
		{"listener_of_the_host", func(t *testing.T, _ *Agent, h, o *handover.Attachment) {
			l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
			defer l.Close()
			h.V4.Close()
			h.V4 = must[*os.File](t)(l.(*net.TCPListener).File())
		}, "host's own network namespace"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHost(t, redirect.SkLookup)
			web, db := h.namespace("web"), h.namespace("db")
			r := must[*redirect.Redirector](t)(redirect.New(h.method))
			a, b := must[*redirect.Attachment](t)(r.Attach(web)), must[*redirect.Attachment](t)(r.Attach(db))
			said := &handover.Attachment{ID: 1, Netns: web.ID(), Method: "sklookup", V4: a.V4, V6: a.V6, Link: a.Link}
			other := &handover.Attachment{V4: b.V4, V6: b.V6, Link: b.Link}
			ag := &Agent{Redirector: r, held: make(map[Key]*entry), Log: slog.New(slog.NewTextHandler(h.log, nil))}
			tc.lie(t, ag, said, other)
			before := len(ag.held)
			kept := ag.adopt([]*handover.Attachment{said})
			if adopted := kept[1] && len(ag.held) == before+1; adopted != (tc.want == "") {
				t.Errorf("adopted: %v", adopted)
			}
			if !h.log.has(tc.want) {
				t.Errorf("log lacks %q: %s", tc.want, h.log.b.String())
			}
			if e := ag.held[keyOf(web.ID())]; tc.want == "" && e != nil {
				e.att.Close()
				e.ns.Close()
			}
			other.Discard()
		})
	}
}

// TestLinkDetachedByProxy: whoever holds a link may detach it; the agent notices.
func TestLinkDetachedByProxy(t *testing.T) {
	h := newHost(t, redirect.SkLookup)
	ns := h.namespace("web")
	h.source.set("web", ns.Path(), nil)
	r := must[*redirect.Redirector](t)(redirect.New(h.method))
	ag := &Agent{Redirector: r, source: h.source, held: make(map[Key]*entry), backoff: make(map[Key]Backoff), Log: slog.New(slog.NewTextHandler(h.log, nil))}
	ag.reconcile()
	first := ag.held[keyOf(ns.ID())]
	if err := bpf.DetachLink(first.att.Link); err != nil {
		t.Fatal(err)
	}
	if n := must[int](t)(bpf.NetnsLinks(ns.ID().Inode)); n != 0 {
		t.Fatalf("%d links after detaching the one", n)
	}
	ag.reconcile()
	second := ag.held[keyOf(ns.ID())]
	if second == first || second.id == first.id {
		t.Error("the attachment is the old one")
	}
	h.exactlyOne(ns)
	h.source.set("web", "", nil)
	ag.reconcile()
	if state := must[string](t)(testnet.State(ns)); strings.Contains(state, "169") {
		t.Errorf("still steered:\n%s", state)
	}
}
