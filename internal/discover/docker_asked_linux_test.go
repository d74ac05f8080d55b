package discover

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"

	"imdsgate/internal/testnet"
	"imdsgate/internal/workload"
)

// serveContainer answers with the little that is asked for.
func (f *fakeEngine) serveContainer(w http.ResponseWriter, r *http.Request, id string) {
	f.mu.Lock()
	name, ok := f.names[id]
	f.inspected = append(f.inspected, id)
	f.mu.Unlock()
	switch {
	case !ok:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"message":"No such container: %s"}`, id)
	case name == "":
		<-r.Context().Done()
	default:
		json.NewEncoder(w).Encode(map[string]any{"Id": id, "Config": map[string]any{"Image": name}})
	}
}

// name sets what inspect says that a container's image was asked for as.
func (f *fakeEngine) name(id, image string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.names[id] = image
}

// inspectedOnes is which containers were inspected.
func (f *fakeEngine) inspectedOnes() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.inspected)
}

// tagMoves has the engine list a container's image by its ID, as it does when
// another image has the name.
func (f *fakeEngine) tagMoves(id string) {
	f.change(id, func(c map[string]any) { c["Image"] = c["ImageID"] })
}

// awaitImage waits until web is listed with an image as it was asked for.
func awaitImage(t *testing.T, d *Docker, want string) {
	t.Helper()
	awaitThat(t, d, func([]string) string {
		w := workload.Workload{}
		found, _ := d.Find()
		if i := slices.IndexFunc(found, func(f Found) bool { return f.Workload.Name == "web" }); i >= 0 {
			w = found[i].Workload
		}
		if w.Image != want || w.ImageID != boxID {
			return fmt.Sprintf("image %q, %q; want %q, %q", w.Image, w.ImageID, want, boxID)
		}
		return ""
	})
}

func TestAskedFor(t *testing.T) {
	digits := strings.TrimPrefix(boxID, "sha256:")
	for image, want := range map[string]string{
		"box": "box", "": "", boxID: "", digits: "", strings.ToUpper(digits): "", digits[:12]: digits[:12],
		"box@" + boxID: "box@" + boxID, "sha256:" + digits[:12]: "sha256:" + digits[:12], "registry.example:5000/shop/web:3": "registry.example:5000/shop/web:3",
	} {
		if got := askedFor(&container.Summary{Image: image}); got != want {
			t.Errorf("%q: got %q, want %q", image, got, want)
		}
	}
}

// TestNewImageTakesTheTag has a name stay what it was, although the list has it no
// more, and nobody is asked.
func TestNewImageTakesTheTag(t *testing.T) {
	f := newFakeEngine(t)
	f.image(boxID, nil)
	d := web(t, f, nil)
	awaitImage(t, d, "box")
	f.tagMoves(webID)
	f.change(sidecarID, func(c map[string]any) { c["State"] = "exited" })
	f.say(t, "rename", webID)
	f.say(t, "create", sidecarID)
	await(t, d, "found web", hostMissing)
	awaitImage(t, d, "box")
	f.stop()
	await(t, d, "found web", engineAway, hostMissing)
	f.start(t)
	await(t, d, "found web", hostMissing)
	awaitImage(t, d, "box")
	if got := f.inspectedOnes(); len(got) > 0 {
		t.Errorf("inspected %v", got)
	}
}

// TestTagHadMovedBefore has a name that only inspect knows; asked for once.
func TestTagHadMovedBefore(t *testing.T) {
	f := newFakeEngine(t)
	f.image(boxID, nil)
	f.tagMoves(webID)
	f.name(webID, "shop/web:1")
	f.start(t)
	d := &Docker{Host: f.host(), NetnsDirs: []string{t.TempDir()}}
	runDocker(t, d)
	d.mu.Lock()
	got := d.view.containers[webID].image
	d.mu.Unlock()
	if got != "shop/web:1" {
		t.Errorf("when ready: image %q, want shop/web:1", got)
	}
	d.update(func(v *view) { v.spaces["/n/1"] = &space{inode: 1, seen: time.Now(), owners: []string{webID}} })
	f.stop()
	f.start(t)
	f.say(t, "create", webID)
	awaitImage(t, d, "shop/web:1")
	if got := f.inspectedOnes(); !slices.Equal(got, []string{webID}) {
		t.Errorf("inspected %v, want one once", got)
	}
}

// TestNameThatNobodyTells has inspect wait, as it does while a container starts: the
// image has no name then, and neither a digest for one. An event tells it.
func TestNameThatNobodyTells(t *testing.T) {
	for _, tc := range []struct {
		name  string
		hangs bool
	}{{"inspect_waits", true}, {"inspect_refuses", false}} {
		t.Run(tc.name, func(t *testing.T) {
			log := new(logged)
			f := newFakeEngine(t)
			f.image(boxID, nil)
			f.tagMoves(webID)
			if tc.hangs {
				f.name(webID, "")
			}
			d := web(t, f, slog.New(slog.NewTextHandler(log, nil)))
			awaitImage(t, d, "")
			asked := len(f.inspectedOnes())
			f.say(t, "start", webID)
			awaitImage(t, d, "box")
			if n := strings.Count(log.text(), "name of a container's image is not known"); n != 1 || asked == 0 {
				t.Errorf("asked %d times, said %d times, want once:\n%s", asked, n, log.text())
			}
		})
	}
}

func TestNameIsAskedForAgain(t *testing.T) {
	f := newFakeEngine(t)
	f.image(boxID, nil)
	f.tagMoves(webID)
	d := web(t, f, nil)
	awaitImage(t, d, "")
	f.name(webID, boxID) // it was asked for by its ID
	awaitImage(t, d, boxID)
}

// TestLabelsStayWhenANameIsAskedFor has the image gone, and remembered no more.
func TestLabelsStayWhenANameIsAskedFor(t *testing.T) {
	f := newFakeEngine(t)
	f.name(webID, "box")
	f.start(t)
	d := &Docker{Host: f.host(), Log: slog.New(slog.DiscardHandler)}
	d.setUp()
	c, err := d.connect()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	known := dockerContainer{id: webID, labels: composed, imageKey: imageKey{id: boxID}}
	known.sortLabels(nil)
	d.view.containers[webID] = known
	e := &engine{Docker: d, client: c, images: newImages(), again: time.NewTimer(time.Hour)}
	defer e.again.Stop()
	e.askAgain(t.Context())
	if got := d.view.containers[webID]; got.image != "box" || !got.sorted || len(got.brought) > 0 || len(f.lookedAt()) > 0 {
		t.Errorf("image %q, brought %v; asked for images %q", got.image, got.brought, f.lookedAt())
	}
}

func TestAttributeIsNoNameOfNoImage(t *testing.T) {
	c := dockerContainer{id: "a"}.after(dockerContainer{}, heard{image: "box"}, t0) // a label
	if c.image != "" {
		t.Errorf("a container without image has the image %q", c.image)
	}
}

// TestRealTagMoves has another image take the name of a container's.
func TestRealTagMoves(t *testing.T) {
	testnet.Require(t, testnet.Namespaces, testnet.DockerEngine)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e := startDocker(t, ctx, "--live-restore")
	b := boxes{t, ctx, e}
	first, err := e.ImageID(ctx, "box")
	b.must(err)
	watch := func() *Docker {
		d := &Docker{Host: e.Host(), NetnsDirs: []string{e.NetnsDir()}}
		runDocker(t, d)
		return d
	}
	check := func(when string, d *Docker, name, image string) {
		t.Helper()
		if w := only(t, d, name).Workload; w.Image != image || w.ImageID != first {
			t.Errorf("%s: %s has image %q, %q; want %q, %q", when, name, w.Image, w.ImageID, image, first)
		}
	}
	d := watch()
	b.up("web", "")
	create := func(name, image string) {
		t.Helper()
		_, err := e.Create(ctx, testnet.Box{Name: name, Image: image, Cmd: []string{"/box", "wait"}})
		b.must(err)
	}
	create("later", "box")
	create("digest", first)
	b.must(e.Start(ctx, "digest"))
	await(t, d, "found digest", "found web")
	check("at first", d, "web", "box")
	check("at first", d, "digest", first)

	file := filepath.Join(t.TempDir(), "box")
	b.must(testnet.BuildStatic(ctx, "../testnet/testdata/box", file))
	b.must(e.Image(ctx, "box", map[string]string{"/box": file}, "LABEL newer=1"))
	if second, err := e.ImageID(ctx, "box"); err != nil || second == first {
		t.Fatalf("the tag has not moved: %s, %v", second, err)
	}
	b.must(e.Rename(ctx, "web", "shop")) // listed again
	await(t, d, "found digest", "found shop")
	check("listed again", d, "shop", "box")
	b.must(e.Start(ctx, "later"))
	await(t, d, "found digest", "found later", "found shop")
	check("made before, started after", d, "later", "box")

	late := watch()
	for _, d := range []*Docker{d, late} {
		await(t, d, "found digest", "found later", "found shop")
		check("watched from now on", d, "shop", "box")
		check("watched from now on", d, "later", "box")
		check("watched from now on", d, "digest", first)
	}
	b.must(e.StopEngine())
	await(t, d, "found digest", "found later", "found shop", engineAway)
	check("without engine", d, "shop", "box")
	b.must(e.StartEngine(ctx))
	for _, d := range []*Docker{d, late, watch()} {
		await(t, d, "found digest", "found later", "found shop")
		check("another engine", d, "shop", "box")
		check("another engine", d, "digest", first)
	}
	b.must(e.Restart(ctx, "shop"))
	await(t, d, "found digest", "found later", "found shop")
	check("restarted", d, "shop", "box")
}
