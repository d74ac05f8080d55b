package relay

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// pair is a connection that was accepted and the one that it is carried to.
type pair struct {
	caller, target     net.Conn
	toTarget, toCaller atomic.Uint64 // bytes

	// The sweep's own.
	seen  uint64    // bytes both ways when it last looked
	since time.Time // when it first saw so many; zero before its first look
}

// carry moves bytes both ways until both are at their end, and closes both
// connections.
func (p *pair) carry() {
	var back sync.WaitGroup
	back.Go(func() { p.move(p.caller, p.target, &p.toCaller) })
	p.move(p.target, p.caller, &p.toTarget)
	back.Wait()
	p.caller.Close()
	p.target.Close()
}

// move carries one way, and resets both ways if that cannot be done.
func (p *pair) move(to, from net.Conn, count *atomic.Uint64) {
	if err := pump(to, from, count); err != nil {
		p.reset()
	}
}

// reset ends both connections at once, whatever is under way.
func (p *pair) reset() {
	reset(p.caller)
	reset(p.target)
}

// reset closes a connection so that the other side sees an error, where that can
// be told from a good end.
func reset(c net.Conn) {
	if t, ok := c.(interface{ SetLinger(sec int) error }); ok {
		t.SetLinger(0)
	}
	c.Close()
}

// still is for how long nothing was carried. It knows only of what happened
// between its calls, and errs to the side of activity.
func (p *pair) still(now time.Time) time.Duration {
	if n := p.toTarget.Load() + p.toCaller.Load(); p.since.IsZero() || n != p.seen {
		p.seen, p.since = n, now
	}
	return now.Sub(p.since)
}

// A connection that says little at a time, as nearly all to a metadata service
// do, has two buffers of smallBuffer; one that fills it gets a large one for its
// next read. splice(2) would spare the copies, but holds a pipe for each
// direction of an idle connection, and was no faster for answers of a few KiB.
const (
	smallBuffer = 4 << 10
	largeBuffer = 64 << 10
)

var large = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

var errNoHalfClose = errors.New("connection cannot be closed one way")

// pump moves bytes until from is at its end, then closes to for writing.
func pump(to, from net.Conn, count *atomic.Uint64) error {
	small := make([]byte, smallBuffer)
	for {
		full, err := step(to, from, small, count)
		for full && err == nil {
			full, err = largeStep(to, from, count)
		}
		switch {
		case errors.Is(err, io.EOF):
			return closeWrite(to)
		case err != nil:
			return err
		}
	}
}

func largeStep(to, from net.Conn, count *atomic.Uint64) (full bool, err error) {
	b := large.Get().(*[largeBuffer]byte)
	defer large.Put(b)
	return step(to, from, b[:], count)
}

// step is one read, and the write of all that it brought. It reports whether the
// buffer was filled, so that there is probably more.
func step(to, from net.Conn, buf []byte, count *atomic.Uint64) (full bool, err error) {
	n, err := from.Read(buf)
	if n > 0 {
		count.Add(uint64(n))
		if _, werr := to.Write(buf[:n]); werr != nil {
			return false, werr
		}
	}
	return n == len(buf), err
}

func closeWrite(c net.Conn) error {
	h, ok := c.(interface{ CloseWrite() error })
	if !ok {
		return errNoHalfClose
	}
	return h.CloseWrite()
}
