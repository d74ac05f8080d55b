package agent

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	"imdsgate/internal/discover"
	"imdsgate/internal/handover"
	"imdsgate/internal/netns"
	"imdsgate/internal/redirect"
	"imdsgate/internal/workload"
)

// backoffForgiven is how long a namespace must be without trouble before its
// back-off starts from the beginning.
const backoffForgiven = 30 * time.Second

// observed is what a look at the source has found.
type observed struct {
	want    map[Key]workload.Workload
	handles map[Key]*netns.Handle // of those that are not held
	trouble map[string]error      // by workload
}

// observe finds the namespaces of everything that the source lists. What cannot
// be had now is trouble, not an error: the next reconcile looks again.
func (a *Agent) observe() observed {
	found, missing := a.source.Find()
	o := observed{handles: make(map[Key]*netns.Handle), trouble: make(map[string]error)}
	for _, m := range missing {
		o.trouble[string(m.ID)] = m.Err
	}
	held := make(map[uint64]Key, len(a.held))
	for k := range a.held {
		held[k.Inode] = k
	}
	members := make(map[Key][]workload.Workload)
	for _, f := range found {
		k, err := a.locate(f, held, o.handles)
		if err != nil {
			o.trouble[cmp.Or(string(f.Workload.ID), f.Netns)] = err
			continue
		}
		members[k] = append(members[k], f.Workload)
	}
	o.want = make(map[Key]workload.Workload, len(members))
	for k, ws := range members {
		o.want[k] = Group(ws)
	}
	return o
}

// locate finds the key of a namespace, and opens it if it is not held.
func (a *Agent) locate(f discover.Found, held map[uint64]Key, handles map[Key]*netns.Handle) (Key, error) {
	// A namespace that is held cannot die, and its inode is not given to another.
	if inode, err := netns.Inode(f.Netns); err == nil {
		if k, ok := held[inode]; ok {
			return k, nil
		}
	}
	ns, err := a.open(f)
	if err != nil {
		return Key{}, err
	}
	k := keyOf(ns.ID())
	if handles[k] != nil {
		ns.Close()
		return k, nil
	}
	handles[k] = ns
	return k, nil
}

