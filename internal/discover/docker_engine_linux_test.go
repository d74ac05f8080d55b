package discover

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
	"imdsgate/internal/workload"
)

// startDocker starts a real engine in a VM, with the image box.
func startDocker(t *testing.T, ctx context.Context, args ...string) *testnet.Docker {
	t.Helper()
	f, err := testnet.NewFabric()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	vm, err := f.NewVM()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(vm.Close)
	e, err := testnet.StartDocker(ctx, vm, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	file := filepath.Join(t.TempDir(), "box")
	if err := testnet.BuildStatic(ctx, "../testnet/testdata/box", file); err != nil {
		t.Fatal(err)
	}
	if err := e.Image(ctx, "box", map[string]string{"/box": file}); err != nil {
		t.Fatal(err)
	}
	return e
}

// boxes makes containers that wait.
type boxes struct {
	t   *testing.T
	ctx context.Context
	e   *testnet.Docker
}

func (b boxes) up(name, network string, labels ...string) (id string) {
	b.t.Helper()
	box := testnet.Box{Name: name, Image: "box", Cmd: []string{"/box", "wait"}, Network: network, Labels: make(map[string]string)}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		box.Labels[k] = v
	}
	id, err := b.e.Create(b.ctx, box)
	b.must(err)
	b.must(b.e.Start(b.ctx, id))
	return id
}

func (b boxes) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b boxes) down(names ...string) {
	b.t.Helper()
	for _, n := range names {
		b.must(b.e.Remove(b.ctx, n))
	}
}

// only returns the one workload that d lists under a name.
func only(t *testing.T, d *Docker, name string) Found {
	t.Helper()
	found, _ := d.Find()
	i := slices.IndexFunc(found, func(f Found) bool { return f.Workload.Name == name })
	if i < 0 {
		t.Fatalf("%s is not listed", name)
	}
	return found[i]
}

