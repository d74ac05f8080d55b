//go:build !windows

package main

import (
	"errors"
	"io"
	"net/netip"
)

func ownPlanFlags(flagSet, *routePlan) {}

// planOwnRoute is for --dry-run, which Windows alone has.
func planOwnRoute(io.Writer, netip.Addr) error { return errors.ErrUnsupported }
