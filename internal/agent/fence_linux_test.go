package agent

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/redirect"
	"imdsgate/internal/testnet"
)

// TestMain plays the compromised proxy when it is started as one.
func TestMain(m *testing.M) {
	if os.Getenv("IMDSGATE_TEST_CGROUPNS") != "" {
		if PrivateCgroups() {
			fmt.Print("private")
		}
		os.Exit(0)
	}
	if os.Getenv("IMDSGATE_TEST_LISTEN") != "" {
		listenAgain(3)
		os.Exit(0)
	}
	if to := os.Getenv("IMDSGATE_TEST_RECONNECT"); to != "" {
		fmt.Print(reconnect(3, netip.MustParseAddrPort(to)))
		os.Exit(0)
	}
	os.Exit(testnet.Main(m.Run, func() error { return goleak.Find(goleak.IgnoreTopFunction("os/signal.signal_recv")) }))
}

func init() { runtime.LockOSThread() } // see package main

// reconnect takes a connected socket apart and connects it to something else in
// its own namespace, and says what it reads there.
func reconnect(fd int, to netip.AddrPort) string {
	if err := disconnect(fd); err != nil {
		return "disconnect: " + err.Error()
	}
	bound := ""
	unix.SetNonblock(fd, false)
	var own, sa unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, &unix.SockaddrInet4{Port: int(to.Port())}
	if to.Addr().Is6() {
		own, sa = &unix.SockaddrInet6{Addr: netip.IPv6Loopback().As16()}, &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	} else {
		sa.(*unix.SockaddrInet4).Addr = to.Addr().As4()
	}
	if err := unix.Bind(fd, own); err != nil { // or it would call from the service's address
		bound = ", bind: " + err.Error()
	}
	if err := unix.Connect(fd, sa); err != nil {
		return "connect: " + err.Error() + bound
	}
	buf := make([]byte, 64)
	n, err := unix.Read(fd, buf)
	if err != nil {
		return "read: " + err.Error()
	}
	return "read " + string(buf[:n])
}

func disconnect(fd int) error {
	unspec := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspec)), unsafe.Sizeof(unspec))
	if errno != 0 {
		return errno
	}
	return nil
}

// listenAgain takes a connected socket apart and listens with it on a port of the
// kernel's choosing, says where, and whether somebody came. It tries to spoil
// the socket for others too.
func listenAgain(fd int) {
	for _, o := range []struct{ level, name, value int }{{unix.SOL_IP, unix.IP_MINTTL, 1}, {unix.SOL_SOCKET, unix.SO_RCVBUF, 4096}} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			fmt.Printf("option %d %d: %v\n", o.level, o.name, err)
		}
	}
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 1 << 20}); err != nil {
		fmt.Printf("linger: %v\n", err)
	}
	if err := disconnect(fd); err != nil {
		fmt.Printf("disconnect: %v\n", err)
		return
	}
	if err := unix.Listen(fd, 8); err != nil {
		fmt.Printf("listen: %v\n", err)
		return
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		fmt.Printf("getsockname: %v\n", err)
		return
	}
	a := sa.(*unix.SockaddrInet4)
	fmt.Printf("listening %s\n", netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)))
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1000)
	if n == 1 && err == nil {
		fmt.Println("somebody came")
	} else {
		fmt.Println("nobody came")
	}
}

// TestFenceKeepsSocketsDeaf has a process outside the agent's cgroup listen with a
// connection to the upstream, which lives in the host's namespace, and change
// its options.
func TestFenceKeepsSocketsDeaf(t *testing.T) {
	testnet.Require(t, testnet.BPF)
	for _, tc := range []struct {
		name   string
		fenced bool
		came   string
	}{
		{"proxy_listens_with_a_handed_over_socket", true, "nobody came"},
		{"control_without_fence", false, "somebody came"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			home, err := ownCgroup()
			if err != nil {
				t.Fatal(err)
			}
			upstream := listenLocal(t)
			// The caller is no socket of the agent's.
			caller, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(caller)
			if tc.fenced {
				f, err := RaiseFence(fmt.Sprintf("imdsgate-test-%d", os.Getpid()), upstream)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
			}
			up, err := net.Dial("tcp", upstream.String())
			if err != nil {
				t.Fatal(err)
			}
			f := must[*os.File](t)(up.(*net.TCPConn).File())
			up.Close()
			defer f.Close()
			dir := must[*os.File](t)(os.Open(home))
			defer dir.Close()
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), "IMDSGATE_TEST_LISTEN=1")
			cmd.ExtraFiles = []*os.File{f}
			cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
			out := must[io.ReadCloser](t)(cmd.StdoutPipe())
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var said []string
			for s := bufio.NewScanner(out); s.Scan(); {
				said = append(said, s.Text())
				if at, ok := strings.CutPrefix(s.Text(), "listening "); ok {
					port := netip.MustParseAddrPort(at).Port()
					unix.Connect(caller, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(port)})
				}
			}
			if err := cmd.Wait(); err != nil {
				t.Fatal(err)
			}
			all := strings.Join(said, "; ")
			if len(said) == 0 || said[len(said)-1] != tc.came {
				t.Errorf("got %s, want %s", all, tc.came)
			}
			if n := strings.Count(all, "operation not permitted"); tc.fenced && n != 3 || !tc.fenced && n != 0 {
				t.Errorf("%d options refused: %s", n, all)
			}
		})
	}
}

