package handover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"imdsgate/internal/netns"
	"imdsgate/internal/workload"
)

// What the proxy waits between attempts to reach the agent. An agent that comes
// back waits longer than retry before it opens anything anew.
const (
	retry        = 100 * time.Millisecond
	retryRefused = 2 * time.Second // when another proxy is connected, and stays
	patience     = time.Second     // the agent may not have heard of the last proxy's end
)

// pause is the wait before the next attempt of a proxy that has been refused for
// so long; 0 means that it is not.
func pause(refused time.Duration) time.Duration {
	if refused > patience {
		return retryRefused
	}
	return retry
}

// Offer is an attachment that the proxy has been given to serve.
type Offer struct {
	ID        uint64
	Netns     netns.ID
	Method    string
	Workload  workload.Workload
	Listeners []net.Listener // the taker's to close
}

// A Taker serves what is handed over. Its methods are called one at a time.
type Taker interface {
	// Take starts to serve the listeners.
	Take(o Offer)
	// Update changes who is behind an attachment.
	Update(id uint64, w workload.Workload)
	// Release stops serving an attachment and closes its listeners.
	Release(id uint64)
}

// UpstreamError says that the agent opens connections to another upstream than
// the one that the proxy is to speak with.
type UpstreamError struct{ Agent, Proxy netip.AddrPort }

func (e *UpstreamError) Error() string {
	return fmt.Sprintf("the agent's upstream is %v, this proxy's is %v", e.Agent, e.Proxy)
}

// Client is the proxy's end of the socket. Set the fields, then call Run.
type Client struct {
	Path     string
	Upstream netip.AddrPort // where connections must lead; zero means anywhere
	Taker    Taker
	Log      *slog.Logger

	mu      sync.Mutex
	conn    *conn         // nil while no agent is there
	changed chan struct{} // closed and replaced when conn changes
	synced  chan struct{} // closed at the first sync
	seq     uint64        // of the last dial
	pending map[uint64]chan dialed
	dials   chan struct{}    // a place for each connection that is being made
	held    map[uint64]*held // used by Run's goroutine only
	once    sync.Once
}

type held struct {
	message   message        // as it will be said to an agent
	fds       []syscall.Conn // listeners, then the link
	link      *os.File
	confirmed bool // since the last connect
}

type dialed struct {
	file *os.File
	err  error
}

func (c *Client) init() {
	c.once.Do(func() {
		c.changed, c.synced = make(chan struct{}), make(chan struct{})
		c.dials = make(chan struct{}, maxDials/2)
		c.pending, c.held = make(map[uint64]chan dialed), make(map[uint64]*held)
	})
}

// Synced is closed when an agent has said, for the first time, all that there is
// to serve.
func (c *Client) Synced() <-chan struct{} { c.init(); return c.synced }

// Run keeps a connection to the agent until ctx ends, and then returns nil. What
// is held stays held: Run does not release it. It ends early with *UpstreamError:
// requests would go to one service under another's name.
func (c *Client) Run(ctx context.Context) error {
	c.init()
	said := ""            // the trouble that was last logged
	var refused time.Time // since when; zero while it is not
	for ctx.Err() == nil {
		met, err := c.session(ctx)
		if ctx.Err() != nil {
			break
		}
		if met {
			said = "" // a new trouble, if it is one
		}
		var other *UpstreamError
		if errors.As(err, &other) {
			return err
		}
		if err != nil && err.Error() != said {
			said = err.Error()
			c.complain(err)
		}
		wait := retry
		switch {
		case !errors.Is(err, errRefused):
			refused = time.Time{}
		case refused.IsZero():
			refused = time.Now()
		default:
			wait = pause(time.Since(refused))
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return nil
}

// complain logs why no agent is there.
func (c *Client) complain(err error) {
	text, log := "no agent: serving what is held", c.Log
	if len(c.held) == 0 {
		text = "waiting for the agent"
	}
	if errors.Is(err, os.ErrPermission) {
		log = log.With("uid", os.Geteuid(), "hint", "this must be the agent's --proxy-uid, and may pass the socket's folder")
	}
	log.Warn(text, "socket", c.Path, "held", len(c.held), "error", err)
}

// session is one connection to the agent, from connect to loss. It reports whether
// the agent had anything to say.
func (c *Client) session(ctx context.Context) (met bool, err error) {
	uc, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: c.Path, Net: "unixpacket"})
	if err != nil {
		return false, err
	}
	conn := newConn(uc)
	defer conn.close()
	stop := context.AfterFunc(ctx, func() { conn.close() })
	defer stop()
	if err := c.hello(conn); err != nil {
		// An agent that does not want this proxy says so, and hangs up, before it hears
		// anything.
		if m, files, rerr := conn.recv(); rerr == nil {
			err = c.handle(m, files)
		}
		return false, err
	}
	c.connected(conn)
	defer c.connected(nil)
	for {
		m, files, err := conn.recv()
		if err != nil {
			return met, err
		}
		if err := c.handle(m, files); err != nil {
			return met, err
		}
		met = true
	}
}

