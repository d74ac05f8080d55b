package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"imdsgate/internal/audit"
	"imdsgate/internal/netns"
	"imdsgate/internal/redirect"
	"imdsgate/internal/testnet"
)

const (
	instanceURL = "http://169.254.169.254/metadata/instance?api-version=2021-02-01"
	tokenURL    = "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://management.azure.com/"
)

type demoFlags struct {
	json, keep bool
	method     string
}

func demoCmd(e *env) *cobra.Command {
	var f demoFlags
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See all of it work on this machine, in network namespaces",
		Long: `demo builds a small cloud out of network namespaces: a metadata service
(simulated), a VM, and two containers on its bridge. It starts the agent on the
VM and the unprivileged proxy, and has a client in each container call
http://169.254.169.254, unchanged. It shows what each asked, what it was told and
why, and who it was taken for; then it kills the proxy and shows that a waiting
call is answered when the proxy is back.

Nothing leaves the namespaces, and nothing is left behind. As an ordinary user it
runs in a user namespace, with the method nftables.`,
		Example: `  imdsgate demo
  imdsgate demo --json
  imdsgate demo --keep     then enter a container and try for yourself`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return runDemo(e, f) },
	}
	fl := cmd.Flags()
	fl.BoolVar(&f.json, "json", false, "print one JSON object instead of text")
	fl.BoolVar(&f.keep, "keep", false, "leave it all up until Ctrl-C, and say how to enter a container")
	fl.StringVar(&f.method, "method", "auto", "capture method: auto, sklookup or nftables")
	return cmd
}

const demoNeeds = "run it as root, or allow namespaces: user.max_user_namespaces=1000, user.max_net_namespaces=1000, " +
	"and where they exist kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0 (sysctl)"

// inUserNamespace marks the second execution of a demo without root.
const inUserNamespace = "IMDSGATE_DEMO_USERNS"

func runDemo(e *env, f demoFlags) error {
	if f.method != "auto" && f.method != "sklookup" && f.method != "nftables" {
		return usageError("--method %q: want auto, sklookup or nftables", f.method)
	}
	ns, err := netns.New()
	if err == nil {
		ns.Close()
		return playDemo(e, f)
	}
	if e.getenv(inUserNamespace) != "" {
		return withHint(unsupported("demo: no network namespace, not even in a user namespace of its own: %v", err), demoNeeds)
	}
	return demoInUserNamespace(e, err)
}

// demoInUserNamespace runs the same command line again in a user namespace of its
// own, where it may make network namespaces; here it may not, for the reason why.
func demoInUserNamespace(e *env, why error) error {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inUserNamespace+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = e.stdin, e.stdout, e.stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		Pdeathsig:   syscall.SIGTERM,
	}
	if err := cmd.Start(); err != nil {
		return withHint(unsupported("demo: neither a network namespace (%v) nor a user namespace (%v)", why, err), demoNeeds)
	}
	// Ctrl-C reaches the child by itself; it cleans up and ends.
	go func() { <-e.ctx.Done(); cmd.Process.Signal(syscall.SIGTERM) }()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return &codedError{code: max(exit.ExitCode(), exitFailure), silent: true, err: err}
	}
	return err
}

// demo is the stage and what has happened on it.
type demo struct {
	e      *env
	f      demoFlags
	out    *demoOutput
	stack  *testnet.Stack
	web    *testnet.Container
	batch  *testnet.Container
	method redirect.Method
	fence  string
	guard  string
	app    *testnet.Process
	audits int // output lines of the proxy that were read
	result demoResult
}

// demoResult is the JSON object. Its names are an interface.
type demoResult struct {
	OK       bool         `json:"ok"`
	Method   string       `json:"method"`
	Fence    bool         `json:"fence"`
	Clients  []demoClient `json:"clients"`
	Proxy    demoProxy    `json:"proxy"`
	Restart  demoRestart  `json:"restart"`
	Upstream []string     `json:"upstream_saw"` // source addresses that the service saw
	TookMS   int64        `json:"took_ms"`
	Error    string       `json:"error,omitempty"`
}

type demoClient struct {
	Name     string      `json:"name"`
	Method   string      `json:"method"`   // of capture
	Proof    string      `json:"proof"`    // what the evidence is worth
	Status   int         `json:"status"`   // of the instance document
	Workload string      `json:"workload"` // who it was taken for
	Peer     string      `json:"peer"`     // getpeername, as the client saw it
	Socket   string      `json:"socket"`   // what kind of socket the client has
	Asked    []demoAsked `json:"asked"`
	OwnPort  string      `json:"own_port_80,omitempty"` // what answers on its own port 80
}

