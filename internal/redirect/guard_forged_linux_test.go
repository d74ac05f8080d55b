package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// pretend makes the macvlan container the VM, by its address, and the fabric
// believe it, as a forged ARP answer would: answers go to the container.
func (b *guardBench) pretend(t *testing.T) {
	t.Helper()
	mustRun(t, b.macvlan.NS, fmt.Sprintf("addr flush dev eth0 scope global\naddr add %s/24 dev eth0\nroute add default via 10.88.1.1\n", b.vm.Addr4), "ip", "-batch", "-")
	mac := hardwareAddr(t, b.macvlan.NS, "eth0")
	mustRun(t, b.fabric.NS, "", "ip", "neigh", "replace", b.vm.Addr4.String(), "lladdr", mac.String(), "dev", "vm1", "nud", "permanent")
}

// TestGuardHostAddressByMacvlan: a container on the uplink that has the host's
// address, both ways, is not the host.
func TestGuardHostAddressByMacvlan(t *testing.T) {
	b := newGuardBench(t)
	b.apply(t)
	if !b.guard.Status().Cookie {
		testnet.Unmet(t, "needs a kernel that tells who made a packet (Linux 6.15)")
	}
	host := []call{
		{"host, IPv4", b.vm.NS, "tcp 169.254.169.254:80", ""},
		{"host, IPv6", b.vm.NS, "tcp [fd00:ec2::254]:80", ""},
		{"host, WireServer", b.vm.NS, "tcp 168.63.129.16:80", ""},
	}
	wantGuarded(t, b.guard, host)
	b.pretend(t)
	calls := []call{
		{"container with the host's address", b.macvlan.NS, "tcp 169.254.169.254:80", "uplink_imds"},
		{"container with the host's address, WireServer", b.macvlan.NS, "tcp 168.63.129.16:80", "uplink_wireserver"},
		{"container with the host's address, Azure's DNS", b.macvlan.NS, "udp 168.63.129.16:53", ""},
		{"container with the host's address, elsewhere", b.macvlan.NS, "tcp 10.88.1.1:80", ""},
	}
	wantGuarded(t, b.guard, calls)
	b.guard.Close()
	b.guard = b.newGuard(t, AzureGuardRules())
	b.guard.cookie = 0 // as on an older kernel
	b.apply(t)
	if b.guard.Status().Cookie {
		t.Error("the status says that the program knows the host's namespace")
	}
	for _, c := range calls { // or the above proves nothing
		c.counter = ""
		if !answered(c.from, c.service, longest) {
			t.Errorf("without the cookie: %s: no answer", c.name)
		}
	}
}

// TestGuardForeignSource: what leaves by the host's own output path with a source
// that is not the host's, to be masqueraded behind it, is dropped there. So ipvlan
// in mode l3 sends what a container makes.
func TestGuardForeignSource(t *testing.T) {
	b := newGuardBench(t)
	b.nft(t, masquerade)
	b.guard.cookie = 0 // the table alone must do
	wire, foreign6 := netip.MustParseAddr(testnet.WireServer), netip.MustParseAddr("fd00:30::9")
	packets := []struct {
		name    string
		packet  []byte
		refused bool
	}{
		{"foreign", udpPacket(b.bridged.Addr4, earThere), true},
		{"foreign_ipv6", ipv6Packet(foreign6, IMDS6.Addr()), true},
		{"foreign_to_wireserver_80", tcpPacket(b.bridged.Addr4, wire, 80), true},
		{"foreign_to_wireserver_32526", tcpPacket(b.bridged.Addr4, wire, 32526), true},
		{"foreign_to_wireserver_dns", tcpPacket(b.bridged.Addr4, wire, 53), false},
		{"foreign_to_elsewhere", udpPacket(b.bridged.Addr4, earElse), false},
		{"host", udpPacket(b.vm.Addr4, earThere), false},
		{"host_ipv6", ipv6Packet(b.vm.Addr6, IMDS6.Addr()), false},
		{"host_to_wireserver_80", tcpPacket(b.vm.Addr4, wire, 80), false},
	}
	for _, p := range packets {
		if err := sendRaw(b.vm.NS, p.packet); err != nil {
			t.Errorf("without the guard: %s: %v", p.name, err)
		}
	}
	b.apply(t)
	for _, p := range packets {
		t.Run(p.name, func(t *testing.T) {
			before := b.counters(t)
			// The sender is told what the output hook drops.
			if err := sendRaw(b.vm.NS, p.packet); errors.Is(err, unix.EPERM) != p.refused || err != nil && !p.refused {
				t.Errorf("send: %v, want it refused %v", err, p.refused)
			}
			for name, n := range b.counters(t) {
				if rose := n > before[name]; rose != (p.refused && name == "output_foreign") {
					t.Errorf("counter %s: %d before, %d after", name, before[name], n)
				}
			}
		})
	}
}

func tcpPacket(from, to netip.Addr, port uint16) []byte {
	transport := make([]byte, 20)
	binary.BigEndian.PutUint16(transport[2:], port)
	transport[12], transport[13] = 5<<4, 1<<1 // a SYN
	return append(ipHeader(from, to, unix.IPPROTO_TCP, 0, len(transport)), transport...)
}

func ipv6Packet(from, to netip.Addr) []byte {
	b := make([]byte, 48)
	b[0], b[5], b[6], b[7] = 0x60, 8, unix.IPPROTO_UDP, 64
	copy(b[8:], from.AsSlice())
	copy(b[24:], to.AsSlice())
	b[43], b[45] = 80, 8
	return b
}

// sendRaw is sendIP for both families.
func sendRaw(ns *netns.Handle, packet []byte) error {
	if packet[0]>>4 == 4 {
		return sendIP(ns, packet)
	}
	return ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, packet, 0, &unix.SockaddrInet6{Addr: [16]byte(packet[24:40])})
	})
}
