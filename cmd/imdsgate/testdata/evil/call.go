package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// calling is a call and the ways in which it is not like all others.
type calling struct {
	udp      bool
	host     string // as it was written
	to       netip.AddrPort
	device   string     // SO_BINDTODEVICE
	mapped   bool       // by an IPv6 socket, as ::ffff:a.b.c.d
	fastopen bool       // with the request in the SYN
	via      netip.Addr // first hop of a source route
}

// call asks for the instance's facts, or anything else where that is no HTTP.
func call(a *attacker, args []string) error {
	var c calling
	fs := flag.NewFlagSet("call", flag.ContinueOnError)
	fs.StringVar(&c.device, "device", "", "")
	fs.BoolVar(&c.mapped, "mapped", false, "")
	fs.BoolVar(&c.fastopen, "fastopen", false, "")
	fs.TextVar(&c.via, "via", netip.Addr{}, "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 2 {
		return fmt.Errorf("call: want a protocol and a target, not %q", fs.Args())
	}
	c.udp = fs.Arg(0) == "udp"
	var err error
	if c.host, c.to, err = target(fs.Arg(1)); err != nil {
		return err
	}
	fd, err := c.socket(a.from)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request := fmt.Appendf(nil, "GET /metadata/instance?api-version=2021-02-01 HTTP/1.1\r\nHost: %s\r\nMetadata: true\r\nConnection: close\r\n\r\n", c.host)
	sent, err := c.connect(fd, request)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if !sent {
		unix.Write(fd, request) // who speaks first has closed already, and is heard below
	}
	a.Said, err = hear(fd, c.udp)
	return err
}

// target reads HOST:PORT, where the host is whatever inet_aton(3) takes for an
// address, as C programs do, or an IPv6 address in brackets.
func target(s string) (host string, to netip.AddrPort, err error) {
	if to, err := netip.ParseAddrPort(s); err == nil {
		host, _, _ := strings.Cut(s, "]")
		if to.Addr().Is6() {
			return host + "]", to, nil
		}
		return to.Addr().String(), to, nil
	}
	host, port, _ := strings.Cut(s, ":")
	p, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return "", to, err
	}
	addr, err := aton(host)
	return host, netip.AddrPortFrom(addr, uint16(p)), err
}

// aton reads one to four numbers, decimal, octal (0…) or hexadecimal (0x…), of
// which the last fills what the others have left.
func aton(s string) (netip.Addr, error) {
	parts := strings.Split(s, ".")
	var all uint64
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 0, 32)
		last := i == len(parts)-1
		if err != nil || len(parts) > 4 || !last && n > 255 || last && n >= 1<<(8*(5-len(parts))) {
			return netip.Addr{}, fmt.Errorf("no address: %q", s)
		}
		if last {
			all |= n
		} else {
			all |= n << (8 * (3 - i))
		}
	}
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(all))
	return netip.AddrFrom4(b), nil
}

func (c *calling) six() bool { return c.mapped || c.to.Addr().Is6() }

func (c *calling) socket(from uint16) (int, error) {
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	if c.six() {
		family = unix.AF_INET6
	}
	if c.udp {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	if err := c.prepare(fd, from); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (c *calling) prepare(fd int, from uint16) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if c.device != "" {
		if err := unix.BindToDevice(fd, c.device); err != nil {
			return fmt.Errorf("bind to %s: %w", c.device, err)
		}
	}
	if c.via.IsValid() {
		if err := sourceRoute(fd, c.via); err != nil {
			return fmt.Errorf("source route: %w", err)
		}
	}
	if c.fastopen {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_NO_COOKIE, 1); err != nil {
			return fmt.Errorf("fast open: %w", err)
		}
	}
	any := netip.IPv4Unspecified()
	if c.six() {
		any = netip.IPv6Unspecified()
	}
	if c.mapped {
		any = netip.AddrFrom16(netip.IPv4Unspecified().As16())
	}
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(any, from))); err != nil {
		return fmt.Errorf("bind to port %d: %w", from, err)
	}
	return nil
}

// sourceRoute asks for loose source routing (RFC 791, 3.1): the packet is addressed
// to the hop, which is to send it on.
func sourceRoute(fd int, hop netip.Addr) error {
	const lsrr, noop, firstAddress = 131, 1, 4
	option := append([]byte{noop, lsrr, 7, firstAddress}, hop.AsSlice()...)
	return unix.SetsockoptString(fd, unix.SOL_IP, unix.IP_OPTIONS, string(option))
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// connect connects, and says whether the request went with it.
func (c *calling) connect(fd int, request []byte) (sent bool, err error) {
	to := c.to
	if c.mapped {
		to = netip.AddrPortFrom(netip.AddrFrom16(to.Addr().As16()), to.Port())
	}
	if c.fastopen {
		var n int
		n, err = unix.SendmsgN(fd, request, nil, sockaddr(to), unix.MSG_FASTOPEN)
		sent = n > 0
	} else {
		err = unix.Connect(fd, sockaddr(to))
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return sent, err
	}
	if err := await(fd, unix.POLLOUT); err != nil {
		return sent, err
	}
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil || code == 0 {
		return sent, err
	}
	return sent, unix.Errno(code)
}

// await waits until something can be done with a socket.
func await(fd int, what int16) error {
	for deadline := time.Now().Add(patience); ; {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("timed out after %v", patience)
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: what}}
		n, err := unix.Poll(fds, int(left.Milliseconds())+1)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// hear reads to the end, or one datagram, and returns the first line.
func hear(fd int, datagram bool) (string, error) {
	var all []byte
	buf := make([]byte, 64<<10)
	for len(all) < 1<<20 {
		if err := await(fd, unix.POLLIN); err != nil {
			return "", fmt.Errorf("read: %w", err)
		}
		n, err := unix.Read(fd, buf)
		if n > 0 {
			all = append(all, buf[:n]...)
		}
		if err != nil && len(all) == 0 {
			return "", fmt.Errorf("read: %w", err)
		}
		if n <= 0 || datagram {
			break
		}
	}
	line, _, _ := bytes.Cut(all, []byte("\r\n"))
	return string(line), nil
}

// lastPacket is a datagram by way of the container's plain routes.
func (a *attacker) lastPacket(to netip.AddrPort) error {
	c := calling{udp: true, to: to}
	fd, err := c.socket(a.from)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, []byte("end"), 0, sockaddr(to))
}
