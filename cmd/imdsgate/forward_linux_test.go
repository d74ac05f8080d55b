package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/bpf"
	"imdsgate/internal/redirect"
	"imdsgate/internal/testnet"
)

// hand is a client container and two that play proxies, by saying their names on
// port 80.
type hand struct {
	*testnet.Stack
	client        *testnet.Container
	first, second *testnet.Container
	before        string // the client's namespace
}

func newHand(t *testing.T) *hand {
	t.Helper()
	testnet.Require(t, testnet.Namespaces)
	s, err := testnet.NewStack(binary(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	h := &hand{Stack: s}
	for name, c := range map[string]**testnet.Container{"client": &h.client, "first": &h.first, "second": &h.second} {
		if *c, err = s.NewContainer(name); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []*testnet.Container{h.first, h.second} {
		l, err := testnet.Listen(c.NS, "0.0.0.0:80")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go testnet.Say(l, c.Name)
	}
	h.before = h.state(t)
	return h
}

// state is the client's namespace, without IPv6's local routes, which come in
// their own time.
func (h *hand) state(t *testing.T) string {
	t.Helper()
	s, err := testnet.State(h.client.NS)
	if err != nil {
		t.Fatal(err)
	}
	var keep []string
	for line := range strings.Lines(s) {
		if !strings.HasPrefix(line, "route 10 table=255") {
			keep = append(keep, line)
		}
	}
	return strings.Join(keep, "")
}

func (h *hand) wantAsBefore(t *testing.T) {
	t.Helper()
	if diff := cmp.Diff(h.before, h.state(t)); diff != "" {
		t.Errorf("left behind in the client:\n%s", diff)
	}
}

// forward starts the command in the client.
func (h *hand) forward(t *testing.T, args ...string) *testnet.Process {
	t.Helper()
	p, err := h.Spawn(h.client.NS, "forward", exec.Command(h.Binary, append([]string{"forward", "--log-json"}, args...)...))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (h *hand) ready(t *testing.T, p *testnet.Process) {
	t.Helper()
	if _, err := p.AwaitLog(within(t), "forwarding"); err != nil {
		t.Fatal(err)
	}
}

// within is a context that ends when a test has waited too long.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// want calls the metadata address in the client.
func (h *hand) want(t *testing.T, words string) {
	t.Helper()
	said, peer, err := testnet.Ask(h.client.NS, "tcp", testnet.IMDS4+":80")
	if said != words || words != "" && peer != testnet.IMDS4+":80" {
		t.Errorf("the client hears %q from %s, %v, want %q", said, peer, err, words)
	}
}

func TestForward(t *testing.T) {
	h := newHand(t)
	p := h.forward(t, "--to", h.first.Addr4.String())
	h.ready(t, p)
	h.want(t, "first")
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	h.wantAsBefore(t)
}

// TestForwardFollowsTheFile moves the proxy. A connection that is open stays.
func TestForwardFollowsTheFile(t *testing.T) {
	h := newHand(t)
	file := filepath.Join(h.Dir, "proxy.env")
	put := func(c *testnet.Container) {
		t.Helper()
		if err := writeEnvFile(file, addressVariable, c.Addr4.String()); err != nil {
			t.Fatal(err)
		}
	}
	put(h.first)
	p := h.forward(t, "--env-file", file)
	h.ready(t, p)
	h.want(t, "first")
	put(h.second)
	if _, err := p.AwaitLog(within(t), "the proxy has another address"); err != nil {
		t.Fatal(err)
	}
	h.want(t, "second")
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
}

// TestForwardKilled leaves its rules: calls get no answer then, and the next start
// takes them over.
func TestForwardKilled(t *testing.T) {
	h := newHand(t)
	p := h.forward(t, "--to", h.first.Addr4.String())
	h.ready(t, p)
	p.Kill()
	h.want(t, "")
	p = h.forward(t, "--to", h.second.Addr4.String())
	h.ready(t, p)
	h.want(t, "second")
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	h.wantAsBefore(t)
}

// TestForwardIsPutBack flushes all of nftables in the client.
func TestForwardIsPutBack(t *testing.T) {
	testnet.Require(t, testnet.Command("nft"))
	h := newHand(t)
	p := h.forward(t, "--to", h.first.Addr4.String())
	h.ready(t, p)
	h.inClient(t, "", "nft", "flush", "ruleset")
	if _, err := p.AwaitLog(within(t), "capture was taken away: put back"); err != nil {
		t.Fatal(err)
	}
	h.want(t, "first")
}

// inClient runs a program in the client and returns its output.
func (h *hand) inClient(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	p, err := h.Spawn(h.client.NS, args[0], cmd)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Fatalf("%q: %v: %s", args, err, p.Output())
	}
	return p.Output()
}

func TestForwardCannotStart(t *testing.T) {
	testnet.Require(t, testnet.Root, testnet.Command("setpriv"))
	h := newHand(t)
	var running *testnet.Process
	for _, tc := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"no_capability", []string{"setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", h.Binary, "forward", "--to", "10.0.0.1"}, exitUnsupported, "hint: give the container CAP_NET_ADMIN"},
		{"another_is_running", []string{h.Binary, "forward", "--to", "10.0.0.1"}, exitFailure, "another process forwards in this network namespace\nhint: containers that share a network need it once"},
		{"another_is_running_and_a_command", []string{h.Binary, "forward", "--to", "10.0.0.1", "--", "echo", "unseen"}, exitFailure, "another process forwards"},
		{"command_not_found", []string{h.Binary, "forward", "--to", "10.0.0.1", "--", "no-such-command"}, exitNotFound, "imdsgate: forward: no-such-command: executable file not found in $PATH\nhint: "},
		{"command_not_runnable", []string{h.Binary, "forward", "--to", "10.0.0.1", "--", "/etc/passwd"}, exitNotRunnable, "imdsgate: forward: /etc/passwd: permission denied\nhint: "},
	} {
		if strings.HasPrefix(tc.name, "another") && running == nil {
			running = h.forward(t, "--to", h.first.Addr4.String())
			h.ready(t, running)
		}
		t.Run(tc.name, func(t *testing.T) {
			p, err := h.Spawn(h.client.NS, tc.name, exec.Command(tc.args[0], tc.args[1:]...))
			if err != nil {
				t.Fatal(err)
			}
			if code := exitCode(p.Wait()); code != tc.code || !strings.Contains(p.Output(), tc.want) || strings.Contains(p.Output(), "unseen") {
				t.Errorf("got code %d, want %d, and %q in\n%s", code, tc.code, tc.want, p.Output())
			}
		})
	}
	h.want(t, "first")
	if err := running.Stop(); err != nil {
		t.Error(err)
	}
	h.wantAsBefore(t)
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

// TestCaptureOwnErrors holds the exit codes of what cannot be brought about here.
func TestCaptureOwnErrors(t *testing.T) {
	for _, tc := range []struct {
		err  error
		code int
		hint string
	}{
		{redirect.ErrHostNetns, exitFailure, "inside a client container"},
		{redirect.ErrSteered, exitFailure, "leave forward out"},
		{bpf.ErrNotSupported, exitUnsupported, "nft_tproxy"},
		{os.ErrDeadlineExceeded, exitFailure, ""},
	} {
		var b strings.Builder
		code := report(&b, rootCmd(&env{ctx: t.Context()}), captureOwnError(fmt.Errorf("x: %w", tc.err)))
		if code != tc.code || !strings.Contains(b.String(), tc.hint) {
			t.Errorf("%v: got code %d, %s", tc.err, code, b.String())
		}
	}
}

// TestForwardBesideNginx keeps the port of a real server.
func TestForwardBesideNginx(t *testing.T) {
	testnet.Require(t, testnet.Command("nginx"), testnet.Command("curl"))
	h := newHand(t)
	startNginx(t, h.Stack, h.client)
	p := h.forward(t, "--to", h.first.Addr4.String())
	h.ready(t, p)
	h.want(t, "first")
	for _, host := range []string{"127.0.0.1", h.client.Addr4.String()} {
		if body := curl(t, h.client, "http://"+host+"/"); body != "this is nginx" {
			t.Errorf("port 80 of %s: got %q", host, body)
		}
	}
	h.want(t, "first")
}

// TestPrintedCommands runs what --print prints.
func TestPrintedCommands(t *testing.T) {
	testnet.Require(t, testnet.Command("nft"), testnet.Command("ip"), testnet.Command("sh"))
	h := newHand(t)
	h.inClient(t, h.printed(t, "nft"), "nft", "-f", "-")
	h.want(t, "first")
	h.inClient(t, "", "nft", "delete", "table", "ip", "imdsgate_forward")
	h.wantAsBefore(t)

	// "ip" prints forward's own steering of IPv4: the same rules and routes.
	steering := func() (keep []string) {
		for line := range strings.Lines(h.state(t)) {
			if strings.HasPrefix(line, "rule 2 ") || strings.HasPrefix(line, "route 2 table=170") {
				keep = append(keep, line)
			}
		}
		return keep
	}
	text := h.printed(t, "ip")
	h.inClient(t, text, "sh", "-e")
	byHand := steering()
	h.inClient(t, strings.NewReplacer("# ip ", "ip ").Replace(text[strings.Index(text, "# To take it back"):]), "sh", "-e")
	h.wantAsBefore(t)
	p := h.forward(t, "--to", h.first.Addr4.String())
	h.ready(t, p)
	if diff := cmp.Diff(steering(), byHand); diff != "" {
		t.Errorf("--print ip is not what forward does (-forward +printed):\n%s", diff)
	}
}

func (h *hand) printed(t *testing.T, form string) string {
	t.Helper()
	code, out, errs := called(t, nil, "forward", "--to", h.first.Addr4.String(), "--print", form)
	if code != exitOK {
		t.Fatal(errs)
	}
	return out
}
