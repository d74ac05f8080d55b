package policy_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

func TestLearn(t *testing.T) {
	shop := composed("shop", "web")
	pair := workload.Workload{Name: "pair", Members: []workload.Workload{{Name: "b"}, {Name: "a"}, {Name: "a"}}}
	namespaced := workload.Workload{Name: "p", Pod: &workload.Pod{Namespace: "prod", ServiceAccount: "web"}}
	q := func(request string) imds.Query { return ask(t, request) }
	seen := []policy.Seen{
		{Workload: shop, Query: q(token + vault), Identity: "client_id=" + idB},
		{Workload: shop, Query: q(token + storage + "&client_id=" + idA), Identity: "client_id=" + idA},
		{Workload: shop, Query: q(token + "api://1234"), Identity: "default"},
		{Workload: shop, Query: q("POST /metadata/identity/issuecredential?cred-api-version=2.0"), Identity: "default"},
		{Workload: shop, Query: q("/metadata/instance/compute/vmId?api-version=2021-02-01")},
		{Workload: shop, Query: q("/metadata/instance/network/interface/0?api-version=2021-02-01")},
		{Workload: web, Query: q("/metadata/instance/compute/vmId?api-version=2021-02-01")},
		{Workload: web, Query: q(instance)},
		{Workload: web, Query: q("/metadata/versions")},
		{Workload: web, Query: q("/metadata/nobody/knows")},
		{Workload: pair, Query: q("/metadata/versions")},
		{Workload: namespaced, Query: q("POST /metadata/scheduledevents?api-version=2020-07-01")},
		{Workload: workload.Workload{Name: "10.0.0.7"}, Query: q("/metadata/versions")},
	}
	want := `# Learned from what was asked for: read it before it is put to use.
mode: enforce
rules:
  - match: {compose: {project: shop, service: web}}
    allow: [instance.read]
    subtree: [compute/vmId, network/interface]
  - match: {compose: {project: shop, service: web}}
    allow: [identity.token]
    resource: ["api://1234"]
    identity: default
  - match: {compose: {project: shop, service: web}}
    allow: [identity.token]
    resource: [https://vault.azure.net]
    identity: {client_id: ` + idB + `}
  - match: {compose: {project: shop, service: web}}
    allow: [identity.token]
    resource: [https://storage.azure.com]
    identity: {client_id: "` + idA + `"}
  - match: {compose: {project: shop, service: web}}
    allow: [identity.credential]
    identity: default
  - match: {kubernetes: {namespace: prod, service-account: web}}
    allow: [events.approve]
  - match: {name: "10.0.0.7"}
    allow: [versions.read]
  - match: {name: [a, b], shared: true}
    allow: [versions.read]
  - match: {name: web}
    allow: [versions.read, instance.read]
`
	want = strings.ReplaceAll(want, `"api://1234"`, "api://1234")
	if got := string(policy.Learn(seen)); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	slices.Reverse(seen)
	if got := string(policy.Learn(seen)); got != want {
		t.Errorf("in another order: got\n%s", got)
	}
	if again := string(policy.Learn(append(seen, seen...))); again != want {
		t.Errorf("everything twice: got\n%s", again)
	}
}

