package upstream_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// service is a metadata service that is one function for each connection: it
// sees the bytes as they come and says what it likes.
type service struct {
	addr  string
	conns atomic.Int32
}

func serve(t *testing.T, talk func(n int32, c net.Conn)) *service {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{addr: l.Addr().String()}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n := s.conns.Add(1)
			go func() {
				defer c.Close()
				talk(n, c)
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return s
}

// client never dials anything but the service under test, whatever its Host.
func (s *service) client(t *testing.T, c *upstream.Client) *upstream.Client {
	c.Dial = func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", s.addr)
	}
	t.Cleanup(c.CloseIdle)
	return c
}

// readRequest reads one request as bytes, up to the end of its body of n bytes.
func readRequest(r *bufio.Reader, n int) (string, error) {
	var b strings.Builder
	for {
		line, err := r.ReadString('\n')
		if b.WriteString(line); err != nil {
			return b.String(), err
		}
		if line == "\r\n" {
			_, err := io.CopyN(&b, r, int64(n))
			return b.String(), err
		}
	}
}

// say answers every request on a connection with the same text.
func say(text string) func(int32, net.Conn) {
	return func(_ int32, c net.Conn) {
		r := bufio.NewReader(c)
		for {
			if _, err := readRequest(r, 0); err != nil {
				return
			}
			if _, err := io.WriteString(c, text); err != nil {
				return
			}
		}
	}
}

func get(action imds.Action) upstream.Request {
	return upstream.Request{Query: imds.Query{
		Cloud: imds.Azure, Action: action, Method: "GET", Path: "/metadata/instance",
		Params: []imds.Param{{Name: "api-version", Value: "2021-02-01"}},
	}}
}

// read takes an answer to its end.
func read(t *testing.T, c upstream.Source, r upstream.Request) (*upstream.Answer, string, error) {
	t.Helper()
	a, err := c.Answer(t.Context(), r)
	if err != nil {
		if a != nil {
			t.Errorf("an answer beside the error %v", err)
		}
		return nil, "", err
	}
	b, err := io.ReadAll(a.Body)
	if cerr := a.Body.Close(); cerr != nil {
		t.Errorf("close: %v", cerr)
	}
	return a, string(b), err
}

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

func TestSendsNothingOfItsOwn(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("http_proxy", "http://127.0.0.1:1")
	post := upstream.Request{Query: imds.Query{Action: imds.EventsApprove, Method: "POST", Path: "/metadata/scheduledevents",
		Params: []imds.Param{{Name: "api-version", Value: "2020-07-01"}}},
		Header: http.Header{"Metadata": {"true"}, "Content-Type": {"application/json"}}, Body: []byte(`{"a":1}`)}
	head := get(imds.InstanceRead)
	head.Query.Method = "HEAD"
	odd := get(imds.IdentityToken)
	odd.Query.Params = []imds.Param{{Name: "resource", Value: "https://vault.example/ a&b=c%2f"}}
	agent := get(imds.InstanceRead)
	agent.Header = http.Header{"User-Agent": {"sdk/1"}, "Metadata": {"True"}}
	empty := post
	empty.Body = nil

	for name, tc := range map[string]struct {
		host    string
		request upstream.Request
		want    string
	}{
		"bare":             {"", get(imds.InstanceRead), "GET /metadata/instance?api-version=2021-02-01 HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"},
		"head":             {"", head, "HEAD /metadata/instance?api-version=2021-02-01 HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n"},
		"clients_agent":    {"", agent, "GET /metadata/instance?api-version=2021-02-01 HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: sdk/1\r\nMetadata: True\r\n\r\n"},
		"configured_host":  {"imds.test:8080", get(imds.InstanceRead), "GET /metadata/instance?api-version=2021-02-01 HTTP/1.1\r\nHost: imds.test:8080\r\n\r\n"},
		"escapes_verbatim": {"", odd, "GET " + odd.Query.Target() + " HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"},
		"post": {"", post, "POST /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1\r\nHost: 169.254.169.254\r\n" +
			"Connection: close\r\nContent-Length: 7\r\nContent-Type: application/json\r\nMetadata: true\r\n\r\n{\"a\":1}"},
		"empty_post": {"", empty, "POST /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1\r\nHost: 169.254.169.254\r\n" +
			"Connection: close\r\nContent-Length: 0\r\nContent-Type: application/json\r\nMetadata: true\r\n\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			seen := make(chan string, 1)
			s := serve(t, func(_ int32, c net.Conn) {
				text, err := readRequest(bufio.NewReader(c), len(tc.request.Body))
				seen <- fmt.Sprint(text, errText(err))
				io.WriteString(c, strings.TrimSuffix(ok, "{}"))
				if tc.request.Query.Method != "HEAD" {
					io.WriteString(c, "{}")
				}
			})
			before := tc.request.Header.Clone()
			if _, _, err := read(t, s.client(t, &upstream.Client{Host: tc.host}), tc.request); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, <-seen); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
			if d := cmp.Diff(before, tc.request.Header); d != "" {
				t.Errorf("the caller's header was changed (-want +got)\n%s", d)
			}
		})
	}
}

