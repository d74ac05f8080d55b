package policy_test

import (
	"regexp"
	"testing"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
)

// wanted is the end of a message about an action that there is not.
const wanted = ": want one of versions.read, instance.read, instance.userdata, instance.provisioning, identity.info, identity.token, " +
	"identity.credential, identity.document, events.read, events.approve, network.balancer, legacy.read"

func TestParseRefuses(t *testing.T) {
	for name, tc := range map[string]struct{ text, want string }{
		"empty_file":         {"", `p.yaml:1: empty: want the keys allow and deny, or {} to deny everything`},
		"only_comments":      {"# allow: [identity.token]\n", `p.yaml:1: empty: want the keys allow and deny, or {} to deny everything`},
		"null_document":      {"---\n", `p.yaml:2: want the keys allow and deny, got nothing`},
		"not_yaml":           {"allow: [instance.read\ndeny: []\n", `p.yaml:1: did not find expected ',' or ']'`},
		"binary":             {"allow: [\x00]\n", `p.yaml:1: control characters are not allowed`},
		"list_at_the_top":    {"- instance.read\n", `p.yaml:1: want the keys allow and deny, got a list`},
		"word_at_the_top":    {"allow\n", `p.yaml:1: want the keys allow and deny, got "allow"`},
		"unknown_key":        {"allow: []\nalow: []\n", `p.yaml:2: unknown key "alow": want allow or deny`},
		"key_in_other_case":  {"Allow: []\n", `p.yaml:1: unknown key "Allow": want allow or deny`},
		"key_is_no_word":     {"? [allow]\n: []\n", `p.yaml:1: unknown key a list: want allow or deny`},
		"merge_key":          {"<<: {allow: [identity.token]}\n", `p.yaml:1: unknown key "<<": want allow or deny`},
		"key_twice":          {"allow: []\ndeny: []\nallow: []\n", `p.yaml:3: allow again: want one, the first is in line 1`},
		"word_for_a_list":    {"allow: instance.read\n", `p.yaml:1: allow: want a list of actions, got "instance.read"`},
		"nothing_for_a_list": {"deny:\nallow: []\n", `p.yaml:1: deny: want a list of actions, got nothing`},
		"mapping_for_a_list": {"deny: {identity.token: true}\n", `p.yaml:1: deny: want a list of actions, got a mapping`},
		"number_in_the_list": {"allow:\n- 7\n", `p.yaml:2: allow: want the name of an action, got "7"`},
		"bool_in_the_list":   {"allow: [true]\n", `p.yaml:1: allow: want the name of an action, got "true"`},
		"null_in_the_list":   {"allow:\n-\n", `p.yaml:2: allow: want the name of an action, got nothing`},
		"list_in_the_list":   {"allow: [[identity.token]]\n", `p.yaml:1: allow: want the name of an action, got a list`},
		"alias":              {"allow: [&a identity.token]\ndeny: [*a]\n", `p.yaml:2: deny: want the name of an action, got an alias`},
		"unknown_action":     {"allow:\n  - instance.read\n  - identity.tokens\n", `p.yaml:3: allow: unknown action "identity.tokens"` + wanted},
		"unknown_in_deny":    {"deny: [identity]\n", `p.yaml:1: deny: unknown action "identity"` + wanted + ", unknown"},
		"action_in_capitals": {"allow: [Identity.Token]\n", `p.yaml:1: allow: unknown action "Identity.Token"` + wanted},
		"wildcard":           {"allow: ['*']\n", `p.yaml:1: allow: unknown action "*"` + wanted},
		"empty_action":       {"allow: ['']\n", `p.yaml:1: allow: unknown action ""` + wanted},
		"both_lists":         {"allow: [identity.token]\n\ndeny: [identity.token]\n", `p.yaml:3: deny: identity.token is already in allow in line 1: want it in one place`},
		"twice_in_one_list":  {"allow:\n- identity.token\n- identity.token\n", `p.yaml:3: allow: identity.token is already in allow in line 2: want it in one place`},
		"unknown_is_allowed": {"allow: [unknown]\n", `p.yaml:1: allow: unknown is every endpoint that is not on the list of known ones: it cannot be allowed`},
		"second_document":    {"allow: []\n---\nallow: [identity.token]\n", `p.yaml:3: second document: want one`},
		"broken_second":      {"allow: []\n---\n[\n", `p.yaml:3: did not find expected node content`},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := policy.Parse("p.yaml", []byte(tc.text))
			if err == nil || p != nil {
				t.Fatalf("got %v, %v, want an error and no policy", p, err)
			}
			if got := err.Error(); got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

var located = regexp.MustCompile(`^p\.yaml:[1-9][0-9]*: .`)

func FuzzParse(f *testing.F) {
	for _, s := range []string{"{}", "allow: [instance.read]\ndeny: [events.approve]", "allow: &a [unknown]", "? a", "%YAML 1.1\n---\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := policy.Parse("p.yaml", text)
		if err != nil {
			if p != nil || !located.MatchString(err.Error()) {
				t.Fatalf("got %v, %q, want no policy and an error with its place", p, err)
			}
			return
		}
		if decide(p, imds.Query{Action: imds.Unknown}).Allow || decide(p, imds.Query{}).Allow {
			t.Fatal("what nobody knows is allowed")
		}
	})
}
