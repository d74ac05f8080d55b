package discover

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// sighting is a container as the locator sees it.
type sighting struct {
	id     string
	names  []string
	state  string // "running" and others
	labels map[string]string
	mode   string                // of its network: "host", "container:ID" or a network's name
	addrs  map[string]netip.Addr // by network; the zero value as long as it does not run
}

func (c sighting) running() bool { return c.state == "running" }

func (c sighting) name() string {
	if len(c.names) > 0 {
		return c.names[0]
	}
	return c.id
}

func (c sighting) String() string {
	if c.running() {
		return c.name()
	}
	return c.name() + " (" + c.state + ")"
}

// called reports whether this is its name, or the beginning of its id.
func (c sighting) called(name string) bool {
	return slices.Contains(c.names, name) || len(name) >= 12 && strings.HasPrefix(c.id, name)
}

func (c sighting) has(label string) bool {
	key, value, withValue := strings.Cut(label, "=")
	got, ok := c.labels[key]
	return ok && (!withValue || got == value)
}

// pick chooses one address, or says why it cannot. It never guesses.
func (l *Locator) pick(all []sighting) (Place, error) {
	proxy, err := l.proxy(all)
	if err != nil {
		return Place{}, err
	}
	whose, err := networkOf(proxy, all)
	if err != nil {
		return Place{}, err
	}
	fit := maps.Clone(whose.addrs)
	maps.DeleteFunc(fit, func(_ string, a netip.Addr) bool { return !a.IsValid() })
	if len(fit) == 0 {
		return Place{}, notLocated("container %s has no address of its own: its network is %q", proxy, whose.mode)
	}
	seen := pairsOf(fit)
	if l.Network != "" {
		maps.DeleteFunc(fit, func(network string, _ netip.Addr) bool { return network != l.Network })
		if len(fit) == 0 {
			return Place{}, notLocated("container %s has no address on network %q; seen: %s", proxy, l.Network, seen)
		}
	}
	shared := false
	if l.Client != "" {
		if shared, err = l.keepShared(fit, all); err != nil {
			return Place{}, err
		}
		if len(fit) == 0 {
			return Place{}, notLocated("containers %[1]s and %[2]s share no network; %[1]s has %[3]s", proxy, l.Client, seen)
		}
	}
	if len(fit) > 1 && !shared {
		return Place{}, notLocated("container %s has an address on each of several networks: %s", proxy, seen)
	}
	network := slices.Sorted(maps.Keys(fit))[0] // where several are shared, any will do
	return Place{Name: proxy.name(), ID: proxy.id, Network: network, Addr: fit[network]}, nil
}

func notLocated(format string, args ...any) error {
	return &NotLocatedError{Why: fmt.Sprintf(format, args...)}
}

// proxy is the one running container that fits.
func (l *Locator) proxy(all []sighting) (sighting, error) {
	what, fits := fmt.Sprintf("with the label %q", l.Label), func(c sighting) bool { return c.has(l.Label) }
	if l.Name != "" {
		what, fits = fmt.Sprintf("with the name %q", l.Name), func(c sighting) bool { return c.called(l.Name) }
	}
	var running, others []sighting
	for _, c := range all {
		switch {
		case !fits(c):
		case c.running():
			running = append(running, c)
		default:
			others = append(others, c)
		}
	}
	switch {
	case len(running) == 1:
		return running[0], nil
	case len(running) > 1:
		return sighting{}, notLocated("%d running containers %s, want one: %s", len(running), what, listOf(running))
	case len(others) > 0:
		return sighting{}, notLocated("no running container %s; seen: %s", what, listOf(others))
	}
	return sighting{}, notLocated("no container %s; running are: %s", what, listOf(slices.DeleteFunc(slices.Clone(all), func(c sighting) bool { return !c.running() })))
}

// networkOf follows a container to the one whose network it shares.
func networkOf(c sighting, all []sighting) (sighting, error) {
	for range 8 { // they cannot go round in a circle, but who knows
		whose, joins := strings.CutPrefix(c.mode, "container:")
		if !joins {
			return c, nil
		}
		i := slices.IndexFunc(all, func(o sighting) bool { return o.called(whose) })
		if i < 0 {
			return c, notLocated("container %s shares the network of %s, which is not there", c, whose)
		}
		c = all[i]
	}
	return c, notLocated("container %s shares a network by too many steps", c)
}

// keepShared leaves the addresses that the client can reach, and reports whether
// it can reach all that are left. A client on the host's network reaches bridges
// of all kinds, but not every network.
func (l *Locator) keepShared(fit map[string]netip.Addr, all []sighting) (bool, error) {
	i := slices.IndexFunc(all, func(c sighting) bool { return c.called(l.Client) })
	if i < 0 {
		return false, notLocated("there is no container %q for the address; seen: %s", l.Client, listOf(all))
	}
	c, err := networkOf(all[i], all)
	if err != nil {
		return false, err
	}
	if c.mode == "host" {
		return false, nil
	}
	maps.DeleteFunc(fit, func(network string, _ netip.Addr) bool {
		_, has := c.addrs[network]
		return !has
	})
	return true, nil
}

// pairsOf lists addresses with their networks, never put together.
func pairsOf(addrs map[string]netip.Addr) string {
	var s []string
	for _, network := range slices.Sorted(maps.Keys(addrs)) {
		s = append(s, network+": "+addrs[network].String())
	}
	return strings.Join(s, ", ")
}

// listOf names containers, by name, and not all of very many.
func listOf(cs []sighting) string {
	if len(cs) == 0 {
		return "none"
	}
	const most = 10
	var s []string
	for _, c := range cs {
		s = append(s, c.String())
	}
	slices.Sort(s)
	if more := len(s) - most; more > 0 {
		s = append(s[:most], fmt.Sprintf("and %d more", more))
	}
	return strings.Join(s, ", ")
}
