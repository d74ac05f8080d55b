package route

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// machine plays the system's table. Its calls can lie, as Wine's netsh does.
type machine struct {
	es []entry
	as []address

	states  []dad  // of an address that is added, look by look; then preferred
	deaf    bool   // adding and deleting succeed, and do nothing
	refused error  // adding is
	faster  func() // somebody who acts just before we add
	removed int
	down    uint64 // an interface, whose routes are not told of
}

func (m *machine) routes(to netip.Prefix) (es []entry, err error) {
	for _, e := range m.es {
		if e.to == to && (m.down == 0 || e.link != m.down) {
			es = append(es, e)
		}
	}
	return es, nil
}

func (m *machine) before() error {
	if m.faster != nil {
		m.faster()
	}
	return m.refused
}

func (m *machine) addRoute(e entry) error {
	if err := m.before(); err != nil || m.deaf {
		return err
	}
	if slices.ContainsFunc(m.es, e.same) {
		return errExists
	}
	m.es = append(m.es, e)
	return nil
}

func (m *machine) deleteRoute(e entry) error {
	m.removed++
	if m.deaf {
		return nil
	}
	n := len(m.es)
	if m.es = slices.DeleteFunc(m.es, e.same); len(m.es) == n {
		return errGone
	}
	return nil
}

func (m *machine) addresses(a netip.Addr) (as []address, err error) {
	for i, x := range m.as {
		if x.addr != a {
			continue
		}
		as = append(as, x)
		if len(m.states) > 0 {
			m.as[i].state, m.states = m.states[0], m.states[1:]
		} else {
			m.as[i].state = preferred
		}
	}
	return as, nil
}

func (m *machine) addAddress(a address) error {
	if err := m.before(); err != nil || m.deaf {
		return err
	}
	if len(m.as) > 0 && m.as[0].addr == a.addr {
		return errExists
	}
	a.state = tentative
	m.as = append(m.as, a)
	return nil
}

func (m *machine) deleteAddress(a address) error {
	m.removed++
	if m.deaf {
		return nil
	}
	n := len(m.as)
	m.as = slices.DeleteFunc(m.as, func(x address) bool { return x.addr == a.addr && x.link == a.link })
	if len(m.as) == n {
		return errGone
	}
	return nil
}

func (m *machine) name(link uint64) string { return "nic" + string(rune('0'+link)) }

var service = netip.MustParseAddr("169.254.169.254")

func e(to, via string, link, metric uint64) entry {
	return entry{netip.MustParsePrefix(to), netip.MustParseAddr(via), link, metric}
}

func twoNICs() []entry {
	return []entry{e("0.0.0.0/0", "10.0.0.1", 1, 50), e("0.0.0.0/0", "172.17.0.1", 2, 25)}
}

// TestHostRoute holds what is done to a table, and what is found in it at the end.
func TestHostRoute(t *testing.T) {
	const host = "169.254.169.254/32"
	for _, tc := range []struct {
		name string
		m    machine
		want string // the route or the error
		left []entry
	}{
		{"lowest_metric_wins", machine{es: twoNICs()}, "169.254.169.254 via 172.17.0.1 dev nic2", twoNICs()},
		{"on_link_default", machine{es: []entry{e("0.0.0.0/0", "0.0.0.0", 1, 1)}}, "169.254.169.254 dev nic1", []entry{e("0.0.0.0/0", "0.0.0.0", 1, 1)}},
		{"no_default", machine{}, "error: route to 169.254.169.254: there is no default route", nil},
		{"the_same_is_left_alone", machine{es: append(twoNICs(), e(host, "172.17.0.1", 2, 1))}, "169.254.169.254 via 172.17.0.1 dev nic2 (was there)",
			append(twoNICs(), e(host, "172.17.0.1", 2, 1))},
		{"another_way_is_reported", machine{es: append(twoNICs(), e(host, "10.0.0.1", 1, 1))},
			"169.254.169.254 via 10.0.0.1 dev nic1 (was there, and is not the way of the default route, which is by 172.17.0.1)", append(twoNICs(), e(host, "10.0.0.1", 1, 1))},
		{"another_way_without_a_default", machine{es: []entry{e(host, "10.0.0.1", 1, 1)}}, "169.254.169.254 via 10.0.0.1 dev nic1 (was there)", []entry{e(host, "10.0.0.1", 1, 1)}},
		{"success_without_effect", machine{es: twoNICs(), deaf: true}, "error: route to 169.254.169.254: read back: " + ErrNotThere.Error(), twoNICs()},
		{"refused", machine{es: twoNICs(), refused: errors.New("access denied")}, "error: route to 169.254.169.254: access denied", twoNICs()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := &hostRoute{table: &tc.m, to: service}
			ctx, cancel := context.WithCancel(t.Context())
			var got string
			err := h.keep(ctx, nil, func(r Route, err error) { got = r.String(); cancel() })
			if err != nil {
				got = "error: " + err.Error()
			}
			if got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
			if diff := cmp.Diff(tc.left, tc.m.es, cmp.AllowUnexported(entry{}), byValue()); diff != "" {
				t.Errorf("left in the table (-want +got):\n%s", diff)
			}
		})
	}
}

