package redirect

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// owned is an Own, and the listeners that say "relay" for it.
type owned struct {
	*Own
	ls []net.Listener
}

// own attaches a from inside, and says "relay" on its listeners.
func (b *bench) own(t *testing.T, force bool) *owned {
	t.Helper()
	o := must[*Own](t)(attachOwn(b.a.NS, force))
	ls := must[[]net.Listener](t)(o.Listeners())
	for _, l := range ls {
		go testnet.Say(l, "relay")
	}
	return &owned{o, ls}
}

func attachOwn(ns *netns.Handle, force bool) (o *Own, err error) {
	return o, ns.Do(func() error {
		o, err = AttachOwn(force)
		return err
	})
}

func (b *bench) detachOwn(t *testing.T, o *owned) {
	t.Helper()
	for _, l := range o.ls {
		l.Close()
	}
	if err := b.a.NS.Do(o.Detach); err != nil {
		t.Error(err)
	}
}

// die leaves everything as a process does that is killed.
func (o *owned) die() {
	for _, l := range o.ls {
		l.Close()
	}
	o.close()
}

func newOwnBench(t *testing.T) *bench {
	t.Helper()
	testnet.Require(t, testnet.Namespaces)
	return newBench(t, NFTables)
}

func (b *bench) wantUnchanged(t *testing.T, before string) {
	t.Helper()
	if diff := cmp.Diff(withoutLate(before), withoutLate(must[string](t)(testnet.State(b.a.NS)))); diff != "" {
		t.Errorf("the namespace is not what it was (-before +after):\n%s", diff)
	}
}

// withoutLate leaves out the local routes of IPv6, which come in their own time.
func withoutLate(state string) (lines []string) {
	for line := range strings.Lines(state) {
		if !strings.HasPrefix(line, "route 10 table=255") {
			lines = append(lines, line)
		}
	}
	return lines
}

func TestOwn(t *testing.T) {
	b := newOwnBench(t)
	other := must[net.Listener](t)(testnet.Listen(b.fabric.NS, "169.254.169.254:8080"))
	defer other.Close()
	go testnet.Say(other, "port 8080")
	before := must[string](t)(testnet.State(b.a.NS))
	o := b.own(t, false)
	for _, address := range []string{IMDS4.String(), IMDS6.String()} {
		b.want(t, b.a, "tcp", address, "relay")
		b.want(t, b.b, "tcp", address, "fabric")
	}
	b.want(t, b.a, "tcp", "169.254.169.254:8080", "port 8080")
	b.detachOwn(t, o)
	b.want(t, b.a, "tcp", IMDS4.String(), "fabric")
	b.wantUnchanged(t, before)
}

// TestOwnNeedsOneCapability runs with CAP_NET_ADMIN and no other, and then with
// all others and not that one.
func TestOwnNeedsOneCapability(t *testing.T) {
	b := newOwnBench(t)
	before := must[string](t)(testnet.State(b.a.NS))
	const netAdmin = 1 << unix.CAP_NET_ADMIN
	err := b.a.NS.Do(func() error {
		return withCapabilities([2]uint32{netAdmin, 0}, func() error {
			o, err := AttachOwn(false)
			if err != nil {
				return err
			}
			return o.Detach()
		})
	})
	if err != nil {
		t.Errorf("with CAP_NET_ADMIN alone: %v", err)
	}
	err = b.a.NS.Do(func() error {
		return withCapabilities([2]uint32{^uint32(netAdmin), ^uint32(0)}, func() error {
			_, err := AttachOwn(false)
			return err
		})
	})
	if !errors.Is(err, os.ErrPermission) {
		t.Errorf("without CAP_NET_ADMIN: got %v, want os.ErrPermission", err)
	}
	b.wantUnchanged(t, before)
}

// withCapabilities runs fn on this thread with no other effective capabilities.
func withCapabilities(keep [2]uint32, fn func() error) error {
	head := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var all [2]unix.CapUserData
	if err := unix.Capget(head, &all[0]); err != nil {
		return err
	}
	less := all
	for i := range less {
		less[i].Effective &= keep[i]
	}
	if err := unix.Capset(head, &less[0]); err != nil {
		return err
	}
	return errors.Join(fn(), unix.Capset(head, &all[0]))
}

func TestOwnBesideAServerOnPort80(t *testing.T) {
	for _, when := range []string{"before", "after"} {
		t.Run(when, func(t *testing.T) {
			b := newOwnBench(t)
			serve := func() {
				l := must[net.Listener](t)(testnet.Listen(b.a.NS, "0.0.0.0:80"))
				t.Cleanup(func() { l.Close() })
				go testnet.Say(l, "app")
			}
			if when == "before" {
				serve()
			}
			o := b.own(t, false)
			b.want(t, b.a, "tcp", IMDS4.String(), "relay")
			if when == "after" {
				serve()
			}
			b.want(t, b.a, "tcp", IMDS4.String(), "relay")
			b.want(t, b.a, "tcp", "127.0.0.1:80", "app")
			b.want(t, b.b, "tcp", b.a.Addr4.String()+":80", "app")
			b.detachOwn(t, o)
		})
	}
}

