package route

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	"golang.org/x/sys/windows"
	"golang.zx2c4.com/wireguard/windows/tunnel/winipcfg"
)

// Ensure makes a host route to an address by the way of the default route with
// the lowest metric, in the compartment that this process is in, and keeps it
// until ctx is cancelled: it is put back when it vanishes, and moved when the
// default route moves. At the end it is removed, and nil returned. It is in the
// active store only: nothing outlives the network.
//
// A host route that was there already, also one that a killed process has left, is
// left alone throughout; where it leads another way than the default route,
// Route.Default says so.
//
// changed is told of the route as soon as it stands, and whenever it is another or
// was put back; and of the reason, once, when it could not be. It is called from
// this goroutine and may be nil.
//
// Errors: ErrNoDefault; os.ErrPermission for who is no administrator; ErrNotThere;
// errors.ErrUnsupported, with the name of the function that this system lacks.
func Ensure(ctx context.Context, to netip.Addr, changed func(Route, error)) error {
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	h := &hostRoute{table: ipHelper{}, to: to.Unmap()}
	return h.keep(ctx, tick.C, changed)
}

// AddAlias gives an address to the interface of the default route with the lowest
// metric, and returns once it can be used. The caller removes it. Windows never
// takes it as the source of other connections (SkipAsSource). One that is there
// already is left alone, also by Remove.
//
// Errors: as Ensure's, and ErrDuplicate.
func AddAlias(ctx context.Context, addr netip.Addr) (*Alias, error) {
	a := &Alias{table: ipHelper{}, addr: addr, after: time.After}
	if err := a.add(ctx); err != nil {
		return nil, err
	}
	return a, nil
}

// PlanAlias says what AddAlias and Remove would do, a line each, and does nothing.
func PlanAlias(addr netip.Addr) ([]string, error) { return planAlias(ipHelper{}, addr) }

// PlanRoute says what Ensure would do, a line each, and does nothing.
func PlanRoute(to netip.Addr) ([]string, error) { return planRoute(ipHelper{}, to.Unmap()) }

// ipHelper is the system's own table. winipcfg panics when a function is missing:
// so each is looked for first.
type ipHelper struct{}

var iphlpapi = windows.NewLazySystemDLL("iphlpapi.dll")

// have returns errors.ErrUnsupported with the name of the first function that is
// missing.
func have(functions ...string) error {
	for _, f := range functions {
		if iphlpapi.NewProc(f).Find() != nil {
			return fmt.Errorf("iphlpapi.dll has no function %s: %w", f, errors.ErrUnsupported)
		}
	}
	return nil
}

func (ipHelper) routes(to netip.Prefix) (es []entry, err error) {
	if err := have("GetIpForwardTable2", "FreeMibTable", "GetIfEntry2"); err != nil {
		return nil, err
	}
	rows, err := winipcfg.GetIPForwardTable2(familyOf(to.Addr()))
	if err != nil {
		return nil, fmt.Errorf("GetIpForwardTable2: %w", err)
	}
	for _, r := range rows {
		if r.DestinationPrefix.Prefix() != to || r.Loopback || !usable(r.InterfaceLUID) {
			continue
		}
		es = append(es, entry{to: to, via: r.NextHop.Addr().Unmap().WithZone(""), link: uint64(r.InterfaceLUID),
			metric: uint64(r.Metric) + interfaceMetric(r.InterfaceLUID, to.Addr())})
	}
	return es, nil
}

// usable reports whether an interface is up, and no loopback.
func usable(l winipcfg.LUID) bool {
	i, err := l.Interface()
	return err == nil && i.OperStatus == winipcfg.IfOperStatusUp && i.Type != winipcfg.IfTypeSoftwareLoopback
}

// interfaceMetric is what Windows adds to a route's own. Where it cannot be asked
// for, it counts for nothing, so that the routes' own decide.
func interfaceMetric(l winipcfg.LUID, a netip.Addr) uint64 {
	if have("InitializeIpInterfaceEntry", "GetIpInterfaceEntry") != nil {
		return 0
	}
	i, err := l.IPInterface(familyOf(a))
	if err != nil {
		return 0
	}
	return uint64(i.Metric)
}

