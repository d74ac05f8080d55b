package policy_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// TestGroup is about a and b, who share a network namespace.
func TestGroup(t *testing.T) {
	const (
		forA, forB, forAll = "{match: {name: a}, ", "{match: {name: b}, ", "{match: {name: [a, b]}, "
		onlyA, onlyB       = "identity: {client_id: " + idA + "}}", "identity: {client_id: " + idB + "}}"
		tokens             = "allow: [identity.token], "
		facts              = "allow: [instance.read], "
		apart              = "the members of the network namespace may read no part of this in common: "
	)
	id := func(v string) imds.Param { return imds.Param{Name: "client_id", Value: v} }
	type list = []string
	for name, tc := range map[string]struct {
		rules, request string
		allow          bool
		identity       imds.Param
		cut            imds.Cut
		member, reason string // of no concern where empty
	}{
		"one_may_not":              {forA + tokens + "}", token + vault, false, imds.Param{}, imds.Cut{}, "b", "no rule allows identity.token: add {match: {name: b}, allow: [identity.token]} to the policy's rules"},
		"none_may":                 {forA + "allow: [versions.read]}", token + vault, false, imds.Param{}, imds.Cut{}, "", ""},
		"one_is_denied":            {forAll + tokens + "}, {match: {name: a}, deny: [identity.token]}", token + vault, false, imds.Param{}, imds.Cut{}, "a", "identity.token is denied by rule 2: no allow outweighs that, it must change there"},
		"both_by_one_rule":         {forAll + tokens + "}", token + vault, true, imds.Param{}, imds.Cut{}, "", "identity.token is allowed by rule 1"},
		"both_by_rules_of_theirs":  {forA + tokens + "}, " + forB + tokens + "}", token + vault, true, imds.Param{}, imds.Cut{}, "a", ""},
		"same_identity":            {forA + tokens + onlyA + ", " + forB + tokens + onlyA, token + vault, true, id(idA), imds.Cut{}, "", ""},
		"identity_of_one":          {forA + tokens + onlyA + ", " + forB + tokens + "}", token + vault, true, id(idA), imds.Cut{}, "a", ""},
		"identities_conflict":      {forA + tokens + onlyA + ", " + forB + tokens + onlyB, token + vault, false, imds.Param{}, imds.Cut{}, "b", "the rules of a add the identity client_id " + idA + ", which other members of its network namespace may not have: identity.token is allowed by rule 2 for the identity client_id " + idB + " only: another identity is another rule"},
		"identity_and_default":     {forA + tokens + onlyA + ", " + forB + tokens + "identity: default}", token + vault, false, imds.Param{}, imds.Cut{}, "b", ""},
		"both_default":             {forA + tokens + "identity: default}, " + forB + tokens + "identity: default}", token + vault, true, imds.Param{}, imds.Cut{}, "", ""},
		"they_agree_on_the_second": {forA + tokens + onlyA + ", " + forAll + tokens + onlyB, token + vault, true, id(idB), imds.Cut{}, "", ""},
		"conflict_but_one_is_said": {forA + tokens + onlyA + ", " + forAll + tokens + onlyB, token + vault + "&client_id=" + idB, true, imds.Param{}, imds.Cut{}, "", ""},
		"said_and_not_for_both":    {forA + tokens + onlyA + ", " + forAll + tokens + onlyB, token + vault + "&client_id=" + idA, false, imds.Param{}, imds.Cut{}, "b", ""},
		"resources_apart":          {forA + tokens + "resource: x}, " + forB + tokens + "resource: y}", token + "x", false, imds.Param{}, imds.Cut{}, "b", ""},

		"parts_meet":             {forA + facts + "subtree: compute}, " + forB + facts + "subtree: [compute/vmId, network]}", instance, true, imds.Param{}, imds.Cut{Keep: list{"compute/vmId"}}, "", ""},
		"parts_are_apart":        {forA + facts + "subtree: compute}, " + forB + facts + "subtree: network}", instance, false, imds.Param{}, imds.Cut{}, "b", apart + "instance.read is allowed by rule 2"},
		"whole_and_part":         {forA + facts + "}, " + forB + facts + "subtree: network}", instance, true, imds.Param{}, imds.Cut{Keep: list{"network"}}, "b", ""},
		"part_and_whole":         {forA + facts + "subtree: network}, " + forB + facts + "}", instance, true, imds.Param{}, imds.Cut{Keep: list{"network"}}, "a", ""},
		"drops_add_up":           {forAll + facts + "}, {match: {name: a}, deny: [instance.read], subtree: compute/vmId}, {match: {name: b}, deny: [instance.read], subtree: [compute/vmId, network]}", instance, true, imds.Param{}, imds.Cut{Drop: list{"compute/vmId", "network"}}, "", ""},
		"kept_by_one_only":       {forA + facts + "subtree: compute/vmId}, " + forB + facts + "}, {match: {name: b}, deny: [instance.read], subtree: compute}", instance, false, imds.Param{}, imds.Cut{}, "b", ""},
		"kept_beside_the_drop":   {forA + facts + "subtree: [compute/vmId, network]}, " + forB + facts + "}, {match: {name: b}, deny: [instance.read], subtree: compute}", instance, true, imds.Param{}, imds.Cut{Keep: list{"network"}, Drop: list{"compute"}}, "", ""},
		"image_label_takes_away": {forAll + tokens + "}, {match: {labels: {team: evil}}, deny: [identity.token]}", token + vault, false, imds.Param{}, imds.Cut{}, "b", ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := workload.Workload{Name: "pair", Members: []workload.Workload{{Name: "a"}, {Name: "b", ImageLabels: map[string]string{"team": "evil"}}}}
			d := force(t, "rules: ["+tc.rules+"]").View(&w, workload.Listener).Decide(ask(t, tc.request))
			if d.Allow != tc.allow || d.Identity != tc.identity || tc.member != "" && d.Member != tc.member || tc.reason != "" && d.Reason != tc.reason {
				t.Errorf("got %+v\nwant allow %v, identity %v, member %q, reason %q", d, tc.allow, tc.identity, tc.member, tc.reason)
			}
			if diff := cmp.Diff(tc.cut, d.Cut); diff != "" {
				t.Errorf("cut (-want +got)\n%s", diff)
			}
		})
	}
}

