package route

import (
	"fmt"
	"net/netip"
	"slices"
)

// planAlias says what add would do, a line each.
func planAlias(t table, addr netip.Addr) ([]string, error) {
	there, err := t.addresses(addr)
	if err != nil {
		return nil, fmt.Errorf("address %v: %w", addr, err)
	}
	if len(there) > 0 {
		return []string{fmt.Sprintf("leave address %v alone: interface %q has it already", addr, t.name(there[0].link))}, nil
	}
	def, err := best(t, addr)
	if err != nil {
		return nil, fmt.Errorf("address %v: %w", addr, err)
	}
	return []string{
		fmt.Sprintf("add address %v/%d to interface %q (default route by %v, metric %d), never as a source, until the end or the next start of the network", addr, addr.BitLen(), t.name(def.link), def.via, def.metric),
		fmt.Sprintf("read it back, and wait until it can be used (%v at most)", aliasWait),
		fmt.Sprintf("at the end remove address %v, and read that back", addr),
	}, nil
}

// planRoute says what ensure would do, a line each.
func planRoute(t table, to netip.Addr) ([]string, error) {
	h := &hostRoute{table: t, to: to}
	there, err := t.routes(h.prefix())
	if err != nil {
		return nil, fmt.Errorf("route to %v: %w", to, err)
	}
	def, err := best(t, to)
	if len(there) > 0 {
		line := "leave alone: route to " + h.describe(there[0], false).String()
		if want := (entry{to: h.prefix(), via: def.via, link: def.link}); err == nil && !slices.ContainsFunc(there, want.same) {
			line += fmt.Sprintf(", though the default route is by %v", def.via)
		}
		return []string{line}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("route to %v: %w", to, err)
	}
	return []string{
		fmt.Sprintf("add route to %v, active store only (default route of metric %d), and read it back", h.describe(def, true), def.metric),
		fmt.Sprintf("look every %v whether it is there", lookAgain),
		fmt.Sprintf("at the end remove route to %v, and read that back", to),
	}, nil
}
