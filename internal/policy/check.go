package policy

import (
	"fmt"
	"slices"
	"strings"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// Finding is something about a policy that works and may not be meant.
type Finding struct {
	Kind string `json:"kind"` // the Finding… constants
	Rule string `json:"rule"` // see Decision.Rule
	Text string `json:"text"`
}

// The kinds of findings.
const (
	// FindingUnreachable: other rules leave the rule nothing to decide.
	FindingUnreachable = "unreachable"
	// FindingUnmatched: the rule is for none of the workloads there are.
	FindingUnmatched = "unmatched"
	// FindingSecret: the rule gives a secret to everybody.
	FindingSecret = "secret_to_everybody"
	// FindingAnyIdentity: the rule lets callers choose an identity.
	FindingAnyIdentity = "any_identity"
	// FindingAnyResource: the rule's resource does not bound all that it gives.
	FindingAnyResource = "any_resource"
	// FindingShared: the rule allows something to some members of a namespace.
	FindingShared = "shared_in_part"
	// FindingMode: the policy, or the rule, decides nothing.
	FindingMode = "not_enforced"
)

// Check looks for what may not be meant, in the order of the rules. With
// workloads, which may be nil for "not known", it also looks for rules that are
// for none of them.
func (p *Policy) Check(workloads []*workload.Workload) []Finding {
	var found []Finding
	add := func(kind string, r *rule, format string, args ...any) {
		label := p.Name()
		if r != nil {
			label = r.label
		}
		found = append(found, Finding{kind, label, fmt.Sprintf(format, args...)})
	}
	if why := p.Lets(); why != "" {
		add(FindingMode, nil, "%s", why)
	}
	if p == nil {
		return found
	}
	for i, r := range p.rules {
		if r.own && r.mode != Enforce {
			add(FindingMode, r, "the rule's mode is %s: it decides nothing", r.mode)
		}
		if r.mode == Off {
			continue
		}
		if by, why := p.shadow(i); by != nil {
			add(FindingUnreachable, r, "it never counts: %s", why)
		}
		if secrets := r.secrets(); !r.deny && r.match.everybody() && len(secrets) > 0 {
			add(FindingSecret, r, "every container gets %s: give the rule a match", strings.Join(secrets, ", "))
		}
		if !r.deny && !r.identity.set && !r.match.everybody() && r.actions&setOf(imds.IdentityToken, imds.IdentityCredential) != 0 {
			add(FindingAnyIdentity, r, "the container may choose any identity of the VM: give the rule an identity")
		}
		if !r.deny && len(r.resources) > 0 && r.actions&setOf(imds.IdentityCredential) != 0 {
			add(FindingAnyResource, r, "resource does not bound identity.credential, with which a token for any resource can be had: give that action a rule of its own")
		}
		if w := r.someOf(workloads); w != nil {
			add(FindingShared, r, "it is for some of %s, which share a network namespace, and only what all of them may is allowed", strings.Join(w.MemberNames(), ", "))
		}
		if workloads != nil && !r.match.everybody() && !slices.ContainsFunc(workloads, r.matchesAny) {
			add(FindingUnmatched, r, "it is for none of the %d workloads there are", len(workloads))
		}
	}
	return found
}

func (r *rule) secrets() (names []string) {
	for _, a := range r.actions.list() {
		if a.Secret() {
			names = append(names, string(a))
		}
	}
	return names
}

// matchesAny is for workloads of unknown proof: the best is assumed.
func (r *rule) matchesAny(w *workload.Workload) bool {
	if len(w.Members) == 0 {
		return r.mismatch(&caller{w, workload.Listener, false}) == ""
	}
	for i := range w.Members {
		if r.mismatch(&caller{&w.Members[i], workload.Listener, true}) == "" {
			return true
		}
	}
	return false
}

// someOf finds a namespace of which an allow matches some members, and not all.
func (r *rule) someOf(workloads []*workload.Workload) *workload.Workload {
	for _, w := range workloads {
		n := 0
		for i := range w.Members {
			if r.mismatch(&caller{&w.Members[i], workload.Listener, true}) == "" {
				n++
			}
		}
		if !r.deny && n > 0 && n < len(w.Members) {
			return w
		}
	}
	return nil
}

// shadow is a rule that leaves rule i nothing to decide, and why.
func (p *Policy) shadow(i int) (*rule, string) {
	r := p.rules[i]
	for j, o := range p.rules {
		if i == j || o.mode != r.mode || o.onTrial() != r.onTrial() || o.actions&r.actions != r.actions || !o.match.covers(&r.match) {
			continue
		}
		switch {
		case o.deny && !r.deny && len(o.subtrees) == 0:
			return o, o.called + " denies all of it"
		case o.deny == r.deny && j < i && o.wider(r):
			return o, o.called + ", before it, is for all of it"
		}
	}
	return nil, ""
}

// wider reports whether all queries that n fits, r fits too.
func (r *rule) wider(n *rule) bool {
	subset := func(few, many []string) bool {
		return len(many) == 0 || len(few) > 0 && !slices.ContainsFunc(few, func(s string) bool { return !slices.Contains(many, s) })
	}
	return subset(n.resources, r.resources) &&
		(len(r.versions) == 0 || coveredGlobs(r.versions, n.versions)) &&
		subset(n.paths(), r.paths()) &&
		(!r.identity.set || n.identity.set && r.identity.String() == n.identity.String())
}

func (r *rule) paths() (all []string) {
	for _, s := range r.subtrees {
		all = append(all, s.paths...)
	}
	return all
}

// covers reports whether m surely matches every workload that n matches. A deny
// sees all that an allow does, and more.
func (m *match) covers(n *match) bool {
	globs := func(wide, narrow []glob) bool { return len(wide) == 0 || coveredGlobs(wide, narrow) }
	labels := func(wide, narrow []labelMatch) bool {
		for _, l := range wide {
			i := slices.IndexFunc(narrow, func(x labelMatch) bool { return x.key == l.key })
			if i < 0 || !coveredGlobs(l.values, narrow[i].values) {
				return false
			}
		}
		return true
	}
	digests := len(m.digests) == 0 || len(n.digests) > 0 && !slices.ContainsFunc(n.digests, func(d string) bool { return !slices.Contains(m.digests, d) })
	return digests && globs(m.names, n.names) && globs(m.images, n.images) && labels(m.labels, n.labels) &&
		globs(m.project, n.project) && globs(m.service, n.service) &&
		globs(m.namespace, n.namespace) && globs(m.account, n.account) && labels(m.podLabels, n.podLabels) &&
		(m.shared == nil || n.shared != nil && *m.shared == *n.shared) && m.proof <= n.proof
}

// coveredGlobs reports whether each of the narrow patterns is one of the wide
// ones, or a text that one of them matches.
func coveredGlobs(wide, narrow []glob) bool {
	for _, n := range narrow {
		ok := slices.ContainsFunc(wide, func(w glob) bool {
			return w.text == n.text || n.literal && w.match(n.text) || w.any()
		})
		if !ok {
			return false
		}
	}
	return len(narrow) > 0
}
