package redirect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// requireOwned raises the guard, and skips where the kernel is too old for a
// table that has a persistent owner.
func (b *guardBench) requireOwned(t *testing.T) {
	t.Helper()
	b.apply(t)
	var u unix.Utsname
	var major, minor int
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	fmt.Sscanf(release, "%d.%d", &major, &minor)
	switch s := b.guard.Status(); {
	case s.Table == TableOwned:
	case major > 6 || major == 6 && minor >= 9:
		t.Fatalf("table is %s on Linux %s", s.Table, release)
	default:
		t.Skipf("needs table flags owner and persist (Linux 6.9), this is %s", release)
	}
}

// one call of each half.
func (b *guardBench) twoCalls() []call {
	return []call{
		{"bridged container", b.bridged.NS, "tcp 169.254.169.254:80", "forward_imds"},
		{"macvlan container", b.macvlan.NS, "tcp 169.254.169.254:80", "uplink_imds"},
		{"host", b.vm.NS, "tcp 169.254.169.254:80", ""},
	}
}

// TestGuardOwnedTable: on a kernel that can, nobody else removes the table, nor
// a part of it.
func TestGuardOwnedTable(t *testing.T) {
	b := newGuardBench(t)
	b.requireOwned(t)
	b.nft(t, masquerade)
	for _, script := range []string{
		"delete table inet imdsgate", "flush table inet imdsgate", "flush chain inet imdsgate forward",
		"insert rule inet imdsgate forward accept", "add table inet imdsgate { flags dormant; }",
	} {
		if out, err := run(t, b.vm.NS, script, "nft", "-f", "-"); err == nil {
			t.Errorf("%s: allowed: %s", script, out)
		}
	}
	b.nft(t, "flush ruleset")
	if rest := mustRun(t, b.vm.NS, "", "nft", "list", "tables"); strings.TrimSpace(rest) != "table inet imdsgate" {
		t.Errorf("flush ruleset left %q", rest)
	}
	if repaired, err := b.guard.Ensure(); repaired || err != nil {
		t.Errorf("Ensure: %v, %v", repaired, err)
	}
	wantGuarded(t, b.guard, b.twoCalls())
	t.Run("second_guard_is_refused", func(t *testing.T) {
		second := b.newGuard(t, AzureGuardRules())
		for name, do := range map[string]func() error{
			"Apply": second.Apply, "Remove": second.Remove,
			"Ensure": func() error { _, err := second.Ensure(); return err },
		} {
			if err := do(); !errors.Is(err, ErrGuardOwned) {
				t.Errorf("%s: got %v, want ErrGuardOwned", name, err)
			}
		}
		if s := second.Status(); s.Table != "" || s.Devices != nil {
			t.Errorf("the second one's status %+v", s)
		}
		if repaired, err := b.guard.Ensure(); repaired || err != nil {
			t.Errorf("the first one's Ensure: %v, %v", repaired, err)
		}
	})
}

// TestGuardPlainTable: on a kernel that cannot, the table comes back by itself.
func TestGuardPlainTable(t *testing.T) {
	b := newGuardBench(t)
	b.guard = b.oldKernel(t)
	b.apply(t)
	if s := b.guard.Status(); s.Table != TablePlain {
		t.Fatalf("table is %s", s.Table)
	}
	wantGuarded(t, b.guard, b.twoCalls())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- b.guard.Run(ctx, time.Hour) }()
	for _, script := range []string{"flush ruleset", "delete table inet imdsgate", "flush chain inet imdsgate forward"} {
		if _, err := b.guard.Ensure(); err != nil {
			t.Fatal(err)
		}
		b.nft(t, script)
		b.log.await(t, "guard: table put back")
		wantGuarded(t, b.guard, b.twoCalls())
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
	if s := b.guard.Status(); s.Repairs < 3 {
		t.Errorf("status %+v", s)
	}
}