// TestKilledOwnIsTakenOver kills the process that forwards. Until the next start
// calls are held: neither refused nor let through to the service.
func TestKilledOwnIsTakenOver(t *testing.T) {
	b := newOwnBench(t)
	before := must[string](t)(testnet.State(b.a.NS))
	b.own(t, false).die()
	if said, _, err := testnet.Ask(b.a.NS, "tcp", IMDS4.String()); !errors.Is(err, context.DeadlineExceeded) && !os.IsTimeout(err) {
		t.Errorf("after the kill: got %q, %v, want no answer", said, err)
	}
	o := b.own(t, false)
	b.want(t, b.a, "tcp", IMDS4.String(), "relay")
	b.detachOwn(t, o)
	b.wantUnchanged(t, before)
}

func TestOwnIsRepaired(t *testing.T) {
	for _, tc := range []struct {
		name string
		harm func() error
	}{
		{"nothing", nil},
		{"table_deleted", deleteOwnTables},
		{"rule_and_route_deleted", func() error { return (&Own{a: &Attachment{}, lock: -1}).Detach() }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newOwnBench(t)
			o := b.own(t, false)
			if tc.harm != nil {
				if err := b.a.NS.Do(tc.harm); err != nil {
					t.Fatal(err)
				}
				if said, _, _ := testnet.Ask(b.a.NS, "tcp", IMDS4.String()); said == "relay" {
					t.Fatal("no harm was done")
				}
			}
			var repaired bool
			err := b.a.NS.Do(func() (err error) {
				repaired, err = o.Ensure()
				return err
			})
			if err != nil || repaired != (tc.harm != nil) {
				t.Errorf("got %v, %v, want %v", repaired, err, tc.harm != nil)
			}
			for _, address := range []string{IMDS4.String(), IMDS6.String()} {
				b.want(t, b.a, "tcp", address, "relay")
			}
			b.detachOwn(t, o)
		})
	}
}

func TestOwnListenerDestroyed(t *testing.T) {
	b := newOwnBench(t)
	o := b.own(t, false)
	defer b.detachOwn(t, o)
	if !o.Alive() {
		t.Error("not alive at first")
	}
	rc := must[interface{ Control(func(uintptr)) error }](t)(o.a.V4.SyscallConn())
	rc.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RD) })
	if o.Alive() {
		t.Error("alive with a listener that is none")
	}
}

func TestOwnTwice(t *testing.T) {
	b := newOwnBench(t)
	o := b.own(t, false)
	if _, err := attachOwn(b.a.NS, true); !errors.Is(err, ErrTaken) {
		t.Errorf("got %v, want ErrTaken", err)
	}
	b.want(t, b.a, "tcp", IMDS4.String(), "relay")
	other := must[*Own](t)(attachOwn(b.b.NS, false)) // the next container is no matter
	if err := b.b.NS.Do(other.Detach); err != nil {
		t.Error(err)
	}
	b.detachOwn(t, o)
}

// TestOwnBesideAnAgent refuses where an agent knows who calls, and takes nothing
// of the agent's away where it is forced.
func TestOwnBesideAnAgent(t *testing.T) {
	eachMethod(t, func(t *testing.T, b *bench) {
		b.steer(t)
		steered := must[string](t)(testnet.State(b.a.NS))
		if _, err := attachOwn(b.a.NS, false); !errors.Is(err, ErrSteered) {
			t.Fatalf("got %v, want ErrSteered", err)
		}
		b.wantUnchanged(t, steered)
		o := b.own(t, true)
		b.detachOwn(t, o)
		b.wantUnchanged(t, steered)
		for _, address := range []string{IMDS4.String(), IMDS6.String()} {
			b.want(t, b.a, "tcp", address, "gate")
		}
	})
}

func TestHostNetns(t *testing.T) {
	const some, other, container = 4026532001, 4026532002, 4026532003
	for _, tc := range []struct {
		name                 string
		own, ofProcess1, pid uint64
		want                 bool
	}{
		{"shell_on_the_host", some, some, firstPIDInode, true},
		{"shell_on_the_host_linux_6.18", firstNetInode, firstNetInode, firstPIDInode, true},
		{"container_on_the_hosts_network_linux_6.18", firstNetInode, firstNetInode, container, true},
		{"process_1_hidden_linux_6.18", firstNetInode, 0, firstPIDInode, true},
		{"namespace_made_on_the_host", some, other, firstPIDInode, false},
		{"container", some, some, container, false},
		{"container_process_1_hidden", some, 0, container, false},
		{"process_1_hidden", some, 0, firstPIDInode, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := hostNetns(tc.own, tc.ofProcess1, tc.pid); got != tc.want {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

// TestOwnRefusesTheHost runs where this process is in the host's namespace and
// can tell.
func TestOwnRefusesTheHost(t *testing.T) {
	if !inHostNetns() {
		testnet.Unmet(t, "needs the host's network namespace, and a kernel that tells")
	}
	if _, err := AttachOwn(false); !errors.Is(err, ErrHostNetns) {
		t.Errorf("got %v, want ErrHostNetns", err)
	}
}
