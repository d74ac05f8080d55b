package testnet

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"

	"imdsgate/internal/netns"
)

// NewMacvlan adds a container on the VM's uplink itself, with an address of its
// own on the fabric's segment: its packets never pass the VM's forwarding.
func (v *VM) NewMacvlan(name string) (*Container, error) {
	ns, err := newNetns()
	if err != nil {
		return nil, err
	}
	v.containers++
	n := v.containers + 100
	c := &Container{Name: name, NS: ns, Addr4: netip.AddrFrom4([4]byte{10, 88, byte(v.number), byte(n)}),
		Addr6: netip.MustParseAddr(fmt.Sprintf("fd00:88:%x::%x", v.number, n))}
	if err := v.plugMacvlan(ns, c); err != nil {
		ns.Close()
		return nil, fmt.Errorf("container %s: %w", name, err)
	}
	return c, nil
}

func (v *VM) plugMacvlan(ns *netns.Handle, c *Container) error {
	err := configure(v.NS, func(h *netlink.Handle) error {
		uplink, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		port := &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "macvlan0", ParentIndex: uplink.Attrs().Index}, Mode: netlink.MACVLAN_MODE_BRIDGE}
		if err := h.LinkAdd(port); err != nil {
			return fmt.Errorf("macvlan: %w", err)
		}
		f, err := os.Open(ns.Path())
		if err != nil {
			return err
		}
		defer f.Close()
		return h.LinkSetNsFd(port, int(f.Fd()))
	})
	if err != nil {
		return err
	}
	return configure(ns, func(h *netlink.Handle) error {
		port, err := h.LinkByName("macvlan0")
		if err != nil {
			return err
		}
		return errors.Join(
			h.LinkSetName(port, "eth0"),
			Sysctl("net/ipv4/ip_forward", "0"),
			addAddr(h, "eth0", c.Addr4.String()+"/24"),
			addAddr(h, "eth0", c.Addr6.String()+"/64"),
			addRoute(h, "0.0.0.0/0", fmt.Sprintf("10.88.%d.1", v.number)),
			addRoute(h, "::/0", fmt.Sprintf("fd00:88:%x::1", v.number)))
	})
}
