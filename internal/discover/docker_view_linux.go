package discover

import (
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
	owners, joiners []string
}

// dockerContainer is what the engine says of one.
type dockerContainer struct {
	id, name, image string
	names           []string // all that it is listed under; name is one of them
	labels          map[string]string
	mode            string // how it is connected: a network's name, none, host, container:ID
	running         bool
	since           time.Time // it was first seen running
}

// joins is the id or name of the container whose namespace this one shares.
func (c dockerContainer) joins() (whose string, ok bool) {
	return strings.CutPrefix(c.mode, "container:")
}

// enabled reads the label. Nobody may have set it, or to nonsense: then said is
// false.
func (c dockerContainer) enabled() (enabled, said bool) {
	enabled, err := strconv.ParseBool(c.labels[LabelEnable])
	return enabled, err == nil
}

// onHost reports whether a container is in the host's namespace, or joins one
// that is.
func (v *view) onHost(c dockerContainer) bool {
	for range 8 {
		whose, ok := c.joins()
		if !ok {
			return c.mode == "host"
		}
		if c, ok = v.named(whose); !ok {
			return false
		}
	}
	return false
}

func (v *view) named(idOrName string) (dockerContainer, bool) {
	if c, ok := v.containers[idOrName]; ok {
		return c, true
	}
	for _, c := range v.containers {
		if c.name == idOrName {
			return c, true
		}
	}
	return dockerContainer{}, false
}

// settle notes which containers have processes in a namespace. Owners stay once
// they are found: whoever enters later without having been told to by
// --network container:NAME is nobody's member.
func (v *view) settle(s *space, ids []string) {
	var owners, joiners []string
	for _, id := range ids {
		c := v.containers[id]
		switch _, joins := c.joins(); {
		case joins:
			joiners = append(joiners, id)
		case c.mode != "host": // those enter other namespaces for their work
			owners = append(owners, id)
		}
	}
	if len(s.owners) != 1 && len(owners) > 0 {
		s.owners = owners
	}
	s.joiners = joiners
}

// named reports whether it was found out whose namespace it is.
func (s *space) named() bool { return len(s.owners)+len(s.joiners) > 0 }

// members are the containers of a namespace that still exist.
func (v *view) members(s *space) (all []dockerContainer) {
	for _, id := range s.owners {
		// Before its start has finished, an owner does not "run".
		if c, ok := v.containers[id]; ok {
			all = append(all, c)
		}
	}
	for _, id := range s.joiners {
		if c, ok := v.containers[id]; ok && c.running {
			all = append(all, c)
		}
	}
	return all
}

// list is what is found and what is missing, in a fixed order.
func (v *view) list(now time.Time) (found []Found, missing []Missing) {
	if v.engine != nil {
		missing = append(missing, Missing{"docker:engine", fmt.Errorf("%w: %w", ErrNoEngine, v.engine)})
	}
	placed := make(map[string]bool)
	for _, p := range slices.Sorted(maps.Keys(v.spaces)) {
		s := v.spaces[p]
		if !s.named() {
			found = append(found, Found{Netns: p})
			if v.overdue(s.seen, now) {
				missing = append(missing, Missing{workload.ID("netns:" + path.Base(p)), fmt.Errorf("%w: %s", ErrNoContainer, p)})
			}
			continue
		}
		members := v.members(s)
		for _, c := range members {
			placed[c.id] = true
		}
		f, m := v.cover(p, members)
		found, missing = append(found, f...), append(missing, m...)
	}
	return found, append(missing, v.unplaced(placed, now)...)
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
func (v *view) cover(path string, members []dockerContainer) (found []Found, missing []Missing) {
	out, in := false, !v.onlyLabelled
	for _, c := range members {
		enabled, said := c.enabled()
		out = out || said && !enabled
		in = in || said && enabled
	}
	for _, c := range members {
		w := c.workload()
		switch enabled, said := c.enabled(); {
		case in && !out:
			found = append(found, Found{Workload: w, Netns: path})
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
		enabled, said := c.enabled()
		wanted := enabled && said || !said && !v.onlyLabelled
		switch {
		case placed[id] || !c.running || !wanted:
		case v.onHost(c):
			missing = append(missing, Missing{c.workload().ID, ErrHostNetwork})
		case v.overdue(c.since, now):
			missing = append(missing, Missing{c.workload().ID, fmt.Errorf("%w: is the engine's folder of namespaces watched, and are the host's processes visible?", ErrNoNetns)})
		}
	}
	return missing
}

func (c dockerContainer) workload() workload.Workload {
	return workload.Workload{ID: workload.ID("docker:" + c.id), Name: c.name, Labels: c.labels, Image: c.image}
}
