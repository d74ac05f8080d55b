package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// Seen is a request of the past.
type Seen struct {
	// Workload is as much as is known of it. It may have members.
	Workload workload.Workload
	Query    imds.Query

	// Identity is whose identity it was for: see Effective. Empty if none was.
	Identity string

	// Hidden are the parameters whose values the record does not show, so that
	// nothing can be learned of them.
	Hidden []string
}

// Learn writes the least policy that allows what was seen: for each workload its
// actions, narrowed to the subtrees, resources and identities that it asked for.
// What no policy can allow, or has no word for, is left out, and so is what goes
// beyond 64 resources or subtrees of one workload: run the result to find it. A caller that named no identity gets the one again that it got; if it got
// several over time, the service's choice first and then the first in order. The
// text is the same for the same requests in any order, and Parse reads it.
func Learn(seen []Seen) []byte {
	l := learner{by: make(map[string]*learned)}
	for i := range seen {
		l.add(&seen[i])
	}
	return l.write()
}

type learner struct{ by map[string]*learned }

// learned is what one match asked for.
type learned struct {
	actions  stringSet
	subtrees stringSet
	grants   map[grant]bool // true: also by a caller that named none
}

// grant is an identity, as Effective has it, and what it was for.
type grant struct {
	action             imds.Action
	identity, resource string
}

type stringSet map[string]bool

// maxLearned bounds the resources of one identity, the identities of one action and
// the subtrees that are written for one match, to the first in order. An application
// needs a few: more are a flood, and nobody would read them.
const maxLearned = 64

func atMost(s []string) []string { return s[:min(len(s), maxLearned)] }

func (l *learner) add(s *Seen) {
	match := matchOf(&s.Workload)
	if match == "" {
		return
	}
	x := l.by[match]
	if x == nil {
		x = &learned{make(stringSet), make(stringSet), make(map[grant]bool)}
		l.by[match] = x
	}
	switch a := s.Query.Action; {
	case a == imds.Unknown:
	case imds.TakesSelector(a):
		x.identity(s)
	case a == imds.InstanceRead && s.Query.Subtree != "":
		if _, err := imds.ParseSubtree(s.Query.Subtree); err == nil {
			x.subtrees[s.Query.Subtree] = true
		}
	default:
		x.actions[string(a)] = true
	}
}

// matchOf is a match for the workload alone; empty if no pattern is.
func matchOf(w *workload.Workload) string {
	match := suggestion(w)
	if len(w.Members) > 0 {
		var names []string
		for _, name := range w.MemberNames() {
			if !writable(name) {
				return ""
			}
			names = append(names, quote(name))
		}
		return "{name: [" + strings.Join(slices.Compact(names), ", ") + "], shared: true}"
	}
	project, service, sure := w.Compose()
	used := []string{w.Name}
	switch p := w.Pod; {
	case p != nil && p.Namespace != "":
		used = []string{p.Namespace, cmp.Or(p.ServiceAccount, w.Name)}
	case sure:
		used = []string{project, service}
	}
	for _, s := range used {
		if !writable(s) {
			return ""
		}
	}
	return match
}

// writable reports whether a policy has a word for a text and nothing else.
func writable(s string) bool {
	return s != "" && len(s) <= maxValue && utf8.ValidString(s) && !strings.ContainsAny(s, "*?")
}

func (x *learned) identity(s *Seen) {
	g := grant{action: s.Query.Action, identity: cmp.Or(s.Identity, "default")}
	if name, value, ok := strings.Cut(g.identity, "="); ok {
		p, err := imds.ParseSelector(name, value)
		if err != nil || !writable(p.Value) {
			return
		}
		g.identity = p.Name + "=" + p.Value
	}
	if _, stray := s.Query.Param(strayParam); stray || slices.Contains(s.Hidden, strayParam) || slices.Contains(s.Hidden, "resource") {
		return
	}
	hidden := slices.ContainsFunc(s.Hidden, isSelector)
	if hidden && g.identity == "default" {
		return // one was named, and which is not known
	}
	if g.action == imds.IdentityToken {
		if g.resource, _ = s.Query.Resource(); !writable(g.resource) {
			return
		}
	}
	_, shown := s.Query.Selector()
	x.grants[g] = x.grants[g] || !hidden && !shown
}