func TestRealEngine(t *testing.T) {
	testnet.Require(t, testnet.Namespaces, testnet.DockerEngine)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	e := startDocker(t, ctx, "--live-restore")
	b := boxes{t, ctx, e}
	id := b.up("before", "", "team=shop", "com.docker.compose.service=web")

	d := &Docker{Host: e.Host(), NetnsDirs: []string{e.NetnsDir()}}
	runDocker(t, d)
	await(t, d, "found before")
	f := only(t, d, "before")
	image, err := e.ImageID(ctx, "box")
	b.must(err)
	want := workload.Workload{ID: workload.ID("docker:" + id), Name: "before", Image: "box", ImageID: image, Labels: map[string]string{"team": "shop", "com.docker.compose.service": "web"}, ImageLabels: map[string]string{}}
	if diff := cmp.Diff(want, f.Workload); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}

	t.Run("start_and_remove", func(t *testing.T) {
		b.up("after", "")
		await(t, d, "found after", "found before")
		b.down("after")
		await(t, d, "found before")
	})
	t.Run("restart_is_a_new_namespace", func(t *testing.T) {
		was := f
		b.must(e.Restart(ctx, "before"))
		awaitThat(t, d, func(got []string) string {
			if diff := cmp.Diff([]string{"found before"}, got); diff != "" {
				return diff
			}
			if only(t, d, "before").Netns == was.Netns {
				return "still the old namespace"
			}
			return ""
		})
		if now := only(t, d, "before"); now.Workload.ID != was.Workload.ID {
			t.Errorf("id was %s, is %s", was.Workload.ID, now.Workload.ID)
		}
	})
	t.Run("same_name_is_another_container", func(t *testing.T) {
		b.down("before")
		again := b.up("before", "")
		awaitThat(t, d, func(got []string) string {
			if diff := cmp.Diff([]string{"found before"}, got); diff != "" {
				return diff
			}
			return cmp.Diff(workload.ID("docker:"+again), only(t, d, "before").Workload.ID)
		})
	})
	t.Run("rename", func(t *testing.T) {
		b.must(e.Rename(ctx, "before", "renamed"))
		await(t, d, "found renamed")
		b.down("renamed")
		await(t, d)
	})
	t.Run("opted_out", func(t *testing.T) {
		id := b.up("out", "", LabelEnable+"=false")
		b.up("in", "", LabelEnable+"=true")
		await(t, d, "found in", fmt.Sprintf("missing %.11s: %v", "docker:"+id, ErrOptedOut))
		b.down("out", "in")
		await(t, d)
	})
	t.Run("no_network", func(t *testing.T) {
		b.up("alone", "none")
		await(t, d, "found alone")
		b.down("alone")
		await(t, d)
	})
	t.Run("host_network", func(t *testing.T) {
		id := b.up("monitor", "host")
		await(t, d, fmt.Sprintf("missing %.11s: %v", "docker:"+id, ErrHostNetwork))
		b.down("monitor")
		await(t, d)
	})
	t.Run("shared_network", func(t *testing.T) {
		b.up("web", "")
		b.up("sidecar", "container:web")
		await(t, d, "found sidecar", "found web")
		if a, b := only(t, d, "web").Netns, only(t, d, "sidecar").Netns; a != b {
			t.Errorf("two namespaces, %s and %s, want one", a, b)
		}
		b.must(e.Stop(ctx, "sidecar"))
		await(t, d, "found web")
		b.must(e.Start(ctx, "sidecar"))
		await(t, d, "found sidecar", "found web")
		b.down("sidecar")
		await(t, d, "found web")
		b.down("web")
		await(t, d)
	})
	t.Run("joiner_counts_before_it_starts", func(t *testing.T) {
		b.up("web", "")
		await(t, d, "found web")
		_, err := e.Create(ctx, testnet.Box{Name: "later", Image: "box", Cmd: []string{"/box", "wait"}, Network: "container:web"})
		b.must(err)
		await(t, d, "found later", "found web")
		b.down("later")
		await(t, d, "found web")
		id, err := e.Create(ctx, testnet.Box{Name: "short", Image: "box", Cmd: []string{"/box", "say", "hello"}, Network: "container:web", Remove: true})
		b.must(err)
		await(t, d, "found short", "found web")
		b.must(e.Start(ctx, id))
		await(t, d, "found web")
		b.down("web")
		await(t, d)
	})
	t.Run("joiner_that_opts_out_has_to_run_for_it", func(t *testing.T) {
		b.up("web", "")
		id, err := e.Create(ctx, testnet.Box{Name: "out", Image: "box", Cmd: []string{"/box", "wait"}, Network: "container:web", Labels: map[string]string{LabelEnable: "false"}})
		b.must(err)
		await(t, d, "found out", "found web")
		b.must(e.Start(ctx, id))
		awaitThat(t, d, func(got []string) string {
			text := strings.Join(got, "\n")
			if len(got) != 2 || !strings.Contains(text, ErrSharedOptOut.Error()) || !strings.Contains(text, ErrOptedOut.Error()) {
				return text
			}
			return ""
		})
		b.down("out", "web")
		await(t, d)
	})
	t.Run("paths_lead_to_the_containers_namespace", func(t *testing.T) {
		id := b.up("web", "")
		await(t, d, "found web")
		inode, err := netns.Inode(only(t, d, "web").Netns)
		b.must(err)
		chains, err := scanProcesses("/proc", map[uint64]bool{inode: true})
		b.must(err)
		if got := sightOf(chains[inode], func(string) bool { return true }).ids; len(got) != 1 || got[0] != id {
			t.Errorf("in the namespace are %v, want %s", got, id)
		}
		b.down("web")
		await(t, d)
	})
	t.Run("start_that_fails_leaves_nothing", func(t *testing.T) {
		id, err := e.Create(ctx, testnet.Box{Name: "broken", Image: "box", Cmd: []string{"/nonexistent"}})
		b.must(err)
		if err := e.Start(ctx, id); err == nil {
			t.Error("a program that is not there was started")
		}
		b.up("web", "")
		await(t, d, "found web")
		b.down("broken", "web")
		await(t, d)
	})
	t.Run("engine_restart", func(t *testing.T) {
		b.up("stays", "")
		b.up("goes", "")
		await(t, d, "found goes", "found stays")
		b.must(e.StopEngine())
		await(t, d, "found goes", "found stays", engineAway)
		b.must(e.StartEngine(ctx))
		await(t, d, "found goes", "found stays")
		b.down("goes")
		await(t, d, "found stays")
		b.down("stays")
		await(t, d)
	})
	t.Run("only_labelled", func(t *testing.T) {
		only := &Docker{Host: e.Host(), NetnsDirs: []string{e.NetnsDir()}, OnlyLabelled: true}
		runDocker(t, only)
		b.up("plain", "")
		b.up("wanted", "", LabelEnable+"=true")
		await(t, only, "found wanted")
		await(t, d, "found plain", "found wanted")
		b.down("plain", "wanted")
		await(t, only)
		await(t, d)
	})
}

