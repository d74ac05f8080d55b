package main

import (
	"errors"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// supervisor stands between one child and whoever sends signals.
type supervisor struct {
	signals chan os.Signal // to pass on
	child   chan os.Signal // SIGCHLD
}

// newSupervisor holds signals from now on, for the child that comes.
func newSupervisor() *supervisor {
	s := &supervisor{signals: make(chan os.Signal, 64), child: make(chan os.Signal, 1)}
	signal.Notify(s.child, unix.SIGCHLD)
	signal.Notify(s.signals, passedOn()...)
	return s
}

func (s *supervisor) close() {
	signal.Stop(s.signals)
	signal.Stop(s.child)
}

// passedOn are all signals but those that cannot be caught or are this process's
// own: SIGCHLD, SIGURG and 32 to 34, which Go's runtime and the C library use
// inside a process, and SIGPIPE, which is about a write of ours. One that was
// ignored from the start (nohup) stays so, for the child too.
func passedOn() (all []os.Signal) {
	own := map[unix.Signal]bool{
		unix.SIGKILL: true, unix.SIGSTOP: true, unix.SIGCHLD: true, unix.SIGURG: true, unix.SIGPIPE: true, 32: true, 33: true, 34: true,
	}
	for n := unix.Signal(1); n <= 64; n++ {
		if !own[n] && !signal.Ignored(n) {
			all = append(all, n)
		}
	}
	return all
}

// run runs a command with this process's files, environment and working
// directory, and returns its exit code. Other children of this process, which are
// orphans that process 1 inherits, are reaped meanwhile.
func (s *supervisor) run(path string, argv []string) (code int, err error) {
	foreground := inForeground()
	pid, err := syscall.ForkExec(path, argv, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2},
		// A group of its own, and in a terminal's foreground: else the child would
		// get Ctrl-C twice, from the terminal and from us.
		Sys: &syscall.SysProcAttr{Setpgid: true, Foreground: foreground, Ctty: 0},
	})
	if err != nil {
		return 0, err
	}
	if foreground {
		defer toForeground()
	}
	for {
		select {
		case sig := <-s.signals:
			unix.Kill(pid, sig.(unix.Signal))
		case <-s.child:
			if code, ended := reap(pid); ended {
				return code, nil
			}
		}
	}
}

// reap collects all children that have ended. It reports whether pid was among
// them.
func reap(pid int) (code int, ended bool) {
	for {
		var st unix.WaitStatus
		got, err := unix.Wait4(-1, &st, unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil || got == 0:
			return code, ended
		case got != pid:
		case st.Signaled():
			code, ended = exitBySignal+int(st.Signal()), true
		case st.Exited():
			code, ended = st.ExitStatus(), true
		}
	}
}

// inForeground reports whether stdin is a terminal whose foreground group is ours.
func inForeground() bool {
	group, err := unix.IoctlGetInt(0, unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// toForeground takes the terminal back, for whoever started us.
func toForeground() {
	signal.Ignore(unix.SIGTTOU) // which is for those who do that from the background
	unix.IoctlSetPointerInt(0, unix.TIOCSPGRP, unix.Getpgrp())
}