// hello says what is held. A listener that was closed meanwhile is not.
func (c *Client) hello(conn *conn) error {
	conn.c.SetDeadline(time.Now().Add(helloTimeout))
	defer conn.c.SetDeadline(time.Time{})
	for id, h := range c.held {
		h.confirmed = false
		if withDescriptors(h.fds, nil, func([]int) error { return nil }) != nil {
			c.release(id)
		}
	}
	if err := conn.write(&message{Type: typeHello, Version: protocolVersion, Count: len(c.held)}); err != nil {
		return err
	}
	for _, h := range c.held {
		if err := conn.write(&h.message, h.fds...); err != nil {
			return err
		}
	}
	return nil
}

// connected notes the connection, or with nil its loss, and wakes who waits.
func (c *Client) connected(conn *conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = conn
	close(c.changed)
	c.changed = make(chan struct{})
	if conn != nil {
		return
	}
	for seq, ch := range c.pending {
		ch <- dialed{err: errAgentGone}
		delete(c.pending, seq)
	}
}

func (c *Client) handle(m *message, files []*os.File) error {
	switch m.Type {
	case typeAttach:
		return c.take(m, files)
	case typeDialed:
		c.finishDial(m, files)
		return nil
	}
	closeAll(files)
	switch m.Type {
	case typeKeep, typeUpdate:
		if h := c.held[m.ID]; h != nil && m.Workload != nil {
			h.confirmed = true
			c.Taker.Update(m.ID, *m.Workload)
		}
	case typeDetach:
		c.release(m.ID)
	case typeSync:
		if m.Upstream.IsValid() && c.Upstream.IsValid() && m.Upstream != c.Upstream {
			return &UpstreamError{Agent: m.Upstream, Proxy: c.Upstream}
		}
		c.sync()
	case typeRefused:
		return fmt.Errorf("agent %w: %s", errRefused, m.Error)
	default:
		return fmt.Errorf("%w: unexpected %q", errProtocol, m.Type)
	}
	return nil
}

func (c *Client) take(m *message, files []*os.File) error {
	a := m.attachment(files)
	if a.ID == 0 || c.held[a.ID] != nil {
		a.Discard()
		return fmt.Errorf("%w: attach %d twice", errProtocol, a.ID)
	}
	h := &held{message: *m, confirmed: true, link: a.Link}
	h.message.Type, h.message.Workload = typeHeld, nil
	o := Offer{ID: a.ID, Netns: a.Netns, Method: a.Method, Workload: a.Workload}
	for _, f := range []*os.File{a.V4, a.V6} {
		if f == nil {
			continue
		}
		l, err := net.FileListener(f)
		f.Close()
		if err != nil {
			for _, l := range o.Listeners {
				l.Close()
			}
			if a.Link != nil {
				a.Link.Close()
			}
			return fmt.Errorf("handed over listener: %w", err)
		}
		o.Listeners = append(o.Listeners, l)
		h.fds = append(h.fds, l.(syscall.Conn))
	}
	if a.Link != nil {
		h.fds = append(h.fds, a.Link)
	}
	c.held[a.ID] = h
	c.Taker.Take(o)
	return nil
}

