package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/agent"
	"imdsgate/internal/bpf"
	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// inVM runs a program in the VM's network namespace.
func (e *engine) inVM(t *testing.T, args ...string) string {
	t.Helper()
	return inNetns(t, e.VM.NS, args...)
}

func inNetns(t *testing.T, ns *netns.Handle, args ...string) string {
	t.Helper()
	testnet.Require(t, testnet.Command(args[0]))
	p, err := testnet.Spawn(ns, args[0], exec.Command(args[0], args[1:]...))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Fatalf("%v: %v: %s", args, err, p.Output())
	}
	return p.Output()
}

// hostState is what --uninstall must leave as it found it.
func (e *engine) hostState(t *testing.T) string {
	t.Helper()
	var parts []string
	for _, args := range [][]string{
		{"nft", "list", "ruleset"}, {"ip", "rule"}, {"ip", "-6", "rule"}, {"ip", "route", "show", "table", "all"},
		{"ip", "-6", "route", "show", "table", "all"}, {"tc", "qdisc", "show"}, {"tc", "filter", "show", "dev", "eth0", "egress"}, {"bpftool", "net", "show"},
	} {
		parts = append(parts, "# "+strings.Join(args, " "), e.inVM(t, args...))
	}
	return strings.Join(parts, "\n")
}

// containerNetns opens the network namespace of a running container.
func (e *engine) containerNetns(t *testing.T, name string) *netns.Handle {
	t.Helper()
	pid := strings.TrimSpace(e.mustRun(t, "inspect", "-f", "{{.State.Pid}}", name))
	ns, err := netns.Open("/proc/" + pid + "/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func (e *engine) call(t *testing.T, container string) answer {
	t.Helper()
	out := e.mustRun(t, "exec", container, "/imdsgate", "demo-part", "client", instanceURL)
	return decodeAnswer(t, out)
}

// TestUninstall takes everything back while the proxy runs and containers are
// steered, and compares the host and a container with what they were before.
func TestUninstall(t *testing.T) {
	testnet.Require(t, testnet.Command("nft"), testnet.Command("bpftool"), testnet.Command("tc"))
	e := newEngine(t)
	e.mustRun(t, "run", "-d", "--name", "web", testImage, "/imdsgate", "simulate", "--listen", "127.0.0.1:81")
	web := e.containerNetns(t, "web")
	time.Sleep(500 * time.Millisecond) // the kernel's own routes of new addresses
	hostBefore, webBefore := e.hostState(t), state(t, web)
	programsBefore, err := bpf.Loaded()
	if err != nil {
		t.Fatal(err)
	}
	e.start(t)
	if a := e.call(t, "web"); a.Status != 200 {
		t.Fatalf("not steered: %+v", a)
	}
	if e.hostState(t) == hostBefore || state(t, web) == webBefore {
		t.Fatal("the comparison does not see what the agent does")
	}
	// Not while an agent lives, whatever socket is named; and not with a list that
	// cannot be read: nothing is taken back then.
	for _, tc := range []struct{ name, want, flag, value string }{
		{"its_socket", "another agent is running", "--socket", e.Socket()},
		{"another_socket", "an agent is running on this host, with another --socket", "--socket", e.Socket() + "2"},
		{"no_such_list", "--workloads", "--workloads", "/nonexistent"},
	} {
		if out, err := e.uninstall(t, "--socket", e.Socket()+"3", tc.flag, tc.value); err == nil || !strings.Contains(out, tc.want) {
			t.Errorf("%s: %v: %s", tc.name, err, out)
		}
		if a := e.call(t, "web"); a.Status != 200 {
			t.Errorf("%s: not steered any more: %+v", tc.name, a)
		}
	}
	e.Agent.Kill() // leaves its cgroup, too
	if out, err := e.uninstall(t, "--socket", e.Socket()); err != nil {
		t.Fatalf("uninstall: %v: %s", err, out)
	}
	if left := cgroupsNamed(t, fenceName(e.Socket())); len(left) != 0 {
		t.Errorf("cgroups are left: %v", left)
	}
	if err := e.Proxy.Stop(); err != nil { // its connections to the service carry the fence
		t.Error(err)
	}
	if diff := cmp.Diff(strings.Split(hostBefore, "\n"), strings.Split(e.hostState(t), "\n")); diff != "" {
		t.Errorf("the host differs (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(strings.Split(webBefore, "\n"), strings.Split(state(t, web), "\n")); diff != "" {
		t.Errorf("the container differs (-before +after):\n%s", diff)
	}
	deadline := time.Now().Add(10 * time.Second) // the kernel frees programs in its own time
	for {
		n, err := bpf.Loaded()
		if err == nil && n <= programsBefore {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("%d programs of ours are left, were %d (%v)", n, programsBefore, err)
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (e *engine) uninstall(t *testing.T, args ...string) (string, error) {
	t.Helper()
	args = append([]string{"agent", "--uninstall", "--netns-dir", e.docker.NetnsDir(), "--log-json"}, args...)
	p, err := e.Spawn(e.VM.NS, "uninstall", exec.Command(e.Binary, args...))
	if err != nil {
		t.Fatal(err)
	}
	err = p.Wait()
	return p.Output(), err
}

func cgroupsNamed(t *testing.T, name string) []string {
	t.Helper()
	own, err := agent.OwnCgroup()
	if err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(own, name))
	if err != nil {
		t.Fatal(err)
	}
	return left
}

func state(t *testing.T, ns *netns.Handle) string {
	t.Helper()
	s, err := testnet.State(ns)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestAgentKilledGuardStands kills the agent: containers that are steered are
// answered, new ones are held, and nobody gets through.
func TestAgentKilledGuardStands(t *testing.T) {
	e := newEngine(t)
	e.start(t)
	e.mustRun(t, "run", "-d", "--name", "web", testImage, "/imdsgate", "simulate", "--listen", "127.0.0.1:81")
	if a := e.call(t, "web"); a.Status != 200 {
		t.Fatalf("not steered: %+v", a)
	}
	if err := e.Agent.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	e.Agent.Wait()
	if a := e.call(t, "web"); a.Status != 200 {
		t.Errorf("steered container, no agent: %+v", a)
	}
	// A container that starts now is held; it is answered when the agent is back.
	held := make(chan string, 1)
	go func() {
		out, err := e.run(t.Context(), "run", "--rm", testImage, "/first")
		if err != nil {
			out += " " + err.Error()
		}
		held <- out
	}()
	select {
	case out := <-held:
		t.Fatalf("a new container was not held: %s", out)
	case <-time.After(2500 * time.Millisecond):
	}
	e.onlyTheHost(t)
	e.restartAgent(t)
	if out := <-held; !strings.Contains(out, "200 OK") {
		t.Errorf("the held container: %s", out)
	}
	e.onlyTheHost(t)
}

func (e *engine) restartAgent(t *testing.T) {
	t.Helper()
	if _, err := e.StartAgent(t.Context(), "--docker", "--docker-host", e.docker.Host(), "--netns-dir", e.docker.NetnsDir()); err != nil {
		t.Fatal(err)
	}
}
