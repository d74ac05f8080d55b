// Package audit is what happened: one event for each request, where events go,
// and how they are written. An event never holds a token, a header or a body.
package audit

import (
	"errors"
	"net/netip"
	"time"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// Decision is how a request ended.
type Decision string

const (
	// Allow: policy allowed it, and the answer went out in full, whatever its status.
	Allow Decision = "allow"
	// Deny: policy denied it.
	Deny Decision = "deny"
	// Refuse: nothing was asked of the service, because it was no proper request, its
	// caller is not known, or a limit was reached.
	Refuse Decision = "refuse"
	// Error: it was allowed, but no answer, or only a part of one, went out.
	Error Decision = "error"
)

// Event is one request, from its arrival to the last byte of its answer, or a
// connection that came to no request. The JSON names are an interface: they are
// added to, never renamed.
type Event struct {
	Time time.Time `json:"time"` // when the request had arrived, UTC
	ID   uint64    `json:"id"`   // rises by one with each event of a run; lines may be written out of order
	Conn uint64    `json:"conn"` // the connection, counted from the start of the run

	// Who asked. Workload is empty when nobody could be identified.
	Workload workload.ID    `json:"workload"`
	Name     string         `json:"name,omitempty"`
	Compose  string         `json:"compose,omitempty"` // "project/service"
	Pod      string         `json:"pod,omitempty"`     // "namespace/service-account"
	Members  []string       `json:"members,omitempty"`
	Member   string         `json:"member,omitempty"` // of the members, the one whose rules were the narrowest
	Proof    workload.Proof `json:"proof"`
	Method   string         `json:"method"` // capture method
	Peer     netip.AddrPort `json:"peer"`

	// What was asked. All are empty when the request could not be read.
	Verb   string      `json:"verb"` // HTTP method
	Action imds.Action `json:"action"`
	Target string      `json:"target"` // canonical, as far as it was understood; secrets taken out

	// Identity is the one that an allowed request is for, named or added by the gate,
	// as "client_id=…"; "default" if none was named and none added; empty if none is needed.
	Identity string `json:"identity,omitempty"`

	// What came of it.
	Decision Decision `json:"decision"`
	Rule     string   `json:"rule,omitempty"` // the policy's rule; empty when policy was not asked
	Reason   string   `json:"reason"`         // a sentence for operators
	Snapshot uint64   `json:"snapshot"`       // number of the policy that decided, 0: policy was not asked
	Mode     string   `json:"mode,omitempty"` // "audit" or "off" where policy did not enforce
	// Would is what it would have been with every mode at enforce, where that is
	// different (see policy.Decision); Rule or Reason tells of that.
	Would    string        `json:"would,omitempty"`
	Blanked  []imds.Action `json:"blanked,omitempty"` // endpoints whose data was taken out of the answer
	Cut      []string      `json:"cut,omitempty"`     // subtrees taken out of the answer
	Kept     []string      `json:"kept,omitempty"`    // the subtrees that alone were left in it
	Status   int           `json:"status"`            // HTTP status of the answer, 0 if there was none
	Bytes    int64         `json:"bytes"`             // of the body sent
	Duration int64         `json:"duration_us"`
	Upstream bool          `json:"upstream"` // the answer is the metadata service's own

	// Cache says where the proxy had the answer from: "hit", "stale" (kept, and
	// handed out while the service is away) or "flight" (of somebody else's call);
	// empty when the service was asked for this request.
	Cache string `json:"cache,omitempty"`

	// Count is how many like it this event stands for, when floods are put
	// together in one; 0 means one.
	Count int `json:"count,omitempty"`

	// Until is when the last of them had arrived, UTC; Time is the first's, Bytes
	// their sum, Duration the longest.
	Until time.Time `json:"until,omitzero"`
}

// Sink takes events. Record returns once the event is handed on; an error means
// that it is lost. It may keep the event but not change what it points to, and
// is called from many goroutines at once.
type Sink interface {
	Record(Event) error
}

// Tee hands each event to all of its sinks, also when one of them fails.
type Tee []Sink

// Record returns the errors of all sinks, joined.
func (t Tee) Record(e Event) error {
	var errs []error
	for _, s := range t {
		if err := s.Record(e); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
