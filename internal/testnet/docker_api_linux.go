package testnet

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// The engine is spoken to in plain HTTP, since runtimes' client libraries stay in
// discover: https://docs.docker.com/reference/api/engine/version/v1.41/.

// Box describes a container to be made.
type Box struct {
	Name    string // empty: the engine invents one
	Image   string
	Cmd     []string
	Env     []string
	Labels  map[string]string
	Network string // empty: the bridge; else none, host, container:NAME or a network's name
	Remove  bool   // when it has ended

	CgroupParent string // empty: the engine's
}

// Ran is what became of a container.
type Ran struct {
	ID     string
	Code   int
	Output string // stdout and stderr; empty for a Box with Remove
}

// call does a request and returns the body. A status from 400 on is an error with
// the engine's words.
func (d *Docker) call(ctx context.Context, method, path string, body any) ([]byte, error) {
	resp, err := d.open(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	return b, nil
}

// open does a request, whose body is sent as it is if it is an io.Reader, and as
// JSON otherwise. The caller closes the response's body.
func (d *Docker) open(ctx context.Context, method, path string, body any) (*http.Response, error) {
	r, kind := io.Reader(nil), "application/json"
	switch v := body.(type) {
	case nil:
	case io.Reader:
		r, kind = v, "application/x-tar"
	default:
		b, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, r)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", kind)
	resp, err := d.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode < 400 {
		return resp, nil
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
	return nil, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(b))
}

// Image makes an image out of files of this machine, by their paths in the image.
// All may be executed. There is no shell in it unless it is put there. Changes are
// lines of a Dockerfile, like LABEL team=shop.
func (d *Docker) Image(ctx context.Context, name string, files map[string]string, changes ...string) error {
	r, w := io.Pipe()
	defer r.Close()
	go func() { w.CloseWithError(writeTar(w, files)) }()
	query := url.Values{"fromSrc": {"-"}, "tag": {"latest"}, "repo": {name}, "changes": changes}
	b, err := d.call(ctx, http.MethodPost, "/images/create?"+query.Encode(), r)
	if err != nil {
		return err
	}
	// The engine says 200 first and reports errors among its progress.
	for dec := json.NewDecoder(bytes.NewReader(b)); ; {
		var m struct{ Error string }
		switch err := dec.Decode(&m); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("import %s: %w", name, err)
		case m.Error != "":
			return fmt.Errorf("import %s: %s", name, m.Error)
		}
	}
}

// ImageID is the digest of an image.
func (d *Docker) ImageID(ctx context.Context, name string) (string, error) {
	b, err := d.call(ctx, http.MethodGet, "/images/"+name+"/json", nil)
	if err != nil {
		return "", err
	}
	var image struct{ ID string }
	return image.ID, json.Unmarshal(b, &image)
}

// RemoveImage removes an image, also from under containers that do not run.
func (d *Docker) RemoveImage(ctx context.Context, name string) error {
	_, err := d.call(ctx, http.MethodDelete, "/images/"+name+"?force=1", nil)
	return err
}

func writeTar(w io.Writer, files map[string]string) error {
	tw := tar.NewWriter(w)
	for _, path := range slices.Sorted(maps.Keys(files)) {
		b, err := os.ReadFile(files[path])
		if err != nil {
			return err
		}
		h := &tar.Header{Name: strings.TrimPrefix(path, "/"), Mode: 0o755, Size: int64(len(b))}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := tw.Write(b); err != nil {
			return err
		}
	}
	return tw.Close()
}

// Create makes a container and returns its id.
func (d *Docker) Create(ctx context.Context, b Box) (id string, err error) {
	path := "/containers/create"
	if b.Name != "" {
		path += "?name=" + url.QueryEscape(b.Name)
	}
	out, err := d.call(ctx, http.MethodPost, path, map[string]any{
		"Image": b.Image, "Cmd": b.Cmd, "Env": b.Env, "Labels": b.Labels,
		"HostConfig": map[string]any{"NetworkMode": b.Network, "AutoRemove": b.Remove, "CgroupParent": b.CgroupParent},
	})
	if err != nil {
		return "", err
	}
	var created struct{ ID string }
	return created.ID, json.Unmarshal(out, &created)
}

