package upstream

import (
	"cmp"
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"

	"imdsgate/internal/imds"
)

const (
	defaultCacheBytes = 8 << 20
	defaultBodyBytes  = 256 << 10
	defaultMargin     = 5 * time.Minute
	defaultStale      = 15 * time.Minute
	maxKey            = 1 << 10 // bytes of the key of what is kept

	errorLife   = time.Second      // of the errors that are kept at all
	staleAfter  = time.Second      // that somebody waits for better than what there is
	probeEvery  = time.Second / 2  // that it is tried behind what is kept
	probeTime   = time.Second      // for the service to answer that, after it has failed, from when it is asked
	bypassEvery = 10 * time.Second // between two calls by bypass_cache for one thing
	flightTime  = 3 * time.Minute  // of a call that nobody else bounds
	sweepEvery  = time.Minute
)

// Cache is a Source that keeps what another one answers, in memory alone. What
// it keeps and for how long is in protocol-azure §9; what it may not keep, and
// everything but GET, it hands on.
//
//   - All who ask for one thing at once wait for one call. It ends when the last
//     of them has left, but for an identity's that the service works on already.
//   - A token is asked for again at half its life, or when Margin is left of it,
//     and before that, behind the old one, while it is in use.
//   - While the service is away (an error, 410, 429, 5xx, or silence) what is
//     there is served until it is really over: a token until it expires.
//   - Such a call carries of its asker's header only what the key holds
//     (Metadata, and Accept but for tokens): nobody can put into it what others get answered.
//   - An unusual Accept, or what the service marks as one caller's, is not shared.
//   - Who asks for the events after an approval gets what is so after it.
//   - bypass_cache=true gets a call of its own, or what such a call brought in
//     the last ten seconds.
//
// Policy must have been asked before, and what the caller may not see is taken
// out afterwards: nothing here depends on Request.Workload.
//
// The fields are set before the first Answer and not changed afterwards.
type Cache struct {
	Source Source

	// MaxBytes bounds the memory for what is kept; 0 means 8 MiB. What is asked
	// for often is kept when others flood the cache.
	MaxBytes int64

	// MaxBody bounds the body of an answer that is kept; 0 means 256 KiB. Larger
	// ones are streamed, each to one caller.
	MaxBody int64

	// Margin is what must be left of a token's life; 0 means 5 min.
	Margin time.Duration

	// Stale is how long after its time an answer without a token is served while
	// the service is away; 0 means 15 min.
	Stale time.Duration

	// Now is the time of day, by which tokens expire; nil means time.Now. All
	// else goes by the monotonic clock.
	Now func() time.Time

	once  sync.Once
	store *otter.Cache[string, *entry]

	mu      sync.Mutex
	flights map[string]*flight   // that can be joined
	all     map[*flight]struct{} // those under way
	swept   time.Time
	closed  bool

	approvals atomic.Uint64 // calls that may have changed the events; part of their key

	run sync.WaitGroup // the calls under way
}

func (c *Cache) init() {
	c.once.Do(func() {
		c.flights = make(map[string]*flight)
		c.all = make(map[*flight]struct{})
		c.swept = time.Now()
		c.store = otter.Must(&otter.Options[string, *entry]{
			MaximumWeight: uint64(cmp.Or(c.MaxBytes, defaultCacheBytes)),
			Weigher:       func(key string, e *entry) uint32 { return e.weight(key) },
			Executor:      func(f func()) { f() }, // no goroutine but ours
		})
	})
}

func (c *Cache) margin() time.Duration { return cmp.Or(c.Margin, defaultMargin) }
func (c *Cache) stale() time.Duration  { return cmp.Or(c.Stale, defaultStale) }
func (c *Cache) maxBody() int64        { return cmp.Or(c.MaxBody, defaultBodyBytes) }

// now is the time of both clocks: monotonic, and of day.
func (c *Cache) now() (mono, wall time.Time) {
	mono = time.Now()
	if c.Now != nil {
		return mono, c.Now()
	}
	return mono, mono
}

// Bytes is about how much memory is taken by what is kept.
func (c *Cache) Bytes() int64 {
	c.init()
	return int64(c.store.WeightedSize())
}

// Answer answers from memory or from the source. The errors are the source's,
// and the context's.
func (c *Cache) Answer(ctx context.Context, r Request) (*Answer, error) {
	c.init()
	if r.Query.Action == imds.EventsApprove {
		defer c.approvals.Add(1) // what was asked before is not for those who ask after
	}
	k, ok := c.keysOf(&r)
	if !ok {
		return c.Source.Answer(ctx, r)
	}
	if a := c.kept(&k, &r); a != nil {
		return a, nil
	}
	return c.fetch(ctx, &k, &r)
}

