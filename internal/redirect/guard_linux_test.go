package redirect

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// calls are one of each kind.
func (b *guardBench) calls() []call {
	return []call{
		{"bridged container, IPv4", b.bridged.NS, "tcp 169.254.169.254:80", "forward_imds"},
		{"bridged container, IPv6", b.bridged.NS, "tcp [fd00:ec2::254]:80", "forward_imds"},
		{"bridged container, another port", b.bridged.NS, "tcp 169.254.169.254:8080", "forward_imds"},
		{"bridged container, DNS that Azure does not have there", b.bridged.NS, "udp 169.254.169.254:53", "forward_imds"},
		{"bridged container, WireServer", b.bridged.NS, "tcp 168.63.129.16:80", "forward_wireserver"},
		{"bridged container, WireServer's other port", b.bridged.NS, "tcp 168.63.129.16:32526", "forward_wireserver"},
		{"bridged container, Azure's DNS", b.bridged.NS, "udp 168.63.129.16:53", ""},
		{"bridged container, Azure's DNS over TCP", b.bridged.NS, "tcp 168.63.129.16:53", ""},
		{"bridged container, elsewhere", b.bridged.NS, "tcp 10.88.1.1:80", ""},
		{"macvlan container, IPv4", b.macvlan.NS, "tcp 169.254.169.254:80", "uplink_imds"},
		{"macvlan container, IPv6", b.macvlan.NS, "tcp [fd00:ec2::254]:80", "uplink_imds"},
		{"macvlan container, WireServer", b.macvlan.NS, "tcp 168.63.129.16:80", "uplink_wireserver"},
		{"macvlan container, WireServer's other port", b.macvlan.NS, "tcp 168.63.129.16:32526", "uplink_wireserver"},
		{"macvlan container, Azure's DNS", b.macvlan.NS, "udp 168.63.129.16:53", ""},
		{"macvlan container, elsewhere", b.macvlan.NS, "tcp 10.88.1.1:80", ""},
		{"host, IPv4", b.vm.NS, "tcp 169.254.169.254:80", ""},
		{"host, IPv6", b.vm.NS, "tcp [fd00:ec2::254]:80", ""},
		{"host, WireServer", b.vm.NS, "tcp 168.63.129.16:32526", ""},
	}
}

func TestGuard(t *testing.T) {
	b := newGuardBench(t)
	wantOpen(t, b.calls())
	b.apply(t)
	wantGuarded(t, b.guard, b.calls())
	if repaired, err := b.guard.Ensure(); repaired || err != nil {
		t.Errorf("Ensure with nothing wrong: %v, %v", repaired, err)
	}
	s := b.guard.Status()
	if diff := cmp.Diff(GuardStatus{Table: s.Table, Hook: s.Hook, Cookie: s.Cookie, Devices: []string{"eth0"}}, s); diff != "" || s.Table == "" || s.Hook == "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
	b.guard.Close()
	wantGuarded(t, b.newGuard(t, AzureGuardRules()), without(b.calls(), "uplink_")) // a Guard without program has no counters of it
	for _, c := range b.calls() {
		if strings.HasPrefix(c.counter, "uplink_") && answered(c.from, c.service, patience) {
			t.Errorf("%s: answered after Close", c.name)
		}
	}
}

func without(calls []call, counter string) (rest []call) {
	for _, c := range calls {
		if !strings.HasPrefix(c.counter, counter) {
			rest = append(rest, c)
		}
	}
	return rest
}

// TestGuardNeedsBothHalves: each half lets something pass that the other stops, but
// where the kernel tells who made a packet: then the program stops all of these.
func TestGuardNeedsBothHalves(t *testing.T) {
	b := newGuardBench(t)
	b.nft(t, masquerade)
	reach := func(c *testnet.Container, want bool) bool {
		within := patience
		if want {
			within = longest
		}
		return answered(c.NS, "tcp 169.254.169.254:80", within)
	}
	for _, step := range []struct {
		name             string
		do               func() error
		bridged, macvlan bool
	}{
		{"nothing", func() error { return nil }, true, true},
		{"table alone", b.guard.writeTable, false, true},
		{"both", b.guard.Apply, false, false},
		{"program alone", func() error { b.nft(t, "delete table inet imdsgate"); return nil }, true, false},
	} {
		if step.name == "program alone" {
			// What is forwarded has lost its socket, and is the host's by its source alone.
			step.bridged = !b.guard.Status().Cookie
			b.guard.conn.Close() // now the table can be deleted
		}
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if got := reach(b.bridged, step.bridged); got != step.bridged {
			t.Errorf("%s: masqueraded container: answered %v, want %v", step.name, got, step.bridged)
		}
		if got := reach(b.macvlan, step.macvlan); got != step.macvlan {
			t.Errorf("%s: macvlan container: answered %v, want %v", step.name, got, step.macvlan)
		}
	}
	b.guard.conn = nil
}

