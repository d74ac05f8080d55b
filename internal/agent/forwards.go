package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"imdsgate/internal/discover"
	"imdsgate/internal/redirect"
)

// By is how a client's calls come to the proxy, where no agent can lead them from
// outside: Windows.
type By string

// The ways.
const (
	ByExec     By = "exec"       // a forward that is started in the client
	BySidecar  By = "sidecar"    // a forward in a container that shares the client's network
	ByWFPProxy By = "l4wfpproxy" // an HNS policy, and a side-car without privilege that it leads to
	ByL4Proxy  By = "l4proxy"    // an HNS policy alone
)

// hands are *discover.Clients.
type hands interface {
	Look(context.Context) (discover.Sight, error)
	Follow(ctx context.Context, look func(context.Context) error, failed func(error)) error
	Path(name string) string
	Put(ctx context.Context, id string, files map[string][]byte) error
	Exec(ctx context.Context, id string, argv []string) (exec string, err error)
	Ended(ctx context.Context, exec string) (ended bool, code int, err error)
	AddSidecar(ctx context.Context, c discover.Client, image string, argv []string, files map[string][]byte) (id string, err error)
	StartSidecar(ctx context.Context, id string) error
	RemoveSidecar(ctx context.Context, id string) error
}

// policies are *redirect.Endpoints.
type policies interface {
	Apply(netip.Addr, []redirect.Policy) (changed bool, err error)
	Remove(netip.Addr, []redirect.Policy) error
}

// Forwards gives every labelled container of an engine its way to the proxy, and
// keeps it: it follows the proxy's address, and starts again what has ended. What
// it has made stays when it ends, and the next one goes on with it.
type Forwards struct {
	Clients hands
	HNS     policies // nil if no policy is asked for

	By      By
	Service netip.AddrPort // that clients call
	Port    uint16         // of the proxy
	Image   string         // of side-cars
	Exe     []byte         // the program, which is put into clients; ByExec
	Side    []string       // program in the side-car's image, and its first arguments
	Listen  netip.AddrPort // of the side-car; ByWFPProxy
	SID     string         // of the side-car's user, whose own calls the policy lets through; ByWFPProxy
	Guard   string         // rule type of the ACL against direct calls: Switch or Host; empty is no guard
	Log     *slog.Logger

	state map[string]*given // by client id
}

// given is what a client was given, as far as this process knows.
type given struct {
	exec string     // of its forward
	next time.Time  // not before is another one started
	told netip.Addr // the proxy's address, that its forward knows
	addr netip.Addr // the address that policies were given to
	why  string     // that was logged last
}

// The files in Folder.
const (
	exeFile = "imdsgate.exe"
	envFile = "proxy.env"
	endFile = "end"
)

// execAgain is until a forward that has ended at once is started again. One that
// finds another in its place ends so: it may be of an agent before.
const execAgain = 30 * time.Second

// Run works until ctx is cancelled, and then returns nil.
func (f *Forwards) Run(ctx context.Context) error {
	f.state = make(map[string]*given)
	return f.Clients.Follow(ctx, f.once, func(err error) { f.Log.Warn("container engine", "error", err) })
}

// once brings everything into line with what there is now. Only an engine that
// does not answer is an error.
func (f *Forwards) once(ctx context.Context) error {
	s, err := f.Clients.Look(ctx)
	if err != nil {
		return err
	}
	if f.state == nil {
		f.state = make(map[string]*given)
	}
	there := make(map[string]bool)
	for _, c := range s.Clients {
		there[c.ID] = true
		f.report(c, f.client(ctx, c))
	}
	for id := range f.state {
		if !there[id] {
			delete(f.state, id) // its endpoint went with it
		}
	}
	for _, id := range s.Orphans {
		if err := f.Clients.RemoveSidecar(ctx, id); err != nil {
			f.Log.Warn("side-car not removed", "sidecar", id, "error", err)
		} else {
			f.Log.Info("side-car removed: its client is gone", "sidecar", id)
		}
	}
	return nil
}

func (f *Forwards) given(id string) *given {
	g := f.state[id]
	if g == nil {
		g = new(given)
		f.state[id] = g
	}
	return g
}

// client gives one client what it has not.
func (f *Forwards) client(ctx context.Context, c discover.Client) error {
	if c.Why != nil {
		return fmt.Errorf("no proxy for it: %w", c.Why) // what it has stays
	}
	g := f.given(c.ID)
	if err := f.setPolicies(c, g); err != nil {
		return err
	}
	var err error
	switch f.By {
	case ByExec:
		err = f.execute(ctx, c, g)
	case BySidecar, ByWFPProxy:
		err = f.sidecar(ctx, c, g)
	}
	if err != nil {
		return err
	}
	if g.told != c.Proxy {
		f.Log.Info("led to the proxy", "client", c.Name, "by", string(f.By), "proxy", c.Proxy.String())
		g.told = c.Proxy
	}
	return nil
}

