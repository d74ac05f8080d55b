package policy_test

import (
	"fmt"
	"strings"
	"testing"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

var shopWeb = workload.Workload{ID: "docker:1", Name: "shop-web-1", Image: "reg/shop/web:1", ImageID: digestA,
	Labels: map[string]string{workload.ComposeProject: "shop", workload.ComposeService: "web", "team": "shop"}}

// thousand are a thousand rules of one kind; line is the rule for a number.
func thousand(t testing.TB, line func(i int) string) *policy.Snapshot {
	t.Helper()
	var b strings.Builder
	b.WriteString("rules:\n")
	for i := range 1000 {
		b.WriteString("  - " + line(i) + "\n")
	}
	return force(t, b.String())
}

// large are policies of a thousand rules, with a request and whether it is allowed.
var large = []struct {
	name    string
	line    func(i int) string
	request string
	allowed bool
}{
	{"names", func(i int) string { return fmt.Sprintf("{match: {name: shop-web-%d}, allow: [identity.token]}", i) }, token + vault, true},
	{"globs", func(i int) string { return fmt.Sprintf("{match: {name: '*-w?b-%d'}, allow: [identity.token]}", i) }, token + vault, true},
	{"labels", func(i int) string {
		return fmt.Sprintf("{match: {labels: {team: [team%d, 's*p']}}, allow: [identity.token], resource: 'api://%d'}", i, i)
	}, token + "api://999", true},
	{"compose", func(i int) string {
		return fmt.Sprintf("{match: {compose: {project: shop, service: web%.*s}}, allow: [identity.token]}", i%3, "xyz")
	}, token + vault, true},
	{"one_each", func(i int) string {
		return fmt.Sprintf("{name: r%d, match: {name: shop-web-%d, proof: listener}, allow: [identity.token], resource: '%s', identity: {client_id: %s}}", i, i, vault, idA)
	}, token + vault, true},
	{"all_match_last_fits", func(i int) string {
		return fmt.Sprintf("{name: r%d, match: {name: shop-web-1}, allow: [identity.token], resource: 'https://vault%d.example.test', identity: {client_id: %s}}", i, i, idA)
	}, token + "https://VAULT999.example.test/", true},
	{"all_match_none_fits", func(i int) string {
		return fmt.Sprintf("{name: r%d, match: {name: shop-web-1}, allow: [identity.token], resource: 'https://vault%d.example.test', identity: {client_id: %s}}", i, i, idA)
	}, token + "https://vault.example.test", false},
	{"all_match_on_trial", func(i int) string {
		return fmt.Sprintf("{mode: audit, match: {name: shop-web-1}, allow: [identity.token], resource: 'https://vault%d.example.test'}", i)
	}, token + "https://vault.example.test", false},
	{"no_rule_for_the_action", func(i int) string { return fmt.Sprintf("{match: {name: shop-web-%d}, allow: [identity.token]}", i) }, "/metadata/versions", false},
	{"identities", func(i int) string {
		return fmt.Sprintf("{match: {name: shop-web-1}, allow: [identity.token], identity: {client_id: 11111111-2222-3333-4444-%012d}}", i)
	}, token + vault + "&client_id=11111111-2222-3333-4444-000000000999", true},
	{"versions", func(i int) string {
		return fmt.Sprintf("{match: {name: shop-web-1}, allow: [identity.token], api-version: '20%d-*'}", 1000+i)
	}, token + vault, false},
}

func BenchmarkDecide1000(b *testing.B) {
	for _, tc := range large {
		b.Run(tc.name, func(b *testing.B) {
			v, q := thousand(b, tc.line).View(&shopWeb, workload.Listener), ask(b, tc.request)
			if d := v.Decide(q); d.Allow != tc.allowed {
				b.Fatalf("got %+v", d)
			}
			b.ReportAllocs()
			for b.Loop() {
				v.Decide(q)
			}
		})
	}
}

func BenchmarkView1000(b *testing.B) {
	for _, tc := range large {
		b.Run(tc.name, func(b *testing.B) {
			s := thousand(b, tc.line)
			b.ReportAllocs()
			for b.Loop() {
				s.View(&shopWeb, workload.Listener)
			}
		})
	}
}

// A decision in the way of each request costs no memory, however many rules there
// are and whatever it is.
func TestDecideDoesNotAllocate(t *testing.T) {
	hold := func(name string, s *policy.Snapshot, w *workload.Workload, q imds.Query) {
		t.Helper()
		v := s.View(w, workload.Listener)
		if n := testing.AllocsPerRun(100, func() { v.Decide(q) }); n != 0 {
			t.Errorf("%s: got %v allocations, want 0", name, n)
		}
	}
	for _, tc := range large {
		hold(tc.name, thousand(t, tc.line), &shopWeb, ask(t, tc.request))
	}
	facts := force(t, "allow: [instance.read]\ndeny: [events.approve]\n")
	for _, request := range []string{instance, token + vault, "POST /metadata/scheduledevents?api-version=2020-07-01", "/metadata/nobody/knows"} {
		hold(request, facts, &web, ask(t, request))
		hold("mode off: "+request, force(t, "mode: 'off'"), &web, ask(t, request))
		hold("no policy: "+request, nil, &web, ask(t, request))
	}
	hold("an action of a later release", facts, &web, imds.Query{Action: "gpu.read"})
}
