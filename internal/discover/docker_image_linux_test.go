package discover

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"

	"imdsgate/internal/workload"
)

const boxID = "sha256:17e042f4b6c1fe172038d326a151cddd75517408ddb1070b1c7d72a14465929a" // in testdata/list.json

func TestSortLabels(t *testing.T) {
	shop := map[string]string{workload.ComposeProject: "shop", workload.ComposeService: "web"}
	more := func(m map[string]string, pairs ...string) map[string]string {
		m = maps.Clone(m)
		for i := 0; i < len(pairs); i += 2 {
			m[pairs[i]] = pairs[i+1]
		}
		return m
	}
	none := map[string]string{}
	for _, tc := range []struct {
		name                         string
		container, image             map[string]string
		given, brought               map[string]string
		composeProject, composeWords string // as Compose says: project, and "sure" or ""
	}{
		{"no_labels", none, none, none, none, "", ""},
		{"image_without_labels", shop, nil, shop, none, "shop", "sure"},
		{"image_claims_compose_service", shop, shop, none, shop, "shop", ""},
		{"runner_overrides_image_label", map[string]string{"team": "shop"}, map[string]string{"team": "admin"}, map[string]string{"team": "shop"}, none, "", ""},
		{"runner_gives_what_the_image_has", map[string]string{"team": "shop"}, map[string]string{"team": "shop"}, none, map[string]string{"team": "shop"}, "", ""},
		{"runner_empties_what_the_image_has", map[string]string{"team": ""}, map[string]string{"team": "shop"}, map[string]string{"team": ""}, none, "", ""},
		{"image_has_an_empty_label", map[string]string{"team": ""}, map[string]string{"team": ""}, none, map[string]string{"team": ""}, "", ""},
		{"runner_gives_an_empty_label", map[string]string{"team": ""}, nil, map[string]string{"team": ""}, none, "", ""},
		{"another_letter_case_is_another_label", map[string]string{"Team": "shop", "team": "shop"}, map[string]string{"team": "shop"}, map[string]string{"Team": "shop"}, map[string]string{"team": "shop"}, "", ""},
		{"compose_built_image_run_by_compose", more(shop, "com.docker.compose.config-hash", "1"), shop, map[string]string{"com.docker.compose.config-hash": "1"}, shop, "shop", "sure"},
		{"compose_built_image_run_by_hand", more(shop, "team", "shop"), shop, map[string]string{"team": "shop"}, shop, "shop", ""},
		{"image_with_labels_that_the_container_lacks", none, shop, none, none, "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := dockerContainer{labels: tc.container}
			before := maps.Clone(tc.container)
			c.sortLabels(tc.image)
			if diff := cmp.Diff([]map[string]string{tc.given, tc.brought, before}, []map[string]string{c.given, c.brought, c.labels}); diff != "" || !c.sorted {
				t.Errorf("given, brought, labels: -want +got:\n%s", diff)
			}
			w := new(view).workload(c)
			project, _, sure := w.Compose()
			if project != tc.composeProject || sure != (tc.composeWords == "sure") {
				t.Errorf("compose says %q, sure %v", project, sure)
			}
		})
	}
}

