package gate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"syscall"
	"testing"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
)

// service is the gate's upstream client in front of a metadata service on
// 127.0.0.1.
func service(t testing.TB, h http.HandlerFunc) *upstream.Client {
	s := httptest.NewServer(h)
	c := &upstream.Client{Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", s.Listener.Addr().String())
	}}
	t.Cleanup(func() { c.CloseIdle(); s.Close() })
	return c
}

func TestPassThrough(t *testing.T) {
	source := service(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "169.254.169.254" || r.Header.Get("Metadata") != "true" || r.Header.Get("User-Agent") != "sdk/1" || len(r.Header) != 2 {
			t.Errorf("the service got host %q, header %v", r.Host, r.Header)
		}
		w.Header().Set("Server", "IMDS/150")
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		fmt.Fprintf(w, `{"asked":%q}`, r.RequestURI)
	})
	_, sink, s := serving(t, source)
	p := dial(t, s.addr)
	for range 3 {
		p.send(t, request("GET", token, "User-Agent: sdk/1\r\n"))
		r, body := p.response(t, "GET")
		if want := `{"asked":"` + token + `"}`; body != want || r.Header.Get("Server") != "IMDS/150" {
			t.Errorf("got %s from %s, want %s", body, r.Header.Get("Server"), want)
		}
		if e := sink.next(t); e.Decision != audit.Allow || !e.Upstream || e.Bytes != int64(len(body)) {
			t.Errorf("got %+v", e)
		}
	}
}

func TestBlanking(t *testing.T) {
	const whole = `{"compute":{"name":"vm","userData":"c2VjcmV0"},"network":{}}`
	const blanked = `{"compute":{"name":"vm","userData":""},"network":{}}`
	say := func(status int, body string) sourceFunc {
		return func(context.Context, upstream.Request) (*upstream.Answer, error) {
			a := answer(body)
			a.Status = status
			a.Header.Set("Content-Length", fmt.Sprint(len(body)))
			return a, nil
		}
	}
	for name, tc := range map[string]struct {
		rules      string
		source     sourceFunc
		method     string
		status     int
		body       string
		event      audit.Decision
		isBlanked  bool
		fromSource bool
	}{
		"denied_part_is_taken_out": {"allow: [instance.read]", say(200, whole), "GET", 200, blanked, audit.Allow, true, true},
		"allowed_part_stays":       {"allow: [instance.read, instance.userdata]", say(200, whole), "GET", 200, whole, audit.Allow, false, true},
		"error_of_the_service":     {"allow: [instance.read]", say(400, `{ "error": "Bad request" }`), "GET", 400, `{ "error": "Bad request" }`, audit.Allow, true, true},
		"not_a_document_fails_closed": {"allow: [instance.read]", say(200, `"userData":"c2VjcmV0"`), "GET", 502,
			`{"error":"the answer of the metadata service cannot be filtered"}`, audit.Error, false, false},
		"too_large_fails_closed": {"allow: [instance.read]", say(200, whole+strings.Repeat(" ", 1000)), "GET", 502,
			`{"error":"the answer of the metadata service is too large"}`, audit.Error, false, false},
		"head_does_not_tell_the_length": {"allow: [instance.read]", func(context.Context, upstream.Request) (*upstream.Answer, error) {
			return &upstream.Answer{Status: 200, Header: http.Header{"Content-Length": {"60"}}, Body: http.NoBody}, nil
		}, "HEAD", 200, "", audit.Allow, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			g, sink := newGate(t, tc.source)
			g.Policy, g.Limits.BlankBytes = parsePolicy(t, tc.rules), 1000
			s := start(t, g, listen(t))
			p := dial(t, s.addr)
			p.send(t, request(tc.method, instance))
			r, body := p.response(t, tc.method)
			if r.StatusCode != tc.status || body != tc.body {
				t.Errorf("got %d %s\nwant %d %s", r.StatusCode, body, tc.status, tc.body)
			}
			if want := int64(len(tc.body)); tc.method == "GET" && r.ContentLength != want || tc.method == "HEAD" && r.ContentLength > 0 {
				t.Errorf("got Content-Length %d, want %d", r.ContentLength, want)
			}
			e := sink.next(t)
			if e.Decision != tc.event || (len(e.Blanked) > 0) != tc.isBlanked || e.Upstream != tc.fromSource || e.Status != tc.status {
				t.Errorf("got %+v", e)
			}
		})
	}
}

