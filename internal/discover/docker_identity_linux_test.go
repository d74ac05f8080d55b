package discover

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
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
	got, err := scanProcesses(proc, map[uint64]bool{webInode: true, quietInode: true, hostInode: true, 1: true})
	if err != nil {
		t.Fatal(err)
	}
	for inode, chains := range got {
		got[inode] = nil
		for _, id := range sightOf(chains, func(string) bool { return true }).ids {
			got[inode] = append(got[inode], []string{id})
		}
	}
	want := map[uint64][][]string{webInode: {{sidecarID}, {webID}}, quietInode: {{quietID}}, hostInode: {{monitorID}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got, err := scanProcesses(proc, map[uint64]bool{quietInode: true}); len(got) != 1 || err != nil {
		t.Errorf("asked for one namespace, got %v, %v", got, err)
	}
	if got, err := scanProcesses(filepath.Join(proc, "nonexistent"), map[uint64]bool{quietInode: true}); err == nil {
		t.Errorf("no folder of processes: got %v and no error", got)
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
		{"podman_without_systemd", "0::/libpod_parent/libpod-" + a + "\n", [][]string{{a}}},
		{"podmans_monitor_without_systemd", "0::/libpod_parent/conmon\n", nil},
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

func TestWhoCountsInACgroupPath(t *testing.T) {
	a, v, o, u := strings.Repeat("a1", 32), strings.Repeat("b2", 32), strings.Repeat("c3", 32), strings.Repeat("d4", 32)
	known := func(id string) bool { return id == a || id == v || id == o }
	for _, tc := range []struct {
		name, cgroup string
		want         sight
	}{
		{"own_cgroup", "0::/docker/" + v, sight{ids: []string{v}}},
		{"cgroup_parent_named_like_the_victim", "0::/any/x/" + v + "/" + a, sight{several: []string{a, v}}},
		{"cgroup_parent_named_like_the_victims_scope", "0::/any/x/docker-" + v + ".scope/docker-" + a + ".scope", sight{several: []string{a, v}}},
		{"cgroup_parent_named_like_the_victim_far_above", "0::/" + v + "/x/" + u + "/y/" + a + "/z", sight{several: []string{a, v}}},
		{"cgroup_named_like_the_victim_inside_the_attackers", "0::/docker/" + a + "/" + v, sight{several: []string{a, v}}},
		{"the_same_in_one_hierarchy_of_several", "2:cpu:/docker/" + a + "\n1:pids:/docker/" + a + "/" + v, sight{ids: []string{a}, several: []string{a, v}}},
		{"the_own_id_twice", "0::/docker/" + a + "/docker-" + a + ".scope", sight{ids: []string{a}}},
		{"engine_inside_a_container_of_another_engine", "0::/docker/" + u + "/docker/" + v, sight{ids: []string{v}}},
		{"container_of_an_engine_inside_a_container", "0::/docker/" + v + "/docker/" + u, sight{ids: []string{v}}},
		{"hierarchies_disagree", "2:cpu:/docker/" + v + "\n1:pids:/docker/" + o, sight{ids: []string{v, o}}},
		{"container_of_another_engine", "0::/docker/" + u, sight{}},
		{"nobody", "", sight{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := sightOf(idChains(tc.cgroup), known)
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(sight{}), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// TestMembersStayWhenProcessesCannotBeLookedAt has the folder of processes fail.
func TestMembersStayWhenProcessesCannotBeLookedAt(t *testing.T) {
	d := &Docker{Proc: filepath.Join(t.TempDir(), "nonexistent"), Log: slog.New(slog.DiscardHandler)}
	d.setUp()
	s := &space{inode: 1, owners: []string{webID}, joiners: []string{sidecarID}}
	d.view.spaces["/n/1"] = s
	e := &engine{Docker: d, look: time.NewTimer(time.Hour), rescan: true}
	defer e.look.Stop()
	if err := e.identify(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(s.owners) != 1 || len(s.joiners) != 1 || !e.rescan {
		t.Errorf("got %+v, rescan %v; want all as it was, and another look", s, e.rescan)
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
