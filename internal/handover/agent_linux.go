package handover

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/workload"
)

// Attachment is one namespace's listeners on their way. V6 and Link may be nil.
type Attachment struct {
	ID       uint64 // chosen by the agent, never zero, never reused
	Netns    netns.ID
	Method   string
	Workload workload.Workload
	V4, V6   *os.File
	Link     *os.File
}

// Discard closes this process's descriptors of an attachment that came from the
// other side. It does not wait for that: closing a stranger's socket may block.
func (a *Attachment) Discard() {
	closeAll(slices.DeleteFunc([]*os.File{a.V4, a.V6, a.Link}, func(f *os.File) bool { return f == nil }))
}

// InUseError says that another agent serves the socket.
type InUseError struct {
	Path string
	PID  string // of the first agent, as it wrote it
}

func (e *InUseError) Error() string {
	return fmt.Sprintf("%s: another agent is running: pid %s", e.Path, e.PID)
}

// Listener is the agent's end of the socket.
type Listener struct {
	l    *net.UnixListener
	lock *os.File
	uid  int

	// Stale reports that a socket was there already: an agent served it before,
	// and a proxy may be on its way back with what that agent opened.
	Stale bool
}

// Listen opens the socket at path, in a folder that is there, for a proxy that runs
// as uid. Errors: *InUseError when an agent serves it already, os.ErrNotExist when
// the folder is missing.
func Listen(path string, uid int) (*Listener, error) {
	lock, err := lockSocket(path)
	if err != nil {
		return nil, err
	}
	l := &Listener{lock: lock, uid: uid}
	if err := l.listen(path); err != nil {
		lock.Close()
		return nil, err
	}
	return l, nil
}

func (l *Listener) listen(path string) error {
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != os.ModeSocket {
			return fmt.Errorf("%s: is there already and is no socket", path)
		}
		l.Stale = true
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	ul, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return err
	}
	// The socket stays when the agent goes: it tells the next one to wait a moment
	// for the proxy.
	ul.SetUnlinkOnClose(false)
	err = os.Chmod(path, 0o600)
	if err == nil && os.Geteuid() != l.uid {
		err = os.Lchown(path, l.uid, -1)
	}
	if err != nil {
		ul.Close()
		return err
	}
	l.l = ul
	return nil
}

// lockSocket takes the lock beside the socket, which dies with its holder.
func lockSocket(path string) (*os.File, error) {
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		defer f.Close()
		b := make([]byte, 16)
		n, _ := f.ReadAt(b, 0)
		return nil, &InUseError{Path: path, PID: strings.TrimSpace(string(b[:n]))}
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
}

// Close stops listening. Proxies that are connected stay so.
func (l *Listener) Close() error { return errors.Join(l.l.Close(), l.lock.Close()) }

// Accept waits for a connection from a process that may be the proxy: one that
// runs as the proxy's uid or as the agent's own. Others are closed at once and
// reported by an error that does not end the listener (net.ErrClosed does).
func (l *Listener) Accept() (*Proxy, error) {
	c, err := l.l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	cred, err := peerCred(c)
	if err != nil {
		c.Close()
		return nil, err
	}
	if int(cred.Uid) != l.uid && int(cred.Uid) != os.Geteuid() {
		c.Close()
		return nil, fmt.Errorf("refused pid %d: uid %d is not the proxy's (%d)", cred.Pid, cred.Uid, l.uid)
	}
	return &Proxy{PID: int(cred.Pid), UID: int(cred.Uid), c: newConn(c)}, nil
}

