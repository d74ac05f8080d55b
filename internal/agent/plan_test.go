package agent

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/workload"
)

func TestPlan(t *testing.T) {
	now := time.Unix(1000, 0)
	k1, k2, k3 := Key{1, 10}, Key{2, 20}, Key{3, 30}
	web, db := workload.Workload{ID: "static:web", Name: "web"}, workload.Workload{ID: "static:db", Name: "db"}
	labelled := web
	labelled.Labels = map[string]string{"team": "shop"}
	for _, tc := range []struct {
		name    string
		want    map[Key]workload.Workload
		have    map[Key]Held
		backoff map[Key]Backoff
		steps   []Step
	}{
		{name: "nothing"},
		{
			name:  "new_workload",
			want:  map[Key]workload.Workload{k1: web},
			steps: []Step{{Attach, k1, 0, web}},
		},
		{
			name: "in_order",
			want: map[Key]workload.Workload{k1: web},
			have: map[Key]Held{k1: {7, web, true}},
		},
		{
			name:  "gone_workload",
			have:  map[Key]Held{k1: {7, web, true}},
			steps: []Step{{Detach, k1, 7, web}},
		},
		{
			name:  "gone_and_dead",
			have:  map[Key]Held{k1: {7, web, false}},
			steps: []Step{{Detach, k1, 7, web}},
		},
		{
			name:  "listener_killed_from_inside",
			want:  map[Key]workload.Workload{k1: web},
			have:  map[Key]Held{k1: {7, web, false}},
			steps: []Step{{Reopen, k1, 7, web}},
		},
		{
			name:    "killed_again_within_back_off",
			want:    map[Key]workload.Workload{k1: web},
			have:    map[Key]Held{k1: {7, web, false}},
			backoff: map[Key]Backoff{k1: {now.Add(time.Millisecond), 1}},
		},
		{
			name:    "back_off_over",
			want:    map[Key]workload.Workload{k1: web},
			backoff: map[Key]Backoff{k1: {now, 1}},
			steps:   []Step{{Attach, k1, 0, web}},
		},
		{
			name:  "labels_changed",
			want:  map[Key]workload.Workload{k1: labelled},
			have:  map[Key]Held{k1: {7, web, true}},
			steps: []Step{{Update, k1, 7, labelled}},
		},
		{
			name:  "no_name_yet",
			want:  map[Key]workload.Workload{k1: {}},
			steps: []Step{{Attach, k1, 0, workload.Workload{}}},
		},
		{
			name:  "name_arrives",
			want:  map[Key]workload.Workload{k1: web},
			have:  map[Key]Held{k1: {7, workload.Workload{}, true}},
			steps: []Step{{Update, k1, 7, web}},
		},
		{
			name: "name_not_known_for_the_moment",
			want: map[Key]workload.Workload{k1: {}},
			have: map[Key]Held{k1: {7, web, true}},
		},
		{
			name:  "another_workload_in_the_same_namespace",
			want:  map[Key]workload.Workload{k1: db},
			have:  map[Key]Held{k1: {7, web, true}},
			steps: []Step{{Update, k1, 7, db}},
		},
		{
			name:  "inode_reused_by_a_new_namespace",
			want:  map[Key]workload.Workload{{1, 11}: web},
			have:  map[Key]Held{{1, 10}: {7, web, true}},
			steps: []Step{{Detach, Key{1, 10}, 7, web}, {Attach, Key{1, 11}, 0, web}},
		},
		{
			name:  "detaches_first_then_by_namespace",
			want:  map[Key]workload.Workload{k2: db, k1: web},
			have:  map[Key]Held{k3: {9, db, true}},
			steps: []Step{{Detach, k3, 9, db}, {Attach, k1, 0, web}, {Attach, k2, 0, db}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.steps, Plan(tc.want, tc.have, tc.backoff, now)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestGroup(t *testing.T) {
	pod := &workload.Pod{Namespace: "shop", Labels: map[string]string{"app": "web"}}
	a := workload.Workload{ID: "docker:a", Name: "web", Labels: map[string]string{"team": "shop"}, Image: "shop/web", ImageID: "sha256:1", Pod: pod}
	b := workload.Workload{ID: "docker:b", Name: "sidecar", Labels: map[string]string{"team": "shop"}, ImageLabels: map[string]string{"vendor": "x"}}
	c := workload.Workload{ID: "static:c", Name: "cache"}
	want := workload.Workload{ID: "docker:a+docker:b+static:c", Name: "cache+sidecar+web", Members: []workload.Workload{a, b, c}}
	for _, members := range [][]workload.Workload{{a, b, c}, {c, b, a}, {b, {}, c, a, {Name: "no ID"}}} {
		before := slices.Clone(members)
		if diff := cmp.Diff(want, Group(members)); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if diff := cmp.Diff(before, members); diff != "" {
			t.Errorf("Group changed its input: -want +got:\n%s", diff)
		}
	}
	if diff := cmp.Diff(a, Group([]workload.Workload{{}, a})); diff != "" {
		t.Errorf("with one that has no name: -want +got:\n%s", diff)
	}
	if diff := cmp.Diff(a, Group([]workload.Workload{a})); diff != "" {
		t.Errorf("alone: -want +got:\n%s", diff)
	}
	if diff := cmp.Diff(workload.Workload{}, Group([]workload.Workload{{}, {}})); diff != "" {
		t.Errorf("nobody has a name: -want +got:\n%s", diff)
	}
}

// full is a workload with every field set, apart from every other one.
func full() workload.Workload {
	labels := func() map[string]string { return map[string]string{"team": "shop"} }
	return workload.Workload{
		ID: "docker:a", Name: "web", Labels: labels(), ImageLabels: labels(), Image: "shop/web", ImageID: "sha256:1",
		Pod:     &workload.Pod{Namespace: "shop", ServiceAccount: "web", Labels: labels()},
		Members: []workload.Workload{{ID: "docker:b", Labels: labels()}, {ID: "docker:c", Pod: &workload.Pod{Namespace: "shop"}}},
	}
}

// TestEveryChangeIsAnUpdate changes one thing at a time.
func TestEveryChangeIsAnUpdate(t *testing.T) {
	k := Key{1, 10}
	plan := func(have, want workload.Workload) []Step {
		return Plan(map[Key]workload.Workload{k: want}, map[Key]Held{k: {7, have, true}}, nil, time.Unix(1000, 0))
	}
	if steps := plan(full(), full()); len(steps) != 0 {
		t.Errorf("nothing has changed: %v", steps)
	}
	if steps := plan(workload.Workload{ID: "a", Labels: map[string]string{}}, workload.Workload{ID: "a"}); len(steps) != 0 {
		t.Errorf("no labels are no labels: %v", steps)
	}
	for _, tc := range []struct {
		name   string
		change func(w *workload.Workload)
	}{
		{"id", func(w *workload.Workload) { w.ID = "docker:z" }},
		{"name", func(w *workload.Workload) { w.Name = "other" }},
		{"label", func(w *workload.Workload) { w.Labels["team"] = "other" }},
		{"one_more_label", func(w *workload.Workload) { w.Labels["tier"] = "" }},
		{"label_becomes_the_images", func(w *workload.Workload) { w.Labels = nil }},
		{"image_label", func(w *workload.Workload) { w.ImageLabels["team"] = "other" }},
		{"image_label_gone", func(w *workload.Workload) { w.ImageLabels = nil }},
		{"image", func(w *workload.Workload) { w.Image = "shop/web:2" }},
		{"image_id", func(w *workload.Workload) { w.ImageID = "sha256:2" }},
		{"pod_gone", func(w *workload.Workload) { w.Pod = nil }},
		{"pod_namespace", func(w *workload.Workload) { w.Pod.Namespace = "other" }},
		{"pod_service_account", func(w *workload.Workload) { w.Pod.ServiceAccount = "" }},
		{"pod_label", func(w *workload.Workload) { w.Pod.Labels["team"] = "other" }},
		{"member_gone", func(w *workload.Workload) { w.Members = w.Members[:1] }},
		{"members_gone", func(w *workload.Workload) { w.Members = nil }},
		{"members_label", func(w *workload.Workload) { w.Members[0].Labels["team"] = "other" }},
		{"members_pod", func(w *workload.Workload) { w.Members[1].Pod.Namespace = "other" }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := full()
			tc.change(&w)
			for _, pair := range [][2]workload.Workload{{full(), w}, {w, full()}} {
				steps := plan(pair[0], pair[1])
				if len(steps) != 1 || steps[0].Action != Update || !cmp.Equal(steps[0].Workload, pair[1]) {
					t.Errorf("got %v, want an update", steps)
				}
			}
		})
	}
}

// TestEqualKnowsEveryField fails when a workload gets a field that equal was not
// told of.
func TestEqualKnowsEveryField(t *testing.T) {
	for typ, want := range map[reflect.Type]int{reflect.TypeFor[workload.Workload](): 8, reflect.TypeFor[workload.Pod](): 4} {
		if got := typ.NumField(); got != want {
			t.Errorf("%v has %d fields, equal compares %d", typ, got, want)
		}
	}
}

func TestBackoffGrowsToHalfAMinute(t *testing.T) {
	now := time.Unix(1000, 0)
	var b Backoff
	var waits []time.Duration
	for range 8 {
		b = b.next(now)
		waits = append(waits, b.Until.Sub(now))
	}
	want := []time.Duration{500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 16 * time.Second, 30 * time.Second, 30 * time.Second}
	if diff := cmp.Diff(want, waits); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
