package route

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"imdsgate/internal/testnet"
)

// See package main: the main thread must not be one that enters namespaces.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	os.Exit(testnet.Main(m.Run, func() error { return goleak.Find() }))
}

var (
	imds4 = netip.MustParseAddr(testnet.IMDS4)
	imds6 = netip.MustParseAddr(testnet.IMDS6)
)

// patience is how long a test waits for what should happen at once.
const patience = 20 * time.Second

// newContainer makes a container whose VM leads to a fabric where the address
// says "fabric".
func newContainer(t *testing.T) *testnet.Container {
	t.Helper()
	testnet.Require(t, testnet.Namespaces)
	f, err := testnet.NewFabric()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	vm, err := f.NewVM()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(vm.Close)
	c, err := vm.NewContainer("proxy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	for _, address := range []string{testnet.IMDS4 + ":80", "[" + testnet.IMDS6 + "]:80"} {
		l, err := testnet.Listen(f.NS, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go testnet.Say(l, "fabric")
	}
	return c
}

// inside does something to the links and routes of a container.
func inside(t *testing.T, c *testnet.Container, fn func(h *netlink.Handle) error) {
	t.Helper()
	err := c.NS.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return fn(h)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// route is a route in few words; an empty via means that the link leads there.
func route(h *netlink.Handle, dst, via, link string, metric int) (*netlink.Route, error) {
	l, err := h.LinkByName(link)
	if err != nil {
		return nil, err
	}
	_, n, err := net.ParseCIDR(dst)
	if err != nil {
		return nil, err
	}
	r := &netlink.Route{Dst: n, LinkIndex: l.Attrs().Index, Priority: metric}
	if via == "" {
		r.Scope = netlink.SCOPE_LINK
	} else {
		r.Gw = net.ParseIP(via)
	}
	return r, nil
}

func add(t *testing.T, c *testnet.Container, dst, via, link string, metric int) {
	t.Helper()
	inside(t, c, func(h *netlink.Handle) error {
		r, err := route(h, dst, via, link, metric)
		if err != nil {
			return err
		}
		return h.RouteAdd(r)
	})
}

func del(t *testing.T, c *testnet.Container, dst, via, link string) {
	t.Helper()
	inside(t, c, func(h *netlink.Handle) error {
		r, err := route(h, dst, via, link, 0)
		if err != nil {
			return err
		}
		return h.RouteDel(r)
	})
}

// addLink adds a further network to a container, with a gateway that is nobody.
func addLink(t *testing.T, c *testnet.Container, name, cidr string) {
	t.Helper()
	inside(t, c, func(h *netlink.Handle) error {
		l := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "-peer"}
		a, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		if err := h.LinkAdd(l); err != nil {
			return err
		}
		peer, err := h.LinkByName(l.PeerName)
		if err != nil {
			return err
		}
		return errors.Join(h.AddrAdd(l, a), h.LinkSetUp(peer), h.LinkSetUp(l))
	})
}

// state is what the container's main table holds, without the link-local routes of
// IPv6, which come in their own time.
func state(t *testing.T, c *testnet.Container) string {
	t.Helper()
	s, err := testnet.State(c.NS)
	if err != nil {
		t.Fatal(err)
	}
	var main []string
	for line := range strings.Lines(s) {
		if strings.Contains(line, "table=254") && !strings.Contains(line, "fe80:") {
			main = append(main, line)
		}
	}
	return strings.Join(main, "")
}

// told is what Ensure said.
type told struct {
	route Route
	err   error
}

// kept is Ensure at work in a container.
type kept struct {
	said chan told
	end  context.CancelFunc
	done chan error
}

func keep(t *testing.T, c *testnet.Container, to netip.Addr) *kept {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	k := &kept{said: make(chan told, 64), end: cancel, done: make(chan error, 1)}
	go func() {
		k.done <- c.NS.Do(func() error {
			return Ensure(ctx, to, func(r Route, err error) { k.said <- told{r, err} })
		})
	}()
	t.Cleanup(cancel)
	return k
}

// want waits until Ensure says this, whatever it says before.
func (k *kept) want(t *testing.T, want Route, werr error) {
	t.Helper()
	var last told
	for timeout := time.After(patience); ; {
		select {
		case last = <-k.said:
			if last.route == want && errors.Is(last.err, werr) {
				return
			}
		case err := <-k.done:
			t.Fatalf("Ensure has ended: %v", err)
		case <-timeout:
			t.Fatalf("last said: %v, %v, want %v, %v", last.route, last.err, want, werr)
		}
	}
}

func (k *kept) stop(t *testing.T) {
	t.Helper()
	k.end()
	select {
	case err := <-k.done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("Ensure does not end")
	}
}

// viaEth0 is the route that a container of the test bench should get.
func viaEth0(to netip.Addr) Route {
	via := "172.30.1.1"
	if to.Is6() {
		via = "fd00:30:1::1"
	}
	return Route{To: to, Via: netip.MustParseAddr(via), Link: "eth0", Ours: true}
}
