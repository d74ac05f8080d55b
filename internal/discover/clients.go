package discover

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
)

// Clients are the containers of an engine that are led to the proxy by a forward
// of their own, for the platforms where nobody can do that from outside. It does by
// the engine's API what somebody would do by hand. Safe for concurrent use.
type Clients struct {
	Host  string // of the engine's API, as Locator has it
	Label string // of those who want it, KEY or KEY=VALUE
	Proxy string // label of the proxy, KEY or KEY=VALUE

	Root      string   // where the folder Folder is made in a container: C:\ or /
	User      string   // who may change a container's network
	Caps      []string // that a side-car needs besides; none on Windows
	Isolation string   // of side-cars; only process isolation shares a network. Empty on Linux
}

// Folder is where Put puts files, below Root.
const Folder = "imdsgate"

// Labels of a side-car.
const (
	forLabel   = "imdsgate.forward-for"   // id of its client
	byLabel    = "imdsgate.forward-by"    // Clients.Label of the agent that made it
	sinceLabel = "imdsgate.forward-since" // when its client had started
)

// Client is a running container that has the label.
type Client struct {
	ID, Name string
	Addrs    []netip.Addr // all its own, with a proxy and without
	Addr     netip.Addr   // the one on the network that it shares with the proxy
	Proxy    netip.Addr   // the proxy's there; the zero value while there is none
	Why      error        // why there is none

	Sidecar  string // id of its side-car; empty if it has none
	SideRuns bool   // the side-car does
	SideOld  bool   // its client has started again since: it may be in the network from before

	sideSince string // the side-car's sinceLabel
}

// Sight is what there is at a moment.
type Sight struct {
	Clients []Client
	Orphans []string // ids of side-cars whose client is gone or does not run
}

// Look lists clients and this agent's own side-cars: those that were made for the
// same Label. The error is the engine's.
func (cs *Clients) Look(ctx context.Context) (Sight, error) {
	l := cs.locator()
	c, err := l.connect()
	if err != nil {
		return Sight{}, err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, locateCall)
	defer cancel()
	list, err := c.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return Sight{}, engineFailed(err)
	}
	all := make([]sighting, len(list.Items))
	for i, s := range list.Items {
		all[i] = sightingOf(s)
	}
	s := cs.sight(all)
	for i := range s.Clients {
		if err := s.Clients[i].compare(ctx, c); err != nil {
			return Sight{}, engineFailed(err)
		}
	}
	return s, nil
}

func (cs *Clients) locator() *Locator { return &Locator{Host: cs.Host, Label: cs.Proxy} }

func (cs *Clients) sight(all []sighting) (s Sight) {
	sidecars := make(map[string]sighting)
	for _, c := range all {
		if whose, ok := c.labels[forLabel]; ok {
			if c.labels[byLabel] == cs.Label { // another agent sees to its own
				sidecars[whose] = c
			}
			continue
		}
		if !c.running() || !c.has(cs.Label) || c.has(cs.Proxy) || strings.HasPrefix(c.mode, "container:") {
			continue // one that joins another's network has what that one has
		}
		s.Clients = append(s.Clients, cs.client(c, all))
	}
	slices.SortFunc(s.Clients, func(a, b Client) int { return strings.Compare(a.ID, b.ID) })
	for i := range s.Clients {
		if side, ok := sidecars[s.Clients[i].ID]; ok {
			s.Clients[i].Sidecar, s.Clients[i].SideRuns, s.Clients[i].sideSince = side.id, side.running(), side.labels[sinceLabel]
			delete(sidecars, s.Clients[i].ID)
		}
	}
	for _, side := range sidecars {
		s.Orphans = append(s.Orphans, side.id)
	}
	slices.Sort(s.Orphans)
	return s
}

func (cs *Clients) client(c sighting, all []sighting) Client {
	got := Client{ID: c.id, Name: c.name()}
	for _, network := range slices.Sorted(maps.Keys(c.addrs)) {
		if a := c.addrs[network]; a.IsValid() {
			got.Addrs = append(got.Addrs, a)
		}
	}
	l := cs.locator()
	l.Client = c.id
	p, err := l.pick(all)
	if err != nil {
		got.Why = err
		return got
	}
	got.Proxy, got.Addr = p.Addr, c.addrs[p.Network]
	return got
}

