package netns_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

func init() { runtime.LockOSThread() } // see package main

func TestMain(m *testing.M) {
	os.Exit(testnet.Main(m.Run, func() error { return goleak.Find() }))
}

func TestOpenRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "stale") // what a runtime leaves after unmounting
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, path string
		want       error
	}{
		{"missing", file + "x", os.ErrNotExist},
		{"ordinary_file", file, netns.ErrNotNetns},
		{"another_kind_of_namespace", "/proc/self/ns/mnt", netns.ErrNotNetns},
		{"folder", t.TempDir(), netns.ErrNotNetns},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if h, err := netns.Open(tc.path); !errors.Is(err, tc.want) {
				t.Errorf("got %v, %v, want %v", h, err, tc.want)
			}
		})
	}
}

// TestMainThreadStaysHome enters a namespace from many goroutines, which end
// there in every way, and looks where the process's threads are afterwards: a
// thread that was lost inside would keep the namespace alive.
func TestMainThreadStaysHome(t *testing.T) {
	testnet.Require(t, testnet.Namespaces)
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	want := fmt.Sprintf("net:[%d]", ns.ID().Inode)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			err := ns.Do(func() error {
				inside, err := os.Readlink("/proc/thread-self/ns/net")
				if err != nil || inside != want {
					return fmt.Errorf("inside %s, %v, want %s", inside, err, want)
				}
				switch i % 3 {
				case 1:
					return os.ErrInvalid
				case 2:
					panic("inside")
				}
				return nil
			})
			switch {
			case i%3 == 0 && err != nil,
				i%3 == 1 && !errors.Is(err, os.ErrInvalid),
				i%3 == 2 && (err == nil || !strings.Contains(err.Error(), "panic in network namespace: inside")):
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	wg.Wait()
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(tasks) == 0 {
		t.Fatal(tasks, err)
	}
	for _, task := range tasks {
		if at, err := os.Readlink(task); err == nil && at != home {
			t.Errorf("%s is in %s, not at home in %s", task, at, home)
		}
	}
}

// TestSocketKnowsItsNamespace: a socket belongs to the namespace it was made in,
// and leads back to it.
func TestSocketKnowsItsNamespace(t *testing.T) {
	testnet.Require(t, testnet.Namespaces)
	a, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if a.ID() == b.ID() || a.ID().Cookie == b.ID().Cookie {
		t.Fatalf("two namespaces with one identity: %+v", a.ID())
	}
	var f *os.File
	err = a.Do(func() error {
		h, err := os.ReadFile("/proc/net/dev")
		if err != nil || !strings.Contains(string(h), "lo:") {
			return fmt.Errorf("no lo: %v", err)
		}
		f, _, err = netns.ListenTransparent(netip.MustParseAddr("127.0.0.1"), 16)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if !netns.Listening(f) {
		t.Error("does not listen")
	}
	of, err := netns.OfSocket(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer of.Close()
	if of.ID() != a.ID() {
		t.Errorf("socket of %+v leads to %+v", a.ID(), of.ID())
	}
	if c, err := netns.Cookie(int(f.Fd())); err != nil || c != a.ID().Cookie {
		t.Errorf("cookie %d, %v, want %d", c, err, a.ID().Cookie)
	}
	if opt, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_IP, unix.IP_TRANSPARENT); err != nil || opt != 1 {
		t.Errorf("IP_TRANSPARENT = %d, %v", opt, err)
	}
	f.Close()
	if netns.Listening(f) {
		t.Error("a closed listener listens")
	}
}
