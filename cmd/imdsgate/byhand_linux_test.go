package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"imdsgate/internal/testnet"
)

// isInstance reports whether a text is the instance document of the simulator.
func isInstance(text string) bool {
	var doc struct{ Compute struct{ Name string } }
	return json.Unmarshal([]byte(text), &doc) == nil && doc.Compute.Name == "vm-sim-0"
}

// TestByHandWithoutEngine goes through the steps with namespaces for containers,
// where link-local addresses are taken for neighbours.
func TestByHandWithoutEngine(t *testing.T) {
	testnet.Require(t, testnet.Command("ip"))
	s, cs := newStack(t, "client", "proxy", "next")
	client, proxy, next := cs[0], cs[1], cs[2]
	before := make(map[*testnet.Container]string)
	for _, c := range []*testnet.Container{proxy, next} {
		h := &hand{Stack: s, client: c}
		h.inClient(t, "", "ip", "route", "add", "169.254.0.0/16", "dev", "eth0")
		before[c] = h.state(t)
	}
	file := filepath.Join(s.Dir, "proxy.env")
	start := func(c *testnet.Container) *testnet.Process {
		t.Helper()
		p, err := s.Spawn(c.NS, c.Name, exec.Command(s.Binary, "proxy", "--listen", ":80", "--ensure-route", "--log-json"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.AwaitLog(within(t), "ready"); err != nil {
			t.Fatal(err)
		}
		if err := writeEnvFile(file, addressVariable, c.Addr4.String()); err != nil {
			t.Fatal(err)
		}
		return p
	}
	stop := func(p *testnet.Process, c *testnet.Container) {
		t.Helper()
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
		h := &hand{Stack: s, client: c, before: before[c]}
		h.wantAsBefore(t)
	}

	p := start(proxy)
	h := &hand{Stack: s, client: client, before: (&hand{client: client}).state(t)}
	f := h.forward(t, "--env-file", file)
	h.ready(t, f)
	ask := func() string { return curl(t, client, "-H", "Metadata: true", instanceURL) }
	if body := ask(); !isInstance(body) {
		t.Errorf("got %s", body)
	}
	if _, err := p.Await(within(t), 0, func(line string) bool { // it records who called
		return strings.Contains(line, `"proof":"address"`) && strings.Contains(line, "address:"+client.Addr4.String())
	}); err != nil {
		t.Error(err)
	}
	stop(p, proxy)
	p = start(next)
	if _, err := f.AwaitLog(within(t), "the proxy has another address"); err != nil {
		t.Fatal(err)
	}
	if body := ask(); !isInstance(body) {
		t.Errorf("after the move: got %s", body)
	}
	stop(p, next)
	if err := f.Stop(); err != nil {
		t.Error(err)
	}
	h.wantAsBefore(t)
}

// TestEnsureRouteRefuses is the proxy that cannot have its route.
func TestEnsureRouteRefuses(t *testing.T) {
	testnet.Require(t, testnet.Root, testnet.Command("setpriv"), testnet.Command("ip"))
	s, cs := newStack(t, "proxy", "gateless")
	(&hand{Stack: s, client: cs[1]}).inClient(t, "", "ip", "route", "del", "default")
	for _, tc := range []struct {
		name string
		c    *testnet.Container
		args []string
		code int
		want string
	}{
		{"with_an_agent", cs[0], []string{s.Binary, "proxy", "--ensure-route", "--agent", "/x"}, exitUsage, "imdsgate: --ensure-route is for --listen: "},
		{"with_the_default_agent", cs[0], []string{s.Binary, "proxy", "--ensure-route"}, exitUsage, "imdsgate: --ensure-route is for --listen: "},
		{"to_itself", cs[0], []string{s.Binary, "proxy", "--ensure-route", "--listen", ":80", "--upstream", "http://127.0.0.1:8169"}, exitUsage, "imdsgate: --ensure-route: 127.0.0.1 is this machine itself"},
		{"no_capability", cs[0], []string{"setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", s.Binary, "proxy", "--ensure-route", "--listen", ":80"}, exitUnsupported, "hint: give the container CAP_NET_ADMIN"},
		{"no_default_route", cs[1], []string{s.Binary, "proxy", "--ensure-route", "--listen", ":80"}, exitFailure, "there is no default route\nhint: connect the container"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, err := s.Spawn(tc.c.NS, tc.name, exec.Command(tc.args[0], tc.args[1:]...))
			if err != nil {
				t.Fatal(err)
			}
			if code := exitCode(p.Wait()); code != tc.code || !strings.Contains(p.Output(), tc.want) || !strings.Contains(p.Output(), "\nhint: ") {
				t.Errorf("got code %d, want %d, and %q in\n%s", code, tc.code, tc.want, p.Output())
			}
		})
	}
}

// byHand is a host where the scripts of examples/by-hand run, with a real engine.
type byHand struct {
	*testnet.Stack
	docker *testnet.Docker
	env    []string
}

// The images of the test: ours, as deploy/docker makes it, and a client's with a
// shell, sleep and curl.
const (
	ownImage    = "imdsgate"
	clientImage = "client"
)

func newByHand(t *testing.T) *byHand {
	t.Helper()
	testnet.Require(t, testnet.Root, testnet.DockerEngine, testnet.Command("docker"), testnet.Command("curl"), testnet.Command("ldd"), testnet.Command("setpriv"))
	s, _ := newStack(t)
	d, err := testnet.StartDocker(t.Context(), s.VM)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	b := &byHand{Stack: s, docker: d, env: append(os.Environ(),
		"DOCKER_HOST="+d.Host(), "PATH="+filepath.Dir(s.Binary)+":"+os.Getenv("PATH"), "IMDS_DIR="+s.Dir, "IMDSGATE_IMAGE="+ownImage)}
	if err := d.Image(t.Context(), ownImage, map[string]string{"/imdsgate": s.Binary}); err != nil {
		t.Fatal(err)
	}
	b.run(t, "docker", "create", "--name", "draft", ownImage, "/imdsgate")
	b.run(t, "docker", "commit", "--change", `ENTRYPOINT ["/imdsgate"]`, "--change", "USER 65534:65534", "draft", ownImage)
	b.run(t, "docker", "rm", "draft")
	files := make(map[string]string)
	for _, program := range []string{"sh", "sleep", "curl"} {
		withLibraries(t, files, program)
	}
	if err := d.Image(t.Context(), clientImage, files); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *byHand) command(args ...string) *exec.Cmd {
	name := args[0]
	if strings.HasSuffix(name, ".sh") {
		name = "../../examples/by-hand/" + name
	}
	cmd := exec.Command(name, args[1:]...)
	cmd.Env = b.env
	return cmd
}

// run runs a program on the host and returns its output.
func (b *byHand) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := b.command(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v: %s", args, err, out)
	}
	return string(out)
}

