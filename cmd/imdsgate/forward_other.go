//go:build !linux && !windows

package main

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"os"

	"github.com/spf13/cobra"
)

const (
	forwardLong = `forward is not there for this platform. It prints what does the same on others.`

	forwardExample = `  imdsgate forward --to 172.17.0.2 --print netsh`
)

func ownForwardFlags(_ *cobra.Command, f *forwardFlags) { f.open = openCapture }

func planForward(io.Writer, forwardFlags, netip.AddrPort) error { return errors.ErrUnsupported }

func openCapture(context.Context) (capture, error) {
	return nil, withHint(unsupported("forward: not there for this platform yet"), "'imdsgate forward --print netsh' prints commands that do the same")
}

func captureOwnError(err error) error { return err }

type supervisor struct{}

func newSupervisor() supervisor { return supervisor{} }

func (supervisor) close() {}

func (supervisor) run(string, []string) (int, error) { return 0, os.ErrInvalid }
