//go:build unix

package gate

import (
	"errors"
	"net"
	"syscall"
	"testing"

	"imdsgate/internal/audit"
)

// The socket may be held by another process too: stopping must leave it alone.
func TestStopLeavesTheSharedSocket(t *testing.T) {
	g, sink := newGate(t, says("{}"))
	l := listen(t)
	file, err := l.Listener.(*net.TCPListener).File() // a second descriptor of the socket
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	s := start(t, g, l)
	s.stop()
	<-s.done
	p := dial(t, s.addr) // queued by the kernel
	p.send(t, request("GET", instance))
	again, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	l.Listener = again
	start(t, g, l)
	if r, _ := p.response(t, "GET"); r.StatusCode != 200 || sink.next(t).Decision != audit.Allow {
		t.Errorf("got %d, want 200", r.StatusCode)
	}
	p.Close()
}

// A caller with rights in its netns may kill the listening socket (ss -K).
func TestListenerLost(t *testing.T) {
	for name, kill := range map[string]func(*net.TCPListener) error{
		// What ss -K does: Accept fails with EINVAL from then on.
		"killed_in_the_kernel": func(l *net.TCPListener) error {
			raw, err := l.SyscallConn()
			if err != nil {
				return err
			}
			var shut error
			err = raw.Control(func(fd uintptr) { shut = syscall.Shutdown(int(fd), syscall.SHUT_RDWR) })
			return errors.Join(err, shut)
		},
		"closed_by_somebody": func(l *net.TCPListener) error { return l.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			g, sink := newGate(t, says("{}"))
			l := listen(t)
			done := make(chan error, 1)
			go func() { done <- g.Serve(t.Context(), l) }()
			p := dial(t, l.Addr().String())
			ask := func() {
				t.Helper()
				p.send(t, request("GET", instance))
				if r, _ := p.response(t, "GET"); r.StatusCode != 200 || sink.next(t).Decision != audit.Allow {
					t.Errorf("got %d, want 200", r.StatusCode)
				}
			}
			ask()
			if err := kill(l.Listener.(*net.TCPListener)); err != nil {
				t.Fatal(err)
			}
			if err := <-done; !errors.Is(err, ErrListenerLost) {
				t.Errorf("got %v, want %v", err, ErrListenerLost)
			}
			ask() // connections that are open live on
			if err := g.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			p.closed(t)
			if n := held(g); n != 0 {
				t.Errorf("the gate keeps %d listeners, want none", n)
			}
		})
	}
}
