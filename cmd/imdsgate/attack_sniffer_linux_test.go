package main

import (
	"context"
	endian "encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// guarded are the addresses that no attack may reach, except for DNS.
var guarded = []netip.Addr{netip.MustParseAddr(testnet.IMDS4), netip.MustParseAddr(testnet.IMDS6), netip.MustParseAddr(testnet.WireServer)}

// elsewhere is where an attacker sends a last packet: nothing keeps it from that.
var elsewhere = netip.MustParseAddrPort("10.88.1.1:9")

// sighting is a packet that has come to the fabric.
type sighting struct {
	protocol byte
	flags    byte // of TCP
	from, to netip.AddrPort
}

const (
	tcpSYN = 1 << 1
	tcpRST = 1 << 2
)

func (s sighting) String() string {
	protocol := map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[s.protocol]
	if protocol == "" {
		protocol = fmt.Sprintf("protocol %d", s.protocol)
	}
	return fmt.Sprintf("%s from %v to %v", protocol, s.from, s.to)
}

// sniffer sees every packet that comes to the fabric from the VM, before anything
// there could refuse it, and remembers those to guarded addresses and elsewhere.
type sniffer struct {
	f    *os.File
	done chan struct{}

	mu   sync.Mutex
	seen []sighting
	more chan struct{} // closed and replaced at every one
}

func startSniffer(t *testing.T, ns *netns.Handle, device string) *sniffer {
	t.Helper()
	s := &sniffer{done: make(chan struct{}), more: make(chan struct{})}
	if err := ns.Do(func() error { return s.open(device) }); err != nil {
		t.Fatal(err)
	}
	go s.read()
	t.Cleanup(func() { s.f.Close(); <-s.done })
	return s
}

func (s *sniffer) open(device string) error {
	i, err := net.InterfaceByName(device)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	s.f = os.NewFile(uintptr(fd), "packets of "+device)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20); err != nil {
		return err
	}
	var all [2]byte
	endian.BigEndian.PutUint16(all[:], unix.ETH_P_ALL)
	return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: i.Index, Protocol: endian.NativeEndian.Uint16(all[:])})
}

func (s *sniffer) read() {
	defer close(s.done)
	buf := make([]byte, 64<<10)
	for {
		n, err := s.f.Read(buf)
		if err != nil {
			return
		}
		p, ok := parseFrame(buf[:n])
		if !ok || p.to != elsewhere && !slices.Contains(guarded, p.to.Addr()) {
			continue
		}
		s.mu.Lock()
		s.seen = append(s.seen, p)
		close(s.more)
		s.more = make(chan struct{})
		s.mu.Unlock()
	}
}

// lost is how many packets the sniffer was too slow for.
func (s *sniffer) lost() (n uint32, err error) {
	rc, err := s.f.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := rc.Control(func(fd uintptr) {
		var st *unix.TpacketStats
		if st, err = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			n = st.Drops
		}
	})
	return n, errors.Join(err, cerr)
}

// since lists what was seen from the i-th packet on, and where the next will be.
func (s *sniffer) since(i int) ([]sighting, int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.seen[i:]), len(s.seen)
}

// await waits for the last packet from a source port: whatever was sent before it
// has been seen then, if it came at all.
func (s *sniffer) await(ctx context.Context, port uint16) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for i := 0; ; {
		s.mu.Lock()
		fresh, more := s.seen[i:], s.more
		s.mu.Unlock()
		for _, p := range fresh {
			if p.to == elsewhere && p.from.Port() == port {
				return nil
			}
		}
		i += len(fresh)
		select {
		case <-more:
		case <-ctx.Done():
			return fmt.Errorf("not even its last packet, to %v, has arrived", elsewhere)
		}
	}
}

// attacksAmong picks the packets to guarded addresses that one attacker has sent.
func attacksAmong(all []sighting, port uint16) (his []sighting) {
	for _, p := range all {
		if p.to != elsewhere && p.from.Port() == port {
			his = append(his, p)
		}
	}
	return his
}

// parseFrame reads an Ethernet frame. Ports are 0 where there are none.
func parseFrame(b []byte) (sighting, bool) {
	const ethernet = 14
	if len(b) < ethernet {
		return sighting{}, false
	}
	ip := b[ethernet:]
	switch endian.BigEndian.Uint16(b[12:]) {
	case unix.ETH_P_IP:
		if len(ip) < 20 {
			return sighting{}, false
		}
		return parseTransport(ip[9], netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20])), ip[min(4*int(ip[0]&15), len(ip)):])
	case unix.ETH_P_IPV6:
		if len(ip) < 40 {
			return sighting{}, false
		}
		return parseTransport(ip[6], netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40])), ip[40:])
	}
	return sighting{}, false
}

func parseTransport(protocol byte, from, to netip.Addr, b []byte) (sighting, bool) {
	s := sighting{protocol: protocol, from: netip.AddrPortFrom(from, 0), to: netip.AddrPortFrom(to, 0)}
	if protocol != unix.IPPROTO_TCP && protocol != unix.IPPROTO_UDP || len(b) < 4 {
		return s, true
	}
	s.from = netip.AddrPortFrom(from, endian.BigEndian.Uint16(b))
	s.to = netip.AddrPortFrom(to, endian.BigEndian.Uint16(b[2:]))
	if protocol == unix.IPPROTO_TCP && len(b) > 13 {
		s.flags = b[13]
	}
	return s, true
}

// answering are the fabric's services beside the simulator, so that a refusal
// there is not mistaken for a guard's.
var answering = []string{
	"tcp [fd00:ec2::254]:80", "tcp 169.254.169.254:8080", "udp 169.254.169.254:80", "udp 169.254.169.254:53",
	"tcp 168.63.129.16:80", "tcp 168.63.129.16:32526", "tcp 168.63.129.16:53", "udp 168.63.129.16:53",
}

// fabricSays is what they answer.
const fabricSays = "the fabric"

func startAnswering(t *testing.T, ns *netns.Handle) {
	t.Helper()
	var running sync.WaitGroup
	t.Cleanup(running.Wait)
	for _, service := range answering {
		network, address, _ := strings.Cut(service, " ")
		if network == "tcp" {
			l, err := testnet.Listen(ns, address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			running.Go(func() { testnet.Say(l, fabricSays) })
			continue
		}
		var c net.PacketConn
		if err := ns.Do(func() (err error) { c, err = net.ListenPacket(network, address); return err }); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		running.Go(func() { answerDatagrams(c) })
	}
}

func answerDatagrams(c net.PacketConn) {
	buf := make([]byte, 2048)
	for {
		_, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		c.WriteTo([]byte(fabricSays), from)
	}
}
