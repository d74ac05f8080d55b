package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"imdsgate/internal/audit"
	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// attackBench is a VM with a Docker engine, attackers in its containers, and a
// fabric where every packet is seen.
type attackBench struct {
	*engine
	sniffer *sniffer
	boxes   map[string]*box
	port    uint16          // last source port given away
	judged  map[uint16]bool // source ports whose packets may arrive, as their row says
}

// box is a container that does as it is told.
type box struct {
	name  string
	p     *testnet.Process
	tell  *os.File
	lines int // of its output that were read
	ns    *netns.Handle
	addr  netip.Addr
}

const evilImage = "imdsgate-evil"

// boxArgs are the containers. All have the capabilities that Docker gives to
// everybody, NET_RAW among them.
var boxArgs = map[string][]string{
	"web":       {},
	"admin":     {"--cap-add", "NET_ADMIN"},
	"neighbour": {"--sysctl", "net.ipv4.ip_forward=1"},
	"six":       {"--network", "six"},
	"macvlan":   {"--network", "uplink"},
	"late":      {},
}

func newAttackBench(t *testing.T) *attackBench {
	t.Helper()
	testnet.Require(t, testnet.Command("nft"), testnet.Command("iptables-save"))
	b := &attackBench{boxes: make(map[string]*box), port: firstPort, judged: make(map[uint16]bool)}
	t.Cleanup(func() {
		for _, x := range b.boxes {
			x.close()
		}
	})
	b.engine = newEngine(t)
	b.sniffer = startSniffer(t, b.Fabric.NS, "vm1")
	startAnswering(t, b.Fabric.NS)
	evil := filepath.Join(t.TempDir(), "evil")
	if err := testnet.BuildStatic(t.Context(), "testdata/evil", evil); err != nil {
		t.Fatal(err)
	}
	if err := b.docker.Image(t.Context(), evilImage, map[string]string{"/evil": evil}); err != nil {
		t.Fatal(err)
	}
	b.mustRun(t, "network", "create", "--ipv6", "--subnet", "fd00:29:1::/64", "six")
	b.mustRun(t, "network", "create", "-d", "macvlan", "-o", "parent=eth0", "--subnet", "10.88.1.0/24", "--gateway", "10.88.1.1", "--ip-range", "10.88.1.192/27", "uplink")
	if err := b.openTheHost(); err != nil {
		t.Fatal(err)
	}
	return b
}

// openTheHost takes away what keeps packets off by luck: the VM neither checks
// their sources nor minds its own address as one, and the fabric knows the way back
// to containers that are not masqueraded. What then stops an attack is the guard.
func (b *attackBench) openTheHost() error {
	err := b.VM.NS.Do(func() error {
		var errs []error
		for name, value := range map[string]string{"rp_filter": "0", "accept_local": "1"} {
			for _, device := range []string{"all", "docker0"} {
				errs = append(errs, testnet.Sysctl("net/ipv4/conf/"+device+"/"+name, value))
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return err
	}
	return b.Fabric.NS.Do(func() error {
		var errs []error
		for to, via := range map[string]string{"172.29.1.0/24": b.VM.Addr4.String(), "fd00:29:1::/64": b.VM.Addr6.String()} {
			_, dst, err := net.ParseCIDR(to)
			if err != nil {
				return err
			}
			errs = append(errs, netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(via)}))
		}
		return errors.Join(errs...)
	})
}

// box returns a container, started if need be.
func (b *attackBench) box(ctx context.Context, name string) (x *box, err error) {
	if b.boxes[name] == nil {
		b.boxes[name], err = b.startBox(ctx, name)
	}
	return b.boxes[name], err
}

func (b *attackBench) startBox(ctx context.Context, name string) (*box, error) {
	stdin, tell, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer stdin.Close()
	args := append([]string{"-H", b.docker.Host(), "run", "--pull=never", "-i", "--name", name}, boxArgs[name]...)
	cmd := exec.Command("docker", append(args, evilImage, "/evil", "serve")...)
	cmd.Stdin = stdin
	x := &box{name: name, tell: tell, lines: 1}
	if x.p, err = b.Spawn(b.VM.NS, name, cmd); err == nil {
		err = b.awaitBox(ctx, x)
	}
	if err != nil {
		x.close()
		return nil, err
	}
	return x, nil
}

// awaitBox waits for a container's first line.
func (b *attackBench) awaitBox(ctx context.Context, x *box) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if _, err := x.p.Await(ctx, 0, func(line string) bool { return line == "ready" }); err != nil {
		return err
	}
	return b.inspect(ctx, x)
}

