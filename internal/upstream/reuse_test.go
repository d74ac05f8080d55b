package upstream_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
)

func TestConnectionsAreReused(t *testing.T) {
	s := serve(t, say(ok))
	c := s.client(t, &upstream.Client{})
	for range 5 {
		if _, _, err := read(t, c, get(imds.InstanceRead)); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.conns.Load(); n != 1 {
		t.Errorf("got %d connections for 5 requests, want 1", n)
	}
}

// What follows the answer to a HEAD must not become the answer to somebody else.
func TestBodyAfterHeadReachesNobody(t *testing.T) {
	s := serve(t, say("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret"))
	c := s.client(t, &upstream.Client{})
	head := get(imds.IdentityToken)
	head.Query.Method = "HEAD"
	if _, body, err := read(t, c, head); body != "" || err != nil {
		t.Errorf("got %q, %v, want no body", body, err)
	}
	if _, _, err := read(t, c, get(imds.InstanceRead)); err != nil {
		t.Error(err)
	}
	if n := s.conns.Load(); n != 2 {
		t.Errorf("got %d connections, want one for each", n)
	}
}

// The service may close a kept connection at the moment it is used again.
func TestStaleConnection(t *testing.T) {
	post := get(imds.EventsApprove)
	post.Query.Method, post.Body = "POST", []byte("{}")
	keyed := post
	keyed.Header, keyed.Body = http.Header{"Idempotency-Key": {"1"}}, nil // net/http would repeat such a POST
	for name, tc := range map[string]struct {
		second  upstream.Request
		want    error
		arrived int
	}{
		"get_is_repeated":                {get(imds.InstanceRead), nil, 2},
		"post_is_not":                    {post, upstream.ErrProtocol, 1},
		"post_is_not_even_if_it_says_so": {keyed, upstream.ErrProtocol, 1},
	} {
		t.Run(name, func(t *testing.T) {
			arrived := make(chan struct{}, 9)
			s := serve(t, func(n int32, c net.Conn) {
				r := bufio.NewReader(c)
				if n == 1 {
					readRequest(r, 0)
					io.WriteString(c, ok)
				}
				if _, err := readRequest(r, len(tc.second.Body)); err != nil {
					return
				}
				arrived <- struct{}{}
				if n > 1 {
					io.WriteString(c, ok)
				}
			})
			c := s.client(t, &upstream.Client{})
			if _, _, err := read(t, c, get(imds.InstanceRead)); err != nil {
				t.Fatal(err)
			}
			if _, _, err := read(t, c, tc.second); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			if n := len(arrived); n != tc.arrived {
				t.Errorf("the service saw the request %d times, want %d", n, tc.arrived)
			}
		})
	}
}

func TestFreshConnectionIsTriedOnce(t *testing.T) {
	s := serve(t, func(_ int32, c net.Conn) { readRequest(bufio.NewReader(c), 0) })
	if _, _, err := read(t, s.client(t, &upstream.Client{}), get(imds.InstanceRead)); !errors.Is(err, upstream.ErrProtocol) {
		t.Errorf("got %v, want %v", err, upstream.ErrProtocol)
	}
	if n := s.conns.Load(); n != 1 {
		t.Errorf("got %d connections, want 1", n)
	}
}

func TestCancelEndsTheRequest(t *testing.T) {
	for name, said := range map[string]string{
		"before_the_header": "",
		"within_the_body":   "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			gone := errors.New("client is gone")
			ended := make(chan struct{})
			s := serve(t, func(_ int32, c net.Conn) {
				r := bufio.NewReader(c)
				readRequest(r, 0)
				io.WriteString(c, said)
				if said == "" {
					cancel(gone)
				}
				r.ReadByte() // until the client closes
				close(ended)
			})
			a, err := s.client(t, &upstream.Client{}).Answer(ctx, get(imds.InstanceRead))
			if err == nil {
				buf := make([]byte, 3)
				if _, err := io.ReadFull(a.Body, buf); err != nil {
					t.Fatal(err)
				}
				cancel(gone)
				_, err = a.Body.Read(buf)
				a.Body.Close()
				if !errors.Is(err, gone) {
					t.Errorf("body: got %v, want %v", err, gone)
				}
			} else if !errors.Is(err, gone) {
				t.Errorf("got %v, want %v", err, gone)
			}
			<-ended
		})
	}
}

