package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"imdsgate/internal/agent"
	"imdsgate/internal/bpf"
	"imdsgate/internal/discover"
	"imdsgate/internal/netns"
	"imdsgate/internal/redirect"
)

// hostRules reads --guard-host: uid:NUMBER and cgroup:PATH. Nothing given means
// that processes of the host are not the guard's business.
func hostRules(who []string) (*redirect.HostRules, error) {
	if len(who) == 0 {
		return nil, nil
	}
	if agent.PrivateCgroups() {
		return nil, withHint(unsupported("--guard-host: this process has a cgroup namespace of its own, and cannot tell processes of the host by their cgroups"),
			"run the agent in the host's cgroup namespace (cgroup: host, in compose), or on the host")
	}
	r := &redirect.HostRules{}
	for _, w := range who {
		kind, value, _ := strings.Cut(w, ":")
		switch kind {
		case "uid":
			n, err := strconv.ParseUint(value, 10, 32)
			if err != nil {
				return nil, usageError("--guard-host %q: want uid:NUMBER", w)
			}
			r.UIDs = append(r.UIDs, uint32(n))
		case "cgroup":
			if !strings.HasPrefix(value, "/") {
				return nil, usageError("--guard-host %q: want cgroup:/PATH, as in /proc/PID/cgroup", w)
			}
			dir, err := agent.CgroupDir(value)
			if err != nil {
				return nil, unsupported("--guard-host %q: %v", w, err)
			}
			r.Cgroups = append(r.Cgroups, dir)
		default:
			return nil, withHint(usageError("--guard-host %q: want uid:NUMBER or cgroup:/PATH", w), "the agent itself may always pass")
		}
	}
	return r, nil
}

// guard is the raised guard and the handle of the namespace it stands in.
type guard struct {
	*redirect.Guard
	host *netns.Handle
}

// raiseGuard raises the guard, or returns nil when it is off.
func raiseGuard(f agentFlags, host *redirect.HostRules, log *slog.Logger) (*guard, error) {
	if f.guard == "off" {
		log.Warn("no guard: a container can go around the gate, by a device or by other rules of its own")
		return nil, nil
	}
	ns, err := netns.Current()
	if err != nil {
		return nil, err
	}
	rules := redirect.AzureGuardRules()
	rules.Host = host
	if host != nil {
		if host.Agent, err = agent.OwnCgroup(); err != nil {
			ns.Close()
			return nil, withHint(unsupported("--guard-host: %v", err), "run without it: processes of the host then pass")
		}
	}
	g, err := redirect.NewGuard(ns, rules, log)
	if err != nil {
		ns.Close()
		return nil, err
	}
	err = g.Apply()
	lacking := errors.Is(err, bpf.ErrNotSupported) || errors.Is(err, os.ErrPermission)
	st := g.Status()
	switch {
	case err == nil:
	case lacking && f.guard == "table" && st.Table != "":
		log.Warn("the guard has no program on the uplink: macvlan containers can go around it", "why", st.NoHook)
	default:
		g.Close()
		ns.Close()
		return nil, guardError(err, lacking)
	}
	log.Info("guard", "table", st.Table, "hook", st.Hook, "cookie", st.Cookie, "devices", st.Devices)
	return &guard{g, ns}, nil
}

func guardError(err error, lacking bool) error {
	switch {
	case errors.Is(err, redirect.ErrGuardOwned):
		return withHint(fmt.Errorf("guard: %w", err), "stop the other agent on this host, or run this one with --guard=off")
	case lacking:
		return withHint(unsupported("guard: %v", err),
			"--guard=table does without the program on the uplink, --guard=off without any: containers can then go around the gate. What could be raised stands: --uninstall takes it away")
	}
	return fmt.Errorf("guard: %w", err)
}

func (g *guard) close() {
	g.Close()
	g.host.Close()
}

// uninstall takes everything back: the guard first, since that tells whether another
// agent lives on this host, then what a proxy still holds, what is left in the
// network namespaces of containers, the fence's cgroup, the socket. What fails does
// not keep the rest from being done.
func uninstall(e *env, f agentFlags, log *slog.Logger) error {
	paths, err := sweepPaths(f)
	if err != nil {
		return err
	}
	r, err := redirect.New(redirect.Method(f.method))
	if err != nil {
		return captureError("agent", err)
	}
	l, err := openSocket(f)
	if err != nil {
		return err
	}
	if err := removeGuard(log); err != nil {
		l.Close()
		return err
	}
	ctx, done := context.WithCancel(e.ctx)
	defer done()
	sources := make(chan agent.Source, 1)
	sources <- nothing{}
	a := &agent.Agent{Socket: l, Redirector: r, Sources: sources, Dial: dialNothing, Log: log, Ready: func(int) { done() }}
	errs := []error{a.Run(ctx)}
	swept, err := agent.Sweep(r, paths)
	errs = append(errs, err, agent.RemoveFence(fenceName(f.socket)), removeIfThere(f.socket), removeIfThere(f.socket+".lock"))
	log.Info("uninstalled", "namespaces_looked_at", swept)
	return errors.Join(errs...)
}

func removeGuard(log *slog.Logger) error {
	host, err := netns.Current()
	if err != nil {
		return err
	}
	defer host.Close()
	g, err := redirect.NewGuard(host, redirect.AzureGuardRules(), log)
	if err != nil {
		return err
	}
	defer g.Close()
	switch err := g.Remove(); {
	case errors.Is(err, redirect.ErrGuardOwned):
		return withHint(fmt.Errorf("guard: %w: nothing was taken back", err),
			"an agent is running on this host, with another --socket: stop it first, and give its --socket")
	case errors.Is(err, os.ErrPermission):
		return withHint(unsupported("guard: %v", err), "run it as root")
	default:
		return err
	}
}

// sweepPaths lists the namespaces that an agent with these flags may have steered:
// those on the list, and those in the folders, by default the usual ones.
func sweepPaths(f agentFlags) ([]string, error) {
	var paths []string
	dirs := f.netnsDirs
	if len(dirs) == 0 {
		dirs = []string{"/run/docker/netns", "/run/netns"}
	}
	for _, dir := range dirs {
		more, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			return nil, usageError("--netns-dir: %v", err)
		}
		paths = append(paths, more...)
	}
	if f.workloads == "" {
		return paths, nil
	}
	list, err := readWorkloads(f.workloads)
	if err != nil {
		return nil, err
	}
	found, _ := list.Find()
	for _, w := range found {
		paths = append(paths, w.Netns)
	}
	return paths, nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// nothing is a source that wants nothing steered.
type nothing struct{}

func (nothing) Find() ([]discover.Found, []discover.Missing) { return nil, nil }
func (nothing) Changed() <-chan struct{}                     { return nil }

func dialNothing(context.Context) (net.Conn, error) {
	return nil, errors.New("the agent is being uninstalled")
}
