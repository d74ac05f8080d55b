package main

import (
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"imdsgate/internal/relay"
)

type forwardFlags struct {
	to, envFile, print string
	force, logJSON     bool
	dialTime, idleTime time.Duration
	conns              int
}

func forwardCmd(e *env) *cobra.Command {
	var f forwardFlags
	cmd := &cobra.Command{
		Use:   "forward [flags] [-- command [argument...]]",
		Short: "Lead this container's metadata calls to the proxy (by hand, without an agent)",
		Long: `forward runs inside a client container. It captures the connections that are
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

The proxy knows its callers by their address only.`,
		Example: `  imdsgate forward --to 172.17.0.2 -- my-app --port 8080
  docker run -e ` + addressVariable + ` --cap-add NET_ADMIN IMAGE imdsgate forward -- my-app
  docker run --network container:web --cap-add NET_ADMIN -v /run/imds:/run/imds IMAGE imdsgate forward --env-file /run/imds/proxy.env
  imdsgate forward --to 172.17.0.2 --print nft | nft -f -`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch n := cmd.ArgsLenAtDash(); {
			case n < 0 && len(args) > 0, n > 0:
				return withHint(usageError("forward: unexpected argument %q", args[0]), "put -- before the command: imdsgate forward -- "+args[0])
			case n == 0 && len(args) == 0:
				return usageError("forward: no command after --")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error { return runForward(e, f, args) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.to, "to", "", "address of the proxy, with a port if that is not 80 (default: "+addressVariable+")")
	fl.StringVar(&f.envFile, "env-file", "", "file with a line "+addressVariable+"=ADDRESS, which is followed")
	fl.StringVar(&f.print, "print", "", "act not, print commands instead: netsh or nft (do the same), ip (what forward does to routes)")
	fl.BoolVar(&f.force, "force", false, "start even in the host's network namespace, or beside an agent")
	fl.DurationVar(&f.dialTime, "dial-time", 5*time.Second, "time for a connection to the proxy")
	fl.DurationVar(&f.idleTime, "idle-time", 0, "time after which a connection that carries nothing is cut; 0 is never")
	fl.IntVar(&f.conns, "max-connections", 1024, "connections at the same time; more wait")
	fl.BoolVar(&f.logJSON, "log-json", false, "log JSON lines instead of text")
	return cmd
}

func (f *forwardFlags) check(command []string) error {
	switch {
	case f.to != "" && f.envFile != "":
		return usageError("--to and --env-file exclude each other")
	case f.print != "" && len(command) > 0:
		return usageError("--print and a command exclude each other")
	case f.print != "" && f.print != "netsh" && f.print != "nft" && f.print != "ip":
		return usageError("--print %q: want netsh, nft or ip", f.print)
	case f.dialTime <= 0:
		return usageError("--dial-time: want more than zero")
	case f.idleTime < 0:
		return usageError("--idle-time: want zero or more")
	case f.conns <= 0:
		return usageError("--max-connections: want more than zero")
	}
	return nil
}

func runForward(e *env, f forwardFlags, command []string) error {
	if err := f.check(command); err != nil {
		return err
	}
	t, err := f.target(e.getenv)
	if err != nil {
		return err
	}
	if f.print != "" {
		return printForward(e.stdout, f.print, t.now().addr)
	}
	level := slog.LevelInfo
	if len(command) > 0 {
		level = slog.LevelWarn // the output is the command's
	}
	fw := &forwarder{
		open: func() (capture, error) { return openCapture(f.force) }, target: t, log: newLoggerFrom(e.stderr, f.logJSON, level),
		relay: relay.Relay{DialTime: f.dialTime, IdleTime: f.idleTime, Conns: f.conns},
	}
	if len(command) == 0 {
		return fw.Run(e.ctx, func() {})
	}
	return runCommand(e, command, fw.Run)
}
