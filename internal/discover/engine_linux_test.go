package discover

import (
	"net"
	"path/filepath"
	"testing"
)

// engineListener is where an engine of this platform listens.
func engineListener(t *testing.T) (l net.Listener, host string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "engine.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return l, "unix://" + path
}
