package main

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"imdsgate/internal/testnet"
)

// TestGuardHost lets one user of the host pass, and nobody else; the gate itself
// goes on.
func TestGuardHost(t *testing.T) {
	testnet.Require(t, testnet.Root, testnet.BPF, testnet.Command("curl"))
	s, cs := newStack(t, "web")
	ask := func(uid uint32) (string, error) {
		cmd := exec.Command("curl", "-sS", "--max-time", "2", "-H", "Metadata: true", instanceURL)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		p, err := testnet.Spawn(s.VM.NS, "curl", cmd)
		if err != nil {
			t.Fatal(err)
		}
		err = p.Wait()
		return p.Output(), err
	}
	if out, err := ask(65532); err != nil || !strings.Contains(out, "vm-sim-0") {
		t.Fatalf("without the agent the host cannot call: %v: %s", err, out)
	}
	if _, err := s.StartAgent(t.Context(), "--guard-host", "uid:65533", "--guard-host", "cgroup:/imdsgate-no-such"); err != nil {
		t.Fatal(err)
	}
	if err := s.StartProxy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, err := ask(65533); err != nil || !strings.Contains(out, "vm-sim-0") {
		t.Errorf("the listed user: %v: %s", err, out)
	}
	if out, err := ask(65532); err == nil {
		t.Errorf("another user got %s", out)
	}
	if body := curl(t, cs[0], "-H", "Metadata: true", instanceURL); !strings.Contains(body, "vm-sim-0") {
		t.Errorf("a container, through the gate: %s", body)
	}
}
