package main

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"imdsgate/internal/agent"
	"imdsgate/internal/bpf"
	"imdsgate/internal/handover"
	"imdsgate/internal/redirect"
	"imdsgate/internal/route"
)

// guardInterval is how often the guard is looked at, beside what the kernel tells.
const guardInterval = 10 * time.Second

const defaultSocket = "/run/imdsgate/agent.sock"

type agentFlags struct {
	socket, workloads, method, upstream, fence string
	docker, onlyLabelled                       bool
	dockerHost, proc                           string
	netnsDirs, guardHost                       []string
	guard                                      string
	uninstall                                  bool
	proxyUID                                   int
	interval                                   time.Duration
	logJSON                                    bool
}

func agentCmd(e *env) *cobra.Command {
	var f agentFlags
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Steer containers' metadata calls to the proxy (root, on the host)",
		Long: `agent opens a listener inside the network namespace of every workload, steers
169.254.169.254:80 to it, and hands it to the proxy over a unix socket. It also
opens the proxy's connections to the metadata service, so that the proxy needs no
network.

Workloads are all containers of a Docker engine (--docker), or those on a list
(--workloads), or both. With Docker, a container is steered before its first
instruction. A container opts out with the label imdsgate.enable=false; with
--only-labelled, only those with imdsgate.enable=true are steered. Containers that
share a network namespace are one workload.

The agent needs root: CAP_NET_ADMIN, CAP_SYS_ADMIN and, for the method sklookup,
CAP_BPF and Linux 5.17; with Docker also CAP_SYS_PTRACE and the host's process
namespace. It parses nothing that containers send.

A guard (nftables, and a program on the uplink) drops what containers send to the
metadata service by any other way. Processes of the host are not affected unless
--guard-host says who of them may pass.

When it stops, everything stays in place: the proxy goes on serving, the guard
stands, and the next agent takes over. --uninstall takes everything back. SIGHUP
reads the list of workloads again.

The list:
  workloads:
    - name: web               # unique
      netns: /run/netns/web   # or pid: 4711
      labels: {team: shop}    # optional, as are
      image: registry.example/shop/web:3
      digest: sha256:...      # of the image
      pod: {namespace: shop, service-account: web, labels: {app: web}}`,
		Example: `  imdsgate agent --docker
  imdsgate agent --docker --only-labelled
  imdsgate agent --workloads workloads.yaml
  imdsgate agent --workloads workloads.yaml --method nftables --socket /run/imdsgate/agent.sock
  imdsgate agent --docker --guard-host uid:0 --guard-host cgroup:/system.slice/azure.service
  imdsgate agent --uninstall`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return runAgent(e, f) },
	}
	fl := cmd.Flags()
	fl.BoolVar(&f.docker, "docker", false, "steer the containers of the Docker engine on this host")
	fl.StringVar(&f.dockerHost, "docker-host", "", "the engine's socket (default: DOCKER_HOST, or unix:///var/run/docker.sock)")
	fl.StringArrayVar(&f.netnsDirs, "netns-dir", nil, "folder where the engine mounts network namespaces (repeatable; default /run/docker/netns)")
	fl.StringVar(&f.proc, "proc", "/proc", "where the host's processes are seen, for an agent in a container without the host's pid namespace")
	fl.BoolVar(&f.onlyLabelled, "only-labelled", false, "steer only containers with the label imdsgate.enable=true")
	fl.StringVar(&f.workloads, "workloads", "", "file with a list of workloads")
	fl.StringVar(&f.socket, "socket", defaultSocket, "unix socket where the proxy connects")
	fl.StringVar(&f.method, "method", "auto", "capture method: auto, sklookup or nftables")
	fl.StringVar(&f.upstream, "upstream", defaultUpstream, "the metadata service, as this host reaches it")
	fl.StringVar(&f.fence, "fence", "require", "fence around handed-over sockets: require, or off")
	fl.StringVar(&f.guard, "guard", "require", "guard against ways around the gate: require, table (do without the program on the uplink where it cannot be had), or off")
	fl.StringArrayVar(&f.guardHost, "guard-host", nil, "processes of the host that may call the service, others may not: uid:NUMBER or cgroup:/PATH (repeatable)")
	fl.BoolVar(&f.uninstall, "uninstall", false, "take back everything, also what a dead agent has left, and end")
	fl.IntVar(&f.proxyUID, "proxy-uid", 65534, "user id that the proxy runs as; nobody else but the agent's own may connect")
	fl.DurationVar(&f.interval, "reconcile", 2*time.Second, "time between looks at processes and namespaces")
	fl.BoolVar(&f.logJSON, "log-json", false, "log JSON lines instead of text")
	return cmd
}

