package discover

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// mountWithin is how long a new file may take to become a namespace: the
	// engine makes an ordinary file first, and mounts the namespace on it.
	mountWithin = 5 * time.Second

	// sweepEvery is how often the folders are read although nothing was told, and
	// sweepPause is kept between two readings when mounts change all the time.
	sweepEvery = 5 * time.Second
	sweepPause = 50 * time.Millisecond
)

// dirMask is what is watched in a folder, and above one that is not there yet.
const dirMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

// netnsWatch tells which files in some folders are network namespaces. The
// folders need not exist, and may be replaced.
//
// Two things are watched: the folders (inotify), and the table of mounts, whose
// file in /proc is readable with priority after every change (proc_pid_mounts(5)):
// a runtime that unmounts a namespace may remove the file a minute later.
type netnsWatch struct {
	dirs    []string
	tell    func(path string, inode uint64) // inode zero: gone
	inotify int
	mounts  int                  // not an os.File: Go would ask it for news too, and each is told once
	wds     map[int32]string     // watch → folder in dirs
	known   map[string]uint64    // path → inode
	pending map[string]time.Time // files that are no namespace yet → since when
	device  uint64               // of all namespaces
	hosts   []uint64             // inodes of namespaces that are never told
}

// newNetnsWatch sets the watch. Errors are the kernel's limits (fs.inotify.*) or
// rights.
func newNetnsWatch(dirs []string, tell func(string, uint64)) (*netnsWatch, error) {
	w := &netnsWatch{tell: tell, wds: make(map[int32]string), known: make(map[string]uint64), pending: make(map[string]time.Time)}
	for _, dir := range dirs {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return nil, err
		}
		w.dirs = append(w.dirs, abs)
	}
	for _, path := range []string{"/proc/self/ns/net", "/proc/1/ns/net"} {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil { // the second one needs rights
			w.device, w.hosts = st.Dev, append(w.hosts, st.Ino)
		}
	}
	if w.device == 0 {
		return nil, errors.New("/proc/self/ns/net: not there")
	}
	var err error
	if w.inotify, err = unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK); err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	if w.mounts, err = unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		unix.Close(w.inotify)
		return nil, fmt.Errorf("/proc/self/mountinfo: %w", err)
	}
	return w, nil
}

func (w *netnsWatch) close() {
	unix.Close(w.inotify)
	unix.Close(w.mounts)
}

// run works until ctx ends, and then returns nil.
func (w *netnsWatch) run(ctx context.Context) error {
	r, end, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer end.Close()
	stop := context.AfterFunc(ctx, func() { end.Close() })
	defer stop()
	fds := []unix.PollFd{
		{Fd: int32(r.Fd()), Events: unix.POLLIN},
		{Fd: int32(w.inotify), Events: unix.POLLIN},
		{Fd: int32(w.mounts), Events: unix.POLLPRI},
	}
	swept, dirty := time.Now(), true // a mount between the first sweep and here
	for ctx.Err() == nil {
		n, err := unix.Poll(fds, w.timeout(swept, dirty))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll: %w", err)
		}
		if n > 0 && fds[1].Revents != 0 {
			all, err := w.readEvents()
			if err != nil {
				return err
			}
			dirty = dirty || all
		}
		dirty = dirty || n > 0 && fds[2].Revents != 0
		w.lookAtPending()
		if since := time.Since(swept); since >= sweepEvery || dirty && since >= sweepPause {
			if err := w.sweep(); err != nil {
				return err
			}
			swept, dirty = time.Now(), false
		}
	}
	return nil
}

// timeout is how long to wait for news, in milliseconds.
func (w *netnsWatch) timeout(swept time.Time, dirty bool) int {
	switch {
	case len(w.pending) > 0:
		return 1
	case dirty:
		return int(max(0, sweepPause-time.Since(swept))/time.Millisecond) + 1
	}
	return int(max(0, sweepEvery-time.Since(swept))/time.Millisecond) + 1
}

// sweep sets the watch on every folder, if it is not on it, and then compares all
// files with what is known.
func (w *netnsWatch) sweep() error {
	present := make(map[string]bool)
	for _, dir := range w.dirs {
		there, err := w.arm(dir)
		if err != nil {
			return err
		}
		if !there {
			continue
		}
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			present[filepath.Join(dir, e.Name())] = true
		}
	}
	for path := range w.known {
		if !present[path] {
			w.drop(path)
		}
	}
	for path := range present {
		w.look(path)
	}
	return nil
}

// arm watches a folder or, if it is not there, the nearest one above it.
func (w *netnsWatch) arm(dir string) (there bool, err error) {
	for range 10 { // folders may be made while we look
		p := dir
		for {
			wd, err := unix.InotifyAddWatch(w.inotify, p, dirMask)
			if err == nil {
				if p == dir {
					w.wds[int32(wd)] = dir
					return true, nil
				}
				break
			}
			if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) || p == "/" {
				return false, fmt.Errorf("watch %s: %w", p, err)
			}
			p = filepath.Dir(p)
		}
		// The next one below may have been made before the watch was set.
		next, _, _ := strings.Cut(strings.TrimPrefix(dir[len(p):], "/"), "/")
		if _, err := os.Stat(filepath.Join(p, next)); err != nil {
			return false, nil
		}
	}
	return false, nil // it will be seen by the next sweep
}

// readEvents takes what inotify has. It reports whether everything must be
// looked at.
func (w *netnsWatch) readEvents() (all bool, err error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Read(w.inotify, buf)
	if err != nil {
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			return false, nil
		}
		return false, fmt.Errorf("read inotify: %w", err)
	}
	for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
		wd := int32(binary.NativeEndian.Uint32(b))
		mask := binary.NativeEndian.Uint32(b[4:])
		size := int(binary.NativeEndian.Uint32(b[12:]))
		name := string(bytes.TrimRight(b[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+size], "\x00"))
		b = b[unix.SizeofInotifyEvent+size:]
		dir, ours := w.wds[wd]
		switch {
		case !ours || mask&(unix.IN_Q_OVERFLOW|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_UNMOUNT|unix.IN_IGNORED) != 0:
			delete(w.wds, wd)
			all = true
		case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
			w.pending[filepath.Join(dir, name)] = time.Now()
		case mask&(unix.IN_DELETE|unix.IN_MOVED_FROM) != 0:
			w.drop(filepath.Join(dir, name))
		}
	}
	return all, nil
}

// lookAtPending looks whether new files have become namespaces.
func (w *netnsWatch) lookAtPending() {
	for path, since := range w.pending {
		if w.look(path) || time.Since(since) > mountWithin {
			delete(w.pending, path)
		}
	}
}

// look compares a file with what is known of it, and reports whether it is a
// namespace now.
func (w *netnsWatch) look(path string) bool {
	inode := namespaceAt(path, w.device)
	if inode == 0 {
		w.drop(path) // of a namespace that has ended, an ordinary file is left
		return false
	}
	// "default" is what Docker calls the host's namespace.
	if slices.Contains(w.hosts, inode) || filepath.Base(path) == "default" {
		return true
	}
	if w.known[path] != inode {
		w.known[path] = inode
		w.tell(path, inode)
	}
	return true
}

// namespaceAt is the inode of the namespace that is mounted on a file, and zero if
// none is. All namespaces are on one device.
func namespaceAt(path string, device uint64) uint64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Dev != device {
		return 0
	}
	return st.Ino
}

func (w *netnsWatch) drop(path string) {
	if _, ok := w.known[path]; ok {
		delete(w.known, path)
		w.tell(path, 0)
	}
}
