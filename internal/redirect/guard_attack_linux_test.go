package redirect

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// Where the fabric listens for single packets: at the metadata address, and
// elsewhere, to know when one that was sent before must have come.
var (
	earThere = netip.MustParseAddrPort("169.254.169.254:9999")
	earElse  = netip.MustParseAddrPort("10.88.1.1:9999")
)

// ears counts packets on the fabric.
type ears struct{ there, elsewhere *net.UDPConn }

func (b *guardBench) ears(t *testing.T) *ears {
	t.Helper()
	open := func(at netip.AddrPort) (c *net.UDPConn) {
		err := b.fabric.NS.Do(func() (err error) {
			c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	return &ears{open(earThere), open(earElse)}
}

// hear counts what has arrived at the metadata address. Everything sent before
// the call is counted: a packet sent the same way to elsewhere, after it, must
// come in between.
func (e *ears) hear(t *testing.T, send func(to netip.AddrPort) error) (n int) {
	t.Helper()
	if err := send(earElse); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	e.elsewhere.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := e.elsewhere.Read(buf); err != nil {
		t.Fatalf("not even a packet to elsewhere arrives: %v", err)
	}
	for {
		e.there.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if _, err := e.there.Read(buf); err != nil {
			return n
		}
		n++
	}
}

// udpPacket is an IPv4 packet with a datagram.
func udpPacket(from netip.Addr, to netip.AddrPort) []byte {
	b := ipHeader(from, to.Addr(), unix.IPPROTO_UDP, 0, 12)
	b = binary.BigEndian.AppendUint16(b, 40000)
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint16(b, 12)
	return append(b, 0, 0, 'p', 'o', 's', 't') // no checksum
}

func ipHeader(from, to netip.Addr, protocol byte, fragment uint16, payload int) []byte {
	b := make([]byte, 20)
	b[0], b[8], b[9] = 0x45, 64, protocol
	binary.BigEndian.PutUint16(b[2:], uint16(20+payload))
	binary.BigEndian.PutUint16(b[6:], fragment)
	copy(b[12:], from.AsSlice())
	copy(b[16:], to.AsSlice())
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum+sum>>16))
	return b
}

// sendIP sends a packet with a header of our own making (CAP_NET_RAW).
func sendIP(ns *netns.Handle, packet []byte) error {
	return ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: [4]byte(packet[16:20])})
	})
}

// sendFrame sends a whole Ethernet frame (CAP_NET_RAW) by eth0. says is what the
// sender claims that the frame contains.
func sendFrame(ns *netns.Handle, gateway net.HardwareAddr, says uint16, packet []byte) error {
	return ns.Do(func() error {
		i, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		frame := append(append([]byte{}, gateway...), i.HardwareAddr...)
		frame = append(binary.BigEndian.AppendUint16(frame, unix.ETH_P_IP), packet...)
		var proto [2]byte
		binary.BigEndian.PutUint16(proto[:], says)
		err = unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: i.Index, Protocol: binary.NativeEndian.Uint16(proto[:])})
		if errors.Is(err, unix.ENOBUFS) {
			err = nil // the packet was refused further down
		}
		return err
	})
}

