package status

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

// Client asks the proxy at a unix socket.
type Client struct{ Path string }

const maxReply = 64 << 20 // bytes

// Policy is what is in force.
func (c *Client) Policy(ctx context.Context) (p Policy, err error) {
	return p, c.ask(ctx, http.MethodGet, "/v1/policy", nil, &p)
}

// Workloads are those that the proxy serves.
func (c *Client) Workloads(ctx context.Context) (all []*workload.Workload, err error) {
	return all, c.ask(ctx, http.MethodGet, "/v1/workloads", nil, &all)
}

// Explain says what the proxy would do with a request, without making it.
func (c *Client) Explain(ctx context.Context, q Question) (e policy.Explanation, err error) {
	return e, c.ask(ctx, http.MethodPost, "/v1/explain", q, &e)
}

func (c *Client) ask(ctx context.Context, method, path string, body, into any) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://proxy"+path, bytes.NewReader(b))
	if err != nil {
		return err
	}
	rt := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", c.Path)
	}}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err = io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		var p problem
		if json.Unmarshal(b, &p) != nil || p.Error == "" {
			return fmt.Errorf("proxy: status %d", resp.StatusCode)
		}
		return errors.New(p.Error)
	}
	return json.Unmarshal(b, into)
}