// Follow calls look at once, after each event that matters, and now and then,
// until ctx is cancelled, and then returns nil. An error of look's is told, and
// asks for another look soon. It is called from this goroutine.
func (cs *Clients) Follow(ctx context.Context, look func(context.Context) error, failed func(error)) error {
	c, err := cs.locator().connect()
	if err != nil {
		return err
	}
	defer c.Close()
	for ctx.Err() == nil {
		err := cs.follow(ctx, c, look)
		if ctx.Err() != nil {
			break
		}
		failed(err)
		select {
		case <-time.After(locateRetry):
		case <-ctx.Done():
		}
	}
	return nil
}

// follow is Follow until something fails.
func (cs *Clients) follow(ctx context.Context, c *client.Client, look func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	stream := (&follower{client: c}).listen(ctx, cancel)
	defer func() {
		cancel()
		for range stream.Err { // until the client has let go
		}
	}()
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-next.C:
			if err := look(ctx); err != nil {
				return err
			}
			next.Reset(locateRelist)
		case m := <-stream.Messages:
			if matters[m.Action] {
				next.Reset(locateAfter[1]) // the list follows the event
			}
		case err := <-stream.Err:
			return engineFailed(fmt.Errorf("events: %w", err))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Path is how a container names a file of Put's.
func (cs *Clients) Path(name string) string {
	if strings.HasSuffix(cs.Root, `\`) {
		return cs.Root + Folder + `\` + name
	}
	return cs.Root + Folder + "/" + name
}

// Put writes files into a container, by name, into Folder. It works in one that
// was created, or that runs with process isolation.
func (cs *Clients) Put(ctx context.Context, id string, files map[string][]byte) error {
	text, err := archive(files)
	if err != nil {
		return err
	}
	return cs.call(ctx, func(ctx context.Context, c *client.Client) error {
		_, err := c.CopyToContainer(ctx, id, client.CopyToContainerOptions{DestinationPath: cs.Root, Content: bytes.NewReader(text)})
		return err
	})
}

// archive is the files as the engine takes them.
func archive(files map[string][]byte) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: Folder + "/", Typeflag: tar.TypeDir, Mode: 0o755})
	for name, text := range files {
		err = errors.Join(err, w.WriteHeader(&tar.Header{Name: Folder + "/" + name, Size: int64(len(text)), Mode: 0o755}))
		_, werr := w.Write(text)
		err = errors.Join(err, werr)
	}
	return b.Bytes(), errors.Join(err, w.Close())
}

// Exec starts a program in a container, as User, and does not wait for it.
func (cs *Clients) Exec(ctx context.Context, id string, argv []string) (exec string, err error) {
	err = cs.call(ctx, func(ctx context.Context, c *client.Client) error {
		made, err := c.ExecCreate(ctx, id, client.ExecCreateOptions{User: cs.User, Cmd: argv})
		if err != nil {
			return err
		}
		exec = made.ID
		_, err = c.ExecStart(ctx, made.ID, client.ExecStartOptions{Detach: true})
		return err
	})
	return exec, err
}

// Ended reports whether a program of Exec's has ended, and how. One that the engine
// does not know any more has ended too.
func (cs *Clients) Ended(ctx context.Context, exec string) (ended bool, code int, err error) {
	err = cs.call(ctx, func(ctx context.Context, c *client.Client) error {
		r, err := c.ExecInspect(ctx, exec, client.ExecInspectOptions{})
		if errdefs.IsNotFound(err) {
			ended = true
			return nil
		}
		ended, code = err == nil && !r.Running, r.ExitCode
		return err
	})
	return ended, code, err
}

// callTime is for calls that make the engine work.
const callTime = time.Minute

func (cs *Clients) call(ctx context.Context, do func(context.Context, *client.Client) error) error {
	c, err := cs.locator().connect()
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	if err := do(ctx, c); err != nil {
		return fmt.Errorf("container engine: %w", err)
	}
	return nil
}