func TestNoAnswer(t *testing.T) {
	fails := func(err error) sourceFunc {
		return func(context.Context, upstream.Request) (*upstream.Answer, error) { return nil, err }
	}
	odd := func(change func(*upstream.Answer)) sourceFunc {
		return func(context.Context, upstream.Request) (*upstream.Answer, error) {
			a := answer("0123456789")
			change(a)
			return a, nil
		}
	}
	refused := &net.OpError{Op: "dial", Net: "unix", Err: syscall.ECONNREFUSED}
	for name, tc := range map[string]struct {
		source sourceFunc
		status int
		text   string // for the client
		reason string // for the operator
	}{
		"service_away":     {fails(refused), 503, "the metadata service cannot be reached", "dial unix: connection refused"},
		"service_silent":   {fails(fmt.Errorf("ask: %w", upstream.ErrTimeout)), 504, "the metadata service did not answer in time", "ask: the metadata service did not answer in time"},
		"answer_too_large": {fails(upstream.ErrTooLarge), 502, "the answer of the metadata service is too large", "the answer of the metadata service is too large"},
		"body_fails_at_once": {odd(func(a *upstream.Answer) { a.Body = io.NopCloser(failing{upstream.ErrTooLarge}) }), 502,
			"the answer of the metadata service is too large", "the answer of the metadata service is too large"},
		"status_not_final": {odd(func(a *upstream.Answer) { a.Status = 101 }), 503, "the metadata service cannot be reached", upstream.ErrProtocol.Error()},
		"panic":            {func(context.Context, upstream.Request) (*upstream.Answer, error) { panic("token eyJ0") }, 503, "the metadata service cannot be reached", "the gate itself failed"},
		"panic_in_the_body": {odd(func(a *upstream.Answer) { a.Body = panicking{} }), 503,
			"the metadata service cannot be reached", "the gate itself failed"},
	} {
		t.Run(name, func(t *testing.T) {
			g, sink := newGate(t, tc.source)
			var log bytes.Buffer
			g.Log = slog.New(slog.NewTextHandler(&log, nil))
			s := start(t, g, listen(t))
			p := dial(t, s.addr)
			for range 2 { // the connection can be used again
				p.send(t, request("GET", token))
				r, body := p.response(t, "GET")
				if r.StatusCode != tc.status || !strings.Contains(body, `"error_description":"`+tc.text+`"`) {
					t.Errorf("got %d %s, want %d and %q", r.StatusCode, body, tc.status, tc.text)
				}
				if r.Header.Get("Server") != "" {
					t.Error("a refusal bears the header of an answer")
				}
				if e := sink.next(t); e.Decision != audit.Error || e.Status != tc.status || e.Reason != tc.reason || e.Upstream || e.Rule != "p.yaml:1" {
					t.Errorf("got %+v, want an error because %s", e, tc.reason)
				}
			}
			s.stop()
			<-s.done
			if strings.Contains(log.String(), "eyJ0") || strings.HasPrefix(name, "panic") != strings.Contains(log.String(), "panic") {
				t.Errorf("got log %q", &log)
			}
			sink.none(t)
		})
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

type panicking struct{}

func (panicking) Read(p []byte) (int, error) { return int(p[len(p)]), nil }
func (panicking) Close() error               { return nil }

// Once a part is sent, the only honest end is one that the client notices.
func TestAnswerBrokenOffIsNotTakenForTheWhole(t *testing.T) {
	begun := func(rest io.Reader, size int64) sourceFunc {
		return func(context.Context, upstream.Request) (*upstream.Answer, error) {
			a := answer("")
			a.Body, a.Size = io.NopCloser(io.MultiReader(strings.NewReader("begun"), rest)), size
			return a, nil
		}
	}
	for name, tc := range map[string]struct {
		source sourceFunc
		reason string
	}{
		"service_breaks_off":           {begun(failing{upstream.ErrProtocol}, 99), upstream.ErrProtocol.Error()},
		"service_breaks_off_in_chunks": {begun(failing{upstream.ErrProtocol}, -1), upstream.ErrProtocol.Error()},
		"too_large_in_chunks":          {begun(failing{upstream.ErrTooLarge}, -1), upstream.ErrTooLarge.Error()},
		"shorter_than_it_said":         {begun(strings.NewReader(""), 99), "unexpected EOF"},
		"panic":                        {begun(panicking{}, -1), "the gate itself failed"},
	} {
		t.Run(name, func(t *testing.T) {
			_, sink, s := serving(t, tc.source)
			p := dial(t, s.addr)
			p.send(t, request("GET", token))
			r, err := http.ReadResponse(p.r, nil)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(r.Body); string(b) != "begun" || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("got %q, %v, want the begin and an unexpected end", b, err)
			}
			if e := sink.next(t); e.Decision != audit.Error || e.Status != 200 || e.Bytes != 5 || !e.Upstream || e.Reason != tc.reason {
				t.Errorf("got %+v, want an error because %s", e, tc.reason)
			}
		})
	}
}

func TestCallerThatLeavesEndsTheUpstreamRequest(t *testing.T) {
	for name, begin := range map[string]bool{"before_the_answer": false, "within_the_answer": true} {
		t.Run(name, func(t *testing.T) {
			asked, ended := make(chan struct{}), make(chan struct{})
			source := service(t, func(w http.ResponseWriter, r *http.Request) {
				if begin {
					io.WriteString(w, "begun")
					w.(http.Flusher).Flush()
				}
				close(asked)
				<-r.Context().Done()
				close(ended)
			})
			_, sink, s := serving(t, source)
			p := dial(t, s.addr)
			p.send(t, request("GET", token))
			<-asked
			if begin {
				if _, err := p.r.ReadByte(); err != nil {
					t.Fatal(err)
				}
			}
			p.Close()
			<-ended
			e := sink.next(t)
			if e.Decision != audit.Error || e.Reason != "the connection ended before the answer was sent" || (e.Status == 200) != begin {
				t.Errorf("got %+v, want an error, because the connection ended", e)
			}
			s.stop()
			<-s.done
			sink.none(t)
		})
	}
}

// lossy is a sink whose disk is full now and then.
type lossy struct {
	mu     sync.Mutex
	fails  bool
	events []audit.Event
}

func (l *lossy) Record(e audit.Event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fails {
		return syscall.ENOSPC
	}
	l.events = append(l.events, e)
	return nil
}

// The record fails open, on purpose: see Gate.Audit.
func TestLostEventsAreCountedAndLoggedOnce(t *testing.T) {
	g, _ := newGate(t, says("{}"))
	sink := &lossy{fails: true}
	var log bytes.Buffer
	g.Audit, g.Log = sink, slog.New(slog.NewTextHandler(&log, nil))
	s := start(t, g, listen(t))
	p := dial(t, s.addr)
	for i := range 5 {
		sink.mu.Lock()
		sink.fails = i < 3
		sink.mu.Unlock()
		p.send(t, request("GET", instance))
		if r, _ := p.response(t, "GET"); r.StatusCode != 200 {
			t.Errorf("got %d, want the answer all the same", r.StatusCode)
		}
		// The event is written after the answer: a refusal of the same
		// connection comes after both.
		p.send(t, request("GET", "//"))
		p.response(t, "GET")
	}
	s.stop()
	<-s.done
	if n := g.AuditFailures(); n < 5 || n > 6 || int(n)+len(sink.events) != 10 {
		t.Errorf("got %d lost and %d kept events, want 10 in all, half of them lost", n, len(sink.events))
	}
	if n := strings.Count(log.String(), "audit events are lost"); n != 1 || !strings.Contains(log.String(), syscall.ENOSPC.Error()) {
		t.Errorf("got %d reports, want 1 with the error:\n%s", n, &log)
	}
}

func TestRefusalsNeverSayUnreachable(t *testing.T) {
	for _, err := range []error{syscall.ENETUNREACH, upstream.ErrTimeout, upstream.ErrTooLarge, imds.ErrNotDocument} {
		if body := failure(imds.Query{}, err).Body(); bytes.Contains(body, []byte("unreachable")) {
			t.Errorf("%v: SDKs take %s for Docker Desktop's proxy", err, body)
		}
	}
}
