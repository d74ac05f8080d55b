package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"imdsgate/internal/testnet"
)

// peekEnv makes the test binary somebody of the same user who wants to see a
// process's memory; it prints what each way in has brought.
const peekEnv = "IMDSGATE_TEST_PEEK"

func init() {
	testMains = append(testMains, func() (bool, int) {
		pid, err := strconv.Atoi(os.Getenv(peekEnv))
		if err != nil {
			return false, 0
		}
		return true, peek(pid)
	})
}

func peek(pid int) int {
	for _, name := range []string{"mem", "maps", "environ", "fd"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err == nil {
			if name == "fd" {
				_, err = f.ReadDir(1)
			}
			f.Close()
		}
		fmt.Printf("%s: %v\n", name, errno(err))
	}
	var buf [1]byte
	local := []unix.Iovec{{Base: &buf[0], Len: 1}}
	_, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: 0x400000, Len: 1}}, 0)
	fmt.Printf("process_vm_readv: %v\n", errno(err))
	err = unix.PtraceSeize(pid)
	fmt.Printf("ptrace: %v\n", errno(err))
	return 0
}

// errno is the errno in an error, or "open".
func errno(err error) string {
	var e syscall.Errno
	switch {
	case err == nil:
		return "open"
	case errors.As(err, &e):
		return unix.ErrnoName(e)
	}
	return err.Error()
}

// peekAs looks into a process as nobody, who the proxy runs as.
func peekAs(t *testing.T, pid int) map[string]string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{fmt.Sprintf("%s=%d", peekEnv, pid)}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		got[name] = value
	}
	return got
}

// dumping is a command run by nobody in a folder of its own, where it may leave
// core dumps of any size, and is set to when it is aborted.
func dumping(t *testing.T, cmd *exec.Cmd) (*exec.Cmd, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "imdsgate-core-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	script := `ulimit -c unlimited && cd "$0" && export HOME="$0" TMPDIR="$0" GOTRACEBACK=crash && exec "$@"`
	out := exec.Command("sh", append([]string{"-c", script, dir}, cmd.Args...)...)
	out.SysProcAttr = testnet.Unprivileged()
	return out, dir
}

// leftIn is what is in a folder: names, and whether one of the files holds text.
func leftIn(t *testing.T, dir, text string) (names []string, holds bool) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == dir || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		names, holds = append(names, e.Name()), holds || bytes.Contains(b, []byte(text))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names, holds
}

var accessToken = regexp.MustCompile(`"access_token":"([^"]+)"`)

// TestTokensStayInMemory gives a proxy every opportunity to leave a token behind:
// a folder of its own, core dumps without bound, somebody of the same user, and
// SIGABRT. Beside it stands a process without the proxy's care, which shows that
// each of the ways is one.
func TestTokensStayInMemory(t *testing.T) {
	testnet.Require(t, testnet.Root, testnet.BPF, testnet.Namespaces)
	s, cs := startAnswers(t, answersSetup{containers: 1})
	if err := s.Proxy.Stop(); err != nil {
		t.Fatal(err)
	}
	cmd, dir := dumping(t, s.ProxyCommand("--policy", filepath.Join(s.Dir, "policy.yaml"), "--audit", "-"))
	if err := s.StartProxyAs(t.Context(), cmd); err != nil {
		t.Fatal(err)
	}
	r, err := callIn(t.Context(), cs[0].NS, get(tokenTarget+"https://vault.azure.net"))
	m := accessToken.FindSubmatch(r.body)
	if err != nil || m == nil {
		t.Fatalf("got %d, %v: %s", r.status, err, r.body)
	}
	secret := string(m[1][len(m[1])-40:])
	other, otherDir := dumping(t, exec.Command("sh", "-c", "echo holding; exec sleep 60"))
	other.Env = append(os.Environ(), "SECRET="+secret)
	careless, err := s.Spawn(s.VM.NS, "careless", other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := careless.Await(t.Context(), 0, func(line string) bool { return line == "holding" }); err != nil {
		t.Fatal(err)
	}
	t.Run("others_of_the_same_user_see_nothing", func(t *testing.T) { nothingToSee(t, s.Proxy.PID(), careless.PID()) })
	t.Run("no_file_is_open_for_writing", func(t *testing.T) { noFileOpen(t, s.Proxy.PID()) })
	t.Run("no_core_is_left", func(t *testing.T) { noCore(t, s, careless, dir, otherDir, secret) })
}

func nothingToSee(t *testing.T, proxy, careless int) {
	open := peekAs(t, careless)
	for way, got := range peekAs(t, proxy) {
		if got != "EACCES" && got != "EPERM" {
			t.Errorf("%s of the proxy: got %s, want EACCES or EPERM", way, got)
		}
		t.Logf("%s: of the proxy %s, of another process %s", way, got, open[way])
	}
	if open["maps"] != "open" || open["mem"] != "open" {
		t.Errorf("another process: got %v, want its memory open, or this test shows nothing", open)
	}
	st, err := os.Stat(fmt.Sprintf("/proc/%d/maps", proxy))
	if err != nil {
		t.Fatal(err)
	}
	if uid := st.Sys().(*syscall.Stat_t).Uid; uid != 0 {
		t.Errorf("/proc/PID/maps is of uid %d, want 0, as of all that cannot be dumped", uid)
	}
}

func noFileOpen(t *testing.T, pid int) {
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	es, err := os.ReadDir(fds)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		to, err := os.Readlink(filepath.Join(fds, e.Name()))
		if err != nil || !strings.HasPrefix(to, "/") || to == "/dev/null" {
			continue // a socket, a pipe and the like, or closed in the meantime
		}
		info := fields(t, fmt.Sprintf("/proc/%d/fdinfo/%s", pid, e.Name()))
		if flags, err := strconv.ParseUint(info["flags"], 8, 32); err != nil || flags&unix.O_ACCMODE != unix.O_RDONLY {
			t.Errorf("descriptor %s is a file that can be written, %v: %s", e.Name(), err, to)
		}
	}
}

func noCore(t *testing.T, s *testnet.Stack, careless *testnet.Process, dir, otherDir, secret string) {
	for _, p := range []*testnet.Process{s.Proxy, careless} {
		if err := p.Signal(syscall.SIGABRT); err != nil {
			t.Fatal(err)
		}
		p.Wait() // its error is the signal
	}
	if !strings.Contains(s.Proxy.Output(), "SIGABRT") {
		t.Errorf("the proxy did not end by SIGABRT: %v", s.Proxy.Wait())
	}
	if names, _ := leftIn(t, dir, secret); len(names) != 0 {
		t.Errorf("the proxy has left %v", names)
	}
	if strings.Contains(s.Proxy.Output(), secret) {
		t.Error("the token is in what the proxy has said")
	}
	if names, holds := leftIn(t, s.Dir, secret); holds {
		t.Errorf("the token is in one of %v", names)
	}
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		t.Fatal(err)
	}
	names, holds := leftIn(t, otherDir, secret)
	if here := !strings.ContainsAny(string(pattern), "|/"); here && !holds {
		t.Errorf("another process has left %v, want a core with the secret, or this test shows nothing", names)
	}
	t.Logf("core_pattern %q: another process has left %v, with the secret: %v", strings.TrimSpace(string(pattern)), names, holds)
}