func byValue() cmp.Option {
	return cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })}
}

// TestHostRouteIsKept takes the route away, moves the default route, and puts
// another's in its place.
func TestHostRouteIsKept(t *testing.T) {
	m := &machine{es: twoNICs()}
	h := &hostRoute{table: m, to: service}
	ctx, cancel := context.WithCancel(t.Context())
	tick, told := make(chan time.Time), make(chan string)
	ended := make(chan error, 1)
	go func() {
		ended <- h.keep(ctx, tick, func(r Route, err error) {
			if err != nil {
				told <- err.Error()
				return
			}
			told <- r.String()
		})
	}()
	want := func(text string) {
		t.Helper()
		if got := <-told; got != text {
			t.Errorf("got  %s\nwant %s", got, text)
		}
	}
	want("169.254.169.254 via 172.17.0.1 dev nic2")
	step := func(change func()) { change(); tick <- time.Time{} }
	step(func() { m.es = twoNICs() })
	want("169.254.169.254 via 172.17.0.1 dev nic2")
	step(func() { m.es[1].metric = 75 })
	want("169.254.169.254 via 10.0.0.1 dev nic1")
	step(func() { m.es = nil })
	want("route to 169.254.169.254: there is no default route")
	step(func() { m.es = append(twoNICs(), e("169.254.169.254/32", "10.0.0.9", 1, 1)) })
	want("169.254.169.254 via 10.0.0.9 dev nic1 (was there, and is not the way of the default route, which is by 172.17.0.1)")
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if len(m.es) != 3 {
		t.Errorf("another's route was not left alone: %v", m.es)
	}
}

// TestRouteOnInterfaceThatWasDown comes back with it, and is ours still.
func TestRouteOnInterfaceThatWasDown(t *testing.T) {
	for _, tc := range []struct {
		name string
		back bool // while we keep the route, not only at the end
	}{{"back_before_the_end", true}, {"back_at_the_end", false}} {
		t.Run(tc.name, func(t *testing.T) {
			m := &machine{es: twoNICs()}
			h := &hostRoute{table: m, to: service}
			ensure := func(want string) {
				t.Helper()
				r, _, err := h.ensure()
				if err != nil || r.String() != want {
					t.Errorf("got %v, %v, want %s", r, err, want)
				}
			}
			ensure("169.254.169.254 via 172.17.0.1 dev nic2")
			m.down = 2
			ensure("169.254.169.254 via 10.0.0.1 dev nic1")
			if tc.back {
				m.down = 0
				ensure("169.254.169.254 via 172.17.0.1 dev nic2")
			}
			if err := h.remove(); err != nil {
				t.Error(err)
			}
			m.down = 0
			if diff := cmp.Diff(twoNICs(), m.es, cmp.AllowUnexported(entry{}), byValue()); diff != "" {
				t.Errorf("left in the table (-want +got):\n%s", diff)
			}
		})
	}
}

// TestRouteThatStays is a removal that the system only claims.
func TestRouteThatStays(t *testing.T) {
	m := &machine{es: twoNICs()}
	h := &hostRoute{table: m, to: service}
	if _, _, err := h.ensure(); err != nil {
		t.Fatal(err)
	}
	if _, put, err := h.ensure(); put || err != nil {
		t.Errorf("a route that stands was written again, or %v", err)
	}
	m.deaf = true
	if err := h.remove(); !errors.Is(err, ErrNotThere) {
		t.Errorf("got %v, want %v", err, ErrNotThere)
	}
}

func newAlias(m *machine) *Alias {
	return &Alias{table: m, addr: service, after: func(time.Duration) <-chan time.Time {
		c := make(chan time.Time, 1)
		c <- time.Time{}
		return c
	}}
}

