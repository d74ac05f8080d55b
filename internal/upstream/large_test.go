package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"

	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
)

// A body that is too large to be kept is streamed, to each its own.
func TestLargeBodyIsStreamed(t *testing.T) {
	const limit = 1000
	large := strings.Repeat("x", 3*limit)
	for name, size := range map[string]int64{"known": int64(len(large)), "unknown": -1} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSlow()
				c := cacheOver(t, &upstream.Cache{Source: s, MaxBody: limit})
				r := asking(imds.InstanceRead, "/metadata/instance")
				a, b := askLater(t.Context(), c, r), askLater(t.Context(), c, r)
				synctest.Wait()
				for range 2 {
					body := answer(200, large)
					body.Size = size
					s.let <- body
				}
				for _, o := range []outcome{<-a, <-b} {
					if o.err != nil || o.body != large {
						t.Errorf("got %d bytes, %v, want %d", len(o.body), o.err, len(large))
					}
				}
				if n := s.calls.Load(); n != 2 {
					t.Errorf("got %d calls, want 2", n)
				}
				next := askLater(t.Context(), c, r)
				s.let <- answer(200, "{}")
				if o := <-next; o.body != "{}" {
					t.Errorf("got %q: the large one was kept", o.body)
				}
			})
		})
	}
}

func TestBodyOfAnotherSizeIsNoAnswer(t *testing.T) {
	for _, size := range []int64{1, 3} {
		s := &source{answer: func(context.Context, upstream.Request) (*upstream.Answer, error) {
			a := answer(200, "{}")
			a.Size = size
			return a, nil
		}}
		c := cacheOver(t, &upstream.Cache{Source: s})
		if _, _, err := read(t, c, tokenFor(vault)); !errors.Is(err, upstream.ErrProtocol) {
			t.Errorf("size %d: got %v, want %v", size, err, upstream.ErrProtocol)
		}
	}
}

// tracked is a body that tells of its end, and of its context's.
type tracked struct {
	io.Reader
	ctx    context.Context
	closed chan struct{}
}

func (b *tracked) Close() error { close(b.closed); return nil }
func (b *tracked) Read(p []byte) (int, error) {
	if b.ctx.Err() != nil {
		return 0, context.Cause(b.ctx)
	}
	return b.Reader.Read(p)
}

func largeOf(body **tracked) *source {
	return &source{answer: func(ctx context.Context, _ upstream.Request) (*upstream.Answer, error) {
		*body = &tracked{bytes.NewReader(make([]byte, 5000)), ctx, make(chan struct{})}
		return &upstream.Answer{Status: 200, Body: *body, Size: 5000}, nil
	}}
}

func TestStreamIsItsTakers(t *testing.T) {
	var body *tracked
	c := cacheOver(t, &upstream.Cache{Source: largeOf(&body), MaxBody: 1000})
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	a, err := c.Answer(ctx, asking(imds.InstanceRead, "/metadata/instance"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(a.Body, make([]byte, 2000)); err != nil {
		t.Fatal(err)
	}
	cancel(gone)
	<-body.ctx.Done()
	if _, err := a.Body.Read(make([]byte, 1)); !errors.Is(err, gone) {
		t.Errorf("got %v, want the taker's own reason", err)
	}
	a.Body.Close()
	<-body.closed
}

func TestStreamThatNobodyTakesIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var body *tracked
		s := largeOf(&body)
		plain := s.answer
		s.answer = func(ctx context.Context, r upstream.Request) (*upstream.Answer, error) {
			<-ctx.Done()
			return plain(ctx, r) // it had come just then
		}
		c := cacheOver(t, &upstream.Cache{Source: s, MaxBody: 1000})
		ctx, cancel := context.WithCancel(t.Context())
		o := askLater(ctx, c, asking(imds.InstanceRead, "/metadata/instance"))
		synctest.Wait()
		cancel()
		<-o
		synctest.Wait()
		<-body.closed
	})
}
