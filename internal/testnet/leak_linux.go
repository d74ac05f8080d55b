package testnet

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"imdsgate/internal/bpf"
	"imdsgate/internal/netns"
)

// Main runs a package's tests and then checks that they left nothing behind: no
// descriptors, no goroutines (by the given function), nothing in the machine's
// own network namespace, no programs in the kernel, no cgroups, no folders. It
// returns the exit code.
//
// Packages that are tested at the same time may hold programs and cgroups for a
// while; it waits for them.
func Main(run func() int, goroutines func() error) int {
	if r, w, err := os.Pipe(); err == nil { // the runtime's own poller is no leak
		r.Close()
		w.Close()
	}
	before := snapshot()
	code := run()
	if code != 0 {
		return code
	}
	var after leaks
	var gerr error
	for deadline := time.Now().Add(2 * time.Minute); ; {
		after, gerr = snapshot(), goroutines()
		if after.noneSince(before) && gerr == nil {
			fmt.Printf("leak check: descriptors %d, programs %d, cgroups %d, namespace as before\n", after.descriptors, after.programs, after.cgroups)
			return 0
		}
		if time.Now().After(deadline) || after.own() != before.own() && time.Now().After(deadline.Add(-100*time.Second)) {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	fmt.Printf("FAIL: leak check:\nbefore %v\nafter  %v\ngoroutines: %v\n", before, after, gerr)
	return 1
}

// leaks is what tests could leave behind.
type leaks struct {
	descriptors int
	state       string // of the machine's own network namespace
	programs    int    // of ours, in the kernel
	cgroups     int
	folders     int
}

// own is the part that only this process can change.
func (l leaks) own() string { return fmt.Sprint(l.descriptors, l.state) }

func (l leaks) noneSince(b leaks) bool {
	return l.descriptors <= b.descriptors && l.state == b.state && l.programs <= b.programs && l.cgroups <= b.cgroups && l.folders <= b.folders
}

func (l leaks) String() string {
	return fmt.Sprintf("descriptors %d, programs %d, cgroups %d, folders %d, namespace:\n%s", l.descriptors, l.programs, l.cgroups, l.folders, l.state)
}

func snapshot() leaks {
	var l leaks
	if es, err := os.ReadDir("/proc/self/fd"); err == nil {
		l.descriptors = len(es)
	}
	if ns, err := netns.Current(); err == nil {
		state, err := State(ns)
		if err != nil {
			state = "unknown: " + err.Error()
		}
		l.state = withoutListeners(state)
		ns.Close()
	}
	l.programs, _ = bpf.Loaded() // without the right to count there is nothing to leak
	l.cgroups = len(cgroupsOfOurs())
	folders, _ := filepath.Glob(filepath.Join(os.TempDir(), "imdsgate-stack-*"))
	l.folders = len(folders)
	return l
}

// withoutListeners leaves out what other processes on the machine do.
func withoutListeners(state string) string {
	var keep []string
	for line := range strings.Lines(state) {
		if !strings.HasPrefix(line, "listener ") {
			keep = append(keep, line)
		}
	}
	return strings.Join(keep, "")
}

// cgroupsOfOurs lists the agents' cgroups. Those of engines' containers are not
// among them: Docker.Close says by itself what is left of them.
func cgroupsOfOurs() []string {
	mount, err := cgroup2Mount()
	if err != nil {
		return nil
	}
	var found []string
	filepath.WalkDir(mount, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "imdsgate-") && !strings.HasPrefix(d.Name(), dockerCgroup) {
			found = append(found, path)
		}
		return nil
	})
	return found
}

func cgroup2Mount() (string, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if fields := strings.Fields(s.Text()); len(fields) > 2 && fields[2] == "cgroup2" {
			return fields[1], nil
		}
	}
	return "", errors.New("cgroup2 is not mounted")
}

// RemoveEmptyCgroups removes what agents that were killed have left: cgroups with
// our name and no process in them.
func RemoveEmptyCgroups() {
	for _, dir := range cgroupsOfOurs() {
		unix.Rmdir(dir)
	}
}
