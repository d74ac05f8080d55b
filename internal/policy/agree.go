package policy

import (
	"strconv"
	"strings"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// agree decides about several members: what one may not do, none may. It follows
// that all must get the same identity: where they name none and one's rule adds
// one, the others must be allowed that one.
func (v *View) agree(q imds.Query, i int, a *asked) Decision {
	d := v.narrowest(i, a)
	if !d.Allow || !imds.TakesSelector(q.Action) || a.named {
		return d
	}
	var refused Decision
	for j := range v.members {
		e := v.members[j].decide(v.silent, i, a)
		if e.Identity.Name == "" {
			continue
		}
		named := q.WithSelector(e.Identity)
		b := ask(&named)
		f := v.narrowest(i, &b)
		if f.Allow {
			e.Member = f.Member
			return e
		}
		if refused.Rule == "" {
			refused = f
			refused.Reason = "the rules of " + v.members[j].w.Name + " add the identity " + identity{selector: e.Identity}.String() +
				", which other members of its network namespace may not have: " + f.Reason
		}
	}
	if refused.Rule != "" {
		return refused
	}
	return d // nobody adds one
}

// narrowest is the intersection of the members' decisions, in the words of the
// narrowest one.
func (v *View) narrowest(i int, a *asked) Decision {
	var out Decision
	differ := false
	for j := range v.members {
		d := v.members[j].decide(v.silent, i, a)
		d.Member = v.members[j].w.Name
		if j == 0 {
			out = d
			continue
		}
		differ = differ || d.why != out.why || d.Allow != out.Allow
		switch {
		case !out.Allow:
			if !d.Allow && d.enforced && !out.enforced {
				out = d
			}
		case !d.Allow:
			out = d
		default:
			cut, ok := intersect(out.Cut, d.Cut)
			if !ok {
				d.Allow, d.Cut = false, imds.Cut{}
				d.Reason = "the members of the network namespace may read no part of this in common: " + d.Reason
				out = d
				continue
			}
			if narrower(d, out) {
				out = d
			}
			out.Cut = cut
		}
	}
	if !differ {
		out.Member = ""
	}
	return out
}

// narrower reports whether d allows less than e; both allow.
func narrower(d, e Decision) bool {
	weight := func(d Decision) int {
		n := 0
		for _, is := range []bool{len(d.Cut.Drop) > 0, len(d.Cut.Keep) > 0, d.Identity.Name != ""} {
			n *= 2
			if is {
				n++
			}
		}
		return n
	}
	return weight(d) > weight(e)
}

// intersect is what stays of a document after both cuts; false if nothing does.
func intersect(a, b imds.Cut) (imds.Cut, bool) {
	drop, keep := a.Drop, a.Keep
	for _, d := range b.Drop {
		drop = addPath(drop, d)
	}
	switch {
	case len(a.Keep) == 0:
		keep = b.Keep
	case len(b.Keep) > 0:
		keep = nil
		for _, x := range a.Keep {
			for _, y := range b.Keep {
				switch {
				case imds.Within(x, y):
					keep = addPath(keep, x)
				case imds.Within(y, x):
					keep = addPath(keep, y)
				}
			}
		}
		if keep == nil {
			return imds.Cut{}, false
		}
	}
	return left(keep, drop)
}

// missing says that no rule allows the action, and which one would.
func missing(match string, a imds.Action) string {
	if a == imds.Unknown {
		return neverKnown
	}
	return "no rule allows " + string(a) + ": add {match: " + match + ", allow: [" + string(a) + "]} to the policy's rules"
}

// neverKnown is why the action unknown cannot be allowed: nobody can say what
// such an endpoint hands out, today or after an update of the service.
const neverKnown = "unknown is every endpoint that is not on the list of known ones: it cannot be allowed"

// suggestion is a match for this workload, as a policy could have it.
func suggestion(w *workload.Workload) string {
	if p := w.Pod; p != nil && p.Namespace != "" {
		s := "{kubernetes: {namespace: " + quote(p.Namespace)
		if p.ServiceAccount != "" {
			return s + ", service-account: " + quote(p.ServiceAccount) + "}}"
		}
		return "{name: " + quote(w.Name) + ", " + s[1:] + "}}" // the namespace alone is many
	}
	if project, service, sure := w.Compose(); sure {
		return "{compose: {project: " + quote(project) + ", service: " + quote(service) + "}}"
	}
	return "{name: " + quote(w.Name) + "}"
}

// quote writes a text as YAML, in quotes where it could be read otherwise.
func quote(s string) string {
	plain := s != "" && (s[0]|0x20 >= 'a' && s[0]|0x20 <= 'z')
	for i := 0; i < len(s) && plain; i++ {
		b := s[i]
		plain = b|0x20 >= 'a' && b|0x20 <= 'z' || b >= '0' && b <= '9' || b == '-' || b == '_' || b == '.'
	}
	switch strings.ToLower(s) {
	case "true", "false", "yes", "no", "on", "off", "y", "n", "null":
		plain = false
	}
	if plain {
		return s
	}
	return strconv.QuoteToASCII(s)
}

// missingParts lists what a decision takes out of an answer.
func missingParts(d *Decision) string {
	var parts []string
	for _, a := range d.Blank {
		parts = append(parts, string(a))
	}
	parts = append(parts, d.Cut.Drop...)
	if len(d.Cut.Keep) > 0 {
		parts = append(parts, "all but "+strings.Join(d.Cut.Keep, ", "))
	}
	return strings.Join(parts, ", ")
}
