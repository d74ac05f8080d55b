package agent

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"imdsgate/internal/bpf"
	"imdsgate/internal/netns"
)

// ErrNoCgroup is returned by RaiseFence where no cgroup v2 hierarchy can be
// written to.
var ErrNoCgroup = errors.New("no writable cgroup v2 hierarchy")

// Fence is the agent's own cgroup with the connect fence on it. A socket keeps
// the cgroup that its creator was in: raise the fence before the first listener
// is opened.
type Fence struct {
	fence *bpf.Fence
	dir   string
	home  string // where the process came from; empty if it did not move
}

// RaiseFence lets no socket made from now on be connected by anybody else, or to
// anywhere but upstream. The fence stands on a cgroup that holds this process
// alone: the one it is in (a container's, a service's), or else a new child of
// that, called name, into which it moves. Errors: ErrNoCgroup,
// bpf.ErrNotSupported, os.ErrPermission.
func RaiseFence(name string, upstream netip.AddrPort) (*Fence, error) {
	own, err := ownCgroup()
	if err != nil {
		return nil, err
	}
	f := &Fence{dir: own}
	if !aloneIn(own) {
		f.dir, f.home = filepath.Join(own, name), own
		if err := os.Mkdir(f.dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("%w: %w", ErrNoCgroup, err)
		}
	}
	if err := f.raise(upstream); err != nil {
		f.leave()
		return nil, err
	}
	return f, nil
}

// aloneIn reports whether a cgroup is no root and has no process but this one.
func aloneIn(dir string) bool {
	if _, err := os.Stat(filepath.Join(dir, "cgroup.events")); err != nil {
		return false // the root of the hierarchy has no such file
	}
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return false
	}
	pids := strings.Fields(string(b))
	return len(pids) == 1 && pids[0] == strconv.Itoa(os.Getpid())
}

func (f *Fence) raise(upstream netip.AddrPort) error {
	dir, err := os.Open(f.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	id, err := bpf.CgroupID(dir)
	if err != nil {
		return err
	}
	host, err := netns.Current()
	if err != nil {
		return err
	}
	defer host.Close()
	f.fence, err = bpf.AttachFence(dir, bpf.FenceRules{Cgroup: id, Netns: host.ID().Cookie, Upstream: upstream})
	if err != nil {
		return err
	}
	if f.home == "" {
		return nil
	}
	if err := enter(f.dir); err != nil {
		return fmt.Errorf("%w: %w", ErrNoCgroup, err)
	}
	return nil
}

func enter(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0)
}

// Refused is how many connects the fence has refused.
func (f *Fence) Refused() (uint64, error) { return f.fence.Refused() }

// Close leaves the cgroup and removes it, if it was made for the fence. Sockets
// that were made in it keep the fence, and so does a cgroup that stays.
func (f *Fence) Close() error { return errors.Join(f.leave(), f.fence.Close()) }

func (f *Fence) leave() error {
	if f.home == "" {
		return nil
	}
	if err := enter(f.home); err != nil {
		return err
	}
	return unix.Rmdir(f.dir)
}

// RemoveFence removes the cgroup that a fence of this name was raised on, if it is
// there and empty: what an agent has left that was killed.
func RemoveFence(name string) error {
	own, err := ownCgroup()
	if errors.Is(err, ErrNoCgroup) {
		return nil
	}
	if err != nil {
		return err
	}
	err = unix.Rmdir(filepath.Join(own, name))
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("fence: remove cgroup %s: %w", name, err)
	}
	return nil
}

// OwnCgroup is the directory of this process's cgroup v2: after RaiseFence, the
// agent's. Errors: ErrNoCgroup.
func OwnCgroup() (string, error) { return ownCgroup() }

// PrivateCgroups reports whether this process has a cgroup namespace of its own (a
// container on cgroup v2): the root that it sees is none, and cgroups of the host
// cannot be named.
func PrivateCgroups() bool {
	mount, err := cgroupMount()
	if err != nil {
		return false
	}
	_, err = os.Stat(filepath.Join(mount, "cgroup.events")) // the root of the hierarchy has no such file
	return err == nil
}

// CgroupDir is the directory of a cgroup v2 by its path as in /proc/PID/cgroup.
// Errors: ErrNoCgroup.
func CgroupDir(path string) (string, error) {
	mount, err := cgroupMount()
	if err != nil {
		return "", err
	}
	return filepath.Join(mount, path), nil
}

// ownCgroup is the directory of this process's cgroup v2.
func ownCgroup() (string, error) {
	mount, err := cgroupMount()
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return filepath.Join(mount, path), nil
		}
	}
	return "", ErrNoCgroup
}

// cgroupMount finds where cgroup v2 is mounted: /sys/fs/cgroup, or a folder of it
// on hosts that still have v1 beside it. A mount of another part of the hierarchy,
// as containers leave them, is none.
func cgroupMount() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		before, after, ok := strings.Cut(s.Text(), " - ")
		fields := strings.Fields(before)
		if ok && strings.HasPrefix(after, "cgroup2 ") && len(fields) > 4 && fields[3] == "/" {
			return fields[4], nil
		}
	}
	return "", fmt.Errorf("%w: cgroup2 is not mounted", ErrNoCgroup)
}
