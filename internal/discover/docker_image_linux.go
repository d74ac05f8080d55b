package discover

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"maps"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/client"
)

// The engine lists one map of labels for a container: those that its runner gave,
// and under them those of its image (its function merge). What equals the
// image's may be the image's alone, so the image is looked up. As long as it is not
// known, all labels count as the image's: that takes away, and gives nothing.

const (
	// imageWithin bounds the question after one image. Containers without name wait
	// for it, and so do the next ones.
	imageWithin = 2 * time.Second

	// imageRetryFirst and relistEvery bound the waits between questions after an image
	// of which the engine did not tell.
	imageRetryFirst = time.Second

	// maxImages bounds what is remembered. More than that are asked for again.
	maxImages = 1024
)

var (
	errNoImage       = errors.New("the engine names no image by its digest")
	errOtherPlatform = errors.New("the engine tells of another platform's image")
	errOtherManifest = errors.New("the engine may tell of another manifest of the image")
)

// imageKey is an image; one ID may stand for a list of images, by platform, and
// even with several for one platform (the containerd image store).
type imageKey struct {
	id       string // "sha256:…"; empty: none
	platform string // empty if the ID says it all
	manifest string // the digest of the one in the list; empty if the engine does not say
}

// keyOfImage is the image that a container was made from.
func keyOfImage(s *container.Summary) imageKey {
	k := imageKey{id: cmp.Or(digestOf(s.ImageID), digestOf(s.Image))}
	if d := s.ImageManifestDescriptor; d != nil {
		k.platform, k.manifest = "unknown", d.Digest.String()
		if p := d.Platform; p != nil {
			k.platform = platformName(p.OS, p.Architecture, p.Variant)
		}
	}
	return k
}

// digestOf is an image's ID in one form, "sha256:" and digits, which Podman left
// out once; empty if it is none.
func digestOf(id string) string {
	digits := strings.ToLower(strings.TrimPrefix(id, "sha256:"))
	if _, err := hex.DecodeString(digits); err != nil || len(digits) != 64 {
		return ""
	}
	return "sha256:" + digits
}

// platformName writes a platform in one way: some variants are implied.
func platformName(os, arch, variant string) string {
	if arch == "arm64" && variant == "v8" || arch == "amd64" && variant == "v1" {
		variant = ""
	}
	if arch == "arm" {
		variant = cmp.Or(variant, "v7")
	}
	return os + "/" + arch + "/" + variant
}

// images is what is known of images: their labels, which never change. It belongs
// to the goroutine that follows the engine.
type images struct {
	labels map[imageKey]map[string]string
	said   map[any]bool  // troubles that were logged: with an imageKey, or a container by its id
	pause  time.Duration // before the next question after those that are not known
}

func newImages() *images {
	return &images{labels: make(map[imageKey]map[string]string), said: make(map[any]bool)}
}

func (m *images) add(k imageKey, labels map[string]string) {
	for other := range m.labels {
		if len(m.labels) < maxImages {
			break
		}
		delete(m.labels, other) // whichever
	}
	m.labels[k] = labels
	delete(m.said, k)
}

// describeNew describes what was just listed.
func (e *engine) describeNew(ctx context.Context, all map[string]dockerContainer) {
	old := make(map[string]dockerContainer, len(all))
	e.mu.Lock()
	for id := range all {
		old[id] = e.view.containers[id]
	}
	e.mu.Unlock()
	e.describe(ctx, all, old)
}

// describe tells the labels of containers apart, with at most one question after
// each image; old is what was known of them, and what their images were asked for
// as stays.
func (e *engine) describe(ctx context.Context, all, old map[string]dockerContainer) {
	failed := make(map[imageKey]bool)
	silent := false
	for id, c := range all {
		before := old[id]
		c.image = cmp.Or(before.image, c.image)
		switch labels, known := e.images.labels[c.imageKey]; {
		case before.sorted && before.imageKey == c.imageKey && maps.Equal(before.labels, c.labels):
			c.given, c.brought, c.sorted = before.given, before.brought, true
		case known || len(c.labels) == 0: // an image with labels would have left some
			c.sortLabels(labels)
		case failed[c.imageKey] || silent:
			c.brought = c.labels
		default:
			labels, err := e.askImage(ctx, c.imageKey)
			if err != nil {
				c.brought = c.labels
				failed[c.imageKey] = true
				silent = client.IsErrConnectionFailed(err) || errors.Is(err, context.DeadlineExceeded)
				if ctx.Err() == nil {
					e.sayOnce(c.imageKey, "labels of an image are not known: no label of its containers allows anything", c, err)
				}
				break
			}
			e.images.add(c.imageKey, labels)
			c.sortLabels(labels)
		}
		all[id] = c
	}
}

