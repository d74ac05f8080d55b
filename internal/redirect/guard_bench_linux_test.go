package redirect

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// guardBench is a VM on a fabric that answers at the metadata addresses and the
// WireServer, with a container on the VM's bridge, one on its uplink, and itself.
type guardBench struct {
	fabric  *testnet.Fabric
	vm      *testnet.VM
	bridged *testnet.Container
	macvlan *testnet.Container
	guard   *Guard
	log     *told
}

// answering are the fabric's services.
var answering = []string{
	"tcp 169.254.169.254:80", "tcp [fd00:ec2::254]:80", "tcp 169.254.169.254:8080", "udp 169.254.169.254:53", "udp [fd00:ec2::254]:123",
	"tcp 168.63.129.16:80", "tcp 168.63.129.16:32526", "tcp 168.63.129.16:53", "udp 168.63.129.16:53", "tcp 10.88.1.1:80",
}

func newGuardBench(t *testing.T) *guardBench {
	t.Helper()
	testnet.Require(t, testnet.Namespaces, testnet.BPF)
	b := &guardBench{log: &told{lines: make(chan string, 1000)}}
	b.fabric = must[*testnet.Fabric](t)(testnet.NewFabric())
	t.Cleanup(b.fabric.Close)
	b.vm = must[*testnet.VM](t)(b.fabric.NewVM())
	t.Cleanup(b.vm.Close)
	b.bridged = must[*testnet.Container](t)(b.vm.NewContainer("bridged"))
	t.Cleanup(b.bridged.Close)
	b.macvlan = must[*testnet.Container](t)(b.vm.NewMacvlan("macvlan"))
	t.Cleanup(b.macvlan.Close)
	for _, service := range answering {
		network, address, _ := strings.Cut(service, " ")
		if network == "udp" {
			udpEcho(t, b.fabric.NS, address)
			continue
		}
		l := must[net.Listener](t)(testnet.Listen(b.fabric.NS, address))
		t.Cleanup(func() { l.Close() })
		go testnet.Say(l, "fabric")
	}
	b.guard = b.newGuard(t, AzureGuardRules())
	return b
}

func (b *guardBench) newGuard(t *testing.T, rules GuardRules) *Guard {
	t.Helper()
	g := must[*Guard](t)(NewGuard(b.vm.NS, rules, slog.New(b.log)))
	t.Cleanup(g.Close)
	return g
}

// oldKernel makes a guard that asks for a table flag no kernel knows, and so gets
// the answer that kernels before 6.9 give to owner and persist.
func (b *guardBench) oldKernel(t *testing.T) *Guard {
	t.Helper()
	g := b.newGuard(t, AzureGuardRules())
	g.flags = 1 << 7
	return g
}

func (b *guardBench) apply(t *testing.T) {
	t.Helper()
	if err := b.guard.Apply(); err != nil {
		t.Fatal(err)
	}
}

func (b *guardBench) counters(t *testing.T) map[string]uint64 {
	t.Helper()
	return must[map[string]uint64](t)(b.guard.Counters())
}

// told is a log whose messages a test can wait for.
type told struct{ lines chan string }

func (l *told) Enabled(context.Context, slog.Level) bool { return true }
func (l *told) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *told) WithGroup(string) slog.Handler            { return l }
func (l *told) Handle(_ context.Context, r slog.Record) error {
	select {
	case l.lines <- r.Message:
	default:
	}
	return nil
}

// await waits for a message.
func (l *told) await(t *testing.T, want string) {
	t.Helper()
	timeout := time.After(10 * time.Second)
	for {
		select {
		case got := <-l.lines:
			if got == want {
				return
			}
		case <-timeout:
			t.Fatalf("the log never said %q", want)
		}
	}
}

// call is a call of a service from somewhere.
type call struct {
	name    string
	from    *netns.Handle
	service string // network and address
	counter string // that rises when the guard refuses it; "" where it may pass
}

// may: the guard lets it pass.
func (c call) may() bool { return c.counter == "" }

const (
	// patience is how long a call waits that should have no answer. One that arrives
	// takes a thousandth of it.
	patience = 300 * time.Millisecond
	// longest is how long one waits that should: a busy machine is no refusal.
	longest = 10 * time.Second
)

// answered makes one call from a namespace, nil for the caller's own.
func answered(ns *netns.Handle, service string, within time.Duration) bool {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	network, address, _ := strings.Cut(service, " ")
	var c net.Conn
	var err error
	if ns == nil {
		c, err = new(net.Dialer).DialContext(ctx, network, address)
	} else {
		c, err = testnet.Dial(ctx, ns, network, address)
	}
	if err != nil {
		return false
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	if network == "udp" {
		c.Write([]byte("dns"))
	}
	n, _ := c.Read(make([]byte, 64))
	return n > 0
}

// allAnswered makes calls at once, since those that get no answer take long. How
// long it waits for one depends on whether it may pass.
func allAnswered(calls []call) []bool {
	got := make([]bool, len(calls))
	var wg sync.WaitGroup
	for i, c := range calls {
		within := patience
		if c.may() {
			within = longest
		}
		wg.Go(func() { got[i] = answered(c.from, c.service, within) })
	}
	wg.Wait()
	return got
}

// wantOpen holds that every call is answered: or a test of the guard proves
// nothing.
func wantOpen(t *testing.T, calls []call) {
	t.Helper()
	free := slices.Clone(calls)
	for i := range free {
		free[i].counter = ""
	}
	for i, got := range allAnswered(free) {
		if !got {
			t.Errorf("without the guard: %s: no answer", calls[i].name)
		}
	}
}

// wantGuarded holds that the calls with a counter get no answer, that the others
// do, and that exactly the counters named have risen.
func wantGuarded(t *testing.T, g *Guard, calls []call) {
	t.Helper()
	before := must[map[string]uint64](t)(g.Counters())
	want := make(map[string]bool)
	for i, got := range allAnswered(calls) {
		if may := calls[i].may(); got != may {
			t.Errorf("%s: answered %v, want %v", calls[i].name, got, may)
		}
		want[calls[i].counter] = true
	}
	for name, n := range must[map[string]uint64](t)(g.Counters()) {
		if rose := n > before[name]; rose != want[name] {
			t.Errorf("counter %s: %d before, %d after, want a rise %v", name, before[name], n, want[name])
		}
	}
}

// run runs a program in a namespace, with input, and returns what it printed.
func run(t *testing.T, ns *netns.Handle, input string, args ...string) (string, error) {
	t.Helper()
	testnet.Require(t, testnet.Command(args[0]))
	var out bytes.Buffer
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &out
	if err := testnet.Start(ns, cmd); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	return out.String(), err
}

func mustRun(t *testing.T, ns *netns.Handle, input string, args ...string) string {
	t.Helper()
	out, err := run(t, ns, input, args...)
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return out
}

func (b *guardBench) nft(t *testing.T, script string) string {
	t.Helper()
	return mustRun(t, b.vm.NS, script, "nft", "-f", "-")
}
