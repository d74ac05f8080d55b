package policy_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

var web = workload.Workload{ID: "static:web", Name: "web"}

func parse(t testing.TB, text string) *policy.Policy {
	t.Helper()
	p, err := policy.Parse("p.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func decide(p *policy.Policy, q imds.Query) policy.Decision {
	return p.Decide(web, workload.Listener, q)
}

func TestDecide(t *testing.T) {
	p := parse(t, "# comment\nallow: [instance.read, identity.token]\ndeny:\n- events.approve\n- unknown\n")
	for name, tc := range map[string]struct {
		action imds.Action
		want   policy.Decision
	}{
		"allowed_in_a_line": {imds.IdentityToken, policy.Decision{
			Allow: true, Rule: "p.yaml:2", Reason: "identity.token is in allow"}},
		"denied_in_a_line": {imds.EventsApprove, policy.Decision{
			Rule: "p.yaml:4", Reason: "events.approve is in deny: move events.approve from deny to allow"}},
		"not_listed": {imds.InstanceUserdata, policy.Decision{
			Rule: "p.yaml:default", Reason: "instance.userdata is not allowed: add instance.userdata to allow"}},
		"unknown_endpoint": {imds.Unknown, policy.Decision{
			Rule:   "p.yaml:5",
			Reason: "unknown is every endpoint that is not on the list of known ones: it cannot be allowed"}},
		"action_of_a_later_release": {"gpu.read", policy.Decision{
			Rule: "none", Reason: "the action of this request has no name, so no policy can allow it"}},
		"no_action": {"", policy.Decision{
			Rule: "none", Reason: "the action of this request has no name, so no policy can allow it"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := decide(p, imds.Query{Action: tc.action})
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func TestDefaultGivesAwayNoSecret(t *testing.T) {
	p := policy.Default()
	var allowed []imds.Action
	for _, a := range imds.Actions() {
		d := decide(p, imds.Query{Action: a})
		if d.Reason == "" || d.Rule != "built-in:default" {
			t.Errorf("%s: got %+v, want a reason and rule built-in:default", a, d)
		}
		if !d.Allow {
			continue
		}
		allowed = append(allowed, a)
		if a.Secret() {
			t.Errorf("%s is a secret, and allowed by default", a)
		}
	}
	want := []imds.Action{imds.VersionsRead, imds.InstanceRead, imds.EventsRead, imds.NetworkBalancer}
	if d := cmp.Diff(want, allowed); d != "" {
		t.Errorf("allowed by default (-want +got)\n%s", d)
	}
}

func TestNoPolicyDeniesEverything(t *testing.T) {
	for name, p := range map[string]*policy.Policy{"nil": nil, "zero": {}, "empty_mapping": parse(t, "{}")} {
		for _, a := range append(imds.Actions(), "") {
			d := decide(p, imds.Query{Action: a, Covers: []imds.Action{imds.InstanceUserdata}})
			if d.Allow || d.Reason == "" || d.Rule == "" || d.Blank != nil {
				t.Errorf("%s policy, %q: got %+v, want a denial with rule and reason", name, a, d)
			}
		}
	}
}

func TestBlank(t *testing.T) {
	const (
		yes1 = imds.EventsRead
		yes2 = imds.VersionsRead
		no1  = imds.InstanceUserdata
		no2  = imds.IdentityToken
	)
	p := parse(t, "allow: [instance.read, events.read, versions.read]")
	type actions = []imds.Action
	for name, tc := range map[string]struct {
		action       imds.Action
		covers, want actions
	}{
		"covers_nothing":             {imds.InstanceRead, nil, nil},
		"all_allowed":                {imds.InstanceRead, actions{yes1, yes2}, nil},
		"one_denied":                 {imds.InstanceRead, actions{no1}, actions{no1}},
		"denied_at_the_start":        {imds.InstanceRead, actions{no1, no2, yes1}, actions{no1, no2}},
		"denied_at_the_end":          {imds.InstanceRead, actions{yes1, no1}, actions{no1}},
		"denied_on_both_sides":       {imds.InstanceRead, actions{no1, yes1, no2}, actions{no1, no2}},
		"unheard_of_action_is_blank": {imds.InstanceRead, actions{"gpu.read"}, actions{"gpu.read"}},
		"nothing_if_all_is_denied":   {imds.IdentityToken, actions{no1}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			covers := append(actions(nil), tc.covers...)
			d := decide(p, imds.Query{Action: tc.action, Covers: covers})
			if diff := cmp.Diff(tc.want, d.Blank); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			_ = append(d.Blank, "appended") // must not reach into Covers
			if diff := cmp.Diff(tc.covers, covers); diff != "" {
				t.Errorf("Covers was changed (-want +got)\n%s", diff)
			}
		})
	}
}

var tree = imds.Query{Action: imds.InstanceRead, Covers: []imds.Action{imds.InstanceUserdata}}

func TestDecideDoesNotAllocate(t *testing.T) {
	p := parse(t, "allow: [instance.read]")
	for _, q := range []imds.Query{tree, {Action: imds.IdentityToken}, {Action: "gpu.read"}} {
		if n := testing.AllocsPerRun(100, func() { decide(p, q) }); n != 0 {
			t.Errorf("%s: got %v allocations, want 0", q.Action, n)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	p := parse(b, "allow: [instance.read]")
	b.ReportAllocs()
	for b.Loop() {
		decide(p, tree)
	}
}
