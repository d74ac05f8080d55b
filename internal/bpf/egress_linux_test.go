package bpf_test

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"imdsgate/internal/bpf"
	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

var (
	imds4 = netip.MustParseAddr(testnet.IMDS4)
	imds6 = netip.MustParseAddr(testnet.IMDS6)
	wire  = netip.MustParseAddr(testnet.WireServer)
)

// loadEgress loads the program with the rules of a cloud that has everything, and
// no cookie: the source address alone decides.
func loadEgress(t *testing.T, host ...netip.Addr) *bpf.Egress {
	t.Helper()
	return loadEgressOf(t, 0, host...)
}

func loadEgressOf(t *testing.T, hostNetns uint64, host ...netip.Addr) *bpf.Egress {
	t.Helper()
	testnet.Require(t, testnet.BPF)
	e, err := bpf.LoadEgress(bpf.EgressRules{
		Addresses:  []netip.Addr{imds4, imds6},
		OpenPorts:  []bpf.EgressPort{{Protocol: unix.IPPROTO_UDP, Number: 123}, {Protocol: unix.IPPROTO_TCP, Number: 53}},
		WireServer: wire,
		HostNetns:  hostNetns,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	if _, err := e.SetHost(host); err != nil {
		t.Fatal(err)
	}
	return e
}

// packet is an IP packet to be written out as bytes.
type packet struct {
	from, to  string
	protocol  byte
	port      uint16 // destination
	fragment  uint16 // IPv4: flags and offset as in the header
	options   int    // IPv4: bytes of options
	extension byte   // IPv6: an extension header of this kind before the transport's
	cut       int    // bytes missing at the end
}

func (p packet) bytes() []byte {
	from, to := netip.MustParseAddr(p.from), netip.MustParseAddr(p.to)
	transport := make([]byte, 20)
	binary.BigEndian.PutUint16(transport, 40000)
	binary.BigEndian.PutUint16(transport[2:], p.port)
	var b []byte
	if to.Is4() {
		b = make([]byte, 20+p.options)
		b[0] = byte(0x40 | len(b)/4)
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)+len(transport)))
		binary.BigEndian.PutUint16(b[6:], p.fragment)
		b[8], b[9] = 64, p.protocol
		copy(b[12:], from.AsSlice())
		copy(b[16:], to.AsSlice())
	} else {
		b = make([]byte, 40)
		b[0], b[6], b[7] = 0x60, p.protocol, 64
		copy(b[8:], from.AsSlice())
		copy(b[24:], to.AsSlice())
		if p.extension != 0 {
			b[6] = p.extension
			b = append(b, p.protocol, 0, 0, 0, 0, 0, 0, 0)
		}
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40+len(transport)))
	}
	b = append(b, transport...)
	return b[:len(b)-p.cut]
}

// ether puts an Ethernet header before a packet. Tags are VLAN ethertypes.
func ether(proto uint16, ip []byte, tags ...uint16) []byte {
	b := make([]byte, 12)
	for _, tag := range tags {
		b = binary.BigEndian.AppendUint16(b, tag)
		b = append(b, 0, 7)
	}
	return append(binary.BigEndian.AppendUint16(b, proto), ip...)
}

const (
	host4, pod4 = "10.0.0.4", "10.0.0.50"
	host6, pod6 = "fd00:1::4", "fd00:1::50"
	tcp, udp    = unix.IPPROTO_TCP, unix.IPPROTO_UDP
)

