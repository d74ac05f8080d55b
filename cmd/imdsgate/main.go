// Command imdsgate stands between the containers of a VM and the cloud's
// Instance Metadata Service.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// The main goroutine keeps the main thread for ever. A goroutine that enters a
// container's network namespace must never run on it: the runtime cannot
// discard the main thread, and would park it inside that namespace.
func init() { runtime.LockOSThread() }

// version is set by the linker for releases.
var version = "devel"

// The exit codes of every command.
const (
	exitOK          = 0
	exitFailure     = 1 // it was tried and did not work
	exitUsage       = 2 // bad flags, arguments or configuration: nothing was started
	exitUnsupported = 3 // this machine lacks something: kernel feature, privilege
)

// env is everything of the process that a command touches, so that tests run
// commands in-process.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	ctx            context.Context // ends at SIGINT and SIGTERM
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	e := &env{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv, ctx: ctx}
	code := run(e, os.Args[1:])
	stop()
	os.Exit(code)
}

// run executes one command line and returns the exit code.
func run(e *env, args []string) int {
	root := rootCmd(e)
	root.SetArgs(args)
	root.SetIn(e.stdin)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	err := root.ExecuteContext(e.ctx)
	if err == nil {
		return exitOK
	}
	var coded *codedError
	if errors.As(err, &coded) && coded.silent {
		return coded.code
	}
	fmt.Fprintf(e.stderr, "imdsgate: %v\n", err)
	code := exitFailure
	var hinted *hintError
	if errors.As(err, &hinted) {
		fmt.Fprintf(e.stderr, "hint: %s\n", hinted.hint)
	}
	if coded != nil {
		code = coded.code
	}
	return code
}

func rootCmd(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:   "imdsgate",
		Short: "Give containers the instance metadata service, through a gate",
		Long: `imdsgate stands between the containers of a VM and the cloud's Instance
Metadata Service at http://169.254.169.254. A container calls that address,
unchanged; the call arrives at an unprivileged proxy that knows which container
is asking, decides, answers, and records it.

Exit codes of every command:
  0  done
  1  it was tried and did not work
  2  bad flags, arguments or configuration; nothing was started
  3  this machine lacks something: a kernel feature or a privilege`,
		Example: `  imdsgate demo                 see all of it work, on this machine, in namespaces
  imdsgate simulate             run a metadata service for laptops and tests
  imdsgate agent --workloads workloads.yaml
  imdsgate proxy --agent /run/imdsgate/agent.sock`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return withHint(usageError("%s: %v", cmd.CommandPath(), err), "see '"+cmd.CommandPath()+" --help'")
	})
	root.AddCommand(versionCmd(e), simulateCmd(e), proxyCmd(e))
	root.AddCommand(platformCommands(e)...)
	return root
}

// noArgs refuses positional arguments with the project's exit code.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return withHint(usageError("%s: unexpected argument %q", cmd.CommandPath(), args[0]),
		"see '"+cmd.CommandPath()+" --help'")
}

func versionCmd(e *env) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Show which build this is",
		Example: "  imdsgate version\n  imdsgate version --json",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			v := version
			if info, ok := debug.ReadBuildInfo(); ok && v == "devel" && info.Main.Version != "" && info.Main.Version != "(devel)" {
				v = info.Main.Version
			}
			if asJSON {
				return writeJSON(e.stdout, map[string]string{"version": v, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH})
			}
			_, err := fmt.Fprintf(e.stdout, "imdsgate %s %s %s/%s\n", v, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}
