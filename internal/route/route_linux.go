package route

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// protocol marks a route as ours, also for whoever reads "ip route". Nobody has
// this number (iproute2, etc/iproute2/rt_protos).
const protocol netlink.RouteProtocol = 169

// Ensure makes a host route to an address by the way of the default route with
// the lowest metric, in the caller's network namespace, and keeps it until ctx is
// cancelled: it is put back when it vanishes, and moved when the default route
// moves. At the end it is removed, and nil returned.
//
// A host route that was there already, and is not what a killed process of ours
// has left, is left alone throughout.
//
// changed is told of the route as soon as it stands, and whenever it is another
// or was put back; and of the reason, once, when it could not be. It is called
// from this goroutine and may be nil.
//
// Errors at the start: ErrNoDefault, os.ErrPermission without CAP_NET_ADMIN.
func Ensure(ctx context.Context, to netip.Addr, changed func(Route, error)) error {
	k, err := newKeeper(to.Unmap())
	if err != nil {
		return err
	}
	defer k.h.Close()
	// Before the first look, so that nothing is missed in between.
	events, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return fmt.Errorf("watch routes: %w", err)
	}
	defer context.AfterFunc(ctx, events.Close)()
	defer events.Close()
	last, _, err := k.ensure()
	if err != nil {
		return errors.Join(err, k.remove())
	}
	if changed != nil {
		changed(last, nil)
	}
	err = k.watch(ctx, events, last, changed)
	return errors.Join(err, k.remove())
}

// keeper is one host route.
type keeper struct {
	h      *netlink.Handle
	family int
	to     netip.Addr
	dst    *net.IPNet
	ours   bool // there is, or was, a route that we made or took over
}

func newKeeper(to netip.Addr) (*keeper, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("routes: %w", err)
	}
	k := &keeper{h: h, family: netlink.FAMILY_V4, to: to}
	if to.Is6() {
		k.family = netlink.FAMILY_V6
	}
	k.dst = &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())}
	return k, nil
}

// watch looks again at every change of a link or a route, whatever it was: IPv4
// routes vanish with their link without a message of their own.
func (k *keeper) watch(ctx context.Context, events *nl.NetlinkSocket, last Route, changed func(Route, error)) error {
	var failed error
	for {
		// When too many came at once (ENOBUFS), that is an event too.
		if _, _, err := events.Receive(); err != nil && !errors.Is(err, unix.ENOBUFS) {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("watch routes: %w", err)
		}
		r, put, err := k.ensure()
		news := put || r != last || (err == nil) != (failed == nil)
		last, failed = r, err
		if news && changed != nil {
			changed(r, err)
		}
	}
}

// ensure makes the route stand, and reports whether it had to be written.
func (k *keeper) ensure() (r Route, put bool, err error) {
	there, err := k.list(k.dst)
	if err != nil {
		return Route{}, false, err
	}
	ours := slices.IndexFunc(there, func(r netlink.Route) bool { return r.Protocol == protocol })
	if ours < 0 && len(there) > 0 {
		return k.describe(there[0], false), false, nil
	}
	want, err := k.wanted()
	if err != nil {
		return Route{}, false, err
	}
	switch {
	case ours < 0:
		put, err = true, k.h.RouteAdd(want) // never in the place of another's
	case there[ours].LinkIndex != want.LinkIndex || !there[ours].Gw.Equal(want.Gw):
		put, err = true, k.h.RouteReplace(want)
	}
	if err != nil {
		return Route{}, false, fmt.Errorf("route to %v: %w", k.to, err)
	}
	k.ours = true
	return k.describe(*want, true), put, nil
}

// list is the routes of the main table to exactly this destination.
func (k *keeper) list(dst *net.IPNet) ([]netlink.Route, error) {
	rs, err := k.h.RouteListFiltered(k.family, &netlink.Route{Dst: dst, Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_DST|netlink.RT_FILTER_TABLE)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // what changes while it is read is an event of its own
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return rs, nil
}

// wanted is the route by the way of the best default route.
func (k *keeper) wanted() (*netlink.Route, error) {
	any := &net.IPNet{IP: make(net.IP, k.to.BitLen()/8), Mask: net.CIDRMask(0, k.to.BitLen())}
	defaults, err := k.list(any)
	if err != nil {
		return nil, err
	}
	defaults = slices.DeleteFunc(defaults, func(r netlink.Route) bool { return r.Type != unix.RTN_UNICAST }) // "unreachable default"
	if len(defaults) == 0 {
		return nil, fmt.Errorf("route to %v: %w", k.to, ErrNoDefault)
	}
	best := slices.MinFunc(defaults, func(a, b netlink.Route) int { return a.Priority - b.Priority })
	if len(best.MultiPath) > 0 { // any of its ways will do
		best.LinkIndex, best.Gw = best.MultiPath[0].LinkIndex, best.MultiPath[0].Gw
	}
	r := &netlink.Route{Family: k.family, Dst: k.dst, Gw: best.Gw, LinkIndex: best.LinkIndex, Table: unix.RT_TABLE_MAIN, Protocol: protocol}
	if r.Gw == nil {
		r.Scope = netlink.SCOPE_LINK
	}
	return r, nil
}

// remove takes back what is ours. What is gone already is no error.
func (k *keeper) remove() error {
	if !k.ours {
		return nil
	}
	r := &netlink.Route{Family: k.family, Dst: k.dst, Table: unix.RT_TABLE_MAIN, Protocol: protocol, Scope: netlink.SCOPE_NOWHERE}
	if err := k.h.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove route to %v: %w", k.to, err)
	}
	return nil
}

func (k *keeper) describe(r netlink.Route, ours bool) Route {
	d := Route{To: k.to, Link: fmt.Sprint("#", r.LinkIndex), Ours: ours}
	if gw, ok := netip.AddrFromSlice(r.Gw); ok {
		d.Via = gw.Unmap()
	}
	if l, err := k.h.LinkByIndex(r.LinkIndex); err == nil {
		d.Link = l.Attrs().Name
	}
	return d
}