// TestEgressVerdicts judges single frames. Each pair of a refused and a passing
// row differs in one thing.
func TestEgressVerdicts(t *testing.T) {
	e := loadEgress(t, netip.MustParseAddr(host4), netip.MustParseAddr(host6), netip.MustParseAddr("fe80::1%eth0"))
	for _, tc := range []struct {
		name   string
		p      packet
		refuse string // the counter that rises; "" passes
	}{
		{"host_itself", packet{from: host4, to: testnet.IMDS4, protocol: tcp, port: 80}, ""},
		{"host_itself_ipv6", packet{from: host6, to: testnet.IMDS6, protocol: tcp, port: 80}, ""},
		{"host_link_local_address", packet{from: "fe80::1", to: testnet.IMDS6, protocol: tcp, port: 80}, ""},
		{"container_with_an_address_of_its_own", packet{from: pod4, to: testnet.IMDS4, protocol: tcp, port: 80}, "imds"},
		{"container_with_an_address_of_its_own_ipv6", packet{from: pod6, to: testnet.IMDS6, protocol: tcp, port: 80}, "imds"},
		{"any_port", packet{from: pod4, to: testnet.IMDS4, protocol: tcp, port: 8080}, "imds"},
		{"ping", packet{from: pod4, to: testnet.IMDS4, protocol: unix.IPPROTO_ICMP}, "imds"},
		{"other_destination", packet{from: pod4, to: "169.254.169.253", protocol: tcp, port: 80}, ""},
		{"other_destination_ipv6", packet{from: pod6, to: "fd00:ec2::253", protocol: tcp, port: 80}, ""},
		{"open_port", packet{from: pod4, to: testnet.IMDS4, protocol: udp, port: 123}, ""},
		{"open_port_ipv6", packet{from: pod6, to: testnet.IMDS6, protocol: tcp, port: 53}, ""},
		{"open_port_of_another_protocol", packet{from: pod4, to: testnet.IMDS4, protocol: tcp, port: 123}, "imds"},
		{"open_port_behind_options", packet{from: pod4, to: testnet.IMDS4, protocol: udp, port: 123, options: 8}, ""},
		{"options_do_not_hide_the_port", packet{from: pod4, to: testnet.IMDS4, protocol: udp, port: 80, options: 40}, "imds"},
		{"later_fragment", packet{from: pod4, to: testnet.IMDS4, protocol: udp, port: 123, fragment: 1}, "imds"},
		{"first_fragment_with_open_port", packet{from: pod4, to: testnet.IMDS4, protocol: udp, port: 123, fragment: 0x2000}, "imds"},
		{"dont_fragment_is_no_fragment", packet{from: pod4, to: testnet.IMDS4, protocol: udp, port: 123, fragment: 0x4000}, ""},
		{"ipv6_extension_header", packet{from: pod6, to: testnet.IMDS6, protocol: tcp, port: 53, extension: 60}, "imds"},
		{"ipv6_fragment", packet{from: pod6, to: testnet.IMDS6, protocol: tcp, port: 53, extension: 44}, "imds"},
		{"cut_before_the_port", packet{from: pod4, to: testnet.IMDS4, protocol: udp, port: 123, cut: 18}, "imds"},
		{"wireserver_80", packet{from: pod4, to: testnet.WireServer, protocol: tcp, port: 80}, "wireserver"},
		{"wireserver_32526", packet{from: pod4, to: testnet.WireServer, protocol: tcp, port: 32526}, "wireserver"},
		{"wireserver_80_of_the_host", packet{from: host4, to: testnet.WireServer, protocol: tcp, port: 80}, ""},
		{"wireserver_tcp_53", packet{from: pod4, to: testnet.WireServer, protocol: tcp, port: 53}, ""},
		{"wireserver_udp_53", packet{from: pod4, to: testnet.WireServer, protocol: udp, port: 53}, ""},
		{"wireserver_udp_80", packet{from: pod4, to: testnet.WireServer, protocol: udp, port: 80}, ""},
		{"wireserver_udp_fragment", packet{from: pod4, to: testnet.WireServer, protocol: udp, fragment: 1}, ""},
		{"wireserver_tcp_fragment", packet{from: pod4, to: testnet.WireServer, protocol: tcp, port: 53, fragment: 1}, "wireserver"},
		{"wireserver_tcp_first_fragment", packet{from: pod4, to: testnet.WireServer, protocol: tcp, port: 53, fragment: 0x2000}, "wireserver"},
		{"wireserver_cut_before_the_port", packet{from: pod4, to: testnet.WireServer, protocol: tcp, port: 53, cut: 18}, "wireserver"},
		{"wireserver_80_behind_options", packet{from: pod4, to: testnet.WireServer, protocol: tcp, port: 80, options: 24}, "wireserver"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ip := tc.p.bytes()
			proto := uint16(unix.ETH_P_IP)
			if ip[0]>>4 == 6 {
				proto = unix.ETH_P_IPV6
			}
			for frame, b := range map[string]struct {
				encap string
				bytes []byte
			}{
				"ether":          {"ether", ether(proto, ip)},
				"one_tag":        {"ether", ether(proto, ip, unix.ETH_P_8021Q)},
				"two_tags":       {"ether", ether(proto, ip, unix.ETH_P_8021AD, unix.ETH_P_8021Q)},
				"no_ethernet":    {"none", ip},
				"point_to_point": {"ppp", ip},
			} {
				judge(t, e, frame, b.encap, b.bytes, tc.refuse)
			}
		})
	}
	t.Run("arp", func(t *testing.T) {
		judge(t, e, "ether", "ether", ether(unix.ETH_P_ARP, packet{from: pod4, to: testnet.IMDS4}.bytes()), "")
	})
	t.Run("truncated_header", func(t *testing.T) {
		judge(t, e, "ether", "ether", ether(unix.ETH_P_IP, packet{from: pod4, to: testnet.IMDS4}.bytes()[:19], unix.ETH_P_8021Q), "")
	})
}

