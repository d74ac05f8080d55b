package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"imdsgate/internal/testnet"
)

// engine is a stack with a real Docker engine in its VM, and an image with our
// test programs.
type engine struct {
	*testnet.Stack
	docker *testnet.Docker
}

const testImage = "imdsgate-test"

func newEngine(t *testing.T) *engine {
	t.Helper()
	testnet.Require(t, testnet.Root, testnet.BPF, testnet.DockerEngine, testnet.Command("docker"), testnet.Command("gcc"))
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
	e := &engine{s, d}
	if err := d.Image(t.Context(), testImage, map[string]string{"/first": first(t), "/imdsgate": s.Binary}); err != nil {
		t.Fatal(err)
	}
	return e
}

// first builds the program whose first instruction is the call.
func first(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "first")
	if out, err := exec.Command("gcc", "-static", "-nostdlib", "-O1", "-o", path, "testdata/first.c").CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v: %s", err, out)
	}
	return path
}

func (e *engine) start(t *testing.T, args ...string) {
	t.Helper()
	if _, err := e.StartAgent(t.Context(), append([]string{"--docker", "--docker-host", e.docker.Host(), "--netns-dir", e.docker.NetnsDir()}, args...)...); err != nil {
		t.Fatal(err)
	}
	// Every call is to come to the service: what is tested is the way there.
	if err := e.StartProxy(t.Context(), "--audit", "-", "--audit-rate", "0", "--cache=off", "--budget=off"); err != nil {
		t.Fatal(err)
	}
}

