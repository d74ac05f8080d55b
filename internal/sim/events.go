package sim

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxEvents bounds the events under way; the platform shows a handful at most.
const maxEvents = 100

// longest bounds the times of an event, so that scaling them cannot overflow.
const longest = 30 * 24 * time.Hour

// Event is scheduled maintenance to come. It is Scheduled for the time of
// Notice, then Started for the time of Run, then gone (docs/protocol-azure.md §1.9).
type Event struct {
	Type        string   // Freeze, Reboot, Redeploy, Preempt or Terminate
	Resources   []string // names of VMs; nil means this one
	Source      string   // Platform or User; "" means Platform
	Description string
	Notice      time.Duration // 0: it starts at once, as failing hardware does
	Run         time.Duration
	Seconds     int     // the DurationInSeconds that is told; −1 not known, 0 none
	Cancelled   bool    // gone at the end of Notice, unless it was approved before
	Scale       float64 // Notice and Run pass so many times faster, 0.01 to 1000000; 0 means 1
}

// scenarios are stories worth testing against (docs/protocol-azure.md §1.9), with the
// platform's minimum notices.
var scenarios = map[string]Event{
	"live-migration":   {Type: "Freeze", Notice: 15 * time.Minute, Run: 5 * time.Second, Seconds: 5, Description: "Virtual machine is being paused because of a memory-preserving Live Migration operation."},
	"host-maintenance": {Type: "Freeze", Notice: 15 * time.Minute, Run: 9 * time.Second, Seconds: 9, Description: "Host server is undergoing maintenance."},
	"user-reboot":      {Type: "Reboot", Source: "User", Notice: 15 * time.Minute, Run: time.Minute, Seconds: -1, Description: "Virtual machine is going to be restarted as requested by authorized user."},
	"platform-redeploy": {Type: "Redeploy", Notice: 10 * time.Minute, Run: 2 * time.Minute, Seconds: -1,
		Description: "Virtual machine is going to be moved to another host."},
	"user-redeploy":    {Type: "Redeploy", Source: "User", Notice: 10 * time.Minute, Run: 2 * time.Minute, Seconds: -1, Description: "Virtual machine is going to be redeployed as requested by authorized user."},
	"cancelled":        {Type: "Reboot", Notice: 15 * time.Minute, Seconds: -1, Cancelled: true, Description: "Host server is undergoing maintenance."},
	"spot-preempt":     {Type: "Preempt", Notice: 30 * time.Second, Run: 5 * time.Second, Seconds: -1},
	"terminate":        {Type: "Terminate", Source: "User", Notice: 5 * time.Minute, Run: time.Minute, Seconds: -1},
	"hardware-failure": {Type: "Reboot", Run: 5 * time.Minute, Seconds: -1, Description: "Host server has failed."},
}

// Scenario returns one of the built-in events.
func Scenario(name string) (Event, error) {
	e, ok := scenarios[name]
	if !ok {
		return Event{}, fmt.Errorf("unknown scenario %q: want one of %s", name, strings.Join(Scenarios(), ", "))
	}
	return e, nil
}

// Scenarios are the names that Scenario knows, sorted.
func Scenarios() []string { return slices.Sorted(maps.Keys(scenarios)) }

// typeSince are the types of events and their first api-versions.
var typeSince = map[string]string{
	"Freeze": "2017-08-01", "Reboot": "2017-08-01", "Redeploy": "2017-08-01", "Preempt": "2017-11-01", "Terminate": "2019-01-01",
}

// planned is an event on its way. Times are fixed when it is added; only an
// approval changes them.
type planned struct {
	Event
	id         string
	start, end time.Time
}

// calendar holds the events of the VM. Nothing runs in it: what has happened
// meanwhile is worked out when somebody looks.
type calendar struct {
	mu          sync.Mutex
	incarnation int
	events      []*planned
	started     map[string]bool // by id, as last shown
}

// AddEvent puts an event on the calendar and returns its id.
func (s *Server) AddEvent(e Event) (string, error) {
	switch {
	case typeSince[e.Type] == "":
		return "", fmt.Errorf("event type %q: want Freeze, Reboot, Redeploy, Preempt or Terminate", e.Type)
	case e.Source != "" && e.Source != "Platform" && e.Source != "User":
		return "", fmt.Errorf("event source %q: want Platform or User", e.Source)
	case e.Notice < 0 || e.Run < 0 || e.Notice > longest || e.Run > longest:
		return "", fmt.Errorf("event: notice and run: want 0 to %v", longest)
	case e.Scale != 0 && !(e.Scale >= 0.01 && e.Scale <= 1e6):
		return "", fmt.Errorf("event: scale: want 0.01 to 1000000, got %v", e.Scale)
	}
	if e.Source == "" {
		e.Source = "Platform"
	}
	if e.Scale == 0 {
		e.Scale = 1
	}
	if e.Resources == nil {
		e.Resources = []string{s.vm.compute("name")}
	}
	return s.calendar.add(e, s.now())
}

