package policy_test

import (
	"strings"
	"testing"

	"imdsgate/internal/policy"
)

// The ends of messages about an action that there is not, and a key.
const (
	wanted   = ": want one of versions.read, instance.read, instance.userdata, instance.provisioning, identity.info, identity.token, identity.credential, identity.document, events.read, events.approve, network.balancer, legacy.read"
	fileKeys = "want a mapping with the keys mode, allow, deny or rules"
	ruleKeys = "want name, mode, match, allow, deny, resource, api-version, subtree or identity"
	idWanted = "p.yaml:1: identity: want one of client_id, object_id, msi_res_id, like {client_id: GUID}, or default for what the service gives to those that name none, got "
)

// aRule is a file with one rule, whose keys but allow are given.
func aRule(keys string) string {
	return "rules: [{allow: [identity.token, instance.read], " + keys + "}]"
}

// aDeny is one with a deny.
func aDeny(keys string) string {
	return "rules: [{deny: [instance.read, identity.token], " + keys + "}]"
}

var wrong = map[string]struct{ text, want string }{
	"empty_file":         {"", `p.yaml:1: empty: want keys like allow and rules, or {} to deny everything`},
	"only_comments":      {"# allow: [identity.token]\n", `p.yaml:1: empty: want keys like allow and rules, or {} to deny everything`},
	"null_document":      {"---\n", `p.yaml:2: policy: ` + fileKeys + `, got nothing`},
	"not_yaml":           {"allow: [instance.read\ndeny: []\n", `p.yaml:1: did not find expected ',' or ']'`},
	"binary":             {"allow: [\x00]\n", `p.yaml:1: control characters are not allowed`},
	"list_at_the_top":    {"- instance.read\n", `p.yaml:1: policy: ` + fileKeys + `, got a list`},
	"word_at_the_top":    {"allow\n", `p.yaml:1: policy: ` + fileKeys + `, got "allow"`},
	"unknown_key":        {"allow: []\nalow: []\n", `p.yaml:2: policy: unknown key "alow": want mode, allow, deny or rules`},
	"key_in_other_case":  {"Allow: []\n", `p.yaml:1: policy: unknown key "Allow": want mode, allow, deny or rules`},
	"key_is_no_word":     {"? [allow]\n: []\n", `p.yaml:1: policy: unknown key a list: want mode, allow, deny or rules`},
	"merge_key":          {"<<: {allow: [identity.token]}\n", `p.yaml:1: policy: unknown key "<<": want mode, allow, deny or rules`},
	"key_twice":          {"allow: []\ndeny: []\nallow: []\n", `p.yaml:3: policy: allow again: want one, the first is in line 1`},
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
	"both_lists":         {"allow: [identity.token]\n\ndeny: [identity.token]\n", `p.yaml:3: deny: identity.token is in allow, too (line 1): want it in one place`},
	"twice_in_one_list":  {"allow:\n- identity.token\n- identity.token\n", `p.yaml:3: allow: identity.token again: want it once`},
	"unknown_is_allowed": {"allow: [unknown]\n", `p.yaml:1: allow: unknown is every endpoint that is not on the list of known ones: it cannot be allowed`},
	"second_document":    {"allow: []\n---\nallow: [identity.token]\n", `p.yaml:3: second document: want one`},
	"broken_second":      {"allow: []\n---\n[\n", `p.yaml:3: did not find expected node content`},
	"mode_of_nobody":     {"mode: warn\n", `p.yaml:1: mode: want enforce, audit or off, got "warn"`},
	"mode_is_a_list":     {"mode: [audit]\n", `p.yaml:1: mode: want enforce, audit or off, got a list`},
	"no_mode":            {"mode:\n", `p.yaml:1: mode: want enforce, audit or off, got nothing`},

	"rules_are_nothing":           {"rules:\n", `p.yaml:1: rules: want a list of rules, got nothing`},
	"rule_is_a_word":              {"rules:\n- web\n", `p.yaml:2: rule: want a mapping with the keys name, mode, match, allow, deny, resource, api-version, subtree or identity, got "web"`},
	"rule_without_effect":         {"rules:\n- name: web\n", `p.yaml:2: rule: want a list allow or deny of at least one action` + strings.Replace(wanted, ": want one of ", ": ", 1)},
	"rule_with_empty_allow":       {"rules:\n- allow: []\n", `p.yaml:2: rule: want a list allow or deny of at least one action` + strings.Replace(wanted, ": want one of ", ": ", 1)},
	"rule_with_both":              {"rules:\n- allow: [identity.token]\n  deny: [instance.read]\n", `p.yaml:3: rule: deny beside allow (line 2): want one of them, and another rule for the other`},
	"unknown_in_a_rule":           {"rules: [{allow: [unknown]}]\n", `p.yaml:1: allow: unknown is every endpoint that is not on the list of known ones: it cannot be allowed`},
	"unknown_key_of_a_rule":       {"rules:\n- allow: [identity.token]\n  subtrees: compute\n", `p.yaml:3: rule: unknown key "subtrees": ` + ruleKeys},
	"name_twice":                  {"rules:\n- {name: a, allow: [identity.token]}\n- {name: a, deny: [identity.token]}\n", `p.yaml:3: name: "a" is the name of the rule in line 2, too: want another`},
	"name_of_two_lines":           {aRule(`name: "a\nb"`), `p.yaml:1: name: want one line of at most 128 bytes`},
	"long_name":                   {aRule("name: " + strings.Repeat("a", 129)), `p.yaml:1: name: want one line of at most 128 bytes`},
	"name_is_a_number":            {aRule("name: 7"), `p.yaml:1: name: want a text, got "7": put it in quotes`},
	"empty_match":                 {aRule("match: {}"), `p.yaml:1: match: want at least one of name, image, digest, labels, compose, kubernetes, shared or proof`},
	"null_match":                  {aRule("match: "), `p.yaml:1: match: want a mapping with the keys name, image, digest, labels, compose, kubernetes, shared or proof, got nothing`},
	"unknown_key_of_a_match":      {aRule("match: {namespace: x}"), `p.yaml:1: match: unknown key "namespace": want name, image, digest, labels, compose, kubernetes, shared or proof`},
	"match_no_name":               {aRule("match: {name: []}"), `p.yaml:1: name: want at least one, or leave the key out`},
	"match_empty_name":            {aRule("match: {name: ''}"), `p.yaml:1: name: want a pattern of 1 to 1024 bytes, got 0`},
	"match_long_name":             {aRule("match: {name: " + strings.Repeat("a", 1025) + "}"), `p.yaml:1: name: want a pattern of 1 to 1024 bytes, got 1025`},
	"too_many_stars":              {aRule("match: {name: '*********'}"), `p.yaml:1: name: want at most 8 times * in a pattern`},
	"short_digest":                {aRule("match: {digest: 'sha256:abc'}"), `p.yaml:1: digest: want sha256: and 64 hexadecimal digits in lower case, got "sha256:abc"`},
	"digest_in_capitals":          {aRule("match: {digest: '" + strings.ToUpper(digestA) + "'}"), `p.yaml:1: digest: want sha256: and 64 hexadecimal digits in lower case, got "` + strings.ToUpper(digestA) + `"`},
	"digest_pattern":              {aRule("match: {digest: 'sha256:*'}"), `p.yaml:1: digest: want sha256: and 64 hexadecimal digits in lower case, got "sha256:*"`},
	"no_labels":                   {aRule("match: {labels: {}}"), `p.yaml:1: labels: want a mapping of labels, like {team: shop}, got a mapping`},
	"labels_as_a_list":            {aRule("match: {labels: [team=shop]}"), `p.yaml:1: labels: want a mapping of labels, like {team: shop}, got a list`},
	"label_twice":                 {aRule("match: {labels: {team: a, team: b}}"), `p.yaml:1: labels: "team" again: want it once`},
	"label_is_a_bool":             {aRule("match: {labels: {team: true}}"), `p.yaml:1: labels: team: want a pattern, got "true": put it in quotes`},
	"label_without_value":         {aRule("match: {labels: {team: }}"), `p.yaml:1: labels: team: want a pattern, got nothing`},
	"label_key_is_a_number":       {aRule("match: {labels: {1: a}}"), `p.yaml:1: labels: want the key of a label, got "1": put it in quotes`},
	"empty_compose":               {aRule("match: {compose: {}}"), `p.yaml:1: compose: want at least one of project or service`},
	"compose_as_text":             {aRule("match: {compose: shop/web}"), `p.yaml:1: compose: want a mapping with the keys project or service, got "shop/web"`},
	"empty_kubernetes":            {aRule("match: {kubernetes: {}}"), `p.yaml:1: kubernetes: want at least one of namespace, service-account or labels`},
	"shared_is_a_word":            {aRule("match: {shared: maybe}"), `p.yaml:1: shared: want true or false, got "maybe"`},
	"shared_is_a_text":            {aRule("match: {shared: 'true'}"), `p.yaml:1: shared: want true or false, got "true"`},
	"proof_of_nobody":             {aRule("match: {proof: certain}"), `p.yaml:1: proof: want address, endpoint, cgroup or listener, got "certain"`},
	"proof_none_says_nothing":     {aRule("match: {proof: none}"), `p.yaml:1: proof: want address, endpoint, cgroup or listener, got "none"`},
	"resource_pattern":            {aRule("resource: 'https://*.azure.net'"), `p.yaml:1: resource: want it in full, without * or ?`},
	"no_resource":                 {aRule("resource: []"), `p.yaml:1: resource: want at least one, or leave the key out`},
	"empty_resource":              {aRule("resource: ''"), `p.yaml:1: resource: want a resource, like https://vault.azure.net of 1 to 1024 bytes, got 0`},
	"resource_of_another_action":  {"rules:\n- allow: [instance.read]\n  resource: " + vault, `p.yaml:3: resource: is for identity.token, of which the rule has none`},
	"resource_for_a_credential":   {"rules:\n- allow: [identity.credential]\n  resource: " + vault, `p.yaml:3: resource: is for identity.token, of which the rule has none`},
	"identity_of_another_action":  {"rules:\n- allow: [instance.read]\n  identity: default", `p.yaml:3: identity: is for identity.token and identity.credential, of which the rule has none`},
	"subtree_of_another_action":   {"rules:\n- allow: [identity.token]\n  subtree: compute", `p.yaml:3: subtree: is for instance.read, of which the rule has none`},
	"version_is_a_number":         {aRule("api-version: 2018"), `p.yaml:1: api-version: want a pattern, got "2018": put it in quotes`},
	"subtree_misspelt":            {aRule("subtree: compute/tag"), `p.yaml:1: subtree: subtree "compute/tag": there is no key tag in compute: did you mean compute/tags?`},
	"subtree_with_index":          {aRule("subtree: network/interface/0"), `p.yaml:1: subtree: subtree "network/interface/0": leave out the index 0: a subtree is about all elements of an array`},
	"subtree_with_slash":          {aRule("subtree: /compute"), `p.yaml:1: subtree: subtree "/compute": no slash at either end`},
	"subtree_as_url":              {aRule("subtree: /metadata/instance/compute"), `p.yaml:1: subtree: subtree "/metadata/instance/compute": leave out /metadata/instance/`},
	"subtree_is_user_data":        {aRule("subtree: compute/userData"), `p.yaml:1: subtree: subtree "compute/userData": userData is no part of instance.read: the action instance.userdata stands for it`},
	"names_of_tags_alone":         {aDeny("subtree: compute/tagsList/value"), `p.yaml:1: subtree: subtree "compute/tagsList/value": names and values of tags go together, since compute/tags holds both: name compute/tagsList`},
	"identity_is_another_word":    {aRule("identity: system"), idWanted + `"system"`},
	"identity_is_nothing":         {aRule("identity: "), idWanted + `nothing`},
	"two_identities":              {aRule("identity: {client_id: " + idA + ", object_id: " + idA + "}"), idWanted + `a mapping`},
	"identity_by_an_alias":        {"rules: [{name: &client_id x, allow: [identity.token], identity: {*client_id : " + idA + "}}]", idWanted + `an alias`},
	"identity_of_no_kind":         {aRule("identity: {principal: " + idA + "}"), `p.yaml:1: identity: unknown kind of identity "principal": want client_id, object_id or msi_res_id`},
	"identity_is_no_guid":         {aRule("identity: {client_id: web}"), `p.yaml:1: identity: client_id "web" is not a GUID such as 00000000-0000-0000-0000-000000000001`},
	"identity_is_zero":            {aRule("identity: {client_id: 00000000-0000-0000-0000-000000000000}"), `p.yaml:1: identity: client_id "00000000-0000-0000-0000-000000000000" names no identity: it could be read as none given`},
	"deny_narrowed_by_resource":   {aDeny("resource: " + vault), `p.yaml:1: resource: a deny cannot be narrowed by it, since the same can be had under another name: deny all, and allow what is needed`},
	"deny_narrowed_by_version":    {aDeny("api-version: '2018-*'"), `p.yaml:1: api-version: a deny cannot be narrowed by it, since the same can be had under another name: deny all, and allow what is needed`},
	"deny_narrowed_by_identity":   {aDeny("identity: default"), `p.yaml:1: identity: a deny cannot be narrowed by it, since the same can be had under another name: deny all, and allow what is needed`},
	"deny_for_those_that_prove":   {aDeny("match: {proof: listener}"), `p.yaml:1: match: proof: a deny for those that prove more would spare those that prove less: use it in an allow`},
	"nothing_is_good_after_wrong": {"allow: [instance.read]\nrules:\n- allow: [identity.token]\n- allow: [identity.tokens]\n", `p.yaml:4: allow: unknown action "identity.tokens"` + wanted},
}

