package discover

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/workload"
)

// listed is what a view lists, a line for each.
func listed(v *view, now time.Time) (lines []string) {
	found, missing := v.list(now)
	for _, f := range found {
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("found %s %s", f.Netns, f.Workload.Name)))
	}
	for _, m := range missing {
		lines = append(lines, fmt.Sprintf("missing %s: %v", m.ID, reason(m)))
	}
	return lines
}

// reason is the error that somebody may branch on.
func reason(m Missing) error {
	for _, err := range []error{ErrHostNetwork, ErrSharedOptOut, ErrOptedOut, ErrNoNetns, ErrNoContainer, ErrAmbiguous, ErrTwice, ErrNoEngine} {
		if errors.Is(m.Err, err) {
			return err
		}
	}
	return m.Err
}

var t0 = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func ctr(id string, change ...func(*dockerContainer)) dockerContainer {
	c := dockerContainer{id: id, name: "name-" + id, mode: "default", running: true, since: t0}
	for _, f := range change {
		f(&c)
	}
	return c
}

func mode(m string) func(*dockerContainer) { return func(c *dockerContainer) { c.mode = m } }
func enable(v string) func(*dockerContainer) {
	return func(c *dockerContainer) { c.labels = map[string]string{LabelEnable: v}; c.sortLabels(nil) }
}
func imageEnables(v string) func(*dockerContainer) {
	return func(c *dockerContainer) { c.labels = map[string]string{LabelEnable: v}; c.sortLabels(c.labels) }
}
func somebodyEnables(v string) func(*dockerContainer) {
	return func(c *dockerContainer) { c.labels = map[string]string{LabelEnable: v}; c.brought = c.labels }
}
func stopped(c *dockerContainer) { c.running = false }
func created(c *dockerContainer) { c.running, c.comes = false, true }