func (b *attackBench) inspect(ctx context.Context, x *box) error {
	out, err := b.run(ctx, "inspect", "-f", "{{.State.Pid}} {{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", x.name)
	if err != nil {
		return err
	}
	var pid int
	var addr string
	if _, err := fmt.Sscan(out, &pid, &addr); err != nil {
		return fmt.Errorf("inspect %s: %w: %s", x.name, err, out)
	}
	if x.addr, err = netip.ParseAddr(addr); err != nil {
		return err
	}
	x.ns, err = netns.Open(netns.PIDPath(pid))
	return err
}

func (x *box) close() {
	x.tell.Close()
	if x.ns != nil {
		x.ns.Close()
	}
}

// remove ends a container.
func (b *attackBench) remove(ctx context.Context, x *box) error {
	_, err := b.run(ctx, "rm", "-f", x.name)
	x.close()
	delete(b.boxes, x.name)
	return err
}

// did is what the attacker says of an attack; see testdata/evil.
type did struct {
	Said, Error string
	Changed     int
}

// do tells a container what to do, and waits until it is done.
func (x *box) do(ctx context.Context, port uint16, command string) (d did, err error) {
	if _, err := fmt.Fprintf(x.tell, "-from %d -end %v %s\n", port, elsewhere, command); err != nil {
		return d, err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	x.lines, err = x.p.Await(ctx, x.lines, func(line string) bool { return json.Unmarshal([]byte(line), &d) == nil })
	x.lines++
	return d, err
}

// dropped is how many packets the devices below the container's own have refused:
// macvlan counts them there.
func (x *box) dropped() (n uint64, err error) {
	err = x.ns.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err == nil && l.Attrs().Statistics != nil {
			n = l.Attrs().Statistics.TxDropped
		}
		return err
	})
	return n, err
}

// host runs a program on the VM.
func (b *attackBench) host(stdin string, args ...string) (string, error) {
	var out bytes.Buffer
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
	err := testnet.Start(b.VM.NS, cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out.Bytes()))
	}
	return out.String(), err
}

// counters are the guard's, as anybody on the host can read them; none where there
// is no guard.
func (b *attackBench) counters() (map[string]uint64, error) {
	counts := make(map[string]uint64)
	out, err := b.host("", "nft", "-j", "list", "counters")
	if err != nil {
		return nil, err
	}
	var listing struct {
		NFTables []struct {
			Counter struct {
				Table, Name string
				Packets     uint64
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &listing); err != nil {
		return nil, err
	}
	for _, o := range listing.NFTables {
		if o.Counter.Table == "imdsgate" {
			counts[o.Counter.Name] = o.Counter.Packets
		}
	}
	return counts, nil
}

// audited waits for what the gate has recorded of a connection from this port.
func (b *attackBench) audited(ctx context.Context, port uint16) (e audit.Event, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err = b.Proxy.Await(ctx, 0, func(line string) (ok bool) {
		e, ok = auditLine(line)
		return ok && e.Peer.Port() == port
	})
	if err != nil {
		return e, fmt.Errorf("no audit line of port %d: %w", port, context.Cause(ctx))
	}
	return e, nil
}

// auditLine reads a line of the proxy's output, which holds its log too.
func auditLine(line string) (e audit.Event, ok bool) {
	return e, json.Unmarshal([]byte(line), &e) == nil && e.Peer.IsValid()
}

// raise starts agent and proxy, and waits until all containers are steered.
func (b *attackBench) raise(t *testing.T) {
	t.Helper()
	b.start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	left := len(b.boxes)
	_, err := b.Agent.Await(ctx, 0, func(line string) bool {
		if strings.Contains(line, `"msg":"attached"`) {
			left--
		}
		return left == 0
	})
	if err != nil {
		t.Fatal(err)
	}
}
