package gate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must happen.
const patience = 10 * time.Second

// events is a sink that tests wait on.
type events chan audit.Event

func (s events) Record(e audit.Event) error { s <- e; return nil }

// next is the next event, which must come.
func (s events) next(t testing.TB) audit.Event {
	t.Helper()
	select {
	case e := <-s:
		return e
	case <-time.After(patience):
		t.Fatal("no event was recorded")
		return audit.Event{}
	}
}

// none checks that all events were taken.
func (s events) none(t testing.TB) {
	t.Helper()
	select {
	case e := <-s:
		t.Errorf("one event too many: %+v", e)
	default:
	}
}

// sourceFunc is a Source as a function.
type sourceFunc func(ctx context.Context, r upstream.Request) (*upstream.Answer, error)

func (f sourceFunc) Answer(ctx context.Context, r upstream.Request) (*upstream.Answer, error) {
	return f(ctx, r)
}

// says is a Source that always gives the same answer.
func says(body string) sourceFunc {
	return func(context.Context, upstream.Request) (*upstream.Answer, error) { return answer(body), nil }
}

func answer(body string) *upstream.Answer {
	return &upstream.Answer{
		Status: 200,
		Header: http.Header{"Content-Type": {"application/json; charset=utf-8"}, "Server": {"IMDS/1"}},
		Body:   io.NopCloser(strings.NewReader(body)),
		Size:   int64(len(body)),
	}
}

const rules = "allow: [instance.read, identity.token, events.read, events.approve, versions.read]"

func parsePolicy(t testing.TB, text string) *policy.Current {
	t.Helper()
	p, err := policy.Parse("p.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	c := new(policy.Current)
	c.Set(p)
	return c
}

// newGate is a gate of Azure's kind that knows workload web as attachment 1.
func newGate(t testing.TB, source upstream.Source) (*Gate, events) {
	t.Helper()
	sink := make(events, 1000)
	d := new(workload.Directory)
	d.Set(1, workload.Workload{ID: "static:web", Name: "web", Members: []workload.Workload{{ID: "static:a", Name: "web"}, {ID: "static:b", Name: "sidecar"}}})
	return &Gate{Cloud: imds.Azure, Directory: d, Policy: parsePolicy(t, rules), Source: source, Audit: sink}, sink
}

// listen opens a port that stands for the metadata service in attachment 1.
func listen(t testing.TB) Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return Listener{Listener: l, Attachment: 1, Method: "sklookup", Proof: workload.Listener,
		Local: []netip.AddrPort{addrPort(l.Addr())}}
}

// running is a Serve that runs.
type running struct {
	addr string
	stop context.CancelFunc
	done chan error
}

