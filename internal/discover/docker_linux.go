package discover

import (
	"context"
	"errors"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// The reasons why a container is Missing, beside ErrGone.
var (
	// ErrHostNetwork: the container has no network namespace of its own.
	ErrHostNetwork = errors.New("not covered: shares the host's network")

	// ErrSharedOptOut: the kernel cannot tell the container from another one in
	// the same namespace, which is not to be covered.
	ErrSharedOptOut = errors.New("not covered: shares the network of a container with imdsgate.enable=false")

	// ErrOptedOut: the container has the label imdsgate.enable=false. It is listed
	// for as long as it has a network namespace, so that somebody can say why it gets
	// no metadata.
	ErrOptedOut = errors.New("not covered: the label imdsgate.enable=false")

	// ErrNoNetns: the container runs, and none of the watched namespaces is its.
	ErrNoNetns = errors.New("not covered: no network namespace of it was found")

	// ErrNoContainer: a namespace in which no container was found. It is listed all
	// the same, without a name: nothing in it passes for anybody.
	ErrNoContainer = errors.New("no container found in the network namespace")

	// ErrAmbiguous: a process in a namespace is in a cgroup whose path has the ids of
	// several containers (--cgroup-parent). The namespace is listed without a name.
	ErrAmbiguous = errors.New("the cgroup path names several containers")

	// ErrTwice: the processes in a namespace are of a container that was found in
	// another namespace, too. This one is listed without a name.
	ErrTwice = errors.New("the container has another network namespace already")

	// ErrNoEngine: the engine does not answer. What is known stays listed.
	ErrNoEngine = errors.New("container engine does not answer")
)

// LabelEnable on a container says whether it is covered: true or false. It counts if
// the runner gave it; in an image only false does, for containers that have their
// namespace to themselves. While it is not known which of the two set it, and where
// both set the same, it counts as the image's, and in the first case not at all.
const LabelEnable = "imdsgate.enable"

const (
	defaultNetnsDir = "/run/docker/netns"

	// nameWithin is how long a namespace may be without a container, or a running
	// container without a namespace, before it is reported.
	nameWithin = 10 * time.Second

	// relistEvery is how often everything is asked for anew, in case an event was lost.
	relistEvery = 30 * time.Second
)

// Docker knows the containers of a Docker engine on this host. Set the fields,
// then call Run once; the other methods are safe for concurrent use.
//
// A container's network namespace is seen when the engine makes it: a file
// appears in a folder, some 100 ms before the container's first instruction. It
// is listed at once, without a name, so that it can be steered before anybody is
// in it. Who it is, comes later:
//
//	folder (inotify)   → file is a namespace, inode I     listed, no name
//	/proc/*/ns/net     → a process in I                   the engine's "init"
//	/proc/PID/cgroup   → container id                     the only one the engine knows
//	engine's list call → name, labels, image              listed with its name
//
// The list call, never inspect: that one answers when the start has finished. Only
// what the image of a container was asked for as, if neither list nor event has
// told, is taken from there, later. Whose a label is, the runner's or the image's, is
// told by the image, which is inspected once.
//
// What binds a name to a namespace is the inode, and the inode is the
// namespace's for as long as the file is mounted: no other namespace can have it
// meanwhile. The process is looked at through one descriptor of its /proc folder,
// so a pid that is given to another process in between yields nothing; and the
// file must have had the inode before the look, and have it still. A container
// that is restarted under the same name has a new namespace, with a new file. A
// file that is removed is dropped at once, one that is only unmounted within
// sweepPause. Who opens the namespace by its path holds it, inode and all, from
// then on.
//
// Processes of several containers in one namespace (--network container:NAME)
// make several Found with one path: the kernel cannot tell them apart. Who was told
// to join counts from its creation on, which the engine tells some 100 ms before
// the first instruction, and while it runs, is paused or restarting. One that is
// started again after it had ended is noticed after its start, not before.
//
// Parts of a cgroup's path can be chosen: what is above a container's own id by
// whoever makes it (--cgroup-parent), what is below from inside, with privileges
// that Docker does not give by default. Therefore a path with several ids that the
// engine knows names nobody, and its namespace waits (ErrAmbiguous). And a
// container owns one namespace: another one that seems to be its waits, too, until
// the first is gone (ErrTwice). A privileged container that enters another's
// namespace can only make it a shared one, and after the namespace has its name not
// even that.
//
// Docker needs to see the host's processes (an agent in a container: the host's
// pid namespace), and the folder with the mounts that come later (slave mount
// propagation). Podman's compatible API and libpod's cgroups are understood as they
// are documented, and were not tried; its folder is /run/netns.
type Docker struct {
	// Host is the engine's address. Empty means DOCKER_HOST and its companions in
	// the environment, and unix:///var/run/docker.sock if that is not set.
	Host string

	// NetnsDirs are the folders in which the engine mounts namespaces: "netns" in
	// its exec-root. Empty means /run/docker/netns. Every namespace in them is
	// listed, whoever made it.
	NetnsDirs []string

	// OnlyLabelled covers only containers whose runner gave them the label
	// imdsgate.enable=true, and those that share their namespace. Otherwise all are
	// covered but those with imdsgate.enable=false.
	OnlyLabelled bool

	// Proc is where the host's processes are looked for. Empty means /proc; an agent
	// in a container without the host's pid namespace has them mounted elsewhere.
	Proc string

	// Log is told when the engine goes away and comes back, and of images that it says
	// nothing of; nil means nobody is.
	Log *slog.Logger

	wake   chan struct{} // namespaces have come or gone
	device uint64        // of all namespaces

	mu      sync.Mutex
	view    view
	found   []Found
	missing []Missing
	changed chan struct{}
	ready   chan struct{}
	isReady bool
}

// Run watches until ctx ends, and then returns nil. Other errors mean that the
// folders cannot be watched or that Host is no address. An engine that does not
// answer is no error: it may come.
func (d *Docker) Run(ctx context.Context) error {
	d.mu.Lock()
	d.setUp()
	d.wake = make(chan struct{}, 1)
	d.view.onlyLabelled = d.OnlyLabelled
	d.mu.Unlock()
	if d.Log == nil {
		d.Log = slog.New(slog.DiscardHandler)
	}
	dirs := d.NetnsDirs
	if len(dirs) == 0 {
		dirs = []string{defaultNetnsDir}
	}
	if c, err := d.connect(); err != nil {
		return err
	} else {
		c.Close()
	}
	first := make(map[string]uint64)
	w, err := newNetnsWatch(dirs, func(path string, inode uint64) { first[path] = inode })
	if err != nil {
		return err
	}
	defer w.close()
	d.device = w.device
	if err := w.sweep(); err != nil { // the watch is set: nothing is missed from here on
		return err
	}
	d.setSpaces(first)
	w.tell = func(path string, inode uint64) { d.setSpaces(map[string]uint64{path: inode}) }
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return w.run(ctx) })
	g.Go(func() error { return d.followEngine(ctx) })
	return g.Wait()
}

