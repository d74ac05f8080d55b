//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/netns"
	"imdsgate/internal/sim"
	"imdsgate/internal/testnet"
)

// setup says what a bench is like.
type setup struct {
	method     string   // of capture; empty means sklookup
	policy     string   // text of the proxy's policy file; empty: it is given none
	instance   string   // text of the simulator's instance file; empty: the default VM
	sim        []string // further flags of the simulator
	proxy      []string // and of the proxy
	containers []string
}

// bench is a VM with the gate on it.
type bench struct {
	*testnet.Stack
	containers map[string]*testnet.Container
}

func start(t *testing.T, c setup) *bench {
	t.Helper()
	method, fence := "sklookup", "require"
	if c.method == "nftables" {
		method, fence = c.method, "off" // this method is for kernels without BPF
	}
	testnet.Require(t, testnet.Namespaces)
	if method == "sklookup" {
		testnet.Require(t, testnet.BPF)
	}
	ctx := deadline(t)
	s, err := testnet.NewStack(imdsgate)
	ok(t, err)
	b := &bench{Stack: s, containers: make(map[string]*testnet.Container)}
	t.Cleanup(func() { b.close(t) })
	for _, name := range c.containers {
		b.containers[name], err = s.NewContainer(name)
		ok(t, err)
	}
	if c.instance != "" {
		c.sim = append(c.sim, "--instance", b.file(t, "instance.yaml", c.instance))
	}
	ok(t, s.StartSim(ctx, c.sim...))
	n, err := s.StartAgent(ctx, "--method", method, "--fence", fence)
	ok(t, err)
	if n != len(c.containers) {
		t.Fatalf("agent attached %d containers, want %d", n, len(c.containers))
	}
	flags := c.proxy
	if c.policy != "" {
		flags = append(flags, "--policy", b.file(t, "policy.yaml", c.policy))
	}
	ok(t, s.StartProxy(ctx, flags...))
	return b
}

func (b *bench) close(t *testing.T) {
	if t.Failed() {
		for _, p := range []*testnet.Process{b.Sim, b.Agent, b.Proxy} {
			if p != nil {
				t.Logf("output of %s:\n%s", p.Name, p.Output())
			}
		}
	}
	b.Close()
}

// file writes a file that the proxy can read.
func (b *bench) file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(b.Dir, name)
	ok(t, os.WriteFile(path, []byte(text), 0o644))
	return path
}

// inside is an HTTP client whose connections begin in a namespace. The caller
// closes those that are idle.
func inside(ns *netns.Handle) *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return testnet.Dial(ctx, ns, network, address)
		},
	}}
}

// manage calls the simulator's management API, which only the fabric reaches.
func (b *bench) manage(t *testing.T, method, path, body string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://127.0.0.1:8170"+path, strings.NewReader(body))
	ok(t, err)
	client := inside(b.Fabric.NS)
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	ok(t, err)
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	ok(t, err)
	if resp.StatusCode > 299 {
		t.Fatalf("%s %s: %s: %s", method, path, resp.Status, answer)
	}
	return answer
}

// history is what the metadata service was asked.
func (b *bench) history(t *testing.T) []sim.Exchange {
	t.Helper()
	var all []sim.Exchange
	ok(t, json.Unmarshal(b.manage(t, http.MethodGet, "/history", ""), &all))
	return all
}

// onlyTheVM checks that no other address than the VM's called the service, and
// that somebody did.
func (b *bench) onlyTheVM(t *testing.T) {
	t.Helper()
	all := b.history(t)
	if len(all) == 0 {
		t.Error("the service was never asked")
	}
	for _, e := range all {
		peer, err := netip.ParseAddrPort(e.Peer)
		ok(t, err)
		if peer.Addr() != b.VM.Addr4 {
			t.Errorf("the service was called by %v, want only %v, the VM", peer, b.VM.Addr4)
		}
	}
}

// events ends the proxy, so that no more can come, and returns the audit events
// of each workload.
func (b *bench) events(t *testing.T) map[string][]audit.Event {
	t.Helper()
	if err := b.Proxy.Stop(); err != nil {
		t.Errorf("end the proxy: %v", err)
	}
	all := make(map[string][]audit.Event)
	for _, line := range b.Proxy.Lines() {
		var e audit.Event
		if !strings.Contains(line, `"decision"`) {
			continue
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("audit line: %v: %s", err, line)
		}
		all[string(e.Workload)] = append(all[string(e.Workload)], e)
	}
	return all
}

// deadline ends everything a test waits for.
func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
