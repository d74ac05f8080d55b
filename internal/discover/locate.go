package discover

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	api "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"
)

// Locator finds the address of the proxy container in a Docker engine, for the way
// without an agent. It speaks the engine's API from 1.40 on.
type Locator struct {
	Host string // of the engine's API, as DOCKER_HOST has it; empty means the environment's, else the platform's own

	Label   string // of the proxy, KEY or KEY=VALUE; unused with a Name
	Name    string // of the proxy, or 12 to 64 digits of its id
	Client  string // the same of a container that the address is for; it need not run yet; empty means nobody in particular
	Network string // that the address is to be on; empty means any
}

// Place is where the proxy is.
type Place struct {
	Name    string     `json:"name"`
	ID      string     `json:"id"`
	Network string     `json:"network"`
	Addr    netip.Addr `json:"address"` // IPv4 where the network has it
}

// NotLocatedError says that no container fits, that several do, or that the one
// has no address that fits, or several; and lists what was seen. The next moment
// it may be otherwise.
type NotLocatedError struct{ Why string }

func (e *NotLocatedError) Error() string { return e.Why }

const (
	locateCall   = 10 * time.Second // at most for a call to the engine
	locateRetry  = time.Second      // until an engine that is away is asked again
	locateRelist = 30 * time.Second // between looks without an event
)

// locateAfter is when to look after an event: the engine tells of a network before
// its list of containers shows it.
var locateAfter = []time.Duration{20 * time.Millisecond, 200 * time.Millisecond, 2 * time.Second}

// Locate looks once. Errors: *NotLocatedError; os.ErrPermission where the engine's
// socket is not ours to use; others where the engine does not answer.
func (l *Locator) Locate(ctx context.Context) (Place, error) {
	c, err := l.connect()
	if err != nil {
		return Place{}, err
	}
	defer c.Close()
	return l.look(ctx, c)
}

// Follow looks again and again until ctx is cancelled, and then returns nil. It
// tells, from this goroutine, the place or the reason why there is none (see
// Locate) at first and whenever that is another one.
func (l *Locator) Follow(ctx context.Context, tell func(Place, error)) error {
	c, err := l.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	f := &follower{Locator: l, client: c, tell: tell}
	for ctx.Err() == nil {
		err := f.follow(ctx)
		if ctx.Err() != nil {
			break
		}
		f.say(Place{}, err)
		select {
		case <-time.After(locateRetry):
		case <-ctx.Done():
		}
	}
	return nil
}

// connect makes a client; nothing is sent yet.
func (l *Locator) connect() (*client.Client, error) {
	c, err := client.New(client.FromEnv)
	if l.Host != "" {
		c, err = client.New(client.WithHost(l.Host))
	}
	if err != nil {
		return nil, fmt.Errorf("container engine: %w", err)
	}
	return c, nil
}

func (l *Locator) look(ctx context.Context, c *client.Client) (Place, error) {
	ctx, cancel := context.WithTimeout(ctx, locateCall)
	defer cancel()
	list, err := c.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return Place{}, engineFailed(err)
	}
	all := make([]sighting, len(list.Items))
	for i, s := range list.Items {
		all[i] = sightingOf(s)
	}
	return l.pick(all)
}

// engineFailed adds the reason that the client's library tells in words only.
func engineFailed(err error) error {
	if client.IsErrConnectionFailed(err) && strings.HasPrefix(err.Error(), "permission denied") {
		return fmt.Errorf("container engine: %w: %w", os.ErrPermission, err)
	}
	return fmt.Errorf("container engine: %w", err)
}

// sightingOf is what we want to know of a container, in our own words.
func sightingOf(s api.Summary) sighting {
	c := sighting{id: s.ID, state: string(s.State), labels: s.Labels, mode: s.HostConfig.NetworkMode, addrs: make(map[string]netip.Addr)}
	for _, n := range s.Names {
		c.names = append(c.names, strings.TrimPrefix(n, "/"))
	}
	if s.NetworkSettings == nil {
		return c
	}
	for network, e := range s.NetworkSettings.Networks {
		c.addrs[network] = netip.Addr{}
		switch {
		case e == nil:
		case e.IPAddress.IsValid():
			c.addrs[network] = e.IPAddress
		case e.GlobalIPv6Address.IsValid():
			c.addrs[network] = e.GlobalIPv6Address
		}
	}
	return c
}

// follower is one connection to the engine.
type follower struct {
	*Locator
	client *client.Client
	tell   func(Place, error)
	told   string // what was said last
}

// say tells what is news.
func (f *follower) say(p Place, err error) {
	if err != nil {
		p = Place{}
	}
	if now := fmt.Sprint(p, err); now != f.told {
		f.told = now
		f.tell(p, err)
	}
}

// matters are the events after which another address may be the right one.
var matters = map[events.Action]bool{
	events.ActionCreate: true, events.ActionStart: true, events.ActionDie: true, events.ActionDestroy: true, events.ActionRename: true,
	events.ActionPause: true, events.ActionUnPause: true, events.ActionConnect: true, events.ActionDisconnect: true,
}

// follow listens for events, looks, and looks again after those that matter. It
// returns when the engine does not answer, or ctx has ended.
func (f *follower) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	stream := f.listen(ctx, cancel)
	defer func() {
		cancel()
		for range stream.Err { // until the client has let go
		}
	}()
	next := time.NewTimer(0)
	defer next.Stop()
	var after []time.Duration // from the next look to those that follow
	for {
		select {
		case <-next.C:
			if err := f.lookOnce(ctx); err != nil {
				return err
			}
			if len(after) == 0 {
				after = []time.Duration{locateRelist}
			}
			next.Reset(after[0])
			after = after[1:]
		case m := <-stream.Messages:
			if matters[m.Action] {
				next.Reset(locateAfter[0])
				after = locateAfter[1:]
			}
		case err := <-stream.Err:
			return engineFailed(fmt.Errorf("events: %w", err))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// lookOnce looks and tells. The error is the engine's.
func (f *follower) lookOnce(ctx context.Context) error {
	p, err := f.look(ctx, f.client)
	if err != nil && !errors.As(err, new(*NotLocatedError)) {
		return err
	}
	f.say(p, err)
	return nil
}

// listen opens the stream of events. The engine answers before it has begun to
// listen itself: so events are asked for from now on, explicitly.
func (f *follower) listen(ctx context.Context, cancel func()) client.EventsResult {
	limit := time.AfterFunc(locateCall, cancel)
	defer limit.Stop()
	now := time.Now()
	return f.client.Events(ctx, client.EventsListOptions{
		Since:   fmt.Sprintf("%d.%09d", now.Unix(), now.Nanosecond()),
		Filters: make(client.Filters).Add("type", string(events.ContainerEventType), string(events.NetworkEventType)),
	})
}
