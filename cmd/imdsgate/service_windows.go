//go:build !forwardonly

package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/svc"
	"golang.org/x/sys/windows/svc/eventlog"
	"golang.org/x/sys/windows/svc/mgr"
)

type serviceFlags struct {
	name, log     string
	start, dryRun bool
}

// canServe are the commands that go on until they are told to end.
var canServe = []string{"agent", "forward", "locate", "proxy", "simulate"}

func serviceCmd(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "service",
		Short: "Run a command as a Windows service",
		Long: `service has the service manager run imdsgate: an agent on the host, or a proxy
or forward where there is a service manager, as in containers of Server Core.

What the command says goes to the event log, source NAME, or to --log.
` + honesty,
		Example: `  imdsgate service install --start -- agent --docker --by sidecar --image imdsgate
  imdsgate service install --name imdsgate-proxy --log C:\imdsgate\proxy.log -- proxy --listen :80 --audit C:\imdsgate\audit.jsonl
  imdsgate service remove`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(serviceInstallCmd(e), serviceRunCmd(e), serviceRemoveCmd(e))
	return cmd
}

func (f *serviceFlags) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.name, "name", "imdsgate", "name of the service")
}

func serviceInstallCmd(e *env) *cobra.Command {
	var f serviceFlags
	cmd := &cobra.Command{
		Use:   "install [flags] -- command [argument...]",
		Short: "Have a command run at every start of Windows",
		Example: `  imdsgate service install --start -- agent --docker
  imdsgate service install --dry-run -- agent --docker`,
		Args: func(cmd *cobra.Command, args []string) error { return checkServed(cmd, args) },
		RunE: func(_ *cobra.Command, args []string) error { return installService(e, f, args) },
	}
	f.flags(cmd)
	cmd.Flags().StringVar(&f.log, "log", "", "file that the command's output is appended to (default: the event log)")
	cmd.Flags().BoolVar(&f.start, "start", false, "start it now too")
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "print what would be done; change nothing")
	return cmd
}

// checkServed wants a command of ours behind the dashes.
func checkServed(cmd *cobra.Command, args []string) error {
	switch n := cmd.ArgsLenAtDash(); {
	case n != 0 || len(args) == 0:
		return withHint(usageError("%swant a command behind --", subject(cmd)), "as in: imdsgate service install -- agent --docker")
	case !slices.Contains(canServe, args[0]):
		return withHint(usageError("%s%q cannot be a service", subject(cmd), args[0]), "these can: "+strings.Join(canServe, ", "))
	}
	return nil
}

// commandLine is what the service manager starts.
func (f *serviceFlags) commandLine(exe string, args []string) []string {
	line := []string{exe, "service", "run", "--name", f.name}
	if f.log != "" {
		line = append(line, "--log", f.log)
	}
	return append(append(line, "--"), args...)
}

func installService(e *env, f serviceFlags, args []string) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	line := f.commandLine(exe, args)
	if f.dryRun {
		return printPlan(e.stdout, f.plan(line))
	}
	m, err := mgr.Connect()
	if err != nil {
		return serviceError(err)
	}
	defer m.Disconnect()
	s, err := m.CreateService(f.name, exe, mgr.Config{
		StartType: mgr.StartAutomatic, DisplayName: "imdsgate (" + f.name + ")",
		Description: "Instance metadata for containers: imdsgate " + args[0],
	}, line[1:]...)
	if err != nil {
		return serviceError(fmt.Errorf("create %s: %w", f.name, err))
	}
	defer s.Close()
	if err := f.finish(e, s, line); err != nil {
		return serviceError(errors.Join(err, s.Delete()))
	}
	fmt.Fprintf(e.stdout, "service %s: installed\n", f.name)
	if !f.start {
		return nil
	}
	if err := startService(s); err != nil {
		return serviceError(fmt.Errorf("start %s: %w", f.name, err))
	}
	_, err = fmt.Fprintf(e.stdout, "service %s: running\n", f.name)
	return err
}

// plan says what install does, and the line of sc.exe that does most of it.
func (f *serviceFlags) plan(line []string) []string {
	quoted := windows.ComposeCommandLine(line)
	steps := []string{
		fmt.Sprintf("create service %s, started automatically and again after a failure: %s", f.name, quoted),
		"have done most of this with: sc.exe create " + windows.EscapeArg(f.name) + " start= auto binPath= " + windows.EscapeArg(quoted),
		"have it started again when it ends with an error too: sc.exe failureflag " + windows.EscapeArg(f.name) + " 1",
		"register the source " + f.name + " in the event log, and read all three back",
	}
	if f.start {
		steps = append(steps, "start it, and wait until it runs")
	}
	return steps
}

// finish sets what creating alone does not, and reads the service back.
func (f *serviceFlags) finish(e *env, s *mgr.Service, line []string) error {
	again := []mgr.RecoveryAction{{Type: mgr.ServiceRestart, Delay: time.Second}, {Type: mgr.ServiceRestart, Delay: 10 * time.Second}, {Type: mgr.ServiceRestart, Delay: time.Minute}}
	if err := s.SetRecoveryActions(again, 24*60*60); err != nil {
		return fmt.Errorf("recovery actions: %w", err)
	}
	err := alsoAfterErrors(s)
	if errors.Is(err, windows.ERROR_INVALID_LEVEL) { // Wine 8; no Windows that has containers
		fmt.Fprintf(e.stderr, "service %s: this system has no failureflag: it starts it again after a crash, not when it ends with an error\n", f.name)
	} else if err != nil {
		return fmt.Errorf("recovery flag: %w", err)
	}
	if err := eventlog.InstallAsEventCreate(f.name, eventlog.Error|eventlog.Warning|eventlog.Info); err != nil && !strings.Contains(err.Error(), "already exists") {
		return fmt.Errorf("event log: %w", err)
	}
	got, err := startedLine(s)
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	if want := windows.ComposeCommandLine(line); got != want {
		return fmt.Errorf("read back: the service would start %s, not %s", got, want)
	}
	return nil
}