// TestRealImages has images claim labels that they cannot give.
func TestRealImages(t *testing.T) {
	testnet.Require(t, testnet.Namespaces, testnet.DockerEngine)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e := startDocker(t, ctx)
	b := boxes{t, ctx, e}
	file := filepath.Join(t.TempDir(), "box")
	b.must(testnet.BuildStatic(ctx, "../testnet/testdata/box", file))
	b.must(e.Image(ctx, "claims", map[string]string{"/box": file}, "LABEL com.docker.compose.project=shop com.docker.compose.service=web team=shop"))
	b.must(e.Image(ctx, "poses", map[string]string{"/box": file}, "LABEL io.kubernetes.pod.namespace=prod io.kubernetes.pod.uid=1 io.kubernetes.docker.type=container"))
	b.must(e.Image(ctx, "hides", map[string]string{"/box": file}, "LABEL "+LabelEnable+"=false"))
	d := &Docker{Host: e.Host(), NetnsDirs: []string{e.NetnsDir()}}
	runDocker(t, d)

	claimed := map[string]string{"com.docker.compose.project": "shop", "com.docker.compose.service": "web", "team": "shop"}
	create := func(name string, labels map[string]string) {
		t.Helper()
		_, err := e.Create(ctx, testnet.Box{Name: name, Image: "claims", Cmd: []string{"/box", "wait"}, Labels: labels})
		b.must(err)
	}
	check := func(name string, given map[string]string, compose bool) {
		t.Helper()
		brought := maps.Clone(claimed)
		maps.DeleteFunc(brought, func(k, _ string) bool { _, ok := given[k]; return ok })
		w := only(t, d, name).Workload
		if diff := cmp.Diff([]map[string]string{given, brought}, []map[string]string{w.Labels, w.ImageLabels}); diff != "" {
			t.Errorf("%s: -want +got:\n%s", name, diff)
		}
		if project, service, sure := w.Compose(); project == "" || service == "" || sure != compose || w.Pod != nil {
			t.Errorf("%s: compose says %q, %q, sure %v; pod %v", name, project, service, sure, w.Pod)
		}
	}
	for _, tc := range []struct {
		name    string
		given   map[string]string
		compose bool
	}{
		{"image_claims_compose_service", map[string]string{}, false},
		{"compose_built_image_run_by_compose", map[string]string{"com.docker.compose.config-hash": "1"}, true},
		{"runner_overrides_image_label", map[string]string{"team": "admin"}, false},
		{"runner_names_another_service", map[string]string{"com.docker.compose.project": "mine", "com.docker.compose.service": "db"}, true},
	} {
		create(tc.name, tc.given)
		b.must(e.Start(ctx, tc.name))
		await(t, d, "found "+tc.name)
		check(tc.name, tc.given, tc.compose)
		b.down(tc.name)
		await(t, d)
	}

	t.Run("image_claims_pod", func(t *testing.T) {
		_, err := e.Create(ctx, testnet.Box{Name: "poses", Image: "poses", Cmd: []string{"/box", "wait"}})
		b.must(err)
		b.must(e.Start(ctx, "poses"))
		await(t, d, "found poses")
		if p := only(t, d, "poses").Workload.Pod; p == nil || !p.Claimed || p.Namespace != "prod" {
			t.Errorf("pod %+v, want a claimed one in prod", p)
		}
		b.down("poses")
		await(t, d)
	})
	t.Run("image_of_a_sidecar_opts_out", func(t *testing.T) {
		id, err := e.Create(ctx, testnet.Box{Name: "hides", Image: "hides", Cmd: []string{"/box", "wait"}})
		b.must(err)
		b.must(e.Start(ctx, id))
		await(t, d, fmt.Sprintf("missing %.11s: %v", "docker:"+id, ErrOptedOut))
		b.down("hides")
		b.up("web", "")
		_, err = e.Create(ctx, testnet.Box{Name: "hides", Image: "hides", Cmd: []string{"/box", "wait"}, Network: "container:web"})
		b.must(err)
		b.must(e.Start(ctx, "hides"))
		await(t, d, "found hides", "found web")
		b.down("hides", "web")
		await(t, d)
	})

	create("stays", map[string]string{"com.docker.compose.config-hash": "1"})
	id, err := e.ImageID(ctx, "claims")
	b.must(err)
	b.must(e.RemoveImage(ctx, id))
	b.must(e.Start(ctx, "stays"))
	await(t, d, "found stays")
	check("stays", map[string]string{"com.docker.compose.config-hash": "1"}, true) // known from before
	late := &Docker{Host: e.Host(), NetnsDirs: []string{e.NetnsDir()}}
	runDocker(t, late)
	await(t, late, "found stays")
	w := only(t, late, "stays").Workload
	if _, _, sure := w.Compose(); len(w.Labels) != 0 || len(w.ImageLabels) != len(claimed)+1 || sure {
		t.Errorf("after the image was removed: %+v", w)
	}
}

