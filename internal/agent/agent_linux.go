package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"imdsgate/internal/discover"
	"imdsgate/internal/handover"
	"imdsgate/internal/netns"
	"imdsgate/internal/redirect"
	"imdsgate/internal/workload"
)

// adoptWait is how long an agent that follows another waits for the proxy to
// come back, before it opens anything anew: the proxy retries much more often.
const adoptWait = 1500 * time.Millisecond

// repairInterval is how often every namespace is looked into for rules and routes
// that somebody inside has removed. Their owner meets the guard meanwhile.
const repairInterval = 10 * time.Second

// Source knows which workloads should be steered, right now.
type Source interface {
	// Find lists them. A workload without ID is one whose namespace is there and
	// whose name is not known yet: it is attached at once, so that nobody can be
	// faster, and handed over when it has a name.
	Find() ([]discover.Found, []discover.Missing)

	// Changed tells that Find would say something else; nil if that never happens
	// in between the looks at intervals.
	Changed() <-chan struct{}
}

// Agent keeps the redirections equal to a source's workloads. Set the fields,
// then call Run once.
type Agent struct {
	Socket     *handover.Listener
	Redirector *redirect.Redirector
	Dial       func(context.Context) (net.Conn, error) // to the upstream
	Upstream   netip.AddrPort                          // where Dial leads, for the proxy to compare; zero says nothing
	Interval   time.Duration                           // between reconciles; zero means 2 s
	Log        *slog.Logger

	// Sources delivers the source to use from now on; the first one starts the
	// work.
	Sources <-chan Source

	// Ready, if not nil, is called after the first reconcile.
	Ready func(attached int)

	source  Source
	held    map[Key]*entry
	backoff map[Key]Backoff
	nextID  uint64
	proxy   *handover.Proxy // nil while none is connected
	noted   map[string]bool // troubles that were logged and still last
	serving atomic.Int64    // pid of the connected proxy, for accept
	arrived chan arrival
	left    chan *handover.Proxy
	lost    chan uint64

	greeting chan struct{} // a place for each proxy that says hello
}

// maxGreetings bounds the proxies that say hello at the same time: each may send
// thousands of descriptors.
const maxGreetings = 2

// entry is an attachment of ours.
type entry struct {
	id       uint64
	ns       *netns.Handle
	workload workload.Workload
	att      *redirect.Attachment
	handed   bool // the connected proxy has it
	unsure   bool // adopted, and its rules not yet looked at
}

// arrival is a proxy that has said hello.
type arrival struct {
	proxy *handover.Proxy
	held  []*handover.Attachment
}

func keyOf(id netns.ID) Key { return Key{id.Inode, id.Cookie} }

// Run works until ctx ends, and then returns nil and leaves everything in place:
// the proxy goes on serving, and the next agent takes over.
func (a *Agent) Run(ctx context.Context) error {
	a.held, a.backoff, a.noted = make(map[Key]*entry), make(map[Key]Backoff), make(map[string]bool)
	a.nextID = rand.Uint64N(1 << 62) // no two agents give out the same
	a.arrived, a.left, a.lost = make(chan arrival), make(chan *handover.Proxy), make(chan uint64)
	a.greeting = make(chan struct{}, maxGreetings)
	select {
	case a.source = <-a.Sources:
	case <-ctx.Done():
		return nil
	}
	accepted := make(chan error, 1)
	go func() { accepted <- a.accept(ctx) }()
	a.awaitProxy(ctx)
	a.reconcile()
	if a.Ready != nil {
		a.Ready(len(a.held))
	}
	err := a.loop(ctx)
	a.Socket.Close()
	for _, e := range a.held {
		e.att.Close()
		e.ns.Close()
	}
	return errors.Join(err, <-accepted)
}

func (a *Agent) loop(ctx context.Context) error {
	interval := a.Interval
	if interval == 0 {
		interval = 2 * time.Second
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	repair := time.NewTicker(repairInterval)
	defer repair.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case a.source = <-a.Sources:
			a.reconcile()
		case <-a.source.Changed():
			a.reconcile()
		case <-tick.C:
			a.reconcile()
		case <-repair.C:
			a.repair()
		case x := <-a.arrived:
			a.welcome(ctx, x)
		case p := <-a.left:
			a.farewell(p)
		case id := <-a.lost:
			a.hearLost(id)
		}
	}
}