func errText(err error) string {
	if err != nil {
		return err.Error()
	}
	return ""
}

func TestTargetThatIsNotCanonicalIsNotSent(t *testing.T) {
	c := &upstream.Client{Dial: func(context.Context) (net.Conn, error) {
		t.Error("dialled")
		return nil, errors.New("no")
	}}
	for name, path := range map[string]string{
		"empty": "", "absolute_form": "http://10.0.0.1/", "other_authority": "//10.0.0.1/", "asterisk": "*",
		"second_request": "/a HTTP/1.1\r\nHost: x\r\n\r\nGET /b", "space": "/a b", "not_ascii": "/ä",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Answer(t.Context(), upstream.Request{Query: imds.Query{Method: "GET", Path: path}})
			if err == nil || !strings.Contains(err.Error(), "not in canonical form") {
				t.Errorf("got %v, want a refusal", err)
			}
		})
	}
}

func TestAnswerIsTheServices(t *testing.T) {
	for name, tc := range map[string]struct {
		method, said string
		status       int
		header       http.Header
		body         string
		size         int64
	}{
		"plain": {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nServer: IMDS/1\r\nDate: then\r\n\r\n{}", 200,
			http.Header{"Content-Length": {"2"}, "Server": {"IMDS/1"}, "Date": {"then"}}, "{}", 2},
		"chunked": {"GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 200, http.Header{}, "{}", -1},
		"redirect_is_not_followed": {"GET", "HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\nContent-Length: 0\r\n\r\n", 302,
			http.Header{"Location": {"http://10.0.0.1/"}, "Content-Length": {"0"}}, "", 0},
		"error_status":         {"GET", "HTTP/1.1 429 Slow\r\nContent-Length: 1\r\n\r\nx", 429, http.Header{"Content-Length": {"1"}}, "x", 1},
		"gzip_stays_gzip":      {"GET", "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", 200, http.Header{"Content-Encoding": {"gzip"}, "Content-Length": {"1"}}, "x", 1},
		"hop_by_hop_is_ours":   {"GET", "HTTP/1.1 200 OK\r\nConnection: x-hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n", 200, http.Header{"Content-Length": {"0"}}, "", 0},
		"head_has_no_body":     {"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", 200, http.Header{"Content-Length": {"99"}}, "", 0},
		"interim_is_skipped":   {"GET", "HTTP/1.1 103 Early\r\n\r\n" + ok, 200, http.Header{"Content-Length": {"2"}}, "{}", 2},
		"no_content":           {"GET", "HTTP/1.1 204 No\r\n\r\n", 204, http.Header{}, "", 0},
		"http_1_0_until_close": {"GET", "HTTP/1.0 200 OK\r\n\r\n{}", 200, http.Header{}, "{}", -1},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, func(_ int32, c net.Conn) {
				readRequest(bufio.NewReader(c), 0)
				io.WriteString(c, tc.said)
			})
			r := get(imds.InstanceRead)
			r.Query.Method = tc.method
			a, body, err := read(t, s.client(t, &upstream.Client{}), r)
			if err != nil {
				t.Fatal(err)
			}
			if a.Status != tc.status || body != tc.body || a.Size != tc.size {
				t.Errorf("got %d %q of %d bytes, want %d %q of %d", a.Status, body, a.Size, tc.status, tc.body, tc.size)
			}
			if d := cmp.Diff(tc.header, a.Header); d != "" {
				t.Errorf("header (-want +got)\n%s", d)
			}
		})
	}
}

