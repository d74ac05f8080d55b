package discover

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fakeEngine answers like Docker 20.10, with what was captured from one: the
// list, ping and the stream of events. Containers can be changed meanwhile.
type fakeEngine struct {
	path   string
	events chan string // a line of the stream
	server *httptest.Server

	mu        sync.Mutex
	list      []map[string]any
	calls     []string
	images    map[string]map[string]any // by ID: changes to the one that was captured; nil: never answers
	looked    []string                  // images that were asked for
	inspected []string
	names     map[string]string // images as they were asked for, by the container's id; empty: never answers

	version string // of the API; set before start
}

func newFakeEngine(t *testing.T) *fakeEngine {
	t.Helper()
	b, err := os.ReadFile("testdata/list.json")
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeEngine{path: filepath.Join(t.TempDir(), "engine.sock"), events: make(chan string), images: make(map[string]map[string]any), names: make(map[string]string), version: "1.41"}
	if err := json.Unmarshal(b, &f.list); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.stop)
	return f
}

func (f *fakeEngine) host() string { return "unix://" + f.path }

func (f *fakeEngine) start(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", f.path)
	if err != nil {
		t.Fatal(err)
	}
	f.server = httptest.NewUnstartedServer(f)
	f.server.Listener.Close()
	f.server.Listener = l
	f.server.Start()
}

func (f *fakeEngine) stop() {
	if f.server != nil {
		f.server.CloseClientConnections()
		f.server.Close()
		f.server = nil
	}
}

