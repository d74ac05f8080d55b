package policy_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

// aCase is a file with one case that is good but for what is given.
func aCase(keys string) string {
	return "cases:\n- {name: a, workload: {name: web}, request: GET /metadata/versions, want: allow, " + keys + "}\n"
}

func ofWorkload(keys string) string {
	return "cases:\n- {name: a, workload: {name: web, " + keys + "}, request: GET /metadata/versions, want: allow}\n"
}

func TestParseCases(t *testing.T) {
	got, err := policy.ParseCases("c.yaml", []byte(`cases:
  - name: web reads its vault
    workload: {name: web, compose: {project: shop, service: web}}
    request: GET /metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net
    want: allow
    identity: client_id=`+idA+`
  - name: all keys
    workload:
      name: pair
      proof: cgroup
      members:
        - {name: a, image: 'x:1', digest: '`+digestA+`', labels: {team: shop, empty: '', n: 1}, image-labels: {tier: front}}
        - {name: b, kubernetes: {namespace: prod, service-account: web, labels: {app: web}}}
    request: POST /metadata/scheduledevents?api-version=2020-07-01
    want: deny
    rule: nobody approves
    without: [instance.userdata, compute/tags]
    only: [Network]
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []policy.Case{
		{Name: "web reads its vault", Line: 2, Proof: workload.Listener, Method: "GET", Target: "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net",
			Workload: workload.Workload{Name: "web", Labels: map[string]string{workload.ComposeProject: "shop", workload.ComposeService: "web"}}, Want: "allow", Identity: "client_id=" + idA},
		{Name: "all keys", Line: 7, Proof: workload.Cgroup, Method: "POST", Target: "/metadata/scheduledevents?api-version=2020-07-01", Want: "deny", Rule: "nobody approves",
			Without: []string{"compute/tags", "compute/tagsList", "instance.userdata"}, Only: []string{"network"},
			Workload: workload.Workload{Name: "pair", Members: []workload.Workload{
				{Name: "a", Image: "x:1", ImageID: digestA, Labels: map[string]string{"team": "shop", "empty": "", "n": "1"}, ImageLabels: map[string]string{"tier": "front"}},
				{Name: "b", Pod: &workload.Pod{Namespace: "prod", ServiceAccount: "web", Labels: map[string]string{"app": "web"}}},
			}}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

var wrongCases = map[string]struct{ text, want string }{
	"empty":                  {"", "c.yaml:1: empty: want the key cases"},
	"no_cases":               {"{}", "c.yaml:1: cases: want at least one: a test of nothing proves nothing"},
	"empty_cases":            {"cases: []", "c.yaml:1: cases: want at least one: a test of nothing proves nothing"},
	"a_policy":               {"allow: [versions.read]", `c.yaml:1: cases file: unknown key "allow": want cases`},
	"case_is_a_word":         {"cases: [a]", `c.yaml:1: case: want a mapping with the keys name, workload, request, want, identity, rule, without or only, got "a"`},
	"no_want":                {"cases:\n- {name: a, workload: {name: a}, request: GET /metadata/versions}", "c.yaml:2: case: want the key want"},
	"no_name":                {"cases:\n- {workload: {name: a}, request: GET /metadata/versions, want: deny}", "c.yaml:2: case: want the key name"},
	"unknown_key":            {aCase("wants: deny"), `c.yaml:2: case: unknown key "wants": want name, workload, request, want, identity, rule, without or only`},
	"want_of_nobody":         {"cases: [{want: maybe}]", `c.yaml:1: want: want allow, deny or refuse, got "maybe"`},
	"want_is_a_list":         {"cases: [{want: [allow]}]", `c.yaml:1: want: want allow, deny or refuse, got a list`},
	"request_without_method": {"cases: [{request: /metadata/versions}]", `c.yaml:1: request: want a method and a path, like GET /metadata/instance?api-version=2021-02-01, got "/metadata/versions"`},
	"request_is_a_url":       {"cases: [{request: 'GET http://169.254.169.254/metadata'}]", `c.yaml:1: request: want a method and a path, like GET /metadata/instance?api-version=2021-02-01, got "GET http://169.254.169.254/metadata"`},
	"request_with_protocol":  {"cases: [{request: GET /metadata HTTP/1.1}]", `c.yaml:1: request: want a method and a path, like GET /metadata/instance?api-version=2021-02-01, got "GET /metadata HTTP/1.1"`},
	"without_is_a_word":      {aCase("without: compute"), `c.yaml:2: without: want a list of parts of an answer, got "compute"`},
	"workload_without_name":  {"cases: [{workload: {image: x}}]", "c.yaml:1: workload: want the key name"},
	"member_without_name":    {ofWorkload("members: [{image: x}]"), "c.yaml:2: workload: want the key name"},
	"member_with_proof":      {ofWorkload("members: [{name: b, proof: none}]"), `c.yaml:2: workload: unknown key "proof": want name, image, digest, labels, image-labels, compose or kubernetes`},
	"member_with_members":    {ofWorkload("members: [{name: b, members: []}]"), `c.yaml:2: workload: unknown key "members": want name, image, digest, labels, image-labels, compose or kubernetes`},
	"half_of_compose":        {ofWorkload("compose: {project: shop}"), "c.yaml:2: compose: want both project and service"},
	"compose_of_nothing":     {ofWorkload("compose: {}"), "c.yaml:2: compose: want both project and service"},
	"proof_of_nobody":        {ofWorkload("proof: sure"), `c.yaml:2: proof: want none, address, endpoint, cgroup or listener, got "sure"`},
	"labels_as_a_list":       {ofWorkload("labels: [a]"), "c.yaml:2: labels: want a mapping of labels, got a list"},
	"label_without_value":    {ofWorkload("labels: {a: }"), `c.yaml:2: labels: want texts, got "a": nothing`},
	"label_twice":            {ofWorkload("labels: {a: b, a: c}"), `c.yaml:2: labels: "a" again: want it once`},
	"label_merge":            {ofWorkload("labels: {<<: {a: b}}"), `c.yaml:2: labels: want texts, got "<<": a mapping`},
	"label_merge_of_a_text":  {ofWorkload("labels: {<<: a}"), `c.yaml:2: labels: want texts, got "<<": "a"`},
	"label_of_a_list":        {ofWorkload("image-labels: {a: [b]}"), `c.yaml:2: image-labels: want texts, got "a": a list`},
}

func TestParseCasesRefuses(t *testing.T) {
	for name, tc := range wrongCases {
		t.Run(name, func(t *testing.T) {
			cases, err := policy.ParseCases("c.yaml", []byte(tc.text))
			if err == nil || cases != nil {
				t.Fatalf("got %v, %v, want an error and no cases", cases, err)
			}
			if got := err.Error(); got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

// TestRunCases has cases that are as wanted, and what is said of those that are not.
func TestRunCases(t *testing.T) {
	s := force(t, "allow: [versions.read, instance.read]\nrules:\n- {name: vault, match: {name: web}, allow: [identity.token], identity: {client_id: "+idB+"}}\n- {name: tags, deny: [instance.read], subtree: compute/tags}\n")
	get := func(target string) policy.Case {
		return policy.Case{Name: "c", Line: 3, Workload: workload.Workload{Name: "web"}, Proof: workload.Listener, Method: "GET", Target: target}
	}
	with := func(c policy.Case, edit func(*policy.Case)) policy.Case { edit(&c); return c }
	want := func(w string) func(*policy.Case) { return func(c *policy.Case) { c.Want = w } }
	for name, tc := range map[string]struct {
		c     policy.Case
		wrong string // "" if it is as wanted
	}{
		"allowed":             {with(get("/metadata/versions"), want("allow")), ""},
		"denied":              {with(get("/metadata/scheduledevents?api-version=2020-07-01"), want("deny")), ""},
		"refused":             {with(get("/metadata//versions"), want("refuse")), ""},
		"refused_method":      {with(get("/metadata/versions"), func(c *policy.Case) { c.Want, c.Method = "refuse", "PUT" }), ""},
		"denied_not_refused":  {with(get("/metadata/nobody"), want("refuse")), "got deny, want refuse; unknown is every"},
		"refused_not_denied":  {with(get("/metadata//versions"), want("deny")), "got refuse, want deny; "},
		"allowed_not_denied":  {with(get("/metadata/versions"), want("deny")), "got allow, want deny; versions.read is allowed by the list allow"},
		"identity":            {with(get(token+vault), func(c *policy.Case) { c.Want, c.Identity = "allow", "client_id="+strings.ToUpper(idB) }), ""},
		"another_identity":    {with(get(token+vault), func(c *policy.Case) { c.Want, c.Identity = "allow", "default" }), `got identity "client_id=` + idB + `", want "default"; `},
		"no_identity":         {with(get("/metadata/versions"), func(c *policy.Case) { c.Want, c.Identity = "allow", "default" }), `got identity "", want "default"; `},
		"rule":                {with(get(token+vault), func(c *policy.Case) { c.Want, c.Rule = "allow", "vault" }), ""},
		"another_rule":        {with(get("/metadata/versions"), func(c *policy.Case) { c.Want, c.Rule = "allow", "vault" }), `got rule p.yaml:1, want "vault"; `},
		"end_of_a_rules_name": {with(get(token+vault), func(c *policy.Case) { c.Want, c.Rule = "allow", "ault" }), `got rule p.yaml:3 "vault", want "ault"; `},
		"without": {with(get(instance), func(c *policy.Case) {
			c.Want, c.Without = "allow", []string{"compute/tags", "compute/tagsList", "instance.userdata"}
		}), ""},
		"without_of_no_concern": {with(get(instance), want("allow")), ""},
		"without_nothing":       {with(get(instance), func(c *policy.Case) { c.Want, c.Without = "allow", []string{} }), "got an answer without [compute/tags compute/tagsList instance.userdata], want without []; "},
		"two_things_wrong":      {with(get(token+vault), func(c *policy.Case) { c.Want, c.Rule = "deny", "x" }), `got allow, want deny; got rule p.yaml:3 "vault", want "x"; `},
	} {
		t.Run(name, func(t *testing.T) {
			got := tc.c.Run(s, imds.Azure)
			if tc.wrong == "" && got.Wrong != "" || tc.wrong != "" && !strings.HasPrefix(got.Wrong, tc.wrong) || got.OK != (got.Wrong == "") {
				t.Errorf("got %q, want %q", got.Wrong, tc.wrong)
			}
			if got.Case != "c" || got.Line != 3 || got.Explanation.Rules == nil || got.Explanation.Reason == "" {
				t.Errorf("got %+v", got)
			}
		})
	}
}

// What an allowed document loses to Keep is known by Keep alone; cases tell of it by
// what was asked for.
func TestCasesHaveAllOfARequest(t *testing.T) {
	cases, err := policy.ParseCases("c.yaml", []byte("cases: [{name: p, workload: {name: p, members: [{name: a}, {name: b}]}, request: GET /metadata/versions, want: deny}]"))
	if err != nil {
		t.Fatal(err)
	}
	r := cases[0].Run(force(t, "rules: [{match: {name: a}, allow: [versions.read]}]"), imds.Azure)
	if !r.OK || r.Explanation.Member != "b" || !slices.ContainsFunc(r.Explanation.Rules, func(c policy.Considered) bool { return c.Member == "a" && c.Says == "applies" }) {
		t.Errorf("got %+v", r)
	}
}

// Parts of an answer are named as rules name them: one name of data stands for all.
func TestCasesAboutParts(t *testing.T) {
	s := force(t, "rules: [{allow: [instance.read], subtree: [compute, network]}, {deny: [instance.read], subtree: compute/tags}]")
	for keys, wrong := range map[string]string{
		"": "",
		"only: [network, compute], without: [compute/tags, instance.userdata]": "",
		"only: [compute, network]": "",
		"only: [Network, COMPUTE], without: [instance.userdata, compute/tagsList]": "",
		"only: [compute]": "got only [compute network] of the answer, want only [compute]; ",
		"only: []":        "got only [compute network] of the answer, want only []; ",
		"without: [compute/tags, instance.userdata]":   "got only [compute network] of the answer, want only []; ",
		"only: [compute, network], without: [network]": "got an answer without [compute/tags compute/tagsList instance.userdata], want without [network]; ",
	} {
		text := "cases: [{name: a, workload: {name: web}, request: 'GET " + instance + "', want: allow, " + keys + "}]"
		cases, err := policy.ParseCases("c.yaml", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if got := cases[0].Run(s, imds.Azure).Wrong; !strings.HasPrefix(got, wrong) || wrong == "" && got != "" {
			t.Errorf("%s: got %q, want %q", keys, got, wrong)
		}
	}
}