// What all members meet alike names none of them.
func TestGroupOfEquals(t *testing.T) {
	w := workload.Workload{Name: "pair", Members: []workload.Workload{{Name: "a"}, {Name: "b"}}}
	v := force(t, "allow: [instance.read]\ndeny: [identity.token]").View(&w, workload.Listener)
	for _, request := range []string{instance, token + vault, "/metadata/nobody/knows"} {
		if d := v.Decide(ask(t, request)); d.Member != "" {
			t.Errorf("%s: got member %s", request, d.Member)
		}
	}
	if d := v.Decide(ask(t, instance)); len(d.Blank) != 1 {
		t.Errorf("got %+v", d)
	}
}

// What is blanked for one is blanked for all.
func TestGroupBlanksForAll(t *testing.T) {
	w := workload.Workload{Name: "pair", Members: []workload.Workload{{Name: "a"}, {Name: "b"}}}
	for rules, want := range map[string]int{"{match: {name: a}, allow: [instance.userdata]}": 1, "{match: {name: [a, b]}, allow: [instance.userdata]}": 0} {
		if d := force(t, "allow: [instance.read]\nrules: ["+rules+"]").View(&w, workload.Listener).Decide(ask(t, instance)); !d.Allow || len(d.Blank) != want {
			t.Errorf("%s: got %+v", rules, d)
		}
	}
}

// A firm deny of any member holds in mode audit, whoever stands first.
func TestGroupIsDeniedFirmly(t *testing.T) {
	for _, name := range []string{"a", "b"} {
		for _, soft := range []string{"{deny: [identity.token]}, ", "{match: {name: a}, deny: [identity.token]}, ", ""} {
			w := workload.Workload{Name: "pair", Members: []workload.Workload{{Name: "a"}, {Name: "b"}}}
			text := "mode: audit\nallow: [identity.token]\nrules: [" + soft + "{mode: enforce, match: {name: " + name + "}, deny: [identity.token]}]"
			if d := force(t, text).View(&w, workload.Listener).Decide(ask(t, token+vault)); d.Allow {
				t.Errorf("%s\ngot %+v", text, d)
			}
		}
	}
}
