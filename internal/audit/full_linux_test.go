package audit_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"imdsgate/internal/audit"
	"imdsgate/internal/testnet"
)

// A disk that is full and later is not: the chain is whole, and says what it lacks.
func TestDiskFull(t *testing.T) {
	testnet.Require(t, testnet.Root)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with its mount namespace
		dir := t.TempDir()
		if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS|unix.CLONE_FS),
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k")); err != nil {
			t.Error(err)
			return
		}
		defer unix.Unmount(dir, unix.MNT_DETACH)
		ballast, path := filepath.Join(dir, "ballast"), filepath.Join(dir, "audit")
		if err := os.WriteFile(ballast, make([]byte, 8<<10), 0o600); err != nil {
			t.Error(err)
			return
		}
		var told []error
		l := &audit.Log{Report: func(err error) { told = append(told, err) }}
		f, err := audit.OpenFile(path, 0, 1, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		written(t, l, f, make([]audit.Event, 40)...)
		lost := l.Lost()
		if lost == 0 || len(told) == 0 || !errors.Is(told[0], unix.ENOSPC) {
			t.Errorf("lost %d, told %v: want ENOSPC", lost, told)
		}
		if err := os.Remove(ballast); err != nil {
			t.Error(err)
		}
		written(t, l, f, full())
		b, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		s, err := audit.Verify([]audit.Part{{Name: "audit", R: strings.NewReader(string(b))}}, audit.Check{})
		if err != nil || s.Lost != lost || l.Lost() != lost {
			t.Errorf("got %+v (%v), want that %d are lost in\n%s", s, err, lost, b)
		}
	}()
	<-done
}
