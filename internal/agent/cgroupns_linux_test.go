package agent

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"imdsgate/internal/testnet"
)

// TestPrivateCgroups looks from a cgroup namespace of its own, with the hierarchy
// mounted anew as in a container.
func TestPrivateCgroups(t *testing.T) {
	testnet.Require(t, testnet.Root, testnet.Command("unshare"))
	if PrivateCgroups() {
		t.Fatal("the machine's own is taken for private")
	}
	own, err := ownCgroup()
	if err != nil {
		testnet.Unmet(t, "needs cgroup v2")
	}
	dir := own + "/imdsgate-test-private"
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(dir)
	d := must[*os.File](t)(os.Open(dir))
	defer d.Close()
	mount := must[string](t)(cgroupMount())
	cmd := exec.Command("unshare", "--cgroup", "--mount", "sh", "-ec", `umount -l "$1" 2>/dev/null; mount -t cgroup2 none "$1"; exec "$2"`, "sh", mount, must[string](t)(os.Executable()))
	cmd.Env = append(os.Environ(), "IMDSGATE_TEST_CGROUPNS=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(d.Fd())}
	out, err := cmd.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "private" {
		t.Errorf("%v: %s", err, out)
	}
}
