package sim

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const eventsURL = "/metadata/scheduledevents?api-version="

func (b *bench) events() eventsView {
	b.t.Helper()
	return decode[eventsView](b.t, b.get(eventsURL+"2020-07-01"))
}

// states are the events as "type status", for short.
func (b *bench) states() []string {
	b.t.Helper()
	out := []string{}
	for _, e := range b.events().Events {
		out = append(out, e.EventType+" "+e.EventStatus)
	}
	return out
}

func (b *bench) approve(body string) answer {
	b.t.Helper()
	return b.do(b.Handler(), "POST", eventsURL+"2020-07-01", body, "Metadata", "true")
}

func (b *bench) add(e Event) string {
	b.t.Helper()
	id, err := b.AddEvent(e)
	if err != nil {
		b.t.Fatal(err)
	}
	return id
}

func TestNoEvents(t *testing.T) {
	a := newBench(t, Config{}).get(eventsURL + "2020-07-01")
	if a.Status != 200 || a.Body != `{"DocumentIncarnation":1,"Events":[]}` {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
}

func TestEventLifecycle(t *testing.T) {
	b := newBench(t, Config{})
	id := b.add(Event{Type: "Reboot", Notice: 15 * time.Minute, Run: time.Minute, Seconds: -1, Description: "why"})
	a := b.get(eventsURL + "2020-07-01")
	want := `{"DocumentIncarnation":2,"Events":[{"EventId":"` + id + `","EventType":"Reboot","ResourceType":"VirtualMachine",` +
		`"Resources":["vm-sim-0"],"EventStatus":"Scheduled","NotBefore":"Thu, 15 Jan 2026 10:30:00 GMT",` +
		`"Description":"why","EventSource":"Platform","DurationInSeconds":-1}]}`
	if a.Body != want || id != strings.ToUpper(id) {
		t.Errorf("got  %s\nwant %s", a.Body, want)
	}
	b.clock.advance(14 * time.Minute)
	if again := b.get(eventsURL + "2020-07-01"); again.Body != a.Body {
		t.Errorf("nothing happened, but the document changed: %s", again.Body)
	}
	b.clock.advance(time.Minute)
	doc := b.events()
	if doc.Incarnation != 3 || doc.Events[0].EventStatus != "Started" || doc.Events[0].NotBefore != "" {
		t.Errorf("got %+v, want it started", doc)
	}
	b.clock.advance(time.Minute)
	if doc := b.events(); doc.Incarnation != 4 || len(doc.Events) != 0 {
		t.Errorf("got %+v, want it gone", doc)
	}
}

func TestEventFieldsAppearWithTheirVersion(t *testing.T) {
	b := newBench(t, Config{})
	b.add(Event{Type: "Freeze", Notice: time.Hour})
	b.add(Event{Type: "Preempt", Notice: time.Hour})
	b.add(Event{Type: "Terminate", Notice: time.Hour})
	var got []string
	for _, version := range eventVersions {
		a := b.get(eventsURL + version)
		doc := decode[struct{ Events []map[string]any }](t, a)
		first := doc.Events[0]
		_, desc := first["Description"]
		_, source := first["EventSource"]
		_, duration := first["DurationInSeconds"]
		got = append(got, fmt.Sprintln(version, len(doc.Events), desc, source, duration))
	}
	want := []string{
		"2017-08-01 1 false false false\n", "2017-11-01 2 false false false\n", "2019-01-01 3 false false false\n",
		"2019-04-01 3 true false false\n", "2019-08-01 3 true true false\n", "2020-07-01 3 true true true\n",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("version, events, fields (-want +got):\n%s", diff)
	}
}

func TestApproval(t *testing.T) {
	b := newBench(t, Config{})
	id := b.add(Event{Type: "Redeploy", Notice: 10 * time.Minute, Run: time.Minute})
	other := b.add(Event{Type: "Freeze", Notice: 10 * time.Minute, Run: time.Minute})
	body := func(ids ...string) string {
		return `{"StartRequests":[{"EventId":"` + strings.Join(ids, `"},{"EventId":"`) + `"}]}`
	}
	if a := b.approve(body(id, "unknown")); a.Status != 400 {
		t.Errorf("an unknown id among known ones: got %d, want 400", a.Status)
	}
	if diff := cmp.Diff([]string{"Redeploy Scheduled", "Freeze Scheduled"}, b.states()); diff != "" {
		t.Errorf("after a refusal (-want +got):\n%s", diff)
	}
	before := b.events().Incarnation
	if a := b.approve(body(strings.ToLower(id))); a.Status != 200 || a.Body != "" || a.Header.Get("Content-Length") != "0" {
		t.Errorf("got %d %q, want 200 and nothing", a.Status, a.Body)
	}
	if diff := cmp.Diff([]string{"Redeploy Started", "Freeze Scheduled"}, b.states()); diff != "" {
		t.Errorf("after the approval (-want +got):\n%s", diff)
	}
	if got := b.events().Incarnation; got == before {
		t.Errorf("got incarnation %d still", got)
	}
	b.clock.advance(30 * time.Second)
	if a := b.approve(body(id, other)); a.Status != 200 {
		t.Errorf("approved before: got %d, want 200", a.Status)
	}
	b.clock.advance(30 * time.Second)
	if diff := cmp.Diff([]string{"Freeze Started"}, b.states()); diff != "" {
		t.Errorf("a second approval must not prolong it (-want +got):\n%s", diff)
	}
	if a := b.approve(body(id)); a.Status != 400 {
		t.Errorf("an event that is gone: got %d, want 400", a.Status)
	}
}

func TestApprovalRefuses(t *testing.T) {
	b := newBench(t, Config{})
	id := b.add(Event{Type: "Redeploy", Notice: 10 * time.Minute})
	good := `{"StartRequests":[{"EventId":"` + id + `"}]}`
	for name, body := range map[string]string{
		"empty body":       "",
		"not JSON":         "StartRequests",
		"no requests":      `{"StartRequests":[]}`,
		"another key":      `{"Requests":[{"EventId":"` + id + `"}]}`,
		"id of wrong type": `{"StartRequests":[{"EventId":1}]}`,
		"no id":            `{"StartRequests":[{}]}`,
		"endless body":     good + strings.Repeat(" ", 64<<10),
		"two values":       good + good,
	} {
		a := b.approve(body)
		if a.Status != 400 || a.Body != `{ "error": "Bad request: . Payload is invalid" }` {
			t.Errorf("%s: got %d %s", name, a.Status, a.Body)
		}
	}
	if a := b.do(b.Handler(), "POST", eventsURL+"2020-07-01", good); a.Status != 400 {
		t.Errorf("no header: got %d, want 400", a.Status)
	}
	if got := b.states(); got[0] != "Redeploy Scheduled" {
		t.Errorf("a refused request started the event: %v", got)
	}
}

// Each scenario at sixty times the speed: minutes are seconds.
func TestScenarios(t *testing.T) {
	type look struct {
		after time.Duration
		want  string
	}
	for name, looks := range map[string][]look{
		"live-migration":    {{0, "Freeze Scheduled Platform 5"}, {15 * time.Second, "Freeze Started Platform 5"}, {84 * time.Millisecond, ""}},
		"host-maintenance":  {{0, "Freeze Scheduled Platform 9"}, {15 * time.Second, "Freeze Started Platform 9"}, {time.Second, ""}},
		"user-reboot":       {{0, "Reboot Scheduled User -1"}, {15 * time.Second, "Reboot Started User -1"}, {time.Second, ""}},
		"platform-redeploy": {{0, "Redeploy Scheduled Platform -1"}, {10 * time.Second, "Redeploy Started Platform -1"}, {2 * time.Second, ""}},
		"user-redeploy":     {{0, "Redeploy Scheduled User -1"}, {10 * time.Second, "Redeploy Started User -1"}, {2 * time.Second, ""}},
		"cancelled":         {{0, "Reboot Scheduled Platform -1"}, {14 * time.Second, "Reboot Scheduled Platform -1"}, {time.Second, ""}},
		"spot-preempt":      {{0, "Preempt Scheduled Platform -1"}, {500 * time.Millisecond, "Preempt Started Platform -1"}, {time.Second, ""}},
		"terminate":         {{0, "Terminate Scheduled User -1"}, {5 * time.Second, "Terminate Started User -1"}, {time.Second, ""}},
		"hardware-failure":  {{0, "Reboot Started Platform -1"}, {5 * time.Second, ""}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, Config{})
			a := b.manage("POST", "/events", `{"scenario":"`+name+`","scale":60}`)
			if a.Status != 201 {
				t.Fatalf("got %d %s", a.Status, a.Body)
			}
			for _, look := range looks {
				b.clock.advance(look.after)
				got := ""
				for _, e := range b.events().Events {
					got += fmt.Sprint(e.EventType, " ", e.EventStatus, " ", *e.EventSource, " ", *e.Duration)
				}
				if got != look.want {
					t.Errorf("%v on: got %q, want %q", look.after, got, look.want)
				}
			}
		})
	}
	if got := len(Scenarios()); got != 9 {
		t.Errorf("got %d scenarios, want 9, one row each", got)
	}
}

