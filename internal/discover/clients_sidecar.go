package discover

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

// AddSidecar starts a container that shares a client's network. Its files are there
// before it starts. It is started again with the engine, and when it ends. A client
// has one side-car by its name: a second agent's is refused by the engine.
func (cs *Clients) AddSidecar(ctx context.Context, c Client, image string, argv []string, files map[string][]byte) (id string, err error) {
	err = cs.call(ctx, func(ctx context.Context, api *client.Client) error {
		since, err := startedAt(ctx, api, c.ID) // before: if it starts again meanwhile, the side-car is seen to be old
		if err != nil {
			return err
		}
		made, err := api.ContainerCreate(ctx, client.ContainerCreateOptions{
			Name: sidecarName(c.ID),
			Config: &container.Config{Image: image, User: cs.User, Cmd: argv[1:], Entrypoint: argv[:1],
				Labels: map[string]string{forLabel: c.ID, byLabel: cs.Label, sinceLabel: since}},
			HostConfig: &container.HostConfig{
				NetworkMode: container.NetworkMode("container:" + c.ID), CapAdd: cs.Caps, Isolation: container.Isolation(cs.Isolation),
				RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyUnlessStopped},
			},
		})
		id = made.ID
		return err
	})
	if err != nil {
		return "", err
	}
	if err = cs.Put(ctx, id, files); err == nil {
		err = cs.StartSidecar(ctx, id)
	}
	if err != nil {
		return "", errors.Join(err, cs.RemoveSidecar(ctx, id))
	}
	return id, nil
}

func sidecarName(client string) string { return "imdsgate-forward-" + client[:min(len(client), 12)] }

// StartSidecar starts one that does not run.
func (cs *Clients) StartSidecar(ctx context.Context, id string) error {
	return cs.call(ctx, func(ctx context.Context, c *client.Client) error {
		_, err := c.ContainerStart(ctx, id, client.ContainerStartOptions{})
		return err
	})
}

// RemoveSidecar ends and removes one. That it is gone is no error.
func (cs *Clients) RemoveSidecar(ctx context.Context, id string) error {
	return cs.call(ctx, func(ctx context.Context, c *client.Client) error {
		if _, err := c.ContainerStop(ctx, id, client.ContainerStopOptions{}); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if _, err := c.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true}); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		return nil
	})
}

// compare finds out whether a client is younger than its side-car. The list of
// containers does not tell when one has started.
func (c *Client) compare(ctx context.Context, api *client.Client) error {
	if c.Sidecar == "" {
		return nil
	}
	since, err := startedAt(ctx, api, c.ID)
	if errdefs.IsNotFound(err) {
		return nil // the next look will miss it
	}
	c.SideOld = err == nil && since != c.sideSince
	return err
}

// startedAt is when a container was started last, in the engine's words.
func startedAt(ctx context.Context, api *client.Client, id string) (string, error) {
	r, err := api.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if err != nil || r.Container.State == nil {
		return "", err
	}
	return r.Container.State.StartedAt, nil
}
