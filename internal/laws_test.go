// Package internal_test holds what no single room can: the laws of who may import
// whom, and that the documents tell the truth about the code.
package internal_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// levels are the rooms, lowest level first. One that is not there yet may be on
// the list; one that is not on the list may not be there.
var levels = [][]string{
	{"imds", "workload", "bpf", "netns", "route", "relay"},
	{"policy", "upstream", "audit", "sim"},
	{"redirect", "handover", "discover", "config"},
	{"gate", "status", "agent", "doctor"},
}

const (
	module  = "imdsgate"
	testnet = "testnet" // stands outside the levels: for tests and the demo
)

// pkg is what "go list -json" says of a package.
type pkg struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
	Deps                               []string // of the package itself, whole depth
}

// tests are the imports of all the package's test files.
func (p pkg) tests() []string { return slices.Concat(p.TestImports, p.XTestImports) }

// all are the imports of all the package's files.
func (p pkg) all() []string { return slices.Concat(p.Imports, p.TestImports, p.XTestImports) }

// room is the folder under internal/ that a package of ours is, or is in.
func room(path string) (name string, ok bool) {
	rest, ok := strings.CutPrefix(path, module+"/internal/")
	name, _, _ = strings.Cut(rest, "/")
	return name, ok
}

// level is a room's level, -1 for one that is not on the list.
func level(room string) int {
	return slices.IndexFunc(levels, func(l []string) bool { return slices.Contains(l, room) })
}

// under reports whether a path is one of the trees or below it.
func under(path string, trees ...string) bool {
	return slices.ContainsFunc(trees, func(t string) bool { return path == t || strings.HasPrefix(path, t+"/") })
}

// law is a rule about imports. broken says how p breaks it, in words that follow
// p's path; why is printed with each of them.
type law struct {
	name, why string
	broken    func(p pkg, byPath map[string]pkg) []string
}

var laws = []law{
	{"arrows_point_down", "a room imports rooms of lower levels only: so each can be read and tested with nothing but those below it",
		func(p pkg, _ map[string]pkg) (bad []string) {
			own, ok := room(p.ImportPath)
			if !ok || own == testnet {
				return nil
			}
			for _, i := range p.Imports {
				if r, ok := room(i); ok && r != testnet && level(r) >= level(own) {
					bad = append(bad, "imports "+i)
				}
			}
			return bad
		}},
	{"arrows_of_tests_point_down", "a room's tests import rooms of their own level or lower, and testnet: a test that needs a higher one is a test of that one",
		func(p pkg, _ map[string]pkg) (bad []string) {
			own, ok := room(p.ImportPath)
			if !ok {
				return nil
			}
			for _, i := range p.tests() {
				if r, ok := room(i); ok && r != testnet && level(r) > level(own) && own != testnet {
					bad = append(bad, "imports "+i+" in a test")
				}
			}
			return bad
		}},
	{"testnet_is_low", "testnet uses level 0 alone: or the tests of higher rooms could not use it",
		func(p pkg, _ map[string]pkg) (bad []string) {
			if own, _ := room(p.ImportPath); own != testnet {
				return nil
			}
			for _, i := range p.Imports {
				if r, ok := room(i); ok && level(r) != 0 {
					bad = append(bad, "imports "+i)
				}
			}
			return bad
		}},
	{"testnet_is_for_tests", "testnet is for tests, and for the demo by way of cmd: nothing that runs on a host may need a made-up network",
		func(p pkg, _ map[string]pkg) (bad []string) {
			if !under(p.ImportPath, module+"/cmd") && slices.Contains(p.Imports, module+"/internal/"+testnet) {
				bad = append(bad, "imports "+module+"/internal/"+testnet)
			}
			return bad
		}},
	{"gate_has_no_privilege", "the gate reads what hostile callers send: nothing that enters namespaces, loads programs or knows runtimes may be within its reach",
		func(p pkg, byPath map[string]pkg) (bad []string) {
			if p.ImportPath != module+"/internal/gate" {
				return nil
			}
			for _, r := range []string{"redirect", "bpf", "netns", "discover"} {
				if way := wayTo(p.ImportPath, module+"/internal/"+r, byPath); way != nil {
					bad = append(bad, "imports "+strings.Join(way[1:], ", which imports "))
				}
			}
			return bad
		}},
	{"policy_is_pure", "a decision depends on its arguments alone: the same question has the same answer tomorrow, on another host and in a test",
		func(p pkg, _ map[string]pkg) (bad []string) {
			if p.ImportPath != module+"/internal/policy" {
				return nil
			}
			for _, i := range p.Imports {
				if under(i, "net", "os", "time", "syscall", "golang.org/x/sys") {
					bad = append(bad, "imports "+i)
				}
			}
			return bad
		}},
	{"bpf_alone_knows_ebpf", "only bpf knows the C layouts and the eBPF library, tests included: when one changes, one room does",
		outside("bpf", "github.com/cilium/ebpf")},
	{"discover_alone_knows_runtimes", "types of Docker and Kubernetes never leave discover: the rest must not care where a workload comes from",
		outside("discover", "github.com/docker", "github.com/moby", "github.com/containerd", "k8s.io", "sigs.k8s.io")},
	{"rooms_are_on_the_list", "everything under internal/ is one folder deep and on the list of levels in laws_test.go: a new room is a decision",
		func(p pkg, _ map[string]pkg) []string {
			r, ok := room(p.ImportPath)
			switch {
			case !ok:
				return nil
			case level(r) < 0 && r != testnet:
				return []string{"is not on the list"}
			case p.ImportPath != module+"/internal/"+r:
				return []string{"is inside the room " + r}
			}
			return nil
		}},
	{"binary_has_no_testing", "the demo links testnet, and testing would come with its flags and its weight into what people install",
		func(p pkg, _ map[string]pkg) (bad []string) {
			if !under(p.ImportPath, module+"/cmd") {
				return nil
			}
			for _, i := range p.Deps {
				if under(i, "testing") {
					bad = append(bad, "imports "+i+" by some way")
				}
			}
			return bad
		}},
}

