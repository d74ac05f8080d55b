package audit_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"regexp"
	"strings"
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
		Workload: "static:web", Name: "web", Compose: "shop/web", Pod: "shop/default", Members: []string{"sidecar", "web"}, Member: "sidecar",
		Proof: workload.Listener, Method: "sklookup", Peer: netip.MustParseAddrPort("127.0.0.1:40000"),
		Verb: "GET", Action: imds.InstanceRead, Target: "/metadata/instance?api-version=2021-02-01&format=json", Identity: "client_id=1",
		Decision: audit.Allow, Rule: "p.yaml:2", Reason: "instance.read is in allow", Snapshot: 4, Mode: "audit", Would: "deny",
		Blanked: []imds.Action{imds.InstanceUserdata}, Cut: []string{"compute/tags"}, Kept: []string{"compute"},
		Status: 200, Bytes: 4096, Duration: 1500, Upstream: true, Cache: "hit", Count: 2, Until: time.Date(2030, 1, 2, 3, 4, 5, 7000, time.FixedZone("", 3600)),
	}
}

// written has a Log write events to out, and returns when that is done.
func written(t *testing.T, l *audit.Log, out audit.Out, events ...audit.Event) {
	t.Helper()
	l.Out = out
	for _, e := range events {
		if err := l.Record(e); err != nil {
			t.Error(err)
		}
	}
	l.Run(canceled)
}

// lines of events, without the start record before them.
func eventLines(t *testing.T, events ...audit.Event) string {
	t.Helper()
	var buf bytes.Buffer
	written(t, new(audit.Log), audit.NewStream(&buf), events...)
	_, rest, _ := strings.Cut(buf.String(), "\n")
	return rest
}

// The names are an interface: log pipelines are built on them.
func TestLineIsStable(t *testing.T) {
	for name, tc := range map[string]struct {
		event audit.Event
		want  string
	}{
		"full": {full(), `{"time":"2030-01-02T02:04:05.000006Z","id":7,"conn":3,` +
			`"workload":"static:web","name":"web","compose":"shop/web","pod":"shop/default","members":["sidecar","web"],"member":"sidecar",` +
			`"proof":"listener","method":"sklookup","peer":"127.0.0.1:40000",` +
			`"verb":"GET","action":"instance.read","target":"/metadata/instance?api-version=2021-02-01&format=json","identity":"client_id=1",` +
			`"decision":"allow","rule":"p.yaml:2","reason":"instance.read is in allow","snapshot":4,"mode":"audit","would":"deny",` +
			`"blanked":["instance.userdata"],"cut":["compute/tags"],"kept":["compute"],` +
			`"status":200,"bytes":4096,"duration_us":1500,"upstream":true,"cache":"hit","count":2,"until":"2030-01-02T02:04:05.000007Z"`},
		"zero": {audit.Event{}, `{"time":"0001-01-01T00:00:00Z","id":0,"conn":0,"workload":"","proof":"none","method":"","peer":"",` +
			`"verb":"","action":"","target":"","decision":"","reason":"","snapshot":0,"status":0,"bytes":0,"duration_us":0,"upstream":false`},
	} {
		t.Run(name, func(t *testing.T) {
			got := eventLines(t, tc.event)
			at := strings.LastIndex(got, `,"seq":2,"chain":"`)
			if at < 0 || !regexp.MustCompile(`^[0-9a-f]{64}"}\n$`).MatchString(got[at+len(`,"seq":2,"chain":"`):]) {
				t.Fatalf("not sealed: %q", got)
			}
			if d := cmp.Diff(tc.want, got[:at]); d != "" {
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
		"compose":  func(e *audit.Event, s string) { e.Compose = s },
		"pod":      func(e *audit.Event, s string) { e.Pod = s },
		"member":   func(e *audit.Event, s string) { e.Member = s },
		"identity": func(e *audit.Event, s string) { e.Identity = s },
		"kept":     func(e *audit.Event, s string) { e.Kept = []string{s} },
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
				line, rest, _ := strings.Cut(eventLines(t, e), "\n")
				if rest != "" {
					t.Errorf("more than one line: %q", rest)
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

type broken struct{ err error }

func (b broken) Record(audit.Event) error { return b.err }

func TestTeeGoesOnAfterAnError(t *testing.T) {
	first, second := errors.New("first"), errors.New("second")
	r := audit.NewRing(1)
	tee := audit.Tee{broken{first}, r, broken{second}}
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

// canceled has a Log's Run write what was recorded, and return.
var canceled = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()
