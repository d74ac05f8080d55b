package sim

import (
	"slices"
	"strings"
	"sync"
	"time"
)

// effects are what the faults do to one request.
type effects struct {
	latency  time.Duration
	status   int // 0 means none
	hang     bool
	reset    bool
	cut      bool
	down     bool
	partial  bool
	tokenTTL time.Duration // 0 means none
}

type activeFault struct {
	Fault
	route string    // the path in lower case
	until time.Time // zero: no end
}

// matches tells whether the fault is for a request. Faults of one endpoint are
// for that endpoint, whatever their path.
func (f *activeFault) matches(method, path string) bool {
	switch {
	case f.Partial && !within(path, instanceRoot), f.TokenTTL != 0 && path != tokenPath:
		return false
	default:
		return within(path, f.route) && (f.Method == "" || f.Method == method)
	}
}

type faultList struct {
	mu   sync.Mutex
	list []activeFault
}

func (l *faultList) set(faults []Fault, now time.Time) error {
	list := make([]activeFault, len(faults))
	for i, f := range faults {
		if err := f.check(); err != nil {
			return err
		}
		list[i] = activeFault{Fault: f, route: strings.ToLower(strings.TrimSuffix(f.Path, "/"))}
		if f.Gone > 0 {
			list[i].until = now.Add(f.Gone)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = list
	return nil
}

// get drops the faults whose time is over and returns the rest.
func (l *faultList) get(now time.Time) []Fault {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire(now)
	out := make([]Fault, len(l.list))
	for i, f := range l.list {
		out[i] = f.Fault
	}
	return out
}

func (l *faultList) expire(now time.Time) {
	l.list = slices.DeleteFunc(l.list, func(f activeFault) bool {
		return !f.until.IsZero() && !now.Before(f.until)
	})
}

// apply adds up the faults for a request, in their order, up to the first one
// that ends it, and counts them down. The path is in lower case.
func (l *faultList) apply(method, path string, now time.Time) effects {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire(now)
	var e effects
	for i := 0; i < len(l.list); i++ {
		f := &l.list[i]
		if !f.matches(method, path) {
			continue
		}
		ends := e.add(f.Fault)
		if f.Count > 0 {
			if f.Count--; f.Count == 0 {
				l.list = slices.Delete(l.list, i, i+1)
				i--
			}
		}
		if ends {
			break
		}
	}
	return e
}

// add puts one fault on top and reports whether it ends the request.
func (e *effects) add(f Fault) bool {
	e.latency += f.Latency
	e.partial = e.partial || f.Partial
	if f.TokenTTL != 0 {
		e.tokenTTL = f.TokenTTL
	}
	e.hang, e.reset, e.cut, e.down, e.status = f.Hang, f.Reset, f.Cut, f.Down, f.Status
	if f.Gone > 0 {
		e.status = 410
	}
	return e.hang || e.reset || e.cut || e.down || e.status != 0
}
