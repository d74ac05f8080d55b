package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"imdsgate/internal/testnet"
)

// windowsPatience is for what has to start under Wine first.
const windowsPatience = 60 * time.Second

// windows is a client container whose programs are Windows': the stack's simulator
// and proxy are Linux's. Linux adds 169.254.169.254 to the client's loopback, since
// Wine cannot; all else is what Windows runs.
type windows struct {
	*hand
	*testnet.Wine
	exe string
}

func newWindows(t *testing.T) *windows {
	t.Helper()
	testnet.Require(t, testnet.WineHere, testnet.Command("curl"), testnet.Command("ip"))
	s, cs := newStack(t, "client", "first", "second")
	ctx, cancel := context.WithTimeout(t.Context(), windowsPatience)
	defer cancel()
	w, err := testnet.NewWine(ctx, cs[0].NS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return &windows{hand: &hand{Stack: s, client: cs[0], first: cs[1], second: cs[2]}, Wine: w, exe: buildWindows(t, w.Dir())}
}

// buildWindows builds imdsgate.exe as people install it.
func buildWindows(t *testing.T, dir string, flags ...string) string {
	t.Helper()
	path := filepath.Join(dir, "imdsgate.exe")
	args := append([]string{"build", "-trimpath", "-ldflags=-s -w", "-o", path}, flags...)
	cmd := exec.Command("go", append(args, ".")...)
	cmd.Env = append(os.Environ(), "GOOS=windows", "GOARCH=amd64", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	return path
}

// run runs imdsgate.exe to its end, and returns its exit code and output.
func (w *windows) run(t *testing.T, args ...string) (code int, output string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), windowsPatience)
	defer cancel()
	p, err := w.Wine.Spawn(append([]string{w.exe}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	defer context.AfterFunc(ctx, p.Kill)()
	err = p.Wait()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return exitCode(err), p.Output()
}
