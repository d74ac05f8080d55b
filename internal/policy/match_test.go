package policy_test

import (
	"slices"
	"testing"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

// composed is a container that Compose made.
func composed(project, service string) workload.Workload {
	return workload.Workload{Name: project + "-" + service + "-1", Labels: map[string]string{workload.ComposeProject: project, workload.ComposeService: service}}
}

// imageClaims is a container whose image says that Compose made it.
func imageClaims(project, service string) workload.Workload {
	w := composed(project, service)
	w.Labels, w.ImageLabels = nil, w.Labels
	return w
}

func pod(namespace, account string) workload.Workload {
	return workload.Workload{Name: "p", Pod: &workload.Pod{Namespace: namespace, ServiceAccount: account, Labels: map[string]string{"app": "web"}}}
}

func built(w workload.Workload, hashed string) workload.Workload {
	w.Labels = map[string]string{hashed: "1f3a"}
	return w
}

// TestMatch has for each key of match: who is meant by an allow, and who by a deny.
func TestMatch(t *testing.T) {
	named := func(name string) workload.Workload { return workload.Workload{Name: name} }
	labelled := func(key, value string) workload.Workload {
		return workload.Workload{Name: "x", Labels: map[string]string{key: value}}
	}
	imaged := func(image, id string) workload.Workload {
		return workload.Workload{Name: "x", Image: image, ImageID: id}
	}
	brought := workload.Workload{Name: "x", ImageLabels: map[string]string{"team": "shop"}}
	spoofed := composed("shop", "web")
	spoofed.Pod = &workload.Pod{Namespace: "prod"}
	halfClaimed := workload.Workload{Name: "x", Labels: map[string]string{workload.ComposeProject: "shop"}, ImageLabels: map[string]string{workload.ComposeService: "web"}}
	claimed := pod("prod", "web")
	claimed.Pod.Claimed = true
	kept := labelled("team", "ops")
	kept.ImageLabels = map[string]string{"tier": "shop"}
	both := labelled("team", "shop")
	both.Name = "web"
	for name, tc := range map[string]struct {
		match       string
		w           workload.Workload
		allow, deny bool
	}{
		"everybody":                       {"", named("x"), true, true},
		"name":                            {"{name: web}", named("web"), true, true},
		"name_is_all_of_the_name":         {"{name: web}", named("web-1"), false, false},
		"name_in_other_case":              {"{name: web}", named("Web"), false, false},
		"name_prefix":                     {"{name: 'web-*'}", named("web-"), true, true},
		"name_prefix_is_at_the_start":     {"{name: 'web-*'}", named("xweb-1"), false, false},
		"name_one_character":              {"{name: 'web-?'}", named("web-é"), true, true},
		"name_one_character_is_not_two":   {"{name: 'web-?'}", named("web-10"), false, false},
		"name_half_a_character":           {"{name: '*??xyyy'}", named("€xyyy"), false, false},
		"name_with_a_dot_is_no_regexp":    {"{name: 'w.b'}", named("web"), false, false},
		"name_with_brackets_is_no_class":  {"{name: 'w[e]b'}", named("web"), false, false},
		"name_one_of_several":             {"{name: [db, 'w*']}", named("web"), true, true},
		"name_with_a_newline":             {"{name: web}", named("web\n"), false, false},
		"name_that_is_a_pattern":          {"{name: web}", named("*"), false, false},
		"image":                           {"{image: 'reg/web:*'}", imaged("reg/web:1", ""), true, true},
		"image_of_another_registry":       {"{image: 'reg/web:*'}", imaged("evil/reg/web:1", ""), false, false},
		"image_of_unknown_name":           {"{image: 'reg/web:*'}", imaged("", digestA), false, true},
		"image_unknown":                   {"{image: '*'}", named("x"), false, false},
		"digest":                          {"{digest: '" + digestA + "'}", imaged("web", digestA), true, true},
		"digest_that_was_asked_for":       {"{digest: '" + digestA + "'}", imaged("web@"+digestA, digestB), true, true},
		"digest_of_another":               {"{digest: '" + digestA + "'}", imaged("web", digestB), false, false},
		"digest_as_a_tag":                 {"{digest: '" + digestA + "'}", imaged("web:"+digestA, digestB), false, false},
		"digest_unknown":                  {"{digest: '" + digestA + "'}", named("x"), false, false},
		"label":                           {"{labels: {team: shop}}", labelled("team", "shop"), true, true},
		"label_of_another_value":          {"{labels: {team: shop}}", labelled("team", "shops"), false, false},
		"label_in_other_case":             {"{labels: {team: shop}}", labelled("Team", "shop"), false, false},
		"label_pattern":                   {"{labels: {team: '*'}}", labelled("team", ""), true, true},
		"label_not_there":                 {"{labels: {team: '*'}}", named("x"), false, false},
		"label_empty":                     {"{labels: {team: ''}}", labelled("team", ""), true, true},
		"label_empty_is_not_absent":       {"{labels: {team: ''}}", named("x"), false, false},
		"label_that_the_image_brings":     {"{labels: {team: shop}}", brought, false, true},
		"label_own_before_the_image":      {"{labels: {team: ops, tier: '*'}}", kept, false, true},
		"labels_all_of_them":              {"{labels: {team: shop, tier: x}}", labelled("team", "shop"), false, false},
		"compose":                         {"{compose: {project: shop, service: web}}", composed("shop", "web"), true, true},
		"compose_project_alone":           {"{compose: {project: shop}}", composed("shop", "db"), true, true},
		"compose_of_another_project":      {"{compose: {project: shop, service: web}}", composed("evil", "web"), false, false},
		"compose_name_is_not_compose":     {"{compose: {project: shop, service: web}}", named("shop-web-1"), false, false},
		"compose_claimed_by_the_image":    {"{compose: {project: shop, service: web}}", imageClaims("shop", "web"), false, true},
		"compose_half_claimed":            {"{compose: {project: shop, service: web}}", halfClaimed, false, true},
		"compose_built_the_image":         {"{compose: {project: shop, service: web}}", built(imageClaims("shop", "web"), "com.docker.compose.config-hash"), true, true},
		"compose_knows_the_image":         {"{compose: {project: shop, service: web}}", built(imageClaims("shop", "web"), "com.docker.compose.image"), true, true},
		"compose_claimed_by_a_pod":        {"{compose: {project: shop, service: web}}", spoofed, false, true},
		"compose_any":                     {"{compose: {project: '*'}}", named("x"), false, false},
		"kubernetes":                      {"{kubernetes: {namespace: prod, service-account: web}}", pod("prod", "web"), true, true},
		"kubernetes_another_namespace":    {"{kubernetes: {namespace: prod}}", pod("prod2", "web"), false, false},
		"kubernetes_another_account":      {"{kubernetes: {namespace: prod, service-account: web}}", pod("prod", "default"), false, false},
		"kubernetes_labels":               {"{kubernetes: {labels: {app: 'w*'}}}", pod("prod", "web"), true, true},
		"kubernetes_label_not_there":      {"{kubernetes: {labels: {tier: '*'}}}", pod("prod", "web"), false, false},
		"kubernetes_label_on_a_container": {"{kubernetes: {labels: {app: web}}}", labelled("app", "web"), false, false},
		"kubernetes_claimed":              {"{kubernetes: {namespace: prod}}", claimed, false, true},
		"kubernetes_claimed_labels":       {"{kubernetes: {labels: {tier: '*'}}}", claimed, false, true},
		"kubernetes_claimed_elsewhere":    {"{kubernetes: {namespace: test}}", claimed, false, false},
		"kubernetes_unknown_account":      {"{kubernetes: {service-account: web}}", pod("prod", ""), false, true},
		"kubernetes_is_no_container":      {"{kubernetes: {namespace: '*'}}", named("x"), false, false},
		"not_shared":                      {"{shared: false}", named("x"), true, true},
		"shared":                          {"{shared: true}", named("x"), false, false},
		"all_keys_must_hold":              {"{name: web, labels: {team: shop}}", both, true, true},
		"one_key_does_not":                {"{name: web, labels: {team: shop}}", named("web"), false, false},
	} {
		t.Run(name, func(t *testing.T) {
			match := ""
			if tc.match != "" {
				match = "match: " + tc.match + ", "
			}
			s := force(t, "rules: [{"+match+"allow: [identity.token]}]")
			if d := s.View(&tc.w, workload.Listener).Decide(imds.Query{Action: imds.IdentityToken}); d.Allow != tc.allow {
				t.Errorf("an allow is for it: %v, want %v: %+v", d.Allow, tc.allow, d)
			}
			s = force(t, "allow: [identity.token]\nrules: [{"+match+"deny: [identity.token]}]")
			if d := s.View(&tc.w, workload.Listener).Decide(imds.Query{Action: imds.IdentityToken}); d.Allow == tc.deny {
				t.Errorf("a deny is for it: %v, want %v: %+v", !d.Allow, tc.deny, d)
			}
		})
	}
}

func TestProofIsAtLeast(t *testing.T) {
	for name, tc := range map[string]struct {
		least string
		has   workload.Proof
		want  bool
	}{
		"address_for_a_listener":  {"listener", workload.Address, false},
		"cgroup_for_a_listener":   {"listener", workload.Cgroup, false},
		"listener_for_a_listener": {"listener", workload.Listener, true},
		"listener_for_an_address": {"address", workload.Listener, true},
		"nothing_for_an_address":  {"address", workload.None, false},
		"endpoint_for_a_cgroup":   {"cgroup", workload.Endpoint, false},
	} {
		s := force(t, "rules: [{match: {proof: "+tc.least+"}, allow: [identity.token]}]")
		if d := s.View(&web, tc.has).Decide(imds.Query{Action: imds.IdentityToken}); d.Allow != tc.want {
			t.Errorf("%s: got %+v", name, d)
		}
	}
	s := force(t, "rules: [{match: {name: web}, allow: [identity.token]}]")
	if d := s.View(&web, workload.None).Decide(imds.Query{Action: imds.IdentityToken}); !d.Allow {
		t.Errorf("a rule without proof asks for none: got %+v", d)
	}
}

// Shared is said of members, by way of the whole.
func TestSharedMatchesMembers(t *testing.T) {
	for text, want := range map[string]bool{"true": true, "false": false} {
		s := force(t, "rules: [{match: {shared: "+text+"}, allow: [identity.token]}]")
		w := workload.Workload{Name: "a", Members: []workload.Workload{{Name: "a"}, {Name: "b"}}}
		if d := s.View(&w, workload.Listener).Decide(imds.Query{Action: imds.IdentityToken}); d.Allow != want {
			t.Errorf("shared: %s: got %+v", text, d)
		}
	}
}

func TestNoPolicyDeniesEverything(t *testing.T) {
	var c policy.Current
	var none *policy.Current
	for name, s := range map[string]*policy.Snapshot{"nil": nil, "none_yet": c.Snapshot(), "no_current": none.Snapshot(), "nil_policy": {Number: 1}, "zero_policy": {Number: 1, Policy: new(policy.Policy)}, "empty": force(t, "{}")} {
		for _, a := range append(imds.Actions(), "", "gpu.read") {
			q := imds.Query{Action: a, Covers: []imds.Action{imds.InstanceUserdata}}
			d := s.View(&web, workload.Listener).Decide(q)
			if d.Allow || d.Reason == "" || d.Rule == "" || d.Blank != nil || d.Mode != policy.Enforce {
				t.Errorf("%s policy, %q: got %+v, want a denial with rule and reason", name, a, d)
			}
			if e := s.Explain(&web, workload.Listener, q); e.Decision != "deny" || e.Rules == nil {
				t.Errorf("%s policy, %q: explained %+v", name, a, e)
			}
		}
	}
}

func TestDefaultGivesAwayNoSecret(t *testing.T) {
	s := new(policy.Current).Set(policy.Default())
	var allowed []imds.Action
	for _, a := range imds.Actions() {
		d := s.View(&web, workload.None).Decide(imds.Query{Action: a})
		if d.Reason == "" || d.Rule != "built-in:default" {
			t.Errorf("%s: got %+v, want a reason and rule built-in:default", a, d)
		}
		if d.Allow && a.Secret() {
			t.Errorf("%s is a secret, and allowed by default", a)
		}
		if d.Allow {
			allowed = append(allowed, a)
		}
	}
	if want := []imds.Action{imds.VersionsRead, imds.InstanceRead, imds.EventsRead, imds.NetworkBalancer}; !slices.Equal(want, allowed) {
		t.Errorf("allowed by default: got %v, want %v", allowed, want)
	}
	if found := policy.Default().Check([]*workload.Workload{&web}); found != nil {
		t.Errorf("found %v", found)
	}
}

func TestSnapshotsAreNumbered(t *testing.T) {
	var c policy.Current
	for want := uint64(1); want < 4; want++ {
		s := c.Set(policy.Default())
		if d := c.Snapshot().View(&web, workload.None).Decide(imds.Query{Action: imds.VersionsRead}); s.Number != want || d.Snapshot != want || c.Snapshot() != s {
			t.Errorf("got snapshot %d, deciding as %d, want %d", s.Number, d.Snapshot, want)
		}
	}
}
