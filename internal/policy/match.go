package policy

import (
	"slices"
	"strings"

	"imdsgate/internal/workload"
)

// match says which workloads a rule is for: all that is given must hold. The zero
// value is every workload.
type match struct {
	names, images    []glob
	digests          []string
	labels           []labelMatch
	project, service []glob
	namespace        []glob
	account          []glob
	podLabels        []labelMatch
	shared           *bool
	proof            workload.Proof
}

type labelMatch struct {
	key    string
	values []glob
}

// everybody reports whether a match demands nothing of the workload itself.
func (m *match) everybody() bool {
	return (len(m.names) == 0 || slices.ContainsFunc(m.names, glob.any)) && (len(m.images) == 0 || slices.ContainsFunc(m.images, glob.any)) &&
		len(m.digests)+len(m.labels)+len(m.project)+len(m.service)+len(m.namespace)+len(m.account)+len(m.podLabels) == 0
}

// caller is a workload with what is known about how it came.
type caller struct {
	w      *workload.Workload
	proof  workload.Proof
	shared bool // it has others in its network namespace
}

// mismatch is the key of the file that keeps a rule from a caller, or empty if
// nothing does.
//
// What only the image says of itself can make a deny match, and never an allow:
// whoever builds an image chooses its labels.
func (r *rule) mismatch(c *caller) string {
	m := &r.match
	switch {
	case len(m.names) > 0 && !matchAny(m.names, c.w.Name):
		return "name"
	case len(m.images) > 0 && !r.imaged(c.w):
		return "image"
	case len(m.digests) > 0 && !m.digest(c.w):
		return "digest"
	case !r.labelled(c.w):
		return "labels"
	case len(m.project)+len(m.service) > 0 && !r.composed(c.w):
		return "compose"
	case !r.podded(c.w.Pod):
		return "kubernetes"
	case m.shared != nil && *m.shared != c.shared:
		return "shared"
	case c.proof < m.proof:
		return "proof"
	}
	return ""
}

// imaged compares the image's name. Of an image whose name is not known, a deny
// takes it for what it looks for.
func (r *rule) imaged(w *workload.Workload) bool {
	if w.Image == "" {
		return r.deny && w.ImageID != ""
	}
	return matchAny(r.match.images, w.Image)
}

func (m *match) digest(w *workload.Workload) bool {
	_, asked, _ := strings.Cut(w.Image, "@")
	for _, d := range m.digests {
		if d == w.ImageID || d == asked {
			return true
		}
	}
	return false
}

func (r *rule) labelled(w *workload.Workload) bool {
	for i := range r.match.labels {
		l := &r.match.labels[i]
		v, ok := w.Labels[l.key]
		if !ok && r.deny {
			v, ok = w.ImageLabels[l.key]
		}
		if !ok || !matchAny(l.values, v) {
			return false
		}
	}
	return true
}

func (r *rule) composed(w *workload.Workload) bool {
	m := &r.match
	project, service, sure := w.Compose()
	return project != "" && (sure || r.deny) &&
		(len(m.project) == 0 || matchAny(m.project, project)) && (len(m.service) == 0 || matchAny(m.service, service))
}

// podded compares what Kubernetes says. What it does not say, a deny takes for
// what it looks for.
func (r *rule) podded(p *workload.Pod) bool {
	m := &r.match
	if len(m.namespace)+len(m.account)+len(m.podLabels) == 0 {
		return true
	}
	if p == nil || p.Claimed && !r.deny || len(m.namespace) > 0 && !matchAny(m.namespace, p.Namespace) {
		return false
	}
	unknown := r.deny && p.ServiceAccount == ""
	if len(m.account) > 0 && !unknown && !matchAny(m.account, p.ServiceAccount) {
		return false
	}
	for i := range m.podLabels {
		l := &m.podLabels[i]
		v, ok := p.Labels[l.key]
		if (!ok || !matchAny(l.values, v)) && !(r.deny && p.Claimed) {
			return false
		}
	}
	return true
}

// glob is a pattern: * stands for any characters, also none, ? for one; all
// others for themselves, letter case included.
type glob struct {
	text    string
	literal bool
	head    int // bytes before the first * or ?
}

func makeGlob(s string) glob {
	head := strings.IndexAny(s, "*?")
	if head < 0 {
		return glob{text: s, literal: true, head: len(s)}
	}
	return glob{text: s, head: head}
}

// any reports whether everything matches, the empty text too.
func (g glob) any() bool { return g.text != "" && strings.Trim(g.text, "*") == "" }

func matchAny(globs []glob, s string) bool {
	for i := range globs {
		if globs[i].match(s) {
			return true
		}
	}
	return false
}

// match takes time in the order of both lengths' product at worst.
func (g *glob) match(s string) bool {
	if g.literal {
		return g.text == s
	}
	p := g.text
	if len(s) < g.head || s[:g.head] != p[:g.head] {
		return false
	}
	if p[g.head:] == "*" {
		return true
	}
	star, resume := -1, 0 // the last * that was met, and where in s to go on with it
	i, j := g.head, g.head
	for i < len(s) {
		switch {
		case j < len(p) && p[j] == '*':
			star, resume = j, i
			j++
		case j < len(p) && p[j] == '?':
			i, j = i+width(s[i:]), j+1
		case j < len(p) && p[j] == s[i]:
			i, j = i+1, j+1
		case star >= 0:
			resume += width(s[resume:])
			i, j = resume, star+1
		default:
			return false
		}
	}
	return strings.Trim(p[j:], "*") == ""
}

// width is the number of bytes of the first character.
func width(s string) int {
	for i := range s {
		if i > 0 {
			return i
		}
	}
	return len(s)
}
