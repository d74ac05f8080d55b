package policy_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// TestNarrowing has, for each way to narrow an allow, what still fits.
func TestNarrowing(t *testing.T) {
	const credential = "POST /metadata/identity/issuecredential?cred-api-version=2.0"
	tokens := func(keys string) string {
		return "rules: [{allow: [identity.token, identity.credential], " + keys + "}]"
	}
	onlyA := tokens("identity: {client_id: " + idA + "}")
	byPath := tokens("identity: {mi_res_id: " + armID + "}")
	byDefault := tokens("identity: default")
	for name, tc := range map[string]struct {
		text, request string
		allow         bool
		identity      string // that is added
	}{
		"resource":                        {tokens("resource: " + vault), token + vault, true, ""},
		"resource_with_the_slash":         {tokens("resource: " + vault), token + vault + "/", true, ""},
		"resource_with_two_slashes":       {tokens("resource: " + vault), token + vault + "//", false, ""},
		"resource_in_capitals":            {tokens("resource: " + vault), token + "HTTPS://Vault.AZURE.net", true, ""},
		"resource_escaped":                {tokens("resource: " + vault), token + "https%3a%2f%2Fvault.azure.net", true, ""},
		"resource_path_in_other_case":     {tokens("resource: 'api://x/A'"), token + "api://x/a", false, ""},
		"resource_with_a_port":            {tokens("resource: " + vault), token + vault + ":443", false, ""},
		"resource_with_a_user":            {tokens("resource: " + vault), token + "https://x@vault.azure.net", false, ""},
		"resource_with_a_dot":             {tokens("resource: " + vault), token + vault + ".", false, ""},
		"resource_of_a_longer_name":       {tokens("resource: " + vault), token + vault + ".evil.test", false, ""},
		"resource_missing":                {tokens("resource: " + vault), strings.TrimSuffix(token, "&resource="), false, ""},
		"resource_empty":                  {tokens("resource: " + vault), token, false, ""},
		"resource_behind_another":         {"rules: [{allow: [identity.token], resource: x}, {allow: [identity.token], resource: HTTPS://vault.azure.net/}]", token + vault, true, ""},
		"identity_behind_another":         {"rules: [{allow: [identity.token], identity: default}, {allow: [identity.token], identity: {client_id: " + strings.ToUpper(idB) + "}}]", token + vault + "&client_id=" + idB, true, ""},
		"resource_one_of_several":         {tokens("resource: [" + storage + ", " + vault + "]"), token + vault, true, ""},
		"resource_is_not_for_credentials": {tokens("resource: " + vault), credential, true, ""},
		"version":                         {tokens("api-version: '2018-*'"), token + vault, true, ""},
		"version_of_another_year":         {tokens("api-version: '2019-*'"), token + vault, false, ""},
		"version_missing":                 {tokens("api-version: '*'"), "/metadata/identity/oauth2/token?resource=" + vault, false, ""},
		"version_of_a_credential":         {tokens("api-version: '2.0'"), credential, true, ""},
		"version_one_of_two_is_another":   {tokens("api-version: '2.0'"), credential + "&api-version=2018-02-01", false, ""},
		"version_both_fit":                {tokens("api-version: ['2.0', 2018-02-01]"), credential + "&api-version=2018-02-01", true, ""},

		"identity_added":                    {onlyA, token + vault, true, "client_id " + idA},
		"identity_same":                     {onlyA, token + vault + "&client_id=" + strings.ToUpper(idA), true, ""},
		"identity_of_another_kind":          {onlyA, token + vault + "&object_id=" + idA, false, ""},
		"identity_of_another_value":         {onlyA, token + vault + "&client_id=" + idB, false, ""},
		"identity_added_to_a_post":          {onlyA, credential, true, "client_id " + idA},
		"identity_of_a_post":                {onlyA, credential + "&client_id=" + idB, false, ""},
		"identity_by_a_word_of_papers":      {onlyA, credential + "&uaid=" + idB, false, ""},
		"identity_by_two_words":             {onlyA, credential + "&uaid=" + idB + "&client_id=" + idA, false, ""},
		"default_by_a_word_of_papers":       {byDefault, credential + "&uaid=" + idA, false, ""},
		"any_by_a_word_of_papers":           {tokens("api-version: '*'"), credential + "&uaid=" + idB, true, ""},
		"identity_old_name_in_the_policy":   {byPath, token + vault + "&msi_res_id=" + armID, true, ""},
		"identity_old_name_in_the_request":  {byPath, token + vault + "&mi_res_id=" + strings.ToUpper(armID), true, ""},
		"identity_added_under_the_new_name": {byPath, token + vault, true, "msi_res_id " + armID},
		"default_is_for_those_without":      {byDefault, token + vault, true, ""},
		"default_is_not_for_a_name":         {byDefault, token + vault + "&client_id=" + idA, false, ""},
		"default_of_a_post":                 {byDefault, credential, true, ""},
		"no_identity_in_the_rule":           {tokens("resource: " + vault), token + vault + "&object_id=" + idB, true, ""},

		"first_allow_chooses":      {"rules: [{allow: [identity.token], identity: {client_id: " + idB + "}}, {allow: [identity.token], identity: {client_id: " + idA + "}}]", token + vault, true, "client_id " + idB},
		"second_allow_for_a_name":  {"rules: [{allow: [identity.token], identity: {client_id: " + idB + "}}, {allow: [identity.token], identity: {client_id: " + idA + "}}]", token + vault + "&client_id=" + idA, true, ""},
		"first_that_fits_chooses":  {"rules: [{allow: [identity.token], resource: x, identity: {client_id: " + idB + "}}, {allow: [identity.token], identity: {client_id: " + idA + "}}]", token + vault, true, "client_id " + idA},
		"short_form_is_first":      {"rules: [{allow: [identity.token], identity: {client_id: " + idB + "}}]\nallow: [identity.token]", token + vault, true, ""},
		"deny_beats_the_first":     {"rules: [{allow: [identity.token]}, {deny: [identity.token]}]", token + vault, false, ""},
		"deny_of_others_does_not":  {"rules: [{allow: [identity.token]}, {match: {name: db}, deny: [identity.token]}]", token + vault, true, ""},
		"deny_of_tokens_not_posts": {"rules: [{allow: [identity.credential]}, {deny: [identity.token]}]", credential, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			d := decide(t, tc.text, tc.request)
			got := strings.TrimSpace(d.Identity.Name + " " + d.Identity.Value)
			if d.Allow != tc.allow || got != tc.identity {
				t.Errorf("got allow %v, identity %q, want %v, %q: %s", d.Allow, got, tc.allow, tc.identity, d.Reason)
			}
		})
	}
}

