package discover

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"imdsgate/internal/testnet"
)

// TestLocate asks a real engine.
func TestLocate(t *testing.T) {
	testnet.Require(t, testnet.Namespaces, testnet.DockerEngine)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e := startDocker(t, ctx)
	b := boxes{t, ctx, e}
	c, err := client.New(client.WithHost(e.Host()))
	b.must(err)
	defer c.Close()
	for _, network := range []string{"front", "back"} {
		_, err := c.NetworkCreate(ctx, network, client.NetworkCreateOptions{Driver: "bridge"})
		b.must(err)
	}
	l := &Locator{Host: e.Host(), Label: "MSIProxyContainer"}
	wantNot := func(l *Locator, want string) {
		t.Helper()
		_, err := l.Locate(ctx)
		var notLocated *NotLocatedError
		if !errors.As(err, &notLocated) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want a NotLocatedError with %q", err, want)
		}
	}
	wantAt := func(l *Locator, name, network string) {
		t.Helper()
		p, err := l.Locate(ctx)
		if err != nil || p.Name != name || p.Network != network || p.Addr != addressOf(t, c, name, network) {
			t.Errorf("got %+v, %v, want %s on %s", p, err, name, network)
		}
	}

	wantNot(l, "no container")
	f := follow(t, l)
	f.want(t, func(_ Place, err error) bool { return err != nil })

	b.up("proxy", "", "MSIProxyContainer=")
	f.want(t, func(p Place, err error) bool { return err == nil && p.Addr == addressOf(t, c, "proxy", "bridge") })
	wantAt(l, "proxy", "bridge")

	connect := func(network, name string) {
		t.Helper()
		_, err := c.NetworkConnect(ctx, network, client.NetworkConnectOptions{Container: name})
		b.must(err)
	}
	connect("front", "proxy")
	f.want(t, func(_ Place, err error) bool { return err != nil && strings.Contains(err.Error(), "several networks") })
	wantAt(&Locator{Host: l.Host, Name: "proxy", Network: "front"}, "proxy", "front")
	_, err = e.Create(ctx, testnet.Box{Name: "client", Image: "box", Cmd: []string{"/box", "wait"}, Network: "front"})
	b.must(err)
	wantAt(&Locator{Host: l.Host, Label: l.Label, Client: "client"}, "proxy", "front") // created, not started
	b.must(e.Start(ctx, "client"))
	wantAt(&Locator{Host: l.Host, Label: l.Label, Client: "client"}, "proxy", "front")
	b.up("loner", "back")
	wantNot(&Locator{Host: l.Host, Label: l.Label, Client: "loner"}, "share no network")
	b.up("side", "container:client")
	wantAt(&Locator{Host: l.Host, Label: l.Label, Client: "side"}, "proxy", "front")

	b.must(e.Remove(ctx, "proxy"))
	f.want(t, func(_ Place, err error) bool { return err != nil && strings.Contains(err.Error(), "no container") })
	b.up("next", "back", "MSIProxyContainer=")
	f.want(t, func(p Place, err error) bool { return err == nil && p.Name == "next" })

	b.must(e.StopEngine())
	f.want(t, func(_ Place, err error) bool { return err != nil && !errors.As(err, new(*NotLocatedError)) })
	b.must(e.StartEngine(ctx))
	b.must(e.Start(ctx, "next"))
	f.want(t, func(p Place, err error) bool { return err == nil && p.Name == "next" })
}

// addressOf is what the engine says by another call.
func addressOf(t *testing.T, c *client.Client, name, network string) (a netip.Addr) {
	t.Helper()
	r, err := c.ContainerInspect(t.Context(), name, client.ContainerInspectOptions{})
	if err != nil {
		t.Error(err)
		return
	}
	return r.Container.NetworkSettings.Networks[network].IPAddress
}

// followed is what Follow has told.
type followed chan func() (Place, error)

func follow(t *testing.T, l *Locator) followed {
	t.Helper()
	f := make(followed, 64)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- l.Follow(ctx, func(p Place, err error) { f <- func() (Place, error) { return p, err } })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return f
}

// want waits until Follow tells this, whatever it tells before.
func (f followed) want(t *testing.T, ok func(Place, error) bool) {
	t.Helper()
	var last func() (Place, error)
	for timeout := time.After(20 * time.Second); ; {
		select {
		case last = <-f:
			if ok(last()) {
				return
			}
		case <-timeout:
			if last == nil {
				t.Fatal("nothing was told")
			}
			p, err := last()
			t.Fatalf("last told: %+v, %v", p, err)
		}
	}
}

func TestLocateWithoutEngine(t *testing.T) {
	l := &Locator{Host: "unix:///nonexistent/docker.sock", Label: "x"}
	_, err := l.Locate(t.Context())
	if err == nil || errors.As(err, new(*NotLocatedError)) {
		t.Errorf("got %v, want that the engine does not answer", err)
	}
	if _, err := (&Locator{Host: "nonsense"}).Locate(t.Context()); err == nil {
		t.Error("nonsense is taken for an engine")
	}
}