// What a policy has no word for is left out, and whoever asks for it does not spoil
// what is learned of others.
func TestLearnLeavesOut(t *testing.T) {
	const nothing = "# Learned from what was asked for: read it before it is put to use.\nmode: enforce\nrules: []\n"
	q := func(request string) imds.Query { return ask(t, request) }
	resource := func(s string) imds.Query {
		return imds.Query{Action: imds.IdentityToken, Params: []imds.Param{{Name: "resource", Value: s}}}
	}
	for name, s := range map[string]policy.Seen{
		"unknown":                  {Workload: web, Query: q("/metadata/nobody/knows")},
		"no_action":                {Workload: web},
		"action_of_a_later_time":   {Workload: web, Query: imds.Query{Action: "gpu.read"}},
		"undocumented_part":        {Workload: web, Query: q("/metadata/instance/compute/newer?api-version=2021-02-01")},
		"part_of_tags":             {Workload: web, Query: q("/metadata/instance/compute/tagsList/0/name?api-version=2021-02-01")},
		"resource_empty":           {Workload: web, Query: q(token)},
		"resource_missing":         {Workload: web, Query: q("/metadata/identity/oauth2/token?api-version=2018-02-01")},
		"resource_hidden":          {Workload: web, Query: q("/metadata/identity/oauth2/token?api-version=2018-02-01"), Hidden: []string{"resource"}},
		"resource_with_a_star":     {Workload: web, Query: q(token + "*")},
		"resource_of_a_kilobyte":   {Workload: web, Query: resource(strings.Repeat("r", 1025))},
		"resource_of_no_text":      {Workload: web, Query: resource("\xff")},
		"identity_of_no_kind":      {Workload: web, Query: q(token + vault), Identity: "principal=" + idA},
		"identity_is_no_guid":      {Workload: web, Query: q(token + vault + "&client_id=web"), Identity: "client_id=web"},
		"identity_hidden":          {Workload: web, Query: q(token + vault), Identity: "default", Hidden: []string{"msi_res_id"}},
		"identity_by_another_word": {Workload: web, Query: q("POST /metadata/identity/issuecredential?uaid=" + idA), Identity: "default"},
		"identity_word_is_hidden":  {Workload: web, Query: q("POST /metadata/identity/issuecredential"), Identity: "default", Hidden: []string{"uaid"}},
		"name_that_is_a_pattern":   {Workload: workload.Workload{Name: "*"}, Query: q("/metadata/versions")},
		"no_name":                  {Query: q("/metadata/versions")},
		"long_name":                {Workload: workload.Workload{Name: strings.Repeat("n", 1025)}, Query: q("/metadata/versions")},
		"member_is_a_pattern":      {Workload: workload.Workload{Name: "p", Members: []workload.Workload{{Name: "a"}, {Name: "w?b"}}}, Query: q("/metadata/versions")},
		"service_is_a_pattern":     {Workload: composed("shop", "*"), Query: q("/metadata/versions")},
		"namespace_is_a_pattern":   {Workload: pod("*", "web"), Query: q("/metadata/versions")},
		"account_is_a_pattern":     {Workload: pod("prod", "w*"), Query: q("/metadata/versions")},
	} {
		t.Run(name, func(t *testing.T) {
			if got := string(policy.Learn([]policy.Seen{s})); got != nothing {
				t.Errorf("got\n%s", got)
			}
			text := policy.Learn([]policy.Seen{s, {Workload: workload.Workload{Name: "good"}, Query: q("/metadata/versions")}})
			if p := parse(t, string(text)); p.Len() != 1 {
				t.Errorf("got\n%s", text)
			}
		})
	}
	if got := string(policy.Learn(nil)); got != nothing {
		t.Errorf("of nothing: got\n%s", got)
	}
}

// A caller that names no identity gets again what it got, whatever it named at other
// times: the order of the rules sees to it.
func TestLearnKeepsTheChoiceOfIdentity(t *testing.T) {
	for _, got := range []string{"default", "client_id=" + idA, "client_id=" + idB} {
		seen := []policy.Seen{
			{Workload: web, Query: ask(t, token+vault), Identity: got},
			{Workload: web, Query: ask(t, token+vault+"&client_id="+idA), Identity: "client_id=" + idA},
			{Workload: web, Query: ask(t, token+vault+"&client_id="+idB), Identity: "client_id=" + idB},
		}
		q := ask(t, token+vault)
		d := force(t, string(policy.Learn(seen))).View(&web, workload.Listener).Decide(q)
		if !d.Allow || policy.Effective(q, d) != got {
			t.Errorf("got %s, then %+v", got, d)
		}
	}
}

// A flood of resources is bounded, and those that stay are the same in any order.
func TestLearnIsNotFlooded(t *testing.T) {
	var seen []policy.Seen
	for i := range 500 {
		seen = append(seen, policy.Seen{Workload: web, Query: ask(t, fmt.Sprintf("%sapi%%3A%%2F%%2F%03d", token, i)), Identity: "default"},
			policy.Seen{Workload: web, Query: ask(t, token+vault), Identity: fmt.Sprintf("client_id=11111111-2222-3333-4444-%012d", i+1)})
	}
	text := string(policy.Learn(seen))
	if p := parse(t, text); p.Len() > 70 || strings.Count(text, "api://") != 64 {
		t.Errorf("got %d rules:\n%s", p.Len(), text)
	}
	slices.Reverse(seen)
	if again := string(policy.Learn(seen)); again != text {
		t.Errorf("in another order: got\n%s\nwant\n%s", again, text)
	}
}

// seenBy is what a caller asked for, as far as rules have words for it.
type seenBy struct{ actions, subtrees, grants []string }

