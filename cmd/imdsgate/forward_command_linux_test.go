package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"imdsgate/internal/testnet"
)

// TestForwardInFrontOfACommand has the shell be the command.
func TestForwardInFrontOfACommand(t *testing.T) {
	testnet.Require(t, testnet.Command("sh"))
	h := newHand(t)
	for _, tc := range []struct {
		name, script string
		code         int
		output       string
	}{
		{"good_end", "echo out; echo err >&2", 0, "out\nerr"},
		{"exit_code", "exit 42", 42, ""},
		{"by_a_signal", "kill -KILL $$", 128 + 9, ""},
		{"arguments_and_environment", `echo "$0 $1 $IMSProxyIpAddress"`, 0, "zero --one " + h.first.Addr4.String()},
		{"leaves_orphans_alone", "sleep 0.1 & exit 3", 3, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := exec.Command(h.Binary, "forward", "--", "sh", "-c", tc.script, "zero", "--one")
			cmd.Env = append(os.Environ(), addressVariable+"="+h.first.Addr4.String())
			p, err := h.Spawn(h.client.NS, "forward", cmd)
			if err != nil {
				t.Fatal(err)
			}
			if code := exitCode(p.Wait()); code != tc.code || p.Output() != tc.output {
				t.Errorf("got code %d and %q, want %d and %q", code, p.Output(), tc.code, tc.output)
			}
			h.wantAsBefore(t)
		})
	}
}

// TestForwardPassesSignals stands between a shell and whoever sends signals.
func TestForwardPassesSignals(t *testing.T) {
	h := newHand(t)
	const script = `for s in HUP INT QUIT USR1 USR2 WINCH TERM CONT RTMAX; do trap "echo got $s" $s; done
echo ready
while :; do sleep 0.05; done`
	testnet.Require(t, testnet.Command("bash"))
	p := h.forward(t, "--to", h.first.Addr4.String(), "--", "bash", "-c", script)
	say := func(words string) {
		t.Helper()
		if _, err := p.Await(within(t), 0, func(line string) bool { return line == words }); err != nil {
			t.Fatal(err)
		}
	}
	say("ready")
	h.want(t, "first") // it forwards meanwhile
	for name, sig := range map[string]syscall.Signal{
		"HUP": syscall.SIGHUP, "INT": syscall.SIGINT, "QUIT": syscall.SIGQUIT, "USR1": syscall.SIGUSR1, "USR2": syscall.SIGUSR2,
		"WINCH": syscall.SIGWINCH, "TERM": syscall.SIGTERM, "CONT": syscall.SIGCONT, "RTMAX": 64,
	} {
		p.Signal(sig)
		say("got " + name)
	}
	h.want(t, "first") // and still does
	p.Signal(syscall.SIGALRM)
	if code := exitCode(p.Wait()); code != 128+int(syscall.SIGALRM) {
		t.Errorf("got exit code %d, want %d: %s", code, 128+int(syscall.SIGALRM), p.Output())
	}
	h.wantAsBefore(t)
}

// TestForwardAsProcess1 has orphans come to it, in a process namespace of its own.
func TestForwardAsProcess1(t *testing.T) {
	testnet.Require(t, testnet.Root, testnet.Command("sh"), testnet.Command("mount"))
	h := newHand(t)
	// The inner shell ends before its child, which then is forward's. The zombie's
	// state would be Z for ever.
	const script = `sh -c 'sleep 0.1 & echo $! > "$0"' "$0"
orphan=$(cat "$0")
while [ -e /proc/$orphan ]; do sleep 0.02; done
echo "parent $PPID, orphan gone"
exit 5`
	cmd := exec.Command("sh", "-c", `mount -t proc proc /proc && exec "$0" "$@"`,
		h.Binary, "forward", "--to", h.first.Addr4.String(), "--", "sh", "-c", script, filepath.Join(h.Dir, "orphan"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Unshareflags: syscall.CLONE_NEWNS}
	p, err := h.Spawn(h.client.NS, "forward", cmd)
	if err != nil {
		t.Fatal(err)
	}
	if code := exitCode(p.Wait()); code != 5 || p.Output() != "parent 1, orphan gone" {
		t.Errorf("got code %d and %q, want 5", code, p.Output())
	}
	h.wantAsBefore(t)
}

// TestForwardInATerminal types Ctrl-C: the command gets it once.
func TestForwardInATerminal(t *testing.T) {
	testnet.Require(t, testnet.Command("script"), testnet.Command("bash"))
	h := newHand(t)
	const inner = `n=0; trap 'n=$((n+1)); echo "INT $n"' INT; echo ready; for i in 1 2 3 4 5 6; do sleep 0.1; done; echo "in all $n"; exit 0`
	log := filepath.Join(h.Dir, "log")
	cmd := exec.Command("script", "-qefc", fmt.Sprintf("%s forward --to %s -- bash -c '%s'; echo back: $?; read line; echo read $line", h.Binary, h.first.Addr4, strings.ReplaceAll(inner, "'", `'\''`)), log)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := h.Spawn(h.client.NS, "script", cmd)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Await(within(t), 0, func(line string) bool { return strings.Contains(line, "ready") }); err != nil {
		t.Fatal(err)
	}
	in.Write([]byte{3}) // Ctrl-C, as a terminal takes it
	if _, err := p.Await(within(t), 0, func(line string) bool { return strings.Contains(line, "back: 0") }); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(p.Output(), "in all 1") {
		t.Errorf("the command did not get one signal: %s", p.Output())
	}
	in.Write([]byte("a line\n")) // the terminal is the caller's again
	if _, err := p.Await(within(t), 0, func(line string) bool { return strings.Contains(line, "read a line") }); err != nil {
		t.Fatal(err)
	}
	in.Close()
	p.Wait()
}
