package policy_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

func TestExplain(t *testing.T) {
	s := force(t, "allow: [instance.read]\nrules:\n"+
		"- {name: vault, match: {name: web}, allow: [identity.token], resource: "+vault+", identity: {client_id: "+idA+"}}\n"+
		"- {match: {name: db}, allow: [identity.token]}\n"+
		"- {mode: 'off', deny: [identity.token]}\n"+
		"- {match: {labels: {team: shop}}, allow: [identity.token]}\n"+
		"- {match: {compose: {project: shop}}, allow: [identity.token]}\n"+
		"- {match: {labels: {team: ops}}, deny: [identity.token]}\n"+
		"- {deny: [instance.read], subtree: compute/tags}\n"+
		"- {allow: [identity.token], api-version: '2019-*', mode: audit}\n")
	w := imageClaims("shop", "web")
	w.Name, w.ImageLabels["team"] = "web", "shop"
	got := s.Explain(&w, workload.Cgroup, ask(t, token+vault))
	want := policy.Explanation{
		Workload: "web", Proof: "cgroup", Method: "GET", Target: "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + vault, Action: imds.IdentityToken,
		Decision: "allow", Rule: `p.yaml:3 "vault"`, Reason: `identity.token is allowed by rule "vault"`, Mode: policy.Enforce, Snapshot: 1, Identity: "client_id=" + idA,
		Rules: []policy.Considered{
			{Rule: `p.yaml:3 "vault"`, Effect: "allow", Mode: policy.Enforce, Says: "applies"},
			{Rule: "p.yaml:4", Effect: "allow", Mode: policy.Enforce, Says: "does not match: name"},
			{Rule: "p.yaml:5", Effect: "deny", Mode: policy.Off, Says: "its mode is off"},
			{Rule: "p.yaml:6", Effect: "allow", Mode: policy.Enforce, Says: "does not match: labels (team comes with the image, and an image grants nothing)"},
			{Rule: "p.yaml:7", Effect: "allow", Mode: policy.Enforce, Says: "does not match: compose (it comes with the image, and an image grants nothing)"},
			{Rule: "p.yaml:8", Effect: "deny", Mode: policy.Enforce, Says: "does not match: labels"},
			{Rule: "p.yaml:10", Effect: "allow", Mode: policy.Audit, Says: "is for api-version 2019-* only"},
		},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}

	for request, says := range map[string]map[string]string{
		token + storage:                     {"p.yaml:3": "is for the resource https://vault.azure.net only"},
		token + vault + "&object_id=" + idA: {"p.yaml:3": "is for the identity client_id " + idA + " only"},
		instance:                            {"p.yaml:1": "applies", "p.yaml:9": "applies to a part of the answer"},
		"/metadata/instance/compute/vmId?api-version=2021-02-01": {"p.yaml:9": "is for another part of the document"},
		"/metadata/instance/compute/tags?api-version=2021-02-01": {"p.yaml:9": "applies"},
	} {
		e := s.Explain(&w, workload.Listener, ask(t, request))
		for rule, want := range says {
			got := ""
			for _, r := range e.Rules {
				if r.Rule == rule || strings.HasPrefix(r.Rule, rule+" ") {
					got = r.Says
				}
			}
			if got != want {
				t.Errorf("%s: %s says %q, want %q", request, rule, got, want)
			}
		}
	}
}

func TestExplainNamesMembers(t *testing.T) {
	s := force(t, "rules: [{match: {name: a, shared: true}, allow: [instance.read], subtree: compute}, {match: {name: b}, allow: [instance.read]}]")
	w := workload.Workload{Name: "pair", Members: []workload.Workload{{Name: "a"}, {Name: "b"}}}
	e := s.Explain(&w, workload.Listener, ask(t, instance))
	want := []policy.Considered{
		{Rule: "p.yaml:1", Member: "a", Effect: "allow", Mode: policy.Enforce, Says: "applies to a part of the answer"},
		{Rule: "p.yaml:1", Member: "b", Effect: "allow", Mode: policy.Enforce, Says: "does not match: name"},
		{Rule: "p.yaml:1", Member: "a", Effect: "allow", Mode: policy.Enforce, Says: "does not match: name"},
		{Rule: "p.yaml:1", Member: "b", Effect: "allow", Mode: policy.Enforce, Says: "applies"},
	}
	if d := cmp.Diff(want, e.Rules); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if e.Workload != "pair" || e.Member != "a" || !cmp.Equal(e.Keep, []string{"compute"}) || !cmp.Equal(e.Without, []imds.Action{imds.InstanceUserdata}) {
		t.Errorf("got %+v", e)
	}
	b, err := json.Marshal(e)
	if err != nil || !strings.Contains(string(b), `"keep":["compute"],"rules":[{"rule":"p.yaml:1","member":"a","effect":"allow","mode":"enforce","says":`) {
		t.Errorf("got %s, %v", b, err)
	}
}

func TestEffective(t *testing.T) {
	id := imds.Param{Name: "client_id", Value: idA}
	for name, tc := range map[string]struct {
		request string
		adds    imds.Param
		want    string
	}{
		"named":             {token + vault + "&object_id=" + idB, imds.Param{}, "object_id=" + idB},
		"named_beside_adds": {token + vault + "&object_id=" + idB, id, "object_id=" + idB},
		"added":             {token + vault, id, "client_id=" + idA},
		"neither":           {token + vault, imds.Param{}, "default"},
		"old_name":          {token + vault + "&mi_res_id=x", imds.Param{}, "msi_res_id=x"},
	} {
		if got := policy.Effective(ask(t, tc.request), policy.Decision{Identity: tc.adds}); got != tc.want {
			t.Errorf("%s: got %s, want %s", name, got, tc.want)
		}
	}
}
