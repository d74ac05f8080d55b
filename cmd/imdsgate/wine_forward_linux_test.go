package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/testnet"
)

const windowsTokenURL = "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://management.azure.com/"

// TestWindows has imdsgate.exe run under Wine in a client container. What is beyond
// Wine must fail there and say which function is missing; all else must work.
func TestWindows(t *testing.T) {
	w := newWindows(t)
	w.before = w.state(t)
	t.Run("beyond_wine", w.beyondWine)
	t.Run("dry_run", w.dryRuns)
	w.inClient(t, "", "ip", "addr", "add", "169.254.169.254/32", "dev", "lo")
	w.before = w.state(t)
	t.Run("forward", w.forwards)
	t.Run("forward_command", w.forwardsCommand)
	t.Run("half_close", w.halfClose)
	t.Run("listen_and_end_file", w.listensOnly)
	t.Run("service", w.serves)
	t.Run("proxy_and_simulate", w.proxies)
	t.Run("size_and_start", w.sizes)
}

// beyondWine holds that nothing ends well without having been done: not even where
// the system's own programs do.
func (w *windows) beyondWine(t *testing.T) {
	for _, tc := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"forward", []string{"forward", "--to", "172.30.1.3"}, exitUnsupported, "iphlpapi.dll has no function CreateUnicastIpAddressEntry"},
		{"forward_command", []string{"forward", "--to", "172.30.1.3", "--", "cmd", "/c", "echo unseen"}, exitUnsupported, "iphlpapi.dll has no function CreateUnicastIpAddressEntry"},
		{"route", []string{"proxy", "--listen", ":80", "--ensure-route"}, exitUnsupported, "iphlpapi.dll has no function CreateIpForwardEntry2"},
		{"guard", []string{"agent", "--docker", "--guard", "host"}, exitUnsupported, "function HcnEnumerateEndpoints, is missing"},
		{"l4proxy", []string{"agent", "--docker", "--by", "l4proxy"}, exitUnsupported, "function HcnEnumerateEndpoints, is missing"},
		{"l4wfpproxy", []string{"agent", "--docker", "--by", "l4wfpproxy", "--uninstall"}, exitUnsupported, "function HcnEnumerateEndpoints, is missing"},
		{"no_engine", []string{"agent", "--docker"}, exitFailure, "hint: see whether the Docker engine runs"},
		{"no_engine_dry_run", []string{"agent", "--docker", "--dry-run"}, exitFailure, "hint: see whether the Docker engine runs"},
		{"no_engine_locate", []string{"locate"}, exitFailure, "hint: see whether the Docker engine runs"},
		{"proxy_of_an_agent", []string{"proxy"}, exitUnsupported, "hint: run the proxy with --listen :80"},
		{"not_a_service", []string{"service", "run", "--", "proxy", "--listen", ":80"}, exitUsage, "service run is for the service manager"},
		{"another_service", []string{"service", "remove", "--name", "Eventlog"}, exitFailure, "service Eventlog is not imdsgate's"},
		{"no_service", []string{"service", "remove"}, exitFailure, "Service does not exist"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, out := w.run(t, tc.args...)
			if code != tc.code || !strings.Contains(out, tc.want) || !strings.Contains(out, "\nhint: ") || strings.Contains(out, "unseen") {
				t.Errorf("got code %d, want %d, and %q in\n%s", code, tc.code, tc.want, out)
			}
		})
	}
	// The control: netsh here ends well, says nothing, and has done nothing.
	ctx, cancel := context.WithTimeout(t.Context(), windowsPatience)
	defer cancel()
	out, err := w.Wine.Run(ctx, "netsh", "interface", "ipv4", "add", "address", "name=eth0", "address=169.254.169.254", "mask=255.255.255.255")
	if err != nil || strings.TrimSpace(out) != "" {
		t.Logf("netsh is another one than was known: %v: %s", err, out)
	}
	if diff := cmp.Diff(w.before, w.state(t)); diff != "" {
		t.Errorf("the container's network has changed:\n%s", diff)
	}
}

