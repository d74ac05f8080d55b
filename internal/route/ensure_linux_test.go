package route

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"imdsgate/internal/testnet"
)

// TestEnsure starts where link-local addresses are taken for neighbours, as a
// system without the route may have it.
func TestEnsure(t *testing.T) {
	c := newContainer(t)
	add(t, c, "169.254.0.0/16", "", "eth0", 0)
	before := state(t, c)
	if said, _, err := testnet.Ask(c.NS, "tcp", testnet.IMDS4+":80"); err == nil {
		t.Fatalf("the address says %q without the route: the rest would prove nothing", said)
	}
	k := keep(t, c, imds4)
	k.want(t, viaEth0(imds4), nil)
	if said, _, err := testnet.Ask(c.NS, "tcp", testnet.IMDS4+":80"); said != "fabric" {
		t.Errorf("the address says %q, %v, want fabric", said, err)
	}
	k.stop(t)
	if diff := cmp.Diff(before, state(t, c)); diff != "" {
		t.Errorf("left behind:\n%s", diff)
	}
}

func TestEnsureIPv6(t *testing.T) {
	c := newContainer(t)
	before := state(t, c)
	k := keep(t, c, imds6)
	k.want(t, viaEth0(imds6), nil)
	k.stop(t)
	if diff := cmp.Diff(before, state(t, c)); diff != "" {
		t.Errorf("left behind:\n%s", diff)
	}
}

func TestVanishedRouteIsPutBack(t *testing.T) {
	for _, to := range []netip.Addr{imds4, imds6} {
		c := newContainer(t)
		k := keep(t, c, to)
		k.want(t, viaEth0(to), nil)
		del(t, c, k.prefix(to), viaEth0(to).Via.String(), "eth0")
		k.want(t, viaEth0(to), nil)
		k.stop(t)
	}
}

func (*kept) prefix(to netip.Addr) string { return netip.PrefixFrom(to, to.BitLen()).String() }

// TestLinkDown takes the link away with all its routes, and brings it back.
func TestLinkDown(t *testing.T) {
	c := newContainer(t)
	k := keep(t, c, imds4)
	k.want(t, viaEth0(imds4), nil)
	setUp := func(up bool) func(h *netlink.Handle) error {
		return func(h *netlink.Handle) error {
			l, err := h.LinkByName("eth0")
			if err != nil {
				return err
			}
			if up {
				return h.LinkSetUp(l)
			}
			return h.LinkSetDown(l)
		}
	}
	inside(t, c, setUp(false))
	k.want(t, Route{}, ErrNoDefault)
	inside(t, c, setUp(true))
	add(t, c, "0.0.0.0/0", "172.30.1.1", "eth0", 0)
	k.want(t, viaEth0(imds4), nil)
	k.stop(t)
}

func TestWhichDefaultRoute(t *testing.T) {
	second := Route{To: imds4, Via: netip.MustParseAddr("10.99.0.1"), Link: "second", Ours: true}
	for _, tc := range []struct {
		name string
		set  func(t *testing.T, c *testnet.Container)
		want Route
	}{
		{"higher_metric_is_not_taken", func(t *testing.T, c *testnet.Container) {
			add(t, c, "0.0.0.0/0", "10.99.0.1", "second", 100)
		}, viaEth0(imds4)},
		{"lowest_metric_is_taken", func(t *testing.T, c *testnet.Container) {
			del(t, c, "0.0.0.0/0", "172.30.1.1", "eth0")
			add(t, c, "0.0.0.0/0", "172.30.1.1", "eth0", 200)
			add(t, c, "0.0.0.0/0", "10.99.0.1", "second", 100)
		}, second},
		{"unreachable_is_none", func(t *testing.T, c *testnet.Container) {
			del(t, c, "0.0.0.0/0", "172.30.1.1", "eth0")
			add(t, c, "0.0.0.0/0", "172.30.1.1", "eth0", 200)
			inside(t, c, func(h *netlink.Handle) error {
				_, all, _ := net.ParseCIDR("0.0.0.0/0")
				return h.RouteAdd(&netlink.Route{Dst: all, Type: unix.RTN_UNREACHABLE, Priority: 1})
			})
		}, viaEth0(imds4)},
		{"without_gateway", func(t *testing.T, c *testnet.Container) {
			del(t, c, "0.0.0.0/0", "172.30.1.1", "eth0")
			add(t, c, "0.0.0.0/0", "", "second", 0)
		}, Route{To: imds4, Link: "second", Ours: true}},
		{"several_ways", func(t *testing.T, c *testnet.Container) {
			del(t, c, "0.0.0.0/0", "172.30.1.1", "eth0")
			inside(t, c, func(h *netlink.Handle) error {
				r, err := route(h, "0.0.0.0/0", "10.99.0.1", "second", 0)
				if err != nil {
					return err
				}
				way := &netlink.NexthopInfo{LinkIndex: r.LinkIndex, Gw: r.Gw}
				other := &netlink.NexthopInfo{LinkIndex: r.LinkIndex, Gw: net.IPv4(10, 99, 0, 2)}
				return h.RouteAdd(&netlink.Route{Dst: r.Dst, MultiPath: []*netlink.NexthopInfo{way, other}})
			})
		}, second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newContainer(t)
			addLink(t, c, "second", "10.99.0.9/24")
			tc.set(t, c)
			before := state(t, c)
			k := keep(t, c, imds4)
			k.want(t, tc.want, nil)
			k.stop(t)
			if diff := cmp.Diff(before, state(t, c)); diff != "" {
				t.Errorf("left behind:\n%s", diff)
			}
		})
	}
}