// TestGuardEnsure changes the guard in every way that others can, where the
// kernel does not protect the table.
func TestGuardEnsure(t *testing.T) {
	b := newGuardBench(t)
	b.guard = b.oldKernel(t)
	b.apply(t)
	mustRun(t, b.vm.NS, "link add other type bridge\nlink set other up\n", "ip", "-batch", "-")
	asWritten := mustRun(t, b.vm.NS, "", "nft", "list", "ruleset")
	for _, tc := range []struct {
		name string
		args []string
	}{
		{"table_deleted", []string{"nft", "delete table inet imdsgate"}},
		{"table_flushed", []string{"nft", "flush table inet imdsgate"}},
		{"table_dormant", []string{"nft", "add table inet imdsgate { flags dormant; }"}},
		{"rule_before_ours", []string{"nft", "insert rule inet imdsgate forward accept"}},
		{"rule_after_ours", []string{"nft", "add rule inet imdsgate forward counter"}},
		{"rule_replaced", []string{"nft", "flush chain inet imdsgate forward; add rule inet imdsgate forward ip daddr 169.254.169.254 accept"}},
		{"chain_added", []string{"nft", "add chain inet imdsgate more { type filter hook forward priority -400; }"}},
		{"chain_with_another_priority", []string{"nft", "delete chain inet imdsgate forward; add chain inet imdsgate forward { type filter hook forward priority 0; }"}},
		{"chain_with_policy_drop", []string{"nft", "add chain inet imdsgate forward { policy drop; }"}},
		{"uplink_added", []string{"ip", "route", "add", "default", "dev", "other", "table", "77"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			mustRun(t, b.vm.NS, "", tc.args...)
			if repaired, err := b.guard.Ensure(); !repaired || err != nil {
				t.Errorf("Ensure: repaired %v, %v", repaired, err)
			}
			if repaired, err := b.guard.Ensure(); repaired || err != nil {
				t.Errorf("Ensure again: repaired %v, %v", repaired, err)
			}
			if diff := cmp.Diff(asWritten, mustRun(t, b.vm.NS, "", "nft", "list", "ruleset")); diff != "" {
				t.Errorf("ruleset (-want +got):\n%s", diff)
			}
		})
	}
	if diff := cmp.Diff([]string{"eth0", "other"}, b.guard.Status().Devices); diff != "" {
		t.Errorf("devices (-want +got):\n%s", diff)
	}
	wantGuarded(t, b.guard, b.twoCalls())
}