func TestViewLists(t *testing.T) {
	for _, tc := range []struct {
		name         string
		onlyLabelled bool
		containers   []dockerContainer
		in           map[string]string // path → ids with processes there
		after        time.Duration
		engine       error
		want         []string
	}{
		{name: "nothing"},
		{name: "one", containers: []dockerContainer{ctr("a")}, in: map[string]string{"/n/1": "a"},
			want: []string{"found /n/1 name-a"}},
		{name: "name_not_known_yet", in: map[string]string{"/n/1": ""}, after: 9 * time.Second,
			want: []string{"found /n/1"}},
		{name: "name_not_found_in_time_stays_listed", in: map[string]string{"/n/1": ""}, after: 10 * time.Second,
			want: []string{"found /n/1", "missing netns:1: " + ErrNoContainer.Error()}},
		{name: "starting_does_not_run_yet", containers: []dockerContainer{ctr("a", stopped)}, in: map[string]string{"/n/1": "a"},
			want: []string{"found /n/1 name-a"}},
		{name: "stopped_has_no_namespace", containers: []dockerContainer{ctr("a", stopped)}, after: time.Hour},
		{name: "no_network_mode_is_a_namespace_too", containers: []dockerContainer{ctr("a", mode("none"))}, in: map[string]string{"/n/1": "a"},
			want: []string{"found /n/1 name-a"}},
		{name: "host_network", containers: []dockerContainer{ctr("a", mode("host"))},
			want: []string{"missing docker:a: " + ErrHostNetwork.Error()}},
		{name: "joins_the_host_network", containers: []dockerContainer{ctr("a", mode("host")), ctr("b", mode("container:a")), ctr("c", mode("container:name-b"))},
			want: []string{"missing docker:a: " + ErrHostNetwork.Error(), "missing docker:b: " + ErrHostNetwork.Error(), "missing docker:c: " + ErrHostNetwork.Error()}},
		{name: "joins_itself", containers: []dockerContainer{ctr("a", mode("container:a"))}, after: time.Minute,
			want: []string{"missing docker:a: " + ErrNoNetns.Error()}},
		{name: "host_network_opted_out_is_silent", containers: []dockerContainer{ctr("a", mode("host"), enable("false"))}},
		{name: "host_network_stopped_is_silent", containers: []dockerContainer{ctr("a", mode("host"), stopped)}},
		{name: "runs_without_namespace_for_a_moment", containers: []dockerContainer{ctr("a")}, after: 9 * time.Second},
		{name: "runs_without_namespace", containers: []dockerContainer{ctr("a")}, after: 10 * time.Second,
			want: []string{"missing docker:a: " + ErrNoNetns.Error()}},
		{name: "joined", containers: []dockerContainer{ctr("a"), ctr("b", mode("container:a"))}, in: map[string]string{"/n/1": "a b"},
			want: []string{"found /n/1 name-a", "found /n/1 name-b"}},
		{name: "joiner_has_ended", containers: []dockerContainer{ctr("a"), ctr("b", mode("container:a"), stopped)}, in: map[string]string{"/n/1": "a b"},
			want: []string{"found /n/1 name-a"}},
		{name: "joiner_no_process_of_which_was_seen", containers: []dockerContainer{ctr("a"), ctr("b", mode("container:a"))}, in: map[string]string{"/n/1": "a"},
			want: []string{"found /n/1 name-a", "found /n/1 name-b"}},
		{name: "joiner_is_created", containers: []dockerContainer{ctr("a"), ctr("b", mode("container:a"), created)}, in: map[string]string{"/n/1": "a"},
			want: []string{"found /n/1 name-a", "found /n/1 name-b"}},
		{name: "joiner_by_name_and_by_beginning_of_the_id", containers: []dockerContainer{ctr("aaa"), ctr("b", mode("container:name-aaa"), created), ctr("c", mode("container:aa"), created)},
			in: map[string]string{"/n/1": "aaa"}, want: []string{"found /n/1 name-aaa", "found /n/1 name-b", "found /n/1 name-c"}},
		{name: "joiner_of_a_joiner_is_created", containers: []dockerContainer{ctr("a"), ctr("b", mode("container:a"), created), ctr("c", mode("container:b"), created)},
			in: map[string]string{"/n/1": "a"}, want: []string{"found /n/1 name-a", "found /n/1 name-b", "found /n/1 name-c"}},
		{name: "joiner_of_somebody_else_is_created", containers: []dockerContainer{ctr("a"), ctr("b", mode("container:x"), created)}, in: map[string]string{"/n/1": "a"},
			want: []string{"found /n/1 name-a"}},
		{name: "created_joiner_opts_nobody_out", containers: []dockerContainer{ctr("a"), ctr("b", mode("container:a"), created, enable("false"))}, in: map[string]string{"/n/1": "a"},
			want: []string{"found /n/1 name-a", "found /n/1 name-b"}},
		{name: "joiner_that_runs_opts_out", containers: []dockerContainer{ctr("a"), ctr("b", mode("container:a"), enable("false"))}, in: map[string]string{"/n/1": "a"},
			want: []string{"missing docker:a: " + ErrSharedOptOut.Error(), "missing docker:b: " + ErrOptedOut.Error()}},
		{name: "owner_opts_out_before_it_runs", containers: []dockerContainer{ctr("a", created, enable("false"))}, in: map[string]string{"/n/1": "a"},
			want: []string{"missing docker:a: " + ErrOptedOut.Error()}},
		{name: "only_labelled_with_a_created_sidecar_that_is", onlyLabelled: true, containers: []dockerContainer{ctr("a"), ctr("b", mode("container:a"), created, enable("true"))}, in: map[string]string{"/n/1": "a"},
			want: []string{"found /n/1 name-a", "found /n/1 name-b"}},
		{name: "cgroup_path_with_two_containers", containers: []dockerContainer{ctr("a"), ctr("b", stopped)}, in: map[string]string{"/n/1": "a", "/n/2": "both a b"},
			want: []string{"found /n/1 name-a", "found /n/2", "missing netns:2: " + ErrAmbiguous.Error()}},
		{name: "container_in_two_namespaces_for_a_moment", containers: []dockerContainer{ctr("a")}, in: map[string]string{"/n/1": "a", "/n/2": "a"}, after: 9 * time.Second,
			want: []string{"found /n/1", "found /n/2"}},
		{name: "container_in_two_namespaces_owns_none", containers: []dockerContainer{ctr("a", func(c *dockerContainer) { c.since = t0.Add(time.Hour) })}, in: map[string]string{"/n/1": "a", "/n/2": "a"}, after: 10 * time.Second,
			want: []string{"found /n/1", "found /n/2", "missing netns:1: " + ErrTwice.Error(), "missing netns:2: " + ErrTwice.Error()}},
		{name: "container_in_anothers_namespace_and_its_own", containers: []dockerContainer{ctr("a"), ctr("b", stopped)}, in: map[string]string{"/n/1": "a b", "/n/2": "b"},
			want: []string{"found /n/1 name-a", "found /n/2"}},
		{name: "host_network_container_at_work_in_a_namespace", containers: []dockerContainer{ctr("a"), ctr("b", mode("host"))}, in: map[string]string{"/n/1": "a b"},
			want: []string{"found /n/1 name-a", "missing docker:b: " + ErrHostNetwork.Error()}},
		{name: "two_owners_are_both_named", containers: []dockerContainer{ctr("a"), ctr("b")}, in: map[string]string{"/n/1": "a b"},
			want: []string{"found /n/1 name-a", "found /n/1 name-b"}},
		{name: "removed_container_is_not_listed", in: map[string]string{"/n/1": "a"}, after: time.Hour},
		{name: "opted_out", containers: []dockerContainer{ctr("a", enable("false"))}, in: map[string]string{"/n/1": "a"}, after: time.Hour,
			want: []string{"missing docker:a: " + ErrOptedOut.Error()}},
		{name: "opted_out_and_stopped", containers: []dockerContainer{ctr("a", stopped, enable("false"))}, after: time.Hour},
		{name: "opted_out_in_go_spelling", containers: []dockerContainer{ctr("a", enable("False"))}, in: map[string]string{"/n/1": "a"},
			want: []string{"missing docker:a: " + ErrOptedOut.Error()}},
		{name: "nonsense_does_not_opt_out", containers: []dockerContainer{ctr("a", enable("nope"))}, in: map[string]string{"/n/1": "a"},
			want: []string{"found /n/1 name-a"}},
		{name: "shares_with_one_that_opted_out", containers: []dockerContainer{ctr("a", enable("false")), ctr("b", mode("container:a")), ctr("c", mode("container:a"), enable("true"))},
			in:   map[string]string{"/n/1": "a b c"},
			want: []string{"missing docker:a: " + ErrOptedOut.Error(), "missing docker:b: " + ErrSharedOptOut.Error(), "missing docker:c: " + ErrSharedOptOut.Error()}},
		{name: "image_opts_out", containers: []dockerContainer{ctr("a", imageEnables("false"))}, in: map[string]string{"/n/1": "a"},
			want: []string{"missing docker:a: " + ErrOptedOut.Error()}},
		{name: "image_of_a_joiner_opts_out", containers: []dockerContainer{ctr("a"), ctr("b", mode("container:a"), imageEnables("false"))}, in: map[string]string{"/n/1": "a b"},
			want: []string{"found /n/1 name-a", "found /n/1 name-b"}},
		{name: "image_of_one_that_is_joined_opts_out", containers: []dockerContainer{ctr("a", imageEnables("false")), ctr("b", mode("container:a"))}, in: map[string]string{"/n/1": "a b"},
			want: []string{"found /n/1 name-a", "found /n/1 name-b"}},
		{name: "runner_opts_out_beside_an_image_that_opts_in", containers: []dockerContainer{ctr("a", imageEnables("true")), ctr("b", mode("container:a"), enable("false"))}, in: map[string]string{"/n/1": "a b"},
			want: []string{"missing docker:a: " + ErrSharedOptOut.Error(), "missing docker:b: " + ErrOptedOut.Error()}},
		{name: "runner_opts_in_over_an_image_that_opts_out", containers: []dockerContainer{ctr("a", func(c *dockerContainer) {
			c.labels = map[string]string{LabelEnable: "true"}
			c.sortLabels(map[string]string{LabelEnable: "false"})
		})}, in: map[string]string{"/n/1": "a"}, want: []string{"found /n/1 name-a"}},
		{name: "opt_out_of_which_nobody_knows_whose_it_is", containers: []dockerContainer{ctr("a", somebodyEnables("false"))}, in: map[string]string{"/n/1": "a"},
			want: []string{"found /n/1 name-a"}},
		{name: "host_network_and_the_image_opts_out", containers: []dockerContainer{ctr("a", mode("host"), imageEnables("false"))},
			want: []string{"missing docker:a: " + ErrHostNetwork.Error()}},
		{name: "only_labelled_by_the_image", onlyLabelled: true, containers: []dockerContainer{ctr("a", imageEnables("true"))}, in: map[string]string{"/n/1": "a"}},
		{name: "only_labelled_by_the_image_of_a_joiner", onlyLabelled: true, containers: []dockerContainer{ctr("a"), ctr("b", mode("container:a"), imageEnables("true"))}, in: map[string]string{"/n/1": "a b"}},
		{name: "only_labelled_by_nobody_knows_whom", onlyLabelled: true, containers: []dockerContainer{ctr("a", somebodyEnables("true"))}, in: map[string]string{"/n/1": "a"}},
		{name: "only_labelled_and_is", onlyLabelled: true, containers: []dockerContainer{ctr("a", enable("true"))}, in: map[string]string{"/n/1": "a"},
			want: []string{"found /n/1 name-a"}},
		{name: "only_labelled_and_is_not", onlyLabelled: true, containers: []dockerContainer{ctr("a"), ctr("b", mode("host")), ctr("c")}, in: map[string]string{"/n/1": "a"}, after: time.Hour},
		{name: "only_labelled_nonsense_is_no_label", onlyLabelled: true, containers: []dockerContainer{ctr("a", enable("yes please"))}, in: map[string]string{"/n/1": "a"}},
		{name: "only_labelled_name_not_known_yet", onlyLabelled: true, in: map[string]string{"/n/1": ""},
			want: []string{"found /n/1"}},
		{name: "only_labelled_with_a_sidecar", onlyLabelled: true, containers: []dockerContainer{ctr("a", enable("true")), ctr("b", mode("container:a"))}, in: map[string]string{"/n/1": "a b"},
			want: []string{"found /n/1 name-a", "found /n/1 name-b"}},
		{name: "only_labelled_sharing_with_opted_out", onlyLabelled: true, containers: []dockerContainer{ctr("a", enable("true")), ctr("b", mode("container:a"), enable("false"))}, in: map[string]string{"/n/1": "a b"},
			want: []string{"missing docker:a: " + ErrSharedOptOut.Error(), "missing docker:b: " + ErrOptedOut.Error()}},
		{name: "only_labelled_and_a_created_joiner_opts_out", onlyLabelled: true, containers: []dockerContainer{ctr("a"), ctr("b", mode("container:a"), created, enable("false"))}, in: map[string]string{"/n/1": "a"}},
		{name: "engine_away_keeps_names_and_blames_nobody", engine: errors.New("refused"), containers: []dockerContainer{ctr("a"), ctr("b")},
			in: map[string]string{"/n/1": "a", "/n/2": ""}, after: time.Hour,
			want: []string{"found /n/1 name-a", "found /n/2", "missing docker:engine: " + ErrNoEngine.Error()}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := &view{onlyLabelled: tc.onlyLabelled, engine: tc.engine, since: t0, spaces: make(map[string]*space), containers: make(map[string]dockerContainer)}
			for _, c := range tc.containers {
				v.containers[c.id] = c
			}
			seen := make(map[*space]sight)
			for path, ids := range tc.in {
				s := &space{seen: t0, inode: uint64(len(v.spaces) + 1)}
				v.spaces[path] = s
				look := sight{ids: strings.Fields(ids)}
				if one, both := strings.CutPrefix(ids, "both "); both { // in one path
					look = sight{several: strings.Fields(one)}
				}
				seen[s] = look
			}
			v.settle(seen)
			if diff := cmp.Diff(tc.want, listed(v, t0.Add(tc.after))); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// TestIntruderIsNoOwner has a container enter a namespace whose owner is known.
func TestIntruderIsNoOwner(t *testing.T) {
	v := &view{containers: map[string]dockerContainer{"a": ctr("a"), "b": ctr("b"), "j": ctr("j", mode("container:a"))}}
	s := &space{}
	for _, step := range []struct {
		name, in, owners, joiners string
	}{
		{"nobody_there_yet", "", "", ""},
		{"the_owner", "a", "a", ""},
		{"an_intruder_comes", "a b", "a", ""},
		{"only_the_intruder_is_left", "b", "a", ""},
		{"a_joiner_comes", "a j", "a", "j"},
		{"the_joiner_goes", "a", "a", ""},
		{"all_have_ended", "", "a", ""},
	} {
		v.settle(map[*space]sight{s: {ids: strings.Fields(step.in)}})
		if got, want := fmt.Sprint(s.owners, s.joiners), fmt.Sprint(strings.Fields(step.owners), strings.Fields(step.joiners)); got != want {
			t.Errorf("%s: got %s, want %s", step.name, got, want)
		}
	}
	s = &space{}
	v.settle(map[*space]sight{s: {ids: []string{"a", "b"}}})
	v.settle(map[*space]sight{s: {ids: []string{"a"}}})
	if len(s.owners) != 1 {
		t.Errorf("once the intruder of the first look has left: got owners %v", s.owners)
	}
}

// TestOwnerHasOneNamespace has a second namespace seem to be of a container that
// owns one.
func TestOwnerHasOneNamespace(t *testing.T) {
	v := &view{since: t0, containers: map[string]dockerContainer{"a": ctr("a"), "j": ctr("j", mode("container:a"))}}
	first, second := &space{inode: 1, seen: t0}, &space{inode: 2, seen: t0}
	v.spaces = map[string]*space{"/n/1": first}
	v.settle(map[*space]sight{first: {ids: []string{"a"}}})
	v.spaces["/n/2"] = second
	both := map[*space]sight{first: {ids: []string{"a"}}, second: {ids: []string{"a", "j"}}}
	check := func(name string, after time.Duration, want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, listed(v, t0.Add(after))); diff != "" {
			t.Errorf("%s: -want +got:\n%s", name, diff)
		}
	}
	for range 3 {
		v.settle(both)
		v.settle(map[*space]sight{second: {ids: []string{"a"}}})
	}
	check("a moment later", 9*time.Second, "found /n/1 name-a", "found /n/1 name-j", "found /n/2")
	check("still so", 10*time.Second, "found /n/1 name-a", "found /n/1 name-j", "found /n/2", "missing netns:2: "+ErrTwice.Error())
	v.spaces["/m/1"] = &space{inode: 1, seen: t0}
	v.settle(map[*space]sight{v.spaces["/m/1"]: {ids: []string{"a"}}})
	check("another file of the first", 0, "found /m/1 name-a", "found /m/1 name-j", "found /n/1 name-a", "found /n/1 name-j", "found /n/2")
	delete(v.spaces, "/m/1")
	delete(v.spaces, "/n/1")
	v.settle(map[*space]sight{second: {ids: []string{"a"}}})
	check("the first is gone", time.Hour, "found /n/2 name-a", "found /n/2 name-j")
}

func TestWhatCountsWhenAContainerIsListedAgain(t *testing.T) {
	later := t0.Add(time.Hour)
	two := func(c *dockerContainer) { c.name, c.names = "old", []string{"old", "new"} }
	one := func(c *dockerContainer) { c.name, c.names = "new", []string{"new"} }
	known := func(name string) func(*dockerContainer) { return func(c *dockerContainer) { c.name = name } }
	for _, tc := range []struct {
		name      string
		listed    dockerContainer
		known     dockerContainer
		heard     heard
		wantName  string
		wantSince time.Time // zero: does not run
	}{
		{"nothing_new", ctr("a", one), ctr("a", one), heard{}, "new", t0},
		{"seen_for_the_first_time", ctr("a", one), dockerContainer{}, heard{}, "new", later},
		{"runs_again", ctr("a", one), ctr("a", stopped), heard{}, "new", later},
		{"end_is_told_before_it_is_listed", ctr("a", one), ctr("a", one), heard{state: true}, "new", time.Time{}},
		{"start_is_told_before_it_is_listed", ctr("a", one, stopped), ctr("a", one, stopped), heard{state: true, running: true}, "new", later},
		{"new_name_while_both_are_listed", ctr("a", two), ctr("a", known("old")), heard{name: "new"}, "new", t0},
		{"both_are_listed_before_it_is_told", ctr("a", two), ctr("a", known("old")), heard{}, "old", t0},
		{"both_are_still_listed_later", ctr("a", two), ctr("a", known("new")), heard{}, "new", t0},
		{"renamed_once_more_since", ctr("a", one), ctr("a", known("older")), heard{name: "old"}, "new", t0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := tc.listed.after(tc.known, tc.heard, later)
			if !got.running {
				got.since = time.Time{}
			}
			if got.name != tc.wantName || !got.since.Equal(tc.wantSince) {
				t.Errorf("got %q since %v, want %q since %v", got.name, got.since, tc.wantName, tc.wantSince)
			}
		})
	}
}

func TestOwnNames(t *testing.T) {
	got := ownNames([]string{"/other/db", "/web", "/a/b", "/new"})
	if diff := cmp.Diff([]string{"web", "new"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got := ownNames(nil); len(got) != 0 {
		t.Errorf("got %q", got)
	}
}

func TestFoundIsInOrderAndWhole(t *testing.T) {
	v := &view{spaces: map[string]*space{"/n/2": {owners: []string{"b"}}, "/n/1": {owners: []string{"a"}}},
		containers: map[string]dockerContainer{"a": ctr("a"), "b": ctr("b")}}
	c := v.containers["a"]
	c.image, c.labels = "shop/web:3", map[string]string{"team": "shop", "vendor": "x"}
	c.imageKey.id = "sha256:1"
	c.sortLabels(map[string]string{"vendor": "x"})
	v.containers["a"] = c
	found, _ := v.list(t0)
	w := found[0].Workload
	want := workload.Workload{ID: "docker:a", Name: "name-a", Labels: map[string]string{"team": "shop"}, ImageLabels: map[string]string{"vendor": "x"}, Image: "shop/web:3", ImageID: "sha256:1"}
	if diff := cmp.Diff(want, w); diff != "" || found[1].Netns != "/n/2" {
		t.Errorf("-want +got:\n%s\n%+v", diff, found)
	}
}
