//go:build !forwardonly

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"imdsgate/internal/agent"
	"imdsgate/internal/discover"
	"imdsgate/internal/redirect"
)

type agentFlags struct {
	docker, uninstall, dryRun, logJSON bool
	engine, label, proxy               string
	by, image, exe, guard, listen, sid string
	port                               uint16
}

func agentCmd(e *env) *cobra.Command {
	var f agentFlags
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Give every labelled container its way to the proxy",
		Long: `agent runs on the host, watches the Docker engine, and leads the metadata calls of
each running container with the label to the proxy container, whose address it
follows. What is led how:

  --by exec        forward is started inside the container, as ContainerAdministrator
  --by sidecar     a container of --image runs forward in the container's network
  --by l4wfpproxy  an HNS policy on the container's endpoint leads calls to a side-car
                   without privilege; Server 2022, process isolation
  --by l4proxy     an HNS policy leads calls to the proxy; l2bridge and overlay
                   networks only, and no process in the container

The guard, --guard switch (l2bridge, overlay) or host (nat), drops by an HNS rule
what a container sends to the service itself. It and the policies are off unless
they are asked for.

The proxy knows its callers by their address only. Containers with Hyper-V
isolation share their network with nobody, and take no files while they run: run
forward in them yourself. When the agent ends, everything stays as it is, and the
next one goes on with it; --uninstall takes it back.
` + honesty,
		Example: `  imdsgate agent --docker --dry-run
  imdsgate agent --docker --by sidecar --image imdsgate
  imdsgate service install --start -- agent --docker
  imdsgate agent --docker --by sidecar --image imdsgate --uninstall`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return runAgent(e, f) },
	}
	fl := cmd.Flags()
	fl.BoolVar(&f.docker, "docker", false, "lead the containers of a Docker engine")
	fl.StringVar(&f.engine, "engine", "", `address of the engine (default: DOCKER_HOST, else npipe:////./pipe/docker_engine)`)
	fl.StringVar(&f.label, "label", "imdsgate.enable=true", "label of the containers to lead, KEY or KEY=VALUE")
	fl.StringVar(&f.proxy, "proxy-label", "MSIProxyContainer", "label of the proxy container, KEY or KEY=VALUE")
	fl.Uint16Var(&f.port, "proxy-port", 80, "port that the proxy listens on")
	fl.StringVar(&f.by, "by", string(agent.ByExec), "how: exec, sidecar, l4wfpproxy or l4proxy")
	fl.StringVar(&f.image, "image", "imdsgate", "image of side-cars, with imdsgate.exe as its entrypoint's program")
	fl.StringVar(&f.exe, "exe", "", "with --by exec: the program that is put into containers (default: this one)")
	fl.StringVar(&f.guard, "guard", "off", "drop direct calls by an HNS rule: off, switch or host")
	fl.StringVar(&f.listen, "listen", "127.0.0.1:15080", "with --by l4wfpproxy: where the side-car listens")
	fl.StringVar(&f.sid, "user-sid", "", "with --by l4wfpproxy: SID of the side-car's user, whose own calls pass")
	fl.BoolVar(&f.uninstall, "uninstall", false, "take back what an agent with the same flags has done, and end")
	fl.BoolVar(&f.dryRun, "dry-run", false, "look, and print what would be done; change nothing")
	fl.BoolVar(&f.logJSON, "log-json", false, "log JSON lines instead of text")
	return cmd
}

func (f *agentFlags) check() error {
	switch by := agent.By(f.by); {
	case !f.docker:
		return usageError("agent: whose calls? give --docker")
	case by != agent.ByExec && by != agent.BySidecar && by != agent.ByWFPProxy && by != agent.ByL4Proxy:
		return usageError("--by %q: want exec, sidecar, l4wfpproxy or l4proxy", f.by)
	case f.guard != "off" && f.guard != "switch" && f.guard != "host":
		return usageError("--guard %q: want off, switch or host", f.guard)
	case f.label == "" || f.proxy == "":
		return usageError("--label, --proxy-label: want a text")
	case f.port == 0:
		return usageError("--proxy-port: want more than zero")
	case !validListen(f.listen):
		return usageError("--listen %q: want an IP address and a port, as in 127.0.0.1:15080", f.listen)
	}
	return nil
}