// A token that comes in a shape that is not HTTP must not leave in an error.
func TestBrokenAnswers(t *testing.T) {
	const secret = "eyJ0eXAi"
	for name, tc := range map[string]struct {
		said string
		want error
	}{
		"no_byte":                 {"", upstream.ErrProtocol},
		"not_http":                {secret + "\r\n\r\n", upstream.ErrProtocol},
		"bad_status":              {"HTTP/1.1 " + secret + "\r\n\r\n", upstream.ErrProtocol},
		"bad_header":              {"HTTP/1.1 200 OK\r\n" + secret + "\r\n\r\n", upstream.ErrProtocol},
		"two_lengths":             {"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n" + secret, upstream.ErrProtocol},
		"other_protocol":          {"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n" + secret, upstream.ErrProtocol},
		"status_of_no_class":      {"HTTP/1.1 777 Odd\r\nContent-Length: 0\r\n\r\n", upstream.ErrProtocol},
		"endless_header":          {"HTTP/1.1 200 OK\r\nX: " + strings.Repeat(secret, 9<<10) + "\r\n\r\n", upstream.ErrProtocol},
		"body_cut_short":          {"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + secret, upstream.ErrProtocol},
		"chunks_cut_short":        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n" + secret + "\r\n", upstream.ErrProtocol},
		"bad_chunk":               {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + secret + "\r\n", upstream.ErrProtocol},
		"too_large_by_its_header": {"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n" + secret + "123", upstream.ErrTooLarge},
		"too_large_in_chunks":     {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n" + secret + "\r\n3\r\n123\r\n0\r\n\r\n", upstream.ErrTooLarge},
		"too_large_until_close":   {"HTTP/1.0 200 OK\r\n\r\n" + secret + "123", upstream.ErrTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, func(_ int32, c net.Conn) {
				readRequest(bufio.NewReader(c), 0)
				io.WriteString(c, tc.said)
			})
			max := int64(10)
			if strings.HasPrefix(name, "body_cut") {
				max = 100
			}
			_, body, err := read(t, s.client(t, &upstream.Client{MaxBody: max}), get(imds.IdentityToken))
			if !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			if name == "too_large_by_its_header" {
				max = 0 // there is no need to begin
			}
			if int64(len(body)) > max {
				t.Errorf("got %d bytes of body, want at most %d", len(body), max)
			}
			if err != nil && strings.Contains(err.Error(), secret[:4]) {
				t.Errorf("the error quotes what the service sent: %v", err)
			}
		})
	}
}

func TestBodyOfExactlyTheLimit(t *testing.T) {
	for name, said := range map[string]string{
		"with_length": "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789",
		"in_chunks":   "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, say(said))
			_, body, err := read(t, s.client(t, &upstream.Client{MaxBody: 10}), get(imds.InstanceRead))
			if body != "0123456789" || err != nil {
				t.Errorf("got %q, %v, want the whole body", body, err)
			}
		})
	}
}

func TestDialErrorIsPassedOn(t *testing.T) {
	c := &upstream.Client{Dial: func(context.Context) (net.Conn, error) { return nil, os.ErrPermission }}
	_, err := c.Answer(t.Context(), get(imds.InstanceRead))
	if !errors.Is(err, os.ErrPermission) || err.Error() != "dial the metadata service: permission denied" {
		t.Errorf("got %v, want the dialler's error", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	c = &upstream.Client{Host: l.Addr().String()}
	if _, err := c.Answer(t.Context(), get(imds.InstanceRead)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("got %v, want connection refused from Host itself", err)
	}
}