// askImage asks for the labels of an image.
func (e *engine) askImage(ctx context.Context, k imageKey) (map[string]string, error) {
	if k.id == "" {
		return nil, errNoImage
	}
	ctx, cancel := context.WithTimeout(ctx, imageWithin)
	defer cancel()
	var options []client.ImageInspectOption
	if k.manifest != "" {
		options = append(options, client.ImageInspectWithManifests(true))
	}
	r, err := e.client.ImageInspect(ctx, k.id, options...)
	switch {
	case err != nil:
		return nil, err
	case k.platform != "" && k.platform != platformName(r.Os, r.Architecture, r.Variant):
		return nil, errOtherPlatform
	case k.manifest != "" && !k.alone(r.Manifests):
		return nil, errOtherManifest
	case r.Config == nil:
		return nil, nil
	}
	return r.Config.Labels, nil
}

// alone reports whether a manifest is the only one of its platform in a list: the
// engine tells of one of the platform, and not of which.
func (k imageKey) alone(list []image.ManifestSummary) bool {
	found := false
	for _, m := range list {
		if m.ImageData == nil { // an attestation, or nobody knows what
			continue
		}
		its, p := m.Descriptor.Digest.String() == k.manifest, m.ImageData.Platform
		if !its && platformName(p.OS, p.Architecture, p.Variant) == k.platform {
			return false
		}
		found = found || its
	}
	return found
}

// sayOnce logs what is not known of a container's image, once for each about. Very
// many are logged again.
func (e *engine) sayOnce(about any, what string, c dockerContainer, err error) {
	if e.images.said[about] {
		return
	}
	if len(e.images.said) >= maxImages {
		clear(e.images.said)
	}
	e.images.said[about] = true
	e.Log.Warn(what, "image", cmp.Or(c.imageKey.id, c.image), "container", c.name, "error", err)
}

// sortLabels tells the runner's labels from those that are just as the image has
// them.
func (c *dockerContainer) sortLabels(image map[string]string) {
	its := func(k, v string) bool { of, ok := image[k]; return ok && of == v }
	c.given, c.brought, c.sorted = maps.Clone(c.labels), maps.Clone(c.labels), true
	maps.DeleteFunc(c.given, its)
	maps.DeleteFunc(c.brought, func(k, v string) bool { return !its(k, v) })
}

// unclear is which containers have labels of which nobody knows whose they are, or
// an image of which nobody knows what it was asked for as.
func (v *view) unclear() map[string]dockerContainer {
	some := make(map[string]dockerContainer)
	for id, c := range v.containers {
		if !c.sorted || c.nameless() {
			some[id] = c
		}
	}
	return some
}

// askAgain asks for what the engine did not tell of images.
func (e *engine) askAgain(ctx context.Context) {
	e.mu.Lock()
	some := e.view.unclear()
	e.mu.Unlock()
	e.describe(ctx, some, maps.Clone(some))
	e.askNames(ctx, some)
	e.update(func(v *view) { maps.Copy(v.containers, some) }) // nobody else changes them
	e.images.pause = min(2*e.images.pause, relistEvery)
	e.planned = false
	e.planAgain()
}

// planAgain sets the clock for askAgain, if there is anything to ask for and it is
// not set.
func (e *engine) planAgain() {
	e.mu.Lock()
	left := len(e.view.unclear())
	e.mu.Unlock()
	switch {
	case left == 0:
		e.images.pause = 0
	case !e.planned:
		e.images.pause = max(e.images.pause, imageRetryFirst)
		e.planned = true
		e.again.Reset(e.images.pause)
	}
}