func (f *agentFlags) check() error {
	switch {
	case f.workloads == "" && !f.docker && !f.uninstall:
		return withHint(usageError("agent: whose calls? give --docker, or --workloads, or both"), "see 'imdsgate agent --help'")
	case !f.docker && !f.uninstall && (f.dockerHost != "" || f.onlyLabelled || len(f.netnsDirs) > 0):
		return usageError("--docker-host, --netns-dir and --only-labelled need --docker")
	case f.guard != "require" && f.guard != "table" && f.guard != "off":
		return usageError("--guard %q: want require, table or off", f.guard)
	case f.guard == "off" && len(f.guardHost) > 0:
		return usageError("--guard-host needs the guard")
	case f.fence != "require" && f.fence != "off":
		return usageError("--fence %q: want require or off", f.fence)
	case f.method != "auto" && f.method != "sklookup" && f.method != "nftables":
		return usageError("--method %q: want auto, sklookup or nftables", f.method)
	case f.interval < 10*time.Millisecond:
		return usageError("--reconcile %v: want at least 10ms", f.interval)
	case f.proxyUID < 0:
		return usageError("--proxy-uid %d: want a user id", f.proxyUID)
	}
	return nil
}

func runAgent(e *env, f agentFlags) error {
	_, upstream, err := upstreamURL(f.upstream)
	if err != nil {
		return err
	}
	if err := f.check(); err != nil {
		return err
	}
	host, err := hostRules(f.guardHost)
	if err != nil {
		return err
	}
	log := newLogger(e.stderr, f.logJSON)
	if f.uninstall {
		return uninstall(e, f, log)
	}
	src, err := newAgentSource(e, f, log)
	if err != nil {
		return err
	}
	r, err := redirect.New(redirect.Method(f.method))
	if err != nil {
		return captureError("agent", err)
	}
	for _, why := range r.Why() {
		log.Info("better method not in use", "why", why)
	}
	l, err := openSocket(f)
	if err != nil {
		return err
	}
	lower, err := raiseFence(f, upstream, log)
	if err != nil {
		l.Close()
		return err
	}
	defer lower()
	guard, err := raiseGuard(f, host, log)
	if err != nil {
		l.Close()
		return err
	}
	a := &agent.Agent{
		Socket: l, Redirector: r, Sources: src.out, Interval: f.interval, Log: log,
		Dial: dialer(upstream, log), Upstream: upstream,
		Ready: func(n int) {
			log.Info("ready", "attached", n, "method", r.Method(), "socket", f.socket, "upstream", upstream, "pid", os.Getpid())
		},
	}
	// Nobody gets past from here on. The rest may have to wait for an engine that
	// waits for us: a service manager starts it after this.
	notifyReady(e.getenv)
	g, ctx := errgroup.WithContext(e.ctx)
	if guard != nil {
		defer guard.close()
		g.Go(func() error { return guard.Run(ctx, guardInterval) })
	}
	g.Go(func() error { return src.run(ctx) })
	g.Go(func() error { return a.Run(ctx) })
	return g.Wait()
}

