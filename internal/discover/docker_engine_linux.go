package discover

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"
)

const (
	// callWithin bounds each call to the engine.
	callWithin = 10 * time.Second

	// An engine that is away is asked again after retryFirst, then ever more
	// seldom, up to retryLast.
	retryFirst = 50 * time.Millisecond
	retryLast  = 2 * time.Second
)

var errSilent = fmt.Errorf("silent for %v", callWithin)

// connect makes a client; nothing is sent yet.
func (d *Docker) connect() (*client.Client, error) {
	if d.Host == "" {
		return client.New(client.FromEnv)
	}
	return client.New(client.WithHost(d.Host))
}

// followEngine keeps the containers equal to the engine's until ctx ends.
func (d *Docker) followEngine(ctx context.Context) error {
	pause, images := retryFirst, newImages()
	for ctx.Err() == nil {
		c, err := d.connect()
		if err != nil {
			return err
		}
		e := &engine{Docker: d, client: c, images: images}
		err = e.follow(ctx)
		c.Close()
		if ctx.Err() != nil {
			break
		}
		d.lost(err)
		if e.answered {
			pause = retryFirst
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, retryLast)
	}
	return nil
}

// lost notes that the engine does not answer. Names are not forgotten.
func (d *Docker) lost(err error) {
	d.mu.Lock()
	again := d.view.engine != nil
	d.mu.Unlock()
	d.update(func(v *view) { v.engine = err })
	d.setReady()
	if !again {
		d.Log.Warn("container engine does not answer", "error", err)
	}
}

// engine is one connection to the engine: a stream of events, and calls beside it.
type engine struct {
	*Docker
	client   *client.Client
	answered bool
	images   *images
	again    *time.Timer // to ask again for images
	planned  bool        // again is set

	rescan bool // look for processes in all namespaces, not just in those without name
	look   *time.Timer
	looks  int           // since something new was there
	pause  time.Duration // before the next one
}

// follow listens to events, asks for everything, and then keeps up with events.
// It returns when the stream ends, whatever the reason.
func (e *engine) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	stream := e.listen(ctx, cancel)
	defer func() {
		cancel(nil)
		for range stream.Err { // until the client has let go
		}
	}()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	e.again = time.NewTimer(relistEvery)
	defer e.again.Stop()
	if err := e.listAll(ctx); err != nil {
		return err
	}
	e.answered = true
	e.look = time.NewTimer(0)
	defer e.look.Stop()
	relist := time.NewTicker(relistEvery)
	defer relist.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case err = <-stream.Err:
			if err == nil { // closed
				err = io.EOF
			}
		case m := <-stream.Messages:
			err = e.take(ctx, m, stream.Messages)
		case <-e.wake:
			e.lookSoon()
		case <-e.look.C:
			err = e.identify(ctx)
			e.setReady()
		case <-e.again.C:
			e.askAgain(ctx)
		case <-relist.C:
			err = e.listAll(ctx)
			e.lookSoon()
		}
		if err != nil {
			return err
		}
	}
}

// listen opens the stream of events, beginning with those from now on: the engine
// answers before it has begun to listen by itself.
func (e *engine) listen(ctx context.Context, cancel context.CancelCauseFunc) client.EventsResult {
	limit := time.AfterFunc(callWithin, func() { cancel(errSilent) })
	defer limit.Stop()
	now := time.Now()
	return e.client.Events(ctx, client.EventsListOptions{
		Since:   fmt.Sprintf("%d.%09d", now.Unix(), now.Nanosecond()),
		Filters: make(client.Filters).Add("type", string(events.ContainerEventType)),
	})
}

// heard is what an event has said of a container. It counts more than the list:
// Docker 20.10 tells first, and for a moment lists the state or name from before.
type heard struct {
	name    string // empty: nothing was said
	image   string // as it was asked for; empty: nothing was said
	state   bool   // whether running says something
	running bool
}