// Find lists what is known now. The answer comes from memory, and is not to be
// changed.
func (d *Docker) Find() ([]Found, []Missing) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.found, d.missing
}

// Changed tells that Find says something else. It has one reader; what happens
// while that one is busy is told once.
func (d *Docker) Changed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.setUp()
	return d.changed
}

// Ready is closed when all namespaces that were there have been seen, and the
// engine was asked who they are or does not answer. Before that, Find may lack
// workloads that exist: who detaches what is not listed must wait for it.
func (d *Docker) Ready() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.setUp()
	return d.ready
}

// setUp makes what is needed before Run. The caller holds mu.
func (d *Docker) setUp() {
	if d.changed == nil {
		d.changed = make(chan struct{}, 1)
		d.ready = make(chan struct{})
		d.view = view{spaces: make(map[string]*space), containers: make(map[string]dockerContainer)}
	}
}

// setSpaces is told of namespaces that appeared, their inodes by path, or with
// inode zero of those that are gone.
func (d *Docker) setSpaces(inodes map[string]uint64) {
	now := time.Now()
	d.update(func(v *view) {
		for path, inode := range inodes {
			delete(v.spaces, path)
			if inode != 0 {
				v.spaces[path] = &space{inode: inode, seen: now}
			}
		}
	})
	select { // one that is gone may have kept another one from having its name
	case d.wake <- struct{}{}:
	default:
	}
}

// update changes what is known, and tells if that changes what is listed.
func (d *Docker) update(change func(v *view)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change(&d.view)
	found, missing := d.view.list(time.Now())
	if reflect.DeepEqual(found, d.found) && sameMissing(missing, d.missing) {
		return
	}
	d.found, d.missing = found, missing
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

func sameMissing(a, b []Missing) bool {
	return slices.EqualFunc(a, b, func(x, y Missing) bool { return x.ID == y.ID && x.Err.Error() == y.Err.Error() })
}

// setReady notes that everything was asked once.
func (d *Docker) setReady() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.isReady {
		d.isReady = true
		close(d.ready)
	}
}
