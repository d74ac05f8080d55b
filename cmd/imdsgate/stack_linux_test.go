package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"imdsgate/internal/testnet"
)

// curl calls from inside a container with the real curl, and returns the body.
func curl(t *testing.T, c *testnet.Container, args ...string) string {
	t.Helper()
	testnet.Require(t, testnet.Command("curl"))
	cmd := exec.Command("curl", append([]string{"-sS", "--max-time", "5"}, args...)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	p, err := testnet.Spawn(c.NS, "curl", cmd)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Fatalf("curl %v: %v: %s", args, err, p.Output())
	}
	return p.Output()
}

// TestServerOnPort80 runs a real nginx on 0.0.0.0:80 of the container, started
// before the agent or after the first call: it keeps its port, and the metadata
// address stays the gate's.
func TestServerOnPort80(t *testing.T) {
	for _, method := range []string{"sklookup", "nftables"} {
		for _, when := range []string{"before", "after"} {
			t.Run(method+"/"+when, func(t *testing.T) {
				testnet.Require(t, testnet.Command("nginx"))
				if method == "sklookup" {
					testnet.Require(t, testnet.BPF)
				}
				s, cs := newStack(t, "web")
				if when == "before" {
					startNginx(t, s, cs[0])
				}
				if _, err := s.StartAgent(t.Context(), "--method", method, "--fence", fenceFor(method)); err != nil {
					t.Fatal(err)
				}
				if err := s.StartProxy(t.Context()); err != nil {
					t.Fatal(err)
				}
				wantGate := func() {
					t.Helper()
					var doc struct{ Compute struct{ Name string } }
					body := curl(t, cs[0], "-H", "Metadata: true", instanceURL)
					if err := json.Unmarshal([]byte(body), &doc); err != nil || doc.Compute.Name != "vm-sim-0" {
						t.Errorf("169.254.169.254: %v: %s", err, body)
					}
				}
				wantGate()
				if when == "after" {
					startNginx(t, s, cs[0])
				}
				for range 3 {
					if body := curl(t, cs[0], "http://127.0.0.1/"); body != "this is nginx" {
						t.Errorf("port 80: got %q", body)
					}
					if body := curl(t, cs[0], "http://"+cs[0].Addr4.String()+"/"); body != "this is nginx" {
						t.Errorf("port 80 of its address: got %q", body)
					}
					wantGate()
				}
			})
		}
	}
}

// startNginx starts nginx in a container, with every path in a folder of its own.
func startNginx(t *testing.T, s *testnet.Stack, c *testnet.Container) {
	t.Helper()
	dir := t.TempDir()
	conf := filepath.Join(dir, "nginx.conf")
	err := os.WriteFile(conf, fmt.Appendf(nil, `daemon off; master_process off; pid %[1]s/pid; error_log stderr notice;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s/a; proxy_temp_path %[1]s/b; fastcgi_temp_path %[1]s/c; uwsgi_temp_path %[1]s/d; scgi_temp_path %[1]s/e;
  server { listen 0.0.0.0:80; location / { return 200 "this is nginx"; } }
}
`, dir), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.Spawn(c.NS, "nginx", exec.Command("nginx", "-c", conf, "-p", dir))
	if err != nil {
		t.Fatal(err)
	}
	// It says so once the port is bound.
	if _, err := p.Await(t.Context(), 0, func(line string) bool {
		return strings.Contains(line, "start worker process") || strings.Contains(line, "nginx/")
	}); err != nil {
		t.Fatal(err)
	}
}

// TestProxyNeedsNothing runs the proxy with all that can be taken from it gone,
// and reads what the kernel says of it.
func TestProxyNeedsNothing(t *testing.T) {
	testnet.Require(t, testnet.Root, testnet.BPF, testnet.Command("setpriv"), testnet.Command("unshare"))
	s, cs := newStack(t, "web")
	if _, err := s.StartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	inner := s.ProxyCommand("--audit", "-")
	script := `mount -o remount,bind,ro / && exec setpriv --reuid 65534 --regid 65534 --clear-groups --bounding-set=-all --inh-caps=-all --ambient-caps=-all --no-new-privs -- "$@"`
	cmd := exec.Command("unshare", append([]string{"--mount", "--net", "--", "sh", "-ec", script, "sh"}, inner.Args...)...)
	if err := s.StartProxyAs(t.Context(), cmd); err != nil {
		t.Fatal(err)
	}
	proc := fmt.Sprintf("/proc/%d/", s.Proxy.PID())
	status := fields(t, proc+"status")
	for name, want := range map[string]string{
		"Uid": "65534 65534 65534 65534", "Gid": "65534 65534 65534 65534", "Groups": "", "NoNewPrivs": "1",
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
	} {
		if got := status[name]; got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	t.Logf("/proc/PID/status: Uid %s; CapPrm %s; CapEff %s; CapBnd %s; NoNewPrivs %s", status["Uid"], status["CapPrm"], status["CapEff"], status["CapBnd"], status["NoNewPrivs"])
	dev, err := os.ReadFile(proc + "net/dev")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(dev), ":"); n != 1 {
		t.Errorf("%d network interfaces, want lo only:\n%s", n, dev)
	}
	mounts, err := os.ReadFile(proc + "mounts")
	if err != nil {
		t.Fatal(err)
	}
	if root := rootMount(string(mounts)); !strings.HasPrefix(root, "ro") {
		t.Errorf("root is mounted %q", root)
	}
	if body := curl(t, cs[0], "-H", "Metadata: true", instanceURL); !strings.Contains(body, "vm-sim-0") {
		t.Errorf("got %s", body)
	}
}

// fields reads a /proc status file.
func fields(t *testing.T, path string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]string)
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		m[name] = strings.Join(strings.Fields(value), " ")
	}
	return m
}

// rootMount is the options of the last mount on /.
func rootMount(mounts string) string {
	options := ""
	for line := range strings.Lines(mounts) {
		if f := strings.Fields(line); len(f) > 3 && f[1] == "/" {
			options = f[3]
		}
	}
	return options
}
