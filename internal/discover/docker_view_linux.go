package discover

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"imdsgate/internal/workload"
)

// view is what is known of namespaces and containers, and what follows from it.
type view struct {
	onlyLabelled bool
	spaces       map[string]*space          // by path
	containers   map[string]dockerContainer // by id
	engine       error                      // why it does not answer; nil if it does
	since        time.Time                  // when the engine began to answer
}

// space is a network namespace that has a file.
type space struct {
	inode uint64
	seen  time.Time

	// owners are the containers that the namespace was made for: one, or several
	// if that cannot be told. Joiners came in with --network container:NAME.
	// A joiner counts from its creation on, found or not (see joiners).
	owners, joiners []string

	// doubt is why it has neither although processes were found: ErrAmbiguous or
	// ErrTwice.
	doubt error
}

// dockerContainer is what the engine says of one.
type dockerContainer struct {
	id, name string
	image    string            // as it was asked for; empty: none, or not known (nameless)
	names    []string          // all that it is listed under; name is one of them
	labels   map[string]string // all, as the engine lists them
	mode     string            // how it is connected: a network's name, none, host, container:ID
	running  bool
	comes    bool      // created or restarting: it may run at any moment
	since    time.Time // it was first seen running

	imageKey       imageKey
	given, brought map[string]string // labels: the runner's, the image's
	sorted         bool              // the image is known; else all count as brought
}

// joins is the id or name of the container whose namespace this one shares.
func (c dockerContainer) joins() (whose string, ok bool) {
	return strings.CutPrefix(c.mode, "container:")
}

// enabled reads the label that the runner gave or, for a container that has its
// namespace to itself, an image's that opts out. Nobody may have set it, or to
// nonsense: then said is false.
func (c dockerContainer) enabled(alone bool) (enabled, said bool) {
	if enabled, err := strconv.ParseBool(c.given[LabelEnable]); err == nil {
		return enabled, true
	}
	enabled, err := strconv.ParseBool(c.brought[LabelEnable])
	return false, err == nil && !enabled && alone && c.sorted
}

// root is the container whose namespace this one is in: itself, or the one that it
// joins, maybe by way of others. There may be none.
func (v *view) root(c dockerContainer) (root dockerContainer, ok bool) {
	for range 8 {
		whose, joins := c.joins()
		if !joins {
			return c, true
		}
		if c, ok = v.named(whose); !ok {
			return c, false
		}
	}
	return c, false
}

// onHost reports whether a container is in the host's namespace, or joins one
// that is.
func (v *view) onHost(c dockerContainer) bool {
	root, ok := v.root(c)
	return ok && root.mode == "host"
}

// named finds a container as the engine does: by its id, its name, or the
// beginning of its id.
func (v *view) named(idOrName string) (dockerContainer, bool) {
	if c, ok := v.containers[idOrName]; ok {
		return c, true
	}
	for _, c := range v.containers {
		if c.name == idOrName {
			return c, true
		}
	}
	var found []dockerContainer
	for id, c := range v.containers {
		if idOrName != "" && strings.HasPrefix(id, idOrName) {
			found = append(found, c)
		}
	}
	if len(found) != 1 {
		return dockerContainer{}, false
	}
	return found[0], true
}

// named reports whether it was found out whose namespace it is.
func (s *space) named() bool { return len(s.owners)+len(s.joiners) > 0 }

// joiners are the containers that were told to join another one's namespace, by the
// id of that one, and that run or may at any moment: their first instruction is not
// to pass for the other one's.
func (v *view) joiners() map[string][]string {
	all := make(map[string][]string)
	for id, c := range v.containers {
		if _, joins := c.joins(); !joins || !c.running && !c.comes {
			continue
		}
		if root, ok := v.root(c); ok {
			all[root.id] = append(all[root.id], id)
		}
	}
	return all
}