// run runs the docker command line. Images are our own: nothing is pulled.
func (e *engine) run(ctx context.Context, args ...string) (string, error) {
	if args[0] == "run" {
		args = slices.Insert(slices.Clone(args), 1, "--pull=never")
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker", append([]string{"-H", e.docker.Host()}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

func (e *engine) mustRun(t *testing.T, args ...string) string {
	t.Helper()
	out, err := e.run(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// onlyTheHost checks who called the service, and returns how many calls it saw.
func (e *engine) onlyTheHost(t *testing.T) int {
	t.Helper()
	seen, err := e.History(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range seen {
		if !strings.HasPrefix(s.Peer, e.VM.Addr4.String()+":") {
			t.Errorf("the service was called by %s: %s", s.Peer, s.Target)
		}
	}
	return len(seen)
}

// importImage makes the image that users build with deploy/docker/Dockerfile: the
// binary and nothing else.
func (e *engine) importImage(t *testing.T) {
	t.Helper()
	testnet.Require(t, testnet.Command("tar"))
	archive, err := exec.Command("tar", "-C", filepath.Dir(e.Binary), "-c", "imdsgate").Output()
	if err != nil {
		t.Fatal(err)
	}
	load := exec.Command("docker", "-H", e.docker.Host(), "import", "--change", `ENTRYPOINT ["/imdsgate"]`, "--change", "USER 65534:65534", "-", "imdsgate:latest")
	load.Stdin = bytes.NewReader(archive)
	if out, err := load.CombinedOutput(); err != nil {
		t.Fatalf("docker import: %v: %s", err, out)
	}
}

// deployEnv is the environment for the files in deploy/docker.
func (e *engine) deployEnv() []string {
	return append(os.Environ(), "DOCKER_HOST="+e.docker.Host(), "DOCKER_SOCK="+e.docker.Socket(),
		"DOCKER_EXEC_ROOT="+filepath.Dir(e.docker.NetnsDir()), "IMDSGATE_RUN="+filepath.Join(e.Dir, "run"))
}

// awaitReady waits until the containers with these names say that they are ready.
func (e *engine) awaitReady(t *testing.T, prefixes ...string) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for _, prefix := range prefixes {
		for {
			log := ""
			for _, id := range strings.Fields(e.mustRun(t, "ps", "-aq", "--filter", "name="+prefix)) {
				log += e.logs(id)
			}
			if strings.Contains(log, "msg=ready") {
				break
			}
			if time.Now().After(deadline) {
				tasks, _ := e.run(t.Context(), "service", "ps", "--no-trunc", prefix)
				t.Fatalf("%s is not ready: %s\n%s\n%s", prefix, e.mustRun(t, "ps", "-a"), tasks, log)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

// composeUp starts agent and proxy from the compose file that users get.
func (e *engine) composeUp(t *testing.T) {
	t.Helper()
	testnet.Require(t, testnet.Command("docker-compose"))
	e.importImage(t)
	args := []string{"-p", "imdsgate", "-f", "../../deploy/docker/compose.yaml"}
	if !unifiedCgroups() {
		args = append(args, "-f", "../../deploy/docker/compose.cgroup1.yaml")
	}
	compose := func(what ...string) {
		t.Helper()
		cmd := exec.Command("docker-compose", append(slices.Clone(args), what...)...)
		cmd.Env = e.deployEnv()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("docker-compose %v: %v: %s", what, err, out)
		}
	}
	compose("up", "-d", "--no-build")
	t.Cleanup(func() { compose("down", "--volumes", "--timeout", "5") })
	e.awaitReady(t, "imdsgate_agent", "imdsgate_proxy")
}

// unifiedCgroups reports whether this machine has cgroup v2 and nothing else.
func unifiedCgroups() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// TestDockerSwarm deploys the stack file on a swarm of one node.
func TestDockerSwarm(t *testing.T) {
	e := newEngine(t)
	e.importImage(t)
	if err := os.Mkdir(filepath.Join(e.Dir, "run"), 0o755); err != nil {
		t.Fatal(err)
	}
	// The engine looks for a newer image first. Its question must end at once, not by
	// a time-out: nothing but the service can be reached.
	e.inVM(t, "ip", "route", "add", testnet.IMDS4, "via", "10.88.1.1")
	e.inVM(t, "ip", "route", "del", "default")
	e.inVM(t, "ip", "route", "add", "unreachable", "default")
	e.mustRun(t, "swarm", "init", "--advertise-addr", "127.0.0.1", "--listen-addr", "127.0.0.1:2377")
	t.Cleanup(func() {
		e.run(context.Background(), "stack", "rm", "imdsgate")
		e.run(context.Background(), "swarm", "leave", "--force")
	})
	args := []string{"stack", "deploy", "--resolve-image", "never", "-c", "../../deploy/docker/stack.yaml"}
	if !unifiedCgroups() {
		args = append(args, "-c", "../../deploy/docker/stack.cgroup1.yaml")
	}
	cmd := exec.Command("docker", append(args, "imdsgate")...)
	cmd.Env = e.deployEnv()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("docker stack deploy: %v: %s", err, out)
	}
	e.awaitReady(t, "imdsgate_agent", "imdsgate_proxy")
	out := e.mustRun(t, "run", "--rm", testImage, "/imdsgate", "demo-part", "client", instanceURL)
	if a := decodeAnswer(t, out); a.Status != 200 || !strings.Contains(a.Body, "vm-sim-0") {
		t.Errorf("got %s", out)
	}
	e.onlyTheHost(t)
}

func (e *engine) logs(container string) string {
	out, _ := e.run(context.Background(), "logs", container)
	return out
}

// TestDockerNetworkModes runs unmodified containers in every network mode, with
// the compose file up.
func TestDockerNetworkModes(t *testing.T) {
	e := newEngine(t)
	e.composeUp(t)
	e.mustRun(t, "network", "create", "one")
	e.mustRun(t, "network", "create", "two")
	e.mustRun(t, "network", "create", "--internal", "inside")
	e.mustRun(t, "run", "-d", "--name", "target", "--network", "none", testImage, "/imdsgate", "simulate", "--listen", "127.0.0.1:81")
	for _, tc := range []struct {
		name string
		args []string
	}{
		{"bridge", nil},
		{"network_one", []string{"--network", "one"}},
		{"network_two", []string{"--network", "two"}},
		{"internal", []string{"--network", "inside"}},
		{"none", []string{"--network", "none"}},
		{"container", []string{"--network", "container:target"}},
		{"read_only_and_non_root", []string{"--read-only", "--user", "1000:1000", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"}},
		{"with_NET_RAW", []string{"--cap-add", "NET_RAW"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			args := append([]string{"run", "--rm"}, tc.args...)
			out := e.mustRun(t, append(args, testImage, "/imdsgate", "demo-part", "client", instanceURL)...)
			var a answer
			if err := json.Unmarshal([]byte(out), &a); err != nil || a.Status != 200 || !strings.Contains(a.Body, "vm-sim-0") || a.Peer != "169.254.169.254:80" {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	t.Run("nginx_on_port_80", func(t *testing.T) { testDockerNginx(t, e) })
	e.onlyTheHost(t)
}

// testDockerNginx runs Debian's nginx in a container, which publishes port 80.
func testDockerNginx(t *testing.T, e *engine) {
	testnet.Require(t, testnet.Command("nginx"), testnet.Command("ldd"))
	conf := filepath.Join(t.TempDir(), "nginx.conf")
	text := `daemon off; master_process off; pid /pid; error_log /log; user root;
events {}
http {
  access_log off;
  client_body_temp_path /a; proxy_temp_path /b; fastcgi_temp_path /c; uwsgi_temp_path /d; scgi_temp_path /e;
  server { listen 0.0.0.0:80; location / { return 200 "this is nginx"; } }
}
`
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"/nginx.conf": conf, "/imdsgate": e.Binary}
	nginx := withLibraries(t, files, "nginx")
	files["/etc/passwd"], files["/etc/group"] = "/etc/passwd", "/etc/group"
	if err := e.docker.Image(t.Context(), "imdsgate-nginx", files); err != nil {
		t.Fatal(err)
	}
	e.mustRun(t, "run", "-d", "--name", "nginx", "-p", "8080:80", "imdsgate-nginx", nginx, "-c", "/nginx.conf", "-p", "/")
	ask := func(url string) answer {
		t.Helper()
		var a answer
		if err := json.Unmarshal([]byte(e.mustRun(t, "exec", "nginx", "/imdsgate", "demo-part", "client", url)), &a); err != nil {
			t.Fatal(err)
		}
		return a
	}
	for range 2 {
		if a := ask("http://127.0.0.1/"); a.Body != "this is nginx" {
			t.Errorf("its own port 80: %+v", a)
		}
		if a := ask(instanceURL); a.Status != 200 || !strings.Contains(a.Body, "vm-sim-0") {
			t.Errorf("the metadata service: %+v", a)
		}
	}
}

// withLibraries adds a program of this machine and the libraries it needs.
func withLibraries(t *testing.T, files map[string]string, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("ldd", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	files[path] = path
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") {
			files[word] = word
		}
	}
	return path
}

// number reads a count from the environment: the full runs take minutes.
func number(t *testing.T, name string, short int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return short
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: want a number", name, s)
	}
	return n
}

func decodeAnswer(t *testing.T, out string) answer {
	t.Helper()
	var a answer
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return a
}

// TestDockerFirstInstruction starts containers whose very first instruction is
// the call, four at a time. IMDSGATE_STARTS says how many: 40 unless told.
func TestDockerFirstInstruction(t *testing.T) {
	e := newEngine(t)
	e.start(t)
	starts := number(t, "IMDSGATE_STARTS", 40)
	took := make([]int, starts)
	forEach(starts, 4, func(i int) {
		out, err := e.run(t.Context(), "run", "--rm", testImage, "/first")
		ms, rest, _ := strings.Cut(strings.TrimSpace(out), " ")
		n, aerr := strconv.Atoi(ms)
		if err != nil || aerr != nil || !strings.Contains(rest, "200 OK") {
			t.Errorf("start %d: %v: %s", i, err, out)
			return
		}
		took[i] = n
	})
	slices.Sort(took)
	held := 0
	for _, ms := range took {
		if ms >= 900 { // a SYN that was dropped is sent again after a second
			held++
		}
	}
	seen := e.onlyTheHost(t)
	t.Logf("%d starts, 4 in parallel: %d answers, %d held, 0 straight from the service (it saw %d calls, all from the host); connect took p50 %d ms, p99 %d ms, slowest %d ms",
		starts, len(took), held, seen, took[len(took)/2], took[len(took)*99/100], took[len(took)-1])
	if seen != starts {
		t.Errorf("the service saw %d calls, want %d", seen, starts)
	}
}

// forEach calls f for 0 … n-1, so many at a time.
func forEach(n, parallel int, f func(i int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range parallel {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// usage is what a process holds.
type usage struct{ descriptors, rssKiB int }

func usageOf(t *testing.T, pid int) usage {
	t.Helper()
	rss := fields(t, fmt.Sprintf("/proc/%d/status", pid))["VmRSS"]
	n, err := strconv.Atoi(strings.TrimSuffix(rss, " kB"))
	if err != nil {
		t.Fatal(err)
	}
	return usage{descriptorsOf(t, pid), n}
}

// TestDockerChurn starts and removes many containers, eight at a time, and counts
// what is left of them. IMDSGATE_CHURN says how many: 48 unless told.
func TestDockerChurn(t *testing.T) {
	e := newEngine(t)
	e.start(t)
	n := number(t, "IMDSGATE_CHURN", 48)
	forEach(8, 8, func(int) { e.run(t.Context(), "run", "--rm", testImage, "/first") }) // warm
	settle := func() (agent, proxy usage, namespaces int) {
		deadline := time.Now().Add(30 * time.Second)
		for {
			agent, proxy, namespaces = usageOf(t, e.Agent.PID()), usageOf(t, e.Proxy.PID()), netnsCount(t)
			if attachedNow(e) == 0 || time.Now().After(deadline) {
				return agent, proxy, namespaces
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	agentBefore, proxyBefore, nsBefore := settle()
	forEach(n, 8, func(i int) {
		if out, err := e.run(t.Context(), "run", "--rm", testImage, "/first"); err != nil {
			t.Errorf("%d: %v: %s", i, err, out)
		}
	})
	agentAfter, proxyAfter, nsAfter := settle()
	t.Logf("%d containers, 8 at a time: attached now %d; agent descriptors %d → %d, RSS %d → %d KiB; proxy descriptors %d → %d, RSS %d → %d KiB; network namespaces with processes %d → %d",
		n, attachedNow(e), agentBefore.descriptors, agentAfter.descriptors, agentBefore.rssKiB, agentAfter.rssKiB,
		proxyBefore.descriptors, proxyAfter.descriptors, proxyBefore.rssKiB, proxyAfter.rssKiB, nsBefore, nsAfter)
	if left := attachedNow(e); left != 0 {
		t.Errorf("%d attachments are left", left)
	}
	// Idle connections to the service come and go: a few descriptors either way.
	if agentAfter.descriptors > agentBefore.descriptors+2 {
		t.Errorf("agent has %d descriptors too many", agentAfter.descriptors-agentBefore.descriptors)
	}
	if proxyAfter.descriptors > proxyBefore.descriptors+12 {
		t.Errorf("proxy has %d descriptors too many", proxyAfter.descriptors-proxyBefore.descriptors)
	}
}

// attachedNow counts from the agent's log what is attached and not yet detached.
func attachedNow(e *engine) int {
	n := 0
	for _, line := range e.Agent.Lines() {
		switch {
		case strings.Contains(line, `"msg":"attached"`):
			n++
		case strings.Contains(line, `"msg":"detached"`):
			n--
		}
	}
	return n
}

// netnsCount counts the network namespaces that processes are in.
func netnsCount(t *testing.T) int {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]bool)
	for _, l := range links {
		if at, err := os.Readlink(l); err == nil {
			seen[at] = true
		}
	}
	return len(seen)
}
