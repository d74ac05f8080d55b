package bench

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"text/tabwriter"
)

// report is build/bench.json.
type report struct {
	Header header `json:"header"`
	Rows   []row  `json:"rows"`
}

// header says where the numbers are from.
type header struct {
	Machine  string            `json:"machine"`
	CPU      string            `json:"cpu"`
	CPUs     int               `json:"cpus"`
	Memory   int               `json:"memory_mib"`
	Kernel   string            `json:"kernel"`
	Date     string            `json:"date"`
	Command  string            `json:"command"`
	Load     string            `json:"load_average_before"` // of 1, 5 and 15 minutes
	Rounds   int               `json:"rounds"`
	Seconds  float64           `json:"seconds_each"`
	Versions map[string]string `json:"versions"`
}

// row is one comparison. Values are medians of the runs.
type row struct {
	Name     string   `json:"name"`
	Unit     string   `json:"unit"`
	Ours     float64  `json:"ours"`
	Peer     *float64 `json:"peer"` // null: none
	PeerName string   `json:"peer_name"`
	Ratio    *float64 `json:"ratio"` // ours to the peer's
	Goal     string   `json:"goal"`  // empty: none
	Met      *bool    `json:"met"`   // null: no goal

	Runs     series `json:"runs"`
	PeerRuns series `json:"peer_runs,omitempty"`

	// Of the answers' times under this load, in µs; 0 where it is not known.
	P99     float64 `json:"p99_us,omitempty"`
	PeerP99 float64 `json:"peer_p99_us,omitempty"`
}

type peer struct {
	name string
	runs series
}

// goal is what a row is held to. The zero value is none.
type goal struct {
	text string
	met  func(r *row) bool
}

// atLeast wants so many times the peer's value.
func atLeast(x float64) goal {
	return goal{fmt.Sprintf("≥ %.1f×", x), func(r *row) bool { return *r.Ratio >= x }}
}

// atMost wants no more than that.
func atMost(x float64) goal {
	return goal{fmt.Sprintf("≤ %v", x), func(r *row) bool { return r.Ours <= x }}
}

// atMostMore wants no more than that over the peer's value.
func atMostMore(x float64) goal {
	return goal{fmt.Sprintf("≤ %v more", x), func(r *row) bool { return r.Ours-*r.Peer <= x }}
}

func (r *report) add(t *testing.T, name, unit string, runs series, p *peer, g goal) {
	t.Helper()
	x := row{Name: name, Unit: unit, Runs: runs, Ours: runs.median(), Goal: g.text}
	if p != nil {
		theirs := p.runs.median()
		if theirs <= 0 {
			t.Fatalf("%s: %s has %v", name, p.name, p.runs)
		}
		ratio := x.Ours / theirs
		x.Peer, x.PeerName, x.PeerRuns, x.Ratio = &theirs, p.name, p.runs, &ratio
	}
	if g.met != nil {
		met := g.met(&x)
		x.Met = &met
	}
	r.Rows = append(r.Rows, x)
}

// print writes it for people.
func (r *report) print(w io.Writer) error {
	h := r.Header
	fmt.Fprintf(w, "\n%s, %d × %s, %d MiB, Linux %s, %s\nload before: %s; medians of %d runs of %v s, interleaved\n\n",
		h.Machine, h.CPUs, h.CPU, h.Memory, h.Kernel, h.Date, h.Load, h.Rounds, h.Seconds)
	var table strings.Builder
	tw := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "WHAT\tUNIT\tIMDSGATE\tPEER\t\tRATIO\tGOAL\t\tP99 µs")
	missed, goals := 0, 0
	last := ""
	for i := range r.Rows {
		x := &r.Rows[i]
		name := x.Name
		if name == last {
			name = ""
		}
		last = x.Name
		verdict := ""
		if x.Met != nil {
			goals++
			if verdict = "met"; !*x.Met {
				missed++
				verdict = "MISSED"
			}
		}
		fmt.Fprintln(tw, strings.Join([]string{name, x.Unit, number(&x.Ours), number(x.Peer), x.PeerName, times(x.Ratio), x.Goal, verdict, x.tails()}, "\t"))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(table.String()) {
		fmt.Fprintln(w, strings.TrimRight(line, " \n"))
	}
	_, err := fmt.Fprintf(w, "\n%d of %d goals met\n", goals-missed, goals)
	return err
}

func (x *row) tails() string {
	if x.P99 == 0 {
		return ""
	}
	return fmt.Sprintf("%s : %s", number(&x.P99), number(&x.PeerP99))
}

// number is short, with the digits that matter.
func number(v *float64) string {
	switch {
	case v == nil:
		return ""
	case *v >= 100 || *v == float64(int(*v)):
		return fmt.Sprintf("%.0f", *v)
	}
	return fmt.Sprintf("%.3g", *v)
}

func times(v *float64) string {
	if v == nil {
		return ""
	}
	return fmt.Sprintf("%.2f×", *v)
}

// TestReport holds rows to their goals, just met and just missed.
func TestReport(t *testing.T) {
	for _, tc := range []struct {
		name string
		ours series
		peer *peer
		goal goal
		line string // of the table
	}{
		{"as fast", series{100}, &peer{"nginx", series{100}}, atLeast(1), "as fast  u  100  100  nginx  1.00×  ≥ 1.0×  met"},
		{"slower", series{99}, &peer{"nginx", series{100}}, atLeast(1), "slower  u  99  100  nginx  0.99×  ≥ 1.0×  MISSED"},
		{"median of runs", series{1, 200, 3000}, &peer{"nginx", series{100, 100, 100}}, atLeast(2), "median of runs  u  200  100  nginx  2.00×  ≥ 2.0×  met"},
		{"median of two", series{10, 20}, nil, atMost(15), "median of two  u  15  ≤ 15  met"},
		{"too much", series{15.01}, nil, atMost(15), "too much  u  15  ≤ 15  MISSED"},
		{"more", series{70}, &peer{"direct", series{20}}, atMostMore(50), "more  u  70  20  direct  3.50×  ≤ 50 more  met"},
		{"too much more", series{70.1}, &peer{"direct", series{20}}, atMostMore(50), "too much more  u  70.1  20  direct  3.50×  ≤ 50 more  MISSED"},
		{"no goal", series{1}, &peer{"direct", series{2}}, goal{}, "no goal  u  1  2  direct  0.50×"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var r report
			r.add(t, tc.name, "u", tc.ours, tc.peer, tc.goal)
			var text strings.Builder
			if err := r.print(&text); err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(text.String()) {
				if strings.HasPrefix(line, tc.name) {
					if got := spaces(line); got != spaces(tc.line) {
						t.Errorf("got  %q\nwant %q", got, spaces(tc.line))
					}
					return
				}
			}
			t.Errorf("no such line:\n%s", text.String())
		})
	}
}

// spaces has one between any two words.
func spaces(s string) string { return strings.Join(strings.Fields(s), " ") }
