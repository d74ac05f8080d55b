package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
)

// The exit codes of a command that could not be run, as shells and env(1) have them.
const (
	exitNotRunnable = 126
	exitNotFound    = 127
	exitBySignal    = 128 // and the signal's number
)

// runCommand runs a command while run does, and ends run when the command has
// ended. The error carries the command's exit code.
func runCommand(e *env, argv []string, run func(ctx context.Context, ready func()) error) error {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return commandError(argv[0], err)
	}
	sup := newSupervisor()
	defer sup.close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-ended:
		return err
	}
	code, err := sup.run(path, argv)
	cancel()
	if rerr := <-ended; err == nil && rerr != nil {
		fmt.Fprintf(e.stderr, "imdsgate: %v\n", rerr) // the command's exit code is worth more
	}
	switch {
	case err != nil:
		return commandError(argv[0], err)
	case code != 0:
		return &codedError{code: code, silent: true, err: fmt.Errorf("%s: exit code %d", argv[0], code)}
	}
	return nil
}

func commandError(name string, err error) error {
	code := exitNotRunnable
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		code = exitNotFound
	}
	var e *exec.Error
	if errors.As(err, &e) {
		err = e.Err
	}
	return withHint(&codedError{code: code, err: fmt.Errorf("forward: %s: %w", name, err)}, "give a command that this container has")
}
