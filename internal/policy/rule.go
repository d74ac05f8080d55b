package policy

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"imdsgate/internal/imds"
)

// all are the actions, at the index by which this package names them.
var all = imds.Actions()

// indexes is the inverse of all.
var indexes = func() map[imds.Action]int {
	m := make(map[imds.Action]int, len(all))
	for i, a := range all {
		m[a] = i
	}
	return m
}()

const maxActions = 32

// actionSet has a bit for each action.
type actionSet uint32

func setOf(actions ...imds.Action) (s actionSet) {
	for _, a := range actions {
		s |= 1 << indexes[a]
	}
	return s
}

func (s actionSet) has(i int) bool { return s>>i&1 == 1 }

// list is the set's actions, in their order.
func (s actionSet) list() (as []imds.Action) {
	for i, a := range all {
		if s.has(i) {
			as = append(as, a)
		}
	}
	return as
}

// rule is one rule of a policy.
type rule struct {
	name  string
	place string // "policy.yaml:3"
	line  int
	mode  Mode
	own   bool // the mode is the rule's own, not the file's
	top   bool // made from the short form, or built in
	match match
	deny  bool

	actions actionSet

	// What an allow is narrowed to; empty means that it is not.
	resources []string
	versions  []glob
	subtrees  []subtree // a deny may have these, too
	identity  identity

	label  string                   // see Decision.Rule
	called string                   // how reasons name it
	misses [missIdentity + 1]string // why it does not fit: the end of a sentence
	texts  []texts                  // of its actions, in their order
	keys   []uint64                 // of its resources
}

// texts are what a rule has to say of one of its actions.
type texts struct {
	reason string                   // why it decides as it does
	misses [missIdentity + 1]string // why it does not, and what to change
}

// of returns the texts for an action that the rule has.
func (r *rule) of(i int) *texts {
	return &r.texts[bits.OnesCount32(uint32(r.actions)&(1<<i-1))]
}

// firm reports whether the rule holds even where the policy's mode is Audit; no
// rule does not.
func (r *rule) firm() bool { return r != nil && r.own && r.mode == Enforce }

// onTrial reports whether the rule is in mode Audit by itself: it decides nothing.
func (r *rule) onTrial() bool { return r.own && r.mode == Audit }

// subtree is a part of the instance document as written, and what that covers.
type subtree struct {
	written string
	paths   []string // canonical: itself, and other names of the same data
}

// identity is whose token an allow is for.
type identity struct {
	set      bool
	selector imds.Param // no name: the identity that the service gives if none is named
}

func (id identity) String() string {
	if id.selector.Name == "" {
		return "default"
	}
	return id.selector.Name + " " + id.selector.Value
}

// miss is what of a query a rule does not fit.
type miss uint8

const (
	fitsAll  miss = iota
	fitsPart      // for a part of the instance document that was asked for
	missSubtree
	missVersion
	missResource
	missIdentity
)

// finish makes the rule's texts, so that none is made while requests wait. n is
// its number in the file.
func (r *rule) finish(n int) {
	switch {
	case r.top && r.name != "":
		r.label, r.called = r.place+":"+r.name, "the "+r.name+" policy"
	case r.top && r.deny:
		r.label, r.called = r.place, "the list deny"
	case r.top:
		r.label, r.called = r.place, "the list allow"
	case r.name != "":
		r.label, r.called = r.place+" "+strconv.Quote(r.name), "rule "+strconv.Quote(r.name)
	default:
		r.label, r.called = r.place, "rule "+strconv.Itoa(n)
	}
	r.narrowed()
	for _, a := range r.actions.list() {
		if r.deny {
			r.texts = append(r.texts, texts{reason: fmt.Sprintf("%s is denied by %s: no allow outweighs that, it must change there", a, r.called)})
			continue
		}
		t := texts{reason: fmt.Sprintf("%s is allowed by %s", a, r.called)}
		for m, end := range r.misses {
			t.misses[m] = t.reason + end + hints[m]
		}
		r.texts = append(r.texts, t)
	}
}

// hints say what to change where an allow does not fit, by what it is of.
var hints = [missIdentity + 1]string{
	missSubtree:  ": add to its subtree",
	missVersion:  ": add to its api-version",
	missResource: ": add to its resource",
	missIdentity: ": another identity is another rule",
}

// narrowed notes what an allow is for.
func (r *rule) narrowed() {
	if r.deny {
		return
	}
	var versions, subtrees []string
	for _, v := range r.versions {
		versions = append(versions, v.text)
	}
	for _, s := range r.subtrees {
		subtrees = append(subtrees, s.written)
	}
	for _, s := range r.resources {
		r.keys = append(r.keys, resourceKey(s))
	}
	r.misses[missSubtree] = " for the subtree " + some(subtrees) + " only"
	r.misses[missVersion] = " for api-version " + some(versions) + " only"
	r.misses[missResource] = " for the resource " + some(r.resources) + " only"
	r.misses[missIdentity] = " for the identity " + r.identity.String() + " only"
}

// some lists texts, but not hundreds of them.
func some(s []string) string {
	const most = 4
	if len(s) > most {
		return strings.Join(s[:most], " or ") + " or " + strconv.Itoa(len(s)-most) + " others"
	}
	return strings.Join(s, " or ")
}

// fits reports whether a rule, which speaks of the action, is for this query; a
// deny is narrowed by subtrees alone.
// Actions that the query covers besides its own are asked about too: a narrowing
// that they have no word for is not theirs.
func (r *rule) fits(action imds.Action, a *asked) miss {
	if len(r.versions) > 0 && !a.versionIn(r.versions) {
		return missVersion
	}
	switch {
	case len(r.resources) > 0 && action == imds.IdentityToken && !a.resourceIn(r.resources):
		return missResource
	case r.identity.set && imds.TakesSelector(action) && (a.stray || a.named && !imds.SameSelector(a.selector, r.identity.selector)):
		return missIdentity
	case len(r.subtrees) > 0 && action == imds.InstanceRead:
		return r.part(a.q.Subtree)
	}
	return fitsAll
}

// part compares what was asked for with the rule's subtrees.
func (r *rule) part(asked string) miss {
	m := missSubtree
	for i := range r.subtrees {
		for _, s := range r.subtrees[i].paths {
			if imds.Within(asked, s) {
				return fitsAll
			}
			if imds.Within(s, asked) {
				m = fitsPart
			}
		}
	}
	return m
}

// below adds the rule's subtrees that are parts of what was asked for.
func (r *rule) below(dst []string, asked string) []string {
	for i := range r.subtrees {
		for _, s := range r.subtrees[i].paths {
			if imds.Within(s, asked) {
				dst = addPath(dst, s)
			}
		}
	}
	return dst
}

// addPath appends a subtree that is not in the list, nor in one of the list.
func addPath(dst []string, s string) []string {
	for _, d := range dst {
		if imds.Within(s, d) {
			return dst
		}
	}
	return append(dst, s)
}
