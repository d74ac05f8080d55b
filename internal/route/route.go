// Package route keeps this machine's, or this container's, host route to the
// metadata service.
//
// A container's packets to 169.254.169.254 leave by its default gateway as a
// rule, but not where the system takes link-local addresses for neighbours
// (169.254.0.0/16 on an interface, and all of Windows).
package route

import (
	"errors"
	"net/netip"
)

// ErrNoDefault is returned when there is no default route whose way could be
// taken.
var ErrNoDefault = errors.New("there is no default route")

// Route is a host route that stands.
type Route struct {
	To   netip.Addr
	Via  netip.Addr // the gateway; the zero value where the interface leads there by itself
	Link string     // name of the interface
	Ours bool       // made here, and removed at the end

	// Default is the gateway of the default route where a route that was there
	// leads another way (Windows; elsewhere the zero value).
	Default netip.Addr
}

func (r Route) String() string {
	s := r.To.String() + " dev " + r.Link
	if r.Via.IsValid() {
		s = r.To.String() + " via " + r.Via.String() + " dev " + r.Link
	}
	switch {
	case r.Default.IsValid():
		s += " (was there, and is not the way of the default route, which is by " + r.Default.String() + ")"
	case !r.Ours:
		s += " (was there)"
	}
	return s
}
