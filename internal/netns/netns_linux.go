// Package netns enters network namespaces and opens sockets in them.
//
// A socket belongs for life to the namespace it was created in, whoever uses it
// later. Everything that imdsgate does inside a container's namespace is done
// from a thread that enters, opens what it needs and returns.
package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// ErrNotNetns is returned by Open for a file that is no network namespace, such
// as the ordinary file that stays behind when a runtime unmounts one.
var ErrNotNetns = errors.New("not a network namespace")

// nsfsMagic is the file system type of namespace files (linux/magic.h).
const nsfsMagic = 0x6e736673

// ID tells network namespaces apart. Inodes are reused after a namespace dies;
// cookies never are while the kernel runs.
type ID struct {
	Inode  uint64 `json:"inode"`
	Cookie uint64 `json:"cookie"`
}

func (id ID) String() string { return fmt.Sprintf("net:[%d]", id.Inode) }

// Handle is an open network namespace. It keeps the namespace alive until Close.
type Handle struct {
	f  *os.File
	id ID
}

// Open opens the namespace at a path such as /proc/PID/ns/net or
// /run/docker/netns/NAME. Errors are os.ErrNotExist, ErrNotNetns or others.
// Needs CAP_SYS_ADMIN over the namespace's owner, as everything here does.
func Open(path string) (*Handle, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return newHandle(f)
}

// PIDPath is the path of the namespace that a process is in.
func PIDPath(pid int) string { return fmt.Sprintf("/proc/%d/ns/net", pid) }

// Inode is the inode of the namespace at a path. It tells which one only while
// that is known to be alive. Errors: os.ErrNotExist, ErrNotNetns and others.
func Inode(path string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	if uint32(fs.Type) != nsfsMagic {
		return 0, fmt.Errorf("%s: %w", path, ErrNotNetns)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return st.Ino, nil
}

// Current opens the namespace of the calling thread.
func Current() (*Handle, error) { return Open("/proc/thread-self/ns/net") }

// OfSocket opens the namespace that a socket was created in, also when no path
// leads to it any more.
func OfSocket(fd int) (*Handle, error) {
	n, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return nil, fmt.Errorf("namespace of socket: %w", err)
	}
	return newHandle(os.NewFile(uintptr(n), "netns of socket"))
}

// New makes a network namespace. It lives as long as the handle, or anything in
// it, does.
func New() (*Handle, error) {
	var h *Handle
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare network namespace: %w", err)
		}
		var err error
		h, err = Current()
		return err
	})
	return h, err
}

// newHandle takes over f.
func newHandle(f *os.File) (*Handle, error) {
	h := &Handle{f: f}
	err := h.identify()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return h, nil
}

func (h *Handle) identify() error {
	fd := int(h.f.Fd())
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return err
	}
	if uint32(fs.Type) != nsfsMagic {
		return ErrNotNetns
	}
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		return ErrNotNetns
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	h.id.Inode = st.Ino
	return h.Do(func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		h.id.Cookie, err = Cookie(s)
		return err
	})
}

// Cookie is the cookie of the namespace that a socket was created in. It needs
// no privilege. Linux 5.14; ENOPROTOOPT before.
func Cookie(fd int) (uint64, error) {
	c, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("netns cookie (needs Linux 5.14): %w", err)
	}
	return c, nil
}

// ID tells this namespace from all others.
func (h *Handle) ID() ID { return h.id }

// Path leads to the namespace for as long as the handle is open, for this
// process and for those that may look into its /proc entry.
func (h *Handle) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), h.f.Fd()) }

// Close lets go of the namespace.
func (h *Handle) Close() error { return h.f.Close() }

// Do runs fn on a thread inside the namespace and waits for it. fn must not
// start goroutines that rely on being inside, nor wait for other goroutines
// that call Do on the same lock.
func (h *Handle) Do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(h.f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %v: %w", h.id, err)
		}
		return fn()
	})
}

// onThread runs fn on a thread of its own choosing that may leave its network
// namespace, brings the thread home, and gives it back to the runtime. A thread
// that cannot come home is discarded, which works for every thread but the main
// one: package main must pin its goroutine there.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go enterAndReturn(fn, done)
	return <-done
}

func enterAndReturn(fn func() error, done chan<- error) {
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		done <- fmt.Errorf("open own network namespace: %w", err)
		return
	}
	defer unix.Close(home)
	defer func() {
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		if p := recover(); p != nil {
			err = fmt.Errorf("panic in network namespace: %v", p)
		}
		done <- err
	}()
	err = fn()
}