// outside is a law that keeps modules inside one room, for tests too.
func outside(only string, modules ...string) func(pkg, map[string]pkg) []string {
	return func(p pkg, _ map[string]pkg) (bad []string) {
		if r, _ := room(p.ImportPath); r == only {
			return nil
		}
		for _, i := range p.all() {
			if under(i, modules...) {
				bad = append(bad, "imports "+i)
			}
		}
		return bad
	}
}

// wayTo is the shortest chain of imports from one package of ours to another.
func wayTo(from, to string, byPath map[string]pkg) []string {
	ways, seen := [][]string{{from}}, map[string]bool{from: true}
	for ; len(ways) > 0; ways = ways[1:] {
		way := ways[0]
		for _, i := range byPath[way[len(way)-1]].Imports {
			if seen[i] {
				continue
			}
			seen[i] = true
			next := append(slices.Clone(way), i)
			if i == to {
				return next
			}
			ways = append(ways, next)
		}
	}
	return nil
}

// violations holds the packages to all laws. Each line names the law, who breaks
// it, how, and why it is a law.
func violations(pkgs []pkg) (lines []string) {
	byPath := make(map[string]pkg, len(pkgs))
	for _, p := range pkgs {
		byPath[p.ImportPath] = p
	}
	for _, p := range pkgs {
		for _, l := range laws {
			bad := l.broken(p, byPath)
			slices.Sort(bad)
			for _, b := range slices.Compact(bad) {
				lines = append(lines, fmt.Sprintf("%s: %s %s: %s", l.name, p.ImportPath, b, l.why))
			}
		}
	}
	return lines
}

// TestLaws holds the module to its laws, as each platform sees it.
func TestLaws(t *testing.T) {
	for _, platform := range []string{"linux", "windows"} {
		t.Run(platform, func(t *testing.T) {
			for _, line := range violations(list(t, platform)) {
				t.Error(line)
			}
		})
	}
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() && level(e.Name()) < 0 && e.Name() != testnet {
			t.Errorf("internal/%s is not on the list of levels in laws_test.go: a new room is a decision", e.Name())
		}
	}
}

// list asks the go command for every package of the module.
func list(t *testing.T, platform string) (pkgs []pkg) {
	t.Helper()
	walk(t, func(string) {}) // so that go test takes no old result when a file has changed
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports,Deps", "./...")
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "GOOS="+platform, "CGO_ENABLED=0")
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Fatalf("go list: %v: %s", err, exit.Stderr)
	}
	if err != nil {
		t.Fatal(err)
	}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		switch err := dec.Decode(&p); {
		case errors.Is(err, io.EOF):
			if len(pkgs) < 10 {
				t.Fatalf("go list found %d packages: the laws would be held by nobody", len(pkgs))
			}
			return pkgs
		case err != nil:
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}
