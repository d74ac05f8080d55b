package redirect

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// cgroups makes a tree of cgroups for one test, and returns their directories.
func cgroups(t *testing.T, names ...string) []string {
	t.Helper()
	testnet.Require(t, testnet.Root)
	mounts := must[*os.File](t)(os.Open("/proc/self/mounts"))
	defer mounts.Close()
	root := ""
	for s := bufio.NewScanner(mounts); s.Scan(); {
		if f := strings.Fields(s.Text()); len(f) > 2 && f[2] == "cgroup2" {
			root = filepath.Join(f[1], fmt.Sprintf("guard-test-%d", os.Getpid()))
		}
	}
	if root == "" || os.MkdirAll(root, 0o755) != nil {
		testnet.Unmet(t, "needs a cgroup v2 hierarchy that can be written to")
	}
	t.Cleanup(func() { unix.Rmdir(root) })
	var dirs []string
	for _, name := range names {
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Rmdir(dir) })
		dirs = append(dirs, dir)
	}
	return dirs
}

// askAs calls the metadata service from a process of the host. within is
// patience or longest.
func askAs(t *testing.T, ns *netns.Handle, cgroup string, uid int, within time.Duration, service string) bool {
	t.Helper()
	p := startChild(t, ns, nil, "ask", cgroup, fmt.Sprint(uid), within.String(), service)
	at, err := p.Await(t.Context(), 0, func(line string) bool { return strings.HasPrefix(line, "answered:") })
	if err != nil {
		t.Fatal(err)
	}
	p.Wait() // its cgroup is empty then
	return p.Lines()[at] == "answered: true"
}

