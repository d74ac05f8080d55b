package netns

import (
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// ListenTransparent opens a TCP listener on a free port of addr, which must be
// a loopback address, in the namespace of the calling thread: call it inside Do.
//
// Transparent, because the answers carry an address that the namespace does not
// own (needs CAP_NET_ADMIN there). Plain TCP, never MPTCP: sk_lookup cannot
// assign such a socket. backlog bounds how many connections wait in the kernel,
// about 7 KiB each.
func ListenTransparent(addr netip.Addr, backlog int) (*os.File, uint16, error) {
	family, level, option := unix.AF_INET, unix.SOL_IP, unix.IP_TRANSPARENT
	if addr.Is6() {
		family, level, option = unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		return nil, 0, fmt.Errorf("listen %v: socket: %w", addr, err)
	}
	f := os.NewFile(uintptr(fd), "listener "+addr.String())
	port, err := bindAndListen(fd, addr, level, option, backlog)
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("listen %v: %w", addr, err)
	}
	return f, port, nil
}

func bindAndListen(fd int, addr netip.Addr, level, option, backlog int) (uint16, error) {
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		return 0, fmt.Errorf("set transparent: %w", err)
	}
	// Accepted connections occupy the service's port 80 in this namespace. They
	// inherit this option, and with it leave 0.0.0.0:80 free for an app that sets
	// it too, as nearly all servers do (net/ipv4/inet_connection_sock.c).
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return 0, fmt.Errorf("set reuseaddr: %w", err)
	}
	if addr.Is6() {
		if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return 0, fmt.Errorf("set v6only: %w", err)
		}
	}
	if err := unix.Bind(fd, sockaddr(addr, 0)); err != nil {
		return 0, fmt.Errorf("bind: %w", err)
	}
	if err := unix.Listen(fd, backlog); err != nil {
		return 0, err
	}
	return LocalPort(fd)
}

func sockaddr(addr netip.Addr, port int) unix.Sockaddr {
	if addr.Is6() {
		return &unix.SockaddrInet6{Addr: addr.As16(), Port: port}
	}
	return &unix.SockaddrInet4{Addr: addr.As4(), Port: port}
}

// LocalPort is the port that a TCP socket is bound to.
func LocalPort(fd int) (uint16, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return 0, fmt.Errorf("local address: %w", err)
	}
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(a.Port), nil
	case *unix.SockaddrInet6:
		return uint16(a.Port), nil
	}
	return 0, fmt.Errorf("local address: not an internet socket")
}

// Listening reports whether the socket is still a listener. One that was
// destroyed from inside its namespace (ss -K) is not.
func Listening(f *os.File) bool {
	rc, err := f.SyscallConn()
	if err != nil {
		return false
	}
	var on int
	if cerr := rc.Control(func(fd uintptr) {
		on, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	}); cerr != nil || err != nil {
		return false
	}
	return on == 1
}