// report logs what is new.
func (f *Forwards) report(c discover.Client, err error) {
	g, why := f.given(c.ID), ""
	if err != nil {
		why = err.Error()
	}
	if why != g.why && why != "" {
		f.Log.Warn("not led to the proxy", "client", c.Name, "error", err)
	}
	g.why = why
}

// wanted are a client's policies, the guard first.
func (f *Forwards) wanted(c discover.Client) (ps []redirect.Policy) {
	if f.Guard != "" {
		ps = append(ps, redirect.BlockPolicy(f.Service, f.Guard))
	}
	switch f.By {
	case ByWFPProxy:
		ps = append(ps, redirect.WFPProxyPolicy(f.Service, f.Listen.Port(), f.SID))
	case ByL4Proxy:
		ps = append(ps, redirect.ProxyPolicy(f.Service, netip.AddrPortFrom(c.Proxy, f.Port)))
	}
	return ps
}

// setPolicies sees that a client has the policies that are wanted. The guard is the
// same at each look, and stays. Where the client is led by another of its addresses
// now, the one before is cleared afterwards; if it is not the client's any more, its
// endpoint is gone, or another container's.
func (f *Forwards) setPolicies(c discover.Client, g *given) error {
	want := f.wanted(c)
	if len(want) == 0 {
		return nil
	}
	changed, err := f.HNS.Apply(c.Addr, want)
	if changed {
		f.Log.Info("policies", "client", c.Name, "endpoint", c.Addr.String(), "policies", len(want))
	}
	if err != nil {
		return err
	}
	if g.addr != c.Addr && slices.Contains(c.Addrs, g.addr) {
		if err := f.HNS.Remove(g.addr, want); err != nil {
			return err
		}
	}
	g.addr = c.Addr
	return nil
}

func env(proxy netip.AddrPort) []byte {
	return []byte("IMSProxyIpAddress=" + proxy.String() + "\n")
}

// arguments are forward's, behind the program.
func (f *Forwards) arguments() []string {
	args := []string{"forward", "--env-file", f.Clients.Path(envFile)}
	switch f.By {
	case ByExec:
		args = append(args, "--end-file", f.Clients.Path(endFile))
	case ByWFPProxy:
		args = append(args, "--listen", f.Listen.String())
	}
	return args
}

// execute has a forward run in the client.
func (f *Forwards) execute(ctx context.Context, c discover.Client, g *given) error {
	if g.exec != "" {
		ended, code, err := f.Clients.Ended(ctx, g.exec)
		if err != nil {
			return err
		}
		if !ended {
			return f.tell(ctx, c, g, c.ID)
		}
		g.exec, g.next = "", time.Now().Add(execAgain)
		f.Log.Warn("forward has ended in the client; another may have been there before", "client", c.Name, "code", code)
	}
	if err := f.tell(ctx, c, g, c.ID); err != nil || time.Now().Before(g.next) {
		return err
	}
	if err := f.Clients.Put(ctx, c.ID, map[string][]byte{exeFile: f.Exe}); err != nil {
		f.Log.Debug("program not put into the client: one may run there", "client", c.Name, "error", err)
	}
	exec, err := f.Clients.Exec(ctx, c.ID, append([]string{f.Clients.Path(exeFile)}, f.arguments()...))
	if err != nil {
		g.next = time.Now().Add(execAgain)
		return err
	}
	g.exec = exec
	return nil
}

// tell writes the proxy's address where a forward follows it.
func (f *Forwards) tell(ctx context.Context, c discover.Client, g *given, where string) error {
	if g.told == c.Proxy {
		return nil
	}
	return f.Clients.Put(ctx, where, map[string][]byte{envFile: env(netip.AddrPortFrom(c.Proxy, f.Port))})
}

// sidecar has a forward run beside the client.
func (f *Forwards) sidecar(ctx context.Context, c discover.Client, g *given) error {
	if c.SideOld {
		if err := f.Clients.RemoveSidecar(ctx, c.Sidecar); err != nil {
			return err
		}
		f.Log.Info("side-car removed: its client has started again", "client", c.Name)
		c.Sidecar = ""
	}
	switch {
	case c.Sidecar == "":
		_, err := f.Clients.AddSidecar(ctx, c, f.Image, append(append([]string{}, f.Side...), f.arguments()...),
			map[string][]byte{envFile: env(netip.AddrPortFrom(c.Proxy, f.Port))})
		return err
	case !c.SideRuns:
		if err := f.tell(ctx, c, g, c.Sidecar); err != nil {
			return err
		}
		return f.Clients.StartSidecar(ctx, c.Sidecar)
	}
	return f.tell(ctx, c, g, c.Sidecar)
}
