package sim

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Limits are how often a VM may ask. The zero value means the platform's own
// (docs/protocol-azure.md §1.5).
type Limits struct {
	Off        bool    // no limit at all
	General    float64 // requests/s to all but the identity endpoints; 0 means 5
	Identity   float64 // requests/s to the identity endpoints; 0 means 20
	Concurrent int     // requests at once to the identity endpoints; 0 means 5
}

// ParseLimits reads "off", "" (the platform's own) or any of
// "general=5,identity=20,concurrent=5", separated by commas.
func ParseLimits(s string) (Limits, error) {
	var l Limits
	if s == "off" || s == "" {
		l.Off = s == "off"
		return l, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		name, value, _ := strings.Cut(part, "=")
		n, err := strconv.ParseFloat(value, 64)
		if err != nil || !(n > 0 && n <= 1e6) {
			return Limits{}, fmt.Errorf("limit %q: want a number above 0, as in general=5", part)
		}
		switch name {
		case "general":
			l.General = n
		case "identity":
			l.Identity = n
		case "concurrent":
			if n != float64(int(n)) {
				return Limits{}, fmt.Errorf("limit %q: want a whole number", part)
			}
			l.Concurrent = int(n)
		default:
			return Limits{}, fmt.Errorf("limit %q: want off, general, identity or concurrent", part)
		}
	}
	return l, nil
}

// bucket is a token bucket that holds as much as is filled in one second.
type bucket struct {
	rate, tokens float64
	last         time.Time
}

func newBucket(rate float64, now time.Time) bucket {
	size := max(rate, 1)
	return bucket{rate: rate, tokens: size, last: now}
}

func (b *bucket) take(now time.Time) bool {
	if d := now.Sub(b.last); d > 0 {
		b.tokens = min(max(b.rate, 1), b.tokens+b.rate*d.Seconds())
		b.last = now
	}
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// limiter counts for the one VM that there is: all callers share it.
type limiter struct {
	off     bool
	mu      sync.Mutex
	buckets [2]bucket // by family
	slots   int       // identity requests that may still come in
}

func newLimiter(l Limits, now time.Time) *limiter {
	or := func(v, platform float64) float64 {
		if v == 0 {
			return platform
		}
		return v
	}
	return &limiter{
		off:     l.Off,
		buckets: [2]bucket{general: newBucket(or(l.General, 5), now), identity: newBucket(or(l.Identity, 20), now)},
		slots:   int(or(float64(l.Concurrent), 5)),
	}
}

// admit reports whether a request is within the limits. If so, done has to be
// called when it has been answered.
func (l *limiter) admit(f family, now time.Time) (done func(), ok bool) {
	if l.off {
		return func() {}, true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if f == identity && l.slots == 0 || !l.buckets[f].take(now) {
		return nil, false
	}
	if f != identity {
		return func() {}, true
	}
	l.slots--
	return l.release, true
}

func (l *limiter) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slots++
}
