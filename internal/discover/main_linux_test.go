package discover

import (
	"os"
	"runtime"
	"testing"

	"go.uber.org/goleak"

	"imdsgate/internal/testnet"
)

// See package main: the main thread must not be one that enters namespaces.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	os.Exit(testnet.Main(m.Run, func() error { return goleak.Find() }))
}
