//go:build !forwardonly

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/Microsoft/go-winio"

	"imdsgate/internal/agent"
	"imdsgate/internal/redirect"
)

// pipeEngine is a Docker engine on a named pipe with a proxy and a client, which
// writes down what is asked of it.
type pipeEngine struct {
	mu    sync.Mutex
	calls []string
	more  chan struct{} // at every call
}

func newPipeEngine(t *testing.T) (e *pipeEngine, host string) {
	t.Helper()
	name := fmt.Sprintf("imdsgate-agent-%d-%s", os.Getpid(), t.Name())
	l, err := winio.ListenPipe(`\\.\pipe\`+name, &winio.PipeConfig{SecurityDescriptor: "D:P(A;;GA;;;BA)(A;;GA;;;SY)", MessageMode: true})
	if err != nil {
		t.Fatal(err)
	}
	// The library's first instance of a pipe takes no client; Wine gives it one.
	if c, err := winio.DialPipe(`\\.\pipe\`+name, nil); err == nil {
		c.Close()
	}
	e = &pipeEngine{more: make(chan struct{}, 100)}
	s := httptest.NewUnstartedServer(e)
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return e, "npipe:////./pipe/" + name
}

func (e *pipeEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Api-Version", "1.41")
	_, call, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	box := func(id, name, label, value, address string) map[string]any {
		return map[string]any{"Id": strings.Repeat(id, 64), "Names": []string{"/" + name}, "State": "running", "Labels": map[string]string{label: value},
			"HostConfig":      map[string]any{"NetworkMode": "nat"},
			"NetworkSettings": map[string]any{"Networks": map[string]any{"nat": map[string]any{"IPAddress": address}}}}
	}
	switch call {
	case "":
		fmt.Fprint(w, "OK") // _ping
	case "containers/json":
		json.NewEncoder(w).Encode([]any{box("a", "web", "imdsgate.enable", "true", "172.20.0.5"), box("f", "proxy", "MSIProxyContainer", "", "172.20.0.2")})
	case "events":
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	default:
		e.mu.Lock()
		e.calls = append(e.calls, r.Method+" "+call)
		e.mu.Unlock()
		if strings.HasSuffix(call, "/exec") {
			w.WriteHeader(http.StatusCreated)
			fmt.Fprint(w, `{"Id":"made"}`)
		}
		e.more <- struct{}{}
	}
}

// took are the calls so far, with the container's id made short.
func (e *pipeEngine) took() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.ReplaceAll(strings.Join(e.calls, ", "), strings.Repeat("a", 64), "web")
}

// TestAgentOnThePipe runs the agent with an engine on a named pipe: its plan, its
// work, and its undoing.
func TestAgentOnThePipe(t *testing.T) {
	e, host := newPipeEngine(t)
	code, out, errs := called(t, nil, "agent", "--docker", "--engine", host, "--dry-run", "--guard", "host")
	if code != exitOK || e.took() != "" || !strings.HasSuffix(out, "nothing was changed\n") {
		t.Errorf("dry run: got code %d, calls %q, %s%s", code, e.took(), out, errs)
	}
	for _, w := range []string{`the endpoint of client web (172.20.0.5) has the policy ACL {`, `put imdsgate.exe and proxy.env into client web, and start there: [C:\imdsgate\imdsgate.exe forward`, "lead client web to the proxy at 172.20.0.2:80"} {
		if !strings.Contains(out, w) {
			t.Errorf("dry run: no %q in\n%s", w, out)
		}
	}
	code, out, errs = called(t, nil, "locate", "--engine", host)
	if code != exitOK || out != "172.20.0.2\n" {
		t.Errorf("locate: got code %d, %s%s", code, out, errs)
	}

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	log := new(bytes.Buffer)
	ended := make(chan int, 1)
	go func() {
		en := &env{stdin: strings.NewReader(""), stdout: log, stderr: log, getenv: os.Getenv, ctx: ctx}
		ended <- run(en, []string{"agent", "--docker", "--engine", host})
	}()
	for range 4 {
		select {
		case <-e.more:
		case <-ctx.Done():
			t.Fatalf("calls so far: %s", e.took())
		}
	}
	cancel()
	if code := <-ended; code != exitOK {
		t.Errorf("got code %d: %s", code, log)
	}
	const want = "PUT containers/web/archive, PUT containers/web/archive, POST containers/web/exec, POST exec/made/start"
	if got := e.took(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	code, out, errs = called(t, nil, "agent", "--docker", "--engine", host, "--uninstall")
	if code != exitOK || e.took() != want+", PUT containers/web/archive" || out != "agent: side-cars and policies are removed; forwards were told to end\n" {
		t.Errorf("uninstall: got code %d, calls %s, %s%s", code, e.took(), out, errs)
	}
}

func TestAgentRefuses(t *testing.T) {
	for name, args := range map[string][]string{
		"whose calls?":   {},
		"--by":           {"--docker", "--by", "magic"},
		"--guard":        {"--docker", "--guard", "on"},
		"--label":        {"--docker", "--label", ""},
		"--proxy-port":   {"--docker", "--proxy-port", "0"},
		"--listen":       {"--docker", "--listen", "localhost"},
		"--exe: ":        {"--docker", "--exe", `C:\no\such.exe`},
		"unexpected arg": {"--docker", "all"},
	} {
		if code, _, errs := called(t, nil, append([]string{"agent"}, args...)...); code != exitUsage || !strings.Contains(errs, name) || !strings.Contains(errs, "\nhint: ") {
			t.Errorf("%q: got code %d: %s", args, code, errs)
		}
	}
}

// TestAgentErrorHints holds that what HNS says is not laid to the engine.
func TestAgentErrorHints(t *testing.T) {
	for want, err := range map[string]error{
		"Docker engine":           errors.New("no such file"),
		"run it as an admin":      os.ErrPermission,
		"feature Containers":      errors.ErrUnsupported,
		"may not know this":       redirect.ErrNoEffect,
		"the address has to be":   redirect.ErrNoEndpoint,
		"no other network":        redirect.ErrEndpoints,
		"connect it to its netwo": agent.ErrNoAddress,
	} {
		var h *hintError
		if got := agentError(fmt.Errorf("client web: %w", err)); !errors.As(got, &h) || !strings.Contains(h.hint, want) {
			t.Errorf("%v: got %#v, want the hint %q", err, h, want)
		}
	}
}

// TestPlanWithNoReader holds that a plan that cannot be written is no success.
func TestPlanWithNoReader(t *testing.T) {
	if err := printPlan(broken{}, []string{"x"}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, os.ErrClosed }
