package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"imdsgate/internal/discover"
	"imdsgate/internal/redirect"
)

// helper plays the engine: it writes down what is asked of it.
type helper struct {
	sight discover.Sight
	calls []string
	ended map[string]bool // execs
	fail  map[string]error
	execs int
}

func (h *helper) did(format string, args ...any) error {
	line := fmt.Sprintf(format, args...)
	h.calls = append(h.calls, line)
	return h.fail[strings.Fields(line)[0]]
}

func (h *helper) take() []string {
	calls := h.calls
	h.calls = nil
	return calls
}

func (h *helper) Look(context.Context) (discover.Sight, error) {
	return discover.Sight{Clients: slices.Clone(h.sight.Clients), Orphans: slices.Clone(h.sight.Orphans)}, h.fail["look"]
}
func (h *helper) Follow(ctx context.Context, look func(context.Context) error, failed func(error)) error {
	if err := look(ctx); err != nil {
		failed(err)
	}
	return nil
}
func (h *helper) Path(name string) string { return `C:\imdsgate\` + name }
func (h *helper) Put(_ context.Context, id string, files map[string][]byte) error {
	for _, name := range slices.Sorted(maps.Keys(files)) {
		text := string(files[name])
		if name == endFile {
			text = "…"
		}
		if err := h.did("put %s %s %s", id, name, strings.TrimSpace(text)); err != nil {
			return err
		}
	}
	return nil
}
func (h *helper) Exec(_ context.Context, id string, argv []string) (string, error) {
	h.execs++
	return fmt.Sprint("exec", h.execs), h.did("exec %s %s", id, strings.Join(argv, " "))
}
func (h *helper) Ended(_ context.Context, exec string) (bool, int, error) {
	return h.ended[exec], 1, nil
}
func (h *helper) AddSidecar(_ context.Context, c discover.Client, image string, argv []string, files map[string][]byte) (string, error) {
	return "side", h.did("add %s %s %s %s", c.ID, image, strings.Join(argv, " "), strings.TrimSpace(string(files[envFile])))
}
func (h *helper) StartSidecar(_ context.Context, id string) error  { return h.did("start %s", id) }
func (h *helper) RemoveSidecar(_ context.Context, id string) error { return h.did("remove %s", id) }

// endpoints plays HNS.
type endpoints struct{ h *helper }

func (e endpoints) Apply(a netip.Addr, ps []redirect.Policy) (bool, error) {
	return true, e.h.did("apply %v %s", a, types(ps))
}
func (e endpoints) Remove(a netip.Addr, ps []redirect.Policy) error {
	return e.h.did("unapply %v %s", a, types(ps))
}

func types(ps []redirect.Policy) string {
	var all []string
	for _, p := range ps {
		all = append(all, p.Type)
	}
	return strings.Join(all, ",")
}

func seen(proxy string) discover.Client {
	addr := netip.MustParseAddr("172.20.0.5")
	return discover.Client{ID: "c1", Name: "web", Addrs: []netip.Addr{addr}, Addr: addr, Proxy: netip.MustParseAddr(proxy)}
}

func newForwards(by By, guard string, cs ...discover.Client) (*Forwards, *helper, *bytes.Buffer) {
	h := &helper{sight: discover.Sight{Clients: cs}, ended: make(map[string]bool), fail: make(map[string]error)}
	log := new(bytes.Buffer)
	return &Forwards{Clients: h, HNS: endpoints{h}, By: by, Guard: guard, Service: netip.MustParseAddrPort("169.254.169.254:80"), Port: 80, Image: "img",
		Exe: []byte("MZ"), Side: []string{"imdsgate.exe"}, Listen: netip.MustParseAddrPort("127.0.0.1:15080"), Log: slog.New(slog.NewTextHandler(log, nil))}, h, log
}

// TestForwards holds, for each way, what is done for a client that is new, that is
// as it was, whose proxy has moved, and that is taken back.
func TestForwards(t *testing.T) {
	for _, tc := range []struct {
		by    By
		guard string
		first []string
		same  []string
		moved []string
		undo  []string
	}{
		{ByExec, "",
			[]string{"put c1 proxy.env IMSProxyIpAddress=172.20.0.2:80", "put c1 imdsgate.exe MZ", `exec c1 C:\imdsgate\imdsgate.exe forward --env-file C:\imdsgate\proxy.env --end-file C:\imdsgate\end`},
			nil, []string{"put c1 proxy.env IMSProxyIpAddress=172.20.0.3:80"}, []string{"put c1 end …"}},
		{ByExec, "Switch",
			[]string{"apply 172.20.0.5 ACL", "put c1 proxy.env IMSProxyIpAddress=172.20.0.2:80", "put c1 imdsgate.exe MZ", `exec c1 C:\imdsgate\imdsgate.exe forward --env-file C:\imdsgate\proxy.env --end-file C:\imdsgate\end`},
			[]string{"apply 172.20.0.5 ACL"}, []string{"apply 172.20.0.5 ACL", "put c1 proxy.env IMSProxyIpAddress=172.20.0.3:80"}, []string{"put c1 end …", "unapply 172.20.0.5 ACL"}},
		{BySidecar, "",
			[]string{`add c1 img imdsgate.exe forward --env-file C:\imdsgate\proxy.env IMSProxyIpAddress=172.20.0.2:80`},
			nil, []string{"put side proxy.env IMSProxyIpAddress=172.20.0.3:80"}, []string{"remove side"}},
		{ByWFPProxy, "",
			[]string{"apply 172.20.0.5 L4WFPPROXY", `add c1 img imdsgate.exe forward --env-file C:\imdsgate\proxy.env --listen 127.0.0.1:15080 IMSProxyIpAddress=172.20.0.2:80`},
			[]string{"apply 172.20.0.5 L4WFPPROXY"}, []string{"apply 172.20.0.5 L4WFPPROXY", "put side proxy.env IMSProxyIpAddress=172.20.0.3:80"}, []string{"unapply 172.20.0.5 L4WFPPROXY", "remove side"}},
		{ByL4Proxy, "Host",
			[]string{"apply 172.20.0.5 ACL,L4Proxy"},
			[]string{"apply 172.20.0.5 ACL,L4Proxy"}, []string{"apply 172.20.0.5 ACL,L4Proxy"}, []string{"unapply 172.20.0.5 ACL,L4Proxy"}},
	} {
		t.Run(string(tc.by)+tc.guard, func(t *testing.T) {
			f, h, log := newForwards(tc.by, tc.guard, seen("172.20.0.2"))
			step := func(what string, do func(context.Context) error, want []string) {
				t.Helper()
				if err := do(t.Context()); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				if got := h.take(); !slices.Equal(got, want) {
					t.Errorf("%s: got\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
				}
			}
			step("first", f.once, tc.first)
			h.sight.Clients[0].Sidecar, h.sight.Clients[0].SideRuns = "side", true
			if tc.by == ByExec || tc.by == ByL4Proxy {
				h.sight.Clients[0].Sidecar = ""
			}
			step("same", f.once, tc.same)
			h.sight.Clients[0].Proxy = netip.MustParseAddr("172.20.0.3")
			step("moved", f.once, tc.moved)
			step("undo", f.Undo, tc.undo)
			if n := strings.Count(log.String(), "led to the proxy"); n != 2 || strings.Contains(log.String(), "WARN") {
				t.Errorf("the log says it %d times, want 2:\n%s", n, log)
			}
		})
	}
}

// TestForwardThatEnds is started again, but not at once: another may be there.
func TestForwardThatEnds(t *testing.T) {
	f, h, log := newForwards(ByExec, "", seen("172.20.0.2"))
	once := func() []string {
		t.Helper()
		if err := f.once(t.Context()); err != nil {
			t.Fatal(err)
		}
		return h.take()
	}
	once()
	h.ended["exec1"] = true
	if calls := once(); len(calls) != 0 || !strings.Contains(log.String(), "forward has ended in the client") {
		t.Errorf("got %q, log:\n%s", calls, log)
	}
	f.state["c1"].next = time.Time{} // as if the time had come
	if calls := once(); len(calls) != 2 || !strings.HasPrefix(calls[1], "exec c1") {
		t.Errorf("got %q, want another start", calls)
	}
}

// TestForwardsGoOn has what goes wrong with one client, or for a while, stop nobody.
func TestForwardsGoOn(t *testing.T) {
	other := seen("172.20.0.2")
	other.ID, other.Name, other.Proxy, other.Why = "c0", "early", netip.Addr{}, errors.New("no container with the label")
	f, h, log := newForwards(BySidecar, "", other, seen("172.20.0.2"))
	h.sight.Orphans = []string{"left"}
	h.fail["add"] = errors.New("no such image")
	for range 2 {
		if err := f.once(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for text, n := range map[string]int{"no container with the label": 1, "no such image": 1, "side-car removed": 2} {
		if got := strings.Count(log.String(), text); got != n {
			t.Errorf("%q is %d times in the log, want %d:\n%s", text, got, n, log)
		}
	}
	if calls := h.take(); !slices.Contains(calls, "remove left") {
		t.Errorf("got %q", calls)
	}
	h.fail["look"] = errors.New("engine is away")
	if err := f.once(t.Context()); err == nil {
		t.Error("no error of an engine that is away")
	}
	if err := f.Run(t.Context()); err != nil || !strings.Contains(log.String(), "engine is away") {
		t.Errorf("got %v, log:\n%s", err, log)
	}
	delete(h.fail, "look")
	stopped := seen("172.20.0.2")
	stopped.Sidecar = "side"
	h.sight = discover.Sight{Clients: []discover.Client{stopped}}
	h.take()
	if err := f.once(t.Context()); err != nil || !slices.Contains(h.take(), "start side") {
		t.Errorf("a side-car that has ended was not started: %v", err)
	}
}

// TestGuardBeforeForward leaves a client without a way that HNS refuses to guard.
func TestGuardBeforeForward(t *testing.T) {
	f, h, log := newForwards(ByExec, "Host", seen("172.20.0.2"))
	h.fail["apply"] = redirect.ErrNoEffect
	if err := f.once(t.Context()); err != nil {
		t.Fatal(err)
	}
	if calls := h.take(); len(calls) != 1 || !strings.Contains(log.String(), redirect.ErrNoEffect.Error()) {
		t.Errorf("got %q, log:\n%s", calls, log)
	}
}

// TestGuardStays while the forward cannot start, and when the client has moved.
func TestGuardStays(t *testing.T) {
	before, now := netip.MustParseAddr("172.20.0.5"), netip.MustParseAddr("172.21.0.5")
	for _, tc := range []struct {
		name  string
		addrs []netip.Addr // of the client, when it is led by another
		want  []string
	}{
		{"the forward cannot start", []netip.Addr{before}, []string{"apply 172.20.0.5 ACL"}},
		{"the old address is still the client's", []netip.Addr{before, now}, []string{"apply 172.21.0.5 ACL", "unapply 172.20.0.5 ACL"}},
		{"the old address may be another's", []netip.Addr{now}, []string{"apply 172.21.0.5 ACL"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, h, _ := newForwards(BySidecar, "Switch", seen("172.20.0.2"))
			h.fail["add"] = errors.New("no such image")
			if err := f.once(t.Context()); err != nil {
				t.Fatal(err)
			}
			h.take()
			c := &h.sight.Clients[0]
			c.Addrs, c.Addr = tc.addrs, tc.addrs[len(tc.addrs)-1]
			other := seen("172.20.0.2")
			other.ID, other.Name = "c2", "other" // has the address where it is not the client's
			if !slices.Contains(tc.addrs, before) {
				h.sight.Clients = append(h.sight.Clients, other)
				tc.want = append(tc.want, "apply 172.20.0.5 ACL")
			}
			for range 2 {
				if err := f.once(t.Context()); err != nil {
					t.Fatal(err)
				}
				got := slices.DeleteFunc(h.take(), func(call string) bool { return strings.HasPrefix(call, "add ") })
				if !slices.Equal(got, tc.want) {
					t.Errorf("got %q, want %q", got, tc.want)
				}
				tc.want = slices.DeleteFunc(tc.want, func(call string) bool { return strings.HasPrefix(call, "unapply") })
			}
		})
	}
}

// TestUndo holds what is taken back where not everything is as it should be.
func TestUndo(t *testing.T) {
	proxyless := seen("172.20.0.2")
	proxyless.Addr, proxyless.Proxy, proxyless.Why = netip.Addr{}, netip.Addr{}, errors.New("no container with the label")
	nowhere := proxyless
	nowhere.Addrs = nil
	for _, tc := range []struct {
		name   string
		by     By
		guard  string
		client discover.Client
		fail   string
		want   []string
		err    error
	}{
		{"undo without a proxy", ByL4Proxy, "Switch", proxyless, "", []string{"unapply 172.20.0.5 ACL,L4Proxy"}, nil},
		{"guard and no address", ByExec, "Host", nowhere, "", []string{"put c1 end …"}, ErrNoAddress},
		{"policy and no address", ByL4Proxy, "", nowhere, "", nil, ErrNoAddress},
		{"no address and nothing to look for", ByExec, "", nowhere, "", []string{"put c1 end …"}, nil},
		{"HNS refuses", ByL4Proxy, "", proxyless, "unapply", []string{"unapply 172.20.0.5 L4Proxy"}, errRefused},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, h, _ := newForwards(tc.by, tc.guard, tc.client)
			h.fail[tc.fail] = errRefused
			if err := f.Undo(t.Context()); !errors.Is(err, tc.err) {
				t.Errorf("got %v, want %v", err, tc.err)
			}
			if got := h.take(); !slices.Equal(got, tc.want) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
			lines, err := f.Plan(t.Context(), true)
			if err != nil || tc.err == ErrNoAddress && !strings.Contains(strings.Join(lines, "\n"), "fail for client web") {
				t.Errorf("plan: %v, %q", err, lines)
			}
		})
	}
}

var errRefused = errors.New("refused")

// TestOldSidecar is replaced: its client has started again.
func TestOldSidecar(t *testing.T) {
	c := seen("172.20.0.2")
	c.Sidecar, c.SideRuns, c.SideOld = "side", true, true
	f, h, _ := newForwards(BySidecar, "", c)
	if err := f.once(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := h.take(); len(got) != 2 || got[0] != "remove side" || !strings.HasPrefix(got[1], "add c1 img ") {
		t.Errorf("got %q", got)
	}
}

func TestForwardsPlan(t *testing.T) {
	waits := discover.Client{ID: "c0", Name: "early", Why: errors.New("no container with the label")}
	f, h, _ := newForwards(ByWFPProxy, "Switch", waits, seen("172.20.0.2"))
	h.sight.Orphans = []string{"left"}
	for undo, want := range map[bool][]string{
		false: {"wait for a proxy for client early: no container with the label",
			`see that the endpoint of client web (172.20.0.5) has the policy ACL {"Protocols":"6",`, `has the policy L4WFPPROXY {"OutboundProxyPort":"15080",`,
			"start a side-car of image img that shares the network of client web: [imdsgate.exe forward", "lead client web to the proxy at 172.20.0.2:80", "remove side-car left: its client is gone"},
		true: {"remove each policy ACL for 169.254.169.254:80 from the endpoint of client web (172.20.0.5)", "remove side-car left"},
	} {
		lines, err := f.Plan(t.Context(), undo)
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range want {
			if !strings.Contains(strings.Join(lines, "\n"), w) {
				t.Errorf("undo %v: no %q in\n%s", undo, w, strings.Join(lines, "\n"))
			}
		}
	}
	if calls := h.take(); len(calls) != 0 {
		t.Errorf("a plan has done %q", calls)
	}
}