// hearLost takes the proxy's word that it lost a listener. If the kernel agrees,
// another is opened; else the same is handed over again, not too often.
func (a *Agent) hearLost(id uint64) {
	e := a.byID(id)
	switch {
	case e == nil:
	case !e.att.Alive():
		a.Log.Warn("listener was destroyed", "workload", e.workload.ID, "attachment", id)
		a.reconcile()
	case a.proxy != nil && e.handed:
		k := keyOf(e.ns.ID())
		if time.Now().Before(a.backoff[k].Until) {
			return
		}
		a.backoff[k] = a.backoff[k].next(time.Now())
		a.proxy.Detach(e.id)
		e.handed = false
		a.noteOne(e.name(), a.handOver(e))
	}
}

// awaitProxy gives the proxy of an earlier agent time to come back.
func (a *Agent) awaitProxy(ctx context.Context) {
	if !a.Socket.Stale {
		return
	}
	timer := time.NewTimer(adoptWait)
	defer timer.Stop()
	select {
	case x := <-a.arrived:
		a.welcome(ctx, x)
	case <-timer.C:
	case <-ctx.Done():
	}
}

// accept takes connections until ctx ends.
func (a *Agent) accept(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { a.Socket.Close() })
	defer stop()
	for {
		p, err := a.Socket.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("agent socket: %w", err)
		case err != nil:
			a.Log.Warn("connection to the agent's socket", "error", err)
			time.Sleep(10 * time.Millisecond) // out of descriptors, or somebody who insists
			continue
		}
		// One proxy at a time. A proxy whose predecessor was just killed comes back in
		// a moment, when that is known here.
		if pid := a.serving.Load(); pid != 0 {
			a.Log.Debug("second proxy refused", "pid", p.PID, "first", pid)
			p.Refuse(fmt.Sprintf("a proxy is connected already: pid %d", pid))
			continue
		}
		select {
		case a.greeting <- struct{}{}:
			go a.greet(ctx, p)
		default:
			p.Refuse("too many say hello at once")
		}
	}
}

// greet hears what a proxy holds, and passes it to the loop.
func (a *Agent) greet(ctx context.Context, p *handover.Proxy) {
	defer func() { <-a.greeting }()
	held, err := p.Hello()
	if err != nil {
		a.Log.Warn("proxy said no hello", "pid", p.PID, "error", err)
		p.Refuse(err.Error())
		return
	}
	select {
	case a.arrived <- arrival{p, held}:
	case <-ctx.Done():
		for _, h := range held {
			h.Discard()
		}
		p.Close()
	}
}

// welcome takes a proxy into service: adopts what it holds, and tells it what it
// should hold.
func (a *Agent) welcome(ctx context.Context, x arrival) {
	if a.proxy != nil { // two said hello at once
		for _, h := range x.held {
			h.Discard()
		}
		x.proxy.Refuse(fmt.Sprintf("a proxy is connected already: pid %d", a.proxy.PID))
		return
	}
	// While no proxy is noted, nothing that reconcile does is told to one.
	for _, e := range a.held {
		e.handed = false
	}
	kept := a.adopt(x.held)
	a.reconcile()
	a.proxy = x.proxy
	a.serving.Store(int64(x.proxy.PID))
	go a.serve(ctx, x.proxy)
	a.announce(kept)
	a.Log.Info("proxy connected", "pid", x.proxy.PID, "uid", x.proxy.UID, "holds", len(x.held), "keeps", len(kept))
}

// announce tells the proxy of everything that it should hold; it lets go of
// everything else.
func (a *Agent) announce(kept map[uint64]bool) {
	for _, e := range a.held {
		var err error
		switch {
		case e.workload.ID == "": // waits for its name
		case kept[e.id]:
			err = a.proxy.Keep(e.id, e.workload)
			e.handed = err == nil
		default:
			err = a.proxy.Attach(e.handover())
			e.handed = err == nil
		}
		a.noteOne(e.name(), err)
	}
	a.proxy.Sync(a.Upstream)
}

func (a *Agent) byID(id uint64) *entry {
	for _, e := range a.held {
		if e.id == id {
			return e
		}
	}
	return nil
}

func (a *Agent) serve(ctx context.Context, p *handover.Proxy) {
	err := p.Serve(ctx, handover.Host{
		Dial: a.Dial,
		Lost: func(id uint64) {
			select {
			case a.lost <- id:
			case <-ctx.Done():
			}
		},
		Leaving: func() {
			select {
			case a.left <- p:
			case <-ctx.Done():
			}
		},
	})
	p.Close()
	if ctx.Err() == nil {
		a.Log.Info("proxy went away", "pid", p.PID, "error", err)
	}
	select {
	case a.left <- p:
	case <-ctx.Done():
	}
}

func (a *Agent) farewell(p *handover.Proxy) {
	if a.proxy == p {
		a.proxy = nil
		a.serving.Store(0)
	}
}
