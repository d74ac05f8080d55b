package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"imdsgate/internal/bpf"
)

// GuardRules says what the guard keeps containers from. They differ by cloud.
type GuardRules struct {
	// Addresses of the metadata service, every port and protocol of them. At least
	// one, at most 15.
	Addresses []netip.Addr

	// OpenPorts of these addresses stay open to everybody: DNS and NTP on some
	// clouds. At most 16. A fragment has no open port.
	OpenPorts []GuardPort

	// WireServer is Azure's second service; its TCP ports 80 and 32526 are closed,
	// and TCP fragments to it. DNS and the rest stay. The zero Addr: none.
	WireServer netip.Addr

	// Host also guards against processes of the host itself. Nil: they are not
	// affected.
	Host *HostRules
}

// GuardPort is a port that stays open.
type GuardPort struct {
	Protocol uint8 // unix.IPPROTO_TCP or unix.IPPROTO_UDP
	Number   uint16
}

// HostRules lists who on the host may reach the metadata service; nobody else
// may. A socket counts by who made it, whoever uses it.
type HostRules struct {
	// Agent is the directory of the agent's own cgroup (v2), which always may: its
	// connections are the gate's. "": the agent's user id must be among UIDs.
	Agent string

	UIDs []uint32

	// Cgroups are directories of a cgroup v2 hierarchy; whoever is below one may
	// too. One that does not exist is passed over until it does.
	Cgroups []string
}

// AzureGuardRules are the rules for Azure, which needs no port open.
func AzureGuardRules() GuardRules {
	return GuardRules{Addresses: []netip.Addr{IMDS4.Addr(), IMDS6.Addr()}, WireServer: netip.MustParseAddr("168.63.129.16")}
}

func (r GuardRules) validate() error {
	if len(r.Addresses) == 0 {
		return errors.New("no address to guard")
	}
	for _, a := range r.Addresses {
		if !a.IsValid() || a.Is4In6() || a.Zone() != "" {
			return fmt.Errorf("cannot guard the address %v", a)
		}
	}
	if r.WireServer.IsValid() && !r.WireServer.Is4() {
		return fmt.Errorf("wireserver %v is no IPv4 address", r.WireServer)
	}
	for _, p := range r.OpenPorts {
		if p.Number == 0 || p.Protocol != unix.IPPROTO_TCP && p.Protocol != unix.IPPROTO_UDP {
			return fmt.Errorf("cannot leave open port %d of protocol %d", p.Number, p.Protocol)
		}
	}
	return r.Host.validate()
}

func (h *HostRules) validate() error {
	if h == nil || h.Agent != "" {
		return nil
	}
	for _, uid := range h.UIDs {
		if uid == uint32(os.Geteuid()) {
			return nil
		}
	}
	return errors.New("the agent itself is not among those who may reach the metadata service")
}

// wirePorts are the closed TCP ports of the WireServer, which speaks to the VM agent
// (learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16).
var wirePorts = []uint16{80, 32526}

// The counters of the table.
const (
	countIMDS = "forward_imds"
	countWire = "forward_wireserver"
	countHost = "host"
	countVia  = "forward_source_route"
	countFrom = "output_foreign"
)

// ruleset builds the table's contents:
//
//	chain forward { type filter hook forward priority raw; policy accept;
//	  ip option lsrr exists counter name forward_source_route drop
//	  ip option ssrr exists counter name forward_source_route drop
//	  ip daddr 169.254.169.254 udp dport 53 accept              # open ports
//	  ip daddr 169.254.169.254 counter name forward_imds drop   # each address
//	  ip daddr 168.63.129.16 ip protocol tcp ip frag-off & 0x3fff != 0 counter name forward_wireserver drop
//	  ip daddr 168.63.129.16 tcp dport 80 counter name forward_wireserver drop
//	  ip daddr 168.63.129.16 tcp dport 32526 counter name forward_wireserver drop }
//	chain output { type filter hook output priority filter; policy accept;
//	  … the same matches … fib saddr type != local counter name output_foreign drop }
//
// and with HostRules:
//
//	chain host { type filter hook output priority filter; policy accept;
//	  … the same matches … goto known }
//	chain known { socket cgroupv2 level 2 … accept; meta skuid 0 accept; counter name host drop }
//
// A drop in any base chain is final, so the priority says nothing about who wins.
// Both hooks see the address after destination NAT, which is done before forward
// is reached, and at priority -100 of output.
func (r GuardRules) ruleset() (ruleset, error) {
	s := ruleset{
		counters: []string{countIMDS, countWire, countVia, countFrom},
		chains: []chain{
			{name: "forward", base: true, hook: unix.NF_INET_FORWARD, priority: -300},
			{name: "output", base: true, hook: unix.NF_INET_LOCAL_OUT},
		},
	}
	// A source-routed packet shows the next hop as its destination, and the next hop
	// may be this host; nobody has used that in earnest for decades.
	for _, option := range []uint8{ipoptLSRR, ipoptSSRR} {
		s.add("forward", ipOption(option), verdict(countVia)...)
	}
	r.matches(func(counter string, match []expr.Any) {
		s.add("forward", match, verdict(counter)...)
	})
	r.matches(func(counter string, match []expr.Any) {
		if counter != "" {
			match, counter = append(match, foreign()...), countFrom
		}
		s.add("output", match, verdict(counter)...)
	})
	if r.Host == nil {
		return s, nil
	}
	s.counters = append(s.counters, countHost)
	s.chains = append(s.chains, chain{name: "host", base: true, hook: unix.NF_INET_LOCAL_OUT}, chain{name: "known"})
	r.matches(func(counter string, match []expr.Any) {
		end := verdict(counter)
		if counter != "" {
			end = []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: "known"}}
		}
		s.add("host", match, end...)
	})
	return s, r.Host.known(&s)
}

