package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"

	"imdsgate/internal/bpf"
	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// boundCall leaves the container by its device, whatever the steering.
const boundCall = "call -device eth0 tcp 169.254.169.254:80"

// hostAttacks are those for which the host itself does something.
func hostAttacks() []attack {
	rewrite := func(_ context.Context, b *attackBench) (string, error) {
		_, err := b.host(`table ip attack {
			chain pre {
				type nat hook prerouting priority -101
				ip daddr 10.1.1.1 dnat to 169.254.169.254
			}
		}`, "nft", "-f", "-")
		return "", err
	}
	restore := func(_ context.Context, b *attackBench) error {
		_, err := b.host("", "nft", "delete", "table", "ip", "attack")
		return err
	}
	kill := func(_ context.Context, b *attackBench) (string, error) {
		if b.Agent != nil {
			b.Agent.Kill()
		}
		return "agent killed", nil
	}
	return []attack{
		{name: "host_dnat_to_the_service", from: "web", do: "call tcp 10.1.1.1:80", before: rewrite, after: restore, stopped: byTable},
		{name: "host_deletes_the_guards_table", from: "web", do: boundCall, before: deleteTable, stopped: byTable},
		flushed(),
		{name: "agent_killed_old_container_is_answered", from: "web", do: plainCall, before: kill, stopped: byGate},
		{name: "agent_killed_new_container_is_held", from: "late", do: plainCall, stopped: byTable,
			after: func(ctx context.Context, b *attackBench) error { return b.remove(ctx, b.boxes["late"]) }},
	}
}

func deleteTable(_ context.Context, b *attackBench) (string, error) {
	_, err := b.host("", "nft", "delete", "table", "inet", "imdsgate")
	if err == nil {
		return "", errors.New("the guard's table could be deleted")
	}
	if b.Agent != nil && !strings.Contains(err.Error(), "Operation not permitted") {
		return "", err
	}
	return "kernel: Operation not permitted", nil
}

// flushed is "nft flush ruleset" on the host, which Docker's own rules do not
// survive.
func flushed() attack {
	var docker string
	return attack{
		name: "host_flushes_the_ruleset", from: "web", do: boundCall, stopped: byTable,
		before: func(_ context.Context, b *attackBench) (note string, err error) {
			if docker, err = b.host("", "iptables-save"); err != nil {
				return "", err
			}
			if _, err = b.host("", "nft", "flush", "ruleset"); err != nil {
				return "", err
			}
			left, err := b.host("", "nft", "list", "tables")
			return "left of the ruleset: " + strings.Join(strings.Fields(left), " "), err
		},
		after: func(_ context.Context, b *attackBench) error {
			_, err := b.host(docker, "iptables-restore")
			return err
		},
	}
}

// sourceRoute names the host as the first hop, and the service as the second. A
// host that follows source routes is needed; few do.
func sourceRoute() attack {
	return attack{
		name: "source_route", from: "web", do: "call -via {gateway} tcp 169.254.169.254:80",
		before: func(_ context.Context, b *attackBench) (string, error) {
			return "", b.VM.NS.Do(func() error { return testnet.Sysctl("net/ipv4/conf/all/accept_source_route", "1") })
		},
		stopped: bySourceRouteRule,
	}
}

// addressOn gives the service's address to a container's device.
func addressOn(name string) func(context.Context, *attackBench) (string, error) {
	return func(ctx context.Context, b *attackBench) (string, error) {
		return "", b.changeAddress(ctx, name, netlink.AddrAdd)
	}
}

func addressOff(name string) func(context.Context, *attackBench) error {
	return func(ctx context.Context, b *attackBench) error { return b.changeAddress(ctx, name, netlink.AddrDel) }
}

func (b *attackBench) changeAddress(ctx context.Context, name string, change func(netlink.Link, *netlink.Addr) error) error {
	x, err := b.box(ctx, name)
	if err != nil {
		return err
	}
	return x.ns.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr(testnet.IMDS4 + "/32")
		if err != nil {
			return err
		}
		return change(eth0, addr)
	})
}

// ownProgram is a second sk_lookup program in the attacker's own namespace, which
// gives its calls to a listener of its own.
func ownProgram() attack {
	var own *ownListener
	return attack{
		name: "own_sk_lookup_program", from: "admin", do: plainCall,
		before: func(ctx context.Context, b *attackBench) (note string, err error) {
			x, err := b.box(ctx, "admin")
			if err != nil {
				return "", err
			}
			if own, err = listenAndSteer(x.ns); err != nil {
				return "", err
			}
			n, err := bpf.NetnsLinks(x.ns.ID().Inode)
			return fmt.Sprintf("sk_lookup programs in its namespace: %d", n), err
		},
		after: func(context.Context, *attackBench) error { return own.close() },
		stopped: func(ctx context.Context, b *attackBench, o outcome) (string, error) {
			what, err := own.hasHeard(ctx, b, o)
			if err != nil {
				return "", err
			}
			other, err := b.try(ctx, attack{from: "neighbour", do: plainCall})
			if err != nil {
				return "", err
			}
			theirs, err := byGate(ctx, b, other)
			return what + "; its neighbour: " + theirs, err
		},
	}
}

// ownListener is what a container could open in its own namespace.
type ownListener struct {
	l    net.Listener
	link *os.File
}

const ownListenerSays = "the attacker itself"

func listenAndSteer(ns *netns.Handle) (*ownListener, error) {
	var f *os.File
	err := ns.Do(func() (err error) {
		f, _, err = netns.ListenTransparent(netip.MustParseAddr("127.0.0.1"), 8)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	o := &ownListener{}
	if o.l, err = net.FileListener(f); err != nil {
		return nil, err
	}
	go testnet.Say(o.l, ownListenerSays)
	if o.link, err = steerTo(ns, f); err != nil {
		o.l.Close()
		return nil, err
	}
	return o, nil
}

func steerTo(ns *netns.Handle, listener *os.File) (*os.File, error) {
	steer, err := bpf.LoadSteer()
	if err != nil {
		return nil, err
	}
	f, err := os.Open(ns.Path())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return steer.Attach(int(f.Fd()), listener, nil)
}

func (l *ownListener) close() error { return errors.Join(l.link.Close(), l.l.Close()) }

// hasHeard: either the container has answered itself, or the gate has.
func (l *ownListener) hasHeard(ctx context.Context, b *attackBench, o outcome) (string, error) {
	if o.Said != ownListenerSays {
		return byGate(ctx, b, o)
	}
	if len(o.arrived) > 0 {
		return "", fmt.Errorf("%d packets have arrived: %v", len(o.arrived), o.arrived[0])
	}
	return o.words("it has answered itself"), nil
}