// startedLine is the command line that the service manager has.
func startedLine(s *mgr.Service) (string, error) {
	for size := uint32(1024); ; {
		b := make([]byte, size)
		c := (*windows.QUERY_SERVICE_CONFIG)(ptr(b))
		err := windows.QueryServiceConfig(s.Handle, c, size, &size)
		if err == nil {
			return windows.UTF16PtrToString(c.BinaryPathName), nil
		}
		if !errors.Is(err, windows.ERROR_INSUFFICIENT_BUFFER) || size <= uint32(len(b)) {
			return "", err
		}
	}
}

const serviceWait = 30 * time.Second // for a start or a stop

// startService starts and waits until it runs.
func startService(s *mgr.Service) error {
	err := s.Start()
	for deadline := time.Now().Add(serviceWait); errors.Is(err, windows.ERROR_SERVICE_DATABASE_LOCKED) && time.Now().Before(deadline); err = s.Start() {
		time.Sleep(100 * time.Millisecond) // as after a start of Windows
	}
	if err != nil {
		return err
	}
	st, err := awaitService(s, svc.Running, svc.Stopped)
	if err == nil && st.State == svc.Stopped {
		err = fmt.Errorf("it ended at once, with exit code %d: see the event log or --log", st.ServiceSpecificExitCode)
	}
	return err
}

// awaitService asks until a service is in one of these states.
func awaitService(s *mgr.Service, states ...svc.State) (svc.Status, error) {
	for deadline := time.Now().Add(serviceWait); ; time.Sleep(100 * time.Millisecond) {
		st, err := s.Query()
		if err != nil || slices.Contains(states, st.State) {
			return st, err
		}
		if time.Now().After(deadline) {
			return st, fmt.Errorf("still in state %d after %v", st.State, serviceWait)
		}
	}
}

func serviceRemoveCmd(e *env) *cobra.Command {
	var f serviceFlags
	cmd := &cobra.Command{
		Use:     "remove",
		Short:   "Stop a service of install's, and remove it",
		Example: "  imdsgate service remove\n  imdsgate service remove --name imdsgate-proxy",
		Args:    noArgs,
		RunE:    func(*cobra.Command, []string) error { return removeService(e, f) },
	}
	f.flags(cmd)
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "print what would be done; change nothing")
	return cmd
}

func removeService(e *env, f serviceFlags) error {
	m, err := mgr.Connect()
	if err != nil {
		return serviceError(err)
	}
	defer m.Disconnect()
	s, err := m.OpenService(f.name)
	if err != nil {
		return serviceError(fmt.Errorf("open %s: %w", f.name, err))
	}
	defer s.Close()
	line, err := startedLine(s)
	if err != nil {
		return serviceError(fmt.Errorf("read %s: %w", f.name, err))
	}
	if !strings.Contains(line, " service run --name ") {
		return withHint(fmt.Errorf("service %s is not imdsgate's: it starts %s", f.name, line), "--name says which one to remove")
	}
	if f.dryRun {
		return printPlan(e.stdout, []string{"stop service " + f.name + ", which starts " + line, "remove it and its source in the event log, and read that back"})
	}
	if err := stopAndDelete(m, s, f.name); err != nil {
		return serviceError(fmt.Errorf("remove %s: %w", f.name, err))
	}
	_, err = fmt.Fprintf(e.stdout, "service %s: removed\n", f.name)
	return err
}

func stopAndDelete(m *mgr.Mgr, s *mgr.Service, name string) error {
	if _, err := s.Control(svc.Stop); err != nil && !errors.Is(err, windows.ERROR_SERVICE_NOT_ACTIVE) {
		return fmt.Errorf("stop: %w", err)
	}
	if _, err := awaitService(s, svc.Stopped); err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	if err := s.Delete(); err != nil {
		return err
	}
	s.Close() // it is there as long as somebody has it open
	if err := eventlog.Remove(name); err != nil && !errors.Is(err, windows.ERROR_FILE_NOT_FOUND) {
		return fmt.Errorf("event log: %w", err)
	}
	again, err := m.OpenService(name)
	switch {
	case errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST):
		return nil
	case err == nil:
		again.Close()
		return errors.New("it was deleted, but somebody has it open: it goes when they let go")
	}
	return fmt.Errorf("read back: %w", err)
}

func serviceError(err error) error {
	switch {
	case errors.Is(err, os.ErrPermission):
		return withHint(unsupported("service: %v", err), "run it as an administrator")
	case errors.Is(err, windows.ERROR_SERVICE_EXISTS):
		return withHint(fmt.Errorf("service: %w", err), "'imdsgate service remove' removes it; --name gives another name")
	case errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST):
		return withHint(fmt.Errorf("service: %w", err), "--name says which service is meant")
	}
	return fmt.Errorf("service: %w", err)
}
