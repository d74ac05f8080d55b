// Package testnet builds a "VM" out of network namespaces, for tests and for the
// demo: a fabric that owns the metadata addresses, VMs with an uplink to it, and
// containers on a VM's bridge. Nothing in it reaches the machine's own network.
//
// Namespaces are held by descriptors, not by names: when the process ends, for
// whatever reason, they are gone with all links, routes and rules in them.
package testnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
)

// The addresses of the fabric's services.
const (
	IMDS4      = "169.254.169.254"
	IMDS6      = "fd00:ec2::254"
	WireServer = "168.63.129.16"
)

// Fabric is the cloud's side: a namespace with the metadata addresses on its
// loopback. Whoever listens there plays the service.
type Fabric struct {
	NS  *netns.Handle
	vms int
}

// NewFabric makes an empty fabric.
func NewFabric() (*Fabric, error) {
	ns, err := newNetns()
	if err != nil {
		return nil, err
	}
	f := &Fabric{NS: ns}
	err = configure(ns, func(h *netlink.Handle) error {
		return errors.Join(addAddr(h, "lo", IMDS4+"/32"), addAddr(h, "lo", IMDS6+"/128"), addAddr(h, "lo", WireServer+"/32"))
	})
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("fabric: %w", err)
	}
	return f, nil
}

// Close lets go of the fabric.
func (f *Fabric) Close() { f.NS.Close() }

// VM is a machine on the fabric with a bridge br0 for containers. It forwards
// their packets without NAT, so that the fabric sees who called.
type VM struct {
	NS         *netns.Handle
	Addr4      netip.Addr // of the uplink eth0
	Addr6      netip.Addr
	fabric     *Fabric
	number     int
	containers int
}

// NewVM adds a VM to the fabric.
func (f *Fabric) NewVM() (*VM, error) {
	ns, err := newNetns()
	if err != nil {
		return nil, err
	}
	f.vms++
	n := f.vms
	v := &VM{NS: ns, fabric: f, number: n,
		Addr4: netip.AddrFrom4([4]byte{10, 88, byte(n), 4}), Addr6: netip.MustParseAddr(fmt.Sprintf("fd00:88:%x::4", n))}
	if err := v.wire(); err != nil {
		ns.Close()
		return nil, fmt.Errorf("vm: %w", err)
	}
	return v, nil
}

// Close lets go of the VM.
func (v *VM) Close() { v.NS.Close() }

func (v *VM) wire() error {
	n := v.number
	uplink := fmt.Sprintf("vm%d", n)
	err := configure(v.fabric.NS, func(h *netlink.Handle) error {
		return errors.Join(
			addVeth(h, uplink, "eth0", v.NS),
			addAddr(h, uplink, fmt.Sprintf("10.88.%d.1/24", n)),
			addAddr(h, uplink, fmt.Sprintf("fd00:88:%x::1/64", n)),
			addRoute(h, fmt.Sprintf("172.30.%d.0/24", n), v.Addr4.String()),
			addRoute(h, fmt.Sprintf("fd00:30:%x::/64", n), v.Addr6.String()))
	})
	if err != nil {
		return err
	}
	return configure(v.NS, func(h *netlink.Handle) error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
		if err := h.LinkAdd(bridge); err != nil {
			return fmt.Errorf("bridge: %w", err)
		}
		return errors.Join(
			addAddr(h, "eth0", v.Addr4.String()+"/24"),
			addAddr(h, "eth0", v.Addr6.String()+"/64"),
			addRoute(h, "0.0.0.0/0", fmt.Sprintf("10.88.%d.1", n)),
			addRoute(h, "::/0", fmt.Sprintf("fd00:88:%x::1", n)),
			addAddr(h, "br0", fmt.Sprintf("172.30.%d.1/24", n)),
			addAddr(h, "br0", fmt.Sprintf("fd00:30:%x::1/64", n)),
			// A new namespace copies these from the first one: say what is meant.
			Sysctl("net/ipv4/ip_forward", "1"), Sysctl("net/ipv6/conf/all/forwarding", "1"),
			sysctlIfPresent("net/bridge/bridge-nf-call-iptables", "0"))
	})
}

// Container is a network namespace with an eth0 on its VM's bridge.
type Container struct {
	Name         string
	NS           *netns.Handle
	Addr4, Addr6 netip.Addr
}

