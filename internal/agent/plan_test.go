package agent

import (
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
	a := workload.Workload{ID: "static:a", Name: "a", Labels: map[string]string{"team": "shop", "tier": "front"}}
	b := workload.Workload{ID: "static:b", Name: "b", Labels: map[string]string{"team": "shop", "tier": "back"}}
	want := workload.Workload{ID: "static:a+static:b", Name: "a+b", Labels: map[string]string{"team": "shop"}, Members: []string{"a", "b"}}
	for _, members := range [][]workload.Workload{{a, b}, {b, a}} {
		if diff := cmp.Diff(want, Group(members)); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	}
	if diff := cmp.Diff(a, Group([]workload.Workload{{}, a})); diff != "" {
		t.Errorf("with one that has no name: -want +got:\n%s", diff)
	}
	if len(a.Labels) != 2 || len(b.Labels) != 2 {
		t.Error("Group changed its input")
	}
	if diff := cmp.Diff(a, Group([]workload.Workload{a})); diff != "" {
		t.Errorf("alone: -want +got:\n%s", diff)
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