func TestApprovedEventIsNotCancelled(t *testing.T) {
	b := newBench(t, Config{})
	e, err := Scenario("cancelled")
	if err != nil {
		t.Fatal(err)
	}
	e.Run = time.Minute
	b.approve(`{"StartRequests":[{"EventId":"` + b.add(e) + `"}]}`)
	if diff := cmp.Diff([]string{"Reboot Started"}, b.states()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestOwnEventThroughManagement(t *testing.T) {
	b := newBench(t, Config{})
	a := b.manage("POST", "/events", `{"type":"Freeze","notice":"2m","run":"10s","resources":["a","b"],"source":"User","description":"d","durationInSeconds":0}`)
	var got map[string]string
	if err := json.Unmarshal([]byte(a.Body), &got); err != nil || a.Status != 201 {
		t.Fatalf("got %d %s", a.Status, a.Body)
	}
	e := b.events().Events[0]
	if e.EventID != got["eventId"] || e.NotBefore != "Thu, 15 Jan 2026 10:17:00 GMT" || *e.Duration != 0 || *e.Description != "d" || len(e.Resources) != 2 {
		t.Errorf("got %+v for %s", e, a.Body)
	}
}

func TestEventsRefused(t *testing.T) {
	b := newBench(t, Config{})
	for body, want := range map[string]string{
		`{"scenario":"fire"}`:                      "unknown scenario \"fire\": want one of cancelled, hardware-failure,",
		`{"scenario":"cancelled","type":"Reboot"}`: "a scenario or a type, got both",
		`{"type":"Completed"}`:                     `event type "Completed": want Freeze, Reboot`,
		`{}`:                                       `event type ""`,
		`{"type":"Reboot","source":"Me"}`:          `event source "Me": want Platform or User`,
		`{"type":"Reboot","notice":"soon"}`:        `event: notice: cannot use "soon"`,
		`{"type":"Reboot","run":"-1s"}`:            "event: notice and run: want 0 to",
		`{"type":"Reboot","notice":"800h"}`:        "event: notice and run: want 0 to",
		`{"type":"Reboot","scale":-1}`:             "event: scale: want 0.01",
		`{"type":"Reboot","scale":1e-9}`:           "event: scale: want 0.01",
		`{"type":"Reboot","when":"now"}`:           `unknown field "when"`,
		`{"type":"Reboot"} {}`:                     "want one JSON value",
		``:                                         "read body",
	} {
		if a := b.manage("POST", "/events", body); a.Status != 400 || !strings.Contains(a.Body, want) {
			t.Errorf("%s: got %d %s, want %q", body, a.Status, a.Body, want)
		}
	}
	if got := b.states(); len(got) != 0 {
		t.Errorf("got %v, want nothing scheduled", got)
	}
	for range maxEvents {
		b.add(Event{Type: "Freeze", Notice: time.Hour})
	}
	if _, err := b.AddEvent(Event{Type: "Freeze", Notice: time.Hour}); err == nil {
		t.Errorf("more than %d events were taken", maxEvents)
	}
}
