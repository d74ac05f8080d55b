// Package agent keeps redirections equal to containers. What is to be done is a
// pure plan, made from what is wanted and what is held; then the steps are done.
package agent

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"imdsgate/internal/workload"
)

// Key tells namespaces apart: the inode and cookie of a network namespace.
type Key struct{ Inode, Cookie uint64 }

// Held is what the plan knows of an attachment that is held.
type Held struct {
	ID       uint64
	Workload workload.Workload
	Alive    bool // its listeners still listen
}

// Backoff says since when and for how long a namespace has been trouble.
type Backoff struct {
	Until time.Time
	Tries int
}

// Action is what a step does.
type Action string

// The actions, in the order in which a plan does them.
const (
	Detach Action = "detach" // nobody wants it any more
	Reopen Action = "reopen" // its listeners were destroyed: detach and attach
	Update Action = "update" // the same namespace, described differently
	Attach Action = "attach" // wanted and not held
)

var order = []Action{Detach, Reopen, Update, Attach}

// Step is one thing to do to one namespace.
type Step struct {
	Action   Action
	Key      Key
	ID       uint64            // of the attachment, zero for Attach
	Workload workload.Workload // that is wanted, or for Detach was
}

// Plan compares what is wanted with what is held. It is pure and total; the
// steps come in a fixed order. A namespace whose back-off has not ended gets no
// Attach and no Reopen.
//
// A wanted workload without ID is one whose name is not known (yet, or for the
// moment): it never takes the place of a name that is.
func Plan(want map[Key]workload.Workload, have map[Key]Held, backoff map[Key]Backoff, now time.Time) []Step {
	var steps []Step
	for k, h := range have {
		w, wanted := want[k]
		switch {
		case !wanted:
			steps = append(steps, Step{Action: Detach, Key: k, ID: h.ID, Workload: h.Workload})
		case !h.Alive && !now.Before(backoff[k].Until):
			steps = append(steps, Step{Action: Reopen, Key: k, ID: h.ID, Workload: w})
		case h.Alive && w.ID != "" && !equal(w, h.Workload):
			steps = append(steps, Step{Action: Update, Key: k, ID: h.ID, Workload: w})
		}
	}
	for k, w := range want {
		if _, held := have[k]; !held && !now.Before(backoff[k].Until) {
			steps = append(steps, Step{Action: Attach, Key: k, Workload: w})
		}
	}
	slices.SortFunc(steps, func(a, b Step) int {
		return cmp.Or(
			cmp.Compare(slices.Index(order, a.Action), slices.Index(order, b.Action)),
			cmp.Compare(a.Key.Inode, b.Key.Inode), cmp.Compare(a.Key.Cookie, b.Key.Cookie))
	})
	return steps
}

// equal compares everything that is known of two workloads.
func equal(a, b workload.Workload) bool {
	return a.ID == b.ID && a.Name == b.Name && a.Image == b.Image && a.ImageID == b.ImageID &&
		maps.Equal(a.Labels, b.Labels) && maps.Equal(a.ImageLabels, b.ImageLabels) &&
		equalPods(a.Pod, b.Pod) && slices.EqualFunc(a.Members, b.Members, equal)
}

func equalPods(a, b *workload.Pod) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Namespace == b.Namespace && a.ServiceAccount == b.ServiceAccount && a.Claimed == b.Claimed && maps.Equal(a.Labels, b.Labels)
}

// Group makes one workload of those that share a namespace, which the kernel
// cannot tell apart. It has all their names and nothing else of its own: what it
// may do is what each of Members may, so a label here could only mislead. The
// order of members does not matter, and those without ID do not count.
func Group(members []workload.Workload) workload.Workload {
	members = slices.DeleteFunc(slices.Clone(members), func(w workload.Workload) bool { return w.ID == "" })
	switch len(members) {
	case 0:
		return workload.Workload{}
	case 1:
		return members[0]
	}
	slices.SortFunc(members, func(a, b workload.Workload) int { return cmp.Compare(a.ID, b.ID) })
	ids := make([]string, 0, len(members))
	for _, m := range members {
		ids = append(ids, string(m.ID))
	}
	w := workload.Workload{ID: workload.ID(strings.Join(ids, "+")), Members: members}
	w.Name = strings.Join(w.MemberNames(), "+")
	return w
}

// next is the back-off after one more failure: half a second, doubled each time,
// at most half a minute.
func (b Backoff) next(now time.Time) Backoff {
	wait := min(500*time.Millisecond<<min(b.Tries, 10), 30*time.Second)
	return Backoff{Until: now.Add(wait), Tries: b.Tries + 1}
}
