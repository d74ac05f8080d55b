//go:build !forwardonly

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"

	"imdsgate/internal/route"
)

// withRoute runs serve while the host route to an address stands, and takes the
// route back afterwards if it was not there before.
func withRoute(ctx context.Context, to netip.Addr, log *slog.Logger, serve func(context.Context) error) error {
	if to.IsLoopback() {
		return withHint(usageError("--ensure-route: %v is this machine itself", to), "leave it out where --upstream is a loopback address")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stands, ended := make(chan struct{}), make(chan error, 1)
	first := true
	go func() {
		defer cancel() // no route, no proxy
		ended <- route.Ensure(ctx, to, func(r route.Route, err error) {
			switch {
			case err != nil:
				log.Warn("no route to the service", "error", err)
			case first && r.Default.IsValid():
				log.Warn("another route is there, and is left alone", "route", r.String())
				first = false
				close(stands)
			case first:
				log.Info("route", "route", r.String())
				first = false
				close(stands)
			default:
				log.Warn("route has changed", "route", r.String())
			}
		})
	}()
	select {
	case <-stands:
	case err := <-ended:
		return routeError(err)
	}
	err := serve(ctx)
	cancel()
	return errors.Join(err, routeError(<-ended))
}

func routeError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrPermission):
		return withHint(unsupported("--ensure-route: %v", err), "give the container CAP_NET_ADMIN (docker run --cap-add NET_ADMIN), and run the proxy as its root")
	case errors.Is(err, errors.ErrUnsupported):
		return withHint(unsupported("--ensure-route: %v", err), "add the route by hand, and leave out the flag")
	case errors.Is(err, route.ErrNoDefault):
		return withHint(fmt.Errorf("--ensure-route: %w", err), "connect the container to a network that has a gateway")
	}
	return fmt.Errorf("--ensure-route: %w", err)
}