// masquerade is what Docker does for its bridges.
const masquerade = `table ip nat {
	chain post {
		type nat hook postrouting priority 100
		oifname "eth0" masquerade
	}
}`

// TestGuardCutsOldConnections: one that was open before hears nothing more, with
// or without conntrack, whose established entries are asked by nobody.
func TestGuardCutsOldConnections(t *testing.T) {
	for name, script := range map[string]string{
		"no_conntrack":   "",
		"masqueraded":    masquerade,
		"accepted_by_ct": "table inet filter {\nchain forward {\ntype filter hook forward priority -400\nct state established accept\n}\n}",
	} {
		t.Run(name, func(t *testing.T) {
			b := newGuardBench(t)
			b.nft(t, script)
			conns := map[string]net.Conn{}
			for who, ns := range map[string]*netns.Handle{"bridged": b.bridged.NS, "macvlan": b.macvlan.NS, "host": b.vm.NS} {
				conns[who] = b.open(t, ns)
			}
			b.apply(t)
			for who, c := range conns {
				within := patience
				if who == "host" {
					within = longest
				}
				c.Write([]byte("x"))
				c.SetReadDeadline(time.Now().Add(within))
				n, _ := c.Read(make([]byte, 1))
				if answered := n > 0; answered != (who == "host") {
					t.Errorf("%s's connection from before: answered %v", who, answered)
				}
			}
			for name, n := range b.counters(t) {
				if (name == "forward_imds" || name == "uplink_imds") && n == 0 {
					t.Errorf("counter %s is 0", name)
				}
			}
		})
	}
}

// open connects to an echo server at the metadata address, and has an answer.
func (b *guardBench) open(t *testing.T, ns *netns.Handle) net.Conn {
	t.Helper()
	l := must[net.Listener](t)(testnet.Listen(b.fabric.NS, "169.254.169.254:0"))
	defer l.Close()
	served := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			served <- c
			echo(c)
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c := must[net.Conn](t)(testnet.Dial(ctx, ns, "tcp", l.Addr().String()))
	t.Cleanup(func() { c.Close(); (<-served).Close() })
	c.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return c
}

func echo(c net.Conn) {
	buf := make([]byte, 1)
	for {
		if _, err := c.Read(buf); err != nil {
			return
		}
		c.Write(buf)
	}
}

func TestGuardRulesAreChecked(t *testing.T) {
	imds := []netip.Addr{IMDS4.Addr()}
	for _, tc := range []struct {
		name  string
		rules GuardRules
		want  string // part of the error
	}{
		{"no_address", GuardRules{}, "no address"},
		{"zero_address", GuardRules{Addresses: make([]netip.Addr, 1)}, "cannot guard"},
		{"mapped_address", GuardRules{Addresses: []netip.Addr{netip.MustParseAddr("::ffff:169.254.169.254")}}, "cannot guard"},
		{"wireserver_ipv6", GuardRules{Addresses: imds, WireServer: IMDS6.Addr()}, "no IPv4 address"},
		{"open_port_zero", GuardRules{Addresses: imds, OpenPorts: []GuardPort{{6, 0}}}, "port 0"},
		{"open_port_of_icmp", GuardRules{Addresses: imds, OpenPorts: []GuardPort{{1, 8}}}, "protocol 1"},
		{"agent_locks_itself_out", GuardRules{Addresses: imds, Host: &HostRules{UIDs: []uint32{4711}}}, "agent itself"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := NewGuard(nil, tc.rules, nil); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
}