func TestParseRefuses(t *testing.T) {
	for name, tc := range wrong {
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

var right = map[string]string{
	"empty_mapping":      "{}",
	"empty_lists":        "mode: enforce\nallow: []\ndeny: []\nrules: []\n",
	"mode_off_unquoted":  "mode: off\n",
	"mode_after_rules":   "rules: [{allow: [identity.token]}]\nmode: audit\n",
	"anchor_unused":      "allow: &a [instance.read]\n",
	"deny_unknown":       "deny: [unknown]\n",
	"json":               `{"allow": ["instance.read"], "rules": [{"deny": ["unknown"]}]}`,
	"every_key_of_match": aRule("match: {name: [a, 'b*'], image: 'x:?', digest: ['" + digestA + "'], labels: {a: b, c: [d, 'e*']}, compose: {project: p, service: [s]}, kubernetes: {namespace: n, service-account: a, labels: {k: v}}, shared: false, proof: address}"),
	"every_narrowing":    aRule("name: x, mode: audit, resource: [" + vault + ", 'api://x'], api-version: [2018-02-01, '2019-*'], subtree: [Compute/OSprofile, network], identity: {object_id: " + strings.ToUpper(idB) + "}"),
	"identity_default":   aRule("identity: default"),
	"identity_by_path":   aRule("identity: {msi_res_id: " + armID + "}"),
	"identity_old_name":  aRule("identity: {mi_res_id: " + armID + "}"),
	"deny_a_subtree":     aDeny("subtree: compute/tags, match: {name: x, shared: true}"),
	"empty_label":        aRule("match: {labels: {a: '', b: ['x']}}"),
	"version_unquoted":   aRule("api-version: 2018-02-01"),
	"eight_stars":        aRule("match: {name: '*a*b*c*d*e*f*g*'}"),
	"name_128_bytes":     aRule("name: " + strings.Repeat("a", 128)),
	"same_action_twice":  "rules: [{allow: [identity.token]}, {allow: [identity.token]}]",
	"twice_on_both_side": "allow: [instance.read]\nrules: [{deny: [instance.read]}]",
}

func TestParseAccepts(t *testing.T) {
	for name, text := range right {
		if _, err := policy.Parse("p.yaml", []byte(text)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPolicySaysWhatItIs(t *testing.T) {
	p := parse(t, "mode: audit\nallow: [instance.read]\nrules: [{allow: [identity.token]}, {deny: [unknown]}]")
	if p.Name() != "p.yaml" || p.Mode() != policy.Audit || p.Len() != 3 {
		t.Errorf("got %s, %s, %d rules", p.Name(), p.Mode(), p.Len())
	}
	var none *policy.Policy
	if none.Name() != "none" || none.Mode() != policy.Enforce || none.Len() != 0 || none.Check(nil) != nil {
		t.Errorf("no policy: got %s, %s, %d rules, %v", none.Name(), none.Mode(), none.Len(), none.Check(nil))
	}
}