// ruleTypes are the guard's, in HNS's words.
var ruleTypes = map[string]string{"switch": "Switch", "host": "Host"}

func runAgent(e *env, f agentFlags) error {
	if err := f.check(); err != nil {
		return err
	}
	fw, err := f.forwards(e)
	if err != nil {
		return err
	}
	switch {
	case f.dryRun:
		lines, err := fw.Plan(e.ctx, f.uninstall)
		if err != nil {
			return agentError(err)
		}
		return printPlan(e.stdout, lines)
	case f.uninstall:
		if err := fw.Undo(e.ctx); err != nil {
			return agentError(err)
		}
		_, err := fmt.Fprintln(e.stdout, "agent: side-cars and policies are removed; forwards were told to end")
		return err
	}
	if _, err := fw.Clients.Look(e.ctx); err != nil { // no engine, no agent
		return agentError(err)
	}
	fw.Log.Info("ready", "by", f.by, "label", f.label, "guard", f.guard)
	return agentError(fw.Run(e.ctx))
}

// forwards is the agent's work, of flags that were checked.
func (f *agentFlags) forwards(e *env) (*agent.Forwards, error) {
	by := agent.By(f.by)
	fw := &agent.Forwards{
		Clients: &discover.Clients{Host: f.engine, Label: f.label, Proxy: f.proxy, Root: `C:\`, User: "ContainerAdministrator", Isolation: "process"},
		By:      by, Service: ours4, Port: f.port, Image: f.image, Side: []string{"imdsgate.exe"},
		Listen: netip.MustParseAddrPort(f.listen), SID: f.sid, Guard: ruleTypes[f.guard], Log: newLogger(e.stderr, f.logJSON),
	}
	if by == agent.ByWFPProxy {
		fw.Clients = &discover.Clients{Host: f.engine, Label: f.label, Proxy: f.proxy, Root: `C:\`, User: "ContainerUser", Isolation: "process"}
	}
	if by == agent.ByExec && !f.dryRun {
		var err error
		if fw.Exe, err = readProgram(f.exe); err != nil {
			return nil, withHint(usageError("--exe: %v", err), "give the path of imdsgate.exe, or of the small one that only forwards")
		}
	}
	if !f.dryRun && (fw.Guard != "" || by == agent.ByWFPProxy || by == agent.ByL4Proxy) {
		hns, err := redirect.OpenEndpoints()
		if err != nil {
			return nil, agentError(err)
		}
		fw.HNS = hns
	}
	return fw, nil
}

func readProgram(path string) ([]byte, error) {
	if path == "" {
		var err error
		if path, err = os.Executable(); err != nil {
			return nil, err
		}
	}
	return os.ReadFile(path)
}

func agentError(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled):
		return nil
	case errors.Is(err, errors.ErrUnsupported):
		return withHint(unsupported("agent: %v", err), "HNS comes with the feature Containers; --by exec or sidecar with --guard off do without")
	case errors.Is(err, agent.ErrNoAddress):
		return withHint(fmt.Errorf("agent: %w", err), "connect it to its network again and repeat this, or remove the container: its policies go with it")
	case errors.Is(err, redirect.ErrNoEffect):
		return withHint(fmt.Errorf("agent: %w", err), "'hnsdiag list endpoints -df' shows what HNS has; it may not know this policy, or this type of rule on this kind of network")
	case errors.Is(err, redirect.ErrNoEndpoint), errors.Is(err, redirect.ErrEndpoints):
		return withHint(fmt.Errorf("agent: %w", err), "'hnsdiag list endpoints -df' shows the endpoints: the address has to be on one, and on no other network of this host")
	case errors.Is(err, os.ErrPermission), strings.Contains(err.Error(), "Access is denied"):
		return withHint(unsupported("agent: %v", err), "run it as an administrator")
	}
	return withHint(fmt.Errorf("agent: %w", err), "see whether the Docker engine runs; --engine or DOCKER_HOST say where")
}
