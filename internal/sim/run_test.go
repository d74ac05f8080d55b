package sim

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"

	"go.uber.org/goleak"
)

func loopback(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func fetch(t *testing.T, url string) (int, string) {
	t.Helper()
	r, _ := http.NewRequestWithContext(t.Context(), "GET", url, nil)
	r.Header.Set("Metadata", "true")
	res, err := client(t).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

func TestRun(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	hanging := make(chan struct{})
	b := newBench(t, Config{Faults: []Fault{{Hang: true, Path: "/hang"}}, Seen: func(x Exchange) {
		if x.Status == 0 {
			close(hanging)
		}
	}})
	protocol, manage := loopback(t), loopback(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- b.Run(ctx, protocol, manage) }()

	if status, body := fetch(t, "http://"+protocol.Addr().String()+"/metadata/identity/info?api-version=2018-02-01"); status != 200 {
		t.Errorf("protocol: got %d %s", status, body)
	}
	if status, body := fetch(t, "http://"+manage.Addr().String()+"/healthz"); status != 200 {
		t.Errorf("management: got %d %s", status, body)
	}
	cut := make(chan error)
	go func() {
		res, err := client(t).Get("http://" + protocol.Addr().String() + "/hang")
		if err == nil {
			res.Body.Close()
		}
		cut <- err
	}()
	<-hanging
	stop()
	if err := <-cut; err == nil {
		t.Error("the hanging request was answered")
	}
	if err := <-ended; err != nil {
		t.Errorf("got %v, want nil after a cancel", err)
	}
	for _, l := range []net.Listener{protocol, manage} {
		if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
			c.Close()
			t.Errorf("%s still listens", l.Addr())
		}
	}
}

func TestRunWithoutManagement(t *testing.T) {
	b := newBench(t, Config{})
	l := loopback(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- b.Run(ctx, l, nil) }()
	if status, _ := fetch(t, "http://"+l.Addr().String()+"/metadata/versions"); status != 200 {
		t.Errorf("got %d", status)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestRunFailsWithItsListener(t *testing.T) {
	b := newBench(t, Config{})
	l, manage := loopback(t), loopback(t)
	l.Close()
	if err := b.Run(t.Context(), l, manage); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want the closed listener", err)
	}
	if c, err := net.Dial("tcp", manage.Addr().String()); err == nil {
		c.Close()
		t.Error("the management listener is still open")
	}
}

func TestNewRefuses(t *testing.T) {
	keys, err := testKeys()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]Config{
		"fault that does nothing": {Faults: []Fault{{Count: 1}}},
		"VM without versions":     {VM: &VM{}},
		"VM of unknown version":   {VM: &VM{Versions: []string{"2022-01-01"}}},
	} {
		c.Keys = keys
		if _, err := New(c); err == nil {
			t.Errorf("%s: got no error", name)
		}
	}
}

func TestVMMadeByHand(t *testing.T) {
	b := newBench(t, Config{VM: &VM{Versions: allVersions, Instance: map[string]any{"compute": map[string]any{"more": "x"}}}})
	if a := b.get("/metadata/instance/compute/more?format=text&api-version=2017-04-02"); a.Body != "x" {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if a := b.get("/metadata/attested/document?api-version=2025-04-07"); a.Status != 200 {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
}
