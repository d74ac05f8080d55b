package discover

import (
	"fmt"
	"net"
	"os"
	"testing"

	"github.com/Microsoft/go-winio"
)

// engineListener is where an engine of this platform listens: a named pipe, which
// passes messages, for administrators.
func engineListener(t *testing.T) (l net.Listener, host string) {
	t.Helper()
	name := fmt.Sprintf("imdsgate-test-%d-%s", os.Getpid(), t.Name())
	path := `\\.\pipe\` + name
	l, err := winio.ListenPipe(path, &winio.PipeConfig{SecurityDescriptor: "D:P(A;;GA;;;BA)(A;;GA;;;SY)", MessageMode: true, InputBufferSize: 64 << 10, OutputBufferSize: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	// The library's first instance of a pipe takes no client; Wine gives it one.
	if c, err := winio.DialPipe(path, nil); err == nil {
		c.Close()
	}
	return l, "npipe:////./pipe/" + name
}
