package main

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/imds"
	"imdsgate/internal/testnet"
)

// answered is an answer, or the lack of one, in a form that can be compared.
type answered struct {
	Status int // 0: the connection ended without an answer; -1: in the midst of one
	Header map[string]string
	Body   string
}

// perCall are the headers whose values differ from call to call: what is
// compared of them is whether they are there.
var perCall = []string{"Date", "X-Ms-Request-Id"}

func comparable(r reply, err error) answered {
	a := answered{Status: r.status, Header: make(map[string]string), Body: string(r.body)}
	if err != nil {
		a.Status, a.Body = 0, ""
		if r.status != 0 {
			a.Status = -1
		}
		return a
	}
	for name, values := range r.header {
		a.Header[name] = strings.Join(values, "\n")
		if slices.Contains(perCall, name) {
			a.Header[name] = "…"
		}
	}
	return a
}

// conformanceBench is a stack for the cases of one VM.
type conformanceBench struct {
	s     *testnet.Stack
	cs    []*testnet.Container
	next  int    // of cs: each case with a fault has a container of its own
	event string // the id of one that there is
}

// everything is a policy that leaves the gate no reason to refuse.
func everything() string {
	var b strings.Builder
	b.WriteString("allow:\n")
	for _, a := range imds.Actions() {
		if a != imds.Unknown {
			fmt.Fprintf(&b, "  - %s\n", a)
		}
	}
	return b.String()
}

func startConformance(t *testing.T, vm string, faulty int) *conformanceBench {
	t.Helper()
	flags := []string{"--limits", "off"}
	if text := conformanceVMs[vm]; text != "" {
		path := filepath.Join(t.TempDir(), "vm.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		flags = append(flags, "--instance", path)
	}
	b := &conformanceBench{}
	b.s, b.cs = startAnswers(t, answersSetup{containers: 1 + faulty, sim: flags, policy: everything(),
		proxy: []string{"--budget", "general=1000,identity=1000"}})
	var event struct{ EventID string }
	manage(t, b.s, http.MethodPost, "/events", map[string]any{"type": "Reboot", "notice": "1h", "run": "1h"}, &event)
	b.event = event.EventID
	return b
}

func (c *conformanceCase) throttled() bool { return slices.Contains(c.faults, "status=429") }

// ask puts the case to the service from the VM, from a container to the gate, to
// the service again, and to the gate again, which may have kept its answer.
func (b *conformanceBench) ask(t *testing.T, c *conformanceCase) (direct [2]answered, gate, kept answered) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	from := b.cs[0].NS
	if len(c.faults) > 0 {
		setFaults(t, b.s, c.faults...)
		defer setFaults(t, b.s)
		b.next++
		from = b.cs[b.next].NS
	}
	request := c.request(b.event)
	direct[0] = comparable(callIn(ctx, b.s.VM.NS, request))
	gate = comparable(callIn(ctx, from, request))
	direct[1] = comparable(callIn(ctx, b.s.VM.NS, request))
	if !c.throttled() { // that is tried again for a while each time
		kept = comparable(callIn(ctx, from, request))
	}
	return direct, gate, kept
}

var token = regexp.MustCompile(`"access_token":"[^"]+"`)

// expiresIn is what a kept token's answer says of its remaining life, counted anew
// from expires_on; its length goes with it.
var expiresIn = regexp.MustCompile(`"expires_in":"\d+"`)

func withoutSeconds(a answered) answered {
	a.Body = expiresIn.ReplaceAllString(a.Body, `"expires_in":"…"`)
	a.Header = maps.Clone(a.Header)
	if strings.Contains(a.Body, `"expires_in":"…"`) {
		delete(a.Header, "Content-Length")
	}
	return a
}

// TestConformance sends each case to the simulator from the VM, and by gate and
// agent from a container. Status, headers and body are the same, byte for byte,
// or the case is listed in docs/conformance.md with the reason.
func TestConformance(t *testing.T) {
	cases := documentedCases()
	for _, what := range endpointsMissed(cases) {
		t.Errorf("no case for %s", what)
	}
	byVM := make(map[string][]*conformanceCase)
	names := make(map[string]bool)
	for i := range cases {
		if names[cases[i].name] {
			t.Errorf("two cases are called %q", cases[i].name)
		}
		names[cases[i].name] = true
		byVM[cases[i].vm] = append(byVM[cases[i].vm], &cases[i])
	}
	same, rows := 0, make(map[string]string)
	for _, vm := range slices.Sorted(maps.Keys(byVM)) {
		faulty := 0
		for _, c := range byVM[vm] {
			faulty += min(1, len(c.faults))
		}
		b := startConformance(t, vm, faulty)
		for _, c := range byVM[vm] {
			t.Run(strings.ReplaceAll(c.name, "/", "|"), func(t *testing.T) {
				direct, gate, kept := b.ask(t, c)
				if c.fresh {
					for _, a := range []*answered{&direct[0], &direct[1], &gate, &kept} {
						a.Body = token.ReplaceAllString(a.Body, `"access_token":"…"`)
					}
				}
				if c.why != "" {
					rows[c.name] = c.row(direct[0], gate)
					c.checkDiffers(t, direct, gate)
					return
				}
				same++
				if !cmp.Equal(gate, direct[0]) && !cmp.Equal(gate, direct[1]) {
					t.Errorf("by the gate (-service +gate):\n%s", cmp.Diff(direct[1], gate))
				}
				if c.throttled() {
					return
				}
				if want, got := withoutSeconds(direct[1]), withoutSeconds(kept); !cmp.Equal(got, want) && !cmp.Equal(got, withoutSeconds(direct[0])) {
					t.Errorf("asked again (-service +gate):\n%s", cmp.Diff(want, got))
				}
			})
		}
	}
	t.Logf("%d cases: %d alike byte for byte, %d different on purpose", len(cases), same, len(rows))
	if len(rows)+same == len(cases) { // not when a part was run
		checkConformanceDoc(t, rows, same)
	}
}