func TestAlias(t *testing.T) {
	for _, tc := range []struct {
		name    string
		m       machine
		want    string // error; empty is none
		ours    bool
		link    string
		removed int // calls, after Remove
	}{
		{"usable_at_once", machine{es: twoNICs(), states: []dad{preferred}}, "", true, "nic2", 1},
		{"waits_out_detection", machine{es: twoNICs(), states: slices.Repeat([]dad{tentative}, 30)}, "", true, "nic2", 1},
		{"never_usable", machine{es: twoNICs(), states: slices.Repeat([]dad{tentative}, 500)}, "address 169.254.169.254: not usable after 10s", false, "", 1},
		{"a_neighbour_has_it", machine{es: twoNICs(), states: []dad{tentative, duplicate}}, "address 169.254.169.254: the address is in use on this network", false, "", 1},
		{"invalid", machine{es: twoNICs(), states: []dad{invalid}}, "address 169.254.169.254: the system says that it is not valid", false, "", 1},
		{"was_there", machine{es: twoNICs(), as: []address{{service, 1, preferred}}}, "", false, "nic1", 0},
		{"was_there_and_is_tentative", machine{es: twoNICs(), as: []address{{service, 1, tentative}}, states: []dad{tentative, preferred}}, "", false, "nic1", 0},
		{"was_there_without_a_default", machine{as: []address{{service, 1, preferred}}}, "", false, "nic1", 0},
		{"no_default", machine{}, "address 169.254.169.254: there is no default route", false, "", 0},
		{"success_without_effect", machine{es: twoNICs(), deaf: true}, "address 169.254.169.254: read back: " + ErrNotThere.Error(), false, "", 1},
		{"refused", machine{es: twoNICs(), refused: errors.New("access denied")}, "address 169.254.169.254: access denied", false, "", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			was := slices.Clone(tc.m.as)
			a := newAlias(&tc.m)
			got := ""
			if err := a.add(t.Context()); err != nil {
				got = err.Error()
			}
			if got != tc.want || a.Ours() != tc.ours {
				t.Errorf("got %q, ours %v, want %q, %v", got, a.Ours(), tc.want, tc.ours)
			}
			if got == "" && a.Link() != tc.link {
				t.Errorf("got it on %s, want %s", a.Link(), tc.link)
			}
			if err := a.Remove(); err != nil {
				t.Error(err)
			}
			if len(tc.m.as) != len(was) || tc.m.removed != tc.removed {
				t.Errorf("left %v after %d removals, want %v after %d", tc.m.as, tc.m.removed, was, tc.removed)
			}
		})
	}
}

// TestAliasSomebodyIsFaster leaves to another what the other has added.
func TestAliasSomebodyIsFaster(t *testing.T) {
	m := &machine{es: twoNICs()}
	m.faster = func() { m.as = []address{{service, 1, preferred}} }
	a := newAlias(m)
	if err := a.add(t.Context()); err != nil || a.Ours() {
		t.Errorf("got %v, ours %v", err, a.Ours())
	}
	if err := a.Remove(); err != nil || len(m.as) != 1 {
		t.Errorf("another's address was removed: %v", err)
	}
}

func TestAliasIsPutBack(t *testing.T) {
	m := &machine{es: twoNICs()}
	a := newAlias(m)
	if err := a.add(t.Context()); err != nil {
		t.Fatal(err)
	}
	if repaired, err := a.Ensure(t.Context()); repaired || err != nil {
		t.Errorf("got %v, %v, want nothing to do", repaired, err)
	}
	m.as = nil
	if repaired, err := a.Ensure(t.Context()); !repaired || err != nil || len(m.as) != 1 {
		t.Errorf("got %v, %v, want it put back", repaired, err)
	}
	m.deaf = true
	if err := a.Remove(); !errors.Is(err, ErrNotThere) {
		t.Errorf("removal without effect: got %v, want %v", err, ErrNotThere)
	}
	m.as = nil // somebody else did
	m.deaf = false
	if err := a.Remove(); err != nil {
		t.Error(err)
	}
}

func TestAliasGivesUpWhenCancelled(t *testing.T) {
	m := &machine{es: twoNICs(), states: slices.Repeat([]dad{tentative}, 500)}
	a := newAlias(m)
	a.after = func(time.Duration) <-chan time.Time { return nil }
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.add(ctx); !errors.Is(err, context.Canceled) || len(m.as) != 0 {
		t.Errorf("got %v, left %v", err, m.as)
	}
}

func TestPlans(t *testing.T) {
	there := &machine{es: append(twoNICs(), e("169.254.169.254/32", "10.0.0.1", 1, 1)), as: []address{{service, 1, preferred}}}
	fresh := &machine{es: twoNICs()}
	for _, tc := range []struct {
		name string
		plan func(table, netip.Addr) ([]string, error)
		m    *machine
		want []string
	}{
		{"address", planAlias, fresh, []string{
			`add address 169.254.169.254/32 to interface "nic2" (default route by 172.17.0.1, metric 25), never as a source, until the end or the next start of the network`,
			"read it back, and wait until it can be used (10s at most)",
			"at the end remove address 169.254.169.254, and read that back"}},
		{"address_is_there", planAlias, there, []string{`leave address 169.254.169.254 alone: interface "nic1" has it already`}},
		{"address_without_default", planAlias, &machine{}, []string{"error: address 169.254.169.254: there is no default route"}},
		{"route", planRoute, fresh, []string{
			"add route to 169.254.169.254 via 172.17.0.1 dev nic2, active store only (default route of metric 25), and read it back",
			"look every 2s whether it is there",
			"at the end remove route to 169.254.169.254, and read that back"}},
		{"route_is_there", planRoute, there, []string{"leave alone: route to 169.254.169.254 via 10.0.0.1 dev nic1 (was there), though the default route is by 172.17.0.1"}},
		{"route_without_default", planRoute, &machine{}, []string{"error: route to 169.254.169.254: there is no default route"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			es, as := slices.Clone(tc.m.es), slices.Clone(tc.m.as)
			got, err := tc.plan(tc.m, service)
			if err != nil {
				got = []string{"error: " + err.Error()}
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
			if !slices.Equal(es, tc.m.es) || len(as) != len(tc.m.as) {
				t.Error("a plan has changed something")
			}
		})
	}
}
