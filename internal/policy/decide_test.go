package policy_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

// public compares decisions by what is exported.
var public = cmpopts.IgnoreUnexported(policy.Decision{})

const rest = ": add {match: {name: web}, allow: [%]} to the policy's rules"

func none(action string) string {
	return "no rule allows " + action + strings.ReplaceAll(rest, "%", action)
}

const outweighs = ": no allow outweighs that, it must change there"

// TestReasons has the whole decision of each kind.
func TestReasons(t *testing.T) {
	text := "# comment\nallow: [instance.read]\ndeny:\n- events.approve\n- unknown\nrules:\n" +
		"- {match: {name: db}, allow: [versions.read]}\n- name: vault\n  allow: [identity.token]\n  resource: " + vault +
		"\n  identity: {client_id: " + idA + "}\n- deny: [identity.info]\n"
	id := imds.Param{Name: "client_id", Value: idA}
	userdata := []imds.Action{imds.InstanceUserdata}
	for name, tc := range map[string]struct {
		request string
		want    policy.Decision
	}{
		"allowed_in_the_list": {instance, policy.Decision{Allow: true, Rule: "p.yaml:2", Reason: "instance.read is allowed by the list allow", Blank: userdata}},
		"denied_in_the_list":  {"POST /metadata/scheduledevents?api-version=2020-07-01", policy.Decision{Rule: "p.yaml:4", Reason: "events.approve is denied by the list deny" + outweighs}},
		"unknown_endpoint":    {"/metadata/nobody/knows", policy.Decision{Rule: "p.yaml:4", Reason: "unknown is denied by the list deny" + outweighs}},
		"denied_by_a_rule":    {"/metadata/identity/info?api-version=2018-02-01", policy.Decision{Rule: "p.yaml:12", Reason: "identity.info is denied by rule 3" + outweighs}},
		"allowed_by_a_rule":   {token + vault, policy.Decision{Allow: true, Rule: `p.yaml:8 "vault"`, Reason: `identity.token is allowed by rule "vault"`, Identity: id}},
		"not_listed":          {"/metadata/versions", policy.Decision{Rule: "p.yaml:default", Reason: none("versions.read")}},
		"other_resource": {token + storage, policy.Decision{Rule: `p.yaml:8 "vault"`,
			Reason: `identity.token is allowed by rule "vault" for the resource https://vault.azure.net only: add to its resource`}},
		"other_identity": {token + vault + "&client_id=" + idB, policy.Decision{Rule: `p.yaml:8 "vault"`,
			Reason: `identity.token is allowed by rule "vault" for the identity client_id ` + idA + ` only: another identity is another rule`}},
	} {
		t.Run(name, func(t *testing.T) {
			tc.want.Snapshot, tc.want.Mode = 1, policy.Enforce
			got := decide(t, text, tc.request)
			if d := cmp.Diff(tc.want, got, public); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
	d := decide(t, "rules: [{allow: [identity.token], resource: [a, b, c, d, e, f]}]", token+"x")
	if want := "identity.token is allowed by rule 1 for the resource a or b or c or d or 2 others only: add to its resource"; d.Reason != want {
		t.Errorf("got %q, want %q", d.Reason, want)
	}
	if d := decide(t, "{}", "/metadata/nobody/knows"); d.Reason != "unknown is every endpoint that is not on the list of known ones: it cannot be allowed" {
		t.Errorf("got %q", d.Reason)
	}
}

// What is told of a file's place is its name, without its folders.
func TestRulesAreNamedWithoutFolders(t *testing.T) {
	for _, name := range []string{"/etc/imdsgate/policy.yaml", `C:\imdsgate\policy.yaml`} {
		p, err := policy.Parse(name, []byte("allow: [versions.read]"))
		if err != nil {
			t.Fatal(err)
		}
		v := new(policy.Current).Set(p).View(&web, workload.Listener)
		for action, want := range map[imds.Action]string{imds.VersionsRead: "policy.yaml:1", imds.EventsRead: "policy.yaml:default"} {
			if d := v.Decide(imds.Query{Action: action}); d.Rule != want || strings.Contains(d.Reason, "policy.yaml") {
				t.Errorf("%s: got %s, %s, want %s and a reason without it", name, d.Rule, d.Reason, want)
			}
		}
		if _, err := policy.Parse(name, nil); err == nil || !strings.HasPrefix(err.Error(), name+":1: ") {
			t.Errorf("an error's place is the whole path: got %v", err)
		}
	}
}

// A suggestion in a reason is a rule, and allows what was denied to that workload,
// by whatever names it goes.
func TestSuggestionsAreRules(t *testing.T) {
	odd := pod("pröd", "")
	for _, w := range []workload.Workload{web, {Name: "10.0.0.7"}, {Name: "yes"}, {Name: "a: b"}, {Name: `"`}, {Name: "{x}"}, {Name: "7"}, composed("shop", "web"), composed("true", "1"), pod("prod", "web"), odd} {
		d := force(t, "{}").View(&w, workload.Listener).Decide(imds.Query{Action: imds.IdentityToken})
		_, rule, _ := strings.Cut(d.Reason, ": add ")
		rule = strings.TrimSuffix(rule, " to the policy's rules")
		s := force(t, "rules:\n- "+rule)
		if !s.View(&w, workload.Listener).Decide(imds.Query{Action: imds.IdentityToken}).Allow {
			t.Errorf("%s: %s does not allow it", w.Name, rule)
		}
		if s.View(&workload.Workload{Name: "other"}, workload.Listener).Decide(imds.Query{Action: imds.IdentityToken}).Allow {
			t.Errorf("%s: %s allows it to others", w.Name, rule)
		}
	}
}

// TestModes has the file's mode against the rule's.
func TestModes(t *testing.T) {
	type row struct {
		allow bool
		would string
		mode  policy.Mode
	}
	pass, denied := row{true, "", policy.Enforce}, row{false, "", policy.Enforce}
	off := row{true, "", policy.Off}
	for file, rows := range map[string]map[string][3]row{ // rule's mode: an allow alone, a deny beside an allow, nothing for it
		"":      {"": {pass, denied, denied}, "enforce": {pass, denied, denied}, "audit": {row{false, "allow", policy.Enforce}, row{true, "deny", policy.Enforce}, denied}, "off": {denied, pass, denied}},
		"audit": {"": {pass, row{true, "deny", policy.Audit}, row{true, "deny", policy.Audit}}, "enforce": {pass, denied, row{true, "deny", policy.Audit}}, "audit": {row{true, "", policy.Audit}, row{true, "deny", policy.Enforce}, row{true, "deny", policy.Audit}}, "off": {row{true, "deny", policy.Audit}, pass, row{true, "deny", policy.Audit}}},
		"off":   {"": {off, off, off}, "enforce": {off, off, off}, "audit": {off, off, off}, "off": {off, off, off}},
	} {
		for mode, want := range rows {
			head, own := "", ""
			if file != "" {
				head = "mode: " + file + "\n"
			}
			if mode != "" {
				own = "mode: " + mode + ", "
			}
			for i, text := range []string{
				head + "rules: [{" + own + "allow: [identity.token]}]",
				head + "allow: [identity.token]\nrules: [{" + own + "deny: [identity.token]}]",
				head + "rules: [{" + own + "allow: [versions.read]}]",
			} {
				d := decide(t, text, token+vault)
				if got := (row{d.Allow, d.Would, d.Mode}); got != want[i] {
					t.Errorf("%s\ngot %+v, want %+v: %s", text, got, want[i], d.Reason)
				}
				if d.Would != "" && d.Mode == policy.Enforce && !strings.Contains(d.Reason, "rule 1, on trial, would "+d.Would) {
					t.Errorf("%s\ngot reason %q, which does not name the trial", text, d.Reason)
				}
			}
		}
	}
}

// A rule on trial that allows says so only where it would change something.
func TestTrialAgainstADeny(t *testing.T) {
	d := decide(t, "deny: [identity.token]\nrules: [{mode: audit, allow: [identity.token]}]", token+vault)
	if d.Would != "" || strings.Contains(d.Reason, "trial") {
		t.Errorf("a deny beats the allow on trial: got %+v", d)
	}
	d = decide(t, "allow: [identity.token]\nrules: [{mode: audit, allow: [identity.token]}]", token+vault)
	if d.Would != "" {
		t.Errorf("it is allowed already: got %+v", d)
	}
	d = decide(t, "rules: [{mode: audit, allow: [identity.token], resource: x}, {mode: audit, deny: [identity.token]}]", token+"x")
	if d.Would != "" {
		t.Errorf("two rules on trial, and the deny beats: got %+v", d)
	}
}

// The rest of what mode audit does to a request: nothing, but what is firm.
func TestAuditMode(t *testing.T) {
	id := imds.Param{Name: "client_id", Value: idA}
	byRule := "allow: [identity.token], identity: {client_id: " + idA + "}"
	for name, tc := range map[string]struct {
		rules, request string
		want           policy.Decision
	}{
		"firm_deny_behind_a_soft_one":       {"[{deny: [identity.token]}, {mode: enforce, deny: [identity.token]}]", token + vault, policy.Decision{Rule: "p.yaml:2", Reason: "identity.token is denied by rule 2" + outweighs}},
		"firm_deny_of_a_part":               {"[{allow: [instance.read, instance.userdata]}, {mode: enforce, deny: [instance.read], subtree: compute/vmId}]", instance, policy.Decision{Allow: true, Rule: "p.yaml:2", Reason: "instance.read is allowed by rule 1", Cut: imds.Cut{Drop: []string{"compute/vmId"}}}},
		"firm_deny_of_a_part_soft_of_all":   {"[{deny: [instance.read]}, {mode: enforce, deny: [instance.read], subtree: compute/vmId}]", instance + "", policy.Decision{Allow: true, Rule: "p.yaml:2", Reason: "instance.read is denied by rule 1" + outweighs, Mode: policy.Audit, Would: "deny", Cut: imds.Cut{Drop: []string{"compute/vmId"}}}},
		"firm_deny_of_what_is_covered":      {"[{allow: [instance.read]}, {mode: enforce, deny: [instance.userdata]}]", instance, policy.Decision{Allow: true, Rule: "p.yaml:2", Reason: "instance.read is allowed by rule 1", Blank: []imds.Action{imds.InstanceUserdata}}},
		"identity_is_not_added":             {"[{" + byRule + "}]", token + vault, policy.Decision{Allow: true, Rule: "p.yaml:2", Reason: "identity.token is allowed by rule 1; enforced, it would be for the identity client_id " + idA, Mode: policy.Audit, Would: "identity"}},
		"identity_of_a_firm_rule_is":        {"[{mode: enforce, " + byRule + "}]", token + vault, policy.Decision{Allow: true, Rule: "p.yaml:2", Reason: "identity.token is allowed by rule 1", Identity: id}},
		"identity_is_named":                 {"[{" + byRule + "}]", token + vault + "&client_id=" + idA, policy.Decision{Allow: true, Rule: "p.yaml:2", Reason: "identity.token is allowed by rule 1"}},
		"cut_is_not_made":                   {"[{allow: [instance.read], subtree: compute/vmId}]", instance, policy.Decision{Allow: true, Rule: "p.yaml:2", Reason: "instance.read is allowed by rule 1; enforced, the answer would be without instance.userdata, all but compute/vmId", Mode: policy.Audit, Would: "cut"}},
		"blanking_is_not_made":              {"[{allow: [instance.read]}]", instance, policy.Decision{Allow: true, Rule: "p.yaml:2", Reason: "instance.read is allowed by rule 1; enforced, the answer would be without instance.userdata", Mode: policy.Audit, Would: "cut"}},
		"drop_is_not_made":                  {"[{allow: [instance.read, instance.userdata]}, {deny: [instance.read], subtree: compute/tags}]", instance, policy.Decision{Allow: true, Rule: "p.yaml:2", Reason: "instance.read is allowed by rule 1; enforced, the answer would be without compute/tags, compute/tagsList", Mode: policy.Audit, Would: "cut"}},
		"unknown_where_something_is_closed": {"[{mode: enforce, deny: [identity.token]}]", "/metadata/nobody/knows", policy.Decision{Rule: "p.yaml:default", Reason: "unknown is every endpoint that is not on the list of known ones: it cannot be allowed"}},
		"unknown_where_others_are_closed":   {"[{mode: enforce, match: {name: db}, deny: [identity.token]}]", "/metadata/nobody/knows", policy.Decision{Allow: true, Rule: "p.yaml:default", Reason: "unknown is every endpoint that is not on the list of known ones: it cannot be allowed", Mode: policy.Audit, Would: "deny"}},
		"unknown_passes":                    {"[]", "/metadata/nobody/knows", policy.Decision{Allow: true, Rule: "p.yaml:default", Reason: "unknown is every endpoint that is not on the list of known ones: it cannot be allowed", Mode: policy.Audit, Would: "deny"}},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.want.Snapshot = 1; tc.want.Mode == "" {
				tc.want.Mode = policy.Enforce
			}
			got := decide(t, "mode: audit\nrules: "+tc.rules, tc.request)
			if d := cmp.Diff(tc.want, got, public); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}
