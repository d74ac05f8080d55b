package audit_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

func full() audit.Event {
	return audit.Event{
		Time: time.Date(2030, 1, 2, 3, 4, 5, 6000, time.FixedZone("", 3600)), ID: 7, Conn: 3,
		Workload: "static:web", Name: "web", Members: []string{"sidecar", "web"},
		Proof: workload.Listener, Method: "sklookup", Peer: netip.MustParseAddrPort("127.0.0.1:40000"),
		Verb: "GET", Action: imds.InstanceRead, Target: "/metadata/instance?api-version=2021-02-01&format=json",
		Decision: audit.Allow, Rule: "p.yaml:2", Reason: "instance.read is in allow",
		Blanked: []imds.Action{imds.InstanceUserdata}, Status: 200, Bytes: 4096, Duration: 1500, Upstream: true, Count: 2,
	}
}

// The names are an interface: log pipelines are built on them.
func TestLineIsStable(t *testing.T) {
	for name, tc := range map[string]struct {
		event audit.Event
		want  string
	}{
		"full": {full(), `{"time":"2030-01-02T02:04:05.000006Z","id":7,"conn":3,` +
			`"workload":"static:web","name":"web","members":["sidecar","web"],"proof":"listener","method":"sklookup","peer":"127.0.0.1:40000",` +
			`"verb":"GET","action":"instance.read","target":"/metadata/instance?api-version=2021-02-01&format=json",` +
			`"decision":"allow","rule":"p.yaml:2","reason":"instance.read is in allow","blanked":["instance.userdata"],` +
			`"status":200,"bytes":4096,"duration_us":1500,"upstream":true,"count":2}` + "\n"},
		"zero": {audit.Event{}, `{"time":"0001-01-01T00:00:00Z","id":0,"conn":0,"workload":"","proof":"none","method":"","peer":"",` +
			`"verb":"","action":"","target":"","decision":"","reason":"","status":0,"bytes":0,"duration_us":0,"upstream":false}` + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var buf bytes.Buffer
			if err := audit.NewJSON(&buf).Record(tc.event); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, buf.String()); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

// hostile are texts that a caller, or somebody who names containers, could try
// to get into a log, and what a reader of the log must see.
var hostile = map[string]struct{ text, want string }{
	"forged_line":              {"x\"}\n{\"decision\":\"allow\"}\n", "x\"}\n{\"decision\":\"allow\"}\n"},
	"carriage_return":          {"a\rb", "a\rb"},
	"nul":                      {"a\x00b", "a\x00b"},
	"terminal_escape":          {"\x1b[2J\x1b]0;title\a", "\x1b[2J\x1b]0;title\a"},
	"terminal_escape_in_8_bit": {"\u009b2J", "\u009b2J"},
	"delete":                   {"a\x7f\x7f", "a\x7f\x7f"},
	"line_separators":          {"a\u2028b\u2029c\u0085d", "a\u2028b\u2029c\u0085d"},
	"text_direction":           {"a\u202etxt.exe", "a\u202etxt.exe"},
	"zero_width":               {"we\u200bb\ufeff", "we\u200bb\ufeff"},
	"beyond_16_bit":            {"tag\U000e0041", "tag\U000e0041"},
	"not_utf8":                 {"a\xff\xc0\xafb", "a\ufffd\ufffd\ufffdb"},
	"half_surrogate":           {"\xed\xa0\x80", "\ufffd\ufffd\ufffd"},
	"cut_in_a_character":       {"é"[:1], "\ufffd"},
	"plain_letters_stay":       {"größe 網", "größe 網"},
}

func TestCallerCannotBreakTheLine(t *testing.T) {
	fields := map[string]func(*audit.Event, string){
		"workload": func(e *audit.Event, s string) { e.Workload = workload.ID(s) },
		"name":     func(e *audit.Event, s string) { e.Name = s },
		"members":  func(e *audit.Event, s string) { e.Members = []string{s} },
		"verb":     func(e *audit.Event, s string) { e.Verb = s },
		"target":   func(e *audit.Event, s string) { e.Target = s },
		"reason":   func(e *audit.Event, s string) { e.Reason = s },
	}
	for name, tc := range hostile {
		for field, set := range fields {
			t.Run(name+"/"+field, func(t *testing.T) {
				var want audit.Event
				e := full()
				set(&e, tc.text)
				want = full()
				set(&want, tc.want)
				var buf bytes.Buffer
				if err := audit.NewJSON(&buf).Record(e); err != nil {
					t.Fatal(err)
				}
				line, rest, _ := strings.Cut(buf.String(), "\n")
				if rest != "" {
					t.Errorf("more than one line: %q", buf.String())
				}
				if i := strings.IndexFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 {
					t.Errorf("not printable from %q on", line[i:])
				}
				var got audit.Event
				if err := json.Unmarshal([]byte(line), &got); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{})); d != "" {
					t.Errorf("(-want +got)\n%s", d)
				}
			})
		}
	}
}

