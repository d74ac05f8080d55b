package testnet

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"imdsgate/internal/netns"
)

// Stack is everything that runs for one VM, as real processes: the simulator in
// the fabric, the agent on the VM, the unprivileged proxy in an empty network
// namespace, and containers.
type Stack struct {
	Binary string // of imdsgate
	Dir    string // for socket and files; others may pass through it
	Fabric *Fabric
	VM     *VM

	Sim, Agent, Proxy *Process
	containers        []*Container

	mu        sync.Mutex
	processes []*Process
}

// NewStack makes the namespaces and a folder, and starts nothing.
func NewStack(binary string) (*Stack, error) {
	dir, err := os.MkdirTemp("", "imdsgate-stack-")
	if err != nil {
		return nil, err
	}
	s := &Stack{Binary: binary, Dir: dir}
	if err := os.Chmod(dir, 0o711); err != nil {
		s.Close()
		return nil, err
	}
	if s.Fabric, err = NewFabric(); err != nil {
		s.Close()
		return nil, err
	}
	if s.VM, err = s.Fabric.NewVM(); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Close ends all processes, the agent last but for the simulator, and lets go of
// the namespaces.
func (s *Stack) Close() {
	for i := len(s.processes) - 1; i >= 0; i-- {
		s.processes[i].Stop()
	}
	for _, c := range s.containers {
		c.Close()
	}
	if s.VM != nil {
		s.VM.Close()
	}
	if s.Fabric != nil {
		s.Fabric.Close()
	}
	RemoveEmptyCgroups()
	os.RemoveAll(s.Dir)
}

// NewContainer adds a container.
func (s *Stack) NewContainer(name string) (*Container, error) {
	c, err := s.VM.NewContainer(name)
	if err == nil {
		s.containers = append(s.containers, c)
	}
	return c, err
}

// NewBareContainer adds a container that has nothing but a loopback, as with
// Docker's network mode none. There can be thousands of them.
func (s *Stack) NewBareContainer(name string) (*Container, error) {
	ns, err := newNetns()
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", name, err)
	}
	c := &Container{Name: name, NS: ns}
	s.containers = append(s.containers, c)
	return c, nil
}

// Spawn starts the binary in a namespace; it ends with the stack.
func (s *Stack) Spawn(ns *netns.Handle, name string, cmd *exec.Cmd) (*Process, error) {
	p, err := Spawn(ns, name, cmd)
	if err == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.processes = append(s.processes, p)
	}
	return p, err
}

// StartSim starts the simulator at the real address, with its management API on
// the fabric's loopback.
func (s *Stack) StartSim(ctx context.Context, args ...string) error {
	args = append([]string{"simulate", "--listen", IMDS4 + ":80", "--manage", "127.0.0.1:8170", "--json"}, args...)
	var err error
	if s.Sim, err = s.Spawn(s.Fabric.NS, "simulator", exec.Command(s.Binary, args...)); err != nil {
		return err
	}
	_, err = s.Sim.Await(ctx, 0, func(line string) bool { return strings.HasPrefix(line, `{"ready":true`) })
	return err
}

// Socket is where agent and proxy meet.
func (s *Stack) Socket() string { return filepath.Join(s.Dir, "agent.sock") }

// WriteWorkloads writes the agent's list: every container under its name.
func (s *Stack) WriteWorkloads() (string, error) {
	var b strings.Builder
	b.WriteString("workloads:\n")
	for _, c := range s.containers {
		fmt.Fprintf(&b, "  - {name: %s, netns: %s}\n", c.Name, c.NS.Path())
	}
	path := filepath.Join(s.Dir, "workloads.yaml")
	return path, os.WriteFile(path, []byte(b.String()), 0o600)
}

// StartAgent starts the agent for all containers there are, if any, and waits
// until it is ready.
func (s *Stack) StartAgent(ctx context.Context, args ...string) (attached int, err error) {
	args = append([]string{"agent", "--socket", s.Socket(), "--log-json"}, args...)
	if len(s.containers) > 0 {
		list, err := s.WriteWorkloads()
		if err != nil {
			return 0, err
		}
		args = append(args, "--workloads", list)
	}
	if !mapped(nobody) {
		args = append(args, "--proxy-uid", "0") // as this user namespace sees it
	}
	if s.Agent, err = s.Spawn(s.VM.NS, "agent", exec.Command(s.Binary, args...)); err != nil {
		return 0, err
	}
	fields, err := s.Agent.AwaitLog(ctx, "ready")
	if err != nil {
		return 0, err
	}
	n, _ := fields["attached"].(float64)
	return int(n), nil
}

// StartProxy starts the proxy, unprivileged and without network, and waits until
// it has its listeners.
func (s *Stack) StartProxy(ctx context.Context, args ...string) error {
	cmd := s.ProxyCommand(args...)
	cmd.SysProcAttr = Unprivileged()
	return s.StartProxyAs(ctx, cmd)
}

// ProxyCommand is the command line of the proxy.
func (s *Stack) ProxyCommand(args ...string) *exec.Cmd {
	return exec.Command(s.Binary, append([]string{"proxy", "--agent", s.Socket(), "--log-json"}, args...)...)
}

// StartProxyAs starts the proxy with a command that ends in ProxyCommand's.
func (s *Stack) StartProxyAs(ctx context.Context, cmd *exec.Cmd) error {
	var err error
	if s.Proxy, err = s.Spawn(s.VM.NS, "proxy", cmd); err != nil {
		return err
	}
	_, err = s.Proxy.AwaitLog(ctx, "ready")
	return err
}

// Seen is a request as the simulator saw it.
type Seen struct {
	Method string `json:"method"`
	Target string `json:"target"`
	Status int    `json:"status"`
	Peer   string `json:"peer"`
}

// History asks the simulator what it was asked.
func (s *Stack) History(ctx context.Context) ([]Seen, error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return Dial(ctx, s.Fabric.NS, network, address)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:8170/history", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var seen []Seen
	return seen, json.NewDecoder(resp.Body).Decode(&seen)
}
