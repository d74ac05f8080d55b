package route

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// This file, alias.go and plan.go are what is decided on Windows; the calls
// themselves are in table_windows.go. So the decisions are tested everywhere.

// table is what a machine knows of routes and addresses, by the calls of Windows'
// IP Helper. Nothing that is written through it outlives the machine's, or the
// container's, network.
type table interface {
	routes(to netip.Prefix) ([]entry, error) // the active ones to exactly this destination, on interfaces that can be used
	addRoute(entry) error                    // errExists
	deleteRoute(entry) error                 // errGone

	addresses(netip.Addr) ([]address, error) // usually one, or none
	addAddress(address) error                // with a prefix of one address, never as a source; errExists
	deleteAddress(address) error             // errGone

	name(link uint64) string // of an interface, for people
}

// entry is a route.
type entry struct {
	to     netip.Prefix
	via    netip.Addr // the zero value, or 0.0.0.0, where the interface leads there by itself
	link   uint64     // LUID
	metric uint64     // the route's own and the interface's
}

func (e entry) same(o entry) bool { return e.to == o.to && e.via == o.via && e.link == o.link }

// address is one of this machine.
type address struct {
	addr  netip.Addr
	link  uint64
	state dad
}

// dad is how far duplicate address detection has come (NL_DAD_STATE).
type dad int

const (
	invalid dad = iota
	tentative
	duplicate
	deprecated
	preferred
)

var (
	errExists = errors.New("is there already")
	errGone   = errors.New("is not there")

	// ErrNotThere is returned when a call that changes the network has succeeded,
	// and the network is as before.
	ErrNotThere = errors.New("the system reported success and did nothing")
)

// lookAgain is between looks whether all is in its place: the system's own
// notifications tell the same, later or not at all.
const lookAgain = 2 * time.Second

// best is the default route with the lowest metric.
func best(t table, to netip.Addr) (entry, error) {
	any := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if to.Is6() {
		any = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	defaults, err := t.routes(any)
	if err != nil {
		return entry{}, err
	}
	if len(defaults) == 0 {
		return entry{}, ErrNoDefault
	}
	return slices.MinFunc(defaults, func(a, b entry) int { return cmp.Compare(a.metric, b.metric) }), nil
}

// hostRoute keeps one host route in a table.
type hostRoute struct {
	table
	to   netip.Addr
	mine []entry // that we made, the latest last; also those on interfaces that are down, which come back with them
}

// keep is Ensure, with a clock.
func (h *hostRoute) keep(ctx context.Context, tick <-chan time.Time, changed func(Route, error)) error {
	last, _, err := h.ensure()
	if err != nil {
		return errors.Join(err, h.remove())
	}
	if changed != nil {
		changed(last, nil)
	}
	var failed error
	for {
		select {
		case <-ctx.Done():
			return h.remove()
		case <-tick:
		}
		r, put, err := h.ensure()
		news := put || r != last || (err == nil) != (failed == nil)
		last, failed = r, err
		if news && changed != nil {
			changed(r, err)
		}
	}
}

func (h *hostRoute) prefix() netip.Prefix { return netip.PrefixFrom(h.to, h.to.BitLen()) }

// ensure makes the route stand, and reports whether it had to be written.
func (h *hostRoute) ensure() (r Route, put bool, err error) {
	there, err := h.routes(h.prefix())
	if err != nil {
		return Route{}, false, fmt.Errorf("route to %v: %w", h.to, err)
	}
	def, err := best(h, h.to)
	if err != nil && (slices.ContainsFunc(there, h.isMine) || len(there) == 0) {
		return Route{}, false, fmt.Errorf("route to %v: %w", h.to, err)
	}
	want := entry{to: h.prefix(), via: def.via, link: def.link}
	others := slices.DeleteFunc(slices.Clone(there), h.isMine)
	for _, old := range h.mine {
		if !old.same(want) && slices.ContainsFunc(there, old.same) {
			if err := h.take(old); err != nil {
				return Route{}, false, err
			}
		}
	}
	switch {
	case h.isMine(want) && slices.ContainsFunc(there, want.same):
		return h.describe(want, true), false, nil
	case len(others) > 0: // another's: left alone
		r := h.describe(others[0], false)
		if err == nil && !others[0].same(want) {
			r.Default = def.via
		}
		return r, false, nil
	}
	if err := h.put(want); err != nil {
		return Route{}, false, fmt.Errorf("route to %v: %w", h.to, err)
	}
	return h.describe(want, true), true, nil
}

func (h *hostRoute) isMine(e entry) bool { return slices.ContainsFunc(h.mine, e.same) }

// put adds a route and looks whether it is there.
func (h *hostRoute) put(want entry) error {
	if err := h.addRoute(want); err != nil {
		return err // errExists too: somebody was faster, and the next look will tell who
	}
	h.mine = append(slices.DeleteFunc(h.mine, want.same), want)
	there, err := h.routes(want.to)
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	if !slices.ContainsFunc(there, want.same) {
		return fmt.Errorf("read back: %w", ErrNotThere)
	}
	return nil
}

// remove takes back all that is ours. What is gone already is no error.
func (h *hostRoute) remove() error {
	var errs []error
	for _, e := range slices.Clone(h.mine) {
		errs = append(errs, h.take(e))
	}
	return errors.Join(errs...)
}

// take takes one back, and looks whether it is gone.
func (h *hostRoute) take(e entry) error {
	if err := h.deleteRoute(e); err != nil && !errors.Is(err, errGone) {
		return fmt.Errorf("remove route to %v: %w", h.to, err)
	}
	there, err := h.routes(e.to)
	if err != nil {
		return fmt.Errorf("remove route to %v: read back: %w", h.to, err)
	}
	if slices.ContainsFunc(there, e.same) {
		return fmt.Errorf("remove route to %v: read back: %w", h.to, ErrNotThere)
	}
	h.mine = slices.DeleteFunc(slices.Clone(h.mine), e.same)
	return nil
}

func (h *hostRoute) describe(e entry, ours bool) Route {
	r := Route{To: h.to, Via: e.via, Link: h.name(e.link), Ours: ours}
	if r.Via.IsValid() && r.Via.IsUnspecified() {
		r.Via = netip.Addr{}
	}
	return r
}
