package upstream

import (
	"slices"
	"sync"
	"time"

	"imdsgate/internal/workload"
)

// turn is a call that waits, in one lane or several.
type turn struct {
	ready chan struct{} // closed when lane is set
	lane  *lane         // whose turn it was
	lanes []*lane       // where it waits
}

// party is everybody who waits for one call.
type party struct {
	mu    sync.Mutex
	of    []workload.ID
	quota *quota // where the call waits now; nil when it does not
	turn  *turn
	lined bool        // it has had to wait
	begun bool        // it has had a turn
	late  *time.Timer // of the call's time, which is limit; it stands still in a line
	limit time.Duration
}

// clock bounds the call's time, but for what it waits in a line.
func (p *party) clock(limit time.Duration, end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.late, p.limit = time.AfterFunc(limit, end), limit
}

func (p *party) stop() { p.late.Stop() }

// turnless reports whether the call waits for its first turn, or has left the
// line without: so that nothing is known of the service.
func (p *party) turnless() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lined && !p.begun
}

// join has the call wait in the workload's lane as well.
func (p *party) join(id workload.ID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if slices.Contains(p.of, id) {
		return
	}
	p.of = append(p.of, id)
	if p.turn != nil {
		p.quota.also(p.turn, id)
	}
}

// line puts the call into the lanes of those who joined before.
func (p *party) line(q *quota, t *turn) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.quota, p.turn, p.lined = q, t, true
	p.late.Stop()
	for _, id := range p.of {
		q.also(t, id)
	}
}

func (p *party) unline() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.quota, p.turn = nil, nil
}

// hasBegun reports whether the call has had a turn.
func (p *party) hasBegun() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.begun
}

// begin notes that the call goes out.
func (p *party) begin() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.begun = true
	if p.lined {
		p.late.Reset(p.limit)
	}
}
