package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/windows"

	"imdsgate/internal/route"
)

const forwardLong = `forward runs inside a client container, as ContainerAdministrator. It gives the
container's network interface the address 169.254.169.254, listens there on port
80, and carries the connections to the proxy, whose address is given by --to, by a
file, or by ` + addressVariable + `. The container's other traffic stays as it was. An
application on port 80 of all addresses keeps it, unless it has claimed the port
for itself alone (SO_EXCLUSIVEADDRUSE).

It runs alone, or as a side-car that shares the client's network, or in front of
the client's command: then it ends with it, and returns its exit code (127 if
there is no such command, 126 if it cannot be run). It needs no netsh and no
PowerShell, so Nano Server will do.

Nothing that it makes is persistent, and each change is read back. At its end the
address is removed, unless it was there before. If it is killed, the address stays
until the container ends: calls are refused then, and do not reach the service.

With --env-file it follows the file's line ` + addressVariable + `=ADDRESS; connections
that are open stay where they are. 'imdsgate locate --watch' keeps such a file.

The proxy knows its callers by their address only.
` + honesty

const forwardExample = `  imdsgate forward --to 172.17.0.2 -- my-app.exe --port 8080
  imdsgate forward --to 172.17.0.2 --dry-run
  docker run -e ` + addressVariable + ` --user ContainerAdministrator IMAGE imdsgate forward -- my-app.exe
  docker run --network container:web --user ContainerAdministrator imdsgate forward --to 172.17.0.2
  imdsgate forward --to 172.17.0.2 --print powershell`

// ours4 is where calls are captured.
var ours4 = netip.MustParseAddrPort("169.254.169.254:80")

func ownForwardFlags(cmd *cobra.Command, f *forwardFlags) {
	f.open = func(ctx context.Context) (capture, error) { return openCapture(ctx, f.listen) }
	fl := cmd.Flags()
	fl.BoolVar(&f.dryRun, "dry-run", false, "look, and print what would be done; change nothing")
	fl.StringVar(&f.listen, "listen", "", "listen on this address only and add none: for an HNS policy that leads calls there (L4WFPPROXY)")
}

// planForward prints what would be done.
func planForward(w io.Writer, f forwardFlags, to netip.AddrPort) error {
	steps, listen := []string(nil), f.listen
	if listen == "" {
		var err error
		if steps, err = route.PlanAlias(ours4.Addr()); err != nil {
			return captureOwnError(err)
		}
		listen = ours4.String()
	}
	return printPlan(w, append([]string{fmt.Sprintf("listen on %s, for this process alone, and carry connections to %v", listen, to)}, steps...))
}

// printPlan is the one form that plans have.
func printPlan(w io.Writer, steps []string) error {
	for _, s := range steps {
		if _, err := fmt.Fprintln(w, "would", s); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintln(w, "nothing was changed")
	return err
}

// ownAddress is a listener on an address that was added for it; or on one that
// needs none.
type ownAddress struct {
	alias *route.Alias // nil with --listen
	l     net.Listener
}

// openCapture captures in the compartment that this process is in. It gives up when
// ctx is cancelled.
func openCapture(ctx context.Context, listen string) (capture, error) {
	if listen != "" {
		l, err := listenAlone(ctx, listen)
		if err != nil {
			return nil, err
		}
		return &ownAddress{l: l}, nil
	}
	a, err := route.AddAlias(ctx, ours4.Addr())
	if err != nil {
		return nil, err
	}
	l, err := listenAlone(ctx, ours4.String())
	if err != nil {
		return nil, errors.Join(err, a.Remove())
	}
	return &ownAddress{alias: a, l: l}, nil
}

// An address that is being added can be bound some moments later than it is shown.
const (
	bindRetry = 100 * time.Millisecond
	bindWait  = 10 * time.Second
)

// listenAlone listens where nobody else can listen beside it later
// (SO_EXCLUSIVEADDRUSE).
func listenAlone(ctx context.Context, address string) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			err = windows.SetsockoptInt(windows.Handle(fd), windows.SOL_SOCKET, soExclusiveAddrUse, 1)
		})
		return errors.Join(cerr, err)
	}}
	ctx, cancel := context.WithTimeout(ctx, bindWait)
	defer cancel()
	for {
		l, err := lc.Listen(ctx, "tcp", address)
		if !errors.Is(err, windows.WSAEADDRNOTAVAIL) {
			return l, err
		}
		select {
		case <-time.After(bindRetry):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// soExclusiveAddrUse is SO_EXCLUSIVEADDRUSE of ws2def.h: ~SO_REUSEADDR.
const soExclusiveAddrUse = ^windows.SO_REUSEADDR

func (o *ownAddress) Listeners() ([]net.Listener, error) { return []net.Listener{o.l}, nil }

func (o *ownAddress) Ensure() (repaired bool, err error) {
	if o.alias == nil {
		return false, nil
	}
	return o.alias.Ensure(context.Background())
}

func (o *ownAddress) Detach() error {
	o.l.Close()
	if o.alias == nil {
		return nil
	}
	return o.alias.Remove()
}

func captureOwnError(err error) error {
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return withHint(unsupported("forward: %v", err), "this needs Windows Server 2016 or later; nothing was changed")
	case errors.Is(err, windows.WSAEADDRINUSE), errors.Is(err, windows.WSAEACCES):
		return withHint(fmt.Errorf("forward: %w", err), "another process has this port: a second forward, portproxy, or an application that claimed it for itself; containers that share a network need forward once")
	case errors.Is(err, os.ErrPermission):
		return withHint(unsupported("forward: %v", err), "run it as ContainerAdministrator (docker run --user ContainerAdministrator)")
	case errors.Is(err, route.ErrNoDefault):
		return withHint(fmt.Errorf("forward: %w", err), "connect the container to a network that has a gateway")
	case errors.Is(err, route.ErrNotThere):
		return withHint(fmt.Errorf("forward: %w", err), "'imdsgate forward --print powershell' prints commands that do the same, to see where it goes wrong")
	}
	return fmt.Errorf("forward: %w", err)
}
