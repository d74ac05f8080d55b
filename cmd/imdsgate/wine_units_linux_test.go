package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"imdsgate/internal/testnet"
)

// windowsPackages are those whose tests run under Wine, with the tests that cannot,
// and why.
var windowsPackages = []struct {
	dir  string
	skip map[string]string
	must []string // have passed, or the run says nothing
}{
	{dir: "internal/agent"},
	{dir: "internal/audit", skip: map[string]string{
		"TestFileIsFollowed":            "Wine does not rename over a file that is open",
		"TestTwoProcessesWriteOneChain": "on Windows no two proxies write one file",
		"TestFilesAreRotated":           "looks at permission bits"}},
	{dir: "internal/discover", must: []string{"TestClientsLook", "TestClientsHands", "TestClientsFollow"}}, // an engine on a named pipe
	{dir: "internal/gate", skip: map[string]string{"TestStopOneListenerOfTwo": "compares with an error number of Linux"}},
	{dir: "internal/imds"},
	{dir: "internal/policy"},
	{dir: "internal/redirect", must: []string{"TestPolicyJSON", "TestPolicyJSONIsTheLibrarys", "TestNoHNS"}},
	{dir: "internal/relay", skip: map[string]string{
		"TestDialFails": "Wine 8 ends some connections well where SO_LINGER of 0 s asks for a reset", "TestCancel": "the same", "TestIdle": "the same",
		"TestListenerLost": "the same", "TestOneWayConnection": "the same"}},
	{dir: "internal/route", must: []string{"TestHostRoute", "TestAlias"}},
	{dir: "internal/sim", skip: map[string]string{"TestReset": "compares with an error number of Linux"}},
	{dir: "internal/upstream", skip: map[string]string{"TestDialErrorIsPassedOn": "compares with an error number of Linux"}},
	{dir: "cmd/imdsgate", must: []string{"TestAgentOnThePipe", "TestHonesty"}, skip: map[string]string{"TestSimulateRefuses": "Wine has no text for its error 10048", "TestAuditSpecIsRefused": "Wine shows a link as what it leads to"}},
}

