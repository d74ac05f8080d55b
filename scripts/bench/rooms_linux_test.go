package bench

import (
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// Some rooms measure themselves: here their benchmarks are run, and read.

// relay compares the relay of the way by hand with what people use instead.
func (b *bench) relay(t *testing.T) {
	program := filepath.Join(t.TempDir(), "relay.test")
	goRun(t, "../..", "test", "-c", "-o", program, "./internal/relay")
	rates := make(map[string]series) // by "keep-alive/haproxy"
	for range b.plan.rounds {
		cmd := exec.CommandContext(t.Context(), program, "-test.run", "^$", "-test.bench", "Relay", "-test.benchtime", b.plan.relay)
		cmd.Dir = "../../internal/relay"
		text, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		for name, values := range results(string(text)) {
			rates[name] = append(rates[name], values["req/s"])
		}
	}
	for _, way := range []string{"keep-alive", "new"} {
		for _, x := range []struct {
			peer, name string
			goal       goal
		}{{"haproxy", "HAProxy tcp", atLeast(1)}, {"socat", "socat", atLeast(1.5)}, {"direct", "no relay at all", goal{}}} {
			b.report.add(t, "relay by hand, "+strings.Replace(way, "new", "new connections", 1), "requests/s",
				rates[way+"/imdsgate"], &peer{x.name, rates[way+"/"+x.peer]}, x.goal)
		}
	}
}

// policy reports the slowest decision among a thousand rules of one kind, if the
// room has a benchmark of it.
func (b *bench) policy(t *testing.T) {
	const name = "BenchmarkDecide1000"
	if !strings.Contains(goRun(t, "../..", "test", "-list", name, "./internal/policy"), name) {
		t.Logf("internal/policy has no %s", name)
		return
	}
	time := "1x"
	if *full {
		time = "0.5s"
	}
	worst, what, allocs := 0.0, "", 0.0
	for kind, values := range results(goRun(t, "../..", "test", "-run", "^$", "-bench", name, "-benchmem", "-benchtime", time, "./internal/policy")) {
		if values["ns/op"] > worst {
			worst, what = values["ns/op"], kind
		}
		allocs = max(allocs, values["allocs/op"])
	}
	if what == "" {
		t.Fatalf("%s has no results", name)
	}
	row := fmt.Sprintf("policy decision, 1000 rules (worst: %s)", what)
	b.report.add(t, row, "µs", series{worst / 1000}, nil, atMost(5))
	b.report.add(t, row, "allocations", series{allocs}, nil, atMost(0))
}

// procs is the number of CPUs that the testing package adds to a name.
var procs = regexp.MustCompile(`-\d+$`)

// results reads what "go test -bench" prints: values by unit, by the benchmark's
// name below the first level.
func results(text string) map[string]map[string]float64 {
	all := make(map[string]map[string]float64)
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		_, name, _ := strings.Cut(procs.ReplaceAllString(f[0], ""), "/")
		values := make(map[string]float64)
		for i := 2; i+1 < len(f); i += 2 {
			if v, err := strconv.ParseFloat(f[i], 64); err == nil {
				values[f[i+1]] = v
			}
		}
		all[name] = values
	}
	return all
}

func TestResults(t *testing.T) {
	got := results("goos: linux\nBenchmarkRelay/keep-alive/imdsgate-2 \t  50\t  25064 ns/op\t  39898 req/s\nBenchmarkRelay/new/socat-2 1 3.5 ns/op 2 req/s 16 B/op\nPASS\n")
	if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, []string{"keep-alive/imdsgate", "new/socat"}) {
		t.Fatalf("got %q", names)
	}
	if v := got["keep-alive/imdsgate"]["req/s"]; v != 39898 {
		t.Errorf("got %v, want 39898 req/s", v)
	}
	if v := got["new/socat"]["ns/op"]; v != 3.5 {
		t.Errorf("got %v, want 3.5 ns/op", v)
	}
}
