package discover

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// handsEngine plays an engine, at a socket of this platform's kind: lists, events,
// and calls that change something, which it writes down.
type handsEngine struct {
	host   string
	events chan string

	mu    sync.Mutex
	list  []map[string]any
	calls []string
	gone  bool // execs and containers are not known

	started string // when every container was
}

func newHandsEngine(t *testing.T) *handsEngine {
	t.Helper()
	l, host := engineListener(t)
	f := &handsEngine{host: host, events: make(chan string)}
	s := httptest.NewUnstartedServer(f)
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return f
}

func (f *handsEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Api-Version", "1.41")
	_, call, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	switch {
	case call == "":
		fmt.Fprint(w, "OK") // _ping
	case call == "containers/json":
		f.mu.Lock()
		defer f.mu.Unlock()
		json.NewEncoder(w).Encode(f.list)
	case call == "events":
		w.(http.Flusher).Flush()
		for {
			select {
			case line := <-f.events:
				fmt.Fprintln(w, line)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	default:
		f.change(w, r, call)
	}
}

// change writes a call down and answers it.
func (f *handsEngine) change(w http.ResponseWriter, r *http.Request, call string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	body, _ := io.ReadAll(r.Body)
	line := r.Method + " " + call
	switch {
	case f.gone:
		http.Error(w, `{"message":"No such thing"}`, http.StatusNotFound)
	case strings.HasSuffix(call, "/archive"):
		line += " " + r.URL.Query().Get("path") + " " + packed(body)
	case strings.HasSuffix(call, "/exec"), call == "containers/create":
		var v map[string]any
		json.Unmarshal(body, &v)
		line += " " + asked(r, v)
		w.WriteHeader(http.StatusCreated)
		fmt.Fprint(w, `{"Id":"made"}`)
	case strings.HasPrefix(call, "containers/") && strings.HasSuffix(call, "/json"):
		fmt.Fprintf(w, `{"State":{"StartedAt":%q}}`, f.started)
		return
	case strings.HasSuffix(call, "/json"):
		fmt.Fprint(w, `{"ID":"made","Running":false,"ExitCode":7}`)
	case strings.HasPrefix(call, "containers/") && r.Method == "POST" && !strings.Contains(call, "exec"):
		w.WriteHeader(http.StatusNoContent)
	}
	f.calls = append(f.calls, line)
}

// packed is what is in an archive.
func packed(b []byte) string {
	var all []string
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if err != nil {
			return strings.Join(all, " ")
		}
		text, _ := io.ReadAll(r)
		all = append(all, fmt.Sprintf("%s=%s", h.Name, text))
	}
}

// asked are the parts of a request that matter here.
func asked(r *http.Request, v map[string]any) string {
	host, _ := v["HostConfig"].(map[string]any)
	s := fmt.Sprint(v["User"], " ", v["Entrypoint"], " ", v["Cmd"])
	if host != nil {
		s = r.URL.Query().Get("name") + " " + s + fmt.Sprint(" ", v["Image"], " ", v["Labels"], " ", host["NetworkMode"], " ", host["Isolation"])
	}
	return s
}

func (f *handsEngine) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

func box(id, name, state, label, address string) map[string]any {
	labels := map[string]string{}
	if label != "" {
		k, v, _ := strings.Cut(label, "=")
		labels[k] = v
	}
	networks := map[string]any{}
	if address != "" {
		networks["nat"] = map[string]any{"IPAddress": address}
	}
	return map[string]any{"Id": strings.Repeat(id, 64), "Names": []string{"/" + name}, "State": state, "Labels": labels,
		"HostConfig": map[string]any{"NetworkMode": "nat"}, "NetworkSettings": map[string]any{"Networks": networks}}
}

func sidecarOf(id, name, state, client, by, since string) map[string]any {
	c := box(id, name, state, "", "")
	c["Labels"] = map[string]string{forLabel: client, byLabel: by, sinceLabel: since}
	return c
}

func (f *handsEngine) clients() *Clients {
	return &Clients{Host: f.host, Label: "imdsgate.enable=true", Proxy: "MSIProxyContainer", Root: `C:\`, User: "ContainerAdministrator", Isolation: "process"}
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestClientsLook lists clients and side-cars, and locates the proxy, by the
// engine's socket or named pipe.
func TestClientsLook(t *testing.T) {
	f := newHandsEngine(t)
	const own, start = "imdsgate.enable=true", "2026-01-02T03:04:05.6Z"
	a, s := strings.Repeat("a", 64), strings.Repeat("5", 64)
	joins := box("b", "joins", "running", "imdsgate.enable=true", "")
	joins["HostConfig"] = map[string]any{"NetworkMode": "container:" + a}
	f.list = []map[string]any{
		box("a", "web", "running", "imdsgate.enable=true", "172.20.0.5"),
		joins,
		box("c", "stopped", "exited", "imdsgate.enable=true", ""),
		box("d", "opted-out", "running", "imdsgate.enable=false", "172.20.0.6"),
		box("e", "other", "running", "", "172.20.0.7"),
		sidecarOf("5", "side", "exited", a, own, start),
		sidecarOf("6", "orphan", "running", strings.Repeat("9", 64), own, start),
	}
	f.started = start
	got, err := f.clients().Look(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Clients) != 1 || !errors.As(got.Clients[0].Why, new(*NotLocatedError)) || len(got.Clients[0].Addrs) != 1 {
		t.Fatalf("without a proxy: got %+v", got)
	}
	f.list = append(f.list, box("f", "proxy", "running", "MSIProxyContainer", "172.20.0.2"))
	if got, err = f.clients().Look(within(t)); err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddr("172.20.0.5")
	client := Client{ID: a, Name: "web", Addrs: []netip.Addr{addr}, Addr: addr, Proxy: netip.MustParseAddr("172.20.0.2")}
	has, old := client, client
	has.Sidecar, has.SideRuns = s, true
	old.Sidecar, old.SideRuns, old.SideOld = s, true, true
	others := f.list
	for _, tc := range []struct {
		name string
		side map[string]any
		want Sight
	}{
		{"own side-car", sidecarOf("5", "side", "running", a, own, start), Sight{Clients: []Client{has}}},
		{"own side-car, whose client is gone", sidecarOf("5", "side", "running", strings.Repeat("9", 64), own, start), Sight{Clients: []Client{client}, Orphans: []string{s}}},
		{"own side-car, older than its client", sidecarOf("5", "side", "running", a, own, "2026-01-02T03:04:05.4Z"), Sight{Clients: []Client{old}}},
		{"another agent's side-car is not ours", sidecarOf("5", "side", "running", a, "team=shop", start), Sight{Clients: []Client{client}}},
		{"another agent's orphan is not ours", sidecarOf("5", "side", "running", strings.Repeat("9", 64), "team=shop", start), Sight{Clients: []Client{client}}},
	} {
		f.list = append(slices.DeleteFunc(slices.Clone(others), func(c map[string]any) bool {
			return strings.HasPrefix(c["Id"].(string), "5") || strings.HasPrefix(c["Id"].(string), "6")
		}), tc.side)
		got, err := f.clients().Look(within(t))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tc.want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmpopts.IgnoreUnexported(Client{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
	p, err := (&Locator{Host: f.host, Label: "MSIProxyContainer"}).Locate(within(t))
	if err != nil || p.Addr.String() != "172.20.0.2" {
		t.Errorf("located %v, %v", p, err)
	}
}

// TestClientsHands holds the calls that change something.
func TestClientsHands(t *testing.T) {
	f := newHandsEngine(t)
	cs, ctx := f.clients(), within(t)
	f.started = "then"
	client := Client{ID: "0123456789abcdef"}
	root := filepath.ToSlash(cs.Root) // as the library has it on each platform
	want := func(what string, err error, calls ...string) {
		t.Helper()
		if got := f.take(); err != nil || !slices.Equal(got, calls) {
			t.Errorf("%s: %v, got calls\n%s\nwant\n%s", what, err, strings.Join(got, "\n"), strings.Join(calls, "\n"))
		}
	}
	want("put", cs.Put(ctx, "abc", map[string][]byte{"proxy.env": []byte("x")}), "PUT containers/abc/archive "+root+" imdsgate/= imdsgate/proxy.env=x")
	id, err := cs.Exec(ctx, "abc", []string{cs.Path("imdsgate.exe"), "forward"})
	want("exec", err, `POST containers/abc/exec ContainerAdministrator <nil> [C:\imdsgate\imdsgate.exe forward]`, "POST exec/made/start")
	if ended, code, err := cs.Ended(ctx, id); !ended || code != 7 || err != nil {
		t.Errorf("ended: got %v, %d, %v", ended, code, err)
	}
	f.take()
	_, err = cs.AddSidecar(ctx, client, "img", []string{"imdsgate.exe", "forward"}, map[string][]byte{"proxy.env": []byte("x")})
	want("side-car", err, "POST containers/create imdsgate-forward-0123456789ab ContainerAdministrator [imdsgate.exe] [forward] img map[imdsgate.forward-by:imdsgate.enable=true imdsgate.forward-for:0123456789abcdef imdsgate.forward-since:then] container:0123456789abcdef process",
		"PUT containers/made/archive "+root+" imdsgate/= imdsgate/proxy.env=x", "POST containers/made/start")
	want("remove", cs.RemoveSidecar(ctx, "s"), "POST containers/s/stop", "DELETE containers/s")
	f.gone = true
	if ended, _, err := cs.Ended(ctx, id); !ended || err != nil {
		t.Errorf("an exec that the engine has forgotten: got %v, %v", ended, err)
	}
	want("remove what is gone", cs.RemoveSidecar(ctx, "s"), "GET exec/made/json", "POST containers/s/stop", "DELETE containers/s")
}

// TestClientsFollow looks after an event, and again when the engine was away.
func TestClientsFollow(t *testing.T) {
	f := newHandsEngine(t)
	ctx, cancel := context.WithCancel(within(t))
	looks, ended := make(chan struct{}), make(chan error, 1)
	fail := errors.New("engine is away")
	n := 0
	go func() {
		ended <- f.clients().Follow(ctx, func(ctx context.Context) error {
			if n++; n == 2 {
				return fail
			}
			select {
			case looks <- struct{}{}:
			case <-ctx.Done():
			}
			return nil
		}, func(err error) {
			if !errors.Is(err, fail) {
				t.Errorf("told of %v", err)
			}
		})
	}()
	<-looks
	f.events <- `{"Type":"container","Action":"start"}`
	<-looks // the second has failed, and was told
	f.events <- `{"Type":"container","Action":"die"}`
	<-looks
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
