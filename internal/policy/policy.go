// Package policy answers one question: may this caller do this? It is pure and
// total: every query gets a decision, and what no rule allows is denied.
package policy

import (
	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// Decision is the answer to one query.
type Decision struct {
	Allow bool

	// Rule says where the decision comes from: "policy.yaml:3" is a line,
	// "policy.yaml:default" means that no line spoke of the action.
	Rule string

	// Reason is one sentence for operators. It names the action and, when the
	// decision is to deny, what to change in the policy. It names no files, so
	// it may be shown to the caller.
	Reason string

	// Blank lists the covered actions of the query that this caller may not do:
	// their data must be taken out of the answer. It may share memory with the
	// query's Covers, so nobody changes it. Empty when Allow is false.
	Blank []imds.Action
}

// Policy allows or denies actions, for all workloads alike. It does not change
// once made and is safe for concurrent use. The zero value and nil deny
// everything.
type Policy struct {
	rules map[imds.Action]Decision
}

// Default is the policy of a gate that was given none: facts about the VM, its
// events and its load balancer may be read; nothing that is a secret, changes
// anything, or is unknown.
func Default() *Policy {
	b := builder{name: "built-in"}
	for _, a := range []imds.Action{imds.VersionsRead, imds.InstanceRead, imds.EventsRead, imds.NetworkBalancer} {
		b.allow(a, "default")
	}
	return b.policy()
}

// Decide says whether w, identified with proof, may do what q asks for.
// It does not allocate, save when an answer covers three actions or more and
// those to blank are not neighbours in Covers.
func (p *Policy) Decide(_ workload.Workload, _ workload.Proof, q imds.Query) Decision {
	d := p.rule(q.Action)
	if d.Allow {
		d.Blank = p.denied(q.Covers)
	}
	return d
}

// rule is the decision for one action.
func (p *Policy) rule(a imds.Action) Decision {
	if p == nil || p.rules == nil {
		return Decision{Rule: "none", Reason: "no policy is loaded, so everything is denied"}
	}
	if d, ok := p.rules[a]; ok {
		return d
	}
	return Decision{Rule: "none", Reason: "the action of this request has no name, so no policy can allow it"}
}

// denied returns the actions that p does not allow, in their order.
func (p *Policy) denied(actions []imds.Action) []imds.Action {
	first, last, n := 0, 0, 0
	for i, a := range actions {
		if p.rule(a).Allow {
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
	if run := actions[first : last+1 : last+1]; len(run) == n {
		return run
	}
	out := make([]imds.Action, 0, n)
	for _, a := range actions {
		if !p.rule(a).Allow {
			out = append(out, a)
		}
	}
	return out
}

// builder collects rules, so that Decide only has to look them up.
type builder struct {
	name  string
	rules map[imds.Action]Decision
}

func (b *builder) set(a imds.Action, d Decision) {
	if b.rules == nil {
		b.rules = make(map[imds.Action]Decision)
	}
	b.rules[a] = d
}

func (b *builder) allow(a imds.Action, where string) {
	b.set(a, Decision{Allow: true, Rule: b.name + ":" + where, Reason: string(a) + " is in allow"})
}

func (b *builder) deny(a imds.Action, where string) {
	reason := string(a) + " is in deny: move " + string(a) + " from deny to allow"
	if a == imds.Unknown {
		reason = neverKnown
	}
	b.set(a, Decision{Rule: b.name + ":" + where, Reason: reason})
}

// neverKnown is why the action unknown cannot be allowed: nobody can say what
// such an endpoint hands out, today or after an update of the service.
const neverKnown = "unknown is every endpoint that is not on the list of known ones: it cannot be allowed"

// policy fills in the actions that no rule named.
func (b *builder) policy() *Policy {
	for _, a := range imds.Actions() {
		if _, ok := b.rules[a]; ok {
			continue
		}
		reason := string(a) + " is not allowed: add " + string(a) + " to allow"
		if a == imds.Unknown {
			reason = neverKnown
		}
		b.set(a, Decision{Rule: b.name + ":default", Reason: reason})
	}
	return &Policy{rules: b.rules}
}