func TestDefaultRouteMoves(t *testing.T) {
	c := newContainer(t)
	addLink(t, c, "second", "10.99.0.9/24")
	k := keep(t, c, imds4)
	k.want(t, viaEth0(imds4), nil)
	del(t, c, "0.0.0.0/0", "172.30.1.1", "eth0")
	k.want(t, Route{}, ErrNoDefault)
	add(t, c, "0.0.0.0/0", "10.99.0.1", "second", 0)
	k.want(t, Route{To: imds4, Via: netip.MustParseAddr("10.99.0.1"), Link: "second", Ours: true}, nil)
	k.stop(t)
}

// TestForeignRoute finds a host route that somebody else has made: it stays as it
// is. When it vanishes ours takes its place, until the end.
func TestForeignRoute(t *testing.T) {
	c := newContainer(t)
	addLink(t, c, "second", "10.99.0.9/24")
	without := state(t, c)
	add(t, c, "169.254.169.254/32", "10.99.0.7", "second", 0)
	before := state(t, c)
	k := keep(t, c, imds4)
	foreign := Route{To: imds4, Via: netip.MustParseAddr("10.99.0.7"), Link: "second"}
	k.want(t, foreign, nil)
	k.stop(t)
	if diff := cmp.Diff(before, state(t, c)); diff != "" {
		t.Errorf("a foreign route was touched:\n%s", diff)
	}

	k = keep(t, c, imds4)
	k.want(t, foreign, nil)
	del(t, c, "169.254.169.254/32", "10.99.0.7", "second")
	k.want(t, viaEth0(imds4), nil)
	k.stop(t)
	if diff := cmp.Diff(without, state(t, c)); diff != "" {
		t.Errorf("left behind:\n%s", diff)
	}
}

// TestKilledProcessLeavesItsRoute takes over what such a one has left, also when
// it leads a way that there is no longer.
func TestKilledProcessLeavesItsRoute(t *testing.T) {
	for _, via := range []string{"172.30.1.1", "172.30.1.77"} {
		c := newContainer(t)
		before := state(t, c)
		inside(t, c, func(h *netlink.Handle) error {
			r, err := route(h, "169.254.169.254/32", via, "eth0", 0)
			if err != nil {
				return err
			}
			r.Protocol = protocol
			return h.RouteAdd(r)
		})
		k := keep(t, c, imds4)
		k.want(t, viaEth0(imds4), nil)
		k.stop(t)
		if diff := cmp.Diff(before, state(t, c)); diff != "" {
			t.Errorf("left behind:\n%s", diff)
		}
	}
}

func TestNoDefaultRoute(t *testing.T) {
	c := newContainer(t)
	del(t, c, "0.0.0.0/0", "172.30.1.1", "eth0")
	before := state(t, c)
	err := c.NS.Do(func() error { return Ensure(t.Context(), imds4, nil) })
	if !errors.Is(err, ErrNoDefault) {
		t.Errorf("got %v, want ErrNoDefault", err)
	}
	if diff := cmp.Diff(before, state(t, c)); diff != "" {
		t.Errorf("left behind:\n%s", diff)
	}
}

func TestNoPermission(t *testing.T) {
	c := newContainer(t)
	err := c.NS.Do(func() error {
		return withoutNetAdmin(func() error { return Ensure(t.Context(), imds4, nil) })
	})
	if !errors.Is(err, os.ErrPermission) {
		t.Errorf("got %v, want os.ErrPermission", err)
	}
}

// withoutNetAdmin runs fn on this thread without the capability.
func withoutNetAdmin(fn func() error) error {
	head := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var all [2]unix.CapUserData
	if err := unix.Capget(head, &all[0]); err != nil {
		return err
	}
	less := all
	less[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	if err := unix.Capset(head, &less[0]); err != nil {
		return err
	}
	return errors.Join(fn(), unix.Capset(head, &all[0]))
}
