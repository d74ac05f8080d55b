package relay

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkRelay compares the relay, as a process of its own, with a direct
// connection and with what people use instead, where those are installed. The
// clients and the server are the same for all, and in this process. 16 clients ask
// and get an answer of 2 KiB, on one connection each or on a new one each time.
//
//	go test -run '^$' -bench Relay -benchtime 3s -count 5 ./internal/relay
func BenchmarkRelay(b *testing.B) {
	target := serve(b)
	for _, way := range []struct {
		name  string
		start func(b *testing.B, listen, target string) *exec.Cmd // nil: no relay at all
	}{
		{"direct", nil}, {"imdsgate", ourselves}, {"haproxy", haproxy}, {"socat", socat},
	} {
		address := target
		if way.start != nil {
			if way.name != "imdsgate" {
				if _, err := exec.LookPath(way.name); err != nil {
					b.Logf("%s is not installed", way.name)
					continue
				}
			}
			address = free(b)
			run(b, way.start(b, address, target), address)
		}
		b.Run("keep-alive/"+way.name, func(b *testing.B) { clients(b, address, false) })
		b.Run("new/"+way.name, func(b *testing.B) { clients(b, address, true) })
	}
}

func ourselves(_ *testing.B, listen, target string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), relayEnv+"="+listen+" "+target)
	return cmd
}

func haproxy(b *testing.B, listen, target string) *exec.Cmd {
	b.Helper()
	path := filepath.Join(b.TempDir(), "haproxy.cfg")
	text := fmt.Sprintf("defaults\n mode tcp\n timeout connect 5s\n timeout client 1m\n timeout server 1m\nlisten l\n bind %s\n server s %s\n", listen, target)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	return exec.Command("haproxy", "-f", path)
}

func socat(_ *testing.B, listen, target string) *exec.Cmd {
	host, port, _ := strings.Cut(listen, ":")
	return exec.Command("socat", fmt.Sprintf("TCP-LISTEN:%s,bind=%s,fork,reuseaddr,backlog=1024", port, host), "TCP:"+target)
}

// run has a relay running until the benchmark's end.
func run(b *testing.B, cmd *exec.Cmd, address string) {
	b.Helper()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for range 100 {
		if c, err := net.Dial("tcp", address); err == nil {
			c.Close()
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	b.Fatalf("%q does not listen on %s", cmd.Args, address)
}

// free is an address that nobody listens on.
func free(b *testing.B) string {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

const (
	question   = "GET / HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n\r\n"
	answerSize = 2048
)

// serve answers each question on a connection.
func serve(b *testing.B) string {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go answer(c)
		}
	}()
	return l.Addr().String()
}

func answer(c net.Conn) {
	defer c.Close()
	r, words := bufio.NewReader(c), make([]byte, answerSize)
	for {
		if _, err := r.Discard(len(question)); err != nil {
			return
		}
		if _, err := c.Write(words); err != nil {
			return
		}
	}
}

func clients(b *testing.B, address string, anew bool) {
	const n = 16
	var left atomic.Int64
	left.Store(int64(b.N))
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			var c net.Conn
			buf := make([]byte, answerSize)
			for left.Add(-1) >= 0 {
				if c == nil {
					var err error
					if c, err = new(net.Dialer).DialContext(context.Background(), "tcp", address); err != nil {
						b.Error(err)
						return
					}
				}
				if _, err := io.WriteString(c, question); err != nil {
					b.Error(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Error(err)
				}
				if anew {
					c.Close()
					c = nil
				}
			}
			if c != nil {
				c.Close()
			}
		})
	}
	all.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
}