func (w *windows) dryRuns(t *testing.T) {
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"forward", []string{"forward", "--to", "172.30.1.3", "--dry-run"},
			`would add address 169.254.169.254/32 to interface "eth0" (default route by 172.30.1.1, metric 0), never as a source`},
		{"route", []string{"proxy", "--listen", ":80", "--ensure-route", "--dry-run"},
			"would add route to 169.254.169.254 via 172.30.1.1 dev eth0, active store only"},
		{"service", []string{"service", "install", "--dry-run", "--start", "--", "proxy", "--listen", ":80"}, "would create service imdsgate, started automatically"},
		{"service_after_an_error", []string{"service", "install", "--dry-run", "--", "proxy", "--listen", ":80"}, "sc.exe failureflag imdsgate 1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, out := w.run(t, tc.args...)
			if code != exitOK || !strings.Contains(out, tc.want) || !strings.HasSuffix(out, "nothing was changed") {
				t.Errorf("got code %d, want %q in\n%s", code, tc.want, out)
			}
		})
	}
	if diff := cmp.Diff(w.before, w.state(t)); diff != "" {
		t.Errorf("the container's network has changed:\n%s", diff)
	}
}

// linuxProxy starts the proxy of Linux in a container, which may give tokens.
func (w *windows) linuxProxy(t *testing.T, c *testnet.Container) *testnet.Process {
	t.Helper()
	policy := filepath.Join(w.Stack.Dir, "policy.yaml")
	if err := os.WriteFile(policy, []byte("allow: [versions.read, instance.read, identity.token]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p, err := w.Stack.Spawn(c.NS, c.Name, exec.Command(w.Binary, "proxy", "--listen", ":80", "--log-json", "--policy", policy))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Stop() })
	if _, err := p.AwaitLog(within(t), "ready"); err != nil {
		t.Fatal(err)
	}
	return p
}

func (w *windows) envFile(t *testing.T, address string) (file string) {
	t.Helper()
	file = filepath.Join(w.Wine.Dir(), "proxy.env")
	if err := writeEnvFile(file, addressVariable, address); err != nil {
		t.Fatal(err)
	}
	return file
}

// forwards has the clients' usual calls go through a forward of Windows, also when
// the proxy comes back under another address.
func (w *windows) forwards(t *testing.T) {
	p := w.linuxProxy(t, w.first)
	file := w.envFile(t, w.first.Addr4.String())
	f, err := w.Wine.Spawn(w.exe, "forward", "--log-json", "--env-file", w.Wine.Path(file))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Kill()
	if _, err := f.AwaitLog(within(t), "forwarding"); err != nil {
		t.Fatal(err)
	}
	answered := func() {
		t.Helper()
		if body := curl(t, w.client, "-H", "Metadata: true", instanceURL); !isInstance(body) {
			t.Errorf("got %s", body)
		}
		if body := curl(t, w.client, "-H", "Metadata: true", windowsTokenURL); !strings.Contains(body, `"access_token":"ey`) {
			t.Errorf("got %.80s", body)
		}
	}
	answered()
	if !strings.Contains(p.Output(), `"proof":"address"`) || !strings.Contains(p.Output(), "address:"+w.client.Addr4.String()) {
		t.Errorf("the proxy does not know who called:\n%s", p.Output())
	}
	w.parallel(t, 64)
	second, out := w.run(t, "forward", "--to", w.first.Addr4.String())
	if second != exitFailure || !strings.Contains(out, "another process has this port") {
		t.Errorf("a second forward: got code %d, %s", second, out)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	w.linuxProxy(t, w.second)
	w.envFile(t, w.second.Addr4.String())
	if _, err := f.AwaitLog(within(t), "the proxy has another address"); err != nil {
		t.Fatal(err)
	}
	answered()
	f.Kill()
	if said, _, err := testnet.Ask(w.client.NS, "tcp", testnet.IMDS4+":80"); err == nil {
		t.Errorf("after its end somebody says %q", said)
	}
}

// parallel has so many connections open at once, and an answer on each.
func (w *windows) parallel(t *testing.T, n int) {
	t.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		c, err := testnet.Dial(within(t), w.client.NS, "tcp", testnet.IMDS4+":80")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns[i] = c
	}
	var all sync.WaitGroup
	for _, c := range conns {
		all.Go(func() {
			c.SetDeadline(time.Now().Add(patience))
			fmt.Fprintf(c, "GET /metadata/instance?api-version=2021-02-01 HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n\r\n")
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if body, err := io.ReadAll(resp.Body); err != nil || !isInstance(string(body)) {
				t.Errorf("one of %d: %v, %v: %s", n, resp.Status, err, body)
			}
		})
	}
	all.Wait()
}

// forwardsCommand returns what the command does.
func (w *windows) forwardsCommand(t *testing.T) {
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"cmd", "/c", "echo inside && exit 7"}, 7, "inside"},
		{[]string{"cmd", "/c", "exit 0"}, 0, ""},
		{[]string{"no-such-command"}, exitNotFound, "imdsgate: forward: no-such-command: executable file not found"},
	} {
		if code, out := w.run(t, append([]string{"forward", "--to", w.first.Addr4.String(), "--"}, tc.args...)...); code != tc.code || !strings.Contains(out, tc.want) {
			t.Errorf("%q: got code %d, want %d, and %q in\n%s", tc.args, code, tc.code, tc.want, out)
		}
	}
}

