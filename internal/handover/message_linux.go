// Package handover carries listeners, workloads and connections between the
// agent, which opens them, and the proxy, which serves them. Both hold the
// descriptors, so that either may die and come back without losing one.
//
// They meet at one unix socket of type SOCK_SEQPACKET: one JSON message a packet,
// descriptors beside it (SCM_RIGHTS). After every connect the proxy says what it
// holds, the agent answers with what it should hold, and a sync ends that.
package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/workload"
)

// protocolVersion changes when old and new cannot talk. Since 2 the members of a
// workload are workloads.
const protocolVersion = 2

const (
	maxMessage     = 128 << 10              // bytes of one packet: a workload with all its members
	maxDescriptors = 3                      // of one packet: two listeners and a link
	writeTimeout   = 500 * time.Millisecond // the other side reads at once, or is broken
	helloTimeout   = 5 * time.Second        // for everything between connect and sync
	maxHeld        = 8192                   // attachments that a proxy may say it holds
)

// The message types. Proxy to agent: hello, held, lost, dial, leaving. Agent to proxy:
// refused, attach, keep, update, detach, sync, dialed.
const (
	typeHello   = "hello"   // Version, Count: how many held messages follow
	typeHeld    = "held"    // ID, Netns, Method, V6, Link; descriptors
	typeLost    = "lost"    // ID: the listener was destroyed under the proxy
	typeDial    = "dial"    // Seq: wants a connection to the upstream
	typeLeaving = "leaving" // takes nothing more; another proxy may come
	typeRefused = "refused" // Error: this proxy is not wanted
	typeAttach  = "attach"  // ID, Netns, Method, V6, Link, Workload; descriptors
	typeKeep    = "keep"    // ID, Workload: goes on holding it
	typeUpdate  = "update"  // ID, Workload: its description has changed
	typeDetach  = "detach"  // ID: let go of it
	typeSync    = "sync"    // all that should be held has been said; Upstream
	typeDialed  = "dialed"  // Seq, Error or one descriptor
)

type message struct {
	Type     string             `json:"type"`
	Version  int                `json:"version,omitempty"`
	Count    int                `json:"count,omitempty"`
	ID       uint64             `json:"id,omitempty"`
	Netns    netns.ID           `json:"netns,omitzero"`
	Method   string             `json:"method,omitempty"`
	V6       bool               `json:"v6,omitempty"`
	Link     bool               `json:"link,omitempty"`
	Workload *workload.Workload `json:"workload,omitempty"`
	Seq      uint64             `json:"seq,omitempty"`
	Upstream netip.AddrPort     `json:"upstream,omitzero"`
	Error    string             `json:"error,omitempty"`
}

// descriptors is how many a message of this form must carry.
func (m *message) descriptors() int {
	switch m.Type {
	case typeAttach, typeHeld:
		n := 1
		if m.V6 {
			n++
		}
		if m.Link {
			n++
		}
		return n
	case typeDialed:
		if m.Error == "" {
			return 1
		}
	}
	return 0
}

// ErrTooLarge is returned for a workload whose description does not fit into a
// message. Nothing was sent; the connection goes on.
var ErrTooLarge = errors.New("description too large to hand over")

// errProtocol ends a connection whose other side does not speak our protocol.
var errProtocol = errors.New("protocol error")

// conn is one end of the socket. Writes may be concurrent, reads not.
type conn struct {
	c   *net.UnixConn
	mu  sync.Mutex // serialises writes
	buf []byte     // of the reader
	oob []byte
}

func newConn(c *net.UnixConn) *conn {
	c.SetWriteBuffer(maxMessage) // as much as the kernel grants; see write
	return &conn{c: c, buf: make([]byte, maxMessage), oob: make([]byte, unix.CmsgSpace(4*maxDescriptors))}
}

func (c *conn) close() error { return c.c.Close() }

// send writes one message with descriptors, which stay the caller's. The other
// side must read: a write that does not get through ends the connection, so that
// nobody waits behind it for a second one.
func (c *conn) send(m *message, fds ...syscall.Conn) error {
	err := c.write(m, fds...)
	if err != nil && !errors.Is(err, ErrTooLarge) {
		c.close()
	}
	return err
}

// write is send without the end of the connection.
func (c *conn) write(m *message, fds ...syscall.Conn) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(b), maxMessage)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.c.SetWriteDeadline(time.Now().Add(writeTimeout))
	return withDescriptors(fds, nil, func(raw []int) error {
		var oob []byte
		if len(raw) > 0 {
			oob = unix.UnixRights(raw...)
		}
		_, _, err := c.c.WriteMsgUnix(b, oob, nil)
		if errors.Is(err, unix.EMSGSIZE) { // net.core.wmem_max is small here
			return fmt.Errorf("%w: %d bytes: %w", ErrTooLarge, len(b), err)
		}
		return err
	})
}

// withDescriptors calls fn with the raw descriptors of fds, none of which can be
// closed meanwhile. SyscallConn, not File.Fd: that would switch the open file,
// which both processes share, to blocking.
func withDescriptors(fds []syscall.Conn, raw []int, fn func([]int) error) error {
	if len(fds) == 0 {
		return fn(raw)
	}
	rc, err := fds[0].SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := rc.Control(func(fd uintptr) { inner = withDescriptors(fds[1:], append(raw, int(fd)), fn) }); err != nil {
		return err
	}
	return inner
}

// recv reads one message and its descriptors, which become the caller's.
func (c *conn) recv() (*message, []*os.File, error) {
	n, oobn, flags, _, err := c.c.ReadMsgUnix(c.buf, c.oob)
	if err != nil {
		return nil, nil, err
	}
	files, err := parseRights(c.oob[:oobn])
	if err != nil {
		return nil, nil, err
	}
	m := &message{}
	switch {
	case n == 0 && oobn == 0:
		err = net.ErrClosed // end of file on a packet socket
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = fmt.Errorf("%w: message too large", errProtocol)
	default:
		err = json.Unmarshal(c.buf[:n], m)
	}
	if err == nil && len(files) != m.descriptors() {
		err = fmt.Errorf("%w: %q with %d descriptors", errProtocol, m.Type, len(files))
	}
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return m, files, nil
}

func parseRights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errProtocol, err)
	}
	var files []*os.File
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "handed over"))
		}
	}
	return files, nil
}

// closeAll lets go of descriptors that the other side has sent. Closing may block
// for as long as their sender likes (SO_LINGER, a file system of its own), so
// nobody waits for it.
func closeAll(files []*os.File) {
	if len(files) > 0 {
		go closeSlowly(files)
	}
}

func closeSlowly(files []*os.File) {
	for _, f := range files {
		if rc, err := f.SyscallConn(); err == nil {
			rc.Control(func(fd uintptr) { unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{}) })
		}
		f.Close()
	}
}
