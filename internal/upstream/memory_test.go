package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
)

// Whatever somebody does with an answer, the next one is whole.
func TestAnswerSharesNothingThatCanBeChanged(t *testing.T) {
	buf := []byte(`{"compute":{"name":"vm"}}`)
	h := http.Header{"Server": {"IMDS/1"}}
	s := &source{answer: func(context.Context, upstream.Request) (*upstream.Answer, error) {
		return &upstream.Answer{Status: 200, Header: h, Body: io.NopCloser(bytes.NewReader(buf)), Size: int64(len(buf))}, nil
	}}
	c := cacheOver(t, &upstream.Cache{Source: s})
	r := asking(imds.InstanceRead, "/metadata/instance")
	for range 3 {
		a, err := c.Answer(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 100)
		n, _ := io.ReadFull(a.Body, p)
		if string(p[:n]) != `{"compute":{"name":"vm"}}` || string(a.Bytes) != string(p[:n]) || a.Header.Get("Server") != "IMDS/1" || a.Status != 200 {
			t.Fatalf("got %q, %+v, want what the service said", p[:n], a)
		}
		clear(p)
		if _, ok := a.Body.(io.WriterTo); ok {
			t.Error("the body hands out what is shared")
		}
		a.Status, a.Header, a.Body, a.Size = 0, nil, nil, 0
		clear(buf) // the source's own
		h["Server"][0] = "x"
		r.Header["Metadata"] = []string{"true"}
	}
}

// An attacker who varies what it asks for fills nothing but its own place.
func TestMemoryIsBounded(t *testing.T) {
	const limit = 1 << 20
	s := &source{answer: func(context.Context, upstream.Request) (*upstream.Answer, error) {
		return answer(200, tokenBody(strings.Repeat("t", 1500), time.Now().Add(24*time.Hour), 24*time.Hour)), nil
	}}
	c := cacheOver(t, &upstream.Cache{Source: s, MaxBytes: limit})
	hot := tokenFor(vault)
	for range 50 {
		ask(t, c, hot)
	}
	var most int64
	var lost int
	for i := range 20_000 {
		if i%100 == 0 {
			if _, from := ask(t, c, hot); from != upstream.Hit {
				lost++
			}
		}
		a, err := c.Answer(t.Context(), tokenFor(fmt.Sprint("https://attack/", i)))
		if err != nil {
			t.Fatal(err)
		}
		a.Body.Close()
		most = max(most, c.Bytes())
	}
	if most > limit+8<<10 || most < limit/2 {
		t.Errorf("the cache took %d bytes, want about %d at most", most, limit)
	}
	if lost > 10 {
		t.Errorf("what others use was thrown out %d times in 200, want hardly ever", lost)
	}
	t.Logf("at most %d bytes, lost %d times", most, lost)
}

func TestWhatIsOverIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := minting(time.Hour)
		c := cacheOver(t, &upstream.Cache{Source: s})
		for i := range 100 {
			ask(t, c, tokenFor(fmt.Sprint(i)))
		}
		before := c.Bytes()
		time.Sleep(time.Hour)
		ask(t, c, tokenFor("new"))
		if after := c.Bytes(); after > before/50 {
			t.Errorf("got %d bytes of %d, want one token", after, before)
		}
	})
}

func TestClose(t *testing.T) {
	begun := make(chan struct{})
	s := &source{answer: func(ctx context.Context, _ upstream.Request) (*upstream.Answer, error) {
		close(begun)
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	c := &upstream.Cache{Source: s}
	go func() { <-begun; c.Close() }()
	if _, _, err := read(t, c, tokenFor(vault)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want canceled", err)
	}
	c.Close()
	s.answer = minting(time.Hour).answer
	for range 2 {
		if _, from := ask(t, c, tokenFor(vault)); from != "" {
			t.Errorf("got %q, want a call: it is closed", from)
		}
	}
}

func TestPrefetch(t *testing.T) {
	s := minting(time.Hour)
	c := cacheOver(t, &upstream.Cache{Source: s})
	requests := []upstream.Request{tokenFor(vault), asking(imds.IdentityDocument, "/metadata/attested/document"), tokenFor(graph), tokenFor(vault)}
	if err := c.Prefetch(t.Context(), requests); err != nil || s.calls.Load() != 2 {
		t.Errorf("got %v and %d calls, want 2", err, s.calls.Load())
	}
	if _, from := ask(t, c, tokenFor(graph)); from != upstream.Hit {
		t.Errorf("got %q, want a hit", from)
	}
	away := errors.New("away")
	s.answer = func(context.Context, upstream.Request) (*upstream.Answer, error) { return nil, away }
	if err := c.Prefetch(t.Context(), []upstream.Request{tokenFor("new"), tokenFor("newer")}); !errors.Is(err, away) || s.calls.Load() != 3 {
		t.Errorf("got %v after %d calls, want the error of the first", err, s.calls.Load())
	}
}
