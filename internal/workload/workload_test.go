package workload

import (
	"encoding/json"
	"net/netip"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// labels makes a map of: name, value, name, value…
func labels(pairs ...string) map[string]string {
	m := make(map[string]string)
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return m
}

func TestCompose(t *testing.T) {
	of := func(project, service string, more ...string) map[string]string {
		return labels(append([]string{ComposeProject, project, ComposeService, service}, more...)...)
	}
	for _, tc := range []struct {
		name             string
		w                Workload
		project, service string
		sure             bool
	}{
		{"none", Workload{Labels: labels("team", "shop")}, "", "", false},
		{"plain_image_run_by_compose", Workload{Labels: of("shop", "web", composeHash, "1")}, "shop", "web", true},
		{"run_by_podman_compose", Workload{Labels: of("shop", "web")}, "shop", "web", true}, // sets no hash of this name
		{"image_claims_compose_service", Workload{ImageLabels: of("shop", "web")}, "shop", "web", false},
		{"image_claims_everything", Workload{ImageLabels: of("shop", "web", composeHash, "1", composeImage, "sha256:2")}, "shop", "web", false},
		{"compose_built_image_run_by_compose", Workload{Labels: labels(composeHash, "1"), ImageLabels: of("shop", "web")}, "shop", "web", true},
		{"compose_built_image_run_by_hand", Workload{Labels: labels("team", "shop"), ImageLabels: of("shop", "web")}, "shop", "web", false},
		{"compose_built_image_run_as_another_service", Workload{Labels: labels(ComposeService, "worker", composeHash, "1"), ImageLabels: labels(ComposeProject, "shop")}, "shop", "worker", true},
		{"compose_built_image_run_in_another_project", Workload{Labels: labels(ComposeProject, "test", composeHash, "1"), ImageLabels: labels(ComposeService, "web")}, "test", "web", true},
		{"committed_container_run_by_compose", Workload{Labels: labels(composeImage, "sha256:3"), ImageLabels: of("shop", "web", composeHash, "1")}, "shop", "web", true},
		{"committed_container_run_by_hand", Workload{ImageLabels: of("shop", "web", composeHash, "1", composeImage, "sha256:2", "com.docker.compose.oneoff", "False")}, "shop", "web", false},
		{"image_of_which_compose_predicts_the_hash", Workload{ImageLabels: of("shop", "web", composeHash, "1")}, "shop", "web", false},
		{"runner_overrides_image_label", Workload{Labels: of("mine", "db")}, "mine", "db", true},
		{"runner_names_the_project_image_the_service", Workload{Labels: labels(ComposeProject, "shop"), ImageLabels: labels(ComposeService, "web")}, "shop", "web", false},
		{"runner_names_the_service_image_the_project", Workload{Labels: labels(ComposeService, "web"), ImageLabels: labels(ComposeProject, "shop")}, "shop", "web", false},
		{"runner_empties_what_the_image_claims", Workload{Labels: of("", "")}, "", "", false},
		{"runner_empties_the_project", Workload{Labels: labels(ComposeProject, "", composeHash, "1"), ImageLabels: labels(ComposeService, "web")}, "", "", false},
		{"project_alone", Workload{Labels: labels(ComposeProject, "shop", composeHash, "1")}, "", "", false},
		{"service_alone", Workload{Labels: labels(ComposeService, "web", composeHash, "1")}, "", "", false},
		{"deployed_by_swarm", Workload{Labels: labels("com.docker.stack.namespace", "shop", "com.docker.swarm.service.name", "shop_web")}, "", "", false},
		{"compose_built_image_deployed_by_swarm", Workload{Labels: labels("com.docker.stack.namespace", "shop"), ImageLabels: of("shop", "web")}, "shop", "web", false},
		{"pod_whose_author_claims_compose_service", Workload{Labels: of("shop", "web", composeHash, "1"), Pod: &Pod{Namespace: "evil"}}, "shop", "web", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			project, service, sure := tc.w.Compose()
			if project != tc.project || service != tc.service || sure != tc.sure {
				t.Errorf("got %q, %q, sure %v, want %q, %q, sure %v", project, service, sure, tc.project, tc.service, tc.sure)
			}
		})
	}
}

