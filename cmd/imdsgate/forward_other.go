//go:build !linux

package main

import "context"

func openCapture(bool) (capture, error) {
	return nil, withHint(unsupported("forward: not there for this platform yet"), "'imdsgate forward --print netsh' prints commands that do the same")
}

func captureOwnError(err error) error { return err }

func runCommand(*env, []string, func(context.Context, func()) error) error {
	_, err := openCapture(false)
	return err
}
