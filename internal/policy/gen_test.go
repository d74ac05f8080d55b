package policy_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

const (
	idA      = "11111111-2222-3333-4444-555555555555"
	idB      = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
	armID    = "/subscriptions/11111111-2222-3333-4444-555555555555/resourceGroups/rg/providers/Microsoft.ManagedIdentity/userAssignedIdentities/web"
	vault    = "https://vault.azure.net"
	storage  = "https://storage.azure.com"
	digestA  = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	digestB  = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	instance = "/metadata/instance?api-version=2021-02-01"
	token    = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource="
)

func parse(t testing.TB, text string) *policy.Policy {
	t.Helper()
	p, err := policy.Parse("p.yaml", []byte(text))
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return p
}

// force puts a policy in force.
func force(t testing.TB, text string) *policy.Snapshot {
	t.Helper()
	return new(policy.Current).Set(parse(t, text))
}

// ask is a request as the gate classifies it: a target, or a method and a target.
func ask(t testing.TB, request string) imds.Query {
	t.Helper()
	method, target, ok := strings.Cut(request, " ")
	if !ok {
		method, target = "GET", request
	}
	q, f := imds.Canonical(imds.Azure, method, target)
	if f != nil {
		t.Fatalf("%s: %v", request, f)
	}
	return q
}

var web = workload.Workload{ID: "static:web", Name: "web"}

func decide(t testing.TB, text, request string) policy.Decision {
	t.Helper()
	return force(t, text).View(&web, workload.Listener).Decide(ask(t, request))
}

// spec is a policy before it is text.
type spec struct {
	Mode  string     `json:"mode,omitempty"`
	Allow []string   `json:"allow,omitempty"`
	Deny  []string   `json:"deny,omitempty"`
	Rules []ruleSpec `json:"rules,omitempty"`
}

type ruleSpec struct {
	Name     string     `json:"name,omitempty"`
	Mode     string     `json:"mode,omitempty"`
	Match    *matchSpec `json:"match,omitempty"`
	Allow    []string   `json:"allow,omitempty"`
	Deny     []string   `json:"deny,omitempty"`
	Resource []string   `json:"resource,omitempty"`
	Version  []string   `json:"api-version,omitempty"`
	Subtree  []string   `json:"subtree,omitempty"`
	Identity any        `json:"identity,omitempty"` // "default" or a mapping with one key
}

type matchSpec struct {
	Name       []string            `json:"name,omitempty"`
	Image      []string            `json:"image,omitempty"`
	Digest     []string            `json:"digest,omitempty"`
	Labels     map[string][]string `json:"labels,omitempty"`
	Compose    *composeSpec        `json:"compose,omitempty"`
	Kubernetes *podSpec            `json:"kubernetes,omitempty"`
	Shared     *bool               `json:"shared,omitempty"`
	Proof      string              `json:"proof,omitempty"`
}

type composeSpec struct {
	Project []string `json:"project,omitempty"`
	Service []string `json:"service,omitempty"`
}

type podSpec struct {
	Namespace []string            `json:"namespace,omitempty"`
	Account   []string            `json:"service-account,omitempty"`
	Labels    map[string][]string `json:"labels,omitempty"`
}

// text writes the policy: JSON is YAML, but for a letter that YAML takes for the
// end of a line.
func (s spec) text() string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return strings.ReplaceAll(string(b), "\u0085", `\u0085`)
}

func (s spec) clone() spec {
	var out spec
	if err := json.Unmarshal([]byte(s.text()), &out); err != nil {
		panic(err)
	}
	return out
}

// gen makes policies, workloads and queries out of small pools, so that they meet.
type gen struct{ *rand.Rand }

func newGen(seed uint64) gen { return gen{rand.New(rand.NewPCG(seed, 7))} }

func pick[T any](g gen, pool ...T) T { return pool[g.IntN(len(pool))] }

func (g gen) one(in int) bool { return g.IntN(in) == 0 }

// some picks at least one.
func (g gen) some(most int, pool ...string) (out []string) {
	for _, i := range g.Perm(len(pool))[:1+g.IntN(most)] {
		out = append(out, pool[i])
	}
	return out
}

var (
	subtreePool = []string{"compute", "network", "compute/tags", "compute/tagsList", "compute/osProfile", "compute/osProfile/adminUsername", "compute/vmId", "network/interface/ipv4",
		"network/interface/mac", "network/interface/ipv4/ipAddress/privateIpAddress"}
	resourcePool = []string{vault, "HTTPS://VAULT.azure.net/", storage, "api://x/", "https://vault.azure.net/secrets"}
	actionPool   = []string{"instance.read", "identity.token", "instance.userdata", "identity.credential", "instance.provisioning", "versions.read", "events.approve"}
)

func (g gen) match() *matchSpec {
	m := new(matchSpec)
	if g.one(2) {
		m.Name = g.some(2, "web", "web-?", "w*", "db", "*")
	}
	if g.one(6) {
		m.Image = g.some(2, "reg/web:*", "reg/db:1", "*")
	}
	if g.one(8) {
		m.Digest = g.some(1, digestA, digestB)
	}
	if g.one(4) {
		m.Labels = map[string][]string{pick(g, "team", "tier"): g.some(2, "shop", "s*", "ops")}
	}
	if g.one(5) {
		m.Compose = &composeSpec{Project: g.some(1, "shop", "*"), Service: g.some(1, "web", "db")}
	}
	if g.one(8) {
		m.Kubernetes = &podSpec{Namespace: g.some(1, "prod", "*")}
	}
	if g.one(6) {
		shared := g.one(2)
		m.Shared = &shared
	}
	if g.one(6) {
		m.Proof = pick(g, "address", "cgroup", "listener")
	}
	if m.empty() {
		return nil
	}
	return m
}