func TestMemberNames(t *testing.T) {
	w := Workload{Members: []Workload{{ID: "a", Name: "web"}, {ID: "b", Name: "sidecar"}, {ID: "c", Name: "web"}}}
	if diff := cmp.Diff([]string{"sidecar", "web", "web"}, w.MemberNames()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if w.Members[0].Name != "web" {
		t.Error("the members were put into another order")
	}
	if got := (&Workload{Name: "web"}).MemberNames(); got != nil {
		t.Errorf("alone: got %q, want nil", got)
	}
}

func TestProof(t *testing.T) {
	all := []Proof{None, Address, Endpoint, Cgroup, Listener}
	for i, p := range all {
		if i > 0 && p <= all[i-1] {
			t.Errorf("%v is not worth more than %v", p, all[i-1])
		}
		var back Proof
		b, err := p.MarshalText()
		if err == nil {
			err = back.UnmarshalText(b)
		}
		if back != p || err != nil {
			t.Errorf("%v became %v, %v", p, back, err)
		}
	}
	for _, s := range []string{"", "Listener", "listener ", "5"} {
		if p, err := ParseProof(s); p != None || err == nil {
			t.Errorf("%q is read as %v, %v", s, p, err)
		}
	}
	if got := Proof(5).String(); got != "Proof(5)" {
		t.Errorf("got %s", got)
	}
}

func TestLookup(t *testing.T) {
	var d Directory
	from := func(s string) Evidence { return Evidence{Proof: Address, Peer: netip.MustParseAddrPort(s)} }
	if w, ok := d.Lookup(Evidence{Proof: Listener, Attachment: 1}); ok || w != nil {
		t.Errorf("an empty directory knows %v", w)
	}
	d.Set(1, Workload{ID: "static:web"})
	for _, tc := range []struct {
		name string
		e    Evidence
		want ID // empty: nobody
	}{
		{"listener", Evidence{Proof: Listener, Attachment: 1}, "static:web"},
		{"another_listener", Evidence{Proof: Listener, Attachment: 2}, ""},
		{"no_listener", Evidence{Proof: Listener}, ""},
		{"attachment_without_proof", Evidence{Proof: None, Attachment: 1}, ""},
		{"attachment_with_the_proof_of_an_address", Evidence{Proof: Address, Attachment: 1}, ""},
		{"cgroup_is_not_in_use", Evidence{Proof: Cgroup, Attachment: 1}, ""},
		{"endpoint_is_not_in_use", Evidence{Proof: Endpoint, Attachment: 1}, ""},
		{"proof_that_there_is_not", Evidence{Proof: 9, Attachment: 1}, ""},
		{"address", from("10.0.0.7:40000"), "address:10.0.0.7"},
		{"address_from_another_port", from("10.0.0.7:1"), "address:10.0.0.7"},
		{"mapped_address_is_the_same", from("[::ffff:10.0.0.7]:1"), "address:10.0.0.7"},
		{"address_with_zone", from("[fe80::1%eth0]:1"), "address:fe80::1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, ok := d.Lookup(tc.e)
			if ok != (tc.want != "") || ok != (w != nil) {
				t.Fatalf("got %v, %v, want %q", w, ok, tc.want)
			}
			if ok && w.ID != tc.want {
				t.Errorf("got %s, want %s", w.ID, tc.want)
			}
		})
	}
	d.Delete(1)
	if _, ok := d.Lookup(Evidence{Proof: Listener, Attachment: 1}); ok || d.Len() != 0 {
		t.Errorf("still known after Delete, of %d", d.Len())
	}
}

// TestAnotherDescriptionIsAnotherPointer: who has looked a workload up may keep what
// follows from it under the pointer.
func TestAnotherDescriptionIsAnotherPointer(t *testing.T) {
	var d Directory
	e := Evidence{Proof: Listener, Attachment: 1}
	d.Set(1, Workload{ID: "static:web", Name: "web"})
	first, _ := d.Lookup(e)
	again, _ := d.Lookup(e)
	if first != again {
		t.Error("two pointers to one description")
	}
	d.Set(1, Workload{ID: "static:web", Name: "db"})
	if now, _ := d.Lookup(e); now == first || now.Name != "db" || first.Name != "web" {
		t.Errorf("was %+v, is %+v", first, now)
	}
}

func TestAllIsInOrder(t *testing.T) {
	var d Directory
	if got := d.All(); len(got) != 0 {
		t.Errorf("an empty directory has %v", got)
	}
	for i, id := range []ID{"c", "a", "b"} {
		d.Set(uint64(i), Workload{ID: id})
	}
	var got []ID
	for _, w := range d.All() {
		got = append(got, w.ID)
	}
	if diff := cmp.Diff([]ID{"a", "b", "c"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestDirectoryIsSafeForConcurrentUse(t *testing.T) {
	var d Directory
	var wg sync.WaitGroup
	for i := range uint64(8) {
		wg.Go(func() {
			for range 200 {
				d.Set(i, Workload{ID: "w"})
				d.Lookup(Evidence{Proof: Listener, Attachment: i})
				d.All()
				d.Delete(i)
			}
		})
	}
	wg.Wait()
	if d.Len() != 0 {
		t.Errorf("%d left", d.Len())
	}
}

// TestWorkloadGoesThroughJSON holds that nothing is lost between agent and proxy.
func TestWorkloadGoesThroughJSON(t *testing.T) {
	one := Workload{
		ID: "docker:a", Name: "web", Labels: labels("team", "shop"), ImageLabels: labels("vendor", "x"),
		Image: "shop/web:3", ImageID: "sha256:1", Pod: &Pod{Namespace: "shop", ServiceAccount: "web", Labels: labels("app", "web")},
	}
	want := Workload{ID: "docker:a+docker:b", Name: "sidecar+web", Members: []Workload{one, {ID: "docker:b", Name: "sidecar"}}}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got Workload
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
