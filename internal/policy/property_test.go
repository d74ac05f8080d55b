package policy_test

import (
	"fmt"
	"reflect"
	"slices"
	"sync"
	"testing"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

const rounds = 3000 // of each property

// question is a policy with somebody who asks it something.
type question struct {
	seed  uint64
	s     spec
	w     workload.Workload
	proof workload.Proof
	q     imds.Query
}

func (x question) String() string {
	return fmt.Sprintf("seed %d: %s\nworkload %+v, proof %s\n%s %s", x.seed, x.s.text(), x.w, x.proof, x.q.Method, x.q.Target())
}

func (x question) decide(t *testing.T, s spec) policy.Decision {
	t.Helper()
	return force(t, s.text()).View(&x.w, x.proof).Decide(x.q)
}

// questions calls f with many questions. A property of what is never allowed would
// be held by nothing, so f reports what was.
func questions(t *testing.T, f func(x question) (allowed bool)) {
	t.Helper()
	allowed := 0
	for seed := range uint64(rounds) {
		g := newGen(seed)
		x := question{seed: seed, s: g.policy(), w: g.group(), proof: g.proof(), q: ask(t, g.request())}
		if f(x) {
			allowed++
		}
		if t.Failed() {
			t.Fatal(x)
		}
	}
	t.Logf("%d questions, %d allowed", rounds, allowed)
	if allowed < rounds/20 || allowed > rounds*19/20 {
		t.Error("the generator is broken")
	}
}

func members(x question) (out []slowly) {
	if len(x.w.Members) == 0 {
		return []slowly{{x.s, x.w, x.proof, false}}
	}
	for _, m := range x.w.Members {
		out = append(out, slowly{x.s, m, x.proof, true})
	}
	return out
}

// TestDecideIsWhatTheLanguageSays compares with the slow reading, for policies that
// are enforced.
func TestDecideIsWhatTheLanguageSays(t *testing.T) {
	questions(t, func(x question) bool {
		if x.s.Mode == "audit" || x.s.Mode == "off" {
			x.s.Mode = ""
		}
		d := x.decide(t, x.s)
		if why := odd(x.q, d); why != "" {
			t.Errorf("%s: %+v", why, d)
		}
		if x.q.Action == imds.InstanceRead {
			documentAsSlowly(t, x, d)
		} else {
			grantAsSlowly(t, x, d)
		}
		for _, a := range x.q.Covers {
			all := d.Allow
			for _, m := range members(x) {
				all = all && m.covers(a, x.q)
			}
			if d.Allow && contains(d.Blank, a) == all {
				t.Errorf("blank %v: %s may be had: %v", d.Blank, a, all)
			}
		}
		return d.Allow
	})
}

func documentAsSlowly(t *testing.T, x question, d policy.Decision) {
	t.Helper()
	for _, leaf := range leaves {
		if !under(leaf, x.q.Subtree) {
			continue
		}
		want := true
		for _, m := range members(x) {
			want = want && m.sees(leaf, x.q)
		}
		if got := d.Allow && stays(d.Cut, leaf); got != want {
			t.Errorf("%s is seen: %v, want %v: %+v", leaf, got, want, d)
		}
	}
}

func grantAsSlowly(t *testing.T, x question, d policy.Decision) {
	t.Helper()
	every := func(q imds.Query) bool {
		for _, m := range members(x) {
			if ok, _, _ := m.grant(q); !ok {
				return false
			}
		}
		return true
	}
	want, rule, wantID := every(x.q), "", []string{}
	for _, m := range members(x) {
		if _, r, adds := m.grant(x.q); adds != "" {
			wantID = append(wantID, adds)
		} else {
			rule = r
		}
	}
	if want && len(wantID) > 0 { // all must be content with one of these
		wantID = slices.DeleteFunc(wantID, func(id string) bool { return !every(x.q.WithSelector(selectorOf(id))) })
		want = len(wantID) > 0
	}
	if d.Allow != want {
		t.Errorf("got %+v, want allow %v by %s", d, want, rule)
	}
	if !d.Allow {
		return
	}
	got := selected(imds.Query{Params: []imds.Param{d.Identity}})
	if len(wantID) == 0 && got != "" || len(wantID) > 0 && got != wantID[0] {
		t.Errorf("got identity %q, want %v", got, wantID)
	}
	if _, r, _ := members(x)[0].grant(x.q); len(x.w.Members) == 0 && r != "" && d.Rule != fmt.Sprintf("p.yaml:1 %q", r) {
		t.Errorf("got rule %s, want %q", d.Rule, r)
	}
}

func selectorOf(id string) imds.Param {
	for _, name := range []string{"client_id", "object_id", "msi_res_id"} {
		if len(id) > len(name) && id[:len(name)+1] == name+"=" {
			return imds.Param{Name: name, Value: id[len(name)+1:]}
		}
	}
	return imds.Param{}
}

// seen is all that a decision lets through.
func seen(d policy.Decision, q imds.Query) (out []string) {
	if !d.Allow {
		return nil
	}
	out = append(out, string(q.Action))
	for _, leaf := range leaves {
		if q.Action == imds.InstanceRead && under(leaf, q.Subtree) && stays(d.Cut, leaf) {
			out = append(out, leaf)
		}
	}
	for _, a := range q.Covers {
		if !contains(d.Blank, a) {
			out = append(out, string(a))
		}
	}
	return out
}

func without(few, many []string) (out []string) {
	return slices.DeleteFunc(slices.Clone(few), func(s string) bool { return contains(many, s) })
}

func TestOrderOfDeniesChangesNothing(t *testing.T) {
	questions(t, func(x question) bool {
		d, g := x.decide(t, x.s), newGen(x.seed+1)
		other := x.s.clone()
		var at []int
		for i := range other.Rules {
			if other.Rules[i].deny() {
				at = append(at, i)
			}
		}
		g.Shuffle(len(at), func(i, j int) {
			other.Rules[at[i]], other.Rules[at[j]] = other.Rules[at[j]], other.Rules[at[i]]
		})
		e := x.decide(t, other)
		if a, b := seen(d, x.q), seen(e, x.q); !slices.Equal(a, b) || d.Identity != e.Identity || d.Mode != e.Mode {
			t.Errorf("got %+v\nthen %+v of\n%s", d, e, other.text())
		}
		return d.Allow
	})
}

// The order of allows chooses an identity, and nothing else.
func TestOrderOfAllowsChangesOnlyTheIdentity(t *testing.T) {
	questions(t, func(x question) bool {
		if len(x.w.Members) > 0 && imds.TakesSelector(x.q.Action) {
			x.w.Members = nil // members have to agree on the identity that is chosen
		}
		d, g := x.decide(t, x.s), newGen(x.seed+1)
		other := x.s.clone()
		g.Shuffle(len(other.Rules), func(i, j int) { other.Rules[i], other.Rules[j] = other.Rules[j], other.Rules[i] })
		e := x.decide(t, other)
		if a, b := seen(d, x.q), seen(e, x.q); !slices.Equal(a, b) {
			t.Errorf("got %+v\nthen %+v of\n%s", d, e, other.text())
		}
		return d.Allow
	})
}

func TestAnotherDenyNeverAllowsMore(t *testing.T) {
	questions(t, func(x question) bool {
		d, g := x.decide(t, x.s), newGen(x.seed+1)
		more := x.s.clone()
		r := g.rule("more")
		for !r.deny() {
			r = g.rule("more")
		}
		at := g.IntN(len(more.Rules) + 1)
		more.Rules = slices.Insert(more.Rules, at, r)
		if gained := without(seen(x.decide(t, more), x.q), seen(d, x.q)); len(gained) > 0 {
			t.Errorf("with another deny there is also %v:\n%s", gained, more.text())
		}
		return d.Allow
	})
}

func TestAnotherAllowNeverAllowsLess(t *testing.T) {
	questions(t, func(x question) bool {
		d, g := x.decide(t, x.s), newGen(x.seed+1)
		more := x.s.clone()
		r := g.rule("more")
		for r.deny() {
			r = g.rule("more")
		}
		if x.q.Action == imds.IdentityToken || x.q.Action == imds.IdentityCredential {
			x.q = x.q.WithSelector(imds.Param{Name: "client_id", Value: idA}) // the same choice of identity
			d = x.decide(t, x.s)
		}
		more.Rules = slices.Insert(more.Rules, g.IntN(len(more.Rules)+1), r)
		if lost := without(seen(d, x.q), seen(x.decide(t, more), x.q)); len(lost) > 0 {
			t.Errorf("with another allow there is no %v:\n%s", lost, more.text())
		}
		return d.Allow
	})
}

// In mode audit all passes but what rules with a mode of their own deny, wherever in
// the file they stand.
func TestAuditPassesAllButWhatIsFirm(t *testing.T) {
	questions(t, func(x question) bool {
		x.s.Mode = "audit"
		d := x.decide(t, x.s)
		held, firm := map[imds.Action]bool{}, false
		for _, m := range members(x) {
			for _, r := range m.rules(x.q.Action, true, true) {
				firm = firm || x.q.Action != imds.InstanceRead || len(r.Subtree) == 0 || slices.ContainsFunc(r.Subtree, func(s string) bool {
					return under(x.q.Subtree, s) || synonyms[s] != "" && under(x.q.Subtree, synonyms[s])
				})
			}
			for _, a := range x.q.Covers {
				held[a] = held[a] || len(m.rules(a, true, true)) > 0
			}
		}
		if x.q.Action == imds.Unknown { // it could be what is denied firmly, by another spelling
			for _, m := range members(x) {
				for _, a := range imds.Actions() {
					firm = firm || len(m.rules(a, true, true)) > 0
				}
			}
		}
		if d.Allow == firm {
			t.Fatalf("denied firmly: %v, got %+v in %s", firm, d, x)
		}
		for _, a := range x.q.Covers {
			if d.Allow && contains(d.Blank, a) != held[a] {
				t.Errorf("blank %v, denied firmly: %v", d.Blank, held)
			}
		}
		for _, leaf := range leaves {
			gone := false
			for _, m := range members(x) {
				for _, r := range m.rules(imds.InstanceRead, true, true) {
					gone = gone || r.about(leaf)
				}
			}
			if x.q.Action == imds.InstanceRead && d.Allow && under(leaf, x.q.Subtree) && stays(d.Cut, leaf) == gone {
				t.Errorf("%s stays: %v, denied firmly: %v", leaf, !gone, gone)
			}
		}
		return d.Allow && x.seed%2 == 0 // nearly all are
	})
}

func TestModeOffPassesAll(t *testing.T) {
	for seed := range uint64(500) {
		g := newGen(seed)
		s := g.policy()
		s.Mode = "off"
		w := g.group()
		d := force(t, s.text()).View(&w, g.proof()).Decide(ask(t, g.request()))
		want := policy.Decision{Allow: true, Snapshot: 1, Rule: "p.yaml:off", Reason: "the policy is off: everything is let through", Mode: policy.Off}
		if !reflect.DeepEqual(d, want) {
			t.Fatalf("got %+v, want %+v", d, want)
		}
	}
}

// TestGroupMayDoWhatEachMayDo is about shared network namespaces.
func TestGroupMayDoWhatEachMayDo(t *testing.T) {
	questions(t, func(x question) bool {
		if x.s.Mode == "audit" || x.s.Mode == "off" {
			x.s.Mode = ""
		}
		s := force(t, x.s.text())
		d := s.View(&x.w, x.proof).Decide(x.q)
		withinMembers(t, s, &x.w, x.proof, x.q, d)
		return d.Allow
	})
}

// A view may be asked by many at once, and is the same afterwards.
func TestViewDoesNotChange(t *testing.T) {
	for seed := range uint64(40) {
		g := newGen(seed)
		s, w := force(t, g.policy().text()), g.group()
		v := s.View(&w, workload.Listener)
		var queries []imds.Query
		var want []policy.Decision
		for range 40 {
			q := ask(t, g.request())
			queries, want = append(queries, q), append(want, s.View(&w, workload.Listener).Decide(q))
		}
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for i, q := range queries {
					d := v.Decide(q)
					if !reflect.DeepEqual(d, want[i]) {
						t.Errorf("seed %d, %s: got %+v, want %+v", seed, q.Target(), d, want[i])
					}
					_, _ = append(d.Blank, "mine"), append(d.Cut.Drop, "mine") // they are the caller's to append to
				}
			})
		}
		wg.Wait()
	}
}
