package policy_test

import (
	"fmt"
	"testing"

	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

// What is fetched ahead is what the workload would get, and nothing else.
func TestUsual(t *testing.T) {
	const id = "identity: {client_id: " + idA + "}"
	const want = "/metadata/identity/oauth2/token?api-version=2018-02-01&client_id=" + idA + "&resource=https%3A%2F%2Fvault.azure.net"
	rule := func(match, rest string) string {
		return "{match: {name: " + match + "}, allow: [identity.token], " + rest + "}"
	}
	pair := workload.Workload{ID: "a+b", Name: "web+db", Members: []workload.Workload{{ID: "a", Name: "web"}, {ID: "b", Name: "db"}}}
	for name, tc := range map[string]struct {
		w     workload.Workload
		rules string
		want  []string
	}{
		"named_identity":            {web, rule("web", "resource: https://vault.azure.net, "+id), []string{want}},
		"twice":                     {web, rule("web", "resource: https://vault.azure.net, "+id) + ", " + rule("w*", "resource: https://vault.azure.net, "+id), []string{want}},
		"default_identity":          {web, rule("web", "resource: https://vault.azure.net, identity: default"), nil},
		"any_identity":              {web, rule("web", "resource: https://vault.azure.net"), nil},
		"any_resource":              {web, rule("web", id), nil},
		"another_workload":          {web, rule("db", "resource: https://vault.azure.net, "+id), nil},
		"denied":                    {web, rule("web", "resource: https://vault.azure.net, "+id) + ", {deny: [identity.token]}", nil},
		"behind_the_default":        {web, rule("web", "identity: default") + ", " + rule("web", "resource: https://vault.azure.net, "+id), nil},
		"one_of_two_members":        {pair, rule("web", "resource: https://vault.azure.net, "+id), nil},
		"both_members":              {pair, rule("[web, db]", "resource: https://vault.azure.net, "+id), []string{want}},
		"members_that_do_not_agree": {pair, rule("web", "resource: https://vault.azure.net, "+id) + ", " + rule("db", "resource: https://vault.azure.net, identity: default"), nil},
	} {
		t.Run(name, func(t *testing.T) {
			v := force(t, "rules: ["+tc.rules+"]").View(&tc.w, workload.Listener)
			var got []string
			for _, q := range v.Usual() {
				got = append(got, q.Target())
			}
			if fmt.Sprint(got) != fmt.Sprint(tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
	if got := (*policy.Snapshot)(nil).View(&web, workload.Listener).Usual(); got != nil {
		t.Errorf("without a policy: got %v", got)
	}
}
