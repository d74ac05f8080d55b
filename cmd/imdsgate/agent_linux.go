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
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"imdsgate/internal/agent"
	"imdsgate/internal/bpf"
	"imdsgate/internal/discover"
	"imdsgate/internal/handover"
	"imdsgate/internal/redirect"
)

const defaultSocket = "/run/imdsgate/agent.sock"

type agentFlags struct {
	socket, workloads, method, upstream, fence string
	proxyUID                                   int
	interval                                   time.Duration
	logJSON                                    bool
}

func agentCmd(e *env) *cobra.Command {
	var f agentFlags
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Steer containers' metadata calls to the proxy (root, on the host)",
		Long: `agent opens a listener inside the network namespace of every workload on the
list, steers 169.254.169.254:80 to it, and hands it to the proxy over a unix
socket. It also opens the proxy's connections to the metadata service, so that
the proxy needs no network.

The agent needs root: CAP_NET_ADMIN, CAP_SYS_ADMIN and, for the method sklookup,
CAP_BPF and Linux 5.17. It parses nothing that containers send.

When it stops, everything stays in place: the proxy goes on serving, and the
next agent takes over. SIGHUP reads the list of workloads again.

The list:
  workloads:
    - name: web               # unique
      netns: /run/netns/web   # or pid: 4711
      labels: {team: shop}    # optional`,
		Example: `  imdsgate agent --workloads workloads.yaml
  imdsgate agent --workloads workloads.yaml --method nftables --socket /run/imdsgate/agent.sock`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return runAgent(e, f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.workloads, "workloads", "", "file with the list of workloads (required)")
	fl.StringVar(&f.socket, "socket", defaultSocket, "unix socket where the proxy connects")
	fl.StringVar(&f.method, "method", "auto", "capture method: auto, sklookup or nftables")
	fl.StringVar(&f.upstream, "upstream", defaultUpstream, "the metadata service, as this host reaches it")
	fl.StringVar(&f.fence, "fence", "require", "fence around handed-over sockets: require, or off")
	fl.IntVar(&f.proxyUID, "proxy-uid", 65534, "user id that the proxy runs as; nobody else but the agent's own may connect")
	fl.DurationVar(&f.interval, "reconcile", 2*time.Second, "time between looks at the list's processes and namespaces")
	fl.BoolVar(&f.logJSON, "log-json", false, "log JSON lines instead of text")
	return cmd
}

func runAgent(e *env, f agentFlags) error {
	_, upstream, err := upstreamURL(f.upstream)
	if err != nil {
		return err
	}
	switch {
	case f.workloads == "":
		return withHint(usageError("agent: --workloads is missing"), "see 'imdsgate agent --help' for the form of the list")
	case f.fence != "require" && f.fence != "off":
		return usageError("--fence %q: want require or off", f.fence)
	case f.method != "auto" && f.method != "sklookup" && f.method != "nftables":
		return usageError("--method %q: want auto, sklookup or nftables", f.method)
	case f.interval < 10*time.Millisecond:
		return usageError("--reconcile %v: want at least 10ms", f.interval)
	case f.proxyUID < 0:
		return usageError("--proxy-uid %d: want a user id", f.proxyUID)
	}
	source, err := readWorkloads(f.workloads)
	if err != nil {
		return err
	}
	log := newLogger(e.stderr, f.logJSON)
	r, err := redirect.New(redirect.Method(f.method))
	if err != nil {
		return captureError(err)
	}
	for _, why := range r.Why() {
		log.Info("better method not in use", "why", why)
	}
	l, err := handover.Listen(f.socket, f.proxyUID)
	if err != nil {
		return socketError(err)
	}
	if f.fence == "require" {
		fence, err := agent.RaiseFence(fenceName(f.socket), upstream)
		if err != nil {
			l.Close()
			return withHint(unsupported("fence: %v", err),
				"--fence=off runs without it: a compromised proxy could then reach into the containers' own loopback")
		}
		defer fence.Close()
	} else {
		log.Warn("no fence: a compromised proxy could reach into the containers' own loopback")
	}
	sources := make(chan agent.Source, 1)
	sources <- source
	go reloadWorkloads(e.ctx, f.workloads, sources, log)
	a := &agent.Agent{
		Socket: l, Redirector: r, Sources: sources, Interval: f.interval, Log: log,
		Dial: dialer(upstream),
		Ready: func(n int) {
			log.Info("ready", "attached", n, "method", r.Method(), "socket", f.socket, "upstream", upstream, "pid", os.Getpid())
		},
	}
	return a.Run(e.ctx)
}

// dialer opens connections to the one address, from this process's namespace.
func dialer(to netip.AddrPort) func(context.Context) (net.Conn, error) {
	d := &net.Dialer{Timeout: 5 * time.Second}
	d.SetMultipathTCP(false)
	return func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", to.String()) }
}

func readWorkloads(path string) (*discover.Static, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, withHint(usageError("--workloads: %v", err), "give the file with the list of workloads; see 'imdsgate agent --help' for its form")
	}
	s, err := discover.ParseStatic(path, text)
	if err != nil {
		return nil, withHint(usageError("%v", err), "see 'imdsgate agent --help' for the form of the list")
	}
	return s, nil
}

// reloadWorkloads reads the list again at every SIGHUP. A bad list changes
// nothing.
func reloadWorkloads(ctx context.Context, path string, sources chan<- agent.Source, log *slog.Logger) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
		}
		s, err := readWorkloads(path)
		if err != nil {
			log.Error("list of workloads not read: the last good one stays", "error", err)
			continue
		}
		log.Info("list of workloads read again", "file", path)
		select {
		case sources <- s:
		case <-ctx.Done():
			return
		}
	}
}

func captureError(err error) error {
	hint := "try another --method"
	switch {
	case errors.Is(err, os.ErrPermission):
		hint = "run the agent as root (CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_BPF)"
	case errors.Is(err, bpf.ErrNotSupported):
		hint = "--method=auto picks what this kernel can; sklookup needs Linux 5.17, nftables needs the module nft_tproxy"
	}
	return withHint(unsupported("capture: %v", err), hint)
}

func socketError(err error) error {
	var used *handover.InUseError
	switch {
	case errors.As(err, &used):
		return withHint(fmt.Errorf("--socket: %w", err), "stop that agent first, or give this one another --socket")
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
