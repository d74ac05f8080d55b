package main

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// steering is the number of the routing table that leads calls to the gate.
const steering = 169

var service = &net.IPNet{IP: net.IPv4(169, 254, 169, 254).To4(), Mask: net.CIDRMask(32, 32)}

// unrule deletes the rules that lead to the table.
func unrule(a *attacker, rest []string) error {
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, r := range rules {
		if r.Table != steering {
			continue
		}
		if err := netlink.RuleDel(&r); err != nil {
			return fmt.Errorf("delete %v: %w", r, err)
		}
		a.Changed++
	}
	return a.do(rest)
}

// unroute empties the table.
func unroute(a *attacker, rest []string) error {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: steering}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return err
	}
	for _, r := range routes {
		if err := netlink.RouteDel(&r); err != nil {
			return fmt.Errorf("delete %v: %w", r, err)
		}
		a.Changed++
	}
	return a.do(rest)
}

// overrule sends calls by the main table, before any other rule but that of the
// local table.
func overrule(a *attacker, rest []string) error {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Dst, r.Table = unix.AF_INET, 0, service, unix.RT_TABLE_MAIN
	if err := netlink.RuleAdd(r); err != nil {
		return fmt.Errorf("add rule: %w", err)
	}
	a.Changed++
	return errors.Join(a.do(rest), netlink.RuleDel(r))
}

// loDown takes lo down, and with it all routes over it.
func loDown(a *attacker, rest []string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetDown(lo); err != nil {
		return err
	}
	a.Changed++
	return errors.Join(a.do(rest), netlink.LinkSetUp(lo))
}

// claim gives the container's own device the service's address.
func claim(a *attacker, rest []string) error {
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	addr := &netlink.Addr{IPNet: service}
	if err := netlink.AddrAdd(eth0, addr); err != nil {
		return fmt.Errorf("add address: %w", err)
	}
	a.Changed++
	return errors.Join(a.do(rest), netlink.AddrDel(eth0, addr))
}

// hairpin sends calls to another container, to be forwarded by it.
func hairpin(a *attacker, rest []string) error {
	if len(rest) == 0 {
		return errors.New("hairpin: by way of whom?")
	}
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	r := &netlink.Route{Dst: service, Gw: net.ParseIP(rest[0]), LinkIndex: eth0.Attrs().Index}
	if err := netlink.RouteAdd(r); err != nil {
		return fmt.Errorf("add route: %w", err)
	}
	a.Changed++
	return errors.Join(a.do(rest[1:]), netlink.RouteDel(r))
}