// TestGuardFollowsTheHost: an address that the host gets is its own within
// moments, not only at the next interval. The container that has it as well shows
// that, where the program believes the address.
func TestGuardFollowsTheHost(t *testing.T) {
	b := newGuardBench(t)
	b.guard.cookie = 0
	b.apply(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- b.guard.Run(ctx, time.Hour) }()
	mustRun(t, b.vm.NS, "", "ip", "addr", "add", b.macvlan.Addr4.String()+"/32", "dev", "lo")
	for !answered(b.macvlan.NS, "tcp 169.254.169.254:80", patience) {
		b.log.await(t, "guard: host addresses changed") // some are those of before
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// TestGuardUnderFire raises the guard a hundred times, and hands it over ten
// times, while both containers send as fast as they can.
func TestGuardUnderFire(t *testing.T) {
	b := newGuardBench(t)
	b.nft(t, masquerade) // or the program would stop what the table lets through
	e := b.ears(t)
	var stop atomic.Bool
	var sent [2]atomic.Int64
	var wg sync.WaitGroup
	for i, c := range []*testnet.Container{b.bridged, b.macvlan} {
		conn, err := testnet.Dial(t.Context(), c.NS, "udp", earThere.String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		wg.Go(func() {
			for !stop.Load() {
				conn.Write([]byte("fire"))
				sent[i].Add(1)
			}
		})
	}
	buf := make([]byte, 16)
	for range 100 { // or the rest proves nothing
		e.there.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := e.there.Read(buf); err != nil {
			t.Fatalf("without the guard: %v", err)
		}
	}
	b.apply(t)
	for drained := false; !drained; { // what was on its way
		e.there.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, err := e.there.Read(buf)
		drained = errors.Is(err, os.ErrDeadlineExceeded)
	}
	from := [2]int64{sent[0].Load(), sent[1].Load()}
	for i := range 100 {
		if i%10 == 9 {
			b.guard.Close()
			b.guard = b.newGuard(t, AzureGuardRules())
		}
		b.apply(t)
	}
	for i := range sent {
		if n := sent[i].Load() - from[i]; n < 1000 {
			t.Errorf("container %d sent only %d packets meanwhile", i, n)
		}
	}
	stop.Store(true)
	wg.Wait()
	e.there.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := e.there.Read(buf); err == nil {
		t.Error("something came through")
	}
	t.Logf("sent meanwhile: %d and %d packets; counters %v", sent[0].Load()-from[0], sent[1].Load()-from[1], b.counters(t))
}

// TestGuardOwnerDies kills the process that holds the guard, and takes it over.
func TestGuardOwnerDies(t *testing.T) {
	b := newGuardBench(t)
	wantOpen(t, b.twoCalls())
	child := startChild(t, b.vm.NS, nil, "guard")
	if _, err := child.Await(t.Context(), 0, func(line string) bool { return line == "guard is up" }); err != nil {
		t.Fatal(err)
	}
	refused := func(when string) {
		t.Helper()
		for i, got := range allAnswered(b.twoCalls()) {
			if c := b.twoCalls()[i]; got != c.may() {
				t.Errorf("%s: %s: answered %v", when, c.name, got)
			}
		}
	}
	refused("owner lives")
	child.Kill()
	refused("owner killed")
	counted := must[map[string]uint64](t)(b.guard.Counters())["forward_imds"]
	if counted == 0 {
		t.Error("the counters of the dead are gone")
	}
	b.apply(t)
	wantGuarded(t, b.guard, b.twoCalls())
	if n := b.counters(t)["forward_imds"]; n <= counted {
		t.Errorf("counter after the take-over %d, before %d", n, counted)
	}
	if repaired, err := b.guard.Ensure(); repaired || err != nil {
		t.Errorf("Ensure: %v, %v", repaired, err)
	}
	if err := b.guard.Remove(); err != nil {
		t.Error(err)
	}
	wantOpen(t, b.twoCalls())
}

// TestGuardWithoutBPF: whoever owns no more than a network namespace has the table
// alone, and is told so once.
func TestGuardWithoutBPF(t *testing.T) {
	b := newGuardBench(t)
	child := startChild(t, b.vm.NS, &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
	}, "rootless")
	if err := child.Wait(); err != nil {
		t.Error(err)
	}
	want := []string{`Apply: permission true, table true, hook "" because true`, "Ensure: <nil>", "Remove: <nil>"}
	if diff := cmp.Diff(want, child.Lines()); diff != "" {
		t.Errorf("child says (-want +got):\n%s", diff)
	}
}

// startChild runs this test binary again, inside a namespace, as something else.
func startChild(t *testing.T, ns *netns.Handle, attr *syscall.SysProcAttr, does string, args ...string) *testnet.Process {
	t.Helper()
	exe := must[string](t)(os.Executable())
	cmd := exec.Command(exe, "-test.run=^TestChild$")
	cmd.SysProcAttr = attr
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", "IMDSGATE_TEST_CHILD="+strings.Join(append([]string{does}, args...), " "))
	p := must[*testnet.Process](t)(testnet.Spawn(ns, "child "+does, cmd))
	t.Cleanup(p.Kill)
	return p
}

// TestChild is what startChild runs.
func TestChild(t *testing.T) {
	words := strings.Fields(os.Getenv("IMDSGATE_TEST_CHILD"))
	if len(words) == 0 {
		t.Skip("is run by other tests")
	}
	switch words[0] {
	case "guard":
		g := must[*Guard](t)(NewGuard(must[*netns.Handle](t)(netns.Current()), AzureGuardRules(), nil))
		if err := g.Apply(); err != nil {
			t.Fatal(err)
		}
		fmt.Println("guard is up")
		unix.Pause()
	case "rootless":
		g := must[*Guard](t)(NewGuard(must[*netns.Handle](t)(netns.Current()), AzureGuardRules(), nil))
		err := g.Apply()
		s := g.Status()
		fmt.Printf("Apply: permission %v, table %v, hook %q because %v\n", errors.Is(err, os.ErrPermission), s.Table != "", s.Hook, s.NoHook != "")
		_, err = g.Ensure()
		fmt.Println("Ensure:", err)
		fmt.Println("Remove:", g.Remove())
	case "ask": // in a cgroup, as a user
		if err := os.WriteFile(words[1]+"/cgroup.procs", []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
		var uid int
		fmt.Sscan(words[2], &uid)
		if err := syscall.Setuid(uid); err != nil {
			t.Fatal(err)
		}
		within := must[time.Duration](t)(time.ParseDuration(words[3]))
		fmt.Println("answered:", answered(nil, words[4]+" "+words[5], within))
	}
	os.Exit(0) // what is left behind is the parent's to find
}

// TestGuardRemove: afterwards everything is as it was, other tables and qdiscs
// too.
func TestGuardRemove(t *testing.T) {
	b := newGuardBench(t)
	b.nft(t, masquerade)
	b.nft(t, "table inet imdsgate2 {\nchain forward {\ntype filter hook forward priority 0\n}\n}\ntable ip imdsgate {\n}")
	mustRun(t, b.vm.NS, "", "tc", "qdisc", "add", "dev", "br0", "root", "pfifo", "limit", "77")
	state := func() string {
		return mustRun(t, b.vm.NS, "", "nft", "list", "ruleset") + mustRun(t, b.vm.NS, "", "tc", "qdisc", "show") +
			must[string](t)(testnet.State(b.vm.NS))
	}
	before := state()
	if err := b.guard.Remove(); err != nil {
		t.Errorf("Remove of nothing: %v", err)
	}
	for name, remove := range map[string]func() error{
		"by_itself":                 func() error { return b.guard.Remove() },
		"by_another_after_its_end":  func() error { b.guard.Close(); return b.newGuard(t, AzureGuardRules()).Remove() },
		"twice":                     func() error { return errors.Join(b.guard.Remove(), b.guard.Remove()) },
		"after_a_plain_one":         func() error { b.guard.Close(); return b.plainThenRemove(t) },
		"after_others_took_it_away": func() error { b.guard.Close(); b.nft(t, "delete table inet imdsgate"); return b.guard.Remove() },
	} {
		t.Run(name, func(t *testing.T) {
			b.apply(t)
			if state() == before {
				t.Fatal("the state does not show that the guard is up")
			}
			if err := remove(); err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(state(), "\n")); diff != "" {
				t.Errorf("differs (-before +after):\n%s", diff)
			}
			if s := b.guard.Status(); s.Table != "" && name != "by_another_after_its_end" {
				t.Errorf("status %+v", s)
			}
			wantOpen(t, b.twoCalls())
		})
	}
}

func (b *guardBench) plainThenRemove(t *testing.T) error {
	plain := b.oldKernel(t)
	return errors.Join(plain.Apply(), plain.Remove())
}

// TestGuardTakesOverATable: whatever table has our name becomes ours.
func TestGuardTakesOverATable(t *testing.T) {
	b := newGuardBench(t)
	b.nft(t, "table inet imdsgate {\nmap m {\ntype ipv4_addr : verdict\n}\nchain forward {\ntype nat hook postrouting priority 100\naccept\n}\n}")
	b.apply(t)
	if s := b.guard.Status(); s.Table == "" {
		t.Errorf("status %+v", s)
	}
	wantGuarded(t, b.guard, b.twoCalls())
}
