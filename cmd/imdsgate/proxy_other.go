//go:build !linux && !forwardonly

package main

import (
	"log/slog"
	"net/netip"

	"imdsgate/internal/gate"
	"imdsgate/internal/upstream"
)

func harden() error { return nil }

func outliveReaders() {}

func serveAgent(*env, proxyFlags, netip.AddrPort, *gate.Gate, *upstream.Client, *policyFile, *slog.Logger) error {
	return withHint(unsupported("--agent: there is no agent on this platform yet"), "run the proxy with --listen :80")
}