// halfClose has a caller end its half first: the other side hears that, and its
// answer, which comes after it, arrives whole.
func (w *windows) halfClose(t *testing.T) {
	l, err := testnet.Listen(w.first.NS, ":8081")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c) // until the half-close
				c.Write(b)
			}()
		}
	}()
	f, err := w.Wine.Spawn(w.exe, "forward", "--log-json", "--to", w.first.Addr4.String()+":8081")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Kill()
	if _, err := f.AwaitLog(within(t), "forwarding"); err != nil {
		t.Fatal(err)
	}
	c, err := testnet.Dial(within(t), w.client.NS, "tcp", testnet.IMDS4+":80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	words := bytes.Repeat([]byte("imdsgate "), 100_000)
	go func() {
		c.Write(words)
		c.(*net.TCPConn).CloseWrite()
	}()
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, words) {
		t.Errorf("%d bytes came back, %v, want %d", len(got), err, len(words))
	}
}

// listensOnly is what an HNS policy leads to, and what ends a forward that gets no
// signals.
func (w *windows) listensOnly(t *testing.T) {
	w.linuxProxy(t, w.first)
	end := filepath.Join(w.Wine.Dir(), "end")
	if err := os.WriteFile(end, []byte("an old one"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := w.Wine.Spawn(w.exe, "forward", "--log-json", "--to", w.first.Addr4.String(), "--listen", "127.0.0.1:15080", "--end-file", w.Wine.Path(end))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Kill()
	if _, err := f.AwaitLog(within(t), "forwarding"); err != nil {
		t.Fatal(err)
	}
	if body := curl(t, w.client, "-H", "Metadata: true", "-H", "Host: 169.254.169.254", "http://127.0.0.1:15080/metadata/instance?api-version=2021-02-01"); !isInstance(body) {
		t.Errorf("got %s", body)
	}
	if _, _, err := testnet.Ask(w.client.NS, "tcp", testnet.IMDS4+":80"); err == nil {
		t.Error("it listens on the service's address too")
	}
	if err := os.WriteFile(end, []byte("a new one"), 0o600); err != nil {
		t.Fatal(err)
	}
	defer context.AfterFunc(within(t), f.Kill)()
	if err := f.Wait(); err != nil {
		t.Errorf("it ended with %v: %s", err, f.Output())
	}
}

// serves has the service manager start a forward, and end it.
func (w *windows) serves(t *testing.T) {
	w.linuxProxy(t, w.first)
	for name, extra := range map[string][]string{
		"event log": nil,
		"a file":    {"--log", w.Wine.Path(filepath.Join(w.Wine.Dir(), "service.log"))},
	} {
		args := append([]string{"service", "install", "--start"}, extra...)
		if code, out := w.run(t, append(args, "--", "forward", "--to", w.first.Addr4.String())...); code != exitOK || !strings.HasSuffix(out, "service imdsgate: running") || !strings.Contains(out, "has no failureflag") { // Wine 8
			t.Fatalf("%s: got code %d: %s", name, code, out)
		}
		if body := curl(t, w.client, "-H", "Metadata: true", instanceURL); !isInstance(body) {
			t.Errorf("%s: got %s", name, body)
		}
		if code, out := w.run(t, "service", "install", "--", "forward", "--to", "172.30.1.3"); code != exitFailure || !strings.Contains(out, "hint: 'imdsgate service remove' removes it") {
			t.Errorf("a second one: got code %d: %s", code, out)
		}
		if code, out := w.run(t, "service", "remove"); code != exitOK || out != "service imdsgate: removed" {
			t.Errorf("%s: got code %d: %s", name, code, out)
		}
		if _, _, err := testnet.Ask(w.client.NS, "tcp", testnet.IMDS4+":80"); err == nil {
			t.Errorf("%s: somebody listens still", name)
		}
	}
	log, err := os.ReadFile(filepath.Join(w.Wine.Dir(), "service.log"))
	if err != nil || !strings.Contains(string(log), "msg=forwarding") {
		t.Errorf("the service's log has %q, %v", log, err)
	}
	// One that cannot start is not said to run.
	if code, out := w.run(t, "service", "install", "--start", "--", "forward", "--to", "nowhere"); code != exitFailure || !strings.Contains(out, "it ended at once, with exit code 2") {
		t.Errorf("got code %d: %s", code, out)
	}
	if code, out := w.run(t, "service", "remove"); code != exitOK {
		t.Errorf("got code %d: %s", code, out)
	}
	if diff := cmp.Diff(w.before, w.state(t)); diff != "" {
		t.Errorf("the container's network has changed:\n%s", diff)
	}
}

// proxies has another container call a proxy and a simulator of Windows.
func (w *windows) proxies(t *testing.T) {
	sim, err := w.Wine.Spawn(w.exe, "simulate", "--json")
	if err != nil {
		t.Fatal(err)
	}
	defer sim.Kill()
	if _, err := sim.Await(within(t), 0, func(line string) bool { return strings.HasPrefix(line, `{"ready":true`) }); err != nil {
		t.Fatal(err)
	}
	policy := filepath.Join(w.Stack.Dir, "policy.yaml")
	p, err := w.Wine.Spawn(w.exe, "proxy", "--listen", ":8080", "--upstream", "http://127.0.0.1:8169", "--host", w.client.Addr4.String()+":8080", "--policy", w.Wine.Path(policy), "--log-json")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	if _, err := p.AwaitLog(within(t), "ready"); err != nil {
		t.Fatal(err)
	}
	base := "http://" + w.client.Addr4.String() + ":8080"
	ask := func(url string) string {
		t.Helper()
		return curl(t, w.first, "-H", "Metadata: true", base+strings.TrimPrefix(url, "http://169.254.169.254"))
	}
	if body := ask(instanceURL); !isInstance(body) {
		t.Errorf("got %s", body)
	}
	if body := ask(windowsTokenURL); !strings.Contains(body, `"access_token":"ey`) {
		t.Errorf("got %.80s", body)
	}
	if body := ask("/metadata/attested/document?api-version=2021-02-01"); !strings.Contains(body, "no rule allows identity.document") {
		t.Errorf("got %.200s", body)
	}
	if _, err := p.Await(within(t), 0, func(line string) bool { return strings.Contains(line, `"action":"identity.document"`) }); err != nil {
		t.Error(err) // lines are written behind the answers
	}
	if n := strings.Count(p.Output(), "address:"+w.first.Addr4.String()); n != 3 {
		t.Errorf("the audit has %d lines of the caller, want 3:\n%s", n, p.Output())
	}
}

// sizes says how large the programs are, and how long they take to start. The one
// that only forwards is for images of clients.
func (w *windows) sizes(t *testing.T) {
	const most = 8 << 20
	small := *w
	small.exe = buildWindows(t, t.TempDir(), "-tags=forwardonly")
	for name, x := range map[string]*windows{"imdsgate.exe": w, "imdsgate.exe, forwardonly": &small} {
		st, err := os.Stat(x.exe)
		if err != nil {
			t.Fatal(err)
		}
		least := windowsPatience
		for range 5 {
			start := time.Now()
			if code, out := x.run(t, "version"); code != exitOK || !strings.HasSuffix(out, "windows/amd64") {
				t.Fatalf("%s: got code %d: %s", name, code, out)
			}
			least = min(least, time.Since(start))
		}
		t.Logf("%s: %.1f MB, %v from its start to its end under Wine", name, float64(st.Size())/1e6, least.Round(time.Millisecond))
		if x == &small && st.Size() > most {
			t.Errorf("%s has %d bytes, want %d at most", name, st.Size(), most)
		}
	}
	if code, out := small.run(t, "forward", "--to", w.first.Addr4.String(), "--", "cmd", "/c", "exit 5"); code != 5 {
		t.Errorf("forwardonly: got code %d: %s", code, out)
	}
	if code, _ := small.run(t, "proxy", "--listen", ":80"); code != exitUsage {
		t.Errorf("forwardonly: it has a proxy: got code %d", code)
	}
}
