package main

import (
	"errors"
	"fmt"
	"os"

	"imdsgate/internal/bpf"
	"imdsgate/internal/redirect"
)

// openCapture captures in this process's own network namespace.
func openCapture(force bool) (capture, error) {
	o, err := redirect.AttachOwn(force)
	if err != nil {
		return nil, err // no typed nil
	}
	return o, nil
}

func captureOwnError(err error) error {
	switch {
	case errors.Is(err, os.ErrPermission):
		return withHint(unsupported("forward: %v", err), "give the container CAP_NET_ADMIN (docker run --cap-add NET_ADMIN), and run forward as its root")
	case errors.Is(err, bpf.ErrNotSupported):
		return withHint(unsupported("forward: %v", err), "load the module nft_tproxy on the host, or let the kernel forward: imdsgate forward --print nft | nft -f -")
	case errors.Is(err, redirect.ErrHostNetns):
		return withHint(fmt.Errorf("forward: %w", err), "run it inside a client container; on the host it would take the proxy's own calls too (--force does it all the same)")
	case errors.Is(err, redirect.ErrSteered):
		return withHint(fmt.Errorf("forward: %w", err), "leave forward out: calls reach the proxy already, and it knows who calls (--force hides that from it)")
	case errors.Is(err, redirect.ErrTaken):
		return withHint(fmt.Errorf("forward: %w", err), "containers that share a network need it once")
	}
	return fmt.Errorf("forward: %w", err)
}
