package main

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"imdsgate/internal/relay"
)

type forwardFlags struct {
	open                 func(context.Context) (capture, error) // as the platform's own flags say
	to, envFile, endFile string
	print                string
	listen               string // Windows alone
	logJSON, dryRun      bool   // dryRun: Windows alone
	dialTime, idleTime   time.Duration
	conns                int
}

func forwardCmd(e *env) *cobra.Command {
	var f forwardFlags
	cmd := &cobra.Command{
		Use:     "forward [flags] [-- command [argument...]]",
		Short:   "Lead this container's metadata calls to the proxy (by hand, without an agent)",
		Long:    forwardLong,
		Example: forwardExample,
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
	fl.StringVar(&f.print, "print", "", "act not, print commands instead: powershell, netsh or nft (do the same), ip (what forward does to routes on Linux)")
	fl.DurationVar(&f.dialTime, "dial-time", 5*time.Second, "time for a connection to the proxy")
	fl.DurationVar(&f.idleTime, "idle-time", 0, "time after which a connection that carries nothing is cut; 0 is never")
	fl.IntVar(&f.conns, "max-connections", 1024, "connections at the same time; more wait")
	fl.BoolVar(&f.logJSON, "log-json", false, "log JSON lines instead of text")
	fl.StringVar(&f.endFile, "end-file", "", "end once this file is there, or is another than at the start")
	ownForwardFlags(cmd, &f)
	return cmd
}

func (f *forwardFlags) check(command []string) error {
	switch {
	case f.to != "" && f.envFile != "":
		return usageError("--to and --env-file exclude each other")
	case f.print != "" && len(command) > 0:
		return usageError("--print and a command exclude each other")
	case f.print != "" && !slices.Contains([]string{"powershell", "netsh", "nft", "ip"}, f.print):
		return usageError("--print %q: want powershell, netsh, nft or ip", f.print)
	case f.dryRun && len(command) > 0:
		return usageError("--dry-run and a command exclude each other")
	case f.listen != "" && !validListen(f.listen):
		return usageError("--listen %q: want an IP address and a port, as in 127.0.0.1:15080", f.listen)
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
	switch {
	case f.print != "":
		return printForward(e.stdout, f.print, t.now().addr)
	case f.dryRun:
		return planForward(e.stdout, f, t.now().addr)
	}
	level := slog.LevelInfo
	if len(command) > 0 {
		level = slog.LevelWarn // the output is the command's
	}
	fw := &forwarder{
		open: f.open, target: t, log: newLoggerFrom(e.stderr, f.logJSON, level),
		relay: relay.Relay{DialTime: f.dialTime, IdleTime: f.idleTime, Conns: f.conns},
	}
	if len(command) == 0 {
		ctx, cancel := context.WithCancel(e.ctx)
		defer cancel()
		if f.endFile != "" {
			go endWith(f.endFile)(ctx, cancel)
		}
		return fw.Run(ctx, func() {})
	}
	return runCommand(e, command, fw.Run)
}

// endWith returns what ends a forward, as if it had been asked to, once a file is
// there, or is another than now. It is for whoever can put files into a container
// and can neither remove them nor send signals.
func endWith(file string) func(ctx context.Context, end func()) {
	first, ferr := os.ReadFile(file)
	return func(ctx context.Context, end func()) {
		tick := time.NewTicker(envFilePoll)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if now, err := os.ReadFile(file); err == nil && (ferr != nil || !bytes.Equal(now, first)) {
				end()
				return
			}
		}
	}
}

func validListen(s string) bool {
	a, err := netip.ParseAddrPort(s)
	return err == nil && a.Port() != 0
}
