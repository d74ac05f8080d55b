package discover

import (
	"errors"
	"net/netip"
	"testing"
)

// on is a map of addresses: network, address, network, address…; an empty address
// is none.
func on(pairs ...string) map[string]netip.Addr {
	m := make(map[string]netip.Addr)
	for i := 0; i < len(pairs); i += 2 {
		a := netip.Addr{}
		if pairs[i+1] != "" {
			a = netip.MustParseAddr(pairs[i+1])
		}
		m[pairs[i]] = a
	}
	return m
}

func TestPick(t *testing.T) {
	label := map[string]string{"MSIProxyContainer": ""}
	proxy := sighting{id: "aaaaaaaaaaaa1111", names: []string{"proxy"}, state: "running", labels: label, mode: "default", addrs: on("bridge", "172.17.0.2")}
	two := sighting{id: "aaaaaaaaaaaa2222", names: []string{"two"}, state: "running", labels: label, mode: "front", addrs: on("front", "172.18.0.2", "back", "172.19.0.2")}
	web := sighting{id: "bbbbbbbbbbbb", names: []string{"web", "front/alias"}, state: "running", mode: "default", addrs: on("bridge", "172.17.0.3")}
	back := sighting{id: "cccccccccccc", names: []string{"back"}, state: "running", mode: "back", addrs: on("back", "172.19.0.3")}
	made := sighting{id: "dddddddddddd", names: []string{"made"}, state: "created", mode: "back", addrs: on("back", "")}
	side := sighting{id: "eeeeeeeeeeee", names: []string{"side"}, state: "running", mode: "container:" + back.id, addrs: on()}
	host := sighting{id: "ffffffffffff", names: []string{"host"}, state: "running", mode: "host", addrs: on("host", "")}
	gone := proxy
	gone.id, gone.names, gone.state, gone.addrs = "999999999999", []string{"old"}, "exited", on("bridge", "")
	both := sighting{id: "888888888888", names: []string{"both"}, state: "running", mode: "front", addrs: on("front", "172.18.0.4", "back", "172.19.0.4")}
	joined := side
	joined.names, joined.labels = []string{"joined"}, label
	v6 := sighting{id: "777777777777", names: []string{"v6"}, state: "running", labels: label, addrs: on("six", "fd00::2")}
	onHost := host
	onHost.labels, onHost.names = label, []string{"on-host"}
	lost := side
	lost.labels, lost.mode = label, "container:nobody"
	circle := side
	circle.labels, circle.mode = label, "container:side"

	for _, tc := range []struct {
		name string
		l    Locator
		all  []sighting
		want string // network and address, or the reason
	}{
		{"one_address", Locator{Label: "MSIProxyContainer"}, []sighting{web, proxy, gone}, "bridge 172.17.0.2"},
		{"ipv6_only", Locator{Label: "MSIProxyContainer"}, []sighting{v6}, "six fd00::2"},
		{"label_with_value", Locator{Label: "MSIProxyContainer="}, []sighting{proxy}, "bridge 172.17.0.2"},
		{"label_with_other_value", Locator{Label: "MSIProxyContainer=yes"}, []sighting{proxy, web}, `no container with the label "MSIProxyContainer=yes"; running are: proxy, web`},
		{"label_in_another_case", Locator{Label: "msiproxycontainer"}, []sighting{proxy}, `no container with the label "msiproxycontainer"; running are: proxy`},
		{"by_name", Locator{Name: "web", Label: "MSIProxyContainer"}, []sighting{proxy, web}, "bridge 172.17.0.3"},
		{"by_id", Locator{Name: "bbbbbbbbbbbb"}, []sighting{proxy, web}, "bridge 172.17.0.3"},
		{"by_beginning_of_name", Locator{Name: "we"}, []sighting{web}, `no container with the name "we"; running are: web`},
		{"by_too_little_of_the_id", Locator{Name: "bbbb"}, []sighting{web}, `no container with the name "bbbb"; running are: web`},

		{"nothing_there", Locator{Label: "MSIProxyContainer"}, nil, `no container with the label "MSIProxyContainer"; running are: none`},
		{"not_running", Locator{Label: "MSIProxyContainer"}, []sighting{gone, web}, `no running container with the label "MSIProxyContainer"; seen: old (exited)`},
		{"two_proxies", Locator{Label: "MSIProxyContainer"}, []sighting{two, proxy}, `2 running containers with the label "MSIProxyContainer", want one: proxy, two`},

		{"two_addresses_are_never_put_together", Locator{Name: "two"}, []sighting{two}, "container two has an address on each of several networks: back: 172.19.0.2, front: 172.18.0.2"},
		{"two_addresses_by_network", Locator{Name: "two", Network: "front"}, []sighting{two}, "front 172.18.0.2"},
		{"not_on_that_network", Locator{Name: "two", Network: "bridge"}, []sighting{two}, `container two has no address on network "bridge"; seen: back: 172.19.0.2, front: 172.18.0.2`},
		{"two_addresses_by_client", Locator{Name: "two", Client: "back"}, []sighting{two, back}, "back 172.19.0.2"},
		{"client_not_started_yet", Locator{Name: "two", Client: "made"}, []sighting{two, made}, "back 172.19.0.2"},
		{"client_in_anothers_network", Locator{Name: "two", Client: "side"}, []sighting{two, side, back}, "back 172.19.0.2"},
		{"client_shares_several", Locator{Name: "two", Client: "both"}, []sighting{two, both}, "back 172.19.0.2"},
		{"client_shares_none", Locator{Name: "two", Client: "web"}, []sighting{two, web}, "containers two and web share no network; two has back: 172.19.0.2, front: 172.18.0.2"},
		{"client_is_not_there", Locator{Name: "two", Client: "nobody"}, []sighting{two, made}, `there is no container "nobody" for the address; seen: made (created), two`},
		{"client_on_the_host", Locator{Name: "proxy", Client: "host"}, []sighting{proxy, host}, "bridge 172.17.0.2"},
		{"client_on_the_host_two_addresses", Locator{Name: "two", Client: "host"}, []sighting{two, host}, "container two has an address on each of several networks: back: 172.19.0.2, front: 172.18.0.2"},

		{"proxy_in_anothers_network", Locator{Name: "joined"}, []sighting{joined, back}, "back 172.19.0.3"},
		{"proxy_in_the_network_of_nobody", Locator{Name: "side"}, []sighting{lost}, "container side shares the network of nobody, which is not there"},
		{"proxy_in_its_own_circle", Locator{Name: "side"}, []sighting{circle}, "container side shares a network by too many steps"},
		{"proxy_on_the_host", Locator{Name: "on-host"}, []sighting{onHost}, `container on-host has no address of its own: its network is "host"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, err := tc.l.pick(tc.all)
			got := p.Network + " " + p.Addr.String()
			if err != nil {
				got = err.Error()
				var notLocated *NotLocatedError
				if !errors.As(err, &notLocated) || p != (Place{}) {
					t.Errorf("got %+v, %T, want none and a NotLocatedError", p, err)
				}
			}
			if got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

func TestListIsShort(t *testing.T) {
	var many []sighting
	for i := range 13 {
		many = append(many, sighting{names: []string{string(rune('a' + i))}, state: "running"})
	}
	if got, want := listOf(many), "a, b, c, d, e, f, g, h, i, j, and 3 more"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := (sighting{id: "0123"}).String(); got != "0123 ()" {
		t.Errorf("container without name is %q", got)
	}
}
