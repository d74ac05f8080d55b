package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// simulated is a running "imdsgate simulate".
type simulated struct {
	Metadata, Manage string
	line             string // its ready line
	stderr           bytes.Buffer
	stop             context.CancelFunc
	code             chan int
}

// startSimulate runs the command in this process and waits for its ready line.
func startSimulate(t *testing.T, args ...string) *simulated {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	out, w := io.Pipe()
	s := &simulated{stop: stop, code: make(chan int, 1)}
	e := &env{stdin: strings.NewReader(""), stdout: w, stderr: &s.stderr, getenv: func(string) string { return "" }, ctx: ctx}
	go func() {
		s.code <- run(e, append([]string{"simulate", "--listen", "127.0.0.1:0"}, args...))
		w.Close()
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("no ready line: %v; exit code %d, stderr %s", err, <-s.code, s.stderr.String())
	}
	s.line = line
	return s
}

// end stops it and returns its exit code; stderr is complete then.
func (s *simulated) end() int {
	s.stop()
	return <-s.code
}

func askSimulated(t *testing.T, url string) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Metadata", "true")
	r.Header.Set("Authorization", "Bearer opaque-secret")
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := c.Do(r)
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

func TestSimulateServesUntilItIsStopped(t *testing.T) {
	file := filepath.Join(t.TempDir(), "vm.yaml")
	if err := os.WriteFile(file, []byte("instance: {compute: {name: from-file}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := startSimulate(t, "--manage", "127.0.0.1:0", "--json", "--instance", file, "--limits", "off",
		"--fault", "status=503,path=/metadata/versions,count=1", "--log-requests", "--ignore-case")
	var ready struct {
		Ready            bool
		Metadata, Manage string
	}
	if err := json.Unmarshal([]byte(s.line), &ready); err != nil || !ready.Ready {
		t.Fatalf("ready line %q: %v", s.line, err)
	}
	if status, _ := askSimulated(t, ready.Metadata+"/metadata/versions"); status != 503 {
		t.Errorf("first call: got %d, want the fault's 503", status)
	}
	if status, _ := askSimulated(t, ready.Metadata+"/metadata/versions"); status != 200 {
		t.Errorf("second call: got %d, want 200", status)
	}
	_, name := askSimulated(t, ready.Metadata+"/metadata/instance/Compute/NAME?api-version=2021-02-01&format=text")
	if name != "from-file" {
		t.Errorf("got name %q, want the file's", name)
	}
	if _, body := askSimulated(t, ready.Manage+"/healthz"); body != "ok\n" {
		t.Errorf("got %q from the management API", body)
	}
	if code := s.end(); code != exitOK {
		t.Errorf("got exit code %d, want %d", code, exitOK)
	}
	lines := strings.Split(strings.TrimSpace(s.stderr.String()), "\n")
	if len(lines) != 3 {
		t.Fatalf("got %d log lines, want one for each of 3 requests:\n%s", len(lines), s.stderr.String())
	}
	for i, want := range []float64{503, 200, 200} {
		var x map[string]any
		if err := json.Unmarshal([]byte(lines[i]), &x); err != nil || x["status"] != want {
			t.Errorf("log line %s: %v, want status %v", lines[i], err, want)
		}
	}
	if strings.Contains(s.stderr.String(), "opaque-secret") {
		t.Errorf("a token is in the log: %s", s.stderr.String())
	}
}

func TestSimulateReadyLineForPeople(t *testing.T) {
	s := startSimulate(t)
	if !strings.HasPrefix(s.line, "ready: metadata http://127.0.0.1:") || !strings.HasSuffix(s.line, ", management off\n") {
		t.Errorf("got %q", s.line)
	}
	if code := s.end(); code != exitOK || s.stderr.Len() != 0 {
		t.Errorf("got exit code %d, stderr %q", code, s.stderr.String())
	}
}

func TestSimulateRefuses(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := taken.Addr().String()
	file := filepath.Join(t.TempDir(), "vm.yaml")
	if err := os.WriteFile(file, []byte("instance:\n  compute:\n    vmName: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	rows := []struct {
		name string
		args []string
		code int
		want []string // in stderr
	}{
		{"port in use", []string{"--listen", port}, exitFailure, []string{"imdsgate: --listen: listen tcp4 " + port + ": ", "in use\n", "or try a free one: --listen 127.0.0.1:0\n"}},
		{"management port in use", []string{"--listen", "127.0.0.1:0", "--manage", port}, exitFailure, []string{"--manage: ", "or try a free one: --manage 127.0.0.1:0\n"}},
		{"no port", []string{"--listen", "127.0.0.1"}, exitUsage, []string{"--listen: ", "missing port", "hint: give address and port"}},
		{"port too large", []string{"--listen", "127.0.0.1:99999"}, exitUsage, []string{"--listen: ", "invalid port", "hint: give address and port"}},
		{"bad file", []string{"--instance", file}, exitUsage, []string{"vm.yaml:3: instance.compute: unknown key \"vmName\": want one of "}},
		{"no file", []string{"--instance", file + ".not"}, exitUsage, []string{"simulate: --instance: open " + file + ".not: "}},
		{"bad limits", []string{"--limits", "many"}, exitUsage, []string{`limit "many": want a number above 0`}},
		{"bad fault", []string{"--fault", "slow"}, exitUsage, []string{`fault "slow": unknown key "slow": want one of path,`}},
		{"argument", []string{"vm.yaml"}, exitUsage, []string{`unexpected argument "vm.yaml"`}},
		{"unknown flag", []string{"--port", "1"}, exitUsage, []string{"unknown flag: --port"}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // whatever starts by mistake ends at once, with another exit code
			e := &env{stdin: strings.NewReader(""), stdout: &stdout, stderr: &stderr, getenv: func(string) string { return "" }, ctx: ctx}
			if row.code == exitFailure {
				e.ctx = t.Context()
			}
			if code := run(e, append([]string{"simulate"}, row.args...)); code != row.code {
				t.Errorf("got exit code %d, want %d", code, row.code)
			}
			for _, want := range row.want {
				if !strings.Contains(stderr.String(), want) {
					t.Errorf("got stderr %q, want %q in it", stderr.String(), want)
				}
			}
			if stdout.Len() != 0 {
				t.Errorf("got stdout %q", stdout.String())
			}
		})
	}
}