func (b *seenBy) add(q imds.Query, identity string) {
	switch {
	case imds.TakesSelector(q.Action):
		b.grants = append(b.grants, grantOf(q)+strings.ToLower(identity))
	case q.Action == imds.InstanceRead && q.Subtree != "":
		b.subtrees = append(b.subtrees, q.Subtree)
	default:
		b.actions = append(b.actions, string(q.Action))
	}
}

func grantOf(q imds.Query) string { return string(q.Action) + " " + plain(param(q, "resource")) + " " }

// mayBe reports whether a request is no more than what was seen.
func (b *seenBy) mayBe(q imds.Query) bool {
	switch {
	case imds.TakesSelector(q.Action):
		named := selected(q)
		return slices.ContainsFunc(b.grants, func(g string) bool {
			return strings.HasPrefix(g, grantOf(q)) && (named == "" || strings.HasSuffix(g, " "+named))
		})
	case q.Action == imds.InstanceRead && !contains(b.actions, string(q.Action)):
		return slices.ContainsFunc(b.subtrees, func(s string) bool {
			return under(q.Subtree, s) || under(s, q.Subtree) || synonyms[s] != "" && (under(q.Subtree, synonyms[s]) || under(synonyms[s], q.Subtree))
		})
	}
	return contains(b.actions, string(q.Action))
}

// What was seen is allowed, and nothing else is.
func TestLearnAllowsWhatWasSeenAndNoMore(t *testing.T) {
	who := []workload.Workload{{Name: "web"}, {Name: "db"}, composed("shop", "web"), composed("shop", "db"), pod("prod", "web"), pod("prod", "db"), {Name: "10.0.0.7"},
		{Name: "pair", Members: []workload.Workload{{Name: "a"}, {Name: "b"}}}}
	who[4].Name, who[5].Name = "pod-web", "pod-db"
	allowed, denied := 0, 0
	for seed := range uint64(800) {
		g := newGen(seed)
		var seen []policy.Seen
		by := make(map[string]*seenBy)
		unnamed := make(map[string][]string) // identities that callers without a name got
		for range g.IntN(12) {
			w, q := pick(g, who...), ask(t, g.request())
			s := policy.Seen{Workload: w, Query: q}
			if imds.TakesSelector(q.Action) {
				s.Identity = policy.Effective(q, policy.Decision{})
				if _, named := q.Selector(); !named {
					s.Identity = pick(g, "default", "client_id="+idA, "client_id="+idB)
				}
			}
			seen = append(seen, s)
			_, stray := q.Param("uaid")
			bad := q.Action == imds.Unknown || stray || strings.HasPrefix(q.Subtree, "compute/newer") || strings.HasPrefix(q.Subtree, "compute/tagsList/")
			if bad {
				continue
			}
			if by[w.Name] == nil {
				by[w.Name] = new(seenBy)
			}
			by[w.Name].add(q, s.Identity)
			if _, named := q.Selector(); imds.TakesSelector(q.Action) && !named {
				key := w.Name + grantOf(q)
				unnamed[key] = append(unnamed[key], s.Identity)
			}
		}
		text := string(policy.Learn(seen))
		snapshot := force(t, text)
		check := func(w workload.Workload, q imds.Query) {
			d := snapshot.View(&w, workload.Listener).Decide(q)
			_, stray := q.Param("uaid")
			want := by[w.Name] != nil && !stray && by[w.Name].mayBe(q)
			if d.Allow != want {
				t.Fatalf("seed %d: %s asks for %s: got %+v, want allow %v by\n%s", seed, w.Name, q.Target(), d, want, text)
			}
			key := w.Name + grantOf(q)
			if _, named := q.Selector(); d.Allow && !named && unnamed[key] != nil && !contains(unnamed[key], policy.Effective(q, d)) {
				t.Fatalf("seed %d: %s asks for %s as %s, got %v before:\n%s", seed, w.Name, q.Target(), policy.Effective(q, d), unnamed[key], text)
			}
			if d.Allow {
				allowed++
			} else {
				denied++
			}
		}
		for i := range seen {
			check(seen[i].Workload, seen[i].Query)
		}
		for range 10 {
			check(pick(g, who...), ask(t, g.request()))
		}
	}
	t.Logf("%d allowed, %d denied", allowed, denied)
	if allowed < 1000 || denied < 1000 {
		t.Error("the generator is broken")
	}
}
