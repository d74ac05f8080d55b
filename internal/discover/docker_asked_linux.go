package discover

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

// The list names a container's image as it was asked for only while that name leads
// to the image; once another image has taken the name, it has the ID instead (the
// engine's function refreshImage). Three others never change: what the list said
// before, what every event of the container says, and what inspect says. The last
// one answers when a start has finished, so it is asked only about what was there
// before anybody listened, and never because something starts.

const (
	// askedWithin bounds the question after one name, and askedWithinAll those after
	// all that are not known. Containers without name wait for them.
	askedWithin    = 250 * time.Millisecond
	askedWithinAll = imageWithin
)

var errNotAsked = errors.New("the engine does not say what image was asked for")

// askedFor is a container's image as it was asked for; empty if the list does not
// say it.
func askedFor(s *container.Summary) string {
	if digestOf(s.Image) != "" { // maybe it was asked for by its ID
		return ""
	}
	return s.Image
}

// nameless reports whether there is an image of which nobody knows what it was
// asked for as.
func (c dockerContainer) nameless() bool { return c.image == "" && c.imageKey.id != "" }

// askNames asks for the names that are not known, first for those of containers
// that run. Whoever is not answered for stays as it is.
func (e *engine) askNames(ctx context.Context, all map[string]dockerContainer) {
	ids := slices.DeleteFunc(slices.Collect(maps.Keys(all)), func(id string) bool { return !all[id].nameless() })
	slices.SortStableFunc(ids, func(a, b string) int {
		switch {
		case all[a].running == all[b].running:
			return 0
		case all[a].running:
			return -1
		}
		return 1
	})
	limit := time.Now().Add(askedWithinAll)
	for _, id := range ids {
		if time.Now().After(limit) {
			return
		}
		c := all[id]
		name, err := e.askName(ctx, id)
		switch {
		case client.IsErrConnectionFailed(err) || ctx.Err() != nil:
			return
		case err != nil:
			e.sayOnce(id, "name of a container's image is not known: no such name allows anything, and all deny", c, err)
			continue
		}
		c.image = name
		all[id] = c
	}
}

func (e *engine) askName(ctx context.Context, id string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askedWithin)
	defer cancel()
	r, err := e.client.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	switch {
	case err != nil:
		return "", err
	case r.Container.Config == nil || r.Container.Config.Image == "":
		return "", errNotAsked
	}
	return r.Container.Config.Image, nil
}
