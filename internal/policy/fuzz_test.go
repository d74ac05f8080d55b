package policy_test

import (
	"reflect"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

var located = regexp.MustCompile(`^p\.yaml:[1-9][0-9]*: .`)

// FuzzParse holds Parse to its contract for any text: an error has its place, and
// no policy that enforces allows what nobody knows.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"{}", "allow: [instance.read]\ndeny: [events.approve]", "allow: &a [unknown]", "? a", "%YAML 1.1\n---\n", "mode: audit", "mode: off\nrules: []",
		"rules:\n- name: a\n  match: {name: [web, w*], labels: {team: ''}, shared: true, proof: cgroup}\n  allow: [identity.token]\n  resource: " + vault +
			"\n  api-version: 2018-02-01\n  identity: {client_id: " + idA + "}\n- deny: [instance.read]\n  subtree: compute/tags\n",
		"rules: [{match: {compose: {project: shop}, kubernetes: {namespace: '*'}, digest: '" + digestA + "'}, allow: [identity.credential], identity: default}]"} {
		f.Add([]byte(s))
	}
	for seed := range uint64(8) {
		f.Add([]byte(newGen(seed).policy().text()))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := policy.Parse("p.yaml", text)
		if err != nil {
			if p != nil || !located.MatchString(err.Error()) {
				t.Fatalf("got %v, %q, want no policy and an error with its place", p, err)
			}
			return
		}
		s := new(policy.Current).Set(p)
		for _, q := range []imds.Query{{Action: imds.Unknown}, {}, {Action: "gpu.read"}} {
			if d := s.View(&web, workload.Listener).Decide(q); p.Mode() == policy.Enforce && d.Allow {
				t.Fatalf("%+v is allowed: %+v", q, d)
			}
		}
		p.Check([]*workload.Workload{&web})
		if p.Len() < 0 || p.Name() != "p.yaml" {
			t.Fatalf("got %d rules of %s", p.Len(), p.Name())
		}
	})
}

// slowGlob is a pattern's meaning, letter by letter.
func slowGlob(pattern, s []rune) bool {
	if len(pattern) == 0 {
		return len(s) == 0
	}
	switch pattern[0] {
	case '*':
		return slowGlob(pattern[1:], s) || len(s) > 0 && slowGlob(pattern, s[1:])
	case '?':
		return len(s) > 0 && slowGlob(pattern[1:], s[1:])
	}
	return len(s) > 0 && s[0] == pattern[0] && slowGlob(pattern[1:], s[1:])
}

// FuzzMatch compares patterns, for names and for labels of both kinds, with a slow
// reading of the same.
func FuzzMatch(f *testing.F) {
	for _, s := range [][2]string{{"web-*", "web-1"}, {"*", ""}, {"?", "é"}, {"*??xyyy", "€xyyy"}, {"a*b*c", "abcbc"}, {"**a", "ba"}, {"[a]", "a"}, {`\*`, "*"}, {"*?", "\U0001F600"}, {"WEB", "web"}, {"a*a*a*b", "aaaaaaaaaaaaaaaaab"}} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if !utf8.ValidString(pattern) || !utf8.ValidString(s) || len(s) > 64 || len(pattern) > 32 || pattern == "" || strings.Count(pattern, "*") > 4 {
			return
		}
		rules := spec{Rules: []ruleSpec{
			{Match: &matchSpec{Name: []string{pattern}}, Allow: []string{"versions.read"}},
			{Match: &matchSpec{Labels: map[string][]string{"k": {pattern}}}, Allow: []string{"identity.info"}},
			{Match: &matchSpec{Labels: map[string][]string{"k": {pattern}}}, Deny: []string{"events.read"}},
		}, Allow: []string{"events.read"}}
		p, err := policy.Parse("p.yaml", []byte(rules.text()))
		if err != nil {
			return // what YAML has no letter for
		}
		snapshot := new(policy.Current).Set(p)
		want := slowGlob([]rune(pattern), []rune(s))
		for name, tc := range map[string]struct {
			w      workload.Workload
			action imds.Action
			want   bool
		}{
			"name":                  {workload.Workload{Name: s}, imds.VersionsRead, want},
			"label":                 {workload.Workload{Labels: map[string]string{"k": s}}, imds.IdentityInfo, want},
			"image_label_allow":     {workload.Workload{ImageLabels: map[string]string{"k": s}}, imds.IdentityInfo, false},
			"image_label_deny":      {workload.Workload{ImageLabels: map[string]string{"k": s}}, imds.EventsRead, !want},
			"label_of_another_name": {workload.Workload{Labels: map[string]string{"K": s}}, imds.IdentityInfo, false},
		} {
			if got := snapshot.View(&tc.w, workload.Listener).Decide(imds.Query{Action: tc.action}).Allow; got != tc.want {
				t.Fatalf("%s: pattern %q, text %q: got %v, want %v", name, pattern, s, got, tc.want)
			}
		}
	})
}