// writes notes each call of Write.
type writes struct {
	calls []string
	n     int
	err   error
}

func (w *writes) Write(p []byte) (int, error) {
	w.calls = append(w.calls, string(p))
	if w.err != nil || w.n > 0 {
		return w.n, w.err
	}
	return len(p), nil
}

func TestOneWriteForOneEvent(t *testing.T) {
	var w writes
	j := audit.NewJSON(&w)
	const workers, each = 8, 50
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			for k := range each {
				e := full()
				e.ID, e.Reason = uint64(i*each+k), strings.Repeat("\u2028", 1+k*20)
				if err := j.Record(e); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	seen := make(map[uint64]bool)
	for _, call := range w.calls {
		var e audit.Event
		if err := json.Unmarshal([]byte(call), &e); err != nil || !strings.HasSuffix(call, "}\n") {
			t.Fatalf("not one whole line: %q: %v", call, err)
		}
		seen[e.ID] = true
	}
	if len(w.calls) != workers*each || len(seen) != workers*each {
		t.Errorf("got %d writes of %d events, want %d of each", len(w.calls), len(seen), workers*each)
	}
}

func TestLostEventIsAnError(t *testing.T) {
	full := errors.New("no space left")
	for name, tc := range map[string]struct {
		w    writes
		want error
	}{
		"writer_fails":           {writes{err: full}, full},
		"writer_takes_only_half": {writes{n: 10}, io.ErrShortWrite},
	} {
		t.Run(name, func(t *testing.T) {
			if err := audit.NewJSON(&tc.w).Record(audit.Event{}); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

func TestRingKeepsTheLast(t *testing.T) {
	for _, tc := range []struct {
		size, events int
		want         []uint64
	}{
		{3, 0, nil}, {3, 2, []uint64{1, 2}}, {3, 3, []uint64{1, 2, 3}}, {3, 4, []uint64{2, 3, 4}},
		{3, 7, []uint64{5, 6, 7}}, {1, 2, []uint64{2}}, {0, 2, []uint64{2}}, {-1, 1, []uint64{1}},
	} {
		t.Run(fmt.Sprintf("%d_of_%d", tc.size, tc.events), func(t *testing.T) {
			r := audit.NewRing(tc.size)
			for i := range tc.events {
				if err := r.Record(audit.Event{ID: uint64(i + 1)}); err != nil {
					t.Fatal(err)
				}
			}
			var got []uint64
			for _, e := range r.Last() {
				got = append(got, e.ID)
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func TestTeeGoesOnAfterAnError(t *testing.T) {
	first, second := errors.New("first"), errors.New("second")
	r := audit.NewRing(1)
	tee := audit.Tee{audit.NewJSON(&writes{err: first}), r, audit.NewJSON(&writes{err: second})}
	err := tee.Record(audit.Event{ID: 9})
	if !errors.Is(err, first) || !errors.Is(err, second) {
		t.Errorf("got %v, want both errors", err)
	}
	if got := r.Last(); len(got) != 1 || got[0].ID != 9 {
		t.Errorf("got %v in the ring, want event 9", got)
	}
	if err := (audit.Tee{r}).Record(audit.Event{}); err != nil {
		t.Errorf("got %v, want no error", err)
	}
}

// An event is made of short facts: whoever adds a header or a body here should
// stumble over this.
func TestEventHasNoPlaceForBodies(t *testing.T) {
	for f := range reflect.TypeFor[audit.Event]().Fields() {
		if f.Type == reflect.TypeFor[[]byte]() || f.Type.Kind() == reflect.Map || f.Type.Kind() == reflect.Interface {
			t.Errorf("%s is of type %v, which could carry a header or a body", f.Name, f.Type)
		}
	}
}

func BenchmarkJSON(b *testing.B) {
	j, e := audit.NewJSON(io.Discard), full()
	b.ReportAllocs()
	for b.Loop() {
		if err := j.Record(e); err != nil {
			b.Fatal(err)
		}
	}
}
