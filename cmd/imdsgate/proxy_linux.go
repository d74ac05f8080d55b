package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"imdsgate/internal/gate"
	"imdsgate/internal/handover"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

// harden makes sure that this process can never gain a privilege that it does
// not have, and that others of the same user cannot read its memory, where
// tokens are. The main goroutine calls it, before anything was opened.
func harden() error {
	if err := noNewPrivs(); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("dumpable: %w", err)
	}
	return nil
}

// noNewPrivs sets the flag on all threads. A build with cgo cannot reach them: it
// sets the flag on this one and runs itself again from here, which all threads
// then inherit it from. Capabilities and process id stay the same.
func noNewPrivs() error {
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if errno == 0 {
		return nil
	}
	if errno != unix.ENOTSUP {
		return errno
	}
	on, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil || on == 1 {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	return syscall.Exec("/proc/self/exe", os.Args, os.Environ())
}

// outliveReaders makes a write to a pipe that nobody reads any more an error, as
// everywhere else, also for stdout, where it would end the process: audit lines may
// get lost, answers may not.
func outliveReaders() { signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE) }

// serveAgent serves what the agent hands over, until the signal to end; then it
// takes nothing more, lets requests in flight end, and only then leaves the agent,
// whom they may need for a connection.
func serveAgent(e *env, f proxyFlags, to netip.AddrPort, g *gate.Gate, up *upstream.Client, rules *policyFile, log *slog.Logger) error {
	if os.Geteuid() == 0 {
		log.Warn("the proxy runs as root and needs no privilege at all: run it as another user")
	}
	t := &taken{gate: g, log: log, stops: make(map[uint64]context.CancelFunc)}
	if f.answers.ahead {
		t.ahead = func(w *workload.Workload) {
			f.answers.fetchAhead(e.ctx, g.Policy.Snapshot().View(w, workload.Listener), w.ID)
		}
	}
	c := &handover.Client{Path: f.agent, Upstream: to, Taker: t, Log: log}
	t.lost = c.Lost
	up.Dial = c.Dial
	go func() {
		select {
		case <-c.Synced():
			rules.whenReady(e.ctx, func() {
				log.Info("ready", "agent", f.agent, "attached", g.Directory.Len(), "upstream", f.upstream, "uid", os.Geteuid())
				notifyReady(e.getenv)
			})
		case <-e.ctx.Done():
		}
	}()
	ctx, hangUp := context.WithCancel(context.WithoutCancel(e.ctx))
	defer hangUp()
	gone := make(chan error, 1)
	go func() { gone <- c.Run(ctx) }()
	var err error
	select {
	case <-e.ctx.Done():
	case err = <-gone: // before its time
		err = serveAgentError(err)
		gone <- nil
	}
	t.close()
	c.Leave()
	err = errors.Join(err, drain(g, f))
	t.done.Wait()
	hangUp()
	return errors.Join(err, <-gone)
}

// serveAgentError is for a proxy that cannot go on with its agent. The agent's word
// on where connections lead is the truth, the proxy's is what requests are named by
// (Host): where they differ, somebody has set up one of the two for another service.
func serveAgentError(err error) error {
	var other *handover.UpstreamError
	if errors.As(err, &other) {
		return withHint(usageError("--upstream: %v", err), fmt.Sprintf("give both the same: here --upstream http://%v, or another one to the agent", other.Agent))
	}
	return err
}

// taken serves the listeners of each attachment.
type taken struct {
	gate  *gate.Gate
	log   *slog.Logger
	lost  func(id uint64)
	stops map[uint64]context.CancelFunc
	ahead func(*workload.Workload) // fetches what it will ask for; nil: nothing is

	mu     sync.Mutex
	closed bool // nothing more is taken
	done   sync.WaitGroup
}

func (t *taken) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
}

// Take leaves what comes after close to the agent, which holds it too.
func (t *taken) Take(o handover.Offer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		for _, l := range o.Listeners {
			l.Close()
		}
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	t.stops[o.ID] = stop
	t.named(o.ID, o.Workload)
	for _, l := range o.Listeners {
		t.done.Add(1)
		go t.serve(ctx, o, l)
	}
}

func (t *taken) serve(ctx context.Context, o handover.Offer, l net.Listener) {
	defer t.done.Done()
	err := t.gate.Serve(ctx, gate.Listener{
		Listener: l, Attachment: o.ID, Method: o.Method, Proof: workload.Listener,
		Local: gate.ServiceAddrs(),
	})
	switch {
	case errors.Is(err, gate.ErrListenerLost):
		t.log.Warn("listener was destroyed from inside the namespace", "workload", o.Workload.ID, "attachment", o.ID)
		t.lost(o.ID)
	case err != nil && !errors.Is(err, net.ErrClosed):
		t.log.Error("listener", "workload", o.Workload.ID, "error", err)
	}
}

// named notes who is behind an attachment.
func (t *taken) named(id uint64, w workload.Workload) {
	t.gate.Directory.Set(id, w)
	if t.ahead != nil && w.ID != "" {
		t.done.Go(func() { t.ahead(&w) }) // ends with the command's context
	}
}

func (t *taken) Update(id uint64, w workload.Workload) { t.named(id, w) }

func (t *taken) Release(id uint64) {
	if stop := t.stops[id]; stop != nil {
		stop()
		delete(t.stops, id)
	}
	t.gate.Directory.Delete(id)
}
