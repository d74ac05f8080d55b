package main

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// packet sends a SYN with a header of its own making (CAP_NET_RAW).
func packet(a *attacker, args []string) error {
	var source netip.Addr
	fs := flag.NewFlagSet("packet", flag.ContinueOnError)
	fs.TextVar(&source, "source", netip.Addr{}, "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(fs.Arg(0))
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	syn := synPacket(netip.AddrPortFrom(source, a.from), to)
	return unix.Sendto(fd, syn, 0, &unix.SockaddrInet4{Addr: to.Addr().As4()})
}

// frame sends a SYN in an Ethernet frame to a neighbour, past all routes and rules
// of the container (CAP_NET_RAW). The type is what the sender claims that the frame
// contains.
func frame(a *attacker, args []string) error {
	var neighbour netip.Addr
	fs := flag.NewFlagSet("frame", flag.ContinueOnError)
	fs.TextVar(&neighbour, "to", netip.Addr{}, "")
	kind := fs.Uint("type", unix.ETH_P_IP, "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(fs.Arg(0))
	if err != nil {
		return err
	}
	mac, err := a.hardwareAddr(neighbour)
	if err != nil {
		return err
	}
	own, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	source, err := ownAddr(own)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	bytes := append(append([]byte{}, mac...), own.HardwareAddr...)
	bytes = binary.BigEndian.AppendUint16(bytes, unix.ETH_P_IP)
	bytes = append(bytes, synPacket(netip.AddrPortFrom(source, a.from), to)...)
	var says [2]byte
	binary.BigEndian.PutUint16(says[:], uint16(*kind))
	return unix.Sendto(fd, bytes, 0, &unix.SockaddrLinklayer{Ifindex: own.Index, Protocol: binary.NativeEndian.Uint16(says[:])})
}

func ownAddr(i *net.Interface) (netip.Addr, error) {
	all, err := i.Addrs()
	if err != nil {
		return netip.Addr{}, err
	}
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
			return p.Addr(), nil
		}
	}
	return netip.Addr{}, fmt.Errorf("%s has no IPv4 address", i.Name)
}

// hardwareAddr asks the kernel for a neighbour's address.
func (a *attacker) hardwareAddr(of netip.Addr) (net.HardwareAddr, error) {
	if err := a.lastPacket(netip.AddrPortFrom(of, 9)); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		table, err := os.ReadFile("/proc/net/arp")
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(table)) {
			// IP address, HW type, flags (2: complete), HW address, mask, device.
			if f := strings.Fields(line); len(f) > 3 && f[0] == of.String() && f[2] == "0x2" {
				return net.ParseMAC(f[3])
			}
		}
	}
	return nil, errors.New("no neighbour " + of.String())
}

// synPacket is an IPv4 packet that asks for a connection.
func synPacket(from, to netip.AddrPort) []byte {
	const header, syn = 20, 2
	b := make([]byte, 2*header)
	ip, tcp := b[:header], b[header:]
	ip[0], ip[8], ip[9] = 4<<4|header/4, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(b)))
	copy(ip[12:], from.Addr().AsSlice())
	copy(ip[16:], to.Addr().AsSlice())
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	binary.BigEndian.PutUint16(tcp[0:], from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	binary.BigEndian.PutUint32(tcp[4:], 4711)
	tcp[12], tcp[13] = header/4<<4, syn
	binary.BigEndian.PutUint16(tcp[14:], 1<<15)
	pseudo := append(append([]byte{}, ip[12:20]...), 0, unix.IPPROTO_TCP, 0, header)
	binary.BigEndian.PutUint16(tcp[16:], checksum(append(pseudo, tcp...)))
	return b
}

// checksum is that of RFC 1071, of an even number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
