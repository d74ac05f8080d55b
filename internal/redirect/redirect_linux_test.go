package redirect

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

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// See package main: the main thread must not be one that enters namespaces.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	os.Exit(testnet.Main(m.Run, func() error { return goleak.Find() }))
}

// bench is a fabric, a VM and two containers, a steered and b not.
type bench struct {
	fabric *testnet.Fabric
	vm     *testnet.VM
	a, b   *testnet.Container
	r      *Redirector
	att    *Attachment
}

// eachMethod runs a test in fresh namespaces for every capture method.
func eachMethod(t *testing.T, test func(t *testing.T, b *bench)) {
	for _, m := range []Method{SkLookup, NFTables} {
		t.Run(string(m), func(t *testing.T) {
			testnet.Require(t, testnet.Namespaces)
			if m == SkLookup {
				testnet.Require(t, testnet.BPF)
			}
			test(t, newBench(t, m))
		})
	}
}

func must[T any](t *testing.T) func(v T, err error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newBench(t *testing.T, m Method) *bench {
	t.Helper()
	b := &bench{}
	b.fabric = must[*testnet.Fabric](t)(testnet.NewFabric())
	t.Cleanup(b.fabric.Close)
	b.vm = must[*testnet.VM](t)(b.fabric.NewVM())
	t.Cleanup(b.vm.Close)
	b.a = must[*testnet.Container](t)(b.vm.NewContainer("a"))
	t.Cleanup(b.a.Close)
	b.b = must[*testnet.Container](t)(b.vm.NewContainer("b"))
	t.Cleanup(b.b.Close)
	for _, address := range []string{"169.254.169.254:80", "[fd00:ec2::254]:80"} {
		l := must[net.Listener](t)(testnet.Listen(b.fabric.NS, address))
		t.Cleanup(func() { l.Close() })
		go testnet.Say(l, "fabric")
	}
	b.r = must[*Redirector](t)(New(m))
	return b
}

// steer attaches a, and says "gate" on its listeners.
func (b *bench) steer(t *testing.T) {
	t.Helper()
	b.att = must[*Attachment](t)(b.r.Attach(b.a.NS))
	t.Cleanup(b.att.Close)
	for _, l := range []net.Listener{must[net.Listener](t)(net.FileListener(b.att.V4)), must[net.Listener](t)(net.FileListener(b.att.V6))} {
		t.Cleanup(func() { l.Close() })
		go testnet.Say(l, "gate")
	}
}

func (b *bench) want(t *testing.T, c *testnet.Container, network, address, want string) {
	t.Helper()
	said, peer, err := testnet.Ask(c.NS, network, address)
	if said != want {
		t.Errorf("%s calls %s: got %q (%v), want %q", c.Name, address, said, err, want)
	}
	if said != "" && peer != address {
		t.Errorf("%s calls %s: sees peer %s", c.Name, address, peer)
	}
}

func TestSteer(t *testing.T) {
	eachMethod(t, func(t *testing.T, b *bench) {
		for _, address := range []string{IMDS4.String(), IMDS6.String()} {
			b.want(t, b.a, "tcp", address, "fabric") // or the rest proves nothing
		}
		b.steer(t)
		for _, address := range []string{IMDS4.String(), IMDS6.String()} {
			b.want(t, b.a, "tcp", address, "gate")
			b.want(t, b.b, "tcp", address, "fabric")
		}
		if err := b.r.Verify(b.a.NS, b.att); err != nil {
			t.Errorf("Verify: %v", err)
		}
		if err := b.r.Verify(b.b.NS, b.att); err == nil {
			t.Error("Verify believes that a's listeners are b's")
		}
		if err := b.r.Detach(b.a.NS, b.att); err != nil {
			t.Fatal(err)
		}
		for _, address := range []string{IMDS4.String(), IMDS6.String()} {
			b.want(t, b.a, "tcp", address, "fabric")
		}
		if err := b.r.Detach(b.a.NS, b.att); err != nil {
			t.Errorf("second Detach: %v", err)
		}
	})
}

// TestDetachLeavesNothing compares the whole namespace before and after.
func TestDetachLeavesNothing(t *testing.T) {
	eachMethod(t, func(t *testing.T, b *bench) {
		before := settled(t, b.a.NS)
		att := must[*Attachment](t)(b.r.Attach(b.a.NS))
		during := must[string](t)(testnet.State(b.a.NS))
		if during == before {
			t.Fatal("State does not show that the namespace is attached")
		}
		if err := b.r.Detach(b.a.NS, att); err != nil {
			t.Fatal(err)
		}
		att.Close()
		if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(must[string](t)(testnet.State(b.a.NS)), "\n")); diff != "" {
			t.Errorf("namespace differs after detach (-before +after):\n%s", diff)
		}
	})
}

