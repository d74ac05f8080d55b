package upstream

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"imdsgate/internal/imds"
)

// The reasons for which there is no answer, or not all of one. No error of a
// Client quotes what the service sent.
var (
	// ErrTimeout: the service kept silent for too long.
	ErrTimeout = errors.New("the metadata service did not answer in time")
	// ErrTooLarge: the body is longer than Client.MaxBody.
	ErrTooLarge = errors.New("the answer of the metadata service is too large")
	// ErrProtocol: the connection broke off, or what came was not HTTP.
	ErrProtocol = errors.New("the metadata service broke off or did not speak HTTP")
)

const (
	defaultHost    = "169.254.169.254"
	defaultMaxBody = 4 << 20
	maxHeader      = 64 << 10
	maxIdle        = 64
	idleTime       = time.Minute
	dialTime       = 5 * time.Second
)

// Client is the Source that asks the metadata service itself. It sends the
// canonical query and the given header, and nothing of its own but Host and the
// framing, which is Connection: close on a HEAD: no User-Agent, no
// Accept-Encoding, no mark of a proxy (docs/protocol-azure.md §2). It follows no
// redirect and knows no proxy.
//
// A request that meets a kept connection which the service has just closed is
// repeated on another, unless it is a POST, which is never sent twice. Nothing
// else is ever tried again: clients have their own patience.
//
// The fields are set before the first Answer and not changed afterwards.
type Client struct {
	// Host is the authority of the service, as in its URL: it is sent as Host
	// and, when Dial is nil, dialled. Empty means 169.254.169.254.
	Host string

	// Dial opens a connection to the service; nil dials Host, on port 80 if it
	// names none. The client closes the connection. Whoever dials has 5 s.
	Dial func(ctx context.Context) (net.Conn, error)

	// MaxBody bounds the body of an answer, in bytes; 0 means 4 MiB. Beyond it
	// the body ends in ErrTooLarge.
	MaxBody int64

	// MaxConns bounds the connections to the service; 0 means 512. Requests
	// beyond it wait for their turn, as long as they would for an answer.
	// At most 64 connections are kept without use, for a minute.
	MaxConns int

	// Patience is how long the service may keep silent, before the header of
	// its answer and between any two pieces of the body; 0 means 10 s.
	Patience time.Duration

	// EventsPatience is the same for scheduled events, whose first call on a VM
	// takes the service up to two minutes (docs/protocol-azure.md §7); 0 means 130 s.
	EventsPatience time.Duration

	once sync.Once
	rt   *http.Transport
}

// Answer asks the service. The errors are those above, the context's, and those
// of dialling.
func (c *Client) Answer(ctx context.Context, r Request) (*Answer, error) {
	req, err := c.request(r)
	if err != nil {
		return nil, err
	}
	w := newWatch(ctx, c.patience(r.Query.Action))
	resp, err := c.transport().RoundTrip(req.WithContext(w.ctx))
	w.pause()
	if err == nil {
		err = c.check(resp, r.Query.Method)
	}
	if err != nil {
		err = w.explain(err)
		w.end()
		return nil, err
	}
	a := &Answer{Status: resp.StatusCode, Header: imds.AnswerHeader(resp.Header), Size: resp.ContentLength}
	if r.Query.Method == http.MethodHead {
		a.Size = 0
	}
	a.Body = &body{from: resp.Body, left: cmp.Or(c.MaxBody, defaultMaxBody), watch: w}
	return a, nil
}

// CloseIdle closes the connections that no request uses. Call it when the last
// request is over.
func (c *Client) CloseIdle() { c.transport().CloseIdleConnections() }

// request builds what is sent. The target goes out byte for byte, which is why
// it stands in Opaque: a parsed path would be encoded anew.
func (c *Client) request(r Request) (*http.Request, error) {
	target := r.Query.Target()
	if !strings.HasPrefix(target, "/") || strings.HasPrefix(target, "//") || strings.ContainsFunc(target, notPlain) {
		return nil, errors.New("upstream: the target of the query is not in canonical form")
	}
	h := make(http.Header, len(r.Header)+1)
	maps.Copy(h, r.Header)
	if _, ok := h["User-Agent"]; !ok {
		h["User-Agent"] = nil // net/http would invent one
	}
	req := &http.Request{
		Method:     r.Query.Method,
		URL:        &url.URL{Scheme: "http", Host: cmp.Or(c.Host, defaultHost), Opaque: target},
		Header:     h,
		Proto:      "HTTP/1.1",
		ProtoMajor: 1,
		ProtoMinor: 1,
	}
	switch r.Query.Method {
	case http.MethodHead:
		// A service that answers with a body all the same would have it taken
		// for the answer to the next request, which may be another workload's.
		req.Close = true
	case http.MethodPost:
		// A service that does not read the body would take it for the next request,
		// which may be another workload's.
		req.Close = true
		// net/http sends a POST twice only if it has GetBody, or no body and a
		// key that says it may be.
		h.Del("Idempotency-Key")
		h.Del("X-Idempotency-Key")
		req.Body = http.NoBody
		if req.ContentLength = int64(len(r.Body)); req.ContentLength > 0 {
			req.Body = io.NopCloser(bytes.NewReader(r.Body))
		}
	}
	return req, nil
}

func notPlain(r rune) bool { return r <= ' ' || r > '~' }

// check closes the body of an answer that it refuses.
func (c *Client) check(resp *http.Response, method string) error {
	switch {
	case resp.StatusCode < 200 || resp.StatusCode > 599:
		resp.Body.Close()
		return ErrProtocol
	case method != http.MethodHead && resp.ContentLength > cmp.Or(c.MaxBody, defaultMaxBody):
		resp.Body.Close()
		return ErrTooLarge
	}
	return nil
}

func (c *Client) patience(a imds.Action) time.Duration {
	if a == imds.EventsRead || a == imds.EventsApprove {
		return cmp.Or(c.EventsPatience, 130*time.Second)
	}
	return cmp.Or(c.Patience, 10*time.Second)
}

func (c *Client) transport() *http.Transport {
	c.once.Do(func() {
		protocols := new(http.Protocols)
		protocols.SetHTTP1(true)
		c.rt = &http.Transport{
			DialContext:            c.dial,
			DisableCompression:     true,
			MaxIdleConns:           maxIdle,
			MaxIdleConnsPerHost:    maxIdle,
			MaxConnsPerHost:        cmp.Or(c.MaxConns, 512),
			IdleConnTimeout:        idleTime,
			MaxResponseHeaderBytes: maxHeader,
			Protocols:              protocols,
		}
	})
	return c.rt
}

// dialError is an error of dialling: the one kind whose text is not replaced.
type dialError struct{ err error }

func (e *dialError) Error() string { return fmt.Sprintf("dial the metadata service: %v", e.err) }
func (e *dialError) Unwrap() error { return e.err }

// dial is the transport's; addr is Host with a port.
func (c *Client) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	var conn net.Conn
	var err error
	if c.Dial != nil {
		conn, err = c.Dial(ctx)
	} else {
		conn, err = new(net.Dialer).DialContext(ctx, network, addr)
	}
	if err != nil {
		return nil, &dialError{err}
	}
	if t, ok := conn.(*net.TCPConn); ok {
		// A caller that leaves makes us close first: without this each such close
		// would keep a port of the host busy for a minute. Where the fence forbids
		// it the agent has done it already.
		_ = t.SetLinger(0)
	}
	return conn, nil
}
