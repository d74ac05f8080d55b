package route

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrCaptured is returned by Check for an address that this machine, or a neighbour
// on a bridge of its own, would answer for.
var ErrCaptured = errors.New("leads to a container")

// Check says whether packets to the metadata service would leave this machine as
// they should: not to an address of its own, and not straight onto a bridge, as
// after "docker network create --subnet 169.254.169.0/24". Loopback addresses, a
// simulator's, are taken as they are meant. Errors: ErrCaptured and others.
func Check(to netip.Addr) error {
	if to.IsLoopback() {
		return nil
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	routes, err := h.RouteGet(to.AsSlice())
	if err != nil || len(routes) == 0 {
		return fmt.Errorf("route to %v: %w", to, err)
	}
	r := routes[0]
	if r.Type == unix.RTN_LOCAL {
		return fmt.Errorf("route to %v: %w: the address is on this machine itself", to, ErrCaptured)
	}
	link, err := h.LinkByIndex(r.LinkIndex)
	if err != nil {
		return fmt.Errorf("route to %v: %w", to, err)
	}
	if link.Type() == "bridge" && r.Gw == nil {
		return fmt.Errorf("route to %v: %w: straight onto the bridge %s", to, ErrCaptured, link.Attrs().Name)
	}
	return nil
}
