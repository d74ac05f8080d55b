//go:build !forwardonly

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"imdsgate/internal/discover"
)

type locateFlags struct {
	engine, label, name, client, network string
	envFile, export                      string
	wait                                 time.Duration
	asJSON, watch, logJSON               bool
}

func locateCmd(e *env) *cobra.Command {
	var f locateFlags
	cmd := &cobra.Command{
		Use:   "locate",
		Short: "Find the proxy container's address (by hand, without an agent)",
		Long: `locate asks the Docker engine for the address of the container that runs the
proxy, and prints it, or writes it where a client container will find it as
` + addressVariable + `.

The proxy is the one running container with the label, or the name. If it is on
several networks, --client or --network says whose or which address is meant;
locate never guesses, and never puts several addresses together.

With --watch it goes on, and keeps the file current when the proxy comes back
under another address. 'imdsgate forward --env-file' follows such a file: mount
the folder it is in, not the file, which is replaced at every change.`,
		Example: `  imdsgate locate
  docker run -e ` + addressVariable + `=$(imdsgate locate --network bridge) ...
  eval "$(imdsgate locate --export sh --client web)"
  imdsgate locate --wait 30s --env-file /run/imds/proxy.env
  imdsgate locate --watch --env-file /run/imds/proxy.env`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(cmd.Flags().Changed); err != nil {
				return err
			}
			return runLocate(e, f)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.label, "label", "MSIProxyContainer", "label of the proxy container, KEY or KEY=VALUE")
	fl.StringVar(&f.name, "name", "", "name or id of the proxy container, instead of a label")
	fl.StringVar(&f.client, "client", "", "name or id of the container that is to reach the proxy")
	fl.StringVar(&f.network, "network", "", "network that the address is to be on")
	fl.StringVar(&f.engine, "engine", "", "address of the Docker engine (default: DOCKER_HOST, else the platform's own)")
	fl.DurationVar(&f.wait, "wait", 0, "time to wait for the proxy to be there")
	fl.BoolVar(&f.watch, "watch", false, "go on, and print or write every change")
	fl.StringVar(&f.envFile, "env-file", "", "set "+addressVariable+" in this file, instead of printing")
	fl.StringVar(&f.export, "export", "", "print a line that sets "+addressVariable+" in a shell: sh or powershell")
	fl.BoolVar(&f.asJSON, "json", false, "print one JSON object, with the container and the network")
	fl.BoolVar(&f.logJSON, "log-json", false, "log JSON lines instead of text")
	return cmd
}

func (f *locateFlags) check(changed func(flag string) bool) error {
	forms := 0
	for _, flag := range []string{"env-file", "export", "json"} {
		if changed(flag) {
			forms++
		}
	}
	switch {
	case changed("label") && changed("name"):
		return usageError("--label and --name exclude each other")
	case changed("name") && f.name == "" || changed("label") && f.label == "":
		return usageError("--label, --name: want a text")
	case forms > 1:
		return usageError("--env-file, --export and --json exclude each other")
	case changed("env-file") && f.envFile == "":
		return usageError("--env-file: want the path of a file")
	case changed("export") && f.export != "sh" && f.export != "powershell":
		return usageError("--export %q: want sh or powershell", f.export)
	case f.watch && changed("wait"):
		return usageError("--watch waits by itself: leave out --wait")
	case f.wait < 0:
		return usageError("--wait %v: want a time that is not negative", f.wait)
	}
	return nil
}

func runLocate(e *env, f locateFlags) error {
	l := &discover.Locator{Host: f.engine, Label: f.label, Name: f.name, Client: f.client, Network: f.network}
	if f.watch {
		return watchPlace(e, f, l)
	}
	p, err := l.Locate(e.ctx)
	if err != nil && f.wait > 0 && !errors.Is(err, os.ErrPermission) {
		p, err = awaitPlace(e.ctx, l, f.wait, err)
	}
	if err != nil {
		return locateError(err)
	}
	return f.show(e, p)
}

// awaitPlace waits until there is one. When that takes too long the error is why
// there is none; why is what was found before.
func awaitPlace(ctx context.Context, l *discover.Locator, limit time.Duration, why error) (discover.Place, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var found discover.Place
	err := l.Follow(ctx, func(p discover.Place, err error) {
		if found, why = p, err; err == nil {
			cancel()
		}
	})
	if err == nil && why != nil {
		err = fmt.Errorf("waited for %v: %w", limit, why)
	}
	return found, err
}

// watchPlace shows every change until the end. What is known stays where it is
// while there is nothing better.
func watchPlace(e *env, f locateFlags, l *discover.Locator) error {
	ctx, cancel := context.WithCancelCause(e.ctx)
	defer cancel(nil)
	log := newLogger(e.stderr, f.logJSON)
	err := l.Follow(ctx, func(p discover.Place, err error) {
		switch {
		case errors.Is(err, os.ErrPermission):
			cancel(locateError(err))
			return
		case err != nil:
			log.Warn("no address at the moment", "reason", err)
			return
		}
		if err := f.show(e, p); err != nil {
			cancel(err)
			return
		}
		log.Info("located", slog.String("address", p.Addr.String()), "container", p.Name, "network", p.Network)
	})
	if err != nil {
		return locateError(err)
	}
	if e.ctx.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

// show prints or writes the address in the form that was asked for.
func (f *locateFlags) show(e *env, p discover.Place) error {
	var err error
	switch {
	case f.envFile != "":
		if err := writeEnvFile(f.envFile, addressVariable, p.Addr.String()); err != nil {
			return withHint(fmt.Errorf("--env-file: %w", err), "give a file in a folder that this user may write to")
		}
	case f.asJSON:
		err = writeJSON(e.stdout, p)
	case f.export == "sh":
		_, err = fmt.Fprintf(e.stdout, "export %s=%s\n", addressVariable, p.Addr)
	case f.export == "powershell":
		_, err = fmt.Fprintf(e.stdout, "$env:%s = '%s'\n", addressVariable, p.Addr)
	default:
		_, err = fmt.Fprintln(e.stdout, p.Addr)
	}
	return err
}

func locateError(err error) error {
	switch {
	case errors.As(err, new(*discover.NotLocatedError)):
		return withHint(fmt.Errorf("locate: %w", err), "--label or --name say which container, --network or --client which of its addresses; --wait waits for it")
	case errors.Is(err, os.ErrPermission):
		return withHint(unsupported("locate: %v", err), "run it as root, or as a user who may use the Docker engine")
	}
	return withHint(fmt.Errorf("locate: %w", err), "see whether the Docker engine runs; --engine or DOCKER_HOST say where")
}
