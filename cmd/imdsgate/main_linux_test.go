package main

import (
	"os"
	"testing"
)

// testMains are asked in turn whether this process is something else than the
// tests; see load_linux_test.go.
var testMains []func() (handled bool, code int)

// atExit is called after the last test.
var atExit []func()

func TestMain(m *testing.M) {
	for _, other := range testMains {
		if handled, code := other(); handled {
			os.Exit(code)
		}
	}
	code := m.Run()
	for _, f := range atExit {
		f()
	}
	os.Exit(code)
}
