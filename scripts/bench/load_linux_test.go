package bench

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// load is what a container asks, and how.
type load struct {
	target  string
	close   bool // a new connection for each request
	clients int
}

// sample is one run of wrk.
type sample struct {
	Requests, US   float64
	P50, P99       float64 // of the answers' times, in µs
	Connect, Read  int     // errors, by what was under way
	Write, Timeout int
	Status         int // answers of 400 and above
}

func (s sample) rate() float64 { return s.Requests / s.US * 1e6 }
func (s sample) errors() int   { return s.Connect + s.Read + s.Write + s.Timeout + s.Status }

// threads of wrk, where there are as many clients.
const threads = 2

// wrk runs the load from inside a namespace for a time. wrk counts in whole seconds,
// but ends in good order when it is interrupted, once it can be.
func wrk(t *testing.T, ns *netns.Handle, l load, base string, d time.Duration) sample {
	t.Helper()
	args := []string{"-t", fmt.Sprint(min(threads, l.clients)), "-c", fmt.Sprint(l.clients), "-d", fmt.Sprint(int(d.Seconds()) + 15), "--timeout", "10s",
		"-s", "testdata/wrk.lua", base + l.target, "--"}
	if l.close {
		args = append(args, "close")
	}
	p, err := testnet.Spawn(ns, "wrk", exec.Command("wrk", args...))
	if err != nil {
		t.Fatal(err)
	}
	err = interrupt(p, d)
	lines := p.Lines()
	var s sample
	if len(lines) > 0 && err == nil {
		err = json.Unmarshal([]byte(lines[len(lines)-1]), &s)
	}
	if err != nil || s.Requests == 0 || s.US == 0 {
		t.Fatalf("wrk %q: %v: %s", args, err, p.Output())
	}
	return s
}

// interrupt ends wrk after a time that begins when it has a handler for that.
func interrupt(p *testnet.Process, after time.Duration) error {
	ended := make(chan error, 1)
	go func() { ended <- p.Wait() }()
	var end time.Time
	for again := time.Tick(10 * time.Millisecond); ; {
		select {
		case err := <-ended:
			return err
		case now := <-again:
			caught, _ := strconv.ParseUint(valueIn(fmt.Sprintf("/proc/%d/status", p.PID()), "SigCgt"), 16, 64)
			switch {
			case caught&(1<<(syscall.SIGINT-1)) == 0:
			case end.IsZero():
				end = now.Add(after)
			case now.After(end): // again and again: it may not yet have been asleep
				p.Signal(os.Interrupt)
			}
		}
	}
}

// measured is one system's runs under one load.
type measured struct {
	system
	runs []sample
}

func (m *measured) rate() series { return m.by(sample.rate) }
func (m *measured) p50() series  { return m.by(func(s sample) float64 { return s.P50 }) }
func (m *measured) p99() series  { return m.by(func(s sample) float64 { return s.P99 }) }

func (m *measured) by(of func(sample) float64) (all series) {
	for _, s := range m.runs {
		all = append(all, of(s))
	}
	return all
}

// interleave measures systems under one load in turns, each round beginning with
// another one. name is for the profile, and for messages.
func (b *bench) interleave(t *testing.T, name string, l load, systems []system) []*measured {
	t.Helper()
	var all []*measured
	for _, s := range systems {
		ask(t, b.asker(s), s.base+l.target)
		if b.plan.warm > 0 {
			b.run(t, l, s, b.plan.warm)
		}
		all = append(all, &measured{system: s})
	}
	for round := range b.plan.rounds {
		for i := range all {
			m := all[(i+round)%len(all)]
			end := func() {}
			if m.name == ours && round == 0 {
				end = b.profile(t, name)
			}
			r := b.run(t, l, m.system, b.plan.each)
			end()
			if n := r.errors(); n != 0 {
				t.Errorf("%s: %s: %d errors in %.0f requests: %+v", name, m.name, n, r.Requests, r)
			}
			m.runs = append(m.runs, r)
		}
	}
	return all
}

// run is one run; what it has logged goes away with it.
func (b *bench) run(t *testing.T, l load, s system, d time.Duration) sample {
	t.Helper()
	r := wrk(t, b.asker(s), l, s.base, d)
	if s.logs != "" {
		if err := os.Truncate(s.logs, 0); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func (b *bench) asker(s system) *netns.Handle { return cmp.Or(s.from, b.client.NS) }

// series are the values of some runs.
type series []float64

// median is 0 for none.
func (s series) median() float64 {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// quantile is the value that q of all are not above; 0 for none.
func (s series) quantile(q float64) float64 {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// folderOf is where a file is to be, which is made if it is not there.
func folderOf(t *testing.T, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
}
