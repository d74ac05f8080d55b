package policy

import (
	"slices"

	"imdsgate/internal/imds"
)

// decide is for one member alone.
func (m *member) decide(silent string, i int, a *asked) Decision {
	d := m.judge(silent, i, a)
	if len(m.trials[i]) > 0 {
		m.try(&d, i, a)
	}
	return d
}

// judge asks the rules that are in force.
func (m *member) judge(silent string, i int, a *asked) Decision {
	var cutter *rule
	var drop []string
	for _, r := range m.denies[i] {
		switch r.fits(all[i], a) {
		case fitsAll:
			return r.denial(i, r.firm())
		case fitsPart:
			if cutter == nil {
				cutter = r
			}
			drop = r.below(drop, a.q.Subtree)
		}
	}
	var part, near *rule
	var why miss
	var keep []string
	for k := range m.allows[i] {
		o := &m.allows[i][k]
		if near != nil && o.skips(a) {
			continue
		}
		switch f := o.fits(all[i], a); {
		case f == fitsAll:
			return o.permission(i, a, imds.Cut{Drop: drop})
		case f == fitsPart:
			if part == nil {
				part = o.rule
			}
			keep = o.below(keep, a.q.Subtree)
		case near == nil:
			near, why = o.rule, f
		}
	}
	switch {
	case part != nil:
		if c, ok := left(keep, drop); ok {
			return part.permission(i, a, c)
		}
		return cutter.denial(i, false) // in mode Audit the rest passes
	case near != nil:
		return Decision{Rule: near.label, Reason: near.of(i).misses[why], why: near}
	}
	return Decision{Rule: silent, Reason: m.missing[i]}
}

// left is a cut, less what it keeps and drops again. It reports false if it kept
// nothing but that.
func left(keep, drop []string) (imds.Cut, bool) {
	c := imds.Cut{Drop: drop}
	for _, k := range keep {
		if !slices.ContainsFunc(drop, func(d string) bool { return imds.Within(k, d) }) {
			c.Keep = append(c.Keep, k)
		}
	}
	return c, len(keep) == 0 || len(c.Keep) > 0
}

func (r *rule) denial(i int, enforced bool) Decision {
	return Decision{Rule: r.label, Reason: r.of(i).reason, why: r, enforced: enforced}
}

func (r *rule) permission(i int, a *asked, c imds.Cut) Decision {
	d := Decision{Allow: true, Rule: r.label, Reason: r.of(i).reason, why: r, Cut: c}
	if r.identity.set && !a.named && imds.TakesSelector(all[i]) {
		d.Identity = r.identity.selector
	}
	return d
}

// try notes what rules on trial would change.
func (m *member) try(d *Decision, i int, a *asked) {
	var allows *rule
	for k := range m.trials[i] {
		switch o := &m.trials[i][k]; {
		case o.deny && o.fits(all[i], a) == fitsAll:
			if d.Allow {
				d.Would, d.Reason = "deny", d.Reason+"; "+o.called+", on trial, would deny it"
			}
			return
		case !o.deny && allows == nil && !o.skips(a) && o.fits(all[i], a) <= fitsPart:
			allows = o.rule
		}
	}
	if allows != nil && !d.Allow && (d.why == nil || !d.why.deny) {
		d.Would, d.Reason = "allow", d.Reason+"; "+allows.called+", on trial, would allow it"
	}
}