// NewContainer adds a container to the VM.
func (v *VM) NewContainer(name string) (*Container, error) {
	ns, err := newNetns()
	if err != nil {
		return nil, err
	}
	v.containers++
	n := v.containers + 1
	c := &Container{Name: name, NS: ns, Addr4: netip.AddrFrom4([4]byte{172, 30, byte(v.number), byte(n)}),
		Addr6: netip.MustParseAddr(fmt.Sprintf("fd00:30:%x::%x", v.number, n))}
	if err := v.plug(c, fmt.Sprintf("veth%d", n)); err != nil {
		ns.Close()
		return nil, fmt.Errorf("container %s: %w", name, err)
	}
	return c, nil
}

func (v *VM) plug(c *Container, port string) error {
	err := configure(v.NS, func(h *netlink.Handle) error {
		if err := addVeth(h, port, "eth0", c.NS); err != nil {
			return err
		}
		bridge, err := h.LinkByName("br0")
		if err != nil {
			return err
		}
		link, err := h.LinkByName(port)
		if err != nil {
			return err
		}
		return errors.Join(h.LinkSetMaster(link, bridge), h.LinkSetUp(link))
	})
	if err != nil {
		return err
	}
	return configure(c.NS, func(h *netlink.Handle) error {
		return errors.Join(
			Sysctl("net/ipv4/ip_forward", "0"),
			addAddr(h, "eth0", c.Addr4.String()+"/24"),
			addAddr(h, "eth0", c.Addr6.String()+"/64"),
			addRoute(h, "0.0.0.0/0", fmt.Sprintf("172.30.%d.1", v.number)),
			addRoute(h, "::/0", fmt.Sprintf("fd00:30:%x::1", v.number)))
	})
}

// Close lets go of the container. Its namespace lives on while processes, or
// listeners held elsewhere, are in it.
func (c *Container) Close() { c.NS.Close() }

// Start starts a command inside a namespace. The child is killed when this
// process dies.
func Start(ns *netns.Handle, cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return ns.Do(cmd.Start)
}

// Listen opens a TCP listener inside a namespace.
func Listen(ns *netns.Handle, address string) (net.Listener, error) {
	var l net.Listener
	err := ns.Do(func() error {
		var err error
		l, err = net.Listen("tcp", address)
		return err
	})
	return l, err
}

// newNetns makes a namespace with lo up, whose addresses will be usable at once:
// no duplicate address detection, for link-local ones neither.
func newNetns() (*netns.Handle, error) {
	ns, err := netns.New()
	if err != nil {
		return nil, err
	}
	err = configure(ns, func(h *netlink.Handle) error {
		return errors.Join(setUp(h, "lo"), Sysctl("net/ipv6/conf/all/accept_dad", "0"), Sysctl("net/ipv6/conf/default/accept_dad", "0"))
	})
	if err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// configure runs fn with a netlink handle inside a namespace.
func configure(ns *netns.Handle, fn func(h *netlink.Handle) error) error {
	return ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return fn(h)
	})
}

func setUp(h *netlink.Handle, name string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	return h.LinkSetUp(l)
}

func addVeth(h *netlink.Handle, name, peer string, ns *netns.Handle) error {
	f, err := os.Open(ns.Path())
	if err != nil {
		return err
	}
	defer f.Close()
	err = h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: peer, PeerNamespace: netlink.NsFd(f.Fd())})
	if err != nil {
		return fmt.Errorf("veth %s: %w", name, err)
	}
	return nil
}

// addAddr adds an address, usable at once, and sets the link up.
func addAddr(h *netlink.Handle, name, cidr string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	a.Flags = unix.IFA_F_NODAD
	if err := h.AddrAdd(l, a); err != nil {
		return fmt.Errorf("address %s on %s: %w", cidr, name, err)
	}
	return h.LinkSetUp(l)
}

func addRoute(h *netlink.Handle, cidr, via string) error {
	_, dst, err := net.ParseCIDR(cidr)
	if err != nil {
		return err
	}
	if err := h.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(via)}); err != nil {
		return fmt.Errorf("route %s via %s: %w", cidr, via, err)
	}
	return nil
}

// Sysctl sets a variable below /proc/sys, in the calling thread's namespace.
func Sysctl(name, value string) error {
	return os.WriteFile("/proc/sys/"+name, []byte(value), 0)
}

func sysctlIfPresent(name, value string) error {
	err := Sysctl(name, value)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
