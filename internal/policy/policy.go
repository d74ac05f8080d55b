// Package policy answers one question: may this workload do this? It is pure and
// total: every query gets a decision, the same one every time, and what no rule
// allows is denied.
//
// A File is parsed into a Policy, of which a Snapshot is one that is in force. A
// View is a snapshot as one workload meets it, and decides.
package policy

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"imdsgate/internal/imds"
)

// Mode says what a policy, or one rule of it, does.
type Mode string

const (
	// Enforce: decisions hold.
	Enforce Mode = "enforce"
	// Audit: decisions are recorded and change nothing. A policy in this mode
	// lets everything pass but what a rule with a mode of its own denies; a rule
	// in this mode neither allows nor denies.
	Audit Mode = "audit"
	// Off: a policy lets everything pass and its rules are not asked; a rule is
	// as if it were not there.
	Off Mode = "off"
)

// Decision is the answer to one query.
type Decision struct {
	Allow bool

	// Snapshot is the number of the snapshot that decided; 0: there is none.
	Snapshot uint64

	// Rule says where the decision comes from: `policy.yaml:3 "web"` is a rule with
	// its line and name, "policy.yaml:default" means that no rule spoke of it.
	Rule string

	// Reason is one sentence for operators. It names the action and, when the
	// decision is to deny, what to change in the policy. It names no files, so
	// it may be shown to the caller.
	Reason string

	// Mode is Enforce when the decision is the policy's own. Audit and Off: the
	// request passes for the policy's mode alone.
	Mode Mode

	// Would says what would have been with every mode at Enforce, where that
	// differs from what was: "deny", "allow", "cut" when parts of the answer would
	// have gone, "identity" when one would have been added; else it is empty. Rule
	// and Reason tell of that rule when Mode is Audit; else Reason names it too.
	Would string

	// Identity is the selector to add for a caller that names no identity; with no
	// name there is nothing to add. Name it only by imds.Query.WithSelector.
	Identity imds.Param

	// Blank lists the covered actions of the query that this caller may not do:
	// their data must be taken out of the answer. It may share memory with the
	// query's Covers, so nobody changes it. Empty when Allow is false.
	Blank []imds.Action

	// Cut is what must go from the answer besides; zero when Allow is false.
	Cut imds.Cut

	// Member is the name of the member of a shared network namespace whose rules
	// were the narrowest; empty if all members met the same rules.
	Member string

	why      *rule // that decided; nil if none did
	enforced bool  // denied by a rule whose own mode is Enforce
}

// Policy is what one file says. It does not change once made and is safe for
// concurrent use. The zero value and nil deny everything.
type Policy struct {
	name  string // of the file
	mode  Mode
	rules []*rule // in the order of the file; the short form's first
}

// base is a file's name without its folders.
func base(name string) string { return name[strings.LastIndexAny(name, `/\`)+1:] }

// Name is what messages call the policy.
func (p *Policy) Name() string {
	if p == nil {
		return "none"
	}
	return p.name
}

// Mode is the mode of the whole policy.
func (p *Policy) Mode() Mode {
	if p == nil || p.mode == "" {
		return Enforce
	}
	return p.mode
}

// Lets says what the policy's mode lets pass; empty if it is enforced.
func (p *Policy) Lets() string {
	m := p.Mode()
	switch {
	case m == Enforce:
		return ""
	case m == Audit && slices.ContainsFunc(p.rules, (*rule).firm):
		return "the policy's mode is audit: nothing is denied but by rules with the mode enforce of their own"
	}
	return "the policy's mode is " + string(m) + ": it denies nothing"
}

// Len is the number of rules.
func (p *Policy) Len() int {
	if p == nil {
		return 0
	}
	return len(p.rules)
}

// Default is the policy of a gate that was given none: facts about the VM, its
// events and its load balancer may be read; nothing that is a secret, changes
// anything, or is unknown.
func Default() *Policy {
	r := &rule{
		name: "default", place: "built-in", mode: Enforce, top: true,
		actions: setOf(imds.VersionsRead, imds.InstanceRead, imds.EventsRead, imds.NetworkBalancer),
	}
	r.finish(1)
	return &Policy{name: "built-in", mode: Enforce, rules: []*rule{r}}
}

// Snapshot is a policy that is, or was, in force. nil denies everything.
type Snapshot struct {
	Number uint64 // 1 for the first of a process, then rising by one
	*Policy
}

// Current is the policy in force. The zero value has none yet, and denies
// everything. It is safe for concurrent use.
type Current struct {
	mu sync.Mutex // of Set
	at atomic.Pointer[Snapshot]
}

// Set puts another policy in force, for all decisions from now on.
func (c *Current) Set(p *Policy) *Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &Snapshot{Number: 1, Policy: p}
	if before := c.at.Load(); before != nil {
		s.Number = before.Number + 1
	}
	c.at.Store(s)
	return s
}

// Snapshot is what is in force now; nil if nothing is. One request asks once.
func (c *Current) Snapshot() *Snapshot {
	if c == nil {
		return nil
	}
	return c.at.Load()
}
