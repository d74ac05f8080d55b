package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"imdsgate/internal/testnet"
)

const ours = "imdsgate"

// What is asked for: a word, a document that is looked into and blanked for
// each caller, and a secret.
const (
	word     = "/metadata/instance/compute/vmSize?api-version=2021-02-01&format=text"
	document = "/metadata/instance?api-version=2021-02-01"
	token    = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://management.azure.com/"
)

const policy = "allow: [versions.read, instance.read, identity.token]\n"

// nobody is who the proxy runs as.
const nobody = 65534

// plan is how much is measured.
type plan struct {
	rounds     int
	warm, each time.Duration // before the first run, if at all; and each run
	containers int           // attached to an idle proxy, half of them later
	settle     time.Duration // at most, for the memory of an idle proxy
	relay      string        // -benchtime of the relay's benchmark
	targets    []target
}

type target struct{ name, path string }

func planned() plan {
	if !*full {
		return plan{rounds: 1, each: 200 * time.Millisecond, containers: 20, settle: time.Second, relay: "50x",
			targets: []target{{"a document", document}}}
	}
	return plan{rounds: *rounds, warm: time.Second, each: *each, containers: 1000, settle: 20 * time.Second, relay: each.String(),
		targets: []target{{"a word", word}, {"a document", document}, {"a token", token}}}
}

// bench is what the parts share.
type bench struct {
	plan   plan
	binary string
	report report

	*testnet.Stack
	client *testnet.Container
	here   system // the gate, as the containers have it
	folder string // of profiles that the proxy writes; empty: none
}

// parts are run in this order.
var parts = []struct {
	name string
	run  func(*bench, *testing.T)
}{
	{"kept", (*bench).kept}, {"passed", (*bench).passed}, {"many", (*bench).many}, {"relay", (*bench).relay}, {"policy", (*bench).policy},
}

func partNames() (names []string) {
	for _, p := range parts {
		names = append(names, p.name)
	}
	return names
}

// TestBench measures, with -full; without, it sees that every part works. A goal
// that is missed is reported and fails nothing: machines differ.
func TestBench(t *testing.T) {
	testnet.Require(t, testnet.Namespaces, testnet.Root, testnet.BPF,
		testnet.Command("wrk"), testnet.Command("nginx"), testnet.Command("haproxy"), testnet.Command("socat"))
	for name := range strings.SplitSeq(*only, ",") {
		if *only != "" && !slices.Contains(partNames(), name) {
			t.Fatalf("-only %q: no such part: want of %s", name, strings.Join(partNames(), ", "))
		}
	}
	b := &bench{plan: planned(), report: report{Header: describe()}}
	b.report.Header.Rounds, b.report.Header.Seconds = b.plan.rounds, b.plan.each.Seconds()
	b.build(t)
	for _, p := range parts {
		if *only == "" || slices.Contains(strings.Split(*only, ","), p.name) {
			t.Run(p.name, func(t *testing.T) { p.run(b, t) })
		}
	}
	if !*full {
		b.complete(t)
	}
	if *out != "" && !t.Failed() {
		text, err := json.MarshalIndent(b.report, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		folderOf(t, *out)
		write(t, *out, string(text)+"\n")
	}
	if err := b.report.print(os.Stdout); err != nil {
		t.Fatal(err)
	}
}

// build builds the binary as it is released; with -profiles, with a door that the
// released one does not have.
func (b *bench) build(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	for up := dir; up != os.TempDir() && up != "/"; up = filepath.Dir(up) { // nobody must get to it
		if err := os.Chmod(up, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.binary = filepath.Join(dir, "imdsgate")
	args := []string{"build", "-trimpath", "-o", b.binary}
	if *profiles != "" {
		args = append(args, "-overlay", overlay(t, dir))
	}
	goRun(t, "../..", append(args, "./cmd/imdsgate")...)
}

// overlay writes the file that has the go command see testdata/profile.go among
// the command's own.
func overlay(t *testing.T, dir string) string {
	t.Helper()
	real, err := filepath.Abs("testdata/profile.go")
	if err != nil {
		t.Fatal(err)
	}
	seen, err := filepath.Abs("../../cmd/imdsgate/bench_profile.go")
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(map[string]map[string]string{"Replace": {seen: real}})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "overlay.json")
	write(t, path, string(text))
	return path
}

// goRun runs the go command in a folder and returns what it says.
func goRun(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	text, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("go %v: %v: %s", args, err, text)
	}
	return string(text)
}

// start makes a VM with the gate on it and a container, and forgets the one before.
func (b *bench) start(t *testing.T, sim, proxy []string) {
	t.Helper()
	s, err := testnet.NewStack(b.binary)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	b.Stack, b.folder = s, ""
	if b.client, err = s.NewContainer("app"); err != nil {
		t.Fatal(err)
	}
	if err := s.StartSim(t.Context(), sim...); err != nil {
		t.Fatal(err)
	}
	if _, err := s.StartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.startProxy(t, proxy)
	b.portsFor(t)
}

// startProxy starts the proxy as it is on a host, with its audit in a file.
func (b *bench) startProxy(t *testing.T, flags []string) {
	t.Helper()
	rules, audit := filepath.Join(b.Dir, "policy.yaml"), filepath.Join(b.Dir, "audit.jsonl")
	write(t, rules, policy)
	write(t, audit, "")
	b.here = system{name: ours, base: service, logs: audit}
	cmd := b.ProxyCommand(append([]string{"--policy", rules, "--audit", audit}, flags...)...)
	cmd.SysProcAttr = testnet.Unprivileged()
	cmd.Env = os.Environ()
	own := []string{audit}
	if *profiles != "" {
		b.folder = folder(t, b.Stack, "profiles")
		cmd.Env = append(cmd.Env, "IMDSGATE_BENCH_PROFILES="+b.folder)
		own = append(own, b.folder)
	}
	for _, path := range own {
		if err := os.Chown(path, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.StartProxyAs(t.Context(), cmd); err != nil {
		t.Fatal(err)
	}
}

// portsFor has nobody run out of ports: with a new connection for each request, a
// client would otherwise be stopped by those that wait for their end, and on the
// bridge sooner than on a loopback.
func (b *bench) portsFor(t *testing.T) {
	t.Helper()
	for _, ns := range []interface{ Do(func() error) error }{b.client.NS, b.VM.NS} {
		err := ns.Do(func() error {
			if err := testnet.Sysctl("net/ipv4/ip_local_port_range", "10000 65535"); err != nil {
				return err
			}
			return testnet.Sysctl("net/ipv4/tcp_tw_reuse", "1")
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// profile takes one of the proxy, where it was asked for, until the function is
// called; name is the file's.
func (b *bench) profile(t *testing.T, name string) (end func()) {
	if b.folder == "" {
		return func() {}
	}
	p, from := b.Proxy, len(b.Proxy.Lines())
	p.Signal(syscall.SIGUSR1)
	return func() {
		t.Helper()
		p.Signal(syscall.SIGUSR2)
		at, err := p.Await(t.Context(), from, func(line string) bool { return strings.HasPrefix(line, "profile: ") })
		if err != nil {
			t.Fatal(err)
		}
		written := strings.Fields(p.Lines()[at])[1]
		text, err := os.ReadFile(written)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(*profiles, strings.ReplaceAll(strings.ReplaceAll(name, ",", ""), " ", "-")+".pprof")
		folderOf(t, path)
		write(t, path, string(text))
		fmt.Fprintln(os.Stderr, "profile:", path)
	}
}