// eventually runs a program until its output is as wanted.
func (b *byHand) eventually(t *testing.T, ok func(output string) bool, args ...string) string {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		out, err := b.command(args...).CombinedOutput()
		if err == nil && ok(string(out)) {
			return string(out)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%q: %v: %s", args, err, out)
		}
	}
}

// proxy starts the proxy container and returns its address.
func (b *byHand) proxy(t *testing.T) netip.Addr {
	t.Helper()
	b.run(t, "proxy.sh")
	b.eventually(t, func(logs string) bool { return strings.Contains(logs, "msg=ready") }, "docker", "logs", "imds-proxy")
	addr := b.run(t, "docker", "inspect", "--format", "{{.NetworkSettings.Networks.bridge.IPAddress}}", "imds-proxy")
	return netip.MustParseAddr(strings.TrimSpace(addr))
}

var askInstance = []string{"curl", "-sS", "--max-time", "5", "-H", "Metadata: true", instanceURL}

// TestByHand runs the scripts of examples/by-hand: the five steps, and a proxy
// that comes back under another address.
func TestByHand(t *testing.T) {
	b := newByHand(t)
	first := b.proxy(t)
	if body := b.run(t, append([]string{"client.sh", clientImage}, askInstance...)...); !isInstance(body) {
		t.Errorf("client.sh: got %s", body)
	}
	if code := exitCode(b.command("client.sh", clientImage, "sh", "-c", "exit 7").Run()); code != 7 {
		t.Errorf("client.sh: got exit code %d, want 7", code)
	}
	b.wantLocated(t, first)

	watch, err := b.Spawn(b.VM.NS, "locate", b.command("imdsgate", "locate", "--watch", "--env-file", filepath.Join(b.Dir, "proxy.env"), "--log-json"))
	if err != nil {
		t.Fatal(err)
	}
	located := func(a netip.Addr) {
		t.Helper()
		if _, err := watch.Await(within(t), 0, func(line string) bool {
			return strings.Contains(line, `"located"`) && strings.Contains(line, fmt.Sprintf("%q", a))
		}); err != nil {
			t.Fatal(err)
		}
	}
	located(first)
	b.run(t, "follow.sh", "web", clientImage, "sleep", "1000")
	b.run(t, "docker", "run", "--detach", "--name", "plain", clientImage, "sleep", "1000")
	b.run(t, "sidecar.sh", "plain")
	wantAnswers := func() {
		t.Helper()
		for _, name := range []string{"web", "plain"} {
			b.eventually(t, isInstance, append([]string{"docker", "exec", name}, askInstance...)...)
		}
	}
	wantAnswers()
	b.eventually(t, func(logs string) bool { return strings.Count(logs, `"proof":"address"`) >= 3 }, "docker", "logs", "imds-proxy")

	// The next proxy cannot have the address of the first, and the clients stay.
	b.run(t, "docker", "rm", "--force", "imds-proxy")
	b.run(t, "docker", "run", "--detach", "--name", "squatter", clientImage, "sleep", "1000")
	second := b.proxy(t)
	if second == first {
		t.Fatalf("the proxy came back at %v: this would prove nothing", first)
	}
	located(second)
	wantAnswers()
	(&engine{b.Stack, b.docker}).onlyTheHost(t)

	if code := strings.TrimSpace(b.run(t, "docker", "stop", "web") + b.run(t, "docker", "wait", "web")); !strings.HasSuffix(code, "143") {
		t.Errorf("docker stop web: %q, want the command's own end by SIGTERM, 143", code)
	}
	if err := watch.Stop(); err != nil {
		t.Error(err)
	}
}