type demoAsked struct {
	Target   string  `json:"target"`
	Status   int     `json:"status"`
	Decision string  `json:"decision"`
	Rule     string  `json:"rule"`
	Reason   string  `json:"reason"`
	Identity string  `json:"identity,omitempty"` // that the gate chose for the caller
	Told     string  `json:"told"`               // the start of the answer, or what it is; never a token
	TookMS   float64 `json:"took_ms"`
}

type demoProxy struct {
	PID          int    `json:"pid"`
	UID          string `json:"uid"`          // as the host sees it
	Capabilities string `json:"capabilities"` // CapEff, as the kernel prints it
	NoNewPrivs   bool   `json:"no_new_privs"`
}

type demoRestart struct {
	Status   int     `json:"status"`
	WaitedMS float64 `json:"waited_ms"`
}

// playDemo runs the whole demo and cleans up after it, whatever happens.
func playDemo(e *env, f demoFlags) (err error) {
	start := time.Now()
	d := &demo{e: e, f: f, out: newDemoOutput(e, f.json)}
	defer func() {
		if p := recover(); p != nil {
			d.close()
			panic(p)
		}
	}()
	defer d.close()
	ctx, cancel := context.WithTimeout(e.ctx, time.Minute)
	defer cancel()
	err = d.play(ctx)
	var coded *codedError
	if errors.As(err, &coded) && coded.code != exitFailure {
		return err
	}
	d.result.OK, d.result.TookMS = err == nil, time.Since(start).Milliseconds()
	switch {
	case err != nil && e.ctx.Err() != nil:
		d.close() // the last line says that it is done
		d.result.Error = errInterrupted.Error()
	case err != nil:
		d.result.Error = err.Error()
	}
	if werr := d.out.end(d.result); werr != nil {
		return werr
	}
	if err != nil {
		return &codedError{code: exitFailure, silent: true, err: err}
	}
	if f.keep {
		d.keep(e.ctx)
	}
	return nil
}

// errInterrupted is the outcome of a demo that a signal has ended.
var errInterrupted = errors.New("interrupted, everything is taken down")

func (d *demo) close() {
	if d.stack != nil {
		d.stack.Close()
		d.stack = nil
	}
}

// play is the sequence of scenes.
func (d *demo) play(ctx context.Context) error {
	for _, scene := range []func(context.Context) error{d.choose, d.build, d.start, d.call, d.ownPort, d.inspectProxy, d.restart, d.upstream} {
		if err := scene(ctx); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// choose finds out what this machine can.
func (d *demo) choose(context.Context) error {
	r, err := redirect.New(redirect.Method(d.f.method))
	if err != nil {
		return captureError("demo", err)
	}
	d.method, d.fence, d.guard = r.Method(), "off", "table"
	why := ""
	if d.method == redirect.SkLookup {
		d.fence, d.guard = "require", "require" // what can load one program can load the others
	} else {
		why = strings.Join(r.Why(), "; ")
		if _, err := redirect.New(redirect.SkLookup); errors.Is(err, os.ErrPermission) {
			why = "sklookup needs root (CAP_BPF)"
		}
	}
	d.result.Method, d.result.Fence = string(d.method), d.fence == "require"
	d.out.intro(d.method, why, d.fence == "require")
	return nil
}

func (d *demo) build(context.Context) (err error) {
	start := time.Now()
	if d.stack, err = testnet.NewStack("/proc/self/exe"); err != nil {
		return err
	}
	if d.web, err = d.stack.NewContainer("web"); err != nil {
		return err
	}
	if d.batch, err = d.stack.NewContainer("batch"); err != nil {
		return err
	}
	d.out.built(time.Since(start))
	return nil
}

func (d *demo) start(ctx context.Context) (err error) {
	start := time.Now()
	if err := d.stack.StartSim(ctx); err != nil {
		return err
	}
	// One app is there before the gate.
	if d.app, err = d.stack.Spawn(d.web.NS, "app", exec.Command("/proc/self/exe", "demo-part", "app", "--name", "web")); err != nil {
		return err
	}
	if _, err := d.app.Await(ctx, 0, func(line string) bool { return line == "ready" }); err != nil {
		return err
	}
	n, err := d.stack.StartAgent(ctx, "--method", string(d.method), "--fence", d.fence, "--guard", d.guard)
	if err != nil {
		return err
	}
	if n != 2 {
		return fmt.Errorf("agent attached %d containers, want 2", n)
	}
	if err := d.startProxy(ctx); err != nil {
		return err
	}
	d.out.started(d.stack, time.Since(start))
	return nil
}

// demoPolicy gives one of the two containers an identity.
const demoPolicy = `allow: [versions.read, instance.read]
rules:
  - name: web has an identity
    match: {name: web, proof: listener}
    allow: [identity.token]
    resource: https://management.azure.com
    identity: {client_id: c1c10000-0000-0000-0000-000000000001}
`

func (d *demo) startProxy(ctx context.Context) error {
	path := filepath.Join(d.stack.Dir, "policy.yaml")
	if err := os.WriteFile(path, []byte(demoPolicy), 0o644); err != nil {
		return err
	}
	return d.stack.StartProxy(ctx, "--policy", path)
}

// ask runs the client in a container.
func (d *demo) ask(ctx context.Context, c *testnet.Container, args ...string) ([]answer, error) {
	cmd := exec.Command("/proc/self/exe", append([]string{"demo-part", "client"}, args...)...)
	p, err := testnet.Spawn(c.NS, "client in "+c.Name, cmd)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, p.Kill)
	defer stop()
	if err := p.Wait(); err != nil {
		return nil, fmt.Errorf("client in %s: %w: %s", c.Name, err, p.Output())
	}
	var as []answer
	for _, line := range p.Lines() {
		var a answer
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			return nil, fmt.Errorf("client in %s: %w: %s", c.Name, err, line)
		}
		as = append(as, a)
	}
	return as, nil
}

