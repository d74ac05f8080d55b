package testnet

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// SweepDocker takes away what the engines of processes that were killed have
// left. Engines whose owner lives are left alone: the owner holds a lock.
func SweepDocker() error {
	dirs, err := filepath.Glob(filepath.Join(tempDir(), dockerDir+"*"))
	errs := []error{err}
	for _, dir := range dirs {
		lock, err := lockDir(dir, unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			continue // in use, or gone
		}
		errs = append(errs, sweepDir(dir), lock.Close())
	}
	return errors.Join(errs...)
}

// sweepDir removes an engine's processes, mounts, shim sockets, cgroups and at
// last its folder. The order matters: each step needs what the next removes.
func sweepDir(dir string) error {
	parent := cgroupOfDir(dir)
	err := errors.Join(killAll(dir, parent), removeShimSockets(dir), unmountBelow(dir))
	if err != nil {
		return err // never remove files through a mount that is still there
	}
	return errors.Join(removeCgroups(parent), os.RemoveAll(dir))
}

// killAll ends the engine's processes, by their ids, until there are none.
func killAll(dir, parent string) error {
	for deadline := time.Now().Add(10 * time.Second); ; {
		pids := processesOf(dir, parent)
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v of %s do not end", pids, dir)
		}
		for _, pid := range pids {
			unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// processesOf lists the programs that were started for the folder, and every
// process in the engine's cgroups. Zombies have no command line and do not count.
func processesOf(dir, parent string) (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || len(cmdline) == 0 {
			continue
		}
		cgroup, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cgroup"))
		if bytes.Contains(cgroup, []byte("/"+parent+"/")) || startedFor(dir, string(cmdline)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// startedFor reports whether a command line is that of one of the engine's own
// programs, with the folder in its arguments.
func startedFor(dir, cmdline string) bool {
	program, args, _ := strings.Cut(cmdline, "\x00")
	name := filepath.Base(program)
	return (name == "dockerd" || name == "runc" || strings.HasPrefix(name, "containerd")) && strings.Contains(args, dir+"/")
}

// removeShimSockets removes the sockets that shims made outside the folder; the
// file "address" of each task says where.
func removeShimSockets(dir string) error {
	var errs []error
	filepath.WalkDir(filepath.Join(dir, "tasks"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Name() == "rootfs" {
			return fs.SkipDir
		}
		if e.Name() != "address" {
			return nil
		}
		b, err := os.ReadFile(path)
		if socket, ok := strings.CutPrefix(string(b), "unix:///run/containerd/s/"); err == nil && ok && !strings.Contains(socket, "/") {
			if err := os.Remove("/run/containerd/s/" + socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
		return nil
	})
	return errors.Join(errs...)
}

// unmountBelow detaches all mounts in a folder, the last one first.
func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for line := range strings.Lines(string(b)) {
		// The fifth field (proc_pid_mountinfo(5)); the folder's name needs no escapes.
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	slices.Reverse(points)
	var errs []error
	for _, p := range points {
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// cgroupRoots lists where cgroups are made: /sys/fs/cgroup on a host with v2
// alone, else every hierarchy below it.
func cgroupRoots() []string {
	const mount = "/sys/fs/cgroup"
	if _, err := os.Stat(mount + "/cgroup.controllers"); err == nil {
		return []string{mount}
	}
	roots, _ := filepath.Glob(mount + "/*/cgroup.procs")
	for i, r := range roots {
		roots[i] = filepath.Dir(r)
	}
	return roots
}

// removeCgroups removes all cgroups of a name from all hierarchies, from below. A
// cgroup is busy for a moment after its last process has ended.
func removeCgroups(name string) error {
	for deadline := time.Now().Add(5 * time.Second); ; {
		left := cgroupsNamed(name)
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("cgroups %v are still in use", left)
		}
		for _, dir := range slices.Backward(left) {
			unix.Rmdir(dir)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// cgroupsNamed lists the cgroups of a name and all in them, parents first. An
// engine that is itself in a cgroup makes those of its containers there.
func cgroupsNamed(name string) (all []string) {
	for _, root := range cgroupRoots() {
		filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() && strings.Contains(path+"/", "/"+name+"/") {
				all = append(all, path)
			}
			return nil
		})
	}
	return all
}
