//go:build !forwardonly

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"imdsgate/internal/status"
)

// control is the socket for those who ask the proxy about itself. It is there
// until the proxy begins to end, so that the next one can have it.
type control struct {
	path    string
	asked   bool // the user has named the path; else it may be missing
	handler status.Handler
	log     *slog.Logger

	ended sync.WaitGroup
}

// controlRetry is the wait for another proxy to let go of the socket.
const controlRetry = 500 * time.Millisecond

// start opens the socket and answers until ctx ends. What can never work is an
// error, if the user has asked for it.
func (c *control) start(ctx context.Context) error {
	if c.path == "" {
		return nil
	}
	if _, err := os.Stat(filepath.Dir(c.path)); err != nil && !c.asked {
		return nil
	}
	l, err := status.Listen(c.path)
	switch {
	case err == nil, errors.Is(err, syscall.EADDRINUSE):
		c.ended.Go(func() { c.run(ctx, l, err) })
		return nil
	case !c.asked:
		c.log.Warn("no control socket", "error", err, "hint", "'imdsgate policy explain' cannot ask this proxy; give --control PATH")
		return nil
	case errors.Is(err, os.ErrNotExist):
		return missingFolder("--control", c.path)
	case errors.Is(err, errors.ErrUnsupported):
		return unsupported("--control: this platform has no such sockets")
	}
	return withHint(usageError("--control: %v", err), "give a path for a socket, in a folder that the proxy may write to")
}

func (c *control) run(ctx context.Context, l net.Listener, err error) {
	for said := false; err != nil; l, err = status.Listen(c.path) {
		if !said {
			c.log.Warn("control socket: another proxy has it; trying again until it lets go", "socket", c.path)
			said = true
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(controlRetry):
		}
	}
	if err := c.handler.Serve(ctx, l); err != nil {
		c.log.Error("control socket", "error", fmt.Errorf("%s: %w", c.path, err))
	}
}

// wait returns when the socket is gone. The proxy is at its end then.
func (c *control) wait() { c.ended.Wait() }
