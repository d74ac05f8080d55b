package discover

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// told is what a watch has told, in order: +NAME for a namespace, -NAME for one
// that is gone.
type told struct {
	t      *testing.T
	events chan string
	inodes map[string]uint64
}

func watchDirs(t *testing.T, dirs ...string) *told {
	t.Helper()
	h := &told{t: t, events: make(chan string, 100), inodes: make(map[string]uint64)}
	w, err := newNetnsWatch(dirs, func(path string, inode uint64) {
		sign := "+"
		if inode == 0 {
			sign = "-"
		}
		h.events <- fmt.Sprintf("%s%s %d", sign, filepath.Base(path), inode)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.sweep(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.close()
		for len(h.events) > 0 {
			// What the test has mounted is unmounted before this.
			if got := <-h.events; !strings.HasPrefix(got, "-") {
				t.Errorf("told of %s, which nobody expected", got)
			}
		}
	})
	return h
}

func (h *told) want(text string) {
	h.t.Helper()
	select {
	case got := <-h.events:
		if got != text && !strings.HasPrefix(got, text+" ") {
			h.t.Fatalf("told %s, want %s", got, text)
		}
	case <-time.After(sweepEvery / 2): // it must not be the sweep that finds it
		h.t.Fatalf("not told %s in time", text)
	}
}

// mountNetns makes a new namespace and mounts it on a file, as runtimes do: first
// an ordinary file, then the mount.
func mountNetns(t *testing.T, path string) {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	mountOn(t, ns.Path(), path)
}

func mountOn(t *testing.T, ns, path string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		touch(t, path)
	}
	if err := unix.Mount(ns, path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
}

func touch(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func unmount(t *testing.T, path string) {
	t.Helper()
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
}

func mkdir(t *testing.T, path string) {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestWatchTellsNamespaces(t *testing.T) {
	testnet.Require(t, testnet.Namespaces)
	dir := t.TempDir()
	mountNetns(t, filepath.Join(dir, "before"))
	h := watchDirs(t, dir)
	h.want("+before")
	mountNetns(t, filepath.Join(dir, "after"))
	h.want("+after")

	unmount(t, filepath.Join(dir, "after")) // the file stays, as Docker leaves it for a while
	h.want("-after 0")
	mountNetns(t, filepath.Join(dir, "after"))
	h.want("+after")
	unmount(t, filepath.Join(dir, "before"))
	h.want("-before 0")
	if err := os.Remove(filepath.Join(dir, "before")); err != nil {
		t.Fatal(err)
	}

	// Another namespace on the same path is another one.
	mountNetns(t, filepath.Join(dir, "after"))
	h.want("+after")
	unmount(t, filepath.Join(dir, "after"))
	h.want("+after") // the one below
}

func TestWatchNeverTellsTheHost(t *testing.T) {
	testnet.Require(t, testnet.Namespaces)
	dir := t.TempDir()
	h := watchDirs(t, dir)
	mountOn(t, "/proc/self/ns/net", filepath.Join(dir, "renamed"))
	mountNetns(t, filepath.Join(dir, "default")) // of an engine in a namespace of its own
	touch(t, filepath.Join(dir, "ordinary-file"))
	mkdir(t, filepath.Join(dir, "folder"))
	mountNetns(t, filepath.Join(dir, "last"))
	h.want("+last") // and nothing before
}

func TestWatchWaitsForTheMount(t *testing.T) {
	testnet.Require(t, testnet.Namespaces)
	dir := t.TempDir()
	h := watchDirs(t, dir)
	touch(t, filepath.Join(dir, "slow"))
	mountNetns(t, filepath.Join(dir, "quick"))
	h.want("+quick")
	mountNetns(t, filepath.Join(dir, "slow"))
	h.want("+slow")
}

func TestWatchFollowsTheFolder(t *testing.T) {
	testnet.Require(t, testnet.Namespaces)
	top := t.TempDir()
	exec := filepath.Join(top, "run", "docker")
	dir, other := filepath.Join(exec, "netns"), filepath.Join(top, "run", "netns")
	h := watchDirs(t, dir, other)
	mkdir(t, dir) // three folders at once
	mountNetns(t, filepath.Join(dir, "a"))
	h.want("+a")
	mkdir(t, other)
	mountNetns(t, filepath.Join(other, "p"))
	h.want("+p")

	if err := os.Rename(exec, exec+".old"); err != nil {
		t.Fatal(err)
	}
	h.want("-a 0")
	mkdir(t, dir)
	mountNetns(t, filepath.Join(dir, "b"))
	h.want("+b")
	unmount(t, filepath.Join(exec+".old", "netns", "a"))
	unmount(t, filepath.Join(dir, "b"))
	h.want("-b 0")
	if err := os.RemoveAll(exec); err != nil {
		t.Fatal(err)
	}
	mkdir(t, dir)
	mountNetns(t, filepath.Join(dir, "c"))
	h.want("+c")

	// A file system that is mounted over the folder hides what was in it.
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	h.want("-c 0")
	mountNetns(t, filepath.Join(dir, "d"))
	h.want("+d")
	unmount(t, dir)
	h.want("-d 0")
	h.want("+c")
}

func TestWatchReportsWhatItMayNotWatch(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	touch(t, file)
	w, err := newNetnsWatch([]string{filepath.Join(strings.Repeat("x", 300), "netns")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	if err := w.sweep(); err == nil {
		t.Error("a name that cannot be: got no error")
	}
	// A file where a folder should be may be replaced by one.
	if there, err := w.arm(filepath.Join(file, "netns")); err != nil || there {
		t.Errorf("below a file: got %v, %v, want that it is not there", there, err)
	}
}
