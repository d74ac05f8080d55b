package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// attackReportEnv names a file for the rows that "make attack" prints.
const attackReportEnv = "IMDSGATE_ATTACK_REPORT"

// attack is one way around the gate.
type attack struct {
	name string
	from string // the container it comes from
	do   string // what that is told to do, see testdata/evil; {…} are filled in

	// before and after are done on the host, around the attack. A note says what
	// came of it.
	before func(context.Context, *attackBench) (note string, err error)
	after  func(context.Context, *attackBench) error

	// noControl says why the attack cannot reach the fabric where there is neither
	// agent nor guard. Empty: it must, or it proves nothing.
	noControl string

	// stopped says what has stopped it, by what was seen, or what has not.
	stopped func(context.Context, *attackBench, outcome) (string, error)
}

// outcome is what was seen of an attack.
type outcome struct {
	did
	from     *box
	port     uint16            // that it came from
	arrived  []sighting        // its packets to guarded addresses, on the fabric
	counted  map[string]uint64 // by how much the guard's counters have risen
	refused  uint64            // packets that were refused below the container's device
	happened string            // before, on the host
}

// TestAttack makes every attack twice: without agent and guard, where it must
// arrive, and with them. IMDSGATE_ATTACK_REPORT names a file for the rows.
func TestAttack(t *testing.T) {
	b := newAttackBench(t)
	all := attacks()
	rows := attackReport{t: t}
	defer rows.write()
	b.startBoxes(t)
	open := make(map[string]error)
	for _, a := range all {
		if a.noControl == "" {
			open[a.name] = b.control(t.Context(), a)
		}
	}
	_, guardedFrom := b.sniffer.since(0)
	history, err := b.History(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.raise(t)
	for _, a := range all {
		what, err := b.attack(t.Context(), a)
		if a.noControl != "" {
			what += "; no control: " + a.noControl
		}
		rows.add(a.name, what, errors.Join(open[a.name], err))
	}
	what, err := b.onlyTheHostCame(t.Context(), guardedFrom, len(history))
	rows.add("fabric_hears_only_the_host", what, err)
	rows.complete = true
}

// startBoxes starts all containers that are to be there before the agent.
func (b *attackBench) startBoxes(t *testing.T) {
	t.Helper()
	var names []string
	for name := range boxArgs {
		if name != "late" {
			names = append(names, name)
		}
	}
	started := make([]*box, len(names))
	forEach(len(names), 3, func(i int) {
		var err error
		if started[i], err = b.startBox(t.Context(), names[i]); err != nil {
			t.Error(err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	for _, x := range started {
		b.boxes[x.name] = x
	}
}

// control makes an attack without agent and guard.
func (b *attackBench) control(ctx context.Context, a attack) error {
	o, err := b.try(ctx, a)
	if err != nil {
		return fmt.Errorf("control: %w", err)
	}
	if len(o.arrived) == 0 {
		return fmt.Errorf("control did not arrive: %+v", o.did)
	}
	return nil
}

// attack makes an attack on agent and guard.
func (b *attackBench) attack(ctx context.Context, a attack) (string, error) {
	o, err := b.try(ctx, a)
	if err != nil {
		return "", err
	}
	what, err := a.stopped(ctx, b, o)
	b.judged[o.port] = err == nil && len(o.arrived) > 0
	return what, err
}

// try makes an attack and says what was seen of it.
func (b *attackBench) try(ctx context.Context, a attack) (o outcome, err error) {
	if a.before != nil {
		if o.happened, err = a.before(ctx, b); err != nil {
			return o, err
		}
	}
	if a.after != nil {
		defer func() { err = errors.Join(err, a.after(ctx, b)) }()
	}
	if o.from, err = b.box(ctx, a.from); err != nil {
		return o, err
	}
	b.port++
	o.port = b.port
	before, err := b.look(o.from)
	if err != nil {
		return o, err
	}
	if o.did, err = o.from.do(ctx, o.port, b.fill(a.do)); err != nil {
		return o, err
	}
	if err := b.sniffer.await(ctx, o.port); err != nil {
		return o, fmt.Errorf("%w: %+v", err, o.did)
	}
	// Who has waited for an answer has given the packets time enough. Others may
	// still be on their way, by another one than the last packet's.
	for deadline := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		if err := b.compare(&o, before); err != nil || o.Said != "" || o.Error != "" || o.traced() || time.Now().After(deadline) {
			return o, err
		}
	}
}

// traces are what can be seen of attacks at some time.
type traces struct {
	counts  map[string]uint64
	refused uint64
	at      int // in the sniffer's list
}

func (b *attackBench) look(from *box) (s traces, err error) {
	if s.counts, err = b.counters(); err != nil {
		return s, err
	}
	s.refused, err = from.dropped()
	_, s.at = b.sniffer.since(0)
	return s, err
}

// compare fills in what has changed.
func (b *attackBench) compare(o *outcome, before traces) error {
	now, err := b.look(o.from)
	if err != nil {
		return err
	}
	seen, _ := b.sniffer.since(before.at)
	o.arrived, o.counted, o.refused = attacksAmong(seen, o.port), now.counts, now.refused-before.refused
	for name := range o.counted {
		o.counted[name] -= before.counts[name]
	}
	return nil
}

// traced: the packets have left a trace.
func (o *outcome) traced() bool {
	sum := uint64(len(o.arrived)) + o.refused
	for _, n := range o.counted {
		sum += n
	}
	return sum > 0
}

// fill names the addresses in a command.
func (b *attackBench) fill(command string) string {
	return strings.NewReplacer(
		"{host}", b.VM.Addr4.String(), "{fabric}", elsewhere.Addr().String(), "{gateway}", "172.29.1.1",
		"{neighbour}", b.boxes["neighbour"].addr.String(), "{web}", b.boxes["web"].addr.String()).Replace(command)
}

// firstPort is below the first source port of attackers: no kernel picks these for
// a connection of its own accord.
const firstPort = 6600

func isAttacker(p uint16) bool { return p > firstPort && p < firstPort+1000 }

// onlyTheHostCame looks at everything that has come to the fabric since agent and
// guard are there, and compares it with what the simulator has heard.
func (b *attackBench) onlyTheHostCame(ctx context.Context, from, heard int) (string, error) {
	history, err := b.History(ctx)
	if err != nil {
		return "", err
	}
	known := make(map[netip.AddrPort]bool)
	for _, h := range history[heard:] {
		peer, err := netip.ParseAddrPort(h.Peer)
		if err != nil {
			return "", err
		}
		if peer.Addr() != b.VM.Addr4 || isAttacker(peer.Port()) {
			return "", fmt.Errorf("the service was called by %s: %s", h.Peer, h.Target)
		}
		known[peer] = true
	}
	seen, _ := b.sniffer.since(from)
	packets := 0
	for _, s := range seen {
		if s.to == elsewhere || b.judged[s.from.Port()] {
			continue
		}
		if !known[s.from] || s.protocol != unix.IPPROTO_TCP {
			return "", fmt.Errorf("a packet has arrived that is not the agent's: %v", s)
		}
		packets++
	}
	if lost, err := b.sniffer.lost(); err != nil || lost > 0 {
		return "", fmt.Errorf("the sniffer has missed %d packets: %v", lost, err)
	}
	if packets == 0 {
		return "", errors.New("the agent has never called: the gate was not at work")
	}
	return fmt.Sprintf("nothing else; the agent's own: %d packets, %d requests by %d of its connections", packets, len(history)-heard, len(known)), nil
}

// attackReport collects the rows.
type attackReport struct {
	t              *testing.T
	lines          strings.Builder
	passed, failed int
	complete       bool
}

func (r *attackReport) add(name, what string, err error) {
	r.t.Helper()
	if err != nil {
		r.failed++
		what = strings.Join(strings.Fields(err.Error()), " ")
		fmt.Fprintf(&r.lines, "FAIL %s: %s\n", name, what)
		r.t.Errorf("%s: %s", name, what)
		return
	}
	r.passed++
	fmt.Fprintf(&r.lines, "PASS %s: %s\n", name, what)
	r.t.Logf("%s: %s", name, what)
}

// write hands the rows over, if they are all there.
func (r *attackReport) write() {
	path := os.Getenv(attackReportEnv)
	if path == "" || !r.complete {
		return
	}
	fmt.Fprintf(&r.lines, "%d passed, %d failed\n", r.passed, r.failed)
	if err := os.WriteFile(path, []byte(r.lines.String()), 0o600); err != nil {
		r.t.Error(err)
	}
}