// members are the containers of a namespace that still exist, given all joiners.
func (v *view) members(s *space, joiners map[string][]string) (all []dockerContainer) {
	var joined []string
	for _, id := range s.owners {
		// Before its start has finished, an owner does not "run".
		if c, ok := v.containers[id]; ok {
			all = append(all, c)
		}
		joined = append(joined, joiners[id]...)
	}
	for _, id := range s.joiners {
		if v.containers[id].running {
			joined = append(joined, id)
		}
	}
	slices.Sort(joined)
	for _, id := range slices.Compact(joined) {
		all = append(all, v.containers[id])
	}
	return all
}

// list is what is found and what is missing, in a fixed order.
func (v *view) list(now time.Time) (found []Found, missing []Missing) {
	if v.engine != nil {
		missing = append(missing, Missing{"docker:engine", fmt.Errorf("%w: %w", ErrNoEngine, v.engine)})
	}
	placed, joiners := make(map[string]bool), v.joiners()
	for _, p := range slices.Sorted(maps.Keys(v.spaces)) {
		s := v.spaces[p]
		if !s.named() {
			found = append(found, Found{Netns: p})
			if err := v.unnamed(s, now); err != nil {
				missing = append(missing, Missing{workload.ID("netns:" + path.Base(p)), fmt.Errorf("%w: %s", err, p)})
			}
			continue
		}
		members := v.members(s, joiners)
		for _, c := range members {
			placed[c.id] = true
		}
		f, m := v.cover(p, members)
		found, missing = append(found, f...), append(missing, m...)
	}
	return found, append(missing, v.unplaced(placed, now)...)
}

// unnamed is what there is to say of a namespace without a name. That its container
// has another one too may be so for a moment, when it is restarted.
func (v *view) unnamed(s *space, now time.Time) error {
	switch late := v.overdue(s.seen, now); {
	case s.doubt != nil && (late || errors.Is(s.doubt, ErrAmbiguous)):
		return s.doubt
	case late:
		return ErrNoContainer
	}
	return nil
}

// overdue reports whether something that was seen at a time should be complete by
// now, as far as the engine could tell.
func (v *view) overdue(seen, now time.Time) bool {
	if v.since.After(seen) {
		seen = v.since
	}
	return v.engine == nil && now.Sub(seen) >= nameWithin
}

// cover decides about all members of a namespace together: steered are all or
// none. No members means that they are all gone: then it is not listed.
//
// A joiner that does not run yet opts nobody out: to create a container is not
// enough to take the metadata away from another one.
//
// Nor does an image, if there are others in the namespace: whoever builds a
// sidecar's image does not decide about the container that it is beside. What opts
// in is the runner alone.
func (v *view) cover(path string, members []dockerContainer) (found []Found, missing []Missing) {
	out, in, alone := false, !v.onlyLabelled, len(members) == 1
	for _, c := range members {
		enabled, said := c.enabled(alone)
		_, joins := c.joins()
		out = out || said && !enabled && (c.running || !joins)
		in = in || said && enabled
	}
	for _, c := range members {
		w := v.workload(c)
		switch enabled, said := c.enabled(alone); {
		case in && !out:
			found = append(found, Found{Workload: w, Netns: path})
		case out && said && !enabled:
			missing = append(missing, Missing{w.ID, fmt.Errorf("%w: container %s", ErrOptedOut, c.name)})
		case out && in && (enabled || !said):
			missing = append(missing, Missing{w.ID, ErrSharedOptOut})
		}
	}
	return found, missing
}

// unplaced reports running containers that are in none of the namespaces.
func (v *view) unplaced(placed map[string]bool, now time.Time) (missing []Missing) {
	for _, id := range slices.Sorted(maps.Keys(v.containers)) {
		c := v.containers[id]
		enabled, said := c.enabled(false)
		wanted := enabled && said || !said && !v.onlyLabelled
		switch {
		case placed[id] || !c.running || !wanted:
		case v.onHost(c):
			missing = append(missing, Missing{c.workloadID(), ErrHostNetwork})
		case v.overdue(c.since, now):
			missing = append(missing, Missing{c.workloadID(), fmt.Errorf("%w: is the engine's folder of namespaces watched, and are the host's processes visible?", ErrNoNetns)})
		}
	}
	return missing
}

func (c dockerContainer) workloadID() workload.ID { return workload.ID("docker:" + c.id) }
