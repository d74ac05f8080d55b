package bpf_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"imdsgate/internal/bpf"
	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// TestProgramRefusesNeighbour holds the program's own check: even where the
// whole address is local (so that a neighbour's packet gets as far as the
// socket lookup) the neighbour must not reach the container's listener. The same
// program without its loopback check answers: the test can fail.
func TestProgramRefusesNeighbour(t *testing.T) {
	testnet.Require(t, testnet.BPF)
	for _, tc := range []struct {
		name    string
		load    func() (*bpf.Steer, error)
		answers bool
	}{
		{"neighbour_through_shared_bridge", bpf.LoadSteer, false},
		{"control_without_loopback_check", bpf.LoadSteerWithoutLoopbackCheck, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			steer, err := tc.load()
			if err != nil {
				t.Fatal(err)
			}
			a, b := twoOnOneBridge(t)
			prototype(t, a, steer)
			routeVia(t, b, a)
			for _, address := range []string{"169.254.169.254:80", "[fd00:ec2::254]:80"} {
				if said, _, err := testnet.Ask(a.NS, "tcp", address); said != "i am A" {
					t.Errorf("A calls %s: got %q, %v: want its own listener", address, said, err)
				}
				said, _, err := testnet.Ask(b.NS, "tcp", address)
				if got := said == "i am A"; got != tc.answers {
					t.Errorf("neighbour calls %s through A: got %q, %v: answered as A = %v, want %v", address, said, err, got, tc.answers)
				}
			}
		})
	}
}

func twoOnOneBridge(t *testing.T) (a, b *testnet.Container) {
	t.Helper()
	fabric, err := testnet.NewFabric()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(fabric.Close)
	vm, err := fabric.NewVM()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(vm.Close)
	for _, c := range []struct {
		name string
		p    **testnet.Container
	}{{"a", &a}, {"b", &b}} {
		if *c.p, err = vm.NewContainer(c.name); err != nil {
			t.Fatal(err)
		}
		t.Cleanup((*c.p).Close)
	}
	return a, b
}

// prototype steers as the first prototype did: the whole address is local.
func prototype(t *testing.T, c *testnet.Container, steer *bpf.Steer) {
	t.Helper()
	var files [2]*os.File
	err := c.NS.Do(func() error {
		for i, addr := range []string{"127.0.0.1", "::1"} {
			f, _, err := netns.ListenTransparent(netip.MustParseAddr(addr), 16)
			if err != nil {
				return err
			}
			files[i] = f
			l, err := net.FileListener(f)
			if err != nil {
				return err
			}
			t.Cleanup(func() { l.Close(); f.Close() })
			go testnet.Say(l, "i am A")
		}
		return errors.Join(localRoute("169.254.169.254/32"), localRoute("fd00:ec2::254/128"))
	})
	if err != nil {
		t.Fatal(err)
	}
	ns, err := os.Open(c.NS.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	link, err := steer.Attach(int(ns.Fd()), files[0], files[1])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { link.Close() })
	if inode, err := bpf.LinkNetns(link); err != nil || inode != c.NS.ID().Inode {
		t.Fatalf("LinkNetns = %d, %v, want %d", inode, err, c.NS.ID().Inode)
	}
}

func localRoute(cidr string) error {
	_, dst, err := net.ParseCIDR(cidr)
	if err != nil {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	return h.RouteAdd(&netlink.Route{Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, LinkIndex: 1, Dst: dst, Scope: netlink.SCOPE_HOST})
}

// routeVia makes b send the metadata addresses to a, as any container may that
// can change its own routes.
func routeVia(t *testing.T, b, a *testnet.Container) {
	t.Helper()
	err := b.NS.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		var errs []error
		for cidr, via := range map[string]netip.Addr{"169.254.169.254/32": a.Addr4, "fd00:ec2::254/128": a.Addr6} {
			_, dst, _ := net.ParseCIDR(cidr)
			errs = append(errs, h.RouteAdd(&netlink.Route{Dst: dst, Gw: net.IP(via.AsSlice())}))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		t.Fatal(err)
	}
}