// events waits for the proxy's next n audit lines. They may come in another order
// than the answers; their connections tell which request was the first.
func (d *demo) events(ctx context.Context, n int) ([]audit.Event, error) {
	evs := make([]audit.Event, n)
	for i := range evs {
		at, err := d.stack.Proxy.Await(ctx, d.audits, func(line string) bool {
			evs[i] = audit.Event{}
			return strings.Contains(line, `"decision"`) && json.Unmarshal([]byte(line), &evs[i]) == nil
		})
		if err != nil {
			return nil, err
		}
		d.audits = at + 1
	}
	slices.SortFunc(evs, func(a, b audit.Event) int { return cmp.Compare(a.Conn, b.Conn) })
	return evs, nil
}

// call has both clients ask for a fact and for a secret.
func (d *demo) call(ctx context.Context) error {
	for _, x := range []struct {
		c      *testnet.Container
		socket string
		flags  []string
	}{
		{d.web, "IPv4, beside an app on 0.0.0.0:80", nil},
		{d.batch, "IPv6, IPv4-mapped", []string{"--mapped"}},
	} {
		as, err := d.ask(ctx, x.c, append(x.flags, instanceURL, tokenURL)...)
		if err != nil {
			return err
		}
		evs, err := d.events(ctx, len(as))
		if err != nil {
			return err
		}
		cl := demoClient{
			Name: x.c.Name, Socket: x.socket, Status: as[0].Status, Peer: as[0].Peer,
			Method: evs[0].Method, Proof: evs[0].Proof.String(), Workload: string(evs[0].Workload),
		}
		for i, a := range as {
			cl.Asked = append(cl.Asked, demoAsked{
				Target: evs[i].Target, Status: a.Status, Decision: string(evs[i].Decision), Rule: evs[i].Rule, Reason: evs[i].Reason, Identity: evs[i].Identity,
				Told: excerpt(a), TookMS: a.Took,
			})
		}
		d.result.Clients = append(d.result.Clients, cl)
		d.out.client(cl)
		if err := cl.check(d.method); err != nil {
			return err
		}
	}
	return nil
}

// check holds what the demo claims.
func (c *demoClient) check(m redirect.Method) error {
	switch {
	case c.Status != 200:
		return fmt.Errorf("%s: instance document: status %d, want 200", c.Name, c.Status)
	case c.Workload != "static:"+c.Name:
		return fmt.Errorf("%s: was taken for %q", c.Name, c.Workload)
	case c.Peer != redirect.IMDS4.String():
		return fmt.Errorf("%s: saw peer %s, want %s", c.Name, c.Peer, redirect.IMDS4)
	case c.Method != string(m) || c.Proof != "listener":
		return fmt.Errorf("%s: method %s, proof %s, want %s, listener", c.Name, c.Method, c.Proof, m)
	}
	want := demoAsked{Status: 403, Decision: "deny"}
	if c.Name == "web" {
		want = demoAsked{Status: 200, Decision: "allow", Identity: "client_id=c1c10000-0000-0000-0000-000000000001"}
	}
	if got := c.Asked[1]; got.Status != want.Status || got.Decision != want.Decision || got.Identity != want.Identity {
		return fmt.Errorf("%s: token: status %d, %s, identity %q, want %d, %s, %q", c.Name, got.Status, got.Decision, got.Identity, want.Status, want.Decision, want.Identity)
	}
	return nil
}

