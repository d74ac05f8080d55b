package redirect

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"imdsgate/internal/bpf"
)

// ensureUplinks sees to it that the program is on every device that leads to the
// guarded addresses, and knows the host's own addresses. What is not an uplink any
// more is let go. A device that fails does not keep the others from being guarded.
// It reports whether the program was missing somewhere, or too much.
func (g *Guard) ensureUplinks() (changed bool, err error) {
	if g.noBPF != nil || !g.loadEgress() {
		return false, nil
	}
	err = g.host.Do(func() error {
		n, err := readNetwork()
		if err != nil {
			return fmt.Errorf("guard: %w", err)
		}
		devices := uplinks(n.links, n.routes, g.rules.addresses())
		moved, err := g.egress.SetHost(n.addresses)
		if err != nil {
			return err
		}
		if moved { // as they do: nothing had to be repaired
			g.log.Info("guard: host addresses changed", "addresses", len(n.addresses))
		}
		var errs []error
		for _, d := range devices {
			added, err := g.egress.Ensure(d)
			errs = append(errs, err)
			changed = changed || added
		}
		for _, d := range g.formerUplinks(n.links) {
			if slices.Contains(devices, d) {
				continue
			}
			left, err := bpf.DetachEgress(d)
			if !errors.Is(err, unix.ENODEV) {
				errs = append(errs, err)
			}
			changed = changed || left
		}
		if changed {
			g.log.Info("guard: uplinks put right", "devices", names(devices))
		}
		g.devices = devices
		return errors.Join(errs...)
	})
	return changed, err
}

// loadEgress loads the program once. Where BPF is not to be had, that does not
// change while we run.
func (g *Guard) loadEgress() bool {
	if g.egress != nil {
		return true
	}
	rules := bpf.EgressRules{Addresses: g.rules.Addresses, WireServer: g.rules.WireServer, HostNetns: g.cookie}
	for _, p := range g.rules.OpenPorts {
		rules.OpenPorts = append(rules.OpenPorts, bpf.EgressPort(p))
	}
	err := g.host.Do(func() (err error) {
		g.egress, err = bpf.LoadEgress(rules)
		return err
	})
	if err == nil && !g.egress.Cookie() {
		g.log.Warn("guard: this kernel does not tell who made a packet, its source address has to do (needs Linux 6.15)")
	}
	if err != nil {
		g.noBPF = fmt.Errorf("guard: %w", err)
	}
	return err == nil
}

// formerUplinks are the devices that may have the program: those that we gave it
// to, and at first, after another agent, every one there is.
func (g *Guard) formerUplinks(links []netlink.Link) []bpf.Device {
	if g.devices != nil {
		return g.devices
	}
	var all []bpf.Device
	for _, l := range links {
		all = append(all, device(l))
	}
	return all
}

func (g *Guard) removeUplinks() error {
	if g.noBPF != nil {
		return nil // we never had one, and may not even look
	}
	return g.host.Do(func() error {
		n, err := readNetwork()
		if err != nil {
			return fmt.Errorf("guard: %w", err)
		}
		var errs []error
		for _, l := range n.links {
			if _, err := bpf.DetachEgress(device(l)); err != nil && !errors.Is(err, unix.ENODEV) {
				errs = append(errs, err)
			}
		}
		return errors.Join(errs...)
	})
}

// network is what the calling thread's namespace looks like.
type network struct {
	links     []netlink.Link
	routes    []netlink.Route
	addresses []netip.Addr
}

func readNetwork() (n network, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return n, err
	}
	defer h.Close()
	if n.links, err = whole(h.LinkList); err != nil {
		return n, fmt.Errorf("list devices: %w", err)
	}
	n.routes, err = whole(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(unix.AF_UNSPEC, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return n, fmt.Errorf("list routes: %w", err)
	}
	addrs, err := whole(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return n, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			n.addresses = append(n.addresses, addr.Unmap())
		}
	}
	return n, nil
}

// whole repeats a listing that something changed in the middle of.
func whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range 10 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// addresses are all that are guarded.
func (r GuardRules) addresses() []netip.Addr {
	if !r.WireServer.IsValid() {
		return r.Addresses
	}
	return append(slices.Clone(r.Addresses), r.WireServer)
}

// uplinks picks the devices by which packets can leave for one of the addresses:
// those that a route of any table covering it names, and what lies below them. A
// container may be a port of the bridge that is the uplink, or a macvlan on the
// device below a VLAN.
func uplinks(links []netlink.Link, routes []netlink.Route, to []netip.Addr) []bpf.Device {
	chosen := make(map[int]bool)
	for _, r := range routes {
		if !covers(r, to) {
			continue
		}
		chosen[r.LinkIndex] = true
		for _, hop := range r.MultiPath {
			chosen[hop.LinkIndex] = true
		}
	}
	for range links { // as deep as there are devices, at the very most
		before := len(chosen)
		for _, l := range links {
			a := l.Attrs()
			if a.MasterIndex != 0 && chosen[a.MasterIndex] {
				chosen[a.Index] = true
			}
			// The parent of a veth is its peer, and one with a namespace id is not here.
			if chosen[a.Index] && a.ParentIndex != 0 && a.NetNsID == -1 && l.Type() != "veth" {
				chosen[a.ParentIndex] = true
			}
		}
		if len(chosen) == before {
			break
		}
	}
	var devices []bpf.Device
	for _, l := range links {
		if a := l.Attrs(); chosen[a.Index] && a.Flags&net.FlagLoopback == 0 {
			devices = append(devices, device(l))
		}
	}
	return devices
}

func covers(r netlink.Route, to []netip.Addr) bool {
	if r.Type != unix.RTN_UNICAST {
		return false
	}
	return slices.ContainsFunc(to, func(a netip.Addr) bool {
		return (r.Family == unix.AF_INET6) == a.Is6() && (r.Dst == nil || r.Dst.Contains(a.AsSlice()))
	})
}

func device(l netlink.Link) bpf.Device {
	a := l.Attrs()
	return bpf.Device{Index: a.Index, Name: a.Name, Encap: a.EncapType}
}

func names(devices []bpf.Device) (all []string) {
	for _, d := range devices {
		all = append(all, d.Name)
	}
	return all
}
