package redirect

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"imdsgate/internal/bpf"
	"imdsgate/internal/netns"
)

// ErrGuardOwned is returned when the table belongs to another living process,
// most likely a second agent.
var ErrGuardOwned = errors.New("another process owns the guard's table")

// Guard lets nobody pass around the gate. It has two halves in the host's network
// namespace, each of which stands without the other:
//
//   - a table of ours, inet imdsgate, that drops what is forwarded to the metadata
//     service. It drops and never rejects: a dropped SYN is sent again, and then
//     finds the listener that was a little late. There is no exception, so none can
//     be forged: what may pass starts on the host itself. From there it drops what
//     carries a source that is not the host's: ipvlan L3 sends by the host's output.
//   - a program on the egress side of the devices that lead there, which refuses
//     whatever no socket of the host has made, where the kernel tells, or does not
//     carry one of the host's own addresses: macvlan and bridged neighbours of the
//     uplink never pass the forward hook.
//
// Every packet is judged, not every connection: one that was open before the guard
// came hears nothing more, and conntrack entries need not be flushed. The one thing
// that passes is a flow that was open before and that somebody's nftables flowtable
// carries past the forward hook, masqueraded, until it ends.
//
// Both halves outlive Close and the process. The next Guard takes them over. All
// methods are safe for concurrent use.
type Guard struct {
	host  *netns.Handle
	rules GuardRules
	log   *slog.Logger

	cookie uint64 // of the host's namespace; 0 where the program must do without

	mu      sync.Mutex
	flags   uint32        // that the table is asked for
	table   string        // as in GuardStatus
	conn    *netlink.Conn // made the table and so owns it; nil before Apply
	egress  *bpf.Egress   // nil before Apply, and where BPF is not to be had
	noBPF   error         // why it is not to be had
	devices []bpf.Device  // that the program is attached to; nil before Apply
	repairs int
}

// How a table is protected, in the words of GuardStatus.
const (
	// TableOwned: nobody else can change the table, "nft flush ruleset" passes over
	// it, and it stays when its owner dies (Linux 6.9).
	TableOwned = "owned"
	// TablePlain: others can remove it, and Run puts it back.
	TablePlain = "plain"
)

// GuardStatus says how the guard stands.
type GuardStatus struct {
	Table   string   // TableOwned or TablePlain; "" when there is none
	Hook    string   // that holds the program, "tcx" or "clsact"; "" when there is none
	NoHook  string   // why there is none, a line; "" before Apply
	Cookie  bool     // it tells the host's packets by where they were made (Linux 6.15), not by their source alone
	Devices []string // that have the program, by name
	Repairs int      // how often something had to be put right since Apply
}

// NewGuard makes a guard for a namespace, usually netns.Current of the agent. It
// changes nothing. host stays the caller's, and must stay open until Close. A nil
// log is silent.
func NewGuard(host *netns.Handle, rules GuardRules, log *slog.Logger) (*Guard, error) {
	if err := rules.validate(); err != nil {
		return nil, fmt.Errorf("guard: %w", err)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Guard{host: host, rules: rules, log: log, cookie: host.ID().Cookie, flags: ownerPersist}, nil
}

// Apply raises the guard, in place of what an earlier one has left. The table
// changes in one transaction: no packet meets half of it. Where one half fails
// the other is raised all the same; Status tells. Errors: ErrGuardOwned; for the
// table os.ErrPermission (it needs CAP_NET_ADMIN), and bpf.ErrNotSupported without
// nf_tables; for the program what bpf.LoadEgress returns.
func (g *Guard) Apply() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	err := g.writeTable()
	if errors.Is(err, ErrGuardOwned) {
		return err // then the program is somebody else's too
	}
	_, uerr := g.ensureUplinks()
	return errors.Join(err, uerr, g.noBPF)
}

// Ensure compares what is there with what should be and puts right what differs.
// It reports whether anything did; the log says what. Missing BPF was Apply's
// error and is none here.
func (g *Guard) Ensure() (repaired bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	table, err := g.ensureTable()
	if errors.Is(err, ErrGuardOwned) {
		return false, err
	}
	program, uerr := g.ensureUplinks()
	if table || program {
		g.repairs++
	}
	return table || program, errors.Join(err, uerr)
}

func (g *Guard) ensureTable() (repaired bool, err error) {
	want, err := g.rules.ruleset()
	if err != nil {
		return false, err
	}
	found := "nothing of ours"
	if g.table != "" {
		err = g.host.Do(func() error {
			found, err = want.difference(g.tableFlags())
			return err
		})
	}
	if err != nil || found == "" {
		return false, err
	}
	if err := g.writeTable(); err != nil {
		return false, fmt.Errorf("%s: %w", found, err)
	}
	g.log.Warn("guard: table put back", "found", found)
	return true, nil
}

