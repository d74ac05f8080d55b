//go:build !forwardonly

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/spf13/cobra"
	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/svc"
	"golang.org/x/sys/windows/svc/eventlog"
	"golang.org/x/sys/windows/svc/mgr"
)

func serviceRunCmd(e *env) *cobra.Command {
	var f serviceFlags
	cmd := &cobra.Command{
		Use:     "run [flags] -- command [argument...]",
		Short:   "What the service manager starts",
		Example: "  imdsgate service run --name imdsgate -- agent --docker",
		Args:    func(cmd *cobra.Command, args []string) error { return checkServed(cmd, args) },
		RunE:    func(_ *cobra.Command, args []string) error { return runService(e, f, args) },
	}
	f.flags(cmd)
	cmd.Flags().StringVar(&f.log, "log", "", "file that the command's output is appended to (default: the event log)")
	return cmd
}

func runService(e *env, f serviceFlags, args []string) error {
	s := &service{env: *e, flags: f, args: args}
	err := svc.Run(f.name, s)
	if errors.Is(err, windows.ERROR_FAILED_SERVICE_CONTROLLER_CONNECT) {
		return withHint(usageError("service run is for the service manager"), "'imdsgate service install' has it started there; to run the command itself: imdsgate "+args[0])
	}
	if err != nil {
		return fmt.Errorf("service: %w", err)
	}
	return nil
}

// service is a command under the service manager.
type service struct {
	env
	flags serviceFlags
	args  []string
}

// settled is how long a command that cannot start has for saying so: a service that
// has run is started again when it ends, and reported as failed, otherwise.
const settled = time.Second

// Execute runs the command until it ends, or is to end.
func (s *service) Execute(_ []string, requests <-chan svc.ChangeRequest, states chan<- svc.Status) (specific bool, code uint32) {
	states <- svc.Status{State: svc.StartPending}
	out, err := s.flags.output() // not before: the service manager waits for us first
	if err != nil {
		states <- svc.Status{State: svc.StopPending}
		return true, exitUsage
	}
	defer out.Close()
	s.stdin, s.stdout, s.stderr = bytes.NewReader(nil), out, out
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	s.ctx = ctx
	ended := make(chan int, 1)
	go func() { ended <- run(&s.env, s.args) }()
	running := time.After(settled)
	for {
		select {
		case code := <-ended:
			states <- svc.Status{State: svc.StopPending}
			return true, uint32(code)
		case <-running:
			states <- svc.Status{State: svc.Running, Accepts: svc.AcceptStop | svc.AcceptShutdown}
		case r := <-requests:
			switch r.Cmd {
			case svc.Interrogate:
				states <- r.CurrentStatus
			case svc.Stop, svc.Shutdown:
				states <- svc.Status{State: svc.StopPending, WaitHint: uint32(serviceWait.Milliseconds())}
				cancel()
			}
		}
	}
}

// alsoAfterErrors has the recovery actions taken for a service that reports that it
// stops with an error, as ours does, and not only for a process that dies
// (SERVICE_FAILURE_ACTIONS_FLAG); and reads that back.
func alsoAfterErrors(s *mgr.Service) error {
	if err := s.SetRecoveryActionsOnNonCrashFailures(true); err != nil {
		return err
	}
	on, err := s.RecoveryActionsOnNonCrashFailures()
	if err == nil && !on {
		err = errors.New("read back: it is off")
	}
	return err
}

// output is where a service's words go.
func (f *serviceFlags) output() (io.WriteCloser, error) {
	if f.log == "" {
		l, err := eventlog.Open(f.name)
		if err != nil {
			return nil, fmt.Errorf("event log: %w", err)
		}
		return &eventLines{log: l}, nil
	}
	w, err := os.OpenFile(f.log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, withHint(usageError("--log: %v", err), "give a file in a folder that is there")
	}
	return w, nil
}

// eventLines writes each line into the event log.
type eventLines struct {
	mu   sync.Mutex
	log  events
	rest []byte
}

// events are *eventlog.Log.
type events interface {
	Error(id uint32, text string) error
	Warning(id uint32, text string) error
	Info(id uint32, text string) error
	Close() error
}

// eventID is one that EventCreate.exe's messages have: any text.
const eventID = 1

func (w *eventLines) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rest = append(w.rest, b...)
	for {
		line, rest, ok := bytes.Cut(w.rest, []byte("\n"))
		if !ok {
			return len(b), nil
		}
		w.rest = rest
		if err := w.say(string(line)); err != nil {
			return len(b), err
		}
	}
}

func (w *eventLines) say(text string) error {
	switch {
	case strings.HasPrefix(text, "imdsgate: "), strings.Contains(text, "level=ERROR"):
		return w.log.Error(eventID, text)
	case strings.Contains(text, "level=WARN"):
		return w.log.Warning(eventID, text)
	}
	return w.log.Info(eventID, text)
}

// Close says what has no end of line yet, and closes the log.
func (w *eventLines) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var err error
	if len(w.rest) > 0 {
		err = w.say(string(w.rest))
		w.rest = nil
	}
	return errors.Join(err, w.log.Close())
}

// ptr is the address of a buffer that the system fills.
func ptr(b []byte) unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(b)) }
