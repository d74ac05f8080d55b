package upstream

import (
	"context"
	"errors"
	"io"
	"net"
	"time"
)

// watch ends a request when the service keeps silent for too long. It counts
// only while we wait for the service, never while our own client is slow.
type watch struct {
	parent   context.Context // the caller's
	ctx      context.Context // the request's
	cancel   context.CancelCauseFunc
	timer    *time.Timer
	patience time.Duration
}

// newWatch starts to count.
func newWatch(parent context.Context, patience time.Duration) *watch {
	w := &watch{parent: parent, patience: patience}
	w.ctx, w.cancel = context.WithCancelCause(parent)
	w.timer = time.AfterFunc(patience, func() { w.cancel(ErrTimeout) })
	return w
}

func (w *watch) resume() { w.timer.Reset(w.patience) }
func (w *watch) pause()  { w.timer.Stop() }

// end gives back what the watch holds, and ends the request if it is not over.
func (w *watch) end() {
	w.timer.Stop()
	w.cancel(context.Canceled)
}

// explain replaces the text of err unless it is known to quote nothing of what
// the service sent: a token must not reach a log by way of "malformed response".
func (w *watch) explain(err error) error {
	var dial *dialError
	var op *net.OpError
	switch {
	case w.parent.Err() != nil:
		return context.Cause(w.parent)
	case errors.Is(context.Cause(w.ctx), ErrTimeout):
		return ErrTimeout
	case errors.Is(err, ErrTooLarge):
		return ErrTooLarge
	case errors.As(err, &dial):
		return dial
	case errors.As(err, &op):
		return op
	default:
		return ErrProtocol
	}
}

// body is the body of an answer: bounded, watched, and an error when it is cut.
type body struct {
	from  io.ReadCloser
	left  int64
	watch *watch
}

func (b *body) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, ErrTooLarge
	}
	b.watch.resume()
	n, err := b.from.Read(p)
	b.watch.pause()
	if b.left -= int64(n); b.left < 0 {
		return n + int(b.left), ErrTooLarge
	}
	if err != nil && err != io.EOF {
		err = b.watch.explain(err)
	}
	return n, err
}

// Close ends the request if the body was not read to its end.
func (b *body) Close() error {
	err := b.from.Close()
	b.watch.end()
	return err
}
