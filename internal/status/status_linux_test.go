package status

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/testnet"
	"imdsgate/internal/workload"
)

// serve starts a handler on a socket of its own.
func serve(t *testing.T, h *Handler) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- h.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
	})
	return &Client{Path: path}
}

func handler(t *testing.T, text string) *Handler {
	t.Helper()
	p, err := policy.Parse("p.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	h := &Handler{Cloud: imds.Azure, Policy: new(policy.Current), Directory: new(workload.Directory)}
	h.Policy.Set(p)
	h.Directory.Set(1, workload.Workload{ID: "docker:1", Name: "web"})
	h.Directory.Set(2, workload.Workload{ID: "docker:2", Name: "twin"})
	h.Directory.Set(3, workload.Workload{ID: "docker:3", Name: "twin"})
	h.Directory.Set(4, workload.Workload{ID: "docker:4+docker:5", Name: "app+car", Members: []workload.Workload{{ID: "docker:4", Name: "app"}, {ID: "docker:5", Name: "car"}}})
	return h
}

func TestExplain(t *testing.T) {
	c := serve(t, handler(t, "rules: [{match: {name: web}, allow: [versions.read]}]\n"))
	for name, tc := range map[string]struct {
		q             Question
		decision, err string
	}{
		"by_name":           {Question{"web", "", "/metadata/versions"}, "allow", ""},
		"by_id":             {Question{"docker:2", "GET", "/metadata/versions"}, "deny", ""},
		"by_member":         {Question{"car", "GET", "/metadata/versions"}, "deny", ""},
		"two_of_that_name":  {Question{"twin", "GET", "/metadata/versions"}, "", `2 workloads have the name "twin": give an ID, like docker:2`},
		"nobody":            {Question{"x", "GET", "/metadata/versions"}, "", `no workload "x": there are web, twin, twin, app+car`},
		"no_proper_request": {Question{"web", "GET", "/metadata//versions"}, "refuse", ""},
		"no_method":         {Question{"web", "BREW", "/metadata/versions"}, "refuse", ""},
	} {
		t.Run(name, func(t *testing.T) {
			e, err := c.Explain(t.Context(), tc.q)
			if got := errText(err); tc.err == "" && err != nil || !strings.HasPrefix(got, tc.err) || e.Decision != tc.decision {
				t.Errorf("got %q, %q, want %q, %q", e.Decision, got, tc.decision, tc.err)
			}
		})
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestShows(t *testing.T) {
	h := handler(t, "mode: audit\nallow: [versions.read]\n")
	ready := false
	h.Ready = func() bool { return ready }
	c := serve(t, h)
	if p, err := c.Policy(t.Context()); err != nil || p != (Policy{1, "p.yaml", policy.Audit, 1}) {
		t.Errorf("policy: got %+v, %v", p, err)
	}
	if all, err := c.Workloads(t.Context()); err != nil || len(all) != 4 || all[0].Name != "web" || len(all[3].Members) != 2 {
		t.Errorf("workloads: got %v, %v", all, err)
	}
	if err := c.ask(t.Context(), http.MethodGet, "/healthz", nil, new(struct{})); errText(err) != "not ready" {
		t.Errorf("healthz: got %v, want not ready", err)
	}
	ready = true
	if err := c.ask(t.Context(), http.MethodGet, "/healthz", nil, new(struct{})); err != nil {
		t.Errorf("healthz: got %v", err)
	}
	if err := c.ask(t.Context(), http.MethodPost, "/v1/policy", nil, new(struct{})); !strings.HasPrefix(errText(err), "there is GET /v1/policy") {
		t.Errorf("a change of the policy: got %v, want a refusal", err)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "control.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("got %v, %v, want mode 0600", info.Mode(), err)
	}
	if _, err := Listen(path); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("in use: got %v, want EADDRINUSE", err)
	}
	l.(*own).UnixListener.Close() // as if its process had died
	if l, err = Listen(path); err != nil {
		t.Errorf("left by a dead process: got %v, want a new socket", err)
	}
	// Somebody else's socket at the same path is not removed with ours.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("another's socket went with ours: %v", err)
	}
	other.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("closed: got %v, want no file", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file); err == nil {
		t.Error("a file was taken for a socket")
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Errorf("the file has %q now", b)
	}
	if _, err := Listen(filepath.Join(dir, "missing", "control.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no folder: got %v, want not exist", err)
	}
}

// Another user's process is hung up on, though the mode would let it in.
func TestStrangerIsHungUpOn(t *testing.T) {
	testnet.Require(t, testnet.Root, testnet.Command("curl"))
	h := handler(t, "{}")
	dir, err := os.MkdirTemp("", "imdsgate-status-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- h.Serve(ctx, l) }()
	defer func() { cancel(); <-ended }()
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	for uid, ok := range map[uint32]bool{0: true, 65534: false} {
		cmd := exec.Command("curl", "-sS", "--max-time", "5", "--unix-socket", path, "http://proxy/v1/policy")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if (err == nil) != ok || strings.Contains(string(out), "snapshot") != ok {
			t.Errorf("uid %d: got %v: %s, want an answer: %v", uid, err, out, ok)
		}
	}
}

var _ net.Listener = (*own)(nil)