// TestGuardHost: with host rules, those who are known pass and the rest of the
// host does not.
func TestGuardHost(t *testing.T) {
	b := newGuardBench(t)
	dirs := cgroups(t, "agent", "agent/below", "listed", "other")
	agent, below, listed, other := dirs[0], dirs[1], dirs[2], dirs[3]
	late := filepath.Join(filepath.Dir(other), "late")
	const nobody, backup = 65534, 34
	rules := AzureGuardRules()
	rules.Host = &HostRules{Agent: agent, UIDs: []uint32{backup}, Cgroups: []string{listed, late}}
	b.guard = b.newGuard(t, rules)
	const imds, wire, dns = "tcp 169.254.169.254:80", "tcp 168.63.129.16:80", "udp 168.63.129.16:53"
	if !askAs(t, b.vm.NS, other, 0, longest, imds) {
		t.Fatal("without the guard: no answer")
	}
	b.apply(t)
	for _, tc := range []struct {
		name    string
		cgroup  string
		uid     int
		service string
		want    bool
	}{
		{"agent", agent, 0, imds, true},
		{"agent_ipv6", agent, 0, "tcp [fd00:ec2::254]:80", true},
		{"below_the_agent", below, nobody, imds, true},
		{"listed_cgroup", listed, nobody, imds, true},
		{"listed_user", other, backup, imds, true},
		{"root", other, 0, imds, false},
		{"root_ipv6", other, 0, "tcp [fd00:ec2::254]:80", false},
		{"user", other, nobody, imds, false},
		{"user_wireserver", other, nobody, wire, false},
		{"user_dns", other, nobody, dns, true},
	} {
		before := b.counters(t)["host"]
		within := patience
		if tc.want {
			within = longest
		}
		if got := askAs(t, b.vm.NS, tc.cgroup, tc.uid, within, tc.service); got != tc.want {
			t.Errorf("%s: answered %v, want %v", tc.name, got, tc.want)
		}
		// What is sent when a socket is closed under its owner has no owner.
		if rose := b.counters(t)["host"] > before; !tc.want && !rose {
			t.Errorf("%s: refused and not counted", tc.name)
		}
	}
	t.Run("cgroup_made_anew", func(t *testing.T) {
		if err := unix.Rmdir(listed); err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{listed, late} {
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		t.Cleanup(func() { unix.Rmdir(late) })
		if askAs(t, b.vm.NS, listed, nobody, patience, imds) {
			t.Error("a cgroup of the same name passes before the guard has looked at it")
		}
		for _, want := range []bool{true, false} {
			if repaired, err := b.guard.Ensure(); repaired != want || err != nil {
				t.Errorf("Ensure: repaired %v, %v, want %v", repaired, err, want)
			}
		}
		for _, dir := range []string{listed, late} {
			if !askAs(t, b.vm.NS, dir, nobody, longest, imds) {
				t.Errorf("%s: no answer", filepath.Base(dir))
			}
		}
	})
	for name, agent := range map[string]string{"agent_not_in_a_cgroup": t.TempDir(), "agent_in_no_cgroup_there_is": filepath.Join(other, "missing")} {
		t.Run(name, func(t *testing.T) {
			rules.Host = &HostRules{Agent: agent}
			if err := b.newGuard(t, rules).Apply(); err == nil || !strings.Contains(err.Error(), agent) {
				t.Errorf("got %v, want an error about %s", err, agent)
			}
		})
	}
}

// TestUplinks picks devices out of made-up hosts.
func TestUplinks(t *testing.T) {
	link := func(index int, name string, change ...func(*netlink.LinkAttrs)) netlink.Link {
		a := netlink.NewLinkAttrs()
		a.Index, a.Name = index, name
		for _, c := range change {
			c(&a)
		}
		return &netlink.Device{LinkAttrs: a}
	}
	master := func(i int) func(*netlink.LinkAttrs) { return func(a *netlink.LinkAttrs) { a.MasterIndex = i } }
	parent := func(i int) func(*netlink.LinkAttrs) { return func(a *netlink.LinkAttrs) { a.ParentIndex = i } }
	elsewhere := func(a *netlink.LinkAttrs) { a.NetNsID = 0 }
	route := func(cidr string, index int) netlink.Route {
		r := netlink.Route{LinkIndex: index, Type: unix.RTN_UNICAST, Family: unix.AF_INET}
		if strings.Contains(cidr, ":") {
			r.Family = unix.AF_INET6
		}
		if cidr != "default" {
			_, r.Dst, _ = net.ParseCIDR(cidr)
		}
		return r
	}
	typed := func(r netlink.Route, kind int) netlink.Route { r.Type = kind; return r }
	lo := link(1, "lo", func(a *netlink.LinkAttrs) { a.Flags = net.FlagLoopback })
	for _, tc := range []struct {
		name   string
		links  []netlink.Link
		routes []netlink.Route
		want   []string
	}{
		{"default_route", []netlink.Link{lo, link(2, "eth0"), link(3, "docker0")},
			[]netlink.Route{route("0.0.0.0/0", 2), route("172.17.0.0/16", 3)}, []string{"eth0"}},
		{"default_route_without_destination", []netlink.Link{link(2, "eth0")}, []netlink.Route{route("default", 2)}, []string{"eth0"}},
		{"link_local_route", []netlink.Link{link(2, "eth0"), link(3, "eth1")},
			[]netlink.Route{route("0.0.0.0/0", 2), route("169.254.0.0/16", 3)}, []string{"eth0", "eth1"}},
		{"ipv6_alone", []netlink.Link{link(2, "eth0"), link(3, "eth1")},
			[]netlink.Route{route("::/0", 3)}, []string{"eth1"}},
		{"route_of_the_service_itself", []netlink.Link{link(2, "eth0")}, []netlink.Route{route("fd00:ec2::254/128", 2)}, []string{"eth0"}},
		{"many_hops", []netlink.Link{link(2, "eth0"), link(3, "eth1")},
			[]netlink.Route{{Type: unix.RTN_UNICAST, Family: unix.AF_INET, MultiPath: []*netlink.NexthopInfo{{LinkIndex: 2}, {LinkIndex: 3}}}}, []string{"eth0", "eth1"}},
		{"another_table", []netlink.Link{link(2, "eth0"), link(3, "ens6")},
			[]netlink.Route{route("0.0.0.0/0", 2), func() netlink.Route { r := route("0.0.0.0/0", 3); r.Table = 77; return r }()}, []string{"eth0", "ens6"}},
		{"port_of_a_bridge_of_a_bond", []netlink.Link{link(2, "eth0", master(3)), link(3, "bond0", master(4)), link(4, "br0"), link(5, "tap0", master(4)), link(6, "tap1", master(7)), link(7, "br1")},
			[]netlink.Route{route("0.0.0.0/0", 4)}, []string{"eth0", "bond0", "br0", "tap0"}},
		{"below_a_vlan", []netlink.Link{link(2, "eth0"), link(3, "eth0.7", parent(2))},
			[]netlink.Route{route("0.0.0.0/0", 3)}, []string{"eth0", "eth0.7"}},
		{"parent_in_another_namespace", []netlink.Link{link(2, "eth0"), link(3, "macvlan0", parent(2), elsewhere)},
			[]netlink.Route{route("0.0.0.0/0", 3)}, []string{"macvlan0"}},
		{"blackhole_and_local", []netlink.Link{lo, link(2, "eth0")},
			[]netlink.Route{typed(route("0.0.0.0/0", 2), unix.RTN_BLACKHOLE), typed(route("169.254.169.254/32", 1), unix.RTN_LOCAL), route("0.0.0.0/0", 1)}, nil},
		{"no_route", []netlink.Link{lo, link(2, "eth0")}, nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := names(uplinks(tc.links, tc.routes, AzureGuardRules().addresses()))
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("devices (-want +got):\n%s", diff)
			}
		})
	}
}
