package policy

import (
	"strings"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// Explanation is a decision with all that led to it. The JSON names are an
// interface: they are added to, never renamed.
type Explanation struct {
	Workload string `json:"workload"` // its name
	Proof    string `json:"proof"`

	// The request in canonical form.
	Method string      `json:"method"`
	Target string      `json:"target"`
	Action imds.Action `json:"action"`

	Decision string `json:"decision"` // allow or deny
	Rule     string `json:"rule"`
	Reason   string `json:"reason"`
	Mode     Mode   `json:"mode"`
	Would    string `json:"would,omitempty"`
	Snapshot uint64 `json:"snapshot,omitempty"`
	Member   string `json:"member,omitempty"`

	// Identity is whose identity the request is for: "client_id=…", "default" for
	// the one that the service gives if none is named; empty where none is needed.
	Identity string `json:"identity,omitempty"`

	Without []imds.Action `json:"without,omitempty"` // actions whose data is taken out of the answer
	Drop    []string      `json:"drop,omitempty"`    // subtrees that are
	Keep    []string      `json:"keep,omitempty"`    // subtrees that alone are left

	Rules []Considered `json:"rules"` // that speak of the action, in the order of the file
}

// Considered is what one rule has to say.
type Considered struct {
	Rule   string `json:"rule"`
	Member string `json:"member,omitempty"` // of a shared network namespace
	Effect string `json:"effect"`           // allow or deny
	Mode   Mode   `json:"mode"`
	Says   string `json:"says"` // "applies", or why it does not
}

// Explain decides, and says why. It is Decide at leisure: the decision is made by
// the same code.
func (s *Snapshot) Explain(w *workload.Workload, proof workload.Proof, q imds.Query) Explanation {
	d := s.View(w, proof).Decide(q)
	e := Explanation{
		Workload: w.Name, Proof: proof.String(), Method: q.Method, Target: q.Redacted(), Action: q.Action,
		Decision: effect(!d.Allow), Rule: d.Rule, Reason: d.Reason, Mode: d.Mode, Would: d.Would, Snapshot: d.Snapshot, Member: d.Member,
		Without: d.Blank, Drop: d.Cut.Drop, Keep: d.Cut.Keep, Rules: []Considered{},
	}
	if d.Allow && imds.TakesSelector(q.Action) {
		e.Identity = Effective(q, d)
	}
	if s == nil || s.Policy == nil {
		return e
	}
	members := []caller{{w, proof, false}}
	if len(w.Members) > 0 {
		members = nil
		for i := range w.Members {
			members = append(members, caller{&w.Members[i], proof, true})
		}
	}
	for _, r := range s.rules {
		if i, ok := indexes[q.Action]; !ok || !r.actions.has(i) {
			continue
		}
		for i := range members {
			c := Considered{Rule: r.label, Effect: effect(r.deny), Mode: r.mode, Says: r.says(&members[i], &q)}
			if len(members) > 1 {
				c.Member = members[i].w.Name
			}
			e.Rules = append(e.Rules, c)
		}
	}
	return e
}

// ExplainTarget is Explain for a request of which the method and the target are
// known. What is no proper request, whoever sends it, is decided as "refuse".
func (s *Snapshot) ExplainTarget(w *workload.Workload, proof workload.Proof, c imds.Cloud, method, target string) Explanation {
	q, bad := imds.Canonical(c, method, target)
	if bad == nil {
		return s.Explain(w, proof, q)
	}
	return Explanation{Workload: w.Name, Proof: proof.String(), Method: method, Target: q.Redacted(), Action: q.Action,
		Decision: "refuse", Reason: bad.Error(), Mode: Enforce, Rules: []Considered{}}
}

func effect(deny bool) string {
	if deny {
		return "deny"
	}
	return "allow"
}

// says is "applies", or why a rule does not.
func (r *rule) says(c *caller, q *imds.Query) string {
	if r.mode == Off {
		return "its mode is off"
	}
	if key := r.mismatch(c); key != "" {
		return "does not match: " + key + r.because(key, c.w)
	}
	a := ask(q)
	f := r.fits(q.Action, &a)
	switch f {
	case fitsAll:
		return "applies"
	case fitsPart:
		return "applies to a part of the answer"
	case missSubtree:
		if r.deny {
			return "is for another part of the document"
		}
	}
	return "is" + r.misses[f]
}

// because says more about a mismatch that people will not see coming.
func (r *rule) because(key string, w *workload.Workload) string {
	if r.deny {
		return ""
	}
	switch key {
	case "labels":
		for _, l := range r.match.labels {
			if _, ok := w.ImageLabels[l.key]; ok {
				return " (" + l.key + " comes with the image, and an image grants nothing)"
			}
		}
	case "compose":
		if project, _, sure := w.Compose(); project != "" && !sure {
			return " (it comes with the image, and an image grants nothing)"
		}
	}
	return ""
}

// Effective is whose identity an allowed query is for, once the decision's is
// added: "client_id=…", or "default" if none is named.
func Effective(q imds.Query, d Decision) string {
	s, named := q.Selector()
	if !named {
		s = d.Identity
	}
	if s.Name == "" {
		return "default"
	}
	return s.Name + "=" + strings.ToValidUTF8(s.Value, "\uFFFD")
}
