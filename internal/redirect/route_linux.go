package redirect

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// table is the routing table that is ours in a container's namespace.
	table = 169
	// priority of the rule: right after table local.
	priority = 1
	// loopback is lo's index in every namespace (net/core/dev.c).
	loopback = 1
)

// family is one of the two internet families.
type family int

const (
	inet4 family = unix.AF_INET
	inet6 family = unix.AF_INET6
)

// destination is the captured address as a host route.
func (f family) destination() *net.IPNet {
	if f == inet6 {
		return &net.IPNet{IP: IMDS6.Addr().AsSlice(), Mask: net.CIDRMask(128, 128)}
	}
	return &net.IPNet{IP: IMDS4.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}
}

func (f family) loopback() net.IP {
	if f == inet6 {
		return net.IPv6loopback
	}
	return net.IPv4(127, 0, 0, 1)
}

// route makes the address local. The source is named, since otherwise the client
// would call from the service's own address and the answer would leave by the
// uplink.
func (f family) route() *netlink.Route {
	return &netlink.Route{
		Family: int(f), Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Table: table,
		LinkIndex: loopback, Dst: f.destination(), Src: f.loopback(),
	}
}

// rule is the switch: packets generated here (iif lo), for the address, TCP port
// 80. Other ports of the address are DNS and NTP on some clouds.
func (f family) rule() *netlink.Rule {
	r := netlink.NewRule()
	r.Family = int(f)
	r.Priority = priority
	r.IifName = "lo"
	r.Dst = f.destination()
	r.IPProto = unix.IPPROTO_TCP
	r.Dport = netlink.NewRulePortRange(80, 80)
	r.Table = table
	return r
}

// loopbackUp sets lo up: a newborn namespace may have it down.
func loopbackUp() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByIndex(loopback)
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if lo.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	return nil
}

// steerOn makes the route, then the rule, in the calling thread's namespace, and
// reports whether the rule was missing.
func steerOn(f family) (changed bool, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return false, err
	}
	defer h.Close()
	switch err := h.RouteReplace(f.route()); {
	case f == inet6 && errors.Is(err, unix.EACCES):
		return false, nil // IPv6 is switched off here: its callers fail at once, by themselves
	case err != nil:
		return false, fmt.Errorf("route %v: %w", f.destination(), err)
	}
	switch err := h.RuleAdd(f.rule()); {
	case errors.Is(err, unix.EEXIST):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("rule to %v: %w", f.destination(), err)
	}
	return true, nil
}

// steerOff takes back rule and route. What is gone already is no error.
func steerOff(f family) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	var errs []error
	if err := h.RuleDel(f.rule()); err != nil && !gone(err) {
		errs = append(errs, fmt.Errorf("delete rule to %v: %w", f.destination(), err))
	}
	if err := h.RouteDel(f.route()); err != nil && !gone(err) {
		errs = append(errs, fmt.Errorf("delete route %v: %w", f.destination(), err))
	}
	return errors.Join(errs...)
}

func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EAFNOSUPPORT)
}
