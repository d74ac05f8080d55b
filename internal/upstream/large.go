package upstream

import (
	"bytes"
	"context"
	"io"
	"time"
)

// load reads an answer into memory. If it is too large for that, it is given
// back, to be read on.
func (c *Cache) load(a *Answer, begun time.Time) (*entry, *Answer, error) {
	limit := c.maxBody()
	if a.Size > limit {
		return nil, a, nil
	}
	var buf bytes.Buffer
	buf.Grow(int(max(a.Size, 0)) + bytes.MinRead)
	_, err := buf.ReadFrom(io.LimitReader(a.Body, limit+1))
	body := buf.Bytes()
	if err == nil && int64(len(body)) > limit {
		rest := *a
		rest.Body = &resumed{read: body, Closer: a.Body, rest: a.Body}
		return nil, &rest, nil
	}
	if cerr := a.Body.Close(); err == nil {
		err = cerr
	}
	switch {
	case err != nil:
		return nil, nil, err
	case a.Size >= 0 && int64(len(body)) != a.Size:
		return nil, nil, ErrProtocol
	}
	return &entry{status: a.Status, header: a.Header.Clone(), body: bytes.Clone(body), at: begun}, nil, nil
}

// resumed is a body of which a part was read already.
type resumed struct {
	read []byte
	rest io.Reader
	io.Closer
}

func (b *resumed) Read(p []byte) (int, error) {
	if len(b.read) > 0 {
		n := copy(p, b.read)
		b.read = b.read[n:]
		return n, nil
	}
	return b.rest.Read(p)
}

// takeLarge makes the one body that cannot be shared its taker's, who is the
// one that can cancel it from then on.
func (c *Cache) takeLarge(ctx context.Context, f *flight) *Answer {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.large == nil {
		return nil
	}
	a := *f.large
	f.large, f.taken = nil, true
	stop := context.AfterFunc(ctx, func() { f.cancel(context.Cause(ctx)) })
	a.Body = &closer{ReadCloser: a.Body, then: func() {
		stop()
		f.cancel(context.Canceled)
	}}
	return &a
}
