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

	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
)

type answering func() *upstream.Answer

func (f answering) Answer(context.Context, upstream.Request) (*upstream.Answer, error) {
	return f(), nil
}

// kept is a cache that holds an answer with this body.
func kept(t *testing.T, body string) func() *upstream.Answer {
	t.Helper()
	c := &upstream.Cache{Source: answering(func() *upstream.Answer {
		return &upstream.Answer{Status: 200, Header: http.Header{}, Size: int64(len(body)), Body: io.NopCloser(strings.NewReader(body))}
	})}
	t.Cleanup(c.Close)
	ask := func() *upstream.Answer {
		t.Helper()
		a, err := c.Answer(t.Context(), get(imds.InstanceRead))
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	ask()
	return ask
}

func TestEditIsMadeOnce(t *testing.T) {
	ask, made := kept(t, "abc"), 0
	upper := func(b []byte) ([]byte, error) { made++; return bytes.ToUpper(b), nil }
	for range 3 {
		if b, err := ask().Edit("upper", upper); err != nil || string(b) != "ABC" {
			t.Fatalf("got %s, %v", b, err)
		}
	}
	if made != 1 {
		t.Errorf("made %d times, want once", made)
	}
	if b, _ := ask().Edit("other", func([]byte) ([]byte, error) { return []byte("x"), nil }); string(b) != "x" {
		t.Errorf("another key: got %s", b)
	}
	if a := ask(); string(a.Bytes) != "abc" {
		t.Errorf("the kept body is %s now", a.Bytes)
	}
}

func TestEditIsBounded(t *testing.T) {
	ask := kept(t, "abc")
	for i := range 100 {
		if b, err := ask().Edit(fmt.Sprint(i), func([]byte) ([]byte, error) { return []byte(fmt.Sprint(i)), nil }); err != nil || string(b) != fmt.Sprint(i) {
			t.Fatalf("%d: got %s, %v", i, b, err)
		}
	}
	made := 0
	again := func([]byte) ([]byte, error) { made++; return nil, nil }
	for i := range 100 {
		ask().Edit(fmt.Sprint(i), again)
	}
	if made < 90 {
		t.Errorf("%d of 100 edits were remembered, want a few", 100-made)
	}
}

func TestEditThatFailsIsNotRemembered(t *testing.T) {
	ask, no := kept(t, "abc"), errors.New("no document")
	if _, err := ask().Edit("k", func([]byte) ([]byte, error) { return nil, no }); !errors.Is(err, no) {
		t.Errorf("got %v", err)
	}
	for _, want := range []string{"longer than it was", "b"} { // the longer one is not remembered
		if b, err := ask().Edit("k", func([]byte) ([]byte, error) { return []byte(want), nil }); err != nil || string(b) != want {
			t.Errorf("got %s, %v, want %s", b, err, want)
		}
	}
}

// Without a cache every answer is edited for itself.
func TestEditOfAnAnswerThatIsNotKept(t *testing.T) {
	a := &upstream.Answer{Bytes: []byte("abc")}
	for _, want := range []string{"1", "2"} {
		if b, _ := a.Edit("k", func([]byte) ([]byte, error) { return []byte(want), nil }); string(b) != want {
			t.Errorf("got %s, want %s", b, want)
		}
	}
}
