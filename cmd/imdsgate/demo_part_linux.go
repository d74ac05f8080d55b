package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// The demo's containers run this binary too, as an app of their own and as a
// client that knows nothing of imdsgate: an ordinary HTTP request to the
// well-known address.

// answer is what the client was told.
type answer struct {
	URL    string  `json:"url"`
	Peer   string  `json:"peer"` // getpeername
	Status int     `json:"status"`
	Body   string  `json:"body"`
	Took   float64 `json:"took_ms"`
	Error  string  `json:"error,omitempty"`
}

func demoPartCmd(e *env) *cobra.Command {
	cmd := &cobra.Command{Use: "demo-part", Hidden: true, Short: "What the demo's containers run", Args: noArgs}
	var mapped bool
	client := &cobra.Command{
		Use: "client URL...",
		RunE: func(_ *cobra.Command, urls []string) error {
			for _, u := range urls {
				if err := writeJSON(e.stdout, ask(e.ctx, u, mapped)); err != nil {
					return err
				}
			}
			return nil
		},
	}
	client.Flags().BoolVar(&mapped, "mapped", false, "call from an IPv6 socket, as ::ffff:a.b.c.d")
	var name string
	app := &cobra.Command{
		Use: "app", Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return demoApp(e, name) },
	}
	app.Flags().StringVar(&name, "name", "", "what the app calls itself")
	cmd.AddCommand(client, app)
	return cmd
}

// demoApp answers on every address, port 80, as a web server does.
func demoApp(e *env, name string) error {
	l, err := net.Listen("tcp", "0.0.0.0:80")
	if err != nil {
		return err
	}
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "the own app of %s\n", name)
	})}
	go func() { <-e.ctx.Done(); srv.Close() }()
	fmt.Fprintln(e.stdout, "ready")
	if err := srv.Serve(l); e.ctx.Err() == nil {
		return err
	}
	return nil
}

func ask(ctx context.Context, url string, mapped bool) answer {
	a := answer{URL: url}
	start := time.Now()
	defer func() { a.Took = float64(time.Since(start).Microseconds()) / 1000 }()
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		dial := new(net.Dialer).DialContext
		if mapped {
			dial = dialMapped
		}
		c, err := dial(ctx, network, address)
		if err == nil {
			a.Peer = c.RemoteAddr().String()
		}
		return c, err
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		a.Error = err.Error()
		return a
	}
	req.Header.Set("Metadata", "true")
	resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Do(req)
	if err != nil {
		a.Error = err.Error()
		return a
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		a.Error = err.Error()
	}
	a.Status, a.Body = resp.StatusCode, string(b)
	a.Took = float64(time.Since(start).Microseconds()) / 1000
	return a
}

// dialMapped connects an IPv6 socket to an IPv4 address, as Java does by default.
func dialMapped(_ context.Context, _, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "mapped")
	defer f.Close()
	if err := unix.Connect(fd, &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}); err != nil {
		return nil, fmt.Errorf("connect ::ffff:%s: %w", address, err)
	}
	return net.FileConn(f)
}
