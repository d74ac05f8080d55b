package testnet

import (
	"fmt"
	"net"
	"sort"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
)

// State describes what a namespace holds that imdsgate may touch: links with
// their flags and addresses, rules, the routes of all tables, nftables tables,
// TCP listeners. Two equal states print alike.
func State(ns *netns.Handle) (string, error) {
	var lines []string
	err := ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		for _, add := range []func(*netlink.Handle) ([]string, error){links, rulesAndRoutes, tables, listeners} {
			more, err := add(h)
			if err != nil {
				return err
			}
			lines = append(lines, more...)
		}
		return nil
	})
	sort.Strings(lines)
	return strings.Join(lines, "\n"), err
}

func links(h *netlink.Handle) ([]string, error) {
	all, err := h.LinkList()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, l := range all {
		a := l.Attrs()
		lines = append(lines, fmt.Sprintf("link %d %s up=%v", a.Index, a.Name, a.Flags&net.FlagUp != 0))
		addrs, err := h.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, err
		}
		for _, ad := range addrs {
			lines = append(lines, fmt.Sprintf("addr %s %v", a.Name, ad.IPNet))
		}
	}
	return lines, nil
}

func rulesAndRoutes(h *netlink.Handle) ([]string, error) {
	var lines []string
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := h.RuleList(family)
		if err != nil {
			return nil, err
		}
		for _, r := range rules {
			lines = append(lines, fmt.Sprintf("rule %d %v iif=%q proto=%d", family, r, r.IifName, r.IPProto))
		}
		routes, err := h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			lines = append(lines, fmt.Sprintf("route %d table=%d %v", family, r.Table, r))
		}
	}
	return lines, nil
}

func tables(*netlink.Handle) ([]string, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	all, err := c.ListTables()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, t := range all {
		lines = append(lines, fmt.Sprintf("nft %d %s", t.Family, t.Name))
	}
	return lines, nil
}

const listenState = 10 // TCP_LISTEN

func listeners(*netlink.Handle) ([]string, error) {
	var lines []string
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		socks, err := netlink.SocketDiagTCP(family)
		if err != nil {
			return nil, err
		}
		for _, s := range socks {
			if s.State == listenState {
				lines = append(lines, fmt.Sprintf("listener %v:%d", s.ID.Source, s.ID.SourcePort))
			}
		}
	}
	return lines, nil
}
