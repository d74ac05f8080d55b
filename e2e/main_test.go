//go:build linux

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// The programs under test and the client, as TestMain built them.
var imdsgate, sdkclient string

// A goroutine that enters a namespace must not run on the main thread.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "imdsgate-e2e-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = os.Chmod(dir, 0o711) // the proxy runs as nobody, from here
	}
	imdsgate, sdkclient = filepath.Join(dir, "imdsgate"), filepath.Join(dir, "sdkclient")
	if err == nil {
		err = build("..", "./cmd/imdsgate", imdsgate) // with the versions of its own go.mod
	}
	if err == nil {
		err = build(".", "./cmd/sdkclient", sdkclient)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	return m.Run()
}

func build(dir, pkg, to string) error {
	cmd := exec.Command("go", "build", "-o", to, pkg)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return os.Chmod(to, 0o755)
}