func (g *Guard) tableFlags() uint32 {
	if g.table == TablePlain {
		return 0
	}
	return g.flags
}

// writeTable makes the table anew. It is written through the socket that owns it,
// which is kept.
func (g *Guard) writeTable() error {
	want, err := g.rules.ruleset()
	if err != nil {
		return err
	}
	var counts map[string]count
	err = g.host.Do(func() error {
		if g.conn == nil {
			if g.conn, err = dialNetfilter(); err != nil {
				return err
			}
		}
		counts, err = readCounts() // they go on where they were
		return err
	})
	if err != nil {
		return guardError(err)
	}
	flags, table := g.tableFlags(), TableOwned
	err = transact(g.conn, want.messages(flags, counts))
	if flags != 0 && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL)) {
		// An old kernel does not know the flags, unless it is something else, which
		// will fail again.
		flags = 0
		err = transact(g.conn, want.messages(flags, counts))
	}
	if err != nil {
		return g.denied(err)
	}
	if flags == 0 {
		table = TablePlain
	}
	if table != g.table && table == TablePlain {
		g.log.Warn("guard: this kernel lets others remove the table, it is watched instead (needs Linux 6.9)")
	}
	g.table = table
	return nil
}

// denied tells a table that belongs to somebody else from missing privilege: the
// kernel has one error for both.
func (g *Guard) denied(err error) error {
	if !errors.Is(err, unix.EPERM) {
		return guardError(err)
	}
	var t *guardTable
	rerr := g.host.Do(func() error {
		var err error
		t, err = readTable()
		return err
	})
	if rerr == nil && t != nil && t.owner != 0 {
		return fmt.Errorf("guard: %w (netlink port %d, most often its process id): is an agent running already?", ErrGuardOwned, t.owner)
	}
	return guardError(err)
}

func guardError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM), errors.Is(err, os.ErrPermission):
		return fmt.Errorf("guard: %w: needs CAP_NET_ADMIN: %w", os.ErrPermission, err)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("guard: %w (needs nf_tables): %w", bpf.ErrNotSupported, err)
	}
	return fmt.Errorf("guard: nftables: %w", err)
}

// Counters is how many packets were refused, by where and what: forward_imds,
// forward_wireserver, forward_source_route, output_foreign and host for the table, uplink_imds and uplink_wireserver for
// the program. The table's go on when it is rebuilt or taken over, the program's
// begin with each Guard.
func (g *Guard) Counters() (map[string]uint64, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make(map[string]uint64)
	err := g.host.Do(func() error {
		counts, err := readCounts()
		for name, c := range counts {
			all[name] = c.packets
		}
		return err
	})
	if err != nil {
		return nil, guardError(err)
	}
	if g.egress == nil {
		return all, nil
	}
	refused, err := g.egress.Refused()
	for reason, n := range refused {
		all["uplink_"+reason] = n
	}
	return all, err
}

// Status says how the guard stands, as of the last Apply or Ensure.
func (g *Guard) Status() GuardStatus {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := GuardStatus{Table: g.table, Repairs: g.repairs}
	if g.noBPF != nil {
		s.NoHook = firstLine(g.noBPF)
	}
	if g.egress != nil {
		s.Hook, s.Cookie = g.egress.Hook(), g.egress.Cookie()
	}
	for _, d := range g.devices {
		s.Devices = append(s.Devices, d.Name)
	}
	return s
}

// Remove takes the guard away: our table and our program, whoever made them, and
// nothing else. It needs no Apply before it, and what is gone already is no error.
// Run must have ended, or it puts back what it misses. Errors: ErrGuardOwned,
// os.ErrPermission.
func (g *Guard) Remove() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	defer g.letGo()
	err := g.removeTable()
	if errors.Is(err, ErrGuardOwned) {
		return err
	}
	return errors.Join(err, g.removeUplinks())
}

func (g *Guard) removeTable() error {
	var t *guardTable
	err := g.host.Do(func() error {
		var err error
		if t, err = readTable(); err != nil || t == nil || g.conn != nil {
			return err
		}
		g.conn, err = dialNetfilter()
		return err
	})
	if err != nil || t == nil {
		return guardError(err)
	}
	err = transact(g.conn, []netlink.Message{deleteTable()})
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return g.denied(err)
}

// Close lets go of the guard; everything stays in place. While nobody owns the
// table, others can remove it.
func (g *Guard) Close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.letGo()
}

func (g *Guard) letGo() {
	if g.conn != nil {
		g.conn.Close()
	}
	if g.egress != nil {
		g.egress.Close()
	}
	g.conn, g.egress, g.devices, g.table = nil, nil, nil, ""
}