// raiseFence returns what takes the fence's cgroup away at the end.
func raiseFence(f agentFlags, upstream netip.AddrPort, log *slog.Logger) (lower func(), err error) {
	if f.fence == "off" {
		log.Warn("no fence: a compromised proxy could reach into the containers' own loopback")
		return func() {}, nil
	}
	fence, err := agent.RaiseFence(fenceName(f.socket), upstream)
	hint := "--fence=off runs without it: a compromised proxy could then reach into the containers' own loopback"
	if errors.Is(err, agent.ErrNoCgroup) {
		hint = "in a container, mount the host's /sys/fs/cgroup (deploy/docker/compose.cgroup1.yaml, stack.cgroup1.yaml); " + hint
	}
	if err != nil {
		return nil, withHint(unsupported("fence: %v", err), hint)
	}
	return func() { fence.Close() }, nil
}

// dialer opens connections to the one address, from this process's namespace, if
// that still leads out of this machine. They end with a reset: whoever leaves first
// keeps no port of the host busy.
func dialer(to netip.AddrPort, log *slog.Logger) func(context.Context) (net.Conn, error) {
	d := &net.Dialer{Timeout: 5 * time.Second}
	d.SetMultipathTCP(false)
	var warned atomic.Bool
	return func(ctx context.Context) (net.Conn, error) {
		if err := route.Check(to.Addr()); err != nil {
			if !warned.Swap(true) {
				log.Error("the metadata service is not asked: somebody else would answer", "error", err)
			}
			return nil, err
		}
		warned.Store(false)
		c, err := d.DialContext(ctx, "tcp", to.String())
		if err != nil {
			return nil, err
		}
		return c, c.(*net.TCPConn).SetLinger(0)
	}
}

// captureError is for a method that this machine cannot have; what is the command
// that wanted it.
func captureError(what string, err error) error {
	hint := "try another --method"
	switch {
	case errors.Is(err, os.ErrPermission):
		// Memory is not what is missing: the BPF library guesses at it whenever it may not.
		err = errors.New(strings.ReplaceAll(err.Error(), " (MEMLOCK may be too low, consider rlimit.RemoveMemlock)", ""))
		hint = "run the " + what + " as root (CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_BPF)"
	case errors.Is(err, bpf.ErrNotSupported):
		hint = "--method=auto picks what this kernel can; sklookup needs Linux 5.17, nftables needs the module nft_tproxy"
	}
	return withHint(unsupported("capture: %v", err), hint)
}

// openSocket opens the agent's socket. Its usual folder is made, since that is gone
// at every boot; another one is somebody's, and a path that is mistyped makes none.
func openSocket(f agentFlags) (*handover.Listener, error) {
	if f.socket == defaultSocket {
		if err := os.MkdirAll(filepath.Dir(defaultSocket), 0o755); err != nil {
			return nil, socketError(f.socket, err)
		}
	}
	l, err := handover.Listen(f.socket, f.proxyUID)
	if err != nil {
		return nil, socketError(f.socket, err)
	}
	return l, nil
}

func socketError(path string, err error) error {
	var used *handover.InUseError
	switch {
	case errors.As(err, &used):
		return withHint(fmt.Errorf("--socket: %w", err), "stop that agent first, or give this one another --socket")
	case errors.Is(err, os.ErrNotExist):
		return missingFolder("--socket", path)
	case errors.Is(err, os.ErrPermission):
		return withHint(unsupported("--socket: %v", err), "run the agent as root, or give it a --socket in a folder it may write to")
	}
	return withHint(fmt.Errorf("--socket: %w", err), "give another path with --socket")
}

// fenceName is the agent's cgroup: agents with different sockets do not meet.
func fenceName(socket string) string {
	if abs, err := filepath.Abs(socket); err == nil {
		socket = abs
	}
	h := fnv.New32a()
	h.Write([]byte(socket))
	return fmt.Sprintf("imdsgate-%08x", h.Sum32())
}