// start serves l. At the end of the test it is stopped and must return nil,
// unless the test has waited for it.
func start(t testing.TB, g *Gate, l Listener) *running {
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{addr: l.Addr().String(), stop: cancel, done: make(chan error, 1)}
	go func() { r.done <- g.Serve(ctx, l); close(r.done) }()
	t.Cleanup(func() {
		cancel()
		if err := <-r.done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return r
}

// serving is the usual bench: a gate over source, and one listener.
func serving(t testing.TB, source upstream.Source) (*Gate, events, *running) {
	t.Helper()
	g, sink := newGate(t, source)
	return g, sink, start(t, g, listen(t))
}

// peer is the client's end of a connection, used byte by byte.
type peer struct {
	net.Conn
	r *bufio.Reader
}

func dial(t testing.TB, addr string) *peer {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return &peer{c, bufio.NewReader(c)}
}

func (p *peer) send(t testing.TB, text string) {
	t.Helper()
	if _, err := io.WriteString(p, text); err != nil {
		t.Fatal(err)
	}
}

// response reads one response and its body.
func (p *peer) response(t testing.TB, method string) (*http.Response, string) {
	t.Helper()
	r, err := http.ReadResponse(p.r, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r, string(b)
}

// closed checks that the gate has closed the connection, and said nothing more.
func (p *peer) closed(t testing.TB) {
	t.Helper()
	b, err := io.ReadAll(p.r)
	var timeout net.Error
	if len(b) > 0 || errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("got %q, %v, want a closed connection", b, err)
	}
}

// request is a proper request with further header lines, which end in \r\n.
func request(method, target string, lines ...string) string {
	return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n%s\r\n", method, target, strings.Join(lines, ""))
}

const (
	instance = "/metadata/instance?api-version=2021-02-01"
	token    = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fvault.example"
	eventsAt = "/metadata/scheduledevents?api-version=2020-07-01"
)

// compare checks an event, but for what differs from run to run.
func compare(t testing.TB, got, want audit.Event) {
	t.Helper()
	if got.Time.IsZero() || got.Time.Location() != time.UTC || got.ID == 0 || got.Conn == 0 || got.Duration < 0 || !got.Peer.IsValid() {
		t.Errorf("the event lacks time, id, connection or peer: %+v", got)
	}
	got.Time, got.ID, got.Conn, got.Duration, got.Peer = time.Time{}, 0, 0, 0, netip.AddrPort{}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
		t.Errorf("event (-want +got)\n%s", d)
	}
}

// web is the event of workload web with the given rest.
func web(e audit.Event) audit.Event {
	e.Workload, e.Name, e.Members = "static:web", "web", []string{"sidecar", "web"}
	e.Proof, e.Method = workload.Listener, "sklookup"
	return e
}

func TestAllowedRequest(t *testing.T) {
	var seen upstream.Request
	g, sink := newGate(t, sourceFunc(func(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
		seen = r
		a := answer(`{"access_token":"x"}`)
		a.Header.Set("Date", "Thu, 01 Jan 2026 00:00:00 GMT")
		a.Header.Set("X-Ms-Request-Id", "7")
		return a, nil
	}))
	s := start(t, g, listen(t))
	p := dial(t, s.addr)
	p.send(t, request("GET", token, "X-Ms-Client-Request-Id: 5\r\nCookie: c\r\n"))
	r, body := p.response(t, "GET")
	want := http.Header{"Content-Type": {"application/json; charset=utf-8"}, "Server": {"IMDS/1"}, "Content-Length": {"20"},
		"Date": {"Thu, 01 Jan 2026 00:00:00 GMT"}, "X-Ms-Request-Id": {"7"}}
	if d := cmp.Diff(want, r.Header); r.StatusCode != 200 || body != `{"access_token":"x"}` || d != "" {
		t.Errorf("got %d %q, header (-want +got)\n%s", r.StatusCode, body, d)
	}
	compare(t, sink.next(t), web(audit.Event{Verb: "GET", Action: imds.IdentityToken,
		Target:   "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.example",
		Decision: audit.Allow, Rule: "p.yaml:1", Reason: "identity.token is allowed by the list allow", Status: 200, Bytes: 20, Upstream: true,
		Snapshot: 1, Identity: "default"}))
	if seen.Query.Target() != token || seen.Body != nil {
		t.Errorf("the source was asked for %q with body %q", seen.Query.Target(), seen.Body)
	}
	if d := cmp.Diff(http.Header{"Metadata": {"true"}, "X-Ms-Client-Request-Id": {"5"}}, seen.Header); d != "" {
		t.Errorf("forwarded header (-want +got)\n%s", d)
	}
	sink.none(t)
}

func TestAnswerIsNotEmbellished(t *testing.T) {
	_, sink, s := serving(t, sourceFunc(func(context.Context, upstream.Request) (*upstream.Answer, error) {
		return &upstream.Answer{Status: 404, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("<html>")), Size: 6}, nil
	}))
	p := dial(t, s.addr)
	p.send(t, request("GET", instance))
	r, body := p.response(t, "GET")
	if d := cmp.Diff(http.Header{"Content-Length": {"6"}}, r.Header); r.StatusCode != 404 || body != "<html>" || d != "" {
		t.Errorf("got %d %q, header (-want +got)\n%s", r.StatusCode, body, d)
	}
	if e := sink.next(t); e.Decision != audit.Allow || e.Status != 404 || !e.Upstream {
		t.Errorf("got %+v, want the service's 404 as an answer", e)
	}
}

func TestHead(t *testing.T) {
	_, sink, s := serving(t, sourceFunc(func(context.Context, upstream.Request) (*upstream.Answer, error) {
		return &upstream.Answer{Status: 200, Header: http.Header{"Content-Length": {"99"}}, Body: http.NoBody}, nil
	}))
	p := dial(t, s.addr)
	for _, target := range []string{token, "/metadata/reprovisiondata", token} {
		p.send(t, request("HEAD", target))
		r, _ := p.response(t, "HEAD")
		e := sink.next(t)
		if e.Verb != "HEAD" || e.Bytes != 0 || e.Status != r.StatusCode {
			t.Errorf("got event %+v, want a HEAD without body and status %d", e, r.StatusCode)
		}
		if target == token && (r.StatusCode != 200 || r.ContentLength != 99) {
			t.Errorf("got %d, length %d, want 200 and 99", r.StatusCode, r.ContentLength)
		}
	}
}

func TestPost(t *testing.T) {
	var seen upstream.Request
	_, sink, s := serving(t, sourceFunc(func(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
		seen = r
		return answer(""), nil
	}))
	p := dial(t, s.addr)
	p.send(t, request("POST", eventsAt, "Content-Length: 5\r\n")+"hello")
	if r, _ := p.response(t, "POST"); r.StatusCode != 200 || string(seen.Body) != "hello" {
		t.Errorf("got %d, and the source got %q", r.StatusCode, seen.Body)
	}
	if e := sink.next(t); e.Action != imds.EventsApprove || e.Decision != audit.Allow {
		t.Errorf("got %+v", e)
	}
}
