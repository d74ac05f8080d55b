//go:build !linux

package status

import (
	"errors"
	"net"
)

// Listen is for Linux, where the kernel says who connects.
func Listen(string) (net.Listener, error) { return nil, errors.ErrUnsupported }
