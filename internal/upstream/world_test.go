package upstream_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"imdsgate/internal/imds"
	"imdsgate/internal/sim"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

// source is a Source that is one function, and counts its calls.
type source struct {
	calls  atomic.Int32
	answer func(ctx context.Context, r upstream.Request) (*upstream.Answer, error)
}

func (s *source) Answer(ctx context.Context, r upstream.Request) (*upstream.Answer, error) {
	s.calls.Add(1)
	return s.answer(ctx, r)
}

func answer(status int, body string) *upstream.Answer {
	return &upstream.Answer{Status: status, Body: io.NopCloser(strings.NewReader(body)), Size: int64(len(body)),
		Header: http.Header{"Content-Type": {"application/json; charset=utf-8"}, "Content-Length": {strconv.Itoa(len(body))}}}
}

// saying is a source that says the same always.
func saying(status int, body string) *source {
	return &source{answer: func(context.Context, upstream.Request) (*upstream.Answer, error) { return answer(status, body), nil }}
}

const vault, graph = "https://vault.azure.net", "https://graph.microsoft.com/"

// tokenFor asks for a token, of the default identity unless pairs of parameters
// say otherwise.
func tokenFor(resource string, params ...string) upstream.Request {
	q := imds.Query{Cloud: imds.Azure, Action: imds.IdentityToken, Method: "GET", Path: "/metadata/identity/oauth2/token",
		Family: imds.Identity, Params: []imds.Param{{Name: "api-version", Value: "2018-02-01"}}}
	for i := 0; i < len(params); i += 2 {
		q.Params = append(q.Params, imds.Param{Name: params[i], Value: params[i+1]})
	}
	q.Params = append(q.Params, imds.Param{Name: "resource", Value: resource})
	return upstream.Request{Query: q, Header: http.Header{"Metadata": {"true"}}}
}

func by(id workload.ID, r upstream.Request) upstream.Request {
	r.Workload = id
	return r
}

// container is the ID of one of many.
func container(i int) workload.ID { return workload.ID(fmt.Sprint("docker:", i)) }

// asking is a GET of any path.
func asking(action imds.Action, path string) upstream.Request {
	r := get(action)
	r.Query.Path, r.Header = path, http.Header{"Metadata": {"true"}}
	return r
}

// tokenBody is what the service says of a token that expires at that time.
func tokenBody(name string, expires time.Time, in time.Duration) string {
	return fmt.Sprintf(`{"access_token":%q,"expires_in":"%d","expires_on":"%d","token_type":"Bearer"}`, name, int64(in.Seconds()), expires.Unix())
}

// minting is a source of tokens that live for so long, t1, t2 and so on.
func minting(life time.Duration) *source {
	s := &source{}
	s.answer = func(context.Context, upstream.Request) (*upstream.Answer, error) {
		return answer(200, tokenBody(fmt.Sprint("t", s.calls.Load()), time.Now().Add(life), life)), nil
	}
	return s
}

type tokenText struct {
	Token string `json:"access_token"`
	In    int64  `json:"expires_in,string"`
	On    int64  `json:"expires_on,string"`
}

// ask wants an answer, and says what its token is and where it is from.
func ask(t *testing.T, s upstream.Source, r upstream.Request) (token, from string) {
	t.Helper()
	tok, from := askToken(t, s, r)
	return tok.Token, from
}

func askToken(t *testing.T, s upstream.Source, r upstream.Request) (tok tokenText, from string) {
	t.Helper()
	a, body, err := read(t, s, r)
	if err != nil {
		t.Fatalf("got %v, want an answer", err)
	}
	if a.Bytes != nil && string(a.Bytes) != body || a.Size != int64(len(body)) {
		t.Errorf("Body, Bytes and Size do not agree: %q, %q, %d", body, a.Bytes, a.Size)
	}
	if v := a.Header.Get("Content-Length"); v != "" && v != strconv.Itoa(len(body)) {
		t.Errorf("Content-Length is %s for %d bytes", v, len(body))
	}
	if a.Status == 200 && json.Unmarshal([]byte(body), &tok) != nil {
		t.Errorf("got %q, want JSON", body)
	}
	return tok, a.Cache
}

// keysOnce are made once: that takes its time.
var keysOnce = sync.OnceValues(func() (*sim.Keys, error) { return sim.NewKeys(time.Unix(0, 0)) })

func simulator(t testing.TB, c sim.Config) *sim.Server {
	t.Helper()
	keys, err := keysOnce()
	if err != nil {
		t.Fatal(err)
	}
	c.Keys = keys
	s, err := sim.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// listening runs the simulator on 127.0.0.1, and is a client of it.
func listening(t testing.TB, s *sim.Server) *upstream.Client {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return running(t, s, l, func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
	})
}

// piping runs the simulator on pipes, so that time can be made up, and is a
// client of it.
func piping(t testing.TB, s *sim.Server) *upstream.Client {
	t.Helper()
	l := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	return running(t, s, l, l.dial)
}

func running(t testing.TB, s *sim.Server, l net.Listener, dial func(context.Context) (net.Conn, error)) *upstream.Client {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, l, nil) }()
	c := &upstream.Client{Dial: dial}
	t.Cleanup(func() {
		c.CloseIdle()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return c
}

// pipes is a listener of pipes.
type pipes struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (p *pipes) dial(ctx context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.conns <- theirs:
		return ours, nil
	case <-p.closed:
	case <-ctx.Done():
	}
	return nil, net.ErrClosed
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.closed) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// outcome is what somebody who asked has got.
type outcome struct {
	body, from string
	err        error
}

// askLater asks in another goroutine.
func askLater(ctx context.Context, s upstream.Source, r upstream.Request) <-chan outcome {
	c := make(chan outcome, 1)
	go func() {
		a, err := s.Answer(ctx, r)
		if err != nil {
			c <- outcome{err: err}
			return
		}
		b, err := io.ReadAll(a.Body)
		a.Body.Close()
		c <- outcome{string(b), a.Cache, err}
	}()
	return c
}

func readIn(ctx context.Context, s upstream.Source, r upstream.Request) (string, string, error) {
	o := <-askLater(ctx, s, r)
	return o.body, o.from, o.err
}
