package policy_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

// TestCheck has each kind of finding, and beside it what looks like one and is none.
func TestCheck(t *testing.T) {
	pair := []*workload.Workload{{Name: "web+car", Members: []workload.Workload{{Name: "car"}, {Name: "web"}}}}
	const anywhere, chosen = "secret_to_everybody", "any_identity"
	known := []*workload.Workload{{Name: "web", Labels: map[string]string{"team": "shop"}, ImageLabels: map[string]string{"tier": "front"}},
		{Name: "pair", Members: []workload.Workload{{Name: "a"}, {Name: "b"}}}}
	by := func(match, rest string) string { return "{match: {" + match + "}, " + rest + "}" }
	idOf := "identity: {client_id: " + idA + "}"
	for name, tc := range map[string]struct {
		head, rules string
		known       []*workload.Workload
		want        []string // kinds
	}{
		"nothing":                     {"", "", nil, nil},
		"mode_audit":                  {"mode: audit\n", "", nil, []string{policy.FindingMode}},
		"mode_off":                    {"mode: off\n", "", nil, []string{policy.FindingMode}},
		"mode_of_a_rule":              {"", "{mode: audit, deny: [unknown]}, {mode: 'off', deny: [unknown]}", nil, []string{policy.FindingMode, policy.FindingMode}},
		"mode_enforce":                {"mode: enforce\n", "{mode: enforce, deny: [unknown]}", nil, nil},
		"secret_in_the_short_form":    {"allow: [identity.token]\n", "", nil, []string{anywhere}},
		"secret_in_a_rule":            {"", "{allow: [instance.userdata]}", nil, []string{anywhere}},
		"secret_to_all_names":         {"", by("name: '*'", "allow: [identity.document]"), nil, []string{anywhere}},
		"secret_to_all_images":        {"", by("image: ['*', x]", "allow: [identity.document]"), nil, []string{anywhere}},
		"secret_to_all_proven":        {"", by("proof: listener, shared: false", "allow: [identity.token], "+idOf), nil, []string{anywhere}},
		"secret_to_some":              {"", by("name: 'w*'", "allow: [identity.document]"), nil, nil},
		"secret_denied":               {"deny: [identity.token]\n", "", nil, nil},
		"facts_to_everybody":          {"allow: [instance.read, versions.read]\n", "", nil, nil},
		"any_identity":                {"", by("name: web", "allow: [identity.token]"), nil, []string{chosen}},
		"any_identity_of_credentials": {"", by("name: web", "allow: [identity.credential]"), nil, []string{chosen}},
		"one_identity":                {"", by("name: web", "allow: [identity.token], "+idOf), nil, nil},
		"some_of_a_shared_namespace":  {"", by("name: web", "allow: [versions.read]"), pair, []string{policy.FindingShared}},
		"all_of_a_shared_namespace":   {"", by("name: [web, car]", "allow: [versions.read]"), pair, nil},
		"some_are_denied":             {"", by("name: web", "deny: [versions.read]"), pair, nil},
		"credentials_by_resource":     {"", by("name: web", "allow: [identity.token, identity.credential], resource: a, "+idOf), nil, []string{policy.FindingAnyResource}},
		"tokens_by_resource":          {"", by("name: web", "allow: [identity.token], resource: a, "+idOf), nil, nil},
		"audit_with_a_firm_rule":      {"mode: audit\n", "{mode: enforce, deny: [unknown]}", nil, []string{policy.FindingMode}},
		"on_trial_in_mode_audit":      {"mode: audit\n", "{mode: audit, deny: [identity.token]}, " + by("name: web", "allow: [identity.token], "+idOf), nil, []string{policy.FindingMode, policy.FindingMode}},
		"default_identity":            {"", by("name: web", "allow: [identity.token], identity: default"), nil, nil},

		"behind_the_same":            {"", by("name: web", "allow: [versions.read]") + ", " + by("name: web", "allow: [versions.read]"), nil, []string{policy.FindingUnreachable}},
		"behind_a_wider_match":       {"", by("name: 'w*'", "allow: [versions.read, events.read]") + ", " + by("name: web, shared: true", "allow: [versions.read]"), nil, []string{policy.FindingUnreachable}},
		"behind_everybody":           {"allow: [versions.read]\n", by("name: web", "allow: [versions.read]"), nil, []string{policy.FindingUnreachable}},
		"before_a_wider_match":       {"", by("name: web", "allow: [versions.read]") + ", " + by("name: 'w*'", "allow: [versions.read]"), nil, nil},
		"behind_another_match":       {"", by("name: web", "allow: [versions.read]") + ", " + by("name: db", "allow: [versions.read]"), nil, nil},
		"behind_a_narrower_match":    {"", by("name: web, proof: listener", "allow: [versions.read]") + ", " + by("name: web", "allow: [versions.read]"), nil, nil},
		"behind_one_of_two_actions":  {"allow: [versions.read]\n", by("name: web", "allow: [versions.read, events.read]"), nil, nil},
		"behind_another_resource":    {"", by("name: web", "allow: [identity.token], resource: a, "+idOf) + ", " + by("name: web", "allow: [identity.token], resource: b, "+idOf), nil, nil},
		"behind_the_same_resource":   {"", by("name: web", "allow: [identity.token], resource: [a, b], "+idOf) + ", " + by("name: web", "allow: [identity.token], resource: b, "+idOf), nil, []string{policy.FindingUnreachable}},
		"behind_a_narrower_resource": {"", by("name: web", "allow: [identity.token], resource: a, "+idOf) + ", " + by("name: web", "allow: [identity.token], "+idOf), nil, nil},
		"behind_another_identity":    {"", by("name: web", "allow: [identity.token], "+idOf) + ", " + by("name: web", "allow: [identity.token], identity: default"), nil, nil},
		"behind_a_narrower_version":  {"", by("name: web", "allow: [versions.read], api-version: '2018-*'") + ", " + by("name: web", "allow: [versions.read]"), nil, nil},
		"behind_a_wider_version":     {"", by("name: web", "allow: [versions.read], api-version: '2018-*'") + ", " + by("name: web", "allow: [versions.read], api-version: 2018-02-01"), nil, []string{policy.FindingUnreachable}},
		"behind_a_part":              {"", by("name: web", "allow: [instance.read], subtree: compute") + ", " + by("name: web", "allow: [instance.read], subtree: network"), nil, nil},
		"behind_the_same_part":       {"", by("name: web", "allow: [instance.read], subtree: [compute, network]") + ", " + by("name: web", "allow: [instance.read], subtree: network"), nil, []string{policy.FindingUnreachable}},
		"all_denied":                 {"deny: [versions.read]\n", by("name: web", "allow: [versions.read]"), nil, []string{policy.FindingUnreachable}},
		"all_denied_further_down":    {"", by("name: web", "allow: [versions.read]") + ", {deny: [versions.read]}", nil, []string{policy.FindingUnreachable}},
		"denied_in_part":             {"", by("name: web", "allow: [instance.read]") + ", {deny: [instance.read], subtree: compute}", nil, nil},
		"denied_to_others":           {"", by("name: web", "allow: [versions.read]") + ", " + by("name: db", "deny: [versions.read]"), nil, nil},
		"denied_on_trial":            {"", by("name: web", "allow: [versions.read]") + ", {mode: audit, deny: [versions.read]}", nil, []string{policy.FindingMode}},
		"same_deny_twice":            {"deny: [unknown]\n", "{deny: [unknown]}", nil, []string{policy.FindingUnreachable}},
		"label_any_and_label_one":    {"", by("labels: {team: '*'}", "allow: [versions.read]") + ", " + by("labels: {team: shop}", "allow: [versions.read]"), nil, []string{policy.FindingUnreachable}},
		"labels_of_two_keys":         {"", by("labels: {team: shop}", "allow: [versions.read]") + ", " + by("labels: {tier: shop}", "allow: [versions.read]"), nil, nil},
		"one_letter_and_any":         {"", by("name: '?'", "allow: [versions.read]") + ", " + by("name: '*'", "allow: [versions.read]"), nil, nil},

		"for_nobody":                     {"", by("name: wbe", "allow: [versions.read]"), known, []string{policy.FindingUnmatched}},
		"for_nobody_known":               {"", by("name: web", "allow: [versions.read]"), []*workload.Workload{}, []string{policy.FindingUnmatched}},
		"not_known_who_there_is":         {"", by("name: wbe", "allow: [versions.read]"), nil, nil},
		"for_somebody":                   {"", by("name: web, labels: {team: shop}, proof: listener", "allow: [versions.read]"), known, nil},
		"for_a_member":                   {"", by("name: b, shared: true", "allow: [versions.read]"), known, []string{policy.FindingShared}},
		"for_the_whole_of_members":       {"", by("name: pair", "allow: [versions.read]"), known, []string{policy.FindingUnmatched}},
		"allow_by_a_label_of_the_image":  {"", by("labels: {tier: front}", "allow: [versions.read]"), known, []string{policy.FindingUnmatched}},
		"deny_by_a_label_of_the_image":   {"", by("labels: {tier: front}", "deny: [versions.read]"), known, nil},
		"mode_off_is_not_looked_at_more": {"", "{mode: 'off', match: {name: wbe}, allow: [identity.token]}", known, []string{policy.FindingMode}},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, f := range parse(t, tc.head+"rules: ["+tc.rules+"]").Check(tc.known) {
				got = append(got, f.Kind)
				if f.Rule == "" || f.Text == "" {
					t.Errorf("got %+v", f)
				}
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func TestFindingsSayWhere(t *testing.T) {
	got := parse(t, "mode: audit\nallow: [identity.token]\nrules:\n- {name: web, match: {name: web}, allow: [identity.token]}\n").Check([]*workload.Workload{{Name: "db"}})
	want := []policy.Finding{
		{Kind: "not_enforced", Rule: "p.yaml", Text: "the policy's mode is audit: it denies nothing"},
		{Kind: "secret_to_everybody", Rule: "p.yaml:2", Text: "every container gets identity.token: give the rule a match"},
		{Kind: "unreachable", Rule: `p.yaml:4 "web"`, Text: "it never counts: the list allow, before it, is for all of it"},
		{Kind: "any_identity", Rule: `p.yaml:4 "web"`, Text: "the container may choose any identity of the VM: give the rule an identity"},
		{Kind: "unmatched", Rule: `p.yaml:4 "web"`, Text: "it is for none of the 1 workloads there are"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

// A rule that is said to be unreachable can be left out: no decision changes.
func TestUnreachableRulesDecideNothing(t *testing.T) {
	left := 0
	questions(t, func(x question) bool {
		d := x.decide(t, x.s)
		for _, f := range parse(t, x.s.text()).Check(nil) {
			for i, r := range x.s.Rules {
				if f.Kind != policy.FindingUnreachable || f.Rule != `p.yaml:1 "`+r.Name+`"` {
					continue
				}
				less := x.s.clone()
				less.Rules = append(less.Rules[:i:i], less.Rules[i+1:]...)
				e := x.decide(t, less)
				if a, b := seen(d, x.q), seen(e, x.q); d.Identity != e.Identity || !cmp.Equal(a, b) {
					t.Errorf("%s: got %+v\nwithout it %+v", f.Text, d, e)
				}
				left++
			}
		}
		return d.Allow
	})
	if left < 100 {
		t.Errorf("only %d rules were unreachable: the generator is broken", left)
	}
}