// judge runs the program on a frame and wants one counter to rise, or none.
func judge(t *testing.T, e *bpf.Egress, frame, encap string, b []byte, want string) {
	t.Helper()
	before := refused(t, e)
	got, err := e.Judge(encap, b)
	if err != nil {
		t.Fatal(err)
	}
	if got != (want != "") {
		t.Errorf("%s: refused %v, want %v", frame, got, want != "")
	}
	for reason, n := range refused(t, e) {
		if rose := n == before[reason]+1; rose != (reason == want) || !rose && n != before[reason] {
			t.Errorf("%s: counter %s rose from %d to %d, want only %q to rise", frame, reason, before[reason], n, want)
		}
	}
}

func refused(t *testing.T, e *bpf.Egress) map[string]uint64 {
	t.Helper()
	n, err := e.Refused()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestEgressHostAddresses: what is the host's own is what was said last.
func TestEgressHostAddresses(t *testing.T) {
	e := loadEgress(t, netip.MustParseAddr(host4))
	a, b := netip.MustParseAddr(host4), netip.MustParseAddr(pod4)
	for _, tc := range []struct {
		host     []netip.Addr
		changed  bool
		aIn, bIn bool
	}{
		{[]netip.Addr{a}, false, true, false},
		{[]netip.Addr{a, b}, true, true, true},
		{[]netip.Addr{b, b}, true, false, true},
		{nil, true, false, false},
	} {
		changed, err := e.SetHost(tc.host)
		if err != nil || changed != tc.changed {
			t.Errorf("SetHost(%v) = %v, %v, want %v", tc.host, changed, err, tc.changed)
		}
		for from, in := range map[string]bool{host4: tc.aIn, pod4: tc.bIn} {
			got, err := e.Judge("ether", ether(unix.ETH_P_IP, packet{from: from, to: testnet.IMDS4, protocol: tcp, port: 80}.bytes()))
			if err != nil || got == in {
				t.Errorf("host is %v: packet from %s refused %v, %v", tc.host, from, got, err)
			}
		}
	}
}

// TestEgressHostNamespace: the host's address is not enough where the kernel tells
// who made a packet, and a socket of the host is not either.
func TestEgressHostNamespace(t *testing.T) {
	here, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	// The frames that are judged belong to a socket of the calling thread's namespace.
	cookie := here.ID().Cookie
	for _, tc := range []struct {
		name    string
		netns   uint64
		p       packet
		refused string
	}{
		{"host_itself", cookie, packet{from: host4, to: testnet.IMDS4, protocol: tcp, port: 80}, ""},
		{"host_itself_ipv6", cookie, packet{from: host6, to: testnet.IMDS6, protocol: tcp, port: 80}, ""},
		{"foreign_source_by_the_host", cookie, packet{from: pod4, to: testnet.IMDS4, protocol: tcp, port: 80}, "imds"},
		{"host_address_from_elsewhere", cookie + 1, packet{from: host4, to: testnet.IMDS4, protocol: tcp, port: 80}, "imds"},
		{"host_address_from_elsewhere_ipv6", cookie + 1, packet{from: host6, to: testnet.IMDS6, protocol: tcp, port: 80}, "imds"},
		{"host_address_from_elsewhere_to_the_wireserver", cookie + 1, packet{from: host4, to: testnet.WireServer, protocol: tcp, port: 80}, "wireserver"},
		{"host_address_from_elsewhere_to_dns", cookie + 1, packet{from: host4, to: testnet.WireServer, protocol: udp, port: 53}, ""},
		{"host_address_from_elsewhere_to_an_open_port", cookie + 1, packet{from: host4, to: testnet.IMDS4, protocol: udp, port: 123}, ""},
		{"host_address_from_elsewhere_to_elsewhere", cookie + 1, packet{from: host4, to: "169.254.169.253", protocol: tcp, port: 80}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := loadEgressOf(t, tc.netns, netip.MustParseAddr(host4), netip.MustParseAddr(host6))
			if !e.Cookie() {
				testnet.Unmet(t, "needs a kernel that tells who made a packet (Linux 6.15)")
			}
			ip := tc.p.bytes()
			proto := uint16(unix.ETH_P_IP)
			if ip[0]>>4 == 6 {
				proto = unix.ETH_P_IPV6
			}
			judge(t, e, "ether", "ether", ether(proto, ip), tc.refused)
			judge(t, e, "no_ethernet", "none", ip, tc.refused)
		})
	}
	if loadEgress(t).Cookie() {
		t.Error("without a cookie: the program says that it has one")
	}
}

func TestEgressKindOfDevice(t *testing.T) {
	e := loadEgress(t)
	if _, err := e.Ensure(bpf.Device{Index: 1, Name: "ib0", Encap: "infiniband"}); !errors.Is(err, bpf.ErrNotSupported) {
		t.Errorf("frames that the program cannot read: got %v, want ErrNotSupported", err)
	}
}
