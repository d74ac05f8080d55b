package gate

import (
	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

// view is the policy as one workload meets it, kept from one request to the next
// for as long as neither changes.
type view struct {
	*policy.View
	snapshot *policy.Snapshot
	workload *workload.Workload
}

// view returns what applies to who at this moment: one snapshot, for the whole
// request. Many requests may make the same view at the same time; it does not
// matter whose is kept.
func (x *exchange) view(who *workload.Workload) *policy.View {
	s := x.g.Policy.Snapshot()
	v := x.c.viewed.Load()
	shared := x.c.tap != nil && x.c.evidence.Proof == workload.Listener
	if shared {
		v = x.c.tap.share.viewed.Load()
	}
	// A workload that is known by its address alone is described anew each time,
	// and its connection always has the same one.
	if v != nil && v.snapshot == s && (v.workload == who || !shared) {
		return v.View
	}
	v = &view{s.View(who, x.c.evidence.Proof), s, who}
	if shared {
		x.c.tap.share.viewed.Store(v)
	} else {
		x.c.viewed.Store(v)
	}
	return v.View
}

// decide asks the policy and notes what it said. It refuses what is denied, and
// sets x.ask to what may be asked of the service instead of the client's query.
func (x *exchange) decide(who *workload.Workload) (policy.Decision, bool) {
	d := x.view(who).Decide(x.q)
	e := &x.event
	e.Snapshot, e.Rule, e.Reason, e.Would, e.Member = d.Snapshot, d.Rule, d.Reason, d.Would, d.Member
	if d.Mode != policy.Enforce {
		e.Mode = string(d.Mode)
	}
	if !d.Allow {
		x.refuse(audit.Deny, imds.Forbidden(x.q, "imdsgate policy: container "+label(who, d)+": "+d.Reason))
		e.Reason = d.Reason
		return d, false
	}
	e.Blanked, e.Cut, e.Kept = d.Blank, d.Cut.Drop, d.Cut.Keep
	x.ask = x.q
	if imds.TakesSelector(x.q.Action) {
		e.Identity = policy.Effective(x.q, d)
		if d.Identity.Name != "" {
			x.ask = x.q.WithSelector(d.Identity)
		}
	}
	return d, true
}

// label is how the caller knows itself.
func label(who *workload.Workload, d policy.Decision) string {
	if d.Member != "" {
		return d.Member + " (of " + who.Name + ")"
	}
	return who.Name
}

// describe notes who is asking.
func describe(e *audit.Event, w *workload.Workload) {
	e.Workload, e.Name, e.Members = w.ID, w.Name, w.MemberNames()
	if project, service, sure := w.Compose(); sure {
		e.Compose = project + "/" + service
	}
	if w.Pod != nil {
		e.Pod = w.Pod.Namespace + "/" + w.Pod.ServiceAccount
	}
}
