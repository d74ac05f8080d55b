//go:build !forwardonly

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
)

// listenOn opens what a flag names. An address that can never work is the user's
// error; example is one that does.
func listenOn(ctx context.Context, flag, address, example string) (net.Listener, error) {
	network := "tcp"
	if a, err := netip.ParseAddrPort(address); err == nil && a.Addr().Is4() {
		network = "tcp4" // 0.0.0.0 is not IPv6 as well
	}
	l, err := new(net.ListenConfig).Listen(ctx, network, address)
	if err == nil {
		return l, nil
	}
	var form *net.AddrError
	var name *net.DNSError
	switch {
	case errors.As(err, &form), errors.As(err, &name) && name.IsNotFound:
		return nil, withHint(usageError("%s: %v", flag, err), "give address and port, as in "+example)
	case errors.Is(err, errNoAddress):
		return nil, withHint(fmt.Errorf("%s: %w", flag, err), "this machine (or network namespace) does not have that address; try "+flag+" "+example)
	case errors.Is(err, os.ErrPermission):
		return nil, withHint(unsupported("%s: %v", flag, err), "ports below 1024 need root or CAP_NET_BIND_SERVICE; try "+flag+" "+example)
	}
	return nil, withHint(fmt.Errorf("%s: %w", flag, err), "see who has the port with '"+whoHasPorts+"', or try a free one: "+flag+" 127.0.0.1:0")
}
