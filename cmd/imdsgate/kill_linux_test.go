package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"imdsgate/internal/bpf"
	"imdsgate/internal/testnet"
)

// binary builds imdsgate once, as it is released, where every user may run it.
func binary(t *testing.T) string {
	t.Helper()
	path, err := builtBinary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var builtBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "imdsgate-bin-")
	if err != nil {
		return "", err
	}
	atExit = append(atExit, func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "imdsgate")
	cmd := exec.Command("go", "build", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, out)
	}
	return path, nil
})

// newStack makes a stack with running simulator and these containers.
func newStack(t *testing.T, names ...string) (*testnet.Stack, []*testnet.Container) {
	t.Helper()
	testnet.Require(t, testnet.Namespaces)
	s, err := testnet.NewStack(binary(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	var cs []*testnet.Container
	for _, name := range names {
		c, err := s.NewContainer(name)
		if err != nil {
			t.Fatal(err)
		}
		cs = append(cs, c)
	}
	if err := s.StartSim(t.Context(), "--limits", "off"); err != nil {
		t.Fatal(err)
	}
	return s, cs
}

// startLoad calls from a container until the returned function is called.
func startLoad(t *testing.T, s *testnet.Stack, c *testnet.Container, clients int, how ...string) func() counts {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %s %s", loadEnv, clients, instanceURL, strings.Join(how, " ")))
	p, err := s.Spawn(c.NS, "load", cmd)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Await(t.Context(), 0, func(line string) bool { return line == "calling" }); err != nil {
		t.Fatal(err)
	}
	return func() counts {
		t.Helper()
		p.Signal(syscall.SIGTERM)
		if err := p.Wait(); err != nil {
			t.Fatalf("load: %v: %s", err, p.Output())
		}
		lines := p.Lines()
		var c counts
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &c); err != nil {
			t.Fatal(err)
		}
		return c
	}
}

// awaitAnswers waits until the proxy has answered n more requests.
func awaitAnswers(t *testing.T, p *testnet.Process, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	at := len(p.Lines())
	for range n {
		i, err := p.Await(ctx, at, func(line string) bool { return strings.Contains(line, `"decision":"allow"`) })
		if err != nil {
			t.Fatal(err)
		}
		at = i + 1
	}
}

// TestKillUnderLoad kills the proxy, the agent and both with SIGKILL while 16
// clients call with a new connection each time, and starts them again half a
// second later. No connection may be refused; requests in flight on a killed
// proxy are reset, and no others; a proxy that is asked to end resets none.
func TestKillUnderLoad(t *testing.T) {
	const clients, outage = 16, 500 * time.Millisecond
	startProxy := func(t *testing.T, s *testnet.Stack) {
		if err := s.StartProxy(t.Context(), "--audit", "-", "--audit-rate", "0", "--cache=off", "--budget=off"); err != nil {
			t.Error(err)
		}
	}
	startAgent := func(t *testing.T, s *testnet.Stack, method string) {
		n, err := s.StartAgent(t.Context(), "--method", method, "--fence", fenceFor(method))
		if err != nil || n != 2 {
			t.Errorf("agent: %d attached, %v", n, err)
		}
	}
	for _, method := range []string{"sklookup", "nftables"} {
		for _, tc := range []struct {
			name         string
			agent, proxy bool
			planned      bool // the proxy is asked to end
		}{
			{"proxy", false, true, false}, {"agent", true, false, false}, {"both", true, true, false},
			{"planned_restart_of_the_proxy", false, true, true},
		} {
			t.Run(method+"/"+tc.name, func(t *testing.T) {
				s, cs := newStack(t, "web", "db")
				if method == "sklookup" {
					testnet.Require(t, testnet.BPF)
				}
				startAgent(t, s, method)
				startProxy(t, s)
				stop := startLoad(t, s, cs[0], clients)
				awaitAnswers(t, s.Proxy, 100)
				kills := 2
				for range kills {
					var wg sync.WaitGroup
					if tc.agent {
						s.Agent.Kill()
					}
					switch {
					case tc.planned:
						if err := s.Proxy.Stop(); err != nil {
							t.Error(err)
						}
					case tc.proxy:
						s.Proxy.Kill()
					}
					time.Sleep(outage) // the outage itself, while the load goes on
					if tc.agent {
						wg.Go(func() { startAgent(t, s, method) })
					}
					if tc.proxy {
						wg.Go(func() { startProxy(t, s) })
					}
					wg.Wait()
					if t.Failed() {
						t.FailNow()
					}
					awaitAnswers(t, s.Proxy, 100)
				}
				got := stop()
				listeners, routes, links := kept(t, cs[0])
				t.Logf("%d clients, %d kills of %s: %d ok, %d refused, %d reset, %d other, slowest %v; then %d listeners, %d routes, %d links in the container; proxy has %d descriptors, agent %d",
					clients, kills, tc.name, got.OK, got.Refused, got.Reset, len(got.Other), got.Slowest.Round(time.Millisecond), listeners, routes, links,
					descriptorsOf(t, s.Proxy.PID()), descriptorsOf(t, s.Agent.PID()))
				// In flight is what the dead proxy had accepted, and, when nobody else holds
				// the listener, what waited in its queue: it is closed last, and a client
				// that was reset calls again at once.
				limit := 0
				switch {
				case tc.planned: // it finishes what it has begun
				case tc.proxy && tc.agent:
					limit = 2 * clients * kills
				case tc.proxy:
					limit = clients * kills
				}
				if got.Refused != 0 || got.Reset > limit || len(got.Other) != 0 || len(got.Status) != 0 {
					t.Errorf("want 0 refused, at most %d reset, nothing else: %+v", limit, got)
				}
				wantLinks := 0
				if method == "sklookup" {
					wantLinks = 1
				}
				if listeners != 2 || routes != 2 || links != wantLinks {
					t.Errorf("want 2 listeners, 2 routes and %d links", wantLinks)
				}
			})
		}
	}
}

func fenceFor(method string) string {
	if method == "sklookup" {
		return "require"
	}
	return "off"
}

// kept counts what imdsgate holds in a container.
func kept(t *testing.T, c *testnet.Container) (listeners, routes, links int) {
	t.Helper()
	state, err := testnet.State(c.NS)
	if err != nil {
		t.Fatal(err)
	}
	if links, err = bpf.NetnsLinks(c.NS.ID().Inode); err != nil {
		t.Fatal(err)
	}
	return strings.Count(state, "listener "), strings.Count(state, "table=169"), links
}

func descriptorsOf(t *testing.T, pid int) int {
	t.Helper()
	es, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(es)
}
