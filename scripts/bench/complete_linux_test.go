package bench

import (
	"slices"
	"testing"
)

// complete checks that a run of every part has left a row of each kind, with
// numbers in it.
func (b *bench) complete(t *testing.T) {
	t.Helper()
	if *only != "" || t.Failed() {
		return
	}
	for _, name := range []string{
		"kept, keep-alive, a document", "kept, new connections, a document", "kept, one client, p50", "kept, one client, p99",
		"passed on, keep-alive, a document", "passed on, new connections, a document",
		"memory of the idle proxy, 20 containers", "memory for each further container", "20 containers ask for one token at once",
		"relay by hand, keep-alive", "relay by hand, new connections",
	} {
		if !slices.ContainsFunc(b.report.Rows, func(r row) bool { return r.Name == name }) {
			t.Errorf("no row %q", name)
		}
	}
	for _, r := range b.report.Rows {
		if len(r.Runs) != b.plan.rounds && r.Peer != nil {
			t.Errorf("%s: %d runs, want %d", r.Name, len(r.Runs), b.plan.rounds)
		}
		if slices.Contains([]string{"requests/s", "MiB"}, r.Unit) && r.Ours <= 0 {
			t.Errorf("%s: %v %s", r.Name, r.Ours, r.Unit)
		}
		// What is counted, not timed, is the same on every machine.
		if slices.Contains([]string{"calls to the service", "errors"}, r.Unit) && !*r.Met {
			t.Errorf("%s: %v %s", r.Name, r.Runs, r.Unit)
		}
	}
}
