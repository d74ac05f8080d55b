package discover

import (
	"context"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// lookSoon has the processes looked at very soon.
func (e *engine) lookSoon() {
	e.pause, e.looks = 0, 0
	e.look.Reset(0)
}

// identify looks for processes in namespaces, and asks the engine about those of
// whom it has not heard. It goes on until every namespace has its container, or
// has waited for too long.
func (e *engine) identify(ctx context.Context) error {
	start := time.Now()
	inodes, waiting := e.toLookAt(start)
	if len(inodes) == 0 {
		return nil
	}
	proc := e.Proc
	if proc == "" {
		proc = "/proc"
	}
	chains, err := scanProcesses(proc, inodes)
	took := time.Since(start)
	if waiting {
		defer func() { e.look.Reset(e.nextPause(took)) }()
	}
	if err != nil { // who was found stays
		e.Log.Warn("processes cannot be looked at", "error", err)
		e.update(func(*view) {})
		return nil
	}
	// Beside one that we know there may be one that we have not heard of: ask first,
	// judge then.
	if unknown := e.unknown(chains); len(unknown) > 0 {
		if err := e.refresh(ctx, unknown); err != nil {
			return err
		}
	}
	e.update(func(v *view) {
		known := func(id string) bool { _, ok := v.containers[id]; return ok }
		seen := make(map[*space]sight)
		for path, s := range v.spaces {
			// One that came or went meanwhile: the processes may have been in another
			// namespace that had the inode.
			if !inodes[s.inode] || s.seen.After(start) || namespaceAt(path, e.device) != s.inode {
				continue
			}
			seen[s] = sightOf(chains[s.inode], known)
		}
		v.settle(seen)
	})
	e.rescan = false
	return nil
}

// nextPause is how long to wait before the next look, given how long the last one
// took: a start takes about 100 ms; what takes a second more is no start.
func (e *engine) nextPause(took time.Duration) time.Duration {
	e.looks++
	limit := 20 * time.Millisecond
	if e.looks > 60 {
		limit = 250 * time.Millisecond
	}
	e.pause = max(min(2*e.pause, limit), 2*time.Millisecond, 2*took)
	return e.pause
}

// toLookAt is which namespaces to look into, and whether one of them has been
// without a name for so short a time that it is worth another look.
func (e *engine) toLookAt(now time.Time) (inodes map[uint64]bool, waiting bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	inodes = make(map[uint64]bool)
	for _, s := range e.view.spaces {
		if !s.named() {
			waiting = waiting || !e.view.overdue(s.seen, now)
		}
		if !s.named() || len(s.owners) > 1 || e.rescan {
			inodes[s.inode] = true
		}
	}
	return inodes, waiting
}

// unknown is which ids the engine was not asked for yet, or did not know then.
func (e *engine) unknown(chains map[uint64][][]string) map[string]heard {
	e.mu.Lock()
	defer e.mu.Unlock()
	ids := make(map[string]heard)
	for _, cs := range chains {
		for _, id := range slices.Concat(cs...) {
			if _, ok := e.view.containers[id]; !ok {
				ids[id] = heard{}
			}
		}
	}
	return ids
}

// scanProcesses looks for processes in the given network namespaces. It returns
// for each inode what the cgroups of those processes say: chains of container
// ids, the outermost first, each once.
//
// Processes that end meanwhile, and those that this process may not look at
// (CAP_SYS_PTRACE), are left out.
func scanProcesses(proc string, inodes map[uint64]bool) (map[uint64][][]string, error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	chains := make(map[uint64][][]string)
	for _, e := range entries {
		dir := filepath.Join(proc, e.Name())
		if _, err := strconv.Atoi(e.Name()); err != nil || !inodes[inodeOf(os.Readlink(filepath.Join(dir, "ns/net")))] {
			continue
		}
		inode, more := lookInto(dir)
		if !inodes[inode] {
			continue
		}
		for _, chain := range more {
			if !slices.ContainsFunc(chains[inode], func(c []string) bool { return slices.Equal(c, chain) }) {
				chains[inode] = append(chains[inode], chain)
			}
		}
	}
	return chains, nil
}

// lookInto reads namespace and cgroups of one process: an open folder in /proc
// stays that of its process, and is empty when the process is gone.
func lookInto(dir string) (inode uint64, chains [][]string) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, nil
	}
	defer root.Close()
	inode = inodeOf(root.Readlink("ns/net"))
	cgroup, err := root.ReadFile("cgroup")
	if err != nil {
		return 0, nil
	}
	return inode, idChains(string(cgroup))
}

// inodeOf reads the target of a link like "net:[4026531840]" (namespaces(7));
// zero if it is none.
func inodeOf(link string, err error) uint64 {
	rest, isNet := strings.CutPrefix(link, "net:[")
	number, ends := strings.CutSuffix(rest, "]")
	if err != nil || !isNet || !ends {
		return 0
	}
	n, _ := strconv.ParseUint(number, 10, 64)
	return n
}

// idChains reads /proc/PID/cgroup (cgroups(7)): a line for each hierarchy, v1 and
// v2 alike, with a path in it. Lines without container id are left out, and so
// are repetitions.
func idChains(text string) (chains [][]string) {
	for line := range strings.Lines(text) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 {
			continue
		}
		var chain []string
		for _, name := range strings.Split(fields[2], "/") {
			if id, ok := containerID(name); ok {
				chain = append(chain, id)
			}
		}
		if chain != nil && !slices.ContainsFunc(chains, func(c []string) bool { return slices.Equal(c, chain) }) {
			chains = append(chains, chain)
		}
	}
	return chains
}

// scopes are what systemd calls the cgroups of containers: PREFIX-ID.scope.
var scopes = []string{"docker-", "libpod-", "cri-containerd-", "crio-"}

// containerID reads a container's id, 64 hexadecimal digits, from the name of its
// cgroup.
func containerID(name string) (id string, ok bool) {
	id = strings.TrimPrefix(name, "libpod-") // Podman's, with or without systemd
	if scope, ok := strings.CutSuffix(name, ".scope"); ok {
		for _, prefix := range scopes {
			if rest, ok := strings.CutPrefix(scope, prefix); ok {
				id = rest
			}
		}
	}
	if len(id) != 64 || id != strings.ToLower(id) {
		return "", false
	}
	_, err := hex.DecodeString(id)
	return id, err == nil
}

// sight is what the processes in a namespace say of its containers.
type sight struct {
	ids     []string // those that the engine knows, sorted, each once
	several []string // those that stand in one path with another one that it knows
}

// sightOf judges chains. Whoever makes a container can choose what stands above its
// own id (--cgroup-parent), and whoever is in one, with privileges, what stands
// below: a chain with two known ids says nothing about which of them it is.
// Unknown ids are those of other engines, around this one or inside its containers.
func sightOf(chains [][]string, known func(id string) bool) (s sight) {
	for _, chain := range chains {
		var ids []string
		for _, id := range chain {
			if known(id) && !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		}
		if len(ids) > 1 {
			s.several = append(s.several, ids...)
		} else {
			s.ids = append(s.ids, ids...)
		}
	}
	slices.Sort(s.ids)
	slices.Sort(s.several)
	return sight{slices.Compact(s.ids), slices.Compact(s.several)}
}
