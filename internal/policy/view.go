package policy

import (
	"slices"
	"strings"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// View is a snapshot as one workload meets it. It does not change and is safe for
// concurrent use; making one takes time in the order of the number of rules.
type View struct {
	number  uint64
	off     string // the label of decisions that no rule made: in mode Off,
	silent  string // and where no rule speaks of the action
	mode    Mode
	loaded  bool
	members []member
}

// member is one workload with the rules that match it, by action. Texts for what
// nothing allows are made with it, so that to say no costs no more than yes.
type member struct {
	caller
	denies  [maxActions][]*rule
	allows  [maxActions][]option
	trials  [maxActions][]option // both kinds, of mode Audit
	missing [maxActions]string   // where there are no allows
}

// option is a rule, once for each of its resources, so that those for others can
// be passed over without a look at the rule.
type option struct {
	*rule
	key uint64 // see resourceKey; 0: for any
	id  uint64 // see selectorKey; 0: for any, or for those that name none

	// head is what an api-version must begin with; empty: anything, or one of several.
	head string
}

func appendOptions(dst []option, r *rule, action int) []option {
	o := option{rule: r}
	if len(r.versions) == 1 {
		o.head = r.versions[0].text[:r.versions[0].head]
	}
	if imds.TakesSelector(all[action]) {
		o.id = selectorKey(r.identity.selector)
	}
	if all[action] != imds.IdentityToken || len(r.keys) == 0 {
		return append(dst, o)
	}
	for _, o.key = range r.keys {
		dst = append(dst, o)
	}
	return dst
}

// skips reports whether the rule is certainly for other resources, another
// identity than the caller names, or another version.
func (o *option) skips(a *asked) bool {
	return o.key != 0 && o.key != a.key || a.named && o.id != 0 && o.id != a.id ||
		o.head != "" && a.version[0] != "" && !strings.HasPrefix(a.version[0], o.head)
}

// View is what w, identified with proof, meets. A workload with members is decided
// about as the intersection of what each of them may do.
func (s *Snapshot) View(w *workload.Workload, proof workload.Proof) *View {
	v := &View{mode: Enforce}
	var rules []*rule
	if s != nil {
		v.number = s.Number
	}
	if s != nil && s.Policy != nil {
		v.mode, v.loaded = s.Mode(), s.name != ""
		v.off, v.silent = base(s.name)+":off", base(s.name)+":default"
		rules = s.rules
	}
	switch v.mode {
	case Off:
		rules = nil
	case Audit:
		// Whether a request is denied firmly must not depend on which of several
		// denies is found first.
		rules = slices.Clone(rules)
		slices.SortStableFunc(rules, func(a, b *rule) int { return softer(a) - softer(b) })
	}
	if len(w.Members) == 0 {
		v.members = []member{newMember(rules, caller{w, proof, false})}
		return v
	}
	for i := range w.Members {
		v.members = append(v.members, newMember(rules, caller{&w.Members[i], proof, true}))
	}
	return v
}

// softer is 0 for a deny that holds whatever the policy's mode, else 1.
func softer(r *rule) int {
	if r.deny && r.firm() {
		return 0
	}
	return 1
}

func newMember(rules []*rule, c caller) member {
	m := member{caller: c}
	var unproven [maxActions]*rule // would allow, for a better proof
	for _, r := range rules {
		if r.mode == Off {
			continue
		}
		if key := r.mismatch(&c); key != "" {
			if key == "proof" && !r.deny && !r.onTrial() {
				for i := range all {
					if r.actions.has(i) && unproven[i] == nil {
						unproven[i] = r
					}
				}
			}
			continue
		}
		for i := range all {
			switch {
			case !r.actions.has(i):
			case r.onTrial():
				m.trials[i] = appendOptions(m.trials[i], r, i)
			case r.deny:
				m.denies[i] = append(m.denies[i], r)
			default:
				m.allows[i] = appendOptions(m.allows[i], r, i)
			}
		}
	}
	match := suggestion(c.w)
	for i, a := range all {
		switch r := unproven[i]; {
		case len(m.allows[i]) > 0:
		case r != nil:
			m.missing[i] = r.called + " would allow " + string(a) + ", but wants proof " + r.match.proof.String() + ", and there is " + c.proof.String()
		default:
			m.missing[i] = missing(match, a)
		}
	}
	return m
}

// Decide says whether the workload may do what q asks for. It allocates only
// where parts of an answer must go, where rules are on trial, and where members of
// a namespace have to agree.
func (v *View) Decide(q imds.Query) Decision {
	if v.mode == Off {
		return Decision{Allow: true, Snapshot: v.number, Mode: Off, Rule: v.off, Reason: "the policy is off: everything is let through"}
	}
	d := v.decide(q)
	d.Snapshot, d.Mode = v.number, Enforce
	if d.Allow {
		d.Blank = v.blank(q, false)
	}
	if v.mode == Audit && !d.enforced && (d.Allow || q.Action != imds.Unknown || !v.closes()) {
		v.pass(&d, q)
	}
	return d
}

// closes reports whether a rule with a mode of its own denies something. Then what
// is unknown does not pass even in mode Audit: it could be the same by another
// spelling.
func (v *View) closes() bool {
	for j := range v.members {
		for i := range all {
			if v.members[j].holds(i) {
				return true
			}
		}
	}
	return false
}

// decide intersects what the members may do.
func (v *View) decide(q imds.Query) Decision {
	if !v.loaded {
		return Decision{Rule: "none", Reason: "no policy is loaded, so everything is denied"}
	}
	i, ok := indexes[q.Action]
	if !ok {
		return Decision{Rule: "none", Reason: "the action of this request has no name, so no policy can allow it"}
	}
	a := ask(&q)
	if len(v.members) == 1 {
		return v.members[0].decide(v.silent, i, &a)
	}
	return v.agree(q, i, &a)
}
