package bench

import (
	"fmt"
	"os"
	"testing"
)

// way is how the clients connect.
type way struct {
	name  string
	close bool
}

var ways = []way{{"keep-alive", false}, {"new connections", true}}

// clients is how many there are in one container.
const clients = 16

// kept measures answers that are not asked for anew.
func (b *bench) kept(t *testing.T) {
	b.start(t, []string{"--limits", "off"}, nil)
	keep, _ := peers(t, b.Stack)
	for _, w := range ways {
		g := atLeast(1)
		if w.close {
			g = atLeast(1.5)
		}
		goals := map[string]goal{"nginx proxy_cache": g, "nginx proxy_cache, tuned, no log": g}
		for _, x := range b.plan.targets {
			name := fmt.Sprintf("kept, %s, %s", w.name, x.name)
			b.report.requests(t, name, goals, b.interleave(t, name, load{x.path, w.close, clients}, append([]system{b.here}, keep...)))
		}
	}
	b.latency(t)
}

// latency is what a kept answer takes for a client alone, over a server on the
// same loopback that needs nobody.
func (b *bench) latency(t *testing.T) {
	d := direct(t, b.Stack, b.client, ask(t, b.client.NS, service+word))
	const name = "kept, one client"
	all := b.interleave(t, name, load{word, false, 1}, []system{b.here, d})
	b.report.add(t, name+", p50", "µs", all[0].p50(), &peer{d.name, all[1].p50()}, atMostMore(50))
	b.report.add(t, name+", p99", "µs", all[0].p99(), &peer{d.name, all[1].p99()}, atMostMore(500))
}

// passed measures answers that the service is asked for each time.
func (b *bench) passed(t *testing.T) {
	b.start(t, []string{"--limits", "off"}, []string{"--cache", "off", "--budget", "off"})
	_, pass := peers(t, b.Stack)
	pass = append(pass, system{name: "the service itself, from the VM", base: service, from: b.VM.NS})
	goals := map[string]goal{"Go ReverseProxy": atLeast(1.5), "HAProxy http": atLeast(1)}
	for _, w := range ways {
		for _, x := range b.plan.targets {
			name := fmt.Sprintf("passed on, %s, %s", w.name, x.name)
			b.report.requests(t, name, goals, b.interleave(t, name, load{x.path, w.close, clients}, append([]system{b.here}, pass...)))
		}
	}
}

// requests adds a row for each peer; ours is the first of all.
func (r *report) requests(t *testing.T, name string, goals map[string]goal, all []*measured) {
	t.Helper()
	for _, m := range all[1:] {
		r.add(t, name, "requests/s", all[0].rate(), &peer{m.name, m.rate()}, goals[m.name])
		last := &r.Rows[len(r.Rows)-1]
		last.P99, last.PeerP99 = all[0].p99().median(), m.p99().median()
	}
	fmt.Fprintln(os.Stderr, "measured:", name)
}