// kept is the answer that is in memory, if it will do. A better one is fetched
// behind it when it is time.
func (c *Cache) kept(k *keys, r *Request) *Answer {
	e, ok := c.store.GetIfPresent(k.slot)
	if !ok {
		return nil
	}
	mono, wall := c.now()
	age := mono.Sub(e.at)
	left := e.left(age, wall)
	fresh := e.isFresh(age, left, c.margin())
	switch {
	case k.bypass:
		if fresh && e.bypass && age < bypassEvery {
			return e.worded(left, Hit)
		}
	case fresh:
		if age >= e.refresh {
			c.renew(k, r, e, age, flightTime)
		}
		return e.worded(left, Hit)
	case left > 0 && e.failing.Load():
		// Nobody waits for a service of which it is known that it is away.
		c.renew(k, r, e, age, probeTime)
		return e.worded(left, Stale)
	}
	return nil
}

// renew begins a call behind the entry if it is time, or joins the one that is
// under way.
func (c *Cache) renew(k *keys, r *Request, e *entry, age, limit time.Duration) {
	c.alongside(k, r)
	if e.claim(age) {
		c.behind(k, r, limit)
	}
}

// alive is what may be served while the service is away, and how much is left
// of it; nil is nothing.
func (c *Cache) alive(k *keys) (*entry, time.Duration) {
	if k.bypass {
		return nil, 0
	}
	e, ok := c.store.GetIfPresent(k.slot)
	if !ok || e.status != 200 {
		return nil, 0
	}
	mono, wall := c.now()
	if left := e.left(mono.Sub(e.at), wall); left > 0 {
		return e, left
	}
	return nil, 0
}

// keep takes in what a call has brought: status, header and whole body in e,
// and e.at. It is not the caller's any more.
func (c *Cache) keep(k *keys, r *Request, e *entry) {
	_, wall := c.now()
	e.bypass = k.bypass
	old, _ := c.store.GetIfPresent(k.slot)
	switch {
	case len(k.slot) <= maxKey && e.keepFor(k.life, wall, c.margin(), rand.Float64()):
		if old == nil || !old.at.After(e.at) { // a later call may have ended earlier
			c.store.Set(k.slot, e)
		}
	case k.bypass:
	case e.status < 300:
		c.store.Invalidate(k.slot) // the service is there again, and this is not to be kept
	case isAway(e.status):
		if !c.failed(k) && len(k.slot) <= maxKey && e.keepError(&r.Query) {
			c.store.Set(k.slot, e)
		}
	case len(k.slot) <= maxKey && e.keepError(&r.Query):
		c.store.Set(k.slot, e)
	default:
		c.store.Invalidate(k.slot) // the service has said that it is not so
	}
	c.sweep()
}

// failed notes that a call has failed, on what is served meanwhile. It reports
// whether there is any.
func (c *Cache) failed(k *keys) bool {
	e, _ := c.alive(k)
	if e == nil {
		return false
	}
	if !e.failing.Swap(true) {
		e.again.Store(int64(time.Since(e.at) + probeEvery))
	}
	return true
}

// unclaim lets the next one who asks begin a call behind what is kept.
func (c *Cache) unclaim(k *keys) {
	if e, ok := c.store.GetIfPresent(k.slot); ok {
		e.again.Store(0)
	}
}

// sweep forgets what is over: nobody may ask for it again, and tokens are not
// to lie about.
func (c *Cache) sweep() {
	mono, wall := c.now()
	c.mu.Lock()
	due := mono.Sub(c.swept) >= sweepEvery
	if due {
		c.swept = mono
	}
	c.mu.Unlock()
	if !due {
		return
	}
	for key, e := range c.store.All() {
		if e.left(mono.Sub(e.at), wall) <= 0 {
			c.store.Invalidate(key)
		}
	}
}

// Prefetch fetches what will be asked for, one after another, as far as it is
// not there: a workload's usual token, when the workload appears. It returns the
// first error and leaves out the rest then. What cannot be kept is left out too.
func (c *Cache) Prefetch(ctx context.Context, requests []Request) error {
	c.init()
	for _, r := range requests {
		if _, ok := c.keysOf(&r); !ok {
			continue
		}
		a, err := c.Answer(ctx, r)
		if err != nil {
			return err
		}
		a.Body.Close()
	}
	return nil
}

// Close ends all calls that are under way, waits for them, and forgets
// everything. Requests are handed on afterwards.
func (c *Cache) Close() {
	c.init()
	c.mu.Lock()
	c.closed = true
	for f := range c.all {
		f.cancel(context.Canceled)
	}
	c.mu.Unlock()
	c.run.Wait()
	c.store.InvalidateAll()
}