// TestWindowsUnits runs the packages' tests, built for Windows, under Wine.
func TestWindowsUnits(t *testing.T) {
	testnet.Require(t, testnet.WineHere, testnet.Namespaces)
	s, cs := newStack(t, "windows")
	ctx, cancel := context.WithTimeout(t.Context(), 4*windowsPatience)
	defer cancel()
	w, err := testnet.NewWine(ctx, cs[0].NS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, p := range windowsPackages {
		t.Run(p.dir, func(t *testing.T) {
			exe := filepath.Join(s.Dir, filepath.Base(p.dir)+".test.exe")
			build := exec.CommandContext(ctx, "go", "test", "-c", "-o", exe, "imdsgate/"+p.dir)
			build.Env = append(os.Environ(), "GOOS=windows", "GOARCH=amd64", "CGO_ENABLED=0")
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			cmd := w.Command(exe, "-test.v", "-test.timeout=60s", "-test.skip="+skipping(p.skip))
			cmd.Dir = filepath.Join("../..", p.dir)
			r, err := testnet.Spawn(w.NS, p.dir, cmd)
			if err != nil {
				t.Fatal(err)
			}
			defer context.AfterFunc(ctx, r.Kill)()
			ended := r.Wait()
			passed, failed := windowsResults(r.Lines())
			for name, why := range p.skip {
				t.Logf("left out: %s: %s", name, why)
			}
			if len(failed) > 0 || passed == 0 || ended != nil && !strings.HasSuffix(r.Output(), "FAIL") {
				t.Errorf("%d passed, failed are %v (%v):\n%s", passed, failed, ended, r.Output())
			}
			for _, name := range p.must {
				if !strings.Contains(r.Output(), "--- PASS: "+name+" (") {
					t.Errorf("%s has not passed", name)
				}
			}
			t.Logf("%d tests passed", passed)
		})
	}
}

func skipping(tests map[string]string) string {
	var names []string
	for name := range tests {
		names = append(names, "^"+name+"$")
	}
	slices.Sort(names)
	return strings.Join(names, "|")
}

var (
	resultLine = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+)`)
	// Go removes files by a call that Wine 8 does not have. A test that fails by this
	// alone has passed.
	cleanupLine = regexp.MustCompile(`TempDir RemoveAll cleanup: .*: Invalid function\.$`)
	messageLine = regexp.MustCompile(`^\s+\S+\.go:\d+: `)
	runLine     = regexp.MustCompile(`^=== (?:RUN|CONT|NAME)\s+(\S+)`)
)

// windowsResults counts the tests without parts of their own that have passed, and
// lists those that have failed by more than their clean-up.
func windowsResults(lines []string) (passed int, failed []string) {
	bad, reasons := make(map[string]bool), make(map[string]int) // by test: other messages
	now := ""
	var fails []string
	for _, line := range lines {
		line = strings.TrimRight(line, "\r")
		if m := runLine.FindStringSubmatch(line); m != nil {
			now = m[1]
			continue
		}
		if m := resultLine.FindStringSubmatch(line); m != nil {
			switch m[1] {
			case "PASS":
				passed++
			case "FAIL":
				fails = append(fails, m[2])
			}
			continue
		}
		switch {
		case cleanupLine.MatchString(line):
			reasons[now]++
		case messageLine.MatchString(line), strings.HasPrefix(line, "panic: "):
			bad[now] = true
		}
	}
	for _, name := range fails {
		excused := reasons[name] > 0
		for part := range reasons {
			excused = excused || strings.HasPrefix(part, name+"/")
		}
		for part := range bad {
			excused = excused && part != name && !strings.HasPrefix(part, name+"/")
		}
		if !excused {
			failed = append(failed, name)
		} else {
			passed++
		}
	}
	return passed, failed
}

// TestWindowsResults holds that nothing but Wine's own failure is excused.
func TestWindowsResults(t *testing.T) {
	const cleanup = `    testing.go:1464: TempDir RemoveAll cleanup: unlinkat C:\x\env: Invalid function.`
	for _, tc := range []struct {
		name  string
		lines []string
		want  []string
	}{
		{"passed", []string{"=== RUN   TestA", "--- PASS: TestA (0.00s)"}, nil},
		{"cleanup_alone", []string{"=== RUN   TestA", cleanup, "--- FAIL: TestA (0.00s)"}, nil},
		{"cleanup_of_a_part", []string{"=== RUN   TestA", "=== RUN   TestA/x", cleanup, "--- FAIL: TestA (0.00s)", "    --- FAIL: TestA/x (0.00s)"}, nil},
		{"cleanup_and_more", []string{"=== RUN   TestA", "    a_test.go:3: got 1", cleanup, "--- FAIL: TestA (0.00s)"}, []string{"TestA"}},
		{"cleanup_of_a_part_and_more", []string{"=== RUN   TestA", "=== RUN   TestA/x", cleanup, "=== RUN   TestA/y", "    a_test.go:3: got 1", "--- FAIL: TestA (0.00s)", "    --- FAIL: TestA/x (0.00s)", "    --- FAIL: TestA/y (0.00s)"}, []string{"TestA", "TestA/y"}},
		{"no_reason", []string{"=== RUN   TestA", "--- FAIL: TestA (0.00s)"}, []string{"TestA"}},
		{"another_file_error", []string{"=== RUN   TestA", `    testing.go:1464: TempDir RemoveAll cleanup: unlinkat C:\x\env: Access is denied.`, "--- FAIL: TestA (0.00s)"}, []string{"TestA"}},
	} {
		if _, failed := windowsResults(tc.lines); !slices.Equal(failed, tc.want) {
			t.Errorf("%s: got %v, want %v", tc.name, failed, tc.want)
		}
	}
}
