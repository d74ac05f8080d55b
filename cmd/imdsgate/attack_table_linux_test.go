package main

import (
	"context"
	"fmt"
	"strings"

	"imdsgate/internal/audit"
	"imdsgate/internal/bpf"
	"imdsgate/internal/workload"
)

const plainCall = "call tcp 169.254.169.254:80"

// attacks are all of them, in this order: what changes the host or ends the agent
// comes last.
func attacks() []attack {
	rows := []attack{
		// With what every container has, CAP_NET_RAW.
		{name: "source_of_the_host_forged", from: "web", do: "packet -source {host} 169.254.169.254:80", stopped: byTable},
		{name: "source_of_another_container_forged", from: "web", do: "packet -source {neighbour} 169.254.169.254:80", stopped: byTable},
		{name: "ethernet_frame_to_the_gateway", from: "web", do: "frame -to {gateway} 169.254.169.254:80", stopped: byTable},
		{name: "ethernet_frame_to_a_neighbour", from: "web", do: "frame -to {neighbour} 169.254.169.254:80", stopped: byTable},
		// Without any.
		sourceRoute(),
		{name: "bound_to_device", from: "web", do: "call -device eth0 tcp 169.254.169.254:80", stopped: byTable},
		{name: "ipv6_bound_to_device", from: "six", do: "call -device eth0 tcp [fd00:ec2::254]:80", stopped: byTable},
		{name: "udp_port_80", from: "web", do: "call udp 169.254.169.254:80", stopped: byTable},
		{name: "udp_port_53", from: "web", do: "call udp 169.254.169.254:53", stopped: byTable},
		{name: "tcp_port_8080", from: "web", do: "call tcp 169.254.169.254:8080", stopped: byTable},
		{name: "wireserver_port_80", from: "web", do: "call tcp 168.63.129.16:80", stopped: byWireServerRule},
		{name: "wireserver_port_32526", from: "web", do: "call tcp 168.63.129.16:32526", stopped: byWireServerRule},
		{name: "wireserver_dns_udp_stays_open", from: "web", do: "call udp 168.63.129.16:53", stopped: byNothing},
		{name: "wireserver_dns_tcp_stays_open", from: "web", do: "call tcp 168.63.129.16:53", stopped: byNothing},
		// Other ways to say the same.
		{name: "plain_call", from: "web", do: plainCall, stopped: byGate},
		{name: "ipv4_mapped_address", from: "web", do: "call -mapped tcp 169.254.169.254:80", stopped: byGate},
		{name: "tcp_fast_open", from: "web", do: "call -fastopen tcp 169.254.169.254:80", stopped: byGate},
		{name: "decimal_address", from: "web", do: "call tcp 2852039166:80", stopped: byGate},
		{name: "hex_address", from: "web", do: "call tcp 0xa9fea9fe:80", stopped: byGate},
		{name: "octal_address", from: "web", do: "call tcp 0251.0376.0251.0376:80", stopped: byGate},
		{name: "ipv6_address", from: "six", do: "call tcp [fd00:ec2::254]:80", stopped: byGate},
		// With CAP_NET_ADMIN. The first ones leave the steering as it is.
		{name: "rule_before_ours", from: "admin", do: "overrule " + plainCall, stopped: tampering(byTable)},
		{name: "address_on_own_device", from: "admin", do: "claim " + plainCall, stopped: tampering(byRefusal),
			noControl: "the address is the container's own then, with or without an agent"},
		{name: "hairpin_through_a_neighbour", from: "admin", do: "hairpin {neighbour} call -device eth0 tcp 169.254.169.254:80", stopped: tampering(byTable)},
		{name: "neighbour_has_the_address", from: "admin", do: "hairpin {web} call -device eth0 tcp 169.254.169.254:80", stopped: tampering(byRefusal),
			before: addressOn("web"), after: addressOff("web"), noControl: "what is asked for is the neighbour's identity, and without an agent nobody has one"},
		ownProgram(),
		{name: "steering_table_flushed", from: "admin", do: "unroute " + plainCall, stopped: tampering(byTableOrRepair)},
		{name: "steering_rule_deleted", from: "admin", do: "unrule " + plainCall, stopped: tampering(byTableOrRepair)},
		{name: "loopback_down", from: "admin", do: "lodown " + plainCall, stopped: tampering(byTableOrRepair)},
		// On the uplink itself.
		{name: "macvlan_bound_to_device", from: "macvlan", do: "call -device eth0 tcp 169.254.169.254:80", stopped: byUplink},
		{name: "macvlan_wireserver", from: "macvlan", do: "call tcp 168.63.129.16:80", stopped: byUplink},
		{name: "macvlan_frame_of_another_type", from: "macvlan", do: "frame -to {fabric} -type 0x88b5 169.254.169.254:80", stopped: byUplink},
		{name: "macvlan_source_of_the_host_forged", from: "macvlan", do: "packet -source {host} 169.254.169.254:80", stopped: bySocketOrTheWayBack},
	}
	return append(rows, hostAttacks()...)
}

// byTable: the guard's table has dropped it.
func byTable(_ context.Context, _ *attackBench, o outcome) (string, error) {
	return byCounter(o, "forward_imds")
}

func bySourceRouteRule(_ context.Context, _ *attackBench, o outcome) (string, error) {
	return byCounter(o, "forward_source_route")
}

func byWireServerRule(_ context.Context, _ *attackBench, o outcome) (string, error) {
	return byCounter(o, "forward_wireserver")
}

