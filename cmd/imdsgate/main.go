// Command imdsgate stands between the containers of a VM and the cloud's
// Instance Metadata Service.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
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
	harden         func() error    // gives up what the process could still gain; nil where it is a test's
}

func main() {
	// net/http writes what it did not expect of a server to the standard log, and
	// that could be a token.
	log.SetOutput(io.Discard)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	e := &env{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv, ctx: ctx, harden: harden}
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
	root.SetContext(e.ctx)
	cmd, err := root.ExecuteC()
	if err == nil {
		return exitOK
	}
	return report(e.stderr, cmd, err)
}

// report says what is wrong and what to try next, and returns the exit code.
func report(w io.Writer, cmd *cobra.Command, err error) int {
	code := exitFailure
	var coded *codedError
	if errors.As(err, &coded) {
		code = coded.code
		if coded.silent {
			return code
		}
	}
	fmt.Fprintf(w, "imdsgate: %v\n", err)
	var hinted *hintError
	switch {
	case errors.As(err, &hinted):
		fmt.Fprintf(w, "hint: %s\n", hinted.hint)
	case code == exitUsage:
		fmt.Fprintf(w, "hint: see '%s --help'\n", cmd.CommandPath())
	}
	return code
}

func rootCmd(e *env) *cobra.Command {
	var showVersion bool
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
  3  this machine lacks something: a kernel feature or a privilege` + platformLong,
		Example:       rootExample,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if showVersion {
				return printVersion(e.stdout, false)
			}
			return cmd.Help()
		},
		SuggestionsMinimumDistance: 2, // letters that may be wrong
	}
	root.Flags().BoolVar(&showVersion, "version", false, "the same as the command version")
	root.SetFlagErrorFunc(flagError)
	root.AddCommand(commands(e)...)
	root.SetHelpCommand(helpCmd(root))
	root.InitDefaultCompletionCmd()
	if c, _, err := root.Find([]string{"completion"}); err == nil {
		c.Example = "  imdsgate completion bash > /etc/bash_completion.d/imdsgate"
		strict(c)
	}
	return root
}

// badValue is how the library words a value that a flag cannot take.
var badValue = regexp.MustCompile(`^invalid argument (".*") for "(?:-\w, )?--([\w-]+)" flag: `)

// wantedValues says what flags take, by the library's names of their types.
var wantedValues = map[string]string{"int": "a number", "duration": "a time, as in 2s or 100ms", "bool": "true or false"}

// flagError is for the library's errors of flags: those of values speak of Go's
// functions.
func flagError(cmd *cobra.Command, err error) error {
	m := badValue.FindStringSubmatch(err.Error())
	if m == nil {
		return usageError("%s%v", subject(cmd), err)
	}
	want, ok := wantedValues[cmd.Flag(m[2]).Value.Type()]
	if !ok {
		return usageError("%s%v", subject(cmd), err)
	}
	return usageError("%s--%s %s: want %s", subject(cmd), m[2], m[1], want)
}

// strict has a command of the library's, and those below it, refuse what it
// cannot use in the project's way.
func strict(cmd *cobra.Command) {
	cmd.Args = noArgs
	if !cmd.Runnable() {
		cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	}
	for _, c := range cmd.Commands() {
		strict(c)
	}
}

// helpCmd is the library's, but for a command that does not exist.
func helpCmd(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:     "help [command]",
		Short:   "Show the help of a command",
		Example: "  imdsgate help proxy",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil {
				return err
			}
			if len(rest) > 0 {
				return noArgs(cmd, rest)
			}
			cmd.InitDefaultHelpFlag() // it is added late, to the command that is called only
			return cmd.Help()
		},
	}
}

// noArgs refuses positional arguments with the project's exit code.
func noArgs(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case !cmd.HasSubCommands():
		return usageError("%sunexpected argument %q", subject(cmd), args[0])
	}
	err := usageError("%sunknown command %q", subject(cmd), args[0])
	if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
		return withHint(err, fmt.Sprintf("did you mean '%s %s'? see '%[1]s --help'", cmd.CommandPath(), like[0]))
	}
	return err
}

// subject starts a message with the command that it is about.
func subject(cmd *cobra.Command) string {
	_, path, below := strings.Cut(cmd.CommandPath(), " ")
	if !below {
		return ""
	}
	return path + ": "
}

func versionCmd(e *env) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Show which build this is",
		Example: "  imdsgate version\n  imdsgate version --json",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			return printVersion(e.stdout, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}

func printVersion(w io.Writer, asJSON bool) error {
	v := version
	if info, ok := debug.ReadBuildInfo(); ok && v == "devel" && info.Main.Version != "" && info.Main.Version != "(devel)" {
		v = info.Main.Version
	}
	if asJSON {
		return writeJSON(w, map[string]string{"version": v, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH})
	}
	_, err := fmt.Fprintf(w, "imdsgate %s %s %s/%s\n", v, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}