func hardwareAddr(t *testing.T, ns *netns.Handle, name string) (a net.HardwareAddr) {
	t.Helper()
	err := ns.Do(func() error {
		i, err := net.InterfaceByName(name)
		if err == nil {
			a = i.HardwareAddr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestGuardAttacks sends single packets by every way that a container has, sees
// them arrive without the guard, and not with it.
func TestGuardAttacks(t *testing.T) {
	b := newGuardBench(t)
	e := b.ears(t)
	bridge, fabric := hardwareAddr(t, b.vm.NS, "br0"), hardwareAddr(t, b.fabric.NS, "vm1")
	neighbour := must[*testnet.Container](t)(b.vm.NewContainer("neighbour"))
	t.Cleanup(neighbour.Close)
	attacks := []struct {
		name    string
		counter string
		send    func(to netip.AddrPort) error
	}{
		{"raw_ip_packet", "forward_imds", func(to netip.AddrPort) error {
			return sendIP(b.bridged.NS, udpPacket(b.bridged.Addr4, to))
		}},
		{"source_of_a_neighbour", "forward_imds", func(to netip.AddrPort) error {
			return sendIP(b.bridged.NS, udpPacket(neighbour.Addr4, to))
		}},
		{"source_of_the_service", "forward_imds", func(to netip.AddrPort) error {
			return sendIP(b.bridged.NS, udpPacket(netip.MustParseAddr("10.88.1.77"), to))
		}},
		{"ethernet_frame", "forward_imds", func(to netip.AddrPort) error {
			return sendFrame(b.bridged.NS, bridge, unix.ETH_P_IP, udpPacket(b.bridged.Addr4, to))
		}},
		{"ethernet_frame_by_macvlan", "uplink_imds", func(to netip.AddrPort) error {
			return sendFrame(b.macvlan.NS, fabric, unix.ETH_P_IP, udpPacket(b.macvlan.Addr4, to))
		}},
		{"ethernet_frame_by_macvlan_that_claims_to_be_none", "uplink_imds", func(to netip.AddrPort) error {
			return sendFrame(b.macvlan.NS, fabric, 0x88b5, udpPacket(b.macvlan.Addr4, to))
		}},
		{"source_of_a_bridged_container_by_macvlan", "uplink_imds", func(to netip.AddrPort) error {
			return sendIP(b.macvlan.NS, udpPacket(b.bridged.Addr4, to))
		}},
		{"source_of_a_container_by_the_host's_output", "output_foreign", func(to netip.AddrPort) error {
			err := sendIP(b.vm.NS, udpPacket(b.bridged.Addr4, to))
			if errors.Is(err, unix.EPERM) {
				err = nil // the host itself is told what the output hook drops
			}
			return err
		}},
	}
	for _, a := range attacks {
		if err := a.send(earThere); err != nil {
			t.Fatalf("%s: %v", a.name, err)
		}
		if n := e.hear(t, a.send); n != 1 {
			t.Errorf("without the guard: %s: %d packets arrive, want 1", a.name, n)
		}
	}
	b.apply(t)
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			before := b.counters(t)
			if err := a.send(earThere); err != nil {
				t.Fatal(err)
			}
			if n := e.hear(t, a.send); n != 0 {
				t.Errorf("%d packets arrive", n)
			}
			if after := b.counters(t); after[a.counter] != before[a.counter]+1 {
				t.Errorf("counter %s: %d before, %d after", a.counter, before[a.counter], after[a.counter])
			}
		})
	}
}

// TestGuardFragments: what has no port, or only half of one, does not get to the
// WireServer as something else.
func TestGuardFragments(t *testing.T) {
	b := newGuardBench(t)
	b.apply(t)
	e := b.ears(t)
	wire := netip.MustParseAddr(testnet.WireServer)
	for _, tc := range []struct {
		name     string
		fragment uint16
		port     uint16
		refused  bool
	}{
		{"whole_to_dns", 0, 53, false},
		{"dont_fragment_is_no_fragment", 0x4000, 53, false},
		{"whole_to_80", 0, 80, true},
		{"first_fragment_to_dns", 0x2000, 53, true},
		{"last_fragment", 0x0003, 53, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for counter, c := range map[string]*testnet.Container{"forward_wireserver": b.bridged, "uplink_wireserver": b.macvlan} {
				before := b.counters(t)[counter]
				transport := make([]byte, 24)
				binary.BigEndian.PutUint16(transport[2:], tc.port)
				packet := append(ipHeader(c.Addr4, wire, unix.IPPROTO_TCP, tc.fragment, len(transport)), transport...)
				if err := sendIP(c.NS, packet); err != nil {
					t.Fatal(err)
				}
				e.hear(t, func(to netip.AddrPort) error { return sendIP(c.NS, udpPacket(c.Addr4, to)) })
				if rose := b.counters(t)[counter] == before+1; rose != tc.refused {
					t.Errorf("%s: refused %v, want %v", c.Name, rose, tc.refused)
				}
			}
		})
	}
}