func (a *Agent) open(f discover.Found) (*netns.Handle, error) {
	ns, err := netns.Open(f.Netns)
	if err != nil {
		return nil, err
	}
	if a.Redirector.Host(ns.ID()) {
		err = fmt.Errorf("%s: %w: never steered", f.Netns, redirect.ErrHostNetns)
	} else if f.Recheck != nil {
		err = f.Recheck()
	}
	if err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// reconcile makes what is held equal to what is wanted.
func (a *Agent) reconcile() {
	now := time.Now()
	o := a.observe()
	have := make(map[Key]Held, len(a.held))
	for k, e := range a.held {
		have[k] = Held{ID: e.id, Workload: e.workload, Alive: e.att.Alive()}
	}
	for k, b := range a.backoff {
		if now.Sub(b.Until) > backoffForgiven {
			delete(a.backoff, k)
		}
	}
	for _, s := range Plan(o.want, have, a.backoff, now) {
		if err := a.do(s, o.handles); err != nil {
			o.trouble[nameOf(s.Workload, s.Key)] = fmt.Errorf("%s: %w", s.Action, err)
		}
	}
	for _, ns := range o.handles {
		ns.Close()
	}
	a.note(o.trouble)
}

// do does one step. Handles that it keeps are taken out of the map.
func (a *Agent) do(s Step, handles map[Key]*netns.Handle) error {
	switch s.Action {
	case Detach:
		ns, err := a.detach(s.Key)
		ns.Close()
		return err
	case Update:
		return a.update(a.held[s.Key], s.Workload)
	case Reopen:
		ns, err := a.detach(s.Key)
		handles[s.Key] = ns
		if err != nil {
			return err
		}
		a.backoff[s.Key] = a.backoff[s.Key].next(time.Now())
	}
	return a.attach(s.Key, s.Workload, handles)
}

// update gives a workload its name, or another. What was adopted has its rules
// looked at first: they are not among what the proxy had to show.
func (a *Agent) update(e *entry, w workload.Workload) error {
	if e.unsure {
		if _, err := a.Redirector.Ensure(e.ns, e.att); err != nil {
			return err
		}
		e.unsure = false
	}
	if e.workload.ID == "" {
		a.Log.Info("named", "workload", w.ID, "name", w.Name, "netns", e.ns.ID(), "attachment", e.id)
	}
	e.workload = w
	return a.handOver(e)
}

func (a *Agent) attach(k Key, w workload.Workload, handles map[Key]*netns.Handle) error {
	ns := handles[k]
	start := time.Now()
	att, err := a.Redirector.Attach(ns)
	if err != nil {
		a.backoff[k] = a.backoff[k].next(time.Now())
		return err
	}
	delete(handles, k)
	a.nextID++
	e := &entry{id: a.nextID, ns: ns, workload: w, att: att}
	a.held[k] = e
	a.Log.Info("attached", "workload", w.ID, "netns", ns.ID(), "method", att.Method, "attachment", e.id, "took", time.Since(start).Round(time.Microsecond))
	return a.handOver(e)
}

// handOver tells the proxy, if there is one, of a workload that has a name. Until
// then its callers wait in the kernel: nothing is answered for somebody unknown.
//
// One that cannot be described is not handed over, and no longer served under an
// older description: its error is its own trouble. Other errors mean that the
// proxy is gone; it will be back.
func (a *Agent) handOver(e *entry) error {
	if a.proxy == nil || e.workload.ID == "" {
		return nil
	}
	var err error
	if e.handed {
		err = a.proxy.Update(e.id, e.workload)
	} else {
		err = a.proxy.Attach(e.handover())
	}
	if errors.Is(err, handover.ErrTooLarge) && e.handed {
		a.proxy.Detach(e.id)
	}
	e.handed = err == nil
	return err
}

// name is what a workload is called in messages.
func (e *entry) name() string { return nameOf(e.workload, keyOf(e.ns.ID())) }

func nameOf(w workload.Workload, k Key) string {
	return cmp.Or(string(w.ID), fmt.Sprintf("net:[%d]", k.Inode))
}

// detach leaves the namespace as it was, and gives back its handle. The entry is
// gone whatever happens: what could not be undone is reported.
func (a *Agent) detach(k Key) (*netns.Handle, error) {
	e := a.held[k]
	delete(a.held, k)
	err := a.Redirector.Detach(e.ns, e.att)
	if a.proxy != nil && e.handed {
		a.proxy.Detach(e.id)
	}
	e.att.Close()
	a.Log.Info("detached", "workload", e.workload.ID, "netns", e.ns.ID(), "attachment", e.id)
	return e.ns, err
}

// repair puts back what somebody has removed inside the namespaces.
func (a *Agent) repair() {
	for _, e := range a.held {
		switch repaired, err := a.Redirector.Ensure(e.ns, e.att); {
		case err != nil:
			a.Log.Warn("look into namespace", "workload", e.workload.ID, "error", err)
		case repaired:
			a.Log.Warn("rules were removed from inside the namespace: put back", "workload", e.workload.ID)
		}
	}
}

// noteOne logs a trouble that is not of a reconcile, and forgets none.
func (a *Agent) noteOne(id string, err error) {
	if err != nil {
		a.Log.Warn("workload not handed over", "workload", id, "error", err)
	}
}

// note logs each trouble once, for as long as it lasts.
func (a *Agent) note(trouble map[string]error) {
	last := make(map[string]bool, len(trouble))
	for id, err := range trouble {
		if err == nil {
			continue
		}
		text := id + ": " + err.Error()
		last[text] = true
		if !a.noted[text] {
			switch {
			case errors.Is(err, discover.ErrOptedOut):
				a.Log.Info("workload opted out: it gets no metadata", "workload", id, "why", err)
			case errors.Is(err, discover.ErrHostNetwork):
				a.Log.Warn("workload is the host: not steered, not guarded", "workload", id, "why", err)
			case errors.Is(err, handover.ErrTooLarge):
				a.Log.Warn("workload not handed over: it gets no metadata until its labels are fewer", "workload", id, "error", err)
			default:
				a.Log.Warn("workload not attached: tried again", "workload", id, "error", err)
			}
		}
	}
	a.noted = last
}

func (e *entry) handover() *handover.Attachment {
	return &handover.Attachment{
		ID: e.id, Netns: e.ns.ID(), Method: string(e.att.Method), Workload: e.workload,
		V4: e.att.V4, V6: e.att.V6, Link: e.att.Link,
	}
}

// adopt takes over what a proxy holds, after checking every descriptor against
// the kernel: nothing that the proxy says is believed. It returns the ids that
// the proxy goes on holding.
func (a *Agent) adopt(said []*handover.Attachment) map[uint64]bool {
	kept := make(map[uint64]bool)
	var first error
	for _, h := range said {
		if err := a.adoptOne(h); err != nil {
			first = cmp.Or(first, fmt.Errorf("attachment %d, %v: %w", h.ID, h.Netns, err))
			h.Discard()
			continue
		}
		kept[h.ID] = true
	}
	if refused := len(said) - len(kept); refused > 0 {
		a.Log.Warn("not adopted", "attachments", refused, "first", first)
	}
	return kept
}

func (a *Agent) adoptOne(h *handover.Attachment) error {
	ns, err := namespaceOf(h)
	if err != nil {
		return err
	}
	k := keyOf(ns.ID())
	if e := a.held[k]; e != nil {
		ns.Close()
		if e.id != h.ID {
			return fmt.Errorf("namespace has a newer attachment: %d", e.id)
		}
		h.Discard() // copies of our own
		return nil
	}
	att := &redirect.Attachment{Netns: ns.ID(), Method: redirect.Method(h.Method), V4: h.V4, V6: h.V6, Link: h.Link}
	err = a.Redirector.Verify(ns, att)
	if err == nil && a.byID(h.ID) != nil {
		err = errors.New("another attachment has this id")
	}
	if err != nil {
		ns.Close()
		return err
	}
	// Who it is comes from the source, never from the proxy: reconcile sets it and
	// puts back what is missing, or detaches it.
	a.held[k] = &entry{id: h.ID, ns: ns, att: att, unsure: true}
	return nil
}

// namespaceOf finds the namespace by the listener itself.
func namespaceOf(h *handover.Attachment) (*netns.Handle, error) {
	rc, err := h.V4.SyscallConn()
	if err != nil {
		return nil, err
	}
	var ns *netns.Handle
	var kerr error
	if err := rc.Control(func(fd uintptr) { ns, kerr = netns.OfSocket(int(fd)) }); err != nil {
		return nil, err
	}
	return ns, kerr
}
