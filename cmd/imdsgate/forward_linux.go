package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"

	"github.com/spf13/cobra"

	"imdsgate/internal/bpf"
	"imdsgate/internal/redirect"
)

const forwardLong = `forward runs inside a client container. It captures the connections that are
made there to 169.254.169.254 (and fd00:ec2::254) port 80, and carries them to the
proxy, whose address is given by --to, by a file, or by ` + addressVariable + `. The
container's other traffic, and an application on port 80, stay as they were.

It runs alone, or as a side-car that shares the client's network, or in front of
the client's command: then it passes all signals on to it, ends with it, and
returns its exit code (128+n if signal n ended it; 127 if there is no such
command, 126 if it cannot be run).

It needs CAP_NET_ADMIN, and nothing else. At its end everything it has made is
gone. If it is killed, calls get no answer until it is started again, or the
container is. In the host's own network namespace, and where an agent steers the
container already, it refuses to start, unless --force is given.

With --env-file it follows the file's line ` + addressVariable + `=ADDRESS; connections
that are open stay where they are. 'imdsgate locate --watch' keeps such a file.

The proxy knows its callers by their address only.`

const forwardExample = `  imdsgate forward --to 172.17.0.2 -- my-app --port 8080
  docker run -e ` + addressVariable + ` --cap-add NET_ADMIN IMAGE imdsgate forward -- my-app
  docker run --network container:web --cap-add NET_ADMIN -v /run/imds:/run/imds imdsgate forward --env-file /run/imds/proxy.env
  imdsgate forward --to 172.17.0.2 --print nft | nft -f -`

func ownForwardFlags(cmd *cobra.Command, f *forwardFlags) {
	var force bool
	f.open = func(context.Context) (capture, error) { return openCapture(force) }
	cmd.Flags().BoolVar(&force, "force", false, "start even in the host's network namespace, or beside an agent")
}

// planForward is for --dry-run, which is not there on Linux.
func planForward(io.Writer, forwardFlags, netip.AddrPort) error { return errors.ErrUnsupported }

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