// TestEngineRestartWithoutLiveRestore has the containers end with the engine.
func TestEngineRestartEndsContainers(t *testing.T) {
	testnet.Require(t, testnet.Namespaces, testnet.DockerEngine)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e := startDocker(t, ctx)
	b := boxes{t, ctx, e}
	d := &Docker{Host: e.Host(), NetnsDirs: []string{e.NetnsDir()}}
	runDocker(t, d)
	b.up("web", "")
	await(t, d, "found web")
	b.must(e.StopEngine())
	await(t, d, engineAway)
	b.must(e.StartEngine(ctx))
	await(t, d)
	b.must(e.Start(ctx, "web"))
	await(t, d, "found web")
}

// TestCgroupParentIsNoName has a container choose a cgroup whose path has the id of
// another one in it.
func TestCgroupParentIsNoName(t *testing.T) {
	testnet.Require(t, testnet.Namespaces, testnet.DockerEngine)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e := startDocker(t, ctx)
	b := boxes{t, ctx, e}
	d := &Docker{Host: e.Host(), NetnsDirs: []string{e.NetnsDir()}}
	runDocker(t, d)
	victim := b.up("victim", "")
	await(t, d, "found victim")
	for _, name := range []string{victim, "docker-" + victim + ".scope"} {
		id, err := e.Create(ctx, testnet.Box{Name: "thief", Image: "box", Cmd: []string{"/box", "wait"}, CgroupParent: "/" + e.CgroupParent + "/x/" + name})
		b.must(err)
		b.must(e.Start(ctx, id))
		awaitThat(t, d, func(got []string) string {
			found, missing := d.Find()
			owned := 0
			for _, f := range found {
				if f.Workload.ID == workload.ID("docker:"+victim) {
					owned++
				}
			}
			if owned != 1 {
				t.Fatalf("%s: the victim is listed %d times: %v", name, owned, got)
			}
			if len(missing) != 1 {
				return fmt.Sprint(got)
			}
			if diff := cmp.Diff([]string{"found ?", "found victim"}, got[:2]); diff != "" || !errors.Is(missing[0].Err, ErrAmbiguous) {
				return fmt.Sprint(diff, missing)
			}
			return ""
		})
		late := &Docker{Host: e.Host(), NetnsDirs: []string{e.NetnsDir()}} // finds both there
		runDocker(t, late)
		awaitThat(t, late, func(got []string) string {
			if len(got) != 3 {
				return fmt.Sprint(got)
			}
			return cmp.Diff([]string{"found ?", "found victim"}, got[:2])
		})
		b.down("thief")
		await(t, d, "found victim")
	}
}

// starts notes when namespaces were first listed, and when workloads were named.
type starts struct {
	mu    sync.Mutex
	seen  map[string]time.Time // by path
	named map[workload.ID]time.Duration
}

func (s *starts) note(d *Docker) {
	found, _ := d.Find()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range found {
		if _, ok := s.seen[f.Netns]; !ok {
			s.seen[f.Netns] = time.Now()
		}
		if _, ok := s.named[f.Workload.ID]; !ok && f.Workload.ID != "" {
			s.named[f.Workload.ID] = time.Since(s.seen[f.Netns])
		}
	}
}

// TestShortLivedContainersAreAllNamed starts containers that end at once and are
// removed, four at a time.
func TestShortLivedContainersAreAllNamed(t *testing.T) {
	testnet.Require(t, testnet.Namespaces, testnet.DockerEngine)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	const runs, parallel = 100, 4
	e := startDocker(t, ctx)
	d := &Docker{Host: e.Host(), NetnsDirs: []string{e.NetnsDir()}}
	runDocker(t, d)

	s := &starts{seen: make(map[string]time.Time), named: make(map[workload.ID]time.Duration)}
	noting, stop := context.WithCancel(ctx)
	var noted sync.WaitGroup
	noted.Go(func() {
		for {
			select {
			case <-d.Changed():
				s.note(d)
			case <-noting.Done():
				return
			}
		}
	})
	ids := make(chan string, runs)
	var running sync.WaitGroup
	for range parallel {
		running.Go(func() {
			for range runs / parallel {
				ran, err := e.Run(ctx, testnet.Box{Image: "box", Cmd: []string{"/box", "say", "hello"}, Labels: map[string]string{"team": "shop"}, Remove: true})
				if err != nil {
					t.Error(err)
				}
				ids <- ran.ID
			}
		})
	}
	running.Wait()
	close(ids)
	stop()
	noted.Wait()
	await(t, d)

	var took []time.Duration
	for id := range ids {
		after, ok := s.named["docker:"+workload.ID(id)]
		if !ok {
			t.Errorf("%s was never named", id)
		}
		took = append(took, after)
	}
	slices.Sort(took)
	t.Logf("named after the namespace was listed: p50 %v, p99 %v", took[len(took)/2], took[len(took)*99/100])
	if len(s.seen) != runs {
		t.Errorf("%d namespaces were listed, want %d", len(s.seen), runs)
	}
}