// verdict drops and counts; without a counter it accepts.
func verdict(counter string) []expr.Any {
	if counter == "" {
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	}
	return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: counter}, &expr.Verdict{Kind: expr.VerdictDrop}}
}

// matches calls f for every kind of packet that the rules name, in order, with the
// counter of those that are refused and none for those that may pass.
func (r GuardRules) matches(f func(counter string, match []expr.Any)) {
	for _, a := range r.Addresses {
		for _, p := range r.OpenPorts {
			f("", append(to(a), port(p.Protocol, p.Number)...))
		}
		f(countIMDS, to(a))
	}
	if !r.WireServer.IsValid() {
		return
	}
	// The ports of a fragment are elsewhere or half there, and nobody fragments TCP
	// in earnest.
	f(countWire, append(to(r.WireServer), fragment()...))
	for _, p := range wirePorts {
		f(countWire, append(to(r.WireServer), port(unix.IPPROTO_TCP, p)...))
	}
}

// known adds those who may pass, and drops the rest.
func (h *HostRules) known(s *ruleset) error {
	if h.Agent != "" {
		if err := s.addCgroup(h.Agent); err != nil {
			return err
		}
	}
	for _, dir := range h.Cgroups {
		if err := s.addCgroup(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	for _, uid := range h.UIDs {
		s.add("known", []expr.Any{
			&expr.Meta{Key: expr.MetaKeySKUID, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(uid)},
		}, verdict("")...)
	}
	s.add("known", nil, verdict(countHost)...)
	return nil
}

// addCgroup lets pass what was made in a cgroup. The rule holds its id: a cgroup of
// the same name that is made later does not pass until the rules are made anew.
func (s *ruleset) addCgroup(dir string) error {
	id, level, err := cgroupOf(dir)
	if err != nil {
		return fmt.Errorf("guard: cgroup %s: %w", dir, err)
	}
	s.add("known", []expr.Any{
		&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: level, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint64(id)},
	}, verdict("")...)
	return nil
}

// cgroupOf returns the id of a cgroup and how deep it lies below the mount, which
// is how the socket expression counts.
func cgroupOf(dir string) (id uint64, level uint32, err error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return 0, 0, err
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, 0, errors.New("not a directory of cgroup v2")
	}
	if id, err = bpf.CgroupID(f); err != nil {
		return 0, 0, err
	}
	for at := filepath.Clean(dir); ; level++ {
		at = filepath.Dir(at)
		if err := unix.Statfs(at, &fs); err != nil {
			return 0, 0, err
		}
		if fs.Type != unix.CGROUP2_SUPER_MAGIC {
			return id, level, nil
		}
	}
}

func to(a netip.Addr) []expr.Any {
	offset, nfproto := uint32(16), byte(unix.NFPROTO_IPV4)
	if a.Is6() {
		offset, nfproto = 24, unix.NFPROTO_IPV6
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{nfproto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(a.AsSlice()))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a.AsSlice()},
	}
}

func port(protocol uint8, number uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{protocol}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(number)},
	}
}

// foreign matches a source that is no address of the host. ipvlan L3 sends what a
// container made by the host's output, and only behind it is it masqueraded.
func foreign() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// IPv4 options (RFC 791 §3.1) by which a sender chooses the way.
const (
	ipoptLSRR = 131
	ipoptSSRR = 137
)

// ipOption matches IPv4 packets that carry an option.
func ipOption(number uint8) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Exthdr{DestRegister: 1, Type: number, Len: 1, Flags: unix.NFT_EXTHDR_F_PRESENT, Op: exthdrIPv4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1}},
	}
}

// exthdrIPv4 is NFT_EXTHDR_OP_IPV4 (linux/netfilter/nf_tables.h, Linux 5.3).
const exthdrIPv4 = expr.ExthdrOp(2)

// fragment matches TCP over IPv4 with more fragments, or not the first.
func fragment() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 6, Len: 2},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: []byte{0x3f, 0xff}, Xor: []byte{0, 0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0, 0}},
	}
}