// TestSubtrees has what of the instance document stays.
func TestSubtrees(t *testing.T) {
	const at, v = "/metadata/instance", "?api-version=2021-02-01"
	allow := func(subtrees string) string { return "rules: [{allow: [instance.read], subtree: [" + subtrees + "]}]" }
	deny := func(subtrees string) string {
		return "allow: [instance.read]\nrules: [{deny: [instance.read], subtree: [" + subtrees + "]}]"
	}
	tags := []string{"compute/tags", "compute/tagsList"}
	type list = []string
	for name, tc := range map[string]struct {
		text, path string
		allow      bool
		keep, drop list
	}{
		"allow_itself":             {allow("compute/tags"), "/compute/tags", true, nil, nil},
		"allow_by_the_other_name":  {allow("compute/tags"), "/compute/tagsList", true, nil, nil},
		"allow_below":              {allow("compute/osProfile"), "/compute/osProfile/adminUsername", true, nil, nil},
		"allow_in_other_case":      {allow("COMPUTE/OSPROFILE"), "/Compute/OsProfile/AdminUserName", true, nil, nil},
		"allow_below_an_index":     {allow("network/interface/ipv4"), "/network/interface/0/ipv4/ipAddress/1", true, nil, nil},
		"allow_above":              {allow("compute/vmId"), "/compute", true, list{"compute/vmId"}, nil},
		"allow_the_whole":          {allow("compute/tags"), "", true, tags, nil},
		"allow_beside":             {allow("compute/tags"), "/compute/vmId", false, nil, nil},
		"allow_of_a_longer_name":   {allow("compute/name"), "/compute/nameX", false, nil, nil},
		"allow_several":            {allow("compute/vmId, network"), "", true, list{"compute/vmId", "network"}, nil},
		"allow_one_in_the_other":   {allow("compute, compute/vmId"), "", true, list{"compute"}, nil},
		"allow_in_two_rules":       {"rules: [{allow: [instance.read], subtree: compute/vmId}, {allow: [instance.read], subtree: network}]", "", true, list{"compute/vmId", "network"}, nil},
		"allow_whole_in_the_next":  {"rules: [{allow: [instance.read], subtree: compute/vmId}, {allow: [instance.read]}]", "", true, nil, nil},
		"deny_itself":              {deny("compute/tags"), "/compute/tags", false, nil, nil},
		"deny_by_the_other_name":   {deny("compute/tags"), "/compute/tagsList/0/value", false, nil, nil},
		"deny_by_the_first_name":   {deny("compute/tagsList"), "/compute/tags", false, nil, nil},
		"deny_below":               {deny("compute/osProfile"), "/compute/osProfile/adminUsername", false, nil, nil},
		"deny_above":               {deny("compute/tags"), "/compute", true, nil, tags},
		"deny_above_by_old_names":  {deny("network/interface/macAddress"), "/network/interface/0", true, nil, list{"network/interface/macAddress", "network/interface/mac"}},
		"deny_old_name":            {deny("network/interface/macAddress"), "/network/interface/0/mac", false, nil, nil},
		"deny_beside":              {deny("compute/tags"), "/compute/vmId", true, nil, nil},
		"allow_and_deny_inside":    {allow("compute") + "\ndeny: []", "", true, list{"compute"}, nil},
		"deny_inside_an_allow":     {"rules: [{allow: [instance.read], subtree: compute}, {deny: [instance.read], subtree: compute/vmId}]", "", true, list{"compute"}, list{"compute/vmId"}},
		"deny_all_that_is_allowed": {"rules: [{allow: [instance.read], subtree: compute/vmId}, {deny: [instance.read], subtree: compute}]", "", false, nil, nil},
		"deny_some_that_is":        {"rules: [{allow: [instance.read], subtree: [compute/vmId, network]}, {deny: [instance.read], subtree: compute}]", "", true, list{"network"}, list{"compute"}},
		"deny_twice":               {deny("compute/tags, compute/tagsList"), "", true, nil, tags},
	} {
		t.Run(name, func(t *testing.T) {
			d := decide(t, tc.text, at+tc.path+v)
			if d.Allow != tc.allow {
				t.Fatalf("got %+v", d)
			}
			if diff := cmp.Diff(imds.Cut{Keep: tc.keep, Drop: tc.drop}, d.Cut); diff != "" {
				t.Errorf("cut (-want +got)\n%s", diff)
			}
		})
	}
}