func byCounter(o outcome, counter string) (string, error) {
	switch {
	case len(o.arrived) > 0:
		return "", fmt.Errorf("%d packets have arrived: %v", len(o.arrived), o.arrived[0])
	case o.Said != "":
		return "", fmt.Errorf("somebody answered %q", o.Said)
	case o.counted[counter] == 0:
		return "", fmt.Errorf("the guard has counted nothing as %s: %+v", counter, o.did)
	}
	return o.words(fmt.Sprintf("guard's table dropped %s (%s)", packets(o.counted[counter]), counter)), nil
}

// words adds what the host and the caller noticed.
func (o outcome) words(what string) string {
	if o.happened != "" {
		what = o.happened + "; " + what
	}
	if o.Error != "" {
		what += "; caller: " + o.Error
	}
	return what
}

func packets(n uint64) string {
	if n == 1 {
		return "1 packet"
	}
	return fmt.Sprintf("%d packets", n)
}

// byUplink: the program on the uplink has refused it. The kernel's count is that of
// the macvlan device, whose packets the uplink's egress side did not take.
func byUplink(_ context.Context, _ *attackBench, o outcome) (string, error) {
	switch {
	case len(o.arrived) > 0:
		return "", fmt.Errorf("%d packets have arrived: %v", len(o.arrived), o.arrived[0])
	case o.Said != "":
		return "", fmt.Errorf("somebody answered %q", o.Said)
	case o.refused == 0:
		return "", fmt.Errorf("nothing was refused below its device: %+v", o.did)
	}
	return o.words(fmt.Sprintf("guard's program on the uplink refused %s (tx_dropped)", packets(o.refused))), nil
}

// byGate: the gate has answered, to the container that asked.
func byGate(ctx context.Context, b *attackBench, o outcome) (string, error) {
	if len(o.arrived) > 0 {
		return "", fmt.Errorf("%d packets have arrived: %v", len(o.arrived), o.arrived[0])
	}
	if !strings.HasPrefix(o.Said, "HTTP/1.1 ") {
		return "", fmt.Errorf("no answer: %+v", o.did)
	}
	e, err := b.audited(ctx, o.port)
	if err != nil {
		return "", err
	}
	if e.Name != o.from.name || e.Workload == "" || e.Proof != workload.Listener {
		return "", fmt.Errorf("answered as %q, by proof %v, want %q, by proof listener", e.Name, e.Proof, o.from.name)
	}
	decision := string(e.Decision)
	if e.Decision != audit.Allow {
		decision += " (" + e.Reason + ")"
	}
	return o.words(fmt.Sprintf("gate answered %d; audit: %s, proof %v, %s", e.Status, e.Name, e.Proof, decision)), nil
}

// byTableOrRepair: the guard has dropped it, and where the agent put the steering
// back in time, the gate has answered what was sent again.
func byTableOrRepair(ctx context.Context, b *attackBench, o outcome) (string, error) {
	if o.Said == "" {
		return byTable(ctx, b, o)
	}
	what, err := byGate(ctx, b, o)
	return fmt.Sprintf("guard's table dropped %s (forward_imds), then the agent repaired the steering: %s", packets(o.counted["forward_imds"]), what), err
}

// byRefusal: a container's own kernel has refused it, and neither gate nor guard
// has heard of it.
func byRefusal(_ context.Context, b *attackBench, o outcome) (string, error) {
	if len(o.arrived) > 0 || o.counted["forward_imds"] > 0 || !strings.Contains(o.Error, "connection refused") {
		return "", fmt.Errorf("not refused: %d packets have arrived, %d were dropped, %+v", len(o.arrived), o.counted["forward_imds"], o.did)
	}
	for _, line := range b.Proxy.Lines() {
		if e, ok := auditLine(line); ok && e.Peer.Port() == o.port {
			return "", fmt.Errorf("the gate knows it as %q", e.Name)
		}
	}
	return o.words("refused where the address is local, nothing left by the uplink, no audit line"), nil
}

// byNothing: it may pass.
func byNothing(_ context.Context, _ *attackBench, o outcome) (string, error) {
	if len(o.arrived) == 0 || o.Said != fabricSays {
		return "", fmt.Errorf("no answer: %+v", o.did)
	}
	return fmt.Sprintf("nothing, as it should: answered by %s", o.Said), nil
}

// bySocketOrTheWayBack: the program on the uplink has refused it, where the kernel
// tells it who made a packet.
func bySocketOrTheWayBack(ctx context.Context, b *attackBench, o outcome) (string, error) {
	e, err := bpf.LoadEgress(bpf.EgressRules{HostNetns: b.VM.NS.ID().Cookie})
	if err != nil {
		return "", err
	}
	defer e.Close()
	if e.Cookie() {
		return byUplink(ctx, b, o)
	}
	return byTheWayBack(ctx, b, o)
}

// byTheWayBack: the guard takes the packet for the host's, and so does the fabric,
// which answers the host. A connection, let alone a request, does not come of it.
func byTheWayBack(_ context.Context, b *attackBench, o outcome) (string, error) {
	reset := false
	for _, p := range o.arrived {
		if p.from.Addr() != b.VM.Addr4 || p.flags != tcpSYN && p.flags != tcpRST {
			return "", fmt.Errorf("more than a SYN has arrived: %v, flags %#x", p, p.flags)
		}
		reset = reset || p.flags == tcpRST
	}
	if !reset {
		return "", fmt.Errorf("the host did not reset it: %v", o.arrived)
	}
	return "one way only: its SYN arrives as the host's, the answer goes to the host, which resets it; no connection, no request", nil
}

// tampering holds that the container did change something.
func tampering(stopped func(context.Context, *attackBench, outcome) (string, error)) func(context.Context, *attackBench, outcome) (string, error) {
	return func(ctx context.Context, b *attackBench, o outcome) (string, error) {
		if o.Changed == 0 {
			return "", fmt.Errorf("there was nothing to tamper with: %+v", o.did)
		}
		return stopped(ctx, b, o)
	}
}