// TestGuardDNAT: a rule of the host that rewrites another address to the metadata
// service opens nothing.
func TestGuardDNAT(t *testing.T) {
	b := newGuardBench(t)
	b.nft(t, `table ip nat {
		chain pre {
			type nat hook prerouting priority -100
			ip daddr 10.1.1.1 dnat to 169.254.169.254
		}
	}`)
	calls := []call{{"rewritten_by_the_host", b.bridged.NS, "tcp 10.1.1.1:80", "forward_imds"}}
	wantOpen(t, calls)
	b.apply(t)
	wantGuarded(t, b.guard, calls)
}

// TestGuardBridgedUplink: where the uplink itself is a port of a bridge, a
// container on it is bridged to the fabric, and no forward hook sees it.
func TestGuardBridgedUplink(t *testing.T) {
	b := newGuardBench(t)
	mustRun(t, b.macvlan.NS, "", "ip", "link", "del", "eth0") // a device is one or the other
	mustRun(t, b.vm.NS, strings.Join([]string{
		"link add br1 type bridge", "link set br1 up",
		"addr flush dev eth0", "link set eth0 master br1",
		"addr add 10.88.1.4/24 dev br1", "route add default via 10.88.1.1",
		"link set veth2 nomaster", "link set veth2 master br1",
	}, "\n"), "ip", "-batch", "-")
	mustRun(t, b.bridged.NS, "addr flush dev eth0\naddr add 10.88.1.77/24 dev eth0\nroute add default via 10.88.1.1\n", "ip", "-batch", "-")
	calls := []call{
		{"container_on_the_uplink's_bridge", b.bridged.NS, "tcp 169.254.169.254:80", "uplink_imds"},
		{"host", b.vm.NS, "tcp 169.254.169.254:80", ""},
	}
	wantOpen(t, calls)
	if err := b.guard.writeTable(); err != nil {
		t.Fatal(err)
	}
	wantOpen(t, calls) // with the table alone
	b.apply(t)
	wantGuarded(t, b.guard, calls)
}

// TestGuardOpenPorts: on some clouds the address is the VM's DNS and NTP server
// too.
func TestGuardOpenPorts(t *testing.T) {
	b := newGuardBench(t)
	rules := GuardRules{
		Addresses: []netip.Addr{IMDS4.Addr(), IMDS6.Addr()},
		OpenPorts: []GuardPort{{unix.IPPROTO_UDP, 53}, {unix.IPPROTO_UDP, 123}},
	}
	b.guard = b.newGuard(t, rules)
	calls := []call{
		{"bridged container, DNS", b.bridged.NS, "udp 169.254.169.254:53", ""},
		{"bridged container, NTP, IPv6", b.bridged.NS, "udp [fd00:ec2::254]:123", ""},
		{"bridged container, metadata", b.bridged.NS, "tcp 169.254.169.254:80", "forward_imds"},
		{"macvlan container, DNS", b.macvlan.NS, "udp 169.254.169.254:53", ""},
		{"macvlan container, NTP, IPv6", b.macvlan.NS, "udp [fd00:ec2::254]:123", ""},
		{"macvlan container, metadata", b.macvlan.NS, "tcp 169.254.169.254:80", "uplink_imds"},
		{"no WireServer on this cloud", b.bridged.NS, "tcp 168.63.129.16:80", ""},
	}
	wantOpen(t, calls)
	b.apply(t)
	wantGuarded(t, b.guard, calls)
	if repaired, err := b.guard.Ensure(); repaired || err != nil {
		t.Errorf("Ensure with nothing wrong: %v, %v", repaired, err)
	}
}
