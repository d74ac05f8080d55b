package bpf_test

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"imdsgate/internal/bpf"
	"imdsgate/internal/testnet"
)

// uplink is a VM with a container on its uplink, and somebody who answers at the
// metadata address.
type uplink struct {
	vm  *testnet.VM
	c   *testnet.Container
	dev bpf.Device // the VM's eth0
}

func newUplink(t *testing.T) *uplink {
	t.Helper()
	testnet.Require(t, testnet.BPF)
	fabric, err := testnet.NewFabric()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(fabric.Close)
	l, err := testnet.Listen(fabric.NS, "169.254.169.254:80")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go testnet.Say(l, "fabric")
	u := &uplink{}
	if u.vm, err = fabric.NewVM(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.vm.Close)
	if u.c, err = u.vm.NewMacvlan("m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.c.Close)
	u.in(t, func() error {
		i, err := net.InterfaceByName("eth0")
		if err == nil {
			u.dev = bpf.Device{Index: i.Index, Name: i.Name, Encap: "ether"}
		}
		return err
	})
	return u
}

func (u *uplink) in(t *testing.T, fn func() error) {
	t.Helper()
	if err := u.vm.NS.Do(fn); err != nil {
		t.Fatal(err)
	}
}

// ensure attaches e and reports whether anything changed.
func (u *uplink) ensure(t *testing.T, e *bpf.Egress) (changed bool) {
	t.Helper()
	u.in(t, func() (err error) { changed, err = e.Ensure(u.dev); return })
	return changed
}

// wantReach calls the metadata address from the macvlan container.
func (u *uplink) wantReach(t *testing.T, when string, want bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond)
	defer cancel()
	c, err := testnet.Dial(ctx, u.c.NS, "tcp", "169.254.169.254:80")
	if err == nil {
		c.Close()
	}
	if got := err == nil; got != want {
		t.Errorf("%s: macvlan container reaches the service: %v (%v), want %v", when, got, err, want)
	}
}

// queueing lists the VM's qdiscs and egress filters.
func (u *uplink) queueing(t *testing.T) (n int) {
	t.Helper()
	u.in(t, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		all, err := h.QdiscList(nil)
		n = len(all)
		return err
	})
	return n
}

// TestEgressHooks holds both hooks to the same contract.
func TestEgressHooks(t *testing.T) {
	for _, hook := range []string{"tcx", "clsact"} {
		t.Run(hook, func(t *testing.T) {
			u := newUplink(t)
			qdiscs := u.queueing(t)
			load := func() *bpf.Egress {
				e := loadEgress(t, u.vm.Addr4)
				if hook == "clsact" {
					e.UseClsact()
				} else if e.Hook() != hook {
					t.Skipf("needs tcx (Linux 6.6), has %s", e.Hook())
				}
				return e
			}
			e := load()
			u.wantReach(t, "before", true) // or the rest proves nothing
			if !u.ensure(t, e) || u.ensure(t, e) {
				t.Error("Ensure: want a change the first time, and none the second")
			}
			u.wantReach(t, "attached", false)
			e.Close()
			u.wantReach(t, "closed: the program stays", false)

			next := load()
			if !u.ensure(t, next) || u.ensure(t, next) {
				t.Error("the next process: want a change the first time, and none the second")
			}
			u.wantReach(t, "taken over", false)
			if n := refused(t, next)["imds"]; n == 0 {
				t.Error("the counter of the next process does not rise: the old program is in charge")
			}
			if _, err := next.SetHost([]netip.Addr{u.vm.Addr4, u.c.Addr4}); err != nil {
				t.Fatal(err)
			}
			u.wantReach(t, "its address is the host's", true) // so the old program is gone
			for _, want := range []bool{true, false} {
				var found bool
				u.in(t, func() (err error) { found, err = bpf.DetachEgress(u.dev); return })
				if found != want {
					t.Errorf("DetachEgress found %v, want %v", found, want)
				}
			}
			if _, err := next.SetHost(nil); err != nil {
				t.Fatal(err)
			}
			u.wantReach(t, "detached", true)
			if n := u.queueing(t); n != qdiscs {
				t.Errorf("%d qdiscs, before there were %d", n, qdiscs)
			}
		})
	}
}

// TestEgressIsFirst: whoever lets a packet pass before us has the last word, so
// nobody may stay there.
func TestEgressIsFirst(t *testing.T) {
	t.Run("tcx_program_of_a_cni", func(t *testing.T) {
		u := newUplink(t)
		e := loadEgress(t, u.vm.Addr4)
		if e.Hook() != "tcx" {
			testnet.Unmet(t, "needs tcx (Linux 6.6)")
		}
		u.ensure(t, e)
		var s *bpf.Stranger
		u.in(t, func() (err error) { s, err = bpf.NewStranger(u.dev.Index); return })
		defer s.Close()
		u.wantReach(t, "a stranger came before us", true) // or the rest proves nothing
		if !u.ensure(t, e) || u.ensure(t, e) {
			t.Error("Ensure: want a change the first time, and none the second")
		}
		u.wantReach(t, "first again", false)
	})
	t.Run("filter_of_the_same_priority", func(t *testing.T) {
		u := newUplink(t)
		e := loadEgress(t, u.vm.Addr4)
		e.UseClsact()
		u.ensure(t, e)
		stranger := u.addFilter(t)
		u.wantReach(t, "a stranger came before us", true)
		if !u.ensure(t, e) || u.ensure(t, e) {
			t.Error("Ensure: want a change the first time, and none the second")
		}
		u.wantReach(t, "first again", false)
		u.in(t, func() error { _, err := bpf.DetachEgress(u.dev); return err })
		u.in(t, func() error { return netlink.FilterDel(stranger) }) // with its qdisc it would be gone
	})
	t.Run("qdisc_deleted", func(t *testing.T) {
		u := newUplink(t)
		e := loadEgress(t, u.vm.Addr4)
		e.UseClsact()
		u.ensure(t, e)
		u.in(t, func() error {
			return netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: u.dev.Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}})
		})
		u.wantReach(t, "without its qdisc", true)
		if !u.ensure(t, e) {
			t.Error("Ensure repaired nothing")
		}
		u.wantReach(t, "repaired", false)
	})
}

// addFilter adds a filter of somebody else, which lets everything pass, beside
// ours.
func (u *uplink) addFilter(t *testing.T) netlink.Filter {
	t.Helper()
	p, err := bpf.NewStrangerProgram()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: u.dev.Index, Parent: netlink.HANDLE_MIN_EGRESS, Priority: 1, Handle: 1, Protocol: unix.ETH_P_ALL},
		Fd:          p.FD(), Name: "stranger", DirectAction: true,
	}
	u.in(t, func() error { return netlink.FilterAdd(f) })
	return f
}
