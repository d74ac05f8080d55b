package upstream

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// note learns from what a call has brought.
func (q *quota) note(ctx context.Context, l *lane, a *Answer, err error) {
	if err != nil && (ctx.Err() != nil || errors.Is(err, ErrTooLarge)) {
		return // that says nothing of the service
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	if err == nil && a.Status == http.StatusTooManyRequests {
		d := retryAfterOf(a.Header, now)
		if d == 0 {
			d = pause(q.throttled)
		}
		q.throttled++
		q.paused = now.Add(d)
		q.tokens, q.filled = min(float64(q.rate.Burst), 1+reserved), q.paused // one is to see then, or one of each kind
		return
	}
	if err == nil {
		q.throttled = 0
	}
	if err == nil && !isAway(a.Status) {
		l.failures = 0
		return
	}
	l.why = ErrAway
	if err == nil && a.Status == http.StatusGone {
		l.why = ErrGone
	}
	l.next = now.Add(pause(l.failures - tolerated + 1))
	l.failures++
}

// until is when calls may go out again.
func (q *quota) until() time.Time {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.paused
}

// isAway reports whether the status says that the service cannot answer now,
// rather than that this is its answer (protocol-azure §7).
func isAway(status int) bool {
	return status == http.StatusGone || status == http.StatusTooManyRequests || status >= 500
}

// pause grows from a quarter of a second to half a one; none of two who start
// together ends with the other.
func pause(n int) time.Duration {
	d := lastPause
	if n < 2 {
		d = firstPause << max(n, 0)
	}
	return d - rand.N(d/5)
}

// maxPause bounds what a service may ask for by Retry-After.
const maxPause = time.Minute

// retryAfterOf reads the header of RFC 9110 §10.2.3; 0 if there is none.
func retryAfterOf(h http.Header, now time.Time) time.Duration {
	v := strings.TrimSpace(h.Get("Retry-After"))
	if n, err := strconv.Atoi(v); err == nil {
		return time.Duration(min(max(n, 0), int(maxPause/time.Second))) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil {
		return min(max(at.Sub(now), 0), maxPause)
	}
	return 0
}