// take asks for the containers that events speak of, this one and those that
// have come meanwhile.
func (e *engine) take(ctx context.Context, m events.Message, more <-chan events.Message) error {
	news := make(map[string]heard)
	started := false
	for waiting := true; waiting; {
		h := news[m.Actor.ID]
		switch m.Action {
		case events.ActionStart:
			started = true
			h.state, h.running = true, true
		case events.ActionDie, "died": // Podman's word
			h.state, h.running = true, false
		case events.ActionRename:
			h.name = m.Actor.Attributes["name"]
		}
		switch m.Action {
		case events.ActionStart, events.ActionDie, "died", events.ActionRename,
			events.ActionCreate, events.ActionUpdate, events.ActionDestroy, events.ActionRemove:
			h.image = m.Actor.Attributes["image"] // written over a label of that name
			news[m.Actor.ID] = h
		}
		select {
		case m = <-more:
		default:
			waiting = false
		}
	}
	if len(news) == 0 {
		return nil
	}
	if err := e.refresh(ctx, news); err != nil {
		return err
	}
	if started {
		e.rescan = e.rescan || e.joined(news)
		e.lookSoon()
	}
	return nil
}

// joined reports whether one of the containers shares another's namespace.
func (e *engine) joined(news map[string]heard) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for id := range news {
		if _, ok := e.view.containers[id].joins(); ok {
			return true
		}
	}
	return false
}

// listAll asks for all containers, and forgets those that are not there any more.
func (e *engine) listAll(ctx context.Context) error {
	all, err := e.list(ctx, nil)
	if err != nil {
		return err
	}
	e.rescan = true
	e.describeNew(ctx, all)
	e.askNames(ctx, all)
	now, back := time.Now(), false
	e.update(func(v *view) {
		if v.engine != nil || v.since.IsZero() {
			back, v.since = v.engine != nil, now
		}
		v.engine = nil
		old := v.containers
		v.containers = make(map[string]dockerContainer, len(all))
		for id, c := range all {
			v.containers[id] = c.after(old[id], heard{}, now)
		}
	})
	if back {
		e.Log.Info("container engine answers again", "containers", len(all))
	}
	e.planAgain()
	return nil
}

// refresh asks for some containers, by their ids; those that the engine does not
// list are gone.
func (e *engine) refresh(ctx context.Context, news map[string]heard) error {
	some, err := e.list(ctx, slices.Collect(maps.Keys(news)))
	if err != nil {
		return err
	}
	e.describeNew(ctx, some)
	now := time.Now()
	e.update(func(v *view) {
		for id, h := range news {
			if c, ok := some[id]; ok {
				v.containers[id] = c.after(v.containers[id], h, now)
			} else {
				delete(v.containers, id)
			}
		}
	})
	e.planAgain()
	return nil
}

// after completes what was listed with what was heard, and with what was known
// before: since when it runs, and under which of two listed names. What its image
// was asked for as was known before, or is listed, or heard.
func (c dockerContainer) after(old dockerContainer, h heard, now time.Time) dockerContainer {
	if h.state {
		c.running = h.running
	}
	if c.running {
		c.since = now
		if old.running {
			c.since = old.since
		}
	}
	if c.nameless() { // else the attribute may be a label
		c.image = cmp.Or(old.image, h.image)
	}
	for _, name := range []string{old.name, h.name} {
		if slices.Contains(c.names, name) {
			c.name = name
		}
	}
	return c
}

// list asks for containers by id, or for all, running or not: one that is just
// starting does not run yet.
func (e *engine) list(ctx context.Context, ids []string) (map[string]dockerContainer, error) {
	ctx, cancel := context.WithTimeout(ctx, callWithin)
	defer cancel()
	options := client.ContainerListOptions{All: true}
	if ids != nil {
		options.Filters = make(client.Filters).Add("id", ids...)
	}
	result, err := e.client.ContainerList(ctx, options)
	if err != nil {
		return nil, err
	}
	all := make(map[string]dockerContainer, len(result.Items))
	for _, s := range result.Items {
		c := dockerContainer{
			id: s.ID, names: ownNames(s.Names), image: askedFor(&s), imageKey: keyOfImage(&s), labels: s.Labels,
			mode: s.HostConfig.NetworkMode, running: s.State == "running" || s.State == "paused",
			comes: s.State == "created" || s.State == "restarting",
		}
		if len(c.names) > 0 {
			c.name = c.names[0]
		}
		all[s.ID] = c
	}
	return all, nil
}

// ownNames are a container's own names: of the form /NAME; links have more slashes.
func ownNames(names []string) (own []string) {
	for _, n := range names {
		if n = strings.TrimPrefix(n, "/"); !strings.Contains(n, "/") {
			own = append(own, n)
		}
	}
	return own
}
