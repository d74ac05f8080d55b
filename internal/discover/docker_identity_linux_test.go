package discover

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"golang.org/x/sys/unix"
)

// Ids of the containers in testdata: web, sidecar in web's namespace, quiet
// without network, monitor in the host's namespace.
const (
	webID     = "7a40135056772ea2354f406f5581cc103e635c3caaec4d05d738a168c74456c1"
	sidecarID = "31da29d6e162155fc7c5825aa4ecd2cc6dc2b8246299b9c64d7a2bbf36bfd909"
	quietID   = "501fd964db1d0933475aaa44343b62006801f22388c3d5e1ed09e287ac9896fe"
	monitorID = "779a204ccf7dc3b6fb9ba9d50e4ed75943f9ff873ecba9b2a5fd55b09a5c1559"

	webInode, quietInode, hostInode = 4026532602, 4026532894, 4026532452
)

// captured makes a folder like /proc out of what was captured from one, in which
// dockerd ran in a namespace that it took for the host's.
func captured(t *testing.T) string {
	t.Helper()
	a, err := txtar.ParseFile("testdata/proc.txtar")
	if err != nil {
		t.Fatal(err)
	}
	proc := t.TempDir()
	for _, f := range a.Files {
		name := filepath.Join(proc, f.Name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "/ns/net") {
			err = os.Symlink(strings.TrimSpace(string(f.Data)), name)
		} else {
			err = os.WriteFile(name, f.Data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return proc
}

func TestScanProcesses(t *testing.T) {
	proc := captured(t)
	if err := os.MkdirAll(filepath.Join(proc, "99999"), 0o755); err != nil { // a process that is just gone
		t.Fatal(err)
	}
	got := scanProcesses(proc, map[uint64]bool{webInode: true, quietInode: true, hostInode: true, 1: true})
	for inode, chains := range got {
		got[inode] = nil
		for _, id := range outermost(chains, func(string) bool { return true }) {
			got[inode] = append(got[inode], []string{id})
		}
	}
	want := map[uint64][][]string{webInode: {{sidecarID}, {webID}}, quietInode: {{quietID}}, hostInode: {{monitorID}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got := scanProcesses(proc, map[uint64]bool{quietInode: true}); len(got) != 1 {
		t.Errorf("asked for one namespace, got %v", got)
	}
	if got := scanProcesses(filepath.Join(proc, "nonexistent"), map[uint64]bool{quietInode: true}); len(got) != 0 {
		t.Errorf("no processes: got %v", got)
	}
}

func TestContainerIDsInCgroups(t *testing.T) {
	a, b := strings.Repeat("a1", 32), strings.Repeat("b2", 32)
	for _, tc := range []struct {
		name, cgroup string
		want         [][]string
	}{
		{"v1_cgroupfs", "8:pids:/docker/" + a + "\n4:memory:/docker/" + a + "\n", [][]string{{a}}},
		{"v2_cgroupfs", "0::/docker/" + a + "\n", [][]string{{a}}},
		{"systemd_scope", "0::/system.slice/docker-" + a + ".scope\n", [][]string{{a}}},
		{"podman", "0::/machine.slice/libpod-" + a + ".scope/container\n", [][]string{{a}}},
		{"kubernetes_containerd", "0::/kubepods.slice/kubepods-pod12.slice/cri-containerd-" + a + ".scope\n", [][]string{{a}}},
		{"kubernetes_crio", "0::/kubepods.slice/crio-" + a + ".scope\n", [][]string{{a}}},
		{"hybrid_with_idle_v2", "1:cpu:/docker/" + a + "\n0::/\n", [][]string{{a}}},
		{"last_line_without_newline", "0::/docker/" + a, [][]string{{a}}},
		{"cgroup_made_inside", "0::/docker/" + a + "/" + b + "\n", [][]string{{a, b}}},
		{"hierarchies_differ", "2:cpu:/docker/" + a + "\n1:pids:/docker/" + b + "\n", [][]string{{a}, {b}}},
		{"path_with_colon", "0::/x:y/" + a + "\n", [][]string{{a}}},
		{"podmans_monitor_is_no_container", "0::/machine.slice/libpod-conmon-" + a + ".scope\n", nil},
		{"scope_of_somebody_else", "0::/user.slice/mydocker-" + a + ".scope\n", nil},
		{"prefix_without_scope", "0::/docker-" + a + "\n", nil},
		{"host_process", "0::/system.slice/ssh.service\n", nil},
		{"id_too_short", "0::/docker/" + a[:63] + "\n", nil},
		{"id_too_long", "0::/docker/" + a + "a\n", nil},
		{"no_hex", "0::/docker/" + strings.Repeat("g", 64) + "\n", nil},
		{"upper_case", "0::/docker/" + strings.ToUpper(a) + "\n", nil},
		{"no_cgroup_lines", "nonsense\n\n::\n", nil},
		{"empty", "", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, idChains(tc.cgroup)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestOutermost(t *testing.T) {
	known := func(id string) bool { return id == "attacker" || id == "victim" || id == "other" }
	for _, tc := range []struct {
		name   string
		chains [][]string
		want   []string
	}{
		{"own_cgroup", [][]string{{"victim"}}, []string{"victim"}},
		{"cgroup_named_like_the_victim_inside_the_attackers", [][]string{{"attacker", "victim"}}, []string{"attacker"}},
		{"the_same_in_one_hierarchy_of_several", [][]string{{"attacker"}, {"attacker", "victim"}}, []string{"attacker"}},
		{"engine_inside_a_container_of_another_engine", [][]string{{"unknown", "victim"}}, []string{"victim"}},
		{"hierarchies_disagree", [][]string{{"victim"}, {"other"}}, []string{"other", "victim"}},
		{"container_of_another_engine", [][]string{{"unknown"}}, nil},
		{"nobody", nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, outermost(tc.chains, known)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestInodeOf(t *testing.T) {
	for link, want := range map[string]uint64{
		"net:[4026531840]": 4026531840, "net:[]": 0, "net:[x]": 0, "mnt:[4026531840]": 0, "net:[1": 0, "": 0,
	} {
		if got := inodeOf(link, nil); got != want {
			t.Errorf("%q: got %d, want %d", link, got, want)
		}
	}
	if got := inodeOf("net:[1]", os.ErrNotExist); got != 0 {
		t.Errorf("with error: got %d, want 0", got)
	}
}

// TestReusedInodeIsNotNamed has a namespace whose inode another one had, or will
// have, while the processes are looked at.
func TestReusedInodeIsNotNamed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ns") // an ordinary file stands for a namespace
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	proc := t.TempDir()
	if err := os.MkdirAll(filepath.Join(proc, "7/ns"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(fmt.Sprintf("net:[%d]", st.Ino), filepath.Join(proc, "7/ns/net")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(proc, "7/cgroup"), []byte("0::/docker/"+webID+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		space string
		seen  time.Time
		want  bool
	}{
		{"there_all_the_time", file, time.Now().Add(-time.Minute), true},
		{"came_while_processes_were_looked_at", file, time.Now().Add(time.Minute), false},
		{"went_while_processes_were_looked_at", file + "-gone", time.Now().Add(-time.Minute), false},
		{"is_another_by_now", proc, time.Now().Add(-time.Minute), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := &Docker{Proc: proc, device: st.Dev}
			d.setUp()
			d.view.containers[webID] = ctr(webID)
			s := &space{inode: st.Ino, seen: tc.seen}
			d.view.spaces[tc.space] = s
			e := &engine{Docker: d, look: time.NewTimer(time.Hour)}
			defer e.look.Stop()
			if err := e.identify(t.Context()); err != nil {
				t.Fatal(err)
			}
			if s.named() != tc.want {
				t.Errorf("named is %v, want %v", s.named(), tc.want)
			}
		})
	}
}