// What comes along in an answer is asked about as well.
func TestBlank(t *testing.T) {
	const extended = "/metadata/instance?api-version=2021-02-01&extended=true"
	type actions = []imds.Action
	userdata, facts := imds.InstanceUserdata, imds.InstanceRead
	for name, tc := range map[string]struct {
		text, request string
		want          actions
	}{
		"userdata_in_the_document":  {"allow: [instance.read]", instance, actions{userdata}},
		"userdata_is_allowed":       {"allow: [instance.read, instance.userdata]", instance, nil},
		"userdata_is_denied":        {"allow: [instance.read, instance.userdata]\nrules: [{deny: [instance.userdata]}]", instance, actions{userdata}},
		"userdata_of_another":       {"allow: [instance.read]\nrules: [{match: {name: db}, allow: [instance.userdata]}]", instance, actions{userdata}},
		"userdata_of_a_version":     {"allow: [instance.read]\nrules: [{allow: [instance.userdata], api-version: '2018-*'}]", instance, actions{userdata}},
		"no_userdata_below":         {"allow: [instance.read]", "/metadata/instance/network?api-version=2021-02-01", nil},
		"facts_and_more":            {"allow: [instance.provisioning]", extended, actions{facts, userdata}},
		"facts_are_allowed":         {"allow: [instance.provisioning, instance.read]", extended, actions{userdata}},
		"facts_are_allowed_in_part": {"allow: [instance.provisioning, instance.userdata]\nrules: [{allow: [instance.read], subtree: compute}]", extended, actions{facts}},
		"facts_are_denied_in_part":  {"allow: [instance.provisioning, instance.userdata, instance.read]\nrules: [{deny: [instance.read], subtree: compute}]", extended, actions{facts}},
		"userdata_behind_the_facts": {"allow: [instance.provisioning, instance.userdata]", extended, actions{facts}},
		"nothing_if_all_is_denied":  {"allow: [instance.userdata]", instance, nil},
	} {
		t.Run(name, func(t *testing.T) {
			q := ask(t, tc.request)
			q.Covers = append(actions(nil), q.Covers...)
			covers := append(actions(nil), q.Covers...)
			d := force(t, tc.text).View(&web, workload.Listener).Decide(q)
			if diff := cmp.Diff(tc.want, d.Blank, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			_ = append(d.Blank, "appended") // must not reach into Covers
			if diff := cmp.Diff(covers, q.Covers, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("Covers was changed (-want +got)\n%s", diff)
			}
		})
	}
	q := imds.Query{Action: facts, Covers: actions{imds.VersionsRead, userdata, imds.EventsRead, "gpu.read"}}
	d := force(t, "allow: [instance.read, versions.read, events.read]").View(&web, workload.Listener).Decide(q)
	if diff := cmp.Diff(actions{userdata, "gpu.read"}, d.Blank); diff != "" {
		t.Errorf("not in a row (-want +got)\n%s", diff)
	}
}
