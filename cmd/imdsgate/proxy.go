//go:build !forwardonly

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"imdsgate/internal/gate"
	"imdsgate/internal/imds"
	"imdsgate/internal/status"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

type proxyFlags struct {
	agent, listen, upstream, policy, control string
	controlAsked                             bool
	audit                                    auditSpec
	hosts                                    []string
	limits                                   gate.Limits
	answers                                  answerFlags
	ensureRoute                              bool
	plan                                     routePlan
	logJSON                                  bool
}

func proxyCmd(e *env) *cobra.Command {
	var f proxyFlags
	cmd := &cobra.Command{
		Use:   "proxy",
		Short: "Answer containers' metadata calls (no privilege needed)",
		Long: `proxy answers metadata requests: it knows who is asking, decides, asks the
metadata service, and writes one JSON line for each request.

With --agent (the default) it gets its listeners, and its connections to the
metadata service, from the agent: it needs no network, no capability and no
particular user. With --listen it listens and dials by itself; callers are then
known by their address only.

The policy says which container may do what: see 'imdsgate policy --help'. What it
does not allow is denied. Without one, facts about the VM and its events may be
read, and nothing that is a secret. The file is read again when it has changed, and
at SIGHUP; one that is wrong changes nothing, and is in the log. While there has
been no good one everything is denied, and the proxy is not ready.`,
		Example: `  imdsgate proxy --agent /run/imdsgate/agent.sock --policy policy.yaml
  imdsgate proxy --listen :80 --audit /var/log/imdsgate.jsonl
  imdsgate proxy --listen :80 --ensure-route`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			byAgent, byHand := cmd.Flags().Changed("agent"), cmd.Flags().Changed("listen")
			switch {
			case byAgent && byHand:
				return withHint(usageError("--agent and --listen exclude each other"), "give --agent only, unless this proxy is to listen and dial by itself")
			case byAgent && f.agent == "":
				return usageError("--agent: want the path of the agent's socket")
			case f.ensureRoute && !byHand:
				return withHint(usageError("--ensure-route is for --listen: with an agent the proxy needs no network"), "leave it out, or add --listen :80")
			case cmd.Flags().Changed("policy") && f.policy == "":
				return withHint(usageError("--policy: want a file, got nothing"), "leave it out for the built-in policy")
			case byHand && f.answers.ahead:
				return withHint(usageError("--prefetch is for an agent's containers: nobody is announced to --listen"), "leave it out")
			case byHand && f.listen == "":
				return usageError("--listen: want an address, like :80")
			}
			f.controlAsked = cmd.Flags().Changed("control")
			if f.plan.asked() {
				return f.plan.show(e.stdout, f)
			}
			return runProxy(e, f)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.agent, "agent", "/run/imdsgate/agent.sock", "unix socket of the agent")
	fl.StringVar(&f.listen, "listen", "", "listen on this address, like :80, without an agent")
	fl.BoolVar(&f.ensureRoute, "ensure-route", false, "with --listen: keep a host route to the service by the default gateway (CAP_NET_ADMIN)")
	f.plan.flags(fl)
	fl.StringVar(&f.upstream, "upstream", defaultUpstream, "the metadata service; the agent's must be the same")
	fl.StringVar(&f.policy, "policy", "", "policy file (default: facts may be read, secrets may not)")
	fl.StringVar(&f.control, "control", controlSocket, "unix socket for 'imdsgate policy explain' and the like, for this user and root; unless it is given, only where its folder is there")
	f.audit.flags(fl)
	fl.StringArrayVar(&f.hosts, "host", nil, "further value of Host to accept, beside the service's addresses (repeatable)")
	fl.IntVar(&f.limits.Conns, "max-connections", 256, "connections of one workload at the same time")
	fl.IntVar(&f.limits.InFlight, "max-in-flight", 64, "requests of one workload to the service at the same time")
	fl.DurationVar(&f.limits.HeaderTime, "header-time", 5*time.Second, "time for a request's header to arrive")
	fl.DurationVar(&f.limits.IdleTime, "idle-time", 2*time.Minute, "time a connection is kept for its next request")
	fl.DurationVar(&f.limits.DrainTime, "drain-time", 8*time.Second, "time for requests in flight at the end")
	f.answers.add(fl)
	fl.BoolVar(&f.logJSON, "log-json", false, "log JSON lines instead of text")
	return cmd
}

