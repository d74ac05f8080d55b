package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"imdsgate/internal/relay"
)

// fakeCapture is a listener on loopback in the place of a captured address.
type fakeCapture struct {
	l        net.Listener
	detached chan struct{}
}

func (c *fakeCapture) Listeners() ([]net.Listener, error) { return []net.Listener{c.l}, nil }
func (c *fakeCapture) Ensure() (bool, error)              { return false, nil }
func (c *fakeCapture) Detach() error {
	c.l.Close() // it may be closed already
	close(c.detached)
	return nil
}

// lines is a log that can be waited for.
type lines struct {
	mu   sync.Mutex
	text string
	more chan struct{}
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text += string(b)
	close(l.more)
	l.more = make(chan struct{})
	return len(b), nil
}

func (l *lines) await(t *testing.T, words string) {
	t.Helper()
	for timeout := time.After(20 * time.Second); ; {
		l.mu.Lock()
		text, more := l.text, l.more
		l.mu.Unlock()
		if strings.Contains(text, words) {
			return
		}
		select {
		case <-more:
		case <-timeout:
			t.Fatalf("log has no %q:\n%s", words, text)
		}
	}
}

// sayOn answers every connection of a listener with words.
func sayOn(t *testing.T, words string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Write([]byte(words))
			c.Close()
		}
	}()
	return l
}

func askAddr(t *testing.T, a net.Addr) string {
	t.Helper()
	c, err := net.Dial("tcp", a.String())
	if err != nil {
		return "error"
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	b, err := io.ReadAll(c)
	if err != nil {
		return "error"
	}
	return string(b)
}

// TestForwarder goes through a life: the target moves, is not there, and is there
// again; the capture is destroyed and made again; the end.
func TestForwarder(t *testing.T) {
	first, second := sayOn(t, "first"), sayOn(t, "second")
	file := filepath.Join(t.TempDir(), "proxy.env")
	put := func(a string) {
		t.Helper()
		if err := writeEnvFile(file, addressVariable, a); err != nil {
			t.Fatal(err)
		}
	}
	put(first.Addr().String())
	tgt, err := (&forwardFlags{envFile: file}).target(func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	opened := make(chan *fakeCapture, 2)
	log := &lines{more: make(chan struct{})}
	fail := errors.New("not now")
	results := []error{nil, fail, nil}
	f := &forwarder{target: tgt, log: slog.New(slog.NewTextHandler(log, nil)), relay: relay.Relay{}, open: func(context.Context) (capture, error) {
		err := results[0]
		results = results[1:]
		if err != nil {
			return nil, err
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Error(err)
		}
		c := &fakeCapture{l, make(chan struct{})}
		opened <- c
		return c, nil
	}}
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- f.Run(ctx, func() { close(ready) }) }()
	<-ready
	c := <-opened
	want := func(words string) {
		t.Helper()
		if got := askAddr(t, c.l.Addr()); got != words {
			t.Errorf("got %q, want %q", got, words)
		}
	}
	want("first")
	put(second.Addr().String())
	log.await(t, `msg="the proxy has another address"`)
	want("second")
	put("172.17.0.2 172.18.0.2")
	log.await(t, "the last one stays")
	want("second")
	gone := sayOn(t, "")
	gone.Close()
	put(gone.Addr().String())
	log.await(t, "to="+gone.Addr().String())
	want("error")
	log.await(t, "the proxy does not answer")
	put(first.Addr().String())
	log.await(t, "from="+gone.Addr().String())
	want("first")
	log.await(t, "the proxy answers again")

	c.l.Close() // as whoever destroys the socket
	<-c.detached
	log.await(t, "capture cannot be made")
	c = <-opened
	want("first")

	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	<-c.detached
	if strings.Count(log.text, "the last one stays") != 1 {
		t.Errorf("the bad line was not reported once:\n%s", log.text)
	}
}

// TestForwarderEndsBeforeItBegins is cancelled while it waits for its capture.
func TestForwarderEndsBeforeItBegins(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	log := &lines{more: make(chan struct{})}
	f := &forwarder{log: slog.New(slog.NewTextHandler(log, nil)), open: func(ctx context.Context) (capture, error) {
		cancel()
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	if err := f.Run(ctx, func() { t.Error("it is ready") }); err != nil {
		t.Error(err)
	}
}

// TestDialMovesOn gives up on an address that says nothing as soon as there is
// another one.
func TestDialMovesOn(t *testing.T) {
	second := sayOn(t, "second")
	tgt := &target{}
	tgt.set(netip.MustParseAddrPort("127.0.0.1:1"))
	to := tgt.now()
	tgt.set(second.Addr().(*net.TCPAddr).AddrPort())
	if !to.replaced() {
		t.Fatal("not replaced")
	}
	if c, err := to.dial(t.Context()); err == nil {
		c.Close()
		t.Error("connected to an address that was replaced")
	}
	f := &forwarder{target: tgt, log: slog.New(slog.DiscardHandler)}
	c, err := f.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, _ := io.ReadAll(c); string(b) != "second" {
		t.Errorf("got %q", b)
	}
}

// TestEndWith ends at a file that comes, or becomes another, and not at one that is
// there.
func TestEndWith(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct{ name, first string }{{"comes", ""}, {"another", "old"}} {
		file := filepath.Join(dir, tc.name)
		put := func(text string) {
			t.Helper()
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if tc.first != "" {
			put(tc.first)
		}
		watch := endWith(file)
		ended := make(chan struct{})
		put("new")
		watch(t.Context(), func() { close(ended) })
		select {
		case <-ended:
		default:
			t.Errorf("%s: it did not end", tc.name)
		}
	}
	stays := filepath.Join(dir, "comes")
	ctx, cancel := context.WithTimeout(t.Context(), 2*envFilePoll)
	defer cancel()
	endWith(stays)(ctx, func() { t.Error("it ended at a file that was there") })
}