func TestBodyLeftUnreadEndsTheRequest(t *testing.T) {
	ended := make(chan struct{})
	s := serve(t, func(_ int32, c net.Conn) {
		r := bufio.NewReader(c)
		readRequest(r, 0)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
		r.ReadByte()
		close(ended)
	})
	a, err := s.client(t, &upstream.Client{}).Answer(t.Context(), get(imds.InstanceRead))
	if err != nil {
		t.Fatal(err)
	}
	a.Body.Close()
	<-ended
}

// piped is a client whose connections are pipes, so that time can be made up.
// What talk says is said while it runs; the connection stays open after it.
func piped(talk func(c net.Conn)) *upstream.Client {
	return &upstream.Client{Dial: func(context.Context) (net.Conn, error) {
		client, server := net.Pipe()
		go func() {
			readRequest(bufio.NewReader(server), 0)
			talk(server)
			io.Copy(io.Discard, server)
			server.Close()
		}()
		return client, nil
	}}
}

func TestSilence(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
	after := func(d time.Duration, texts ...string) func(net.Conn) {
		return func(c net.Conn) {
			for _, text := range texts {
				time.Sleep(d)
				io.WriteString(c, text)
			}
		}
	}
	never := func(net.Conn) {}
	for name, tc := range map[string]struct {
		action imds.Action
		talk   func(net.Conn)
		want   error
		took   time.Duration
	}{
		"no_header":                      {imds.InstanceRead, never, upstream.ErrTimeout, 10 * time.Second},
		"no_header_to_events":            {imds.EventsRead, never, upstream.ErrTimeout, 130 * time.Second},
		"no_header_to_approval":          {imds.EventsApprove, never, upstream.ErrTimeout, 130 * time.Second},
		"half_a_header":                  {imds.InstanceRead, after(0, "HTTP/1.1 200"), upstream.ErrTimeout, 10 * time.Second},
		"no_body":                        {imds.InstanceRead, after(0, head), upstream.ErrTimeout, 10 * time.Second},
		"half_a_body":                    {imds.InstanceRead, after(9*time.Second, head, "{"), upstream.ErrTimeout, 28 * time.Second},
		"slow_but_alive":                 {imds.InstanceRead, after(9*time.Second, head, "{", "}"), nil, 27 * time.Second},
		"first_events_take_two_minutes":  {imds.EventsRead, after(2*time.Minute, head+"{}"), nil, 2 * time.Minute},
		"token_does_not_get_two_minutes": {imds.IdentityToken, after(2*time.Minute, head+"{}"), upstream.ErrTimeout, 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := piped(tc.talk)
				start := time.Now()
				_, _, err := read(t, c, get(tc.action))
				if !errors.Is(err, tc.want) {
					t.Errorf("got %v, want %v", err, tc.want)
				}
				if took := time.Since(start); took != tc.took {
					t.Errorf("took %v, want %v", took, tc.took)
				}
				c.CloseIdle()
				time.Sleep(time.Hour) // let the service have its say
			})
		})
	}
}

// Only the service's silence counts, not that of our own client.
func TestSlowReaderIsNotSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := piped(func(c net.Conn) {
			io.WriteString(c, strings.TrimSuffix(ok, "}"))
			io.WriteString(c, "}") // waits until it is read
		})
		a, err := c.Answer(t.Context(), get(imds.InstanceRead))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range "{}" {
			time.Sleep(time.Hour)
			var b [1]byte
			if _, err := io.ReadFull(a.Body, b[:]); err != nil || b[0] != byte(want) {
				t.Errorf("got %q, %v, want %q", b, err, want)
			}
		}
		a.Body.Close()
		c.CloseIdle()
	})
}

func TestDiallerHasFiveSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &upstream.Client{Dial: func(ctx context.Context) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		start := time.Now()
		_, err := c.Answer(t.Context(), get(imds.InstanceRead))
		if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || took != 5*time.Second {
			t.Errorf("got %v after %v, want a time-out after 5s", err, took)
		}
	})
}

func TestConnectionsAreBounded(t *testing.T) {
	release := make(chan struct{})
	s := serve(t, func(_ int32, c net.Conn) {
		r := bufio.NewReader(c)
		for {
			if _, err := readRequest(r, 0); err != nil {
				return
			}
			<-release
			io.WriteString(c, ok)
		}
	})
	c := s.client(t, &upstream.Client{MaxConns: 2})
	errs := make(chan error, 6)
	for range cap(errs) {
		go func() {
			_, _, err := read(t, c, get(imds.InstanceRead))
			errs <- err
		}()
	}
	for range cap(errs) {
		release <- struct{}{}
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if n := s.conns.Load(); n > 2 {
		t.Errorf("got %d connections, want at most 2", n)
	}
}
