//go:build !linux && !windows

package route

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
)

// Ensure is not there for this platform: it returns errors.ErrUnsupported.
func Ensure(context.Context, netip.Addr, func(Route, error)) error {
	return fmt.Errorf("host route: %w on %s", errors.ErrUnsupported, runtime.GOOS)
}