// TestFence hands sockets to a process outside the agent's cgroup, which tries
// to use them as doors. Without the fence it gets in: the test can fail.
func TestFence(t *testing.T) {
	testnet.Require(t, testnet.BPF)
	for _, tc := range []struct {
		name   string
		fenced bool
		want   string
	}{
		{"proxy_reconnects_a_handed_over_socket", true, "connect: operation not permitted, bind: operation not permitted"},
		{"control_without_fence", false, "read secret"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			home, err := ownCgroup()
			if err != nil {
				t.Fatal(err)
			}
			upstream := listenLocal(t)
			ns := must[*netns.Handle](t)(netns.New())
			defer ns.Close()
			client4, client6 := clientSocket(t, ns, unix.AF_INET), clientSocket(t, ns, unix.AF_INET6)
			if tc.fenced {
				f, err := RaiseFence(fmt.Sprintf("imdsgate-test-%d", os.Getpid()), upstream)
				if err != nil {
					t.Fatal(err)
				}
				defer func() {
					if n, err := f.Refused(); err != nil || n < 8 {
						t.Errorf("Refused = %d, %v, want 8 at least", n, err)
					}
					if err := f.Close(); err != nil {
						t.Error(err)
					}
					if now, _ := ownCgroup(); now != home {
						t.Errorf("cgroup is %s after Close, was %s", now, home)
					}
				}()
			}
			r := must[*redirect.Redirector](t)(redirect.New(redirect.SkLookup))
			att := must[*redirect.Attachment](t)(r.Attach(ns))
			defer att.Close()
			secret4, secret6 := secretIn(t, ns, "127.0.0.1:0"), secretIn(t, ns, "[::1]:0")

			accepted4 := acceptOne(t, client4, att.V4, redirect.IMDS4)
			try(t, "accepted", home, accepted4, secret4, tc.want)
			accepted6 := acceptOne(t, client6, att.V6, redirect.IMDS6)
			try(t, "accepted6", home, accepted6, secret6, tc.want)
			try(t, "listener", home, att.V4, secret4, tc.want)

			// The connection to the upstream lives in the host's namespace.
			up, err := net.Dial("tcp", upstream.String())
			if err != nil {
				t.Fatalf("the agent itself cannot dial the upstream: %v", err)
			}
			defer up.Close()
			f := must[*os.File](t)(up.(*net.TCPConn).File())
			defer f.Close()
			try(t, "upstream", home, f, listenLocal(t), tc.want)
			if !tc.fenced {
				return
			}
			if c, err := net.Dial("tcp", listenLocal(t).String()); err == nil {
				c.Close()
				t.Error("the agent itself can dial something else")
			}
		})
	}
}

// try gives fd to a process in the home cgroup.
func try(t *testing.T, what, home string, fd *os.File, to netip.AddrPort, want string) {
	t.Helper()
	dir := must[*os.File](t)(os.Open(home))
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "IMDSGATE_TEST_RECONNECT="+to.String())
	cmd.ExtraFiles = []*os.File{fd}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	out, err := cmd.CombinedOutput()
	if got := string(out); err != nil || !strings.HasPrefix(got, want) {
		t.Errorf("%s: got %q (%v), want %q", what, got, err, want)
	}
}

func must[T any](t *testing.T) func(v T, err error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// listenLocal listens on the machine's own loopback and says "secret".
func listenLocal(t *testing.T) netip.AddrPort {
	t.Helper()
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	t.Cleanup(func() { l.Close() })
	go testnet.Say(l, "secret")
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// secretIn listens on a namespace's private loopback.
func secretIn(t *testing.T, ns *netns.Handle, address string) netip.AddrPort {
	t.Helper()
	l := must[net.Listener](t)(testnet.Listen(ns, address))
	t.Cleanup(func() { l.Close() })
	go testnet.Say(l, "secret")
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// clientSocket makes a socket that belongs to the container: in its namespace,
// and in another cgroup than the agent's if called before the fence is raised.
func clientSocket(t *testing.T, ns *netns.Handle, family int) int {
	t.Helper()
	fd := -1
	err := ns.Do(func() error {
		var err error
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// acceptOne has the container call, and returns the accepted connection.
func acceptOne(t *testing.T, client int, listener *os.File, to netip.AddrPort) *os.File {
	t.Helper()
	l := must[net.Listener](t)(net.FileListener(listener))
	defer l.Close()
	var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: redirect.IMDS4.Addr().As4(), Port: 80}
	if to.Addr().Is6() {
		sa = &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: 80}
	}
	if err := unix.Connect(client, sa); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	f := must[*os.File](t)(c.(*net.TCPConn).File())
	c.Close()
	t.Cleanup(func() { f.Close() })
	return f
}
