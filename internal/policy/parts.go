package policy

import (
	"cmp"
	"slices"

	"imdsgate/internal/imds"
)

// pass is for a policy in mode Audit: the request passes, whole and as it came,
// but for what rules with a mode of their own take away or add.
func (v *View) pass(d *Decision, q imds.Query) {
	blank, drop := v.blank(q, true), v.drop(q)
	would := ""
	switch adds := d.Identity.Name != "" && !d.why.firm(); {
	case !d.Allow && d.Would == "allow": // by a rule on trial: it passes, and would
		d.Mode, d.Would = Audit, ""
	case !d.Allow:
		d.Mode, d.Would = Audit, "deny"
	case len(d.Blank) > len(blank) || len(d.Cut.Keep) > 0 || len(d.Cut.Drop) > len(drop):
		would = "cut"
		d.Reason += "; enforced, the answer would be without " + missingParts(d)
	case adds:
		would = "identity"
		d.Reason += "; enforced, it would be for the identity " + identity{selector: d.Identity}.String()
	}
	if would != "" {
		d.Mode, d.Would = Audit, cmp.Or(d.Would, would)
	}
	if !d.why.firm() {
		d.Identity = imds.Param{}
	}
	d.Allow, d.Blank, d.Cut = true, blank, imds.Cut{Drop: drop}
}

// blank returns the actions that q covers and some member may not do, in their
// order; with held, only those that a rule with a mode of its own denies.
func (v *View) blank(q imds.Query, held bool) []imds.Action {
	first, last, n := 0, 0, 0
	for i, a := range q.Covers {
		if v.covers(a, q, held) {
			continue
		}
		if n == 0 {
			first = i
		}
		last = i
		n++
	}
	if n == 0 {
		return nil
	}
	if run := q.Covers[first : last+1 : last+1]; len(run) == n {
		return run
	}
	out := make([]imds.Action, 0, n)
	for _, a := range q.Covers {
		if !v.covers(a, q, held) {
			out = append(out, a)
		}
	}
	return out
}

// covers reports whether all members may do what q covers besides its own action.
func (v *View) covers(action imds.Action, q imds.Query, held bool) bool {
	i, ok := indexes[action]
	if !ok {
		return held
	}
	a := ask(&q)
	for j := range v.members {
		m := &v.members[j]
		if held && m.holds(i) || !held && !m.may(i, &a) {
			return false
		}
	}
	return true
}

func (m *member) may(i int, a *asked) bool {
	if len(m.denies[i]) > 0 {
		return false
	}
	for k := range m.allows[i] {
		if m.allows[i][k].fits(all[i], a) == fitsAll {
			return true
		}
	}
	return false
}

// holds reports whether a rule with a mode of its own denies the action, or a part.
func (m *member) holds(i int) bool { return slices.ContainsFunc(m.denies[i], (*rule).firm) }

// drop is what rules with a mode of their own deny of a document.
func (v *View) drop(q imds.Query) (drop []string) {
	i, ok := indexes[q.Action]
	if !ok || q.Action != imds.InstanceRead {
		return nil
	}
	for j := range v.members {
		for _, r := range v.members[j].denies[i] {
			if r.firm() {
				drop = r.below(drop, q.Subtree)
			}
		}
	}
	return drop
}
