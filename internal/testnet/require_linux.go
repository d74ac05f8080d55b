package testnet

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"imdsgate/internal/bpf"
	"imdsgate/internal/netns"
)

// TB is the part of testing.TB that Require uses; the package stays free of the
// testing package since the demo links it.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// A Need is something a test cannot do without.
type Need struct {
	name  string
	check func() error
}

// Namespaces is the right to make and enter network namespaces.
var Namespaces = Need{"network namespaces (run as root)", func() error {
	ns, err := netns.New()
	if err != nil {
		return err
	}
	return ns.Close()
}}

// BPF is the right to load the steering program, on a kernel that can.
var BPF = Need{"sk_lookup (root, Linux 5.17)", func() error {
	_, err := bpf.LoadSteer()
	return err
}}

// Root is user id 0 in the first user namespace.
var Root = Need{"root", func() error {
	if os.Geteuid() != 0 {
		return errors.New("not root")
	}
	return nil
}}

// Command is a program of the machine that the test drives.
func Command(name string) Need {
	return Need{"the program " + name, func() error {
		_, err := exec.LookPath(name)
		return err
	}}
}

// Require skips the test when a need is not met, naming it; where CI is set to
// true it fails the test instead.
func Require(t TB, needs ...Need) {
	t.Helper()
	for _, n := range needs {
		err := n.check()
		if err == nil {
			continue
		}
		Unmet(t, fmt.Sprintf("needs %s: %v", n.name, err))
	}
}

// Unmet skips the test for a reason that it found itself, or fails it where CI is
// set to true.
func Unmet(t TB, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s", why)
	}
	t.Skipf("%s", why)
}