func (ipHelper) addRoute(e entry) error {
	if err := have("CreateIpForwardEntry2", "DeleteIpForwardEntry2", "InitializeIpForwardEntry"); err != nil {
		return err
	}
	row, err := rowOf(e)
	if err != nil {
		return err
	}
	return outcome("CreateIpForwardEntry2", row.Create())
}

func (ipHelper) deleteRoute(e entry) error {
	if err := have("InitializeIpForwardEntry", "DeleteIpForwardEntry2"); err != nil {
		return err
	}
	row, err := rowOf(e)
	if err != nil {
		return err
	}
	return outcome("DeleteIpForwardEntry2", row.Delete())
}

func rowOf(e entry) (*winipcfg.MibIPforwardRow2, error) {
	row := new(winipcfg.MibIPforwardRow2)
	row.Init()
	row.InterfaceLUID = winipcfg.LUID(e.link)
	row.Metric = 0 // the interface's counts
	if err := row.DestinationPrefix.SetPrefix(e.to); err != nil {
		return nil, err
	}
	via := e.via
	if !via.IsValid() {
		via = netip.IPv4Unspecified()
		if e.to.Addr().Is6() {
			via = netip.IPv6Unspecified()
		}
	}
	return row, row.NextHop.SetAddr(via)
}

func (ipHelper) addresses(addr netip.Addr) (as []address, err error) {
	if err := have("GetUnicastIpAddressTable", "FreeMibTable"); err != nil {
		return nil, err
	}
	rows, err := winipcfg.GetUnicastIPAddressTable(familyOf(addr))
	if err != nil {
		return nil, fmt.Errorf("GetUnicastIpAddressTable: %w", err)
	}
	for _, r := range rows {
		if r.Address.Addr().Unmap().WithZone("") == addr {
			as = append(as, address{addr: addr, link: uint64(r.InterfaceLUID), state: dad(r.DadState)})
		}
	}
	return as, nil
}

func (ipHelper) addAddress(a address) error {
	if err := have("CreateUnicastIpAddressEntry", "DeleteUnicastIpAddressEntry", "InitializeUnicastIpAddressEntry"); err != nil {
		return err
	}
	row := new(winipcfg.MibUnicastIPAddressRow)
	row.Init()
	row.InterfaceLUID = winipcfg.LUID(a.link)
	row.OnLinkPrefixLength = uint8(a.addr.BitLen())
	row.DadState = winipcfg.DadStatePreferred // optimistic, from Windows 10 on
	row.ValidLifetime, row.PreferredLifetime = math.MaxUint32, math.MaxUint32
	row.SkipAsSource = true
	if err := row.Address.SetAddr(a.addr); err != nil {
		return err
	}
	return outcome("CreateUnicastIpAddressEntry", row.Create())
}

func (ipHelper) deleteAddress(a address) error {
	if err := have("InitializeUnicastIpAddressEntry", "DeleteUnicastIpAddressEntry"); err != nil {
		return err
	}
	row := new(winipcfg.MibUnicastIPAddressRow)
	row.Init()
	row.InterfaceLUID = winipcfg.LUID(a.link)
	if err := row.Address.SetAddr(a.addr); err != nil {
		return err
	}
	return outcome("DeleteUnicastIpAddressEntry", row.Delete())
}

// outcome names the call, and tells what is no failure apart.
func outcome(call string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, windows.ERROR_OBJECT_ALREADY_EXISTS):
		return fmt.Errorf("%s: %w", call, errExists)
	case errors.Is(err, windows.ERROR_NOT_FOUND):
		return fmt.Errorf("%s: %w", call, errGone)
	}
	return fmt.Errorf("%s: %w", call, err)
}

func (ipHelper) name(link uint64) string {
	i, err := winipcfg.LUID(link).Interface()
	if err != nil {
		return fmt.Sprintf("#%d", link)
	}
	return i.Alias()
}

func familyOf(a netip.Addr) winipcfg.AddressFamily {
	if a.Is6() {
		return windows.AF_INET6
	}
	return windows.AF_INET
}