func (f *proxyFlags) check() error {
	for _, n := range []struct {
		name string
		ok   bool
	}{
		{"--max-connections", f.limits.Conns > 0}, {"--max-in-flight", f.limits.InFlight > 0},
		{"--header-time", f.limits.HeaderTime > 0}, {"--idle-time", f.limits.IdleTime > 0}, {"--drain-time", f.limits.DrainTime > 0},
	} {
		if !n.ok {
			return usageError("%s: want more than zero", n.name)
		}
	}
	for _, h := range f.hosts {
		if !hostValue.MatchString(h) {
			return withHint(usageError("--host %q: no value that a header Host can have", h), "give a name or an address, with a port if clients send one: --host imds.internal:8080")
		}
	}
	return nil
}

// hostValue is a name, an IPv4 address or one of IPv6 in brackets, and a port.
var hostValue = regexp.MustCompile(`^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$`)

// actionTable lists the actions for the help, a line for each family.
func actionTable() string {
	var b strings.Builder
	family := ""
	for _, a := range imds.Actions() {
		name, _, _ := strings.Cut(string(a), ".")
		switch {
		case a == imds.Unknown:
			b.WriteString("\n  unknown (every other endpoint; deny only)")
		case name == family:
			b.WriteString(" " + string(a))
		default:
			b.WriteString("\n  " + string(a))
		}
		family = name
	}
	return b.String()[1:]
}

func runProxy(e *env, f proxyFlags) error {
	u, addr, err := upstreamURL(f.upstream)
	if err != nil {
		return err
	}
	if err := f.check(); err != nil {
		return err
	}
	client := &upstream.Client{Host: u.Host}
	defer client.CloseIdle()
	source, end, err := f.answers.source(client)
	if err != nil {
		return err
	}
	defer end()
	if e.harden != nil {
		if err := e.harden(); err != nil {
			return fmt.Errorf("give up privileges: %w", err)
		}
	}
	outliveReaders()
	log := newLogger(e.stderr, f.logJSON)
	sink, record, err := openAuditSink(f.audit, e.stdout, log)
	if err != nil {
		return err
	}
	defer record.Close()
	rules := followPolicy(f.policy, log)
	g := &gate.Gate{
		Cloud: imds.Azure, Hosts: f.hosts, Directory: &workload.Directory{}, Policy: rules.current, Source: source,
		Audit: sink, Log: log, Limits: f.limits,
	}
	control := &control{path: f.control, asked: f.controlAsked, log: log,
		handler: status.Handler{Cloud: g.Cloud, Policy: g.Policy, Directory: g.Directory, Ready: rules.isReady.Load}}
	besides, stop := context.WithCancel(e.ctx)
	defer control.wait()
	defer stop()
	if err := control.start(besides); err != nil {
		return err
	}
	// Nobody waits for it: a file may be where reading takes for ever.
	go rules.run(besides)
	switch {
	case f.ensureRoute:
		err = withRoute(e.ctx, addr.Addr(), log, func(ctx context.Context) error { return serveListen(ctx, f, g, rules, log) })
	case f.listen != "":
		err = serveListen(e.ctx, f, g, rules, log)
	default:
		err = serveAgent(e, f, addr, g, client, rules, log)
	}
	return errors.Join(err, drain(g, f))
}

// drain lets the requests in flight end, for as long as they may take.
func drain(g *gate.Gate, f proxyFlags) error {
	ctx, cancel := context.WithTimeout(context.Background(), f.limits.DrainTime)
	defer cancel()
	if err := g.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil // those that did not end were cut
}

// serveListen is the proxy by hand: one listener of its own.
func serveListen(ctx context.Context, f proxyFlags, g *gate.Gate, rules *policyFile, log *slog.Logger) error {
	l, err := listenOn(ctx, "--listen", f.listen, ":8080")
	if err != nil {
		return err
	}
	go rules.whenReady(ctx, func() {
		log.Info("ready", "listen", l.Addr().String(), "upstream", f.upstream, "proof", workload.Address)
	})
	return g.Serve(ctx, gate.Listener{Listener: l, Method: "listen", Proof: workload.Address})
}