func (f *fakeEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Api-Version", f.version)
	_, call, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	if rest, ok := strings.CutPrefix(call, "images/"); ok {
		f.serveImage(w, r, strings.TrimSuffix(rest, "/json"))
		return
	}
	if rest, ok := strings.CutPrefix(call, "containers/"); ok && rest != "json" {
		f.serveContainer(w, r, strings.TrimSuffix(rest, "/json"))
		return
	}
	switch call {
	case "":
		fmt.Fprint(w, "OK") // _ping
	case "containers/json":
		f.serveList(w, r)
	case "events":
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		for {
			select {
			case line := <-f.events:
				fmt.Fprintln(w, line)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	default:
		http.Error(w, `{"message":"page not found"}`, http.StatusNotFound)
	}
}

func (f *fakeEngine) serveList(w http.ResponseWriter, r *http.Request) {
	var filters struct{ ID map[string]bool }
	if s := r.URL.Query().Get("filters"); s != "" {
		if err := json.Unmarshal([]byte(s), &filters); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var some []map[string]any
	for _, c := range f.list {
		if filters.ID == nil || filters.ID[c["Id"].(string)] {
			some = append(some, c)
		}
	}
	f.calls = append(f.calls, strings.Join(slices.Sorted(maps.Keys(filters.ID)), ","))
	json.NewEncoder(w).Encode(some)
}

func (f *fakeEngine) serveImage(w http.ResponseWriter, r *http.Request, id string) {
	f.mu.Lock()
	change, ok := f.images[id]
	f.looked = append(f.looked, id)
	f.mu.Unlock()
	b, err := os.ReadFile("testdata/image.json")
	var image map[string]any
	if err == nil {
		err = json.Unmarshal(b, &image)
	}
	switch {
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	case !ok:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"message":"no such image: %[1]s: No such image: %[1]s"}`, id)
	case change == nil:
		<-r.Context().Done()
	default:
		image["Id"] = id
		maps.Copy(image, change)
		json.NewEncoder(w).Encode(image)
	}
}

// image sets the labels of an image.
func (f *fakeEngine) image(id string, labels map[string]string) {
	f.setImage(id, map[string]any{"Config": map[string]any{"Labels": labels}})
}

func (f *fakeEngine) setImage(id string, change map[string]any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.images[id] = change
}

// lookedAt is which images were asked for.
func (f *fakeEngine) lookedAt() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.looked)
}

// change edits a container of the list; with no function it is removed.
func (f *fakeEngine) change(id string, edit func(map[string]any)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.list, func(c map[string]any) bool { return c["Id"] == id })
	if edit == nil {
		f.list = slices.Delete(f.list, i, i+1)
		return
	}
	edit(f.list[i])
}

// asked is which containers were asked for; an empty line is all of them.
func (f *fakeEngine) asked() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// say sends an event that was captured, by its action and container.
func (f *fakeEngine) say(t *testing.T, action, id string) {
	t.Helper()
	b, err := os.ReadFile("testdata/events.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, fmt.Sprintf(`{"status":%q,"id":%q`, action, id)) {
			select {
			case f.events <- strings.TrimSpace(line):
			case <-time.After(10 * time.Second):
				t.Fatal("nobody listens to events")
			}
			return
		}
	}
	t.Fatalf("no event %s of %s was captured", action, id)
}

// runDocker runs d until the test ends, and waits until it is ready.
func runDocker(t *testing.T, d *Docker) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	select {
	case <-d.Ready():
	case <-time.After(20 * time.Second):
		t.Fatal("not ready within 20 s")
	}
}

// await waits until what d lists, a line for each, is as wanted.
func await(t *testing.T, d *Docker, want ...string) {
	t.Helper()
	awaitThat(t, d, func(got []string) string { return cmp.Diff(want, got) })
}

func awaitThat(t *testing.T, d *Docker, diff func(got []string) string) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		text := diff(lines(d))
		if text == "" {
			return
		}
		select {
		case <-d.Changed():
		case <-limit:
			found, missing := d.Find()
			t.Fatalf("after 20 s, -want +got:\n%s\nfound %v\nmissing %v", text, found, missing)
		}
	}
}

// lines is what d lists, without what differs from run to run.
func lines(d *Docker) (lines []string) {
	found, missing := d.Find()
	for _, f := range found {
		if f.Workload.ID == "" {
			lines = append(lines, "found ?")
			continue
		}
		lines = append(lines, "found "+f.Workload.Name)
	}
	slices.Sort(lines)
	for _, m := range missing {
		lines = append(lines, fmt.Sprintf("missing %.11s: %v", m.ID, reason(m)))
	}
	return lines
}

const (
	hostMissing = "missing docker:779a: not covered: shares the host's network"
	engineAway  = "missing docker:engi: container engine does not answer"
)

func TestEngineGoesAwayAndComesBack(t *testing.T) {
	f := newFakeEngine(t)
	f.image(boxID, nil)
	d := &Docker{Host: f.host(), NetnsDirs: []string{t.TempDir()}}
	runDocker(t, d)
	await(t, d, engineAway)
	f.start(t)
	await(t, d, hostMissing)
	f.stop()
	await(t, d, engineAway, hostMissing) // not forgotten
	f.change(monitorID, nil)
	f.start(t)
	await(t, d) // gone while nobody could say so
}

func TestEventsAreFollowed(t *testing.T) {
	f := newFakeEngine(t)
	f.image(boxID, nil)
	f.change(monitorID, func(c map[string]any) { c["State"] = "created" })
	f.start(t)
	d := &Docker{Host: f.host(), NetnsDirs: []string{t.TempDir()}}
	runDocker(t, d)
	await(t, d)
	f.change(monitorID, func(c map[string]any) { c["State"] = "running" })
	f.say(t, "kill", webID) // of no interest
	f.say(t, "start", monitorID)
	await(t, d, hostMissing)
	f.change(monitorID, func(c map[string]any) { c["Labels"] = map[string]any{LabelEnable: "false"} })
	f.say(t, "rename", webID) // asks for web alone
	f.say(t, "create", monitorID)
	await(t, d)
	if calls := f.asked(); calls[0] != "" || slices.Contains(calls[1:], "") {
		t.Errorf("asked for %q, want all containers once, and then single ones", calls)
	}
}

// TestJoinerCountsFromItsCreation has the engine tell of a joiner, no process of
// which is ever seen.
func TestJoinerCountsFromItsCreation(t *testing.T) {
	f := newFakeEngine(t)
	f.change(monitorID, nil)
	f.change(sidecarID, func(c map[string]any) { c["State"] = "exited" })
	f.start(t)
	d := &Docker{Host: f.host(), NetnsDirs: []string{t.TempDir()}}
	runDocker(t, d)
	d.update(func(v *view) { v.spaces["/n/1"] = &space{inode: 1, seen: time.Now(), owners: []string{webID}} })
	await(t, d, "found web")
	for _, state := range []string{"created", "running", "paused", "restarting"} {
		f.change(sidecarID, func(c map[string]any) { c["State"] = state })
		f.say(t, "create", sidecarID)
		await(t, d, "found sidecar", "found web")
		f.change(sidecarID, func(c map[string]any) { c["State"] = "exited" })
		f.say(t, "create", sidecarID)
		await(t, d, "found web")
	}
}

// TestHangingEngine has an engine accept connections and say nothing: as good as
// away, for as long as it takes.
func TestHangingEngineDoesNotHoldUpTheEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "engine.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			accepted <- c
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	d := &Docker{Host: "unix://" + path, NetnsDirs: []string{t.TempDir()}}
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	c := <-accepted
	defer c.Close()
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("Run: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("Run did not end")
	}
}

func TestRunRefusesABadHost(t *testing.T) {
	d := &Docker{Host: "nonsense", NetnsDirs: []string{t.TempDir()}}
	if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("got %v, want an error that names the address", err)
	}
}

func TestHostComesFromTheEnvironment(t *testing.T) {
	f := newFakeEngine(t)
	f.start(t)
	t.Setenv("DOCKER_HOST", f.host())
	d := &Docker{NetnsDirs: []string{t.TempDir()}}
	runDocker(t, d)
	await(t, d, hostMissing)
}

func TestZeroDockerFindsNothing(t *testing.T) {
	var d Docker
	if found, missing := d.Find(); len(found)+len(missing) > 0 {
		t.Errorf("got %v, %v", found, missing)
	}
	select {
	case <-d.Changed():
		t.Error("nothing has changed")
	case <-d.Ready():
		t.Error("nothing is ready")
	default:
	}
}

// TestChangesAreToldOnce has many changes and a slow reader.
func TestChangesAreToldOnce(t *testing.T) {
	var d Docker
	d.Changed()
	d.wake = make(chan struct{}, 1)
	for i := range 100 {
		d.setSpaces(map[string]uint64{fmt.Sprint("/n/", i): uint64(i + 1)}) // must not block
	}
	d.setSpaces(map[string]uint64{"/n/7": 0})
	<-d.Changed()
	if found, _ := d.Find(); len(found) != 99 {
		t.Errorf("found %d, want 99", len(found))
	}
	d.setSpaces(map[string]uint64{"/n/none": 0})
	select {
	case <-d.Changed():
		t.Error("told of a change that was none")
	default:
	}
}