// wantLocated asks for the proxy's address in all ways.
func (b *byHand) wantLocated(t *testing.T, addr netip.Addr) {
	t.Helper()
	for form, want := range map[string]string{
		"--export=sh":         "export IMSProxyIpAddress=" + addr.String() + "\n",
		"--export=powershell": "$env:IMSProxyIpAddress = '" + addr.String() + "'\n",
		"--network=bridge":    addr.String() + "\n",
		"--name=imds-proxy":   addr.String() + "\n",
		"--json":              fmt.Sprintf(`,"network":"bridge","address":"%v"}`+"\n", addr),
		"--env-file=" + filepath.Join(b.Dir, "once.env"): "",
	} {
		if got := b.run(t, "imdsgate", "locate", form); got != want && !(form == "--json" && strings.HasSuffix(got, want)) {
			t.Errorf("locate %s: got %q, want %q", form, got, want)
		}
	}
	if v, err := readEnvFile(filepath.Join(b.Dir, "once.env"), addressVariable); v != addr.String() {
		t.Errorf("locate --env-file wrote %q, %v", v, err)
	}
	b.run(t, "docker", "run", "--detach", "--name", "other", "--label", "MSIProxyContainer", clientImage, "sleep", "1000")
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"imdsgate", "locate"}, exitFailure, `2 running containers with the label "MSIProxyContainer", want one: imds-proxy, other` + "\nhint: "},
		{[]string{"imdsgate", "locate", "--label", "x", "--wait", "10ms"}, exitFailure, "no container with the label \"x\"; running are: imds-proxy, other\nhint: "},
		{[]string{"imdsgate", "locate", "--name", "other", "--env-file", "/nonexistent/file"}, exitFailure, "imdsgate: --env-file: "},
		{[]string{"setpriv", "--reuid=65534", "--clear-groups", "imdsgate", "locate"}, exitUnsupported, "hint: run it as root, or as a user who may use the Docker engine"},
		{[]string{"setpriv", "--reuid=65534", "--clear-groups", "imdsgate", "locate", "--watch"}, exitUnsupported, "hint: run it as root, or as a user who may use the Docker engine"},
	} {
		out, err := b.command(tc.args...).CombinedOutput()
		if code := exitCode(err); code != tc.code || !strings.Contains(string(out), tc.want) {
			t.Errorf("%q: got code %d, want %d, and %q in\n%s", tc.args, code, tc.code, tc.want, out)
		}
	}
	b.run(t, "docker", "rm", "--force", "other")
}
