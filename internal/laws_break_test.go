package internal_test

import (
	"slices"
	"strings"
	"testing"
)

// in is a package of this module. A room stands for its path among the imports.
func in(path string, imports ...string) pkg {
	return pkg{ImportPath: module + "/" + path, Imports: paths(imports)}
}

func (p pkg) withTests(imports ...string) pkg  { p.TestImports = paths(imports); return p }
func (p pkg) withXTests(imports ...string) pkg { p.XTestImports = paths(imports); return p }
func (p pkg) withDeps(deps ...string) pkg      { p.Deps = deps; return p }

func paths(names []string) (out []string) {
	for _, n := range names {
		if level(n) >= 0 || n == testnet {
			n = module + "/internal/" + n
		}
		out = append(out, n)
	}
	return out
}

// TestLawsCanBeBroken gives the laws modules that break them, and some that only
// look as if they did. Every law is broken by one of them.
func TestLawsCanBeBroken(t *testing.T) {
	const ebpf, moby = "github.com/cilium/ebpf/link", "github.com/moby/moby/client"
	broken := make(map[string]bool)
	for _, tc := range []struct {
		name string
		pkgs []pkg
		want []string // how each line starts; nil for a module that keeps the laws
	}{
		{"all_is_well", []pkg{
			in("cmd/imdsgate", "gate", "agent", testnet).withDeps("fmt", "imdsgate/internal/testnet").withTests("testing", testnet),
			in("internal/gate", "policy", "upstream", "net/http").withTests("testing", testnet, "sim"),
			in("internal/policy", "imds", "network", "timeout", "ossuary").withTests("os", "time"),
			in("internal/bpf", ebpf).withTests("netns").withXTests("bpf", "netns", testnet),
			in("internal/discover", "netns", moby, "k8s.io/client-go/rest"),
			in("internal/testnet", "bpf", "netns"),
			in("internal").withXTests("discover", "policy"),
		}, nil},

		{"policy_knows_the_gate", []pkg{in("internal/policy", "gate")}, []string{
			"arrows_point_down: imdsgate/internal/policy imports imdsgate/internal/gate: "}},
		{"rooms_of_one_level", []pkg{in("internal/policy", "audit"), in("internal/audit", "policy")}, []string{
			"arrows_point_down: imdsgate/internal/policy imports imdsgate/internal/audit: ",
			"arrows_point_down: imdsgate/internal/audit imports imdsgate/internal/policy: "}},
		{"test_of_a_low_room_needs_a_high_one", []pkg{in("internal/imds").withXTests("gate")}, []string{
			"arrows_of_tests_point_down: imdsgate/internal/imds imports imdsgate/internal/gate in a test: "}},
		{"testnet_grows", []pkg{in("internal/testnet", "agent")}, []string{
			"testnet_is_low: imdsgate/internal/testnet imports imdsgate/internal/agent: "}},
		{"agent_uses_the_test_bench", []pkg{in("internal/agent", testnet)}, []string{
			"testnet_is_for_tests: imdsgate/internal/agent imports imdsgate/internal/testnet: "}},
		{"gate_enters_namespaces", []pkg{in("internal/gate", "netns")}, []string{
			"gate_has_no_privilege: imdsgate/internal/gate imports imdsgate/internal/netns: "}},
		{"gate_loads_programs_by_a_detour", []pkg{in("internal/gate", "audit", "upstream"), in("internal/audit"), in("internal/upstream", "bpf")}, []string{
			"gate_has_no_privilege: imdsgate/internal/gate imports imdsgate/internal/upstream, which imports imdsgate/internal/bpf: "}},
		{"policy_looks_at_the_clock_and_the_network", []pkg{in("internal/policy", "time", "net/netip", "os")}, []string{
			"policy_is_pure: imdsgate/internal/policy imports net/netip: ",
			"policy_is_pure: imdsgate/internal/policy imports os: ",
			"policy_is_pure: imdsgate/internal/policy imports time: "}},
		{"ebpf_in_the_command", []pkg{in("cmd/imdsgate", ebpf)}, []string{
			"bpf_alone_knows_ebpf: imdsgate/cmd/imdsgate imports " + ebpf + ": "}},
		{"ebpf_in_a_test_of_another_room", []pkg{in("internal/redirect").withTests("github.com/cilium/ebpf")}, []string{
			"bpf_alone_knows_ebpf: imdsgate/internal/redirect imports github.com/cilium/ebpf: "}},
		{"docker_in_the_agent", []pkg{in("internal/agent", moby)}, []string{
			"discover_alone_knows_runtimes: imdsgate/internal/agent imports " + moby + ": "}},
		{"kubernetes_in_a_test", []pkg{in("internal/agent").withXTests("k8s.io/api/core/v1")}, []string{
			"discover_alone_knows_runtimes: imdsgate/internal/agent imports k8s.io/api/core/v1: "}},
		{"new_room", []pkg{in("internal/shed")}, []string{
			"rooms_are_on_the_list: imdsgate/internal/shed is not on the list: "}},
		{"room_in_a_room", []pkg{in("internal/sim/azure")}, []string{
			"rooms_are_on_the_list: imdsgate/internal/sim/azure is inside the room sim: "}},
		{"testing_in_the_binary", []pkg{in("cmd/imdsgate").withDeps("fmt", "testing")}, []string{
			"binary_has_no_testing: imdsgate/cmd/imdsgate imports testing by some way: "}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := violations(tc.pkgs)
			for i, line := range got {
				name, rest, _ := strings.Cut(line, ": ")
				broken[name] = true
				if _, why, _ := strings.Cut(rest, ": "); len(why) < 20 {
					t.Errorf("no reason is given: %s", line)
				}
				if i < len(tc.want) && !strings.HasPrefix(line, tc.want[i]) {
					t.Errorf("got  %s\nwant %s…", line, tc.want[i])
				}
			}
			if len(got) != len(tc.want) {
				t.Errorf("got %d violations, want %d:\n%s", len(got), len(tc.want), strings.Join(got, "\n"))
			}
		})
	}
	for _, l := range laws {
		if !broken[l.name] {
			t.Errorf("no row breaks the law %s", l.name)
		}
	}
}

// TestEveryRoomIsListedOnce keeps a room from having two levels.
func TestEveryRoomIsListedOnce(t *testing.T) {
	all := slices.Concat(levels...)
	slices.Sort(all)
	if once := slices.Compact(slices.Clone(all)); len(once) != len(all) {
		t.Errorf("a room is on the list twice: %v", all)
	}
}