func (c *Client) release(id uint64) {
	h := c.held[id]
	if h == nil {
		return
	}
	delete(c.held, id)
	c.Taker.Release(id)
	if h.link != nil {
		h.link.Close()
	}
}

// sync lets go of everything that the agent has not confirmed.
func (c *Client) sync() {
	for id, h := range c.held {
		if !h.confirmed {
			c.release(id)
		}
	}
	select {
	case <-c.synced:
	default:
		close(c.synced)
	}
}

// Lost tells the agent that an attachment's listener was destroyed, so that it
// opens another. Without an agent it is noticed when one comes.
func (c *Client) Lost(id uint64) {
	c.init()
	c.mu.Lock()
	conn := c.conn
	c.mu.Unlock()
	if conn != nil {
		conn.send(&message{Type: typeLost, ID: id})
	}
}

// errRefused ends a session whose agent does not want this proxy, for now.
var errRefused = errors.New("refused this proxy")

// errAgentGone ends a dial that the next agent may still answer.
var errAgentGone = errors.New("agent went away")

// Leave tells the agent that this proxy takes nothing more, so that another one
// may come while this one finishes. Connections can still be had.
func (c *Client) Leave() {
	c.init()
	c.mu.Lock()
	conn := c.conn
	c.mu.Unlock()
	if conn != nil {
		conn.send(&message{Type: typeLeaving})
	}
}

// Dial asks the agent for a connection to the upstream, waiting for an agent if
// none is there, or asking the next one if it goes, until ctx ends. It asks for no
// more at once than an agent answers; others wait for their turn.
func (c *Client) Dial(ctx context.Context) (net.Conn, error) {
	c.init()
	select {
	case c.dials <- struct{}{}:
		defer func() { <-c.dials }()
	case <-ctx.Done():
		return nil, fmt.Errorf("connection through the agent: %w", ctx.Err())
	}
	for {
		c.mu.Lock()
		conn, changed := c.conn, c.changed
		c.mu.Unlock()
		if conn != nil {
			nc, err := c.dialOnce(ctx, conn)
			if !errors.Is(err, errAgentGone) {
				return nc, err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("no agent at %s: %w", c.Path, ctx.Err())
		}
	}
}

func (c *Client) dialOnce(ctx context.Context, conn *conn) (net.Conn, error) {
	ch := make(chan dialed, 1)
	c.mu.Lock()
	if c.conn != conn {
		c.mu.Unlock()
		return nil, errAgentGone
	}
	c.seq++
	seq := c.seq
	c.pending[seq] = ch
	c.mu.Unlock()
	if err := conn.send(&message{Type: typeDial, Seq: seq}); err != nil {
		c.forget(seq, ch)
		return nil, errAgentGone
	}
	select {
	case d := <-ch:
		if d.err != nil {
			return nil, fmt.Errorf("connection through the agent: %w", d.err)
		}
		defer d.file.Close()
		return net.FileConn(d.file)
	case <-ctx.Done():
		c.forget(seq, ch)
		return nil, fmt.Errorf("connection through the agent: %w", ctx.Err())
	}
}

// forget gives up on a dial, also when its answer has just come.
func (c *Client) forget(seq uint64, ch <-chan dialed) {
	c.mu.Lock()
	delete(c.pending, seq)
	c.mu.Unlock()
	select {
	case d := <-ch:
		if d.file != nil {
			d.file.Close() // a connection that nobody has used
		}
	default:
	}
}

func (c *Client) finishDial(m *message, files []*os.File) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch := c.pending[m.Seq]
	delete(c.pending, m.Seq)
	if ch == nil {
		closeAll(files)
		return
	}
	if m.Error != "" {
		ch <- dialed{err: errors.New(m.Error)}
		return
	}
	ch <- dialed{file: files[0]}
}

// Forget closes what the client itself holds beside the listeners, after Run has
// returned: the death of the process does the same.
func (c *Client) Forget() {
	for id, h := range c.held {
		delete(c.held, id)
		if h.link != nil {
			h.link.Close()
		}
	}
}
