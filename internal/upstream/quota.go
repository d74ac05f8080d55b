package upstream

import (
	"context"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"imdsgate/internal/workload"
)

const (
	maxLanes   = 4096 // workloads that are known at once
	tolerated  = 3    // failures in a row
	firstPause = 250 * time.Millisecond
	lastPause  = time.Second / 2
	remembered = time.Second // whose turn it was
	reserved   = 1           // of the burst, for lanes that are calm
)

// quota is one of the platform's limits, and the line before it.
type quota struct {
	rate  Rate
	wait  time.Duration
	queue int // of one lane

	mu        sync.Mutex
	tokens    float64
	filled    time.Time
	paused    time.Time // no call before
	throttled int       // answers of 429 in a row
	running   int
	lanes     map[workload.ID]*lane
	ring      []*lane // the lanes in which somebody waits
	swept     time.Time
	timer     *time.Timer
}

// lane is a workload's place in the quota.
type lane struct {
	id      workload.ID
	waiting []*turn
	running int

	// last is when it had a turn, or a second before it came, whichever is later:
	// the lane that had its turn the longest ago is next. So one that asks seldom
	// is before those that ask all the time, and nobody gains by coming anew.
	last time.Time

	failures int // in a row
	next     time.Time
	why      error // ErrAway, ErrGone
}

// enter waits for the request's turn. The lane that it returns is to be left.
func (q *quota) enter(ctx context.Context, r *Request) (*lane, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	t := &turn{ready: make(chan struct{})}
	if err := q.line(t, r.Workload); err != nil {
		return nil, err
	}
	select {
	case <-t.ready:
		return t.lane, nil
	default:
	}
	r.party.line(q, t)
	defer r.party.unline()
	timer := time.NewTimer(q.wait)
	defer timer.Stop()
	var err error
	select {
	case <-t.ready:
		return t.lane, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-timer.C:
		err = ErrBusy
	}
	if !q.drop(t) {
		return t.lane, nil // its turn came all the same
	}
	return nil, err
}

// line puts a turn at the end of a workload's lane, or says why not.
func (q *quota) line(t *turn, id workload.ID) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	l := q.laneOf(id, now)
	if l == nil {
		return ErrBusy
	}
	switch {
	case len(l.waiting) >= q.queue || q.paused.Sub(now) > q.wait:
		return ErrBusy
	case l.failures >= tolerated && now.Before(l.next):
		return l.why
	case l.failures >= tolerated:
		l.next = now.Add(pause(l.failures - tolerated)) // this one is to see
	}
	q.add(t, l, now)
	q.pump()
	return nil
}

// also puts a turn into one more lane, if it still waits and there is room.
func (q *quota) also(t *turn, id workload.ID) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if t.lane != nil || len(t.lanes) == 0 || slices.ContainsFunc(t.lanes, func(l *lane) bool { return l.id == id }) {
		return
	}
	now := time.Now()
	if l := q.laneOf(id, now); l != nil && len(l.waiting) < q.queue {
		q.add(t, l, now)
		q.pump()
	}
}

// laneOf is nil if there are too many.
func (q *quota) laneOf(id workload.ID, now time.Time) *lane {
	if l := q.lanes[id]; l != nil {
		return l
	}
	if now.Sub(q.swept) > remembered {
		q.swept = now
		maps.DeleteFunc(q.lanes, func(_ workload.ID, l *lane) bool { return l.idle(now) })
	}
	if len(q.lanes) >= maxLanes {
		return nil
	}
	if q.lanes == nil {
		q.lanes = make(map[workload.ID]*lane)
	}
	l := &lane{id: id}
	q.lanes[id] = l
	return l
}

// idle reports whether there is nothing to know of the lane.
func (l *lane) idle(now time.Time) bool {
	return len(l.waiting) == 0 && l.running == 0 && now.Sub(l.last) > remembered &&
		(l.failures == 0 || now.Sub(l.next) > time.Minute)
}

func (q *quota) add(t *turn, l *lane, now time.Time) {
	if len(l.waiting) == 0 {
		q.ring = append(q.ring, l)
		if since := now.Add(-remembered); l.last.Before(since) {
			l.last = since
		}
	}
	l.waiting = append(l.waiting, t)
	t.lanes = append(t.lanes, l)
}

// remove takes a turn out of all lanes.
func (q *quota) remove(t *turn) {
	for _, l := range t.lanes {
		i := slices.Index(l.waiting, t)
		if l.waiting = slices.Delete(l.waiting, i, i+1); len(l.waiting) == 0 {
			i := slices.Index(q.ring, l)
			q.ring = slices.Delete(q.ring, i, i+1)
		}
	}
	t.lanes = nil
}

// drop takes a turn back. It reports false if it had come.
func (q *quota) drop(t *turn) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if t.lane != nil {
		return false
	}
	q.remove(t)
	q.pump()
	return true
}

// leave is the end of a call.
func (q *quota) leave(l *lane) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.running--
	l.running--
	q.pump()
}

// pump gives turns for as long as there is something to give, and sets the timer
// for when there will be.
func (q *quota) pump() {
	now := time.Now()
	if d := now.Sub(q.filled); d > 0 { // not after 429
		q.tokens = min(float64(q.rate.Burst), q.tokens+q.rate.PerSecond*d.Seconds())
		q.filled = now
	}
	for q.running < q.rate.AtOnce {
		l := q.next()
		if l == nil {
			break
		}
		if d := max(q.due(l, now), q.paused.Sub(now)); d > 0 {
			q.wake(d)
			return
		}
		q.give(l, now)
	}
	if q.timer != nil {
		q.timer.Stop()
	}
}

// due is how long it takes until there is a token for the lane. The last one is
// for lanes that are calm, which had no turn while two came: who asks seldom
// waits for nobody.
func (q *quota) due(l *lane, now time.Time) time.Duration {
	if q.rate.Burst <= reserved {
		return q.refill(1)
	}
	calm := min(remembered, time.Duration(2/q.rate.PerSecond*float64(time.Second)))
	return min(q.refill(1+reserved), max(q.refill(1), l.last.Add(calm).Sub(now)))
}

// refill is how long it takes until there are so many tokens.
func (q *quota) refill(n float64) time.Duration {
	const almost = 1e-9 // or else the last nanosecond would be waited for over and over
	if q.tokens >= n-almost {
		return 0
	}
	return time.Duration(math.Ceil((n - q.tokens) / q.rate.PerSecond * float64(time.Second)))
}

// next is the lane whose turn it is: none has all the places.
func (q *quota) next() (next *lane) {
	for _, l := range q.ring {
		if l.running < max(1, q.rate.AtOnce-1) && (next == nil || l.last.Before(next.last)) {
			next = l
		}
	}
	return next
}

func (q *quota) give(l *lane, now time.Time) {
	t := l.waiting[0]
	q.tokens--
	q.running++
	l.running++
	q.remove(t)
	if i := slices.Index(q.ring, l); i >= 0 {
		q.ring = append(slices.Delete(q.ring, i, i+1), l) // behind those of the same time
	}
	l.last = now
	t.lane = l
	close(t.ready)
}

func (q *quota) wake(d time.Duration) {
	if q.timer == nil {
		q.timer = time.AfterFunc(d, func() {
			q.mu.Lock()
			defer q.mu.Unlock()
			q.pump()
		})
		return
	}
	q.timer.Reset(d)
}