func (c *calendar) add(e Event, now time.Time) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.advance(now)
	if len(c.events) >= maxEvents {
		return "", fmt.Errorf("event: there are %d already", maxEvents)
	}
	p := &planned{Event: e, id: strings.ToUpper(newUUID())}
	p.begin(now.Add(scaled(e.Notice, e.Scale)))
	if e.Cancelled {
		p.end = p.start
	}
	c.events = append(c.events, p)
	c.incarnation++
	c.advance(now)
	return p.id, nil
}

func scaled(d time.Duration, scale float64) time.Duration { return time.Duration(float64(d) / scale) }

func (p *planned) begin(at time.Time) {
	p.start = at
	p.end = at.Add(scaled(p.Run, p.Scale))
}

// advance brings the calendar up to now: the incarnation changes whenever what
// is shown does.
func (c *calendar) advance(now time.Time) {
	changed := false
	c.events = slices.DeleteFunc(c.events, func(p *planned) bool {
		over := !now.Before(p.end)
		changed = changed || over
		return over
	})
	started := make(map[string]bool)
	for _, p := range c.events {
		if !now.Before(p.start) {
			started[p.id] = true
			changed = changed || !c.started[p.id]
		}
	}
	c.started = started
	if changed {
		c.incarnation++
	}
}

// approve starts the events, or none of them when one is not known.
func (c *calendar) approve(ids []string, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.advance(now)
	var chosen []*planned
	for _, id := range ids {
		i := slices.IndexFunc(c.events, func(p *planned) bool { return strings.EqualFold(p.id, id) })
		if i < 0 {
			return false
		}
		chosen = append(chosen, c.events[i])
	}
	for _, p := range chosen {
		if now.Before(p.start) {
			p.Cancelled = false
			p.begin(now)
		}
	}
	c.advance(now)
	return true
}

type eventView struct {
	EventID     string   `json:"EventId"`
	EventType   string   `json:"EventType"`
	Resource    string   `json:"ResourceType"`
	Resources   []string `json:"Resources"`
	EventStatus string   `json:"EventStatus"`
	NotBefore   string   `json:"NotBefore"`
	Description *string  `json:"Description,omitempty"`       // since 2019-04-01
	EventSource *string  `json:"EventSource,omitempty"`       // since 2019-08-01
	Duration    *int     `json:"DurationInSeconds,omitempty"` // since 2020-07-01
}

type eventsView struct {
	Incarnation int         `json:"DocumentIncarnation"`
	Events      []eventView `json:"Events"`
}

// view is the document as an api-version shows it.
func (c *calendar) view(version string, now time.Time) eventsView {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.advance(now)
	doc := eventsView{Incarnation: c.incarnation, Events: []eventView{}}
	for _, p := range c.events {
		if version >= typeSince[p.Type] {
			doc.Events = append(doc.Events, p.view(version, now))
		}
	}
	return doc
}

func (p *planned) view(version string, now time.Time) eventView {
	v := eventView{
		EventID: p.id, EventType: p.Type, Resource: "VirtualMachine", Resources: p.Resources,
		EventStatus: "Scheduled", NotBefore: p.start.UTC().Format(http.TimeFormat),
	}
	if !now.Before(p.start) {
		v.EventStatus, v.NotBefore = "Started", ""
	}
	if version >= "2019-04-01" {
		v.Description = &p.Description
	}
	if version >= "2019-08-01" {
		v.EventSource = &p.Source
	}
	if version >= "2020-07-01" {
		v.Duration = &p.Seconds
	}
	return v
}

// scheduledEvents answers docs/protocol-azure.md §1.9. The service may take two
// minutes over a VM's first call; the fault "latency" with a count of 1 does that.
func (s *Server) scheduledEvents(c *call) reply {
	if c.Method == http.MethodGet {
		return okJSON(s.calendar.view(c.version, s.now()))
	}
	ids, ok := startRequests(c.Body)
	if !ok || !s.calendar.approve(ids, s.now()) {
		return badRequest(general, "Payload is invalid")
	}
	return reply{status: http.StatusOK}
}

// startRequests reads {"StartRequests":[{"EventId":"…"}]}.
func startRequests(body io.Reader) ([]string, bool) {
	const limit = 64 << 10
	data, err := io.ReadAll(io.LimitReader(body, limit+1))
	var doc struct {
		StartRequests []struct {
			EventID string `json:"EventId"`
		}
	}
	if err != nil || len(data) > limit || json.Unmarshal(data, &doc) != nil || len(doc.StartRequests) == 0 {
		return nil, false
	}
	ids := make([]string, len(doc.StartRequests))
	for i, r := range doc.StartRequests {
		ids[i] = r.EventID
	}
	return ids, true
}
