package main

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"imdsgate/internal/agent"
	"imdsgate/internal/discover"
)

// TestForwardsWithAnEngine has what the agent on Windows asks of an engine done by a
// real one, with Linux's binary: only forward itself is another there.
func TestForwardsWithAnEngine(t *testing.T) {
	b := newByHand(t)
	first := b.proxy(t)
	exe, err := os.ReadFile(b.Binary)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.docker.Image(t.Context(), "side", map[string]string{"/forward": b.Binary}); err != nil {
		t.Fatal(err)
	}
	client := func(name, label string) {
		t.Helper()
		b.run(t, "docker", "run", "--detach", "--name", name, "--label", label, "--user", "0:0", "--cap-add", "NET_ADMIN", clientImage, "sleep", "1000")
	}
	client("inside", "way=exec")
	client("beside", "way=sidecar")
	client(unled, "way=none")
	var all []*agent.Forwards
	log := new(sharedLog)
	for _, by := range []agent.By{agent.ByExec, agent.BySidecar} {
		all = append(all, &agent.Forwards{
			Clients: &discover.Clients{Host: b.docker.Host(), Label: "way=" + string(by), Proxy: "MSIProxyContainer", Root: "/", User: "0:0", Caps: []string{"NET_ADMIN"}},
			By:      by, Service: netip.MustParseAddrPort("169.254.169.254:80"), Port: 80, Image: "side", Exe: exe, Side: []string{"/forward"}, Log: slog.New(slog.NewTextHandler(log, nil)),
		})
	}
	stop := b.keep(t, all)
	wantAnswers := func(names ...string) {
		t.Helper()
		for _, name := range names {
			b.wantLed(t, name)
		}
	}
	wantAnswers("inside", "beside")
	client("later", "way=sidecar")
	wantAnswers("later")
	b.wantNotLed(t)
	if strings.Contains(log.String(), "side-car removed") {
		t.Errorf("an agent took another's side-car for an orphan:\n%s", log)
	}

	// The proxy comes back under another address, and a client goes.
	b.run(t, "docker", "rm", "--force", "imds-proxy")
	b.run(t, "docker", "run", "--detach", "--name", "squatter", clientImage, "sleep", "1000")
	if second := b.proxy(t); second == first {
		t.Fatalf("the proxy came back at %v: this would prove nothing", first)
	}
	wantAnswers("inside", "beside", "later")
	b.wantNotLed(t)
	b.run(t, "docker", "rm", "--force", "later")
	b.eventually(t, func(list string) bool { return strings.Count(list, "side") == 1 }, "docker", "ps", "--all", "--format", "{{.Image}}")

	// An agent that comes anew finds what is there; then all is taken back.
	// One client has started again meanwhile: its side-car is in the network from before.
	stop()
	b.run(t, "docker", "restart", "--time", "0", "beside")
	stop = b.keep(t, all)
	wantAnswers("inside", "beside")
	stop()
	for _, f := range all {
		if err := f.Undo(t.Context()); err != nil {
			t.Error(err)
		}
	}
	b.eventually(t, func(list string) bool { return !strings.Contains(list, "side") }, "docker", "ps", "--all", "--format", "{{.Image}}")
	b.eventually(t, func(top string) bool { return !strings.Contains(top, "forward") }, "docker", "top", "inside", "-eo", "pid,args")
	if t.Failed() {
		t.Log(log.String())
	}
}

// unled is a client that no agent leads. The simulator answers it too: so an answer
// alone says nothing, and only what the proxy has recorded counts.
const unled = "unled"

// recorded counts what the proxy has recorded of a client.
func (b *byHand) recorded(t *testing.T, client string) int {
	t.Helper()
	addr := strings.TrimSpace(b.run(t, "docker", "inspect", "--format", "{{.NetworkSettings.Networks.bridge.IPAddress}}", client))
	if addr == "" {
		t.Fatalf("%s has no address", client)
	}
	return strings.Count(b.run(t, "docker", "logs", "imds-proxy"), `"address:`+addr+`"`)
}

// wantLed calls until an answer comes of a call that the proxy has recorded.
func (b *byHand) wantLed(t *testing.T, client string) {
	t.Helper()
	before := b.recorded(t, client)
	b.eventually(t, func(answer string) bool { return isInstance(answer) && b.recorded(t, client) > before },
		append([]string{"docker", "exec", client}, askInstance...)...)
}

// wantNotLed is the control: the client without an agent is answered, and by others.
func (b *byHand) wantNotLed(t *testing.T) {
	t.Helper()
	b.eventually(t, isInstance, append([]string{"docker", "exec", unled}, askInstance...)...)
	b.wantLed(t, "inside") // what the proxy records later is there: so is what was before
	if n := b.recorded(t, unled); n != 0 {
		t.Errorf("the proxy has recorded %d calls of a client that nobody leads", n)
	}
}

// keep runs agents until the function that it returns is called.
func (b *byHand) keep(t *testing.T, all []*agent.Forwards) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, len(all))
	for _, f := range all {
		go func() { ended <- f.Run(ctx) }()
	}
	return func() {
		t.Helper()
		cancel()
		for range all {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	}
}

// sharedLog is a log of several writers.
type sharedLog struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *sharedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *sharedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