// excerpt is the part of an answer that shows what it is.
func excerpt(a answer) string {
	if a.Error != "" {
		return a.Error
	}
	var doc struct {
		Compute  struct{ Name, Location, VMSize string }
		Token    string `json:"access_token"`
		ClientID string `json:"client_id"`
	}
	err := json.Unmarshal([]byte(a.Body), &doc)
	switch {
	case err == nil && a.Status == 200 && doc.Compute.Name != "":
		return fmt.Sprintf("vm %s, %s, in %s", doc.Compute.Name, doc.Compute.VMSize, doc.Compute.Location)
	case err == nil && doc.Token != "":
		return fmt.Sprintf("a token of the managed identity with client_id %s", doc.ClientID)
	}
	return a.Body
}

// ownPort shows that the app's own port 80 is the app's.
func (d *demo) ownPort(ctx context.Context) error {
	as, err := d.ask(ctx, d.web, "http://127.0.0.1/")
	if err != nil {
		return err
	}
	from, err := d.ask(ctx, d.batch, "http://"+netip.AddrPortFrom(d.web.Addr4, 80).String()+"/")
	if err != nil {
		return err
	}
	const want = "the own app of web\n"
	if as[0].Body != want || from[0].Body != want {
		return fmt.Errorf("port 80 of web: got %q from inside, %q from batch, want %q", as[0].Body, from[0].Body, want)
	}
	d.result.Clients[0].OwnPort = strings.TrimSpace(want)
	d.out.ownPort(strings.TrimSpace(want))
	return nil
}

// inspectProxy reads what the kernel says of the proxy.
func (d *demo) inspectProxy(context.Context) error {
	p, err := readProxy(d.stack.Proxy.PID())
	if err != nil {
		return err
	}
	d.result.Proxy = p
	d.out.proxy(p)
	if strings.Trim(p.Capabilities, "0") != "" || p.UID == "0" || !p.NoNewPrivs {
		return fmt.Errorf("proxy has privileges: uid %s, capabilities %s, no_new_privs %v", p.UID, p.Capabilities, p.NoNewPrivs)
	}
	return nil
}

func readProxy(pid int) (demoProxy, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return demoProxy{}, err
	}
	p := demoProxy{PID: pid}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		fields := strings.Fields(value)
		switch name {
		case "Uid":
			p.UID = testnet.OutsideUID(fields[1])
		case "CapEff":
			p.Capabilities = fields[0]
		case "NoNewPrivs":
			p.NoNewPrivs = fields[0] == "1"
		}
	}
	return p, nil
}

// restart kills the proxy and has a client wait for the next one.
func (d *demo) restart(ctx context.Context) error {
	d.stack.Proxy.Kill()
	type result struct {
		as  []answer
		err error
	}
	waiting := make(chan result, 1)
	go func() {
		as, err := d.ask(ctx, d.web, instanceURL)
		waiting <- result{as, err}
	}()
	select {
	case r := <-waiting:
		return fmt.Errorf("a call was answered while there was no proxy: %v, %v", r.as, r.err)
	case <-time.After(300 * time.Millisecond):
	case <-ctx.Done():
		return ctx.Err()
	}
	d.audits = 0
	if err := d.startProxy(ctx); err != nil {
		return err
	}
	r := <-waiting
	if r.err != nil {
		return r.err
	}
	if _, err := d.events(ctx, 1); err != nil {
		return err
	}
	d.result.Restart = demoRestart{Status: r.as[0].Status, WaitedMS: r.as[0].Took}
	d.out.restart(d.result.Restart)
	if r.as[0].Status != 200 {
		return fmt.Errorf("the waiting call got status %d (%s)", r.as[0].Status, r.as[0].Error)
	}
	return nil
}

// upstream asks the simulator who called it.
func (d *demo) upstream(ctx context.Context) error {
	seen, err := d.stack.History(ctx)
	if err != nil {
		return err
	}
	from := make(map[string]bool)
	for _, s := range seen {
		ap, err := netip.ParseAddrPort(s.Peer)
		if err != nil {
			return err
		}
		if a := ap.Addr().String(); !from[a] {
			from[a] = true
			d.result.Upstream = append(d.result.Upstream, a)
		}
	}
	d.out.upstream(len(seen), d.result.Upstream)
	if len(d.result.Upstream) != 1 || d.result.Upstream[0] != d.stack.VM.Addr4.String() {
		return fmt.Errorf("the service saw %v, want only the VM's %v", d.result.Upstream, d.stack.VM.Addr4)
	}
	return nil
}
