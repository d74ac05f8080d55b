package upstream

import (
	"slices"
	"sync"

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
	p.quota, p.turn = q, t
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
