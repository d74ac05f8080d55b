package audit

import "sync"

// Ring keeps the last events in memory.
type Ring struct {
	mu     sync.Mutex
	events []Event // grows up to its capacity, then wraps around
	next   int     // where the oldest is, once full
}

// NewRing keeps the last n events; n below 1 counts as 1.
func NewRing(n int) *Ring { return &Ring{events: make([]Event, 0, max(n, 1))} }

// Record never fails.
func (r *Ring) Record(e Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.events) < cap(r.events) {
		r.events = append(r.events, e)
		return nil
	}
	r.events[r.next] = e
	r.next = (r.next + 1) % len(r.events)
	return nil
}

// Last returns a copy of what is kept, oldest first.
func (r *Ring) Last() []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Event, 0, len(r.events))
	out = append(out, r.events[r.next:]...)
	return append(out, r.events[:r.next]...)
}