// FuzzDecide asks any policy about any request: there is always the same answer,
// with rule and reason, and no answer gives what its parts do not add up to.
func FuzzDecide(f *testing.F) {
	for seed := range uint64(24) {
		g := newGen(seed)
		text := g.policy().text()
		method, target, _ := strings.Cut(g.request(), " ")
		f.Add(text, method, target, seed)
	}
	f.Fuzz(func(t *testing.T, text, method, target string, seed uint64) {
		p, err := policy.Parse("p.yaml", []byte(text))
		if err != nil {
			return
		}
		q, refused := imds.Canonical(imds.Azure, method, target)
		if refused != nil {
			return
		}
		s := new(policy.Current).Set(p)
		g := newGen(seed)
		w, proof := g.group(), g.proof()
		v := s.View(&w, proof)
		d := v.Decide(q)
		if why := odd(q, d); why != "" {
			t.Fatalf("%s: %+v", why, d)
		}
		if again := s.View(&w, proof).Decide(q); !reflect.DeepEqual(d, again) {
			t.Fatalf("got %+v, then %+v", d, again)
		}
		if e := s.Explain(&w, proof, q); (e.Decision == "allow") != d.Allow || e.Rule != d.Rule || e.Reason != d.Reason {
			t.Fatalf("decided %+v, explained %+v", d, e)
		}
		if p.Mode() == policy.Enforce {
			withinMembers(t, s, &w, proof, q, d)
		}
	})
}

// odd says what about a decision cannot be.
func odd(q imds.Query, d policy.Decision) string {
	switch {
	case d.Rule == "" || d.Reason == "":
		return "no rule or no reason"
	case d.Snapshot != 1:
		return "another snapshot"
	case strings.Contains(d.Reason, "p.yaml"):
		return "the reason names a file"
	case !d.Allow && (d.Identity.Name != "" || len(d.Blank)+len(d.Cut.Keep)+len(d.Cut.Drop) > 0 || d.Mode != policy.Enforce):
		return "a denial that gives"
	case d.Allow && q.Action == imds.Unknown && d.Mode == policy.Enforce:
		return "unknown is allowed"
	case d.Identity.Name != "" && !imds.TakesSelector(q.Action):
		return "an identity where none is asked for"
	case len(d.Cut.Keep)+len(d.Cut.Drop) > 0 && q.Action != imds.InstanceRead:
		return "a cut of what is no document"
	}
	if _, named := q.Selector(); named && d.Identity.Name != "" {
		return "an identity beside the one that is named"
	}
	return ""
}

// withinMembers holds what a group may do against what each member may do alone.
func withinMembers(t *testing.T, s *policy.Snapshot, w *workload.Workload, proof workload.Proof, q imds.Query, d policy.Decision) {
	t.Helper()
	if !d.Allow || len(w.Members) == 0 {
		return
	}
	asked := q.WithSelector(d.Identity)
	for i := range w.Members {
		alone := workload.Workload{Name: w.Name, Members: w.Members[i : i+1]}
		e := s.View(&alone, proof).Decide(asked)
		if !e.Allow {
			t.Fatalf("%s may not: %+v; together they may: %+v", w.Members[i].Name, e, d)
		}
		for _, a := range e.Blank {
			if !contains(d.Blank, a) {
				t.Fatalf("%s may not see %s, together they may: %+v", w.Members[i].Name, a, d)
			}
		}
		for _, leaf := range leaves {
			if stays(d.Cut, leaf) && !stays(e.Cut, leaf) && imds.Within(leaf, q.Subtree) {
				t.Fatalf("%s may not see %s: %+v; together they may: %+v", w.Members[i].Name, leaf, e.Cut, d.Cut)
			}
		}
	}
}
