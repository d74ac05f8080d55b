package gate

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/upstream"
)

// After its body was read in time, a request may take as long as it needs.
func TestSlowAnswerToAPost(t *testing.T) {
	slow := func(context.Context, upstream.Request) (*upstream.Answer, error) {
		time.Sleep(2 * time.Minute)
		return answer("{}"), nil
	}
	inTime(t, sourceFunc(slow), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
		c := p.dial()
		c.send(t, request("POST", eventsAt, "Content-Length: 2\r\n")+"{}")
		if r, _ := c.response(t, "POST"); r.StatusCode != 200 {
			t.Errorf("got %d, want 200", r.StatusCode)
		}
		sink.next(t)
		c.Close()
	})
}

// drip is a body that comes in pieces, with pauses.
type drip struct {
	pieces []string
	pause  time.Duration
	closed chan struct{}
}

func (d *drip) Read(p []byte) (int, error) {
	if len(d.pieces) == 0 {
		return 0, io.EOF
	}
	time.Sleep(d.pause)
	n := copy(p, d.pieces[0])
	d.pieces = d.pieces[1:]
	return n, nil
}

func (d *drip) Close() error { close(d.closed); return nil }

// A long poll is passed on as it comes, and nothing cuts it short.
func TestLongPollStreams(t *testing.T) {
	for name, size := range map[string]int64{"length_unknown": -1, "length_known": 6} {
		t.Run(name, func(t *testing.T) {
			body := &drip{pieces: []string{"ab", "cd", "ef"}, pause: time.Hour, closed: make(chan struct{})}
			source := func(context.Context, upstream.Request) (*upstream.Answer, error) {
				a := answer("")
				a.Body, a.Size = body, size
				return a, nil
			}
			inTime(t, sourceFunc(source), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
				c, begin := p.dial(), time.Now()
				c.send(t, request("GET", eventsAt))
				var head strings.Builder
				for !strings.HasSuffix(head.String(), "\r\n\r\n") {
					line, err := c.r.ReadString('\n')
					if err != nil {
						t.Fatal(err)
					}
					head.WriteString(line)
				}
				if size < 0 {
					took(t, begin, 0)
				}
				for i, want := range []string{"ab", "cd", "ef"} {
					if size < 0 {
						want = "2\r\n" + want + "\r\n"
					}
					got := make([]byte, len(want))
					if _, err := io.ReadFull(c.r, got); err != nil || string(got) != want {
						t.Errorf("got %q, %v, want %q", got, err, want)
					}
					took(t, begin, time.Duration(i+1)*time.Hour)
				}
				if size < 0 {
					io.ReadFull(c.r, make([]byte, len("0\r\n\r\n")))
				}
				if e := sink.next(t); e.Decision != audit.Allow || e.Bytes != 6 || e.Duration != (3*time.Hour).Microseconds() {
					t.Errorf("got %+v, want 6 bytes in 3 hours", e)
				}
				<-body.closed
				c.Close()
			})
		})
	}
}

// A caller that does not read gives up its connection; one that reads slowly
// but reads does not.
func TestCallerThatDoesNotRead(t *testing.T) {
	inTime(t, says(strings.Repeat("x", 100<<10)), nil, func(t *testing.T, g *Gate, sink events, p *pipes) {
		c := p.dial()
		c.send(t, request("GET", token))
		time.Sleep(time.Minute)
		e := sink.next(t)
		if e.Duration != (30*time.Second).Microseconds() || e.Decision != audit.Error || e.Status != 200 || e.Reason != "the connection ended before the answer was sent" {
			t.Errorf("got %+v, want an answer that was broken off after 30s", e)
		}
		c.Close()

		c, begin := p.dial(), time.Now()
		c.send(t, request("GET", token))
		for n := 0; n < 100<<10; {
			time.Sleep(29 * time.Second)
			m, err := c.Read(make([]byte, 5000))
			if n += m; err != nil {
				t.Fatalf("after %d bytes and %v: %v", n, time.Since(begin), err)
			}
		}
		go io.Copy(io.Discard, c)
		if e := sink.next(t); e.Decision != audit.Allow || e.Bytes != 100<<10 {
			t.Errorf("got %+v, want the whole answer", e)
		}
		c.Close()
	})
}