func (g gen) rule(name string) ruleSpec {
	r := ruleSpec{Name: name, Match: g.match()}
	if g.one(6) {
		r.Mode = pick(g, "enforce", "audit", "off")
	}
	actions := g.some(3, actionPool...)
	has := func(names ...string) bool {
		for _, n := range names {
			if strings.Contains(strings.Join(actions, " "), n) {
				return true
			}
		}
		return false
	}
	if has("instance.read") && g.one(2) {
		r.Subtree = g.some(2, subtreePool...)
	}
	if g.one(3) {
		r.Deny = actions
		if r.Match != nil {
			if r.Match.Proof = ""; r.Match.empty() {
				r.Match = nil
			}
		}
		return r
	}
	r.Allow = actions
	if has("identity.token") && g.one(2) {
		r.Resource = g.some(2, resourcePool...)
	}
	if has("identity.token", "identity.credential") && g.one(2) {
		r.Identity = pick[any](g, "default", map[string]string{"client_id": idA}, map[string]string{"client_id": idB}, map[string]string{"mi_res_id": armID})
	}
	if g.one(5) {
		r.Version = g.some(1, "2018-*", "2021-02-01", "*")
	}
	return r
}

func (m *matchSpec) empty() bool {
	return m.Name == nil && m.Image == nil && m.Digest == nil && m.Labels == nil && m.Compose == nil && m.Kubernetes == nil && m.Shared == nil && m.Proof == ""
}

func (g gen) policy() spec {
	s := spec{Mode: pick(g, "", "", "", "", "enforce", "audit", "off")}
	if g.one(4) {
		s.Allow = g.some(2, actionPool...)
	}
	if g.one(6) {
		for _, a := range g.some(1, actionPool...) {
			if !strings.Contains(strings.Join(s.Allow, " "), a) {
				s.Deny = append(s.Deny, a)
			}
		}
	}
	for i := range g.IntN(7) {
		s.Rules = append(s.Rules, g.rule(fmt.Sprintf("r%d", i)))
	}
	return s
}

func (g gen) labels() map[string]string {
	m := make(map[string]string)
	if g.one(2) {
		m[pick(g, "team", "tier")] = pick(g, "shop", "ops", "sales")
	}
	if g.one(3) {
		m[workload.ComposeProject], m[workload.ComposeService] = pick(g, "shop", "other"), pick(g, "web", "db")
	}
	return m
}

func (g gen) workload() workload.Workload {
	name := pick(g, "web", "web-1", "db", "x")
	w := workload.Workload{ID: workload.ID("static:" + name), Name: name, Labels: g.labels(), ImageLabels: g.labels()}
	for key := range w.Labels {
		delete(w.ImageLabels, key)
	}
	if g.one(2) {
		w.Image, w.ImageID = pick(g, "reg/web:1", "reg/db:1", "reg/x@"+digestA, ""), pick(g, digestA, digestB)
	}
	if g.one(4) {
		w.Pod = &workload.Pod{Namespace: pick(g, "prod", "test"), ServiceAccount: "web", Claimed: g.one(3)}
	}
	return w
}

// group is a workload with members; a third of them have none.
func (g gen) group() workload.Workload {
	w := g.workload()
	if g.one(3) {
		return w
	}
	for i := range 1 + g.IntN(3) {
		m := g.workload()
		m.Name = fmt.Sprintf("%s-%d", m.Name, i)
		w.Members = append(w.Members, m)
	}
	return w
}

func (g gen) proof() workload.Proof {
	return pick(g, workload.Listener, workload.Listener, workload.Cgroup, workload.Address, workload.None)
}

func (g gen) request() string {
	version := "?api-version=" + pick(g, "2018-02-01", "2021-02-01")
	selector := pick(g, "", "", "&client_id="+idA, "&client_id="+strings.ToUpper(idB), "&object_id="+idA, "&mi_res_id="+armID, "&msi_res_id="+strings.ToLower(armID))
	switch g.IntN(7) {
	case 0, 1:
		return "GET /metadata/identity/oauth2/token" + version + "&resource=" + pick(g, "https://vault.azure.net", "https://vault.azure.net/", "https://vault.azure.net//", storage, "api://x", "API://X/") + selector
	case 2:
		return "POST /metadata/identity/issuecredential" + version + selector + pick(g, "", "", "&uaid="+idA)
	case 3:
		return "GET /metadata/instance" + version + pick(g, "", "&extended=true")
	case 4:
		return "GET " + pick(g, "/metadata/versions", "/metadata/nobody/knows", "/metadata/v1/x", "/metadata/instance/compute/userData") + version
	}
	return "GET /metadata/instance/" + pick(g, "compute", "network", "compute/tags", "compute/tagsList/0/name", "compute/osProfile", "compute/osProfile/adminUsername", "compute/newer",
		"network/interface/0", "network/interface/0/ipv4/ipAddress/0/ipAddress", "network/interface/0/macAddress", "compute/vmId", "network/interface/0/ipv4") + version
}