func peerCred(c *net.UnixConn) (*unix.Ucred, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var kerr error
	err = rc.Control(func(fd uintptr) { cred, kerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return cred, errors.Join(err, kerr)
}

// Proxy is a connected proxy, as the agent sees it.
type Proxy struct {
	PID, UID int // as the kernel says
	c        *conn
}

// Hello reads what the proxy holds. Nothing in it is proved yet: every
// attachment must be checked against the kernel. They are the caller's to close.
func (p *Proxy) Hello() ([]*Attachment, error) {
	p.c.c.SetReadDeadline(time.Now().Add(helloTimeout))
	defer p.c.c.SetReadDeadline(time.Time{})
	m, files, err := p.c.recv()
	if err != nil {
		return nil, err
	}
	closeAll(files)
	switch {
	case m.Type != typeHello || m.Count < 0 || m.Count > maxHeld:
		return nil, fmt.Errorf("%w: want hello, got %q", errProtocol, m.Type)
	case m.Version != protocolVersion:
		return nil, fmt.Errorf("proxy speaks version %d, agent %d: run both from one release", m.Version, protocolVersion)
	}
	var held []*Attachment
	for range m.Count {
		a, err := p.readHeld()
		if err != nil {
			for _, a := range held {
				a.Discard()
			}
			return nil, err
		}
		held = append(held, a)
	}
	return held, nil
}

func (p *Proxy) readHeld() (*Attachment, error) {
	m, files, err := p.c.recv()
	if err != nil {
		return nil, err
	}
	if m.Type != typeHeld || m.ID == 0 {
		closeAll(files)
		return nil, fmt.Errorf("%w: want held, got %q", errProtocol, m.Type)
	}
	m.Workload = nil // who it is, no proxy has a say in; and thousands would be much
	return m.attachment(files), nil
}

// attachment puts a message's descriptors where they belong.
func (m *message) attachment(files []*os.File) *Attachment {
	a := &Attachment{ID: m.ID, Netns: m.Netns, Method: m.Method}
	if m.Workload != nil {
		a.Workload = *m.Workload
	}
	a.V4, files = files[0], files[1:]
	if m.V6 {
		a.V6, files = files[0], files[1:]
	}
	if m.Link {
		a.Link = files[0]
	}
	return a
}

// Refuse tells the proxy why it is not wanted, and closes the connection.
func (p *Proxy) Refuse(why string) {
	p.c.send(&message{Type: typeRefused, Error: why})
	p.Close()
}

// Attach hands an attachment over. Its descriptors stay the caller's.
func (p *Proxy) Attach(a *Attachment) error {
	m := &message{Type: typeAttach, ID: a.ID, Netns: a.Netns, Method: a.Method, Workload: &a.Workload, V6: a.V6 != nil, Link: a.Link != nil}
	fds := []syscall.Conn{a.V4}
	for _, f := range []*os.File{a.V6, a.Link} {
		if f != nil {
			fds = append(fds, f)
		}
	}
	return p.c.send(m, fds...)
}

// Keep tells the proxy to go on holding what it said it holds.
func (p *Proxy) Keep(id uint64, w workload.Workload) error {
	return p.c.send(&message{Type: typeKeep, ID: id, Workload: &w})
}

// Update tells the proxy that a workload is described differently now.
func (p *Proxy) Update(id uint64, w workload.Workload) error {
	return p.c.send(&message{Type: typeUpdate, ID: id, Workload: &w})
}

// Detach tells the proxy to let go of an attachment.
func (p *Proxy) Detach(id uint64) error {
	return p.c.send(&message{Type: typeDetach, ID: id})
}

// Sync tells the proxy that it has heard of everything it should hold, and where
// its connections will lead. A proxy that is set up for another upstream goes; the
// zero value suits every proxy.
func (p *Proxy) Sync(upstream netip.AddrPort) error {
	return p.c.send(&message{Type: typeSync, Upstream: upstream})
}

// Close ends the connection. The proxy will come back.
func (p *Proxy) Close() error { return p.c.close() }

// maxDials bounds the connections being made at the same time for one proxy.
const maxDials = 64

// Host is what the agent does for a proxy.
type Host struct {
	Dial    func(context.Context) (net.Conn, error) // to the upstream, and only there
	Lost    func(id uint64)                         // the proxy lost this attachment's listener
	Leaving func()                                  // the proxy takes nothing more
}

// Serve answers the proxy until it goes or ctx ends.
func (p *Proxy) Serve(ctx context.Context, h Host) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { p.Close() })
	defer stop()
	slots := make(chan struct{}, maxDials)
	for {
		m, files, err := p.c.recv()
		if err != nil {
			return err
		}
		closeAll(files)
		switch m.Type {
		case typeLost:
			h.Lost(m.ID)
		case typeLeaving:
			h.Leaving()
		case typeDial:
			select {
			case slots <- struct{}{}:
				go p.answerDial(ctx, m.Seq, h.Dial, slots)
			default:
				err = p.c.send(&message{Type: typeDialed, Seq: m.Seq, Error: "too many connections are being opened"})
			}
		default:
			err = fmt.Errorf("%w: unexpected %q", errProtocol, m.Type)
		}
		if err != nil {
			return err
		}
	}
}

func (p *Proxy) answerDial(ctx context.Context, seq uint64, dial func(context.Context) (net.Conn, error), slots <-chan struct{}) {
	defer func() { <-slots }()
	m := &message{Type: typeDialed, Seq: seq}
	c, err := dial(ctx)
	if err != nil {
		m.Error = err.Error()
		p.c.send(m)
		return
	}
	defer c.Close()
	sc, ok := c.(syscall.Conn)
	if !ok {
		m.Error = "connection has no descriptor"
		p.c.send(m)
		return
	}
	// A proxy that is gone has no use for it; Serve notices by itself.
	p.c.send(m, sc)
}