func TestKeyOfImage(t *testing.T) {
	const digits = "17e042f4b6c1fe172038d326a151cddd75517408ddb1070b1c7d72a14465929a"
	with := func(descriptor string) *container.Summary {
		s := new(container.Summary)
		if err := json.Unmarshal(fmt.Appendf(nil, `{"ImageID":"sha256:%s","ImageManifestDescriptor":{%s}}`, digits, descriptor), s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, tc := range []struct {
		name string
		s    *container.Summary
		want imageKey
	}{
		{"digest", &container.Summary{ImageID: "sha256:" + digits}, imageKey{id: "sha256:" + digits}},
		{"none", &container.Summary{}, imageKey{}},
		{"a_name", &container.Summary{ImageID: "box:latest"}, imageKey{}},
		{"too_short", &container.Summary{ImageID: "sha256:17e0"}, imageKey{}},
		{"no_hexadecimal", &container.Summary{ImageID: "sha256:" + strings.Repeat("x", 64)}, imageKey{}},
		{"a_path", &container.Summary{ImageID: "sha256:../" + digits[:61]}, imageKey{}},
		{"platform", with(`"platform":{"os":"linux","architecture":"amd64"}`), imageKey{"sha256:" + digits, "linux/amd64/", ""}},
		{"implied_variant", with(`"platform":{"os":"linux","architecture":"arm64","variant":"v8"}`), imageKey{"sha256:" + digits, "linux/arm64/", ""}},
		{"other_variant", with(`"platform":{"os":"linux","architecture":"arm","variant":"v6"}`), imageKey{"sha256:" + digits, "linux/arm/v6", ""}},
		{"usual_variant_left_out", with(`"platform":{"os":"linux","architecture":"arm"}`), imageKey{"sha256:" + digits, "linux/arm/v7", ""}},
		{"platform_is_not_said", with(``), imageKey{"sha256:" + digits, "unknown", ""}},
		{"manifest", with(`"digest":"sha256:1","platform":{"os":"linux","architecture":"amd64"}`), imageKey{"sha256:" + digits, "linux/amd64/", "sha256:1"}},
		{"without_prefix", &container.Summary{ImageID: digits}, imageKey{id: "sha256:" + digits}},
		{"in_place_of_the_name_alone", &container.Summary{Image: "sha256:" + digits}, imageKey{id: "sha256:" + digits}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := keyOfImage(tc.s); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

// web runs a Docker of which container web of the captured list owns a namespace.
func web(t *testing.T, f *fakeEngine, log *slog.Logger) *Docker {
	t.Helper()
	f.start(t)
	d := &Docker{Host: f.host(), NetnsDirs: []string{t.TempDir()}, Log: log}
	runDocker(t, d)
	d.update(func(v *view) { v.spaces["/n/1"] = &space{inode: 1, seen: time.Now(), owners: []string{webID}} })
	return d
}

// awaitLabels waits until web is listed with these labels.
func awaitLabels(t *testing.T, d *Docker, given, brought map[string]string) {
	t.Helper()
	awaitThat(t, d, func([]string) string {
		found, _ := d.Find()
		i := slices.IndexFunc(found, func(f Found) bool { return f.Workload.Name == "web" })
		if i < 0 {
			return "web is not listed"
		}
		w := found[i].Workload
		return cmp.Diff([]map[string]string{given, brought}, []map[string]string{w.Labels, w.ImageLabels})
	})
}

var composed = map[string]string{workload.ComposeProject: "shop", workload.ComposeService: "web"} // in testdata/list.json

func TestImageIsAskedForOnce(t *testing.T) {
	f := newFakeEngine(t)
	f.image(boxID, map[string]string{workload.ComposeService: "web", "vendor": "x"})
	d := web(t, f, nil)
	awaitLabels(t, d, map[string]string{workload.ComposeProject: "shop"}, map[string]string{workload.ComposeService: "web"})
	found, _ := d.Find()
	if got := found[0].Workload.ImageID; got != boxID {
		t.Errorf("image %q, want %q", got, boxID)
	}
	for _, state := range []string{"exited", "running", "exited", "running"} {
		f.change(sidecarID, func(c map[string]any) { c["State"], c["Labels"] = state, map[string]any{"team": state} })
		f.say(t, "create", sidecarID)
		awaitThat(t, d, func(got []string) string {
			if (len(got) > 1 && got[0] == "found sidecar") != (state == "running") {
				return fmt.Sprint(got)
			}
			return ""
		})
	}
	if got := f.lookedAt(); !slices.Equal(got, []string{boxID}) {
		t.Errorf("asked for images %q, want one once", got)
	}
}

// TestImageThatIsGone has labels count as the image's until the engine tells of it.
func TestImageThatIsGone(t *testing.T) {
	log := new(logged)
	f := newFakeEngine(t)
	d := web(t, f, slog.New(slog.NewTextHandler(log, nil)))
	awaitLabels(t, d, nil, composed)
	awaitLabels(t, d, nil, composed)
	f.image(boxID, map[string]string{})
	awaitLabels(t, d, composed, map[string]string{}) // nobody has told that it is there
	if n := strings.Count(log.text(), "labels of an image are not known"); n != 1 {
		t.Errorf("said %d times, want once:\n%s", n, log.text())
	}
}

// TestWhatWasKnownStays has a container listed again when its image is gone, and is
// not remembered either.
func TestWhatWasKnownStays(t *testing.T) {
	f := newFakeEngine(t)
	f.start(t)
	d := &Docker{Host: f.host(), Log: slog.New(slog.DiscardHandler)}
	c, err := d.connect()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	e := &engine{Docker: d, client: c, images: newImages()}
	known := dockerContainer{id: webID, labels: composed, imageKey: imageKey{id: boxID}}
	known.sortLabels(nil)
	for _, tc := range []struct {
		name  string
		now   dockerContainer
		stays bool
	}{
		{"the_same", dockerContainer{labels: maps.Clone(composed), imageKey: known.imageKey}, true},
		{"other_labels", dockerContainer{labels: map[string]string{"team": "shop"}, imageKey: known.imageKey}, false},
		{"another_image", dockerContainer{labels: composed, imageKey: imageKey{id: "sha256:" + strings.Repeat("0", 64)}}, false},
		{"another_platform", dockerContainer{labels: composed, imageKey: imageKey{boxID, "linux/arm64/", ""}}, false},
		{"another_manifest", dockerContainer{labels: composed, imageKey: imageKey{boxID, "", "sha256:1"}}, false},
		{"no_image", dockerContainer{labels: composed}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			all := map[string]dockerContainer{webID: tc.now}
			before := len(f.lookedAt())
			e.describe(t.Context(), all, map[string]dockerContainer{webID: known})
			got := all[webID]
			if got.sorted != tc.stays || maps.Equal(got.given, composed) != tc.stays || !tc.stays && len(got.given) > 0 {
				t.Errorf("given %v, brought %v", got.given, got.brought)
			}
			if asked := len(f.lookedAt()) - before; tc.stays && asked > 0 {
				t.Errorf("asked %d times", asked)
			}
		})
	}
}

// TestImageOfWhichTheEngineSaysNothing: the container has its name all the same.
func TestImageOfWhichTheEngineSaysNothing(t *testing.T) {
	f := newFakeEngine(t)
	f.setImage(boxID, nil)
	d := web(t, f, nil)
	awaitLabels(t, d, nil, composed)
	f.image(boxID, nil)
	awaitLabels(t, d, composed, map[string]string{})
}

// TestImageOfAnotherPlatform has a list of images under one ID, one of which claims
// a label, and the engine tells of the other.
func TestImageOfAnotherPlatform(t *testing.T) {
	f := newFakeEngine(t)
	f.image(boxID, map[string]string{})
	f.change(webID, func(c map[string]any) {
		c["ImageManifestDescriptor"] = map[string]any{"platform": map[string]any{"os": "linux", "architecture": "riscv64"}}
	})
	d := web(t, f, nil)
	awaitLabels(t, d, nil, composed)
	f.setImage(boxID, map[string]any{"Architecture": "riscv64", "Config": map[string]any{"Labels": composed}})
	awaitThat(t, d, func([]string) string { // now it tells of the right one, which has them all
		d.mu.Lock()
		defer d.mu.Unlock()
		if !d.view.containers[webID].sorted {
			return "still not known"
		}
		return ""
	})
	awaitLabels(t, d, map[string]string{}, composed)
}

// TestManifestIsTheOnlyOneOfItsPlatform has a list of images with two for one
// platform, of which the engine tells of one.
func TestManifestIsTheOnlyOneOfItsPlatform(t *testing.T) {
	list := func(text string) (list []image.ManifestSummary) {
		for s := range strings.FieldsSeq(text) {
			digest, arch, _ := strings.Cut(s, ":")
			data := "null"
			if arch != "" {
				data = fmt.Sprintf(`{"Platform":{"os":"linux","architecture":%q}}`, arch)
			}
			var m image.ManifestSummary
			if err := json.Unmarshal(fmt.Appendf(nil, `{"Descriptor":{"digest":"sha256:%s"},"ImageData":%s}`, digest, data), &m); err != nil {
				t.Fatal(err)
			}
			list = append(list, m)
		}
		return list
	}
	k := imageKey{boxID, "linux/amd64/", "sha256:1"}
	for _, tc := range []struct {
		name, list string
		want       bool
	}{
		{"the_only_one", "1:amd64", true},
		{"beside_another_platforms_and_an_attestation", "2:arm64 1:amd64 3:", true},
		{"beside_another_one_of_its_platform", "1:amd64 2:amd64", false},
		{"behind_another_one_of_its_platform", "2:amd64 1:amd64", false},
		{"not_there", "2:amd64", false},
		{"not_there_and_nobody_else_of_its_platform", "2:arm64", false},
		{"said_to_be_no_image", "1:", false},
		{"engine_lists_none", "", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := k.alone(list(tc.list)); got != tc.want {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

// TestImageOfAnotherManifest has the containerd store's answers.
func TestImageOfAnotherManifest(t *testing.T) {
	f := newFakeEngine(t)
	f.version = "1.48"
	amd := map[string]any{"os": "linux", "architecture": "amd64"}
	manifest := func(digest string) map[string]any {
		return map[string]any{"ID": digest, "Descriptor": map[string]any{"digest": digest}, "Available": true, "Kind": "image", "ImageData": map[string]any{"Platform": amd}}
	}
	tell := func(manifests ...any) {
		f.setImage(boxID, map[string]any{"Architecture": "amd64", "Config": map[string]any{"Labels": map[string]string{}}, "Manifests": manifests})
	}
	tell(manifest("sha256:other"), manifest("sha256:its"))
	f.change(webID, func(c map[string]any) {
		c["ImageManifestDescriptor"] = map[string]any{"digest": "sha256:its", "platform": amd}
	})
	d := web(t, f, nil)
	awaitLabels(t, d, nil, composed)
	tell(manifest("sha256:its"))
	awaitLabels(t, d, composed, map[string]string{})
}

func TestImagesAreBounded(t *testing.T) {
	m := newImages()
	for i := range 2 * maxImages {
		m.add(imageKey{id: fmt.Sprint(i)}, nil)
	}
	if _, ok := m.labels[imageKey{id: fmt.Sprint(2*maxImages - 1)}]; !ok || len(m.labels) != maxImages {
		t.Errorf("%d are remembered, the last one: %v", len(m.labels), ok)
	}
}

// logged is a log that can be read.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