// isSelector reports whether a parameter of that name chooses an identity.
func isSelector(name string) bool {
	_, ok := imds.Query{Action: imds.IdentityToken, Params: []imds.Param{{Name: name}}}.Selector()
	return ok
}

func (l *learner) write() []byte {
	var rules strings.Builder
	for _, match := range slices.Sorted(maps.Keys(l.by)) {
		l.by[match].write(&rules, match)
	}
	head := "# Learned from what was asked for: read it before it is put to use.\nmode: enforce\nrules:"
	if rules.Len() == 0 {
		return []byte(head + " []\n")
	}
	return []byte(head + "\n" + rules.String())
}

func (x *learned) write(b *strings.Builder, match string) {
	rule := func(actions ...string) {
		fmt.Fprintf(b, "  - match: %s\n    allow: [%s]\n", match, strings.Join(actions, ", "))
	}
	var plain []string
	for _, a := range all {
		if x.actions[string(a)] {
			plain = append(plain, string(a))
		}
	}
	if len(plain) > 0 {
		rule(plain...)
	}
	if len(x.subtrees) > 0 && !x.actions[string(imds.InstanceRead)] {
		rule(string(imds.InstanceRead))
		writeList(b, "subtree", atMost(slices.Sorted(maps.Keys(x.subtrees))))
	}
	// The first rule that fits a caller that names no identity decides which one
	// it gets: so those that such callers got stand first.
	for _, a := range all {
		for _, unnamed := range []bool{true, false} {
			for _, id := range x.identities(a, unnamed) {
				rule(string(a))
				if a == imds.IdentityToken {
					writeList(b, "resource", x.resources(a, id, unnamed))
				}
				name, value, ok := strings.Cut(id, "=")
				if !ok {
					fmt.Fprintf(b, "    identity: default\n")
					continue
				}
				fmt.Fprintf(b, "    identity: {%s: %s}\n", name, quoteLoose(value))
			}
		}
	}
}

// identities lists those of the grants of one kind, the service's choice first.
func (x *learned) identities(a imds.Action, unnamed bool) []string {
	set := make(stringSet)
	for g, is := range x.grants {
		if g.action == a && is == unnamed {
			set[g.identity] = true
		}
	}
	return atMost(slices.SortedFunc(maps.Keys(set), func(a, b string) int {
		return cmp.Or(byChoice(a)-byChoice(b), strings.Compare(a, b))
	}))
}

func byChoice(identity string) int {
	if identity == "default" {
		return 0
	}
	return 1
}

func (x *learned) resources(a imds.Action, identity string, unnamed bool) (out []string) {
	for g, is := range x.grants {
		if g.action == a && g.identity == identity && is == unnamed {
			out = append(out, g.resource)
		}
	}
	slices.Sort(out)
	return atMost(out)
}

func writeList(b *strings.Builder, key string, values []string) {
	for i, v := range values {
		values[i] = quoteLoose(v)
	}
	if len(values) <= 3 {
		fmt.Fprintf(b, "    %s: [%s]\n", key, strings.Join(values, ", "))
		return
	}
	fmt.Fprintf(b, "    %s:\n", key)
	for _, v := range values {
		fmt.Fprintf(b, "      - %s\n", v)
	}
}

// quoteLoose is quote for values that are read easier without quotes: outside of
// lists and mappings of YAML, a colon before a letter or a slash, and a slash, are
// themselves.
func quoteLoose(s string) string {
	if quote(s) == s || !strings.ContainsAny(s, "/") {
		return quote(s)
	}
	for i := range len(s) {
		b := s[i]
		ok := b|0x20 >= 'a' && b|0x20 <= 'z' || b >= '0' && b <= '9' || strings.IndexByte("-_./", b) >= 0 ||
			b == ':' && i+1 < len(s) && s[i+1] == '/'
		if !ok || i == 0 && b|0x20 < 'a' {
			return quote(s)
		}
	}
	return s
}