// Start starts a container by name or id, and returns when its first process runs.
func (d *Docker) Start(ctx context.Context, name string) error { return d.post(ctx, name, "start") }

// Stop ends a container's process: at once, without asking it.
func (d *Docker) Stop(ctx context.Context, name string) error { return d.post(ctx, name, "stop?t=0") }

// Restart stops and starts a container.
func (d *Docker) Restart(ctx context.Context, name string) error {
	return d.post(ctx, name, "restart?t=0")
}

// Rename gives a container another name.
func (d *Docker) Rename(ctx context.Context, name, to string) error {
	return d.post(ctx, name, "rename?name="+url.QueryEscape(to))
}

func (d *Docker) post(ctx context.Context, name, what string) error {
	_, err := d.call(ctx, http.MethodPost, "/containers/"+url.PathEscape(name)+"/"+what, nil)
	return err
}

// Remove removes a container, running or not.
func (d *Docker) Remove(ctx context.Context, name string) error {
	_, err := d.call(ctx, http.MethodDelete, "/containers/"+url.PathEscape(name)+"?force=1&v=1", nil)
	return err
}

// RemoveAll removes all containers.
func (d *Docker) RemoveAll(ctx context.Context) error {
	b, err := d.call(ctx, http.MethodGet, "/containers/json?all=1", nil)
	if err != nil {
		return err
	}
	var all []struct{ ID string }
	if err := json.Unmarshal(b, &all); err != nil {
		return err
	}
	var errs []error
	for _, c := range all {
		errs = append(errs, d.Remove(ctx, c.ID))
	}
	return errors.Join(errs...)
}

// Run makes and starts a container, and waits for its end. One without
// Box.Remove stays, ended, until it is removed.
func (d *Docker) Run(ctx context.Context, b Box) (Ran, error) {
	id, err := d.Create(ctx, b)
	if err != nil {
		return Ran{}, err
	}
	condition := "next-exit"
	if b.Remove {
		condition = "removed"
	}
	// The head of the answer says that the engine waits: nothing can be missed.
	resp, err := d.open(ctx, http.MethodPost, "/containers/"+id+"/wait?condition="+condition, nil)
	if err != nil {
		return Ran{ID: id}, err
	}
	defer resp.Body.Close()
	if err := d.Start(ctx, id); err != nil {
		return Ran{ID: id}, err
	}
	var end struct{ StatusCode int }
	if err := json.NewDecoder(resp.Body).Decode(&end); err != nil {
		return Ran{ID: id}, fmt.Errorf("wait for %s: %w", id, err)
	}
	ran := Ran{ID: id, Code: end.StatusCode}
	if !b.Remove {
		ran.Output, err = d.Logs(ctx, id)
	}
	return ran, err
}

// Logs is what a container has written so far, to stdout and stderr.
func (d *Docker) Logs(ctx context.Context, name string) (string, error) {
	b, err := d.call(ctx, http.MethodGet, "/containers/"+url.PathEscape(name)+"/logs?stdout=1&stderr=1", nil)
	if err != nil {
		return "", err
	}
	// Frames: which stream, three zeros, length (see ContainerAttach in the API).
	var out strings.Builder
	for len(b) >= 8 {
		n := int(binary.BigEndian.Uint32(b[4:8]))
		if n > len(b)-8 {
			return "", errors.New("logs: truncated frame")
		}
		out.Write(b[8 : 8+n])
		b = b[8+n:]
	}
	return out.String(), nil
}

// BuildStatic compiles a Go program of this module, given by its folder, into a
// file that runs in an image with nothing else in it.
func BuildStatic(ctx context.Context, folder, file string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", file, ".")
	cmd.Dir = folder
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", folder, err, out)
	}
	return nil
}