// settled is the state of a namespace once the kernel has added, in its own time,
// the routes that belong to new addresses.
func settled(t *testing.T, ns *netns.Handle) string {
	t.Helper()
	state := must[string](t)(testnet.State(ns))
	for since, deadline := time.Now(), time.Now().Add(5*time.Second); time.Since(since) < 200*time.Millisecond && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
		if now := must[string](t)(testnet.State(ns)); now != state {
			state, since = now, time.Now()
		}
	}
	return state
}

func TestNeighbour(t *testing.T) {
	eachMethod(t, func(t *testing.T, b *bench) {
		b.steer(t)
		t.Run("neighbour_through_shared_bridge", func(t *testing.T) {
			routeVia(t, b.b, b.a)
			b.want(t, b.b, "tcp", IMDS4.String(), "")
			b.want(t, b.b, "tcp", IMDS6.String(), "")
			for addr, port := range map[netip.Addr]uint16{b.a.Addr4: must[uint16](t)(listenerPort(b.att.V4)), b.a.Addr6: must[uint16](t)(listenerPort(b.att.V6))} {
				b.want(t, b.b, "tcp", netip.AddrPortFrom(addr, port).String(), "")
			}
		})
	})
}

// routeVia makes b send the metadata addresses to a.
func routeVia(t *testing.T, b, a *testnet.Container) {
	t.Helper()
	err := b.NS.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return errors.Join(
			h.RouteAdd(&netlink.Route{Dst: inet4.destination(), Gw: a.Addr4.AsSlice()}),
			h.RouteAdd(&netlink.Route{Dst: inet6.destination(), Gw: a.Addr6.AsSlice()}))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestClients(t *testing.T) {
	eachMethod(t, func(t *testing.T, b *bench) {
		b.steer(t)
		t.Run("ipv4_mapped", func(t *testing.T) {
			said, peer := askMapped(t, b.a)
			if said != "gate" || peer != "[::ffff:169.254.169.254]:80" {
				t.Errorf("got %q from %s", said, peer)
			}
		})
		t.Run("mptcp", func(t *testing.T) {
			var c net.Conn
			err := b.a.NS.Do(func() error {
				d := net.Dialer{Timeout: time.Second, FallbackDelay: -1}
				d.SetMultipathTCP(true)
				var err error
				c, err = d.Dial("tcp4", IMDS4.String())
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			buf := make([]byte, 16)
			n, err := c.Read(buf)
			if string(buf[:n]) != "gate" {
				t.Errorf("got %q, %v", buf[:n], err)
			}
		})
		t.Run("app_on_all_addresses_port_80", func(t *testing.T) {
			l := must[net.Listener](t)(testnet.Listen(b.a.NS, "0.0.0.0:80"))
			t.Cleanup(func() { l.Close() })
			go testnet.Say(l, "app")
			b.want(t, b.a, "tcp", "127.0.0.1:80", "app")
			b.want(t, b.b, "tcp", netip.AddrPortFrom(b.a.Addr4, 80).String(), "app")
			b.want(t, b.a, "tcp", IMDS4.String(), "gate")
		})
		t.Run("udp_53_of_the_address_untouched", func(t *testing.T) {
			udpEcho(t, b.fabric.NS, "169.254.169.254:53")
			if got := askUDP(t, b.a.NS, "169.254.169.254:53"); got != "fabric heard dns" {
				t.Errorf("got %q", got)
			}
		})
		t.Run("tcp_8080_of_the_address_untouched", func(t *testing.T) {
			l := must[net.Listener](t)(testnet.Listen(b.fabric.NS, "169.254.169.254:8080"))
			t.Cleanup(func() { l.Close() })
			go testnet.Say(l, "fabric 8080")
			b.want(t, b.a, "tcp", "169.254.169.254:8080", "fabric 8080")
		})
	})
}

// askMapped calls from an IPv6 socket, as Java does.
func askMapped(t *testing.T, c *testnet.Container) (said, peer string) {
	t.Helper()
	err := c.NS.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 1}); err != nil {
			return err
		}
		to := netip.AddrFrom16(IMDS4.Addr().As16())
		if err := unix.Connect(fd, &unix.SockaddrInet6{Addr: to.As16(), Port: 80}); err != nil {
			return err
		}
		sa, err := unix.Getpeername(fd)
		if err != nil {
			return err
		}
		p := sa.(*unix.SockaddrInet6)
		peer = netip.AddrPortFrom(netip.AddrFrom16(p.Addr), uint16(p.Port)).String()
		buf := make([]byte, 16)
		n, err := unix.Read(fd, buf)
		said = string(buf[:max(n, 0)])
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return said, peer
}

func udpEcho(t *testing.T, ns *netns.Handle, address string) {
	t.Helper()
	var pc net.PacketConn
	err := ns.Do(func() error {
		var err error
		pc, err = net.ListenPacket("udp", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	go func() {
		buf := make([]byte, 64)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo([]byte("fabric heard "+string(buf[:n])), from)
		}
	}()
}

func askUDP(t *testing.T, ns *netns.Handle, address string) string {
	t.Helper()
	c := must[net.Conn](t)(testnet.Dial(context.Background(), ns, "udp", address))
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := c.Write([]byte("dns")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}

func TestHostNetnsIsNeverAttached(t *testing.T) {
	testnet.Require(t, testnet.Namespaces)
	t.Run("host_netns_is_never_attached", func(t *testing.T) {
		r := must[*Redirector](t)(New(Auto))
		for _, path := range []string{"/proc/1/ns/net", "/proc/self/ns/net"} {
			own, err := netns.Open(path)
			if errors.Is(err, os.ErrPermission) && path == "/proc/1/ns/net" {
				continue // process 1 is hidden here; then New cannot know its namespace either
			}
			if err != nil {
				t.Fatal(err)
			}
			defer own.Close()
			if _, err := r.Attach(own); !errors.Is(err, ErrHostNetns) {
				t.Errorf("Attach %s: got %v, want ErrHostNetns", path, err)
			}
		}
	})
}

// TestEnsure deletes our things one by one, as a container with CAP_NET_ADMIN
// may, and sees them put back.
func TestEnsure(t *testing.T) {
	eachMethod(t, func(t *testing.T, b *bench) {
		b.steer(t)
		if repaired, err := b.r.Ensure(b.a.NS, b.att); repaired || err != nil {
			t.Errorf("nothing missing: repaired %v, %v", repaired, err)
		}
		if err := b.a.NS.Do(func() error { return steerOff(inet4) }); err != nil {
			t.Fatal(err)
		}
		b.want(t, b.a, "tcp", IMDS4.String(), "fabric")
		if repaired, err := b.r.Ensure(b.a.NS, b.att); !repaired || err != nil {
			t.Errorf("rule missing: repaired %v, %v", repaired, err)
		}
		b.want(t, b.a, "tcp", IMDS4.String(), "gate")
		if b.att.Method != NFTables {
			return
		}
		if err := b.a.NS.Do(deleteTables); err != nil {
			t.Fatal(err)
		}
		if repaired, err := b.r.Ensure(b.a.NS, b.att); !repaired || err != nil {
			t.Errorf("table missing: repaired %v, %v", repaired, err)
		}
		b.want(t, b.a, "tcp", IMDS4.String(), "gate")
		if err := b.a.NS.Do(emptyChains); err != nil {
			t.Fatal(err)
		}
		if repaired, err := b.r.Ensure(b.a.NS, b.att); !repaired || err != nil {
			t.Errorf("chain flushed: repaired %v, %v", repaired, err)
		}
		b.want(t, b.a, "tcp", IMDS4.String(), "gate")
		other := must[*Attachment](t)(b.r.Attach(b.a.NS)) // its tables lead elsewhere
		other.Close()
		if repaired, err := b.r.Ensure(b.a.NS, b.att); !repaired || err != nil {
			t.Errorf("table of a dead listener: repaired %v, %v", repaired, err)
		}
		b.want(t, b.a, "tcp", IMDS4.String(), "gate")
	})
}

// emptyChains does what "nft flush table" does to ours.
func emptyChains() error {
	ours, err := ownTables()
	if err != nil {
		return err
	}
	c, err := nftables.New()
	if err != nil {
		return err
	}
	for _, t := range ours {
		c.FlushTable(t)
	}
	return c.Flush()
}

// TestAnotherMethodLeavesNothing attaches by one method after the other: a capture
// method can change with the privileges of the agent.
func TestAnotherMethodLeavesNothing(t *testing.T) {
	testnet.Require(t, testnet.BPF)
	b := newBench(t, NFTables)
	before := settled(t, b.a.NS)
	old := must[*Attachment](t)(b.r.Attach(b.a.NS))
	old.Close()
	r := must[*Redirector](t)(New(SkLookup))
	att := must[*Attachment](t)(r.Attach(b.a.NS))
	if during := must[string](t)(testnet.State(b.a.NS)); strings.Contains(during, "nft ") {
		t.Errorf("the tables of the other method stand beside the program:\n%s", during)
	}
	if err := r.Detach(b.a.NS, att); err != nil {
		t.Fatal(err)
	}
	att.Close()
	if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(must[string](t)(testnet.State(b.a.NS)), "\n")); diff != "" {
		t.Errorf("-before +after:\n%s", diff)
	}
}

func TestNoIPv6(t *testing.T) {
	eachMethod(t, func(t *testing.T, b *bench) {
		ns := must[*netns.Handle](t)(netns.New())
		defer ns.Close()
		err := ns.Do(func() error { return testnet.Sysctl("net/ipv6/conf/all/disable_ipv6", "1") })
		if err != nil {
			t.Fatal(err)
		}
		att := must[*Attachment](t)(b.r.Attach(ns))
		defer att.Close()
		l := must[net.Listener](t)(net.FileListener(att.V4))
		defer l.Close()
		go testnet.Say(l, "gate")
		said, _, err := testnet.Ask(ns, "tcp", IMDS4.String())
		if said != "gate" {
			t.Errorf("no interface but lo, no IPv6: got %q, %v", said, err)
		}
	})
}
