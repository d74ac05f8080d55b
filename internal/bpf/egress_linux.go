package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// The names of the counters that Egress.Refused returns.
const (
	RefusedIMDS       = "imds"       // packets to the metadata service
	RefusedWireServer = "wireserver" // packets to a closed port of Azure's WireServer
)

// EgressPort is a port that stays open.
type EgressPort struct {
	Protocol uint8 // unix.IPPROTO_TCP or unix.IPPROTO_UDP
	Number   uint16
}

// EgressRules says what the egress program refuses to everybody but the host.
type EgressRules struct {
	Addresses  []netip.Addr // of the metadata service, at most 15
	OpenPorts  []EgressPort // of these addresses, at most 16
	WireServer netip.Addr   // TCP 80 and 32526 are refused; the zero Addr: none

	// HostNetns is the cookie of the host's network namespace: only what a socket
	// made there passes as the host's. 0: the source address alone decides.
	HostNetns uint64
}

// Device is a network device that leads to the metadata service.
type Device struct {
	Index int
	Name  string
	// Encap is the kernel's word for its hardware type, as "ip link" shows it.
	Encap string
}

// Egress is the loaded egress program with its maps. What it is attached to stays
// so when the process ends, whatever way: neither hook needs a descriptor that
// is held, or a pin. Not safe for concurrent use.
//
// Two hooks are known. tcx (Linux 6.6) is taken where it is there: the kernel runs
// it before clsact, and a tcx program of somebody else that says "pass" ends the
// matter, so that a clsact filter behind it would see nothing. Attached by
// BPF_PROG_ATTACH and not by a link it stays until the device goes. clsact with a
// cls_bpf filter is for older kernels, and stays as well.
type Egress struct {
	c      *ebpf.Collection
	hook   hook
	host   map[netip.Addr]bool
	cookie bool
}

// hook is where a program is attached to a device. Its methods act in the network
// namespace of the calling thread.
type hook interface {
	name() string

	// ensure makes p the first program on the device, and the only one of ours.
	ensure(d Device, p *ebpf.Program) (changed bool, err error)
}

// LoadEgress loads the program and fills in the rules. It refuses nothing before
// SetHost and Ensure were called. Where the kernel does not tell such programs who
// made a packet, it is loaded as if HostNetns were 0; Cookie tells. Errors: ErrNotSupported (needs Linux 5.4),
// os.ErrPermission (needs CAP_BPF and CAP_NET_ADMIN).
func LoadEgress(r EgressRules) (*Egress, error) {
	spec, err := loadEgress()
	if err != nil {
		return nil, err
	}
	e := &Egress{hook: bestHook(), host: make(map[netip.Addr]bool), cookie: r.HostNetns != 0}
	if e.cookie {
		e.c, err = newEgress(spec, r.HostNetns)
	}
	if !e.cookie || err != nil {
		e.cookie = false
		e.c, err = newEgress(spec, 0)
	}
	if err != nil {
		return nil, classify("egress program", "Linux 5.4", err)
	}
	if err := e.fill(r); err != nil {
		e.c.Close()
		return nil, fmt.Errorf("egress program: %w", err)
	}
	return e, nil
}

// newEgress loads a copy of spec. Without a cookie nothing calls the helper for it,
// and its call is taken out: before Linux 5.5 the verifier does not see that.
func newEgress(spec *ebpf.CollectionSpec, hostNetns uint64) (*ebpf.Collection, error) {
	spec = spec.Copy()
	if err := spec.Variables[egressVarHostNetns].Set(hostNetns); err != nil {
		return nil, err
	}
	for _, p := range spec.Programs {
		for i, ins := range p.Instructions {
			if hostNetns == 0 && ins.IsBuiltinCall() && ins.Constant == int64(asm.FnGetNetnsCookie) {
				p.Instructions[i] = asm.Mov.Imm(asm.R0, 0).WithMetadata(ins.Metadata)
			}
		}
	}
	return ebpf.NewCollection(spec)
}

// bestHook asks the kernel about lo, which is device 1 of every namespace.
func bestHook() hook {
	_, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXEgress})
	if err != nil {
		return clsact{}
	}
	return tcx{}
}

// The values of the map guarded, and the indices of the map refused.
const (
	egressIMDS uint32 = iota
	egressWireServer
)

func (e *Egress) fill(r EgressRules) error {
	guarded, open := e.c.Maps[egressMapGuarded], e.c.Maps[egressMapOpenPorts]
	for _, a := range r.Addresses {
		if err := guarded.Put(a.As16(), egressIMDS); err != nil {
			return fmt.Errorf("guard %v: %w", a, err)
		}
	}
	if r.WireServer.IsValid() {
		if err := guarded.Put(r.WireServer.As16(), egressWireServer); err != nil {
			return fmt.Errorf("guard %v: %w", r.WireServer, err)
		}
	}
	for _, p := range r.OpenPorts {
		var number [2]byte
		binary.BigEndian.PutUint16(number[:], p.Number)
		key := [2]uint16{uint16(p.Protocol), binary.NativeEndian.Uint16(number[:])}
		if err := open.Put(key, uint8(1)); err != nil {
			return fmt.Errorf("open port %d: %w", p.Number, err)
		}
	}
	return nil
}

// SetHost says which addresses are the host's own, at most 65,536, in place of
// those said before. It reports whether any came or went.
func (e *Egress) SetHost(addrs []netip.Addr) (changed bool, err error) {
	own := e.c.Maps[egressMapOwn]
	want := make(map[netip.Addr]bool, len(addrs))
	for _, a := range addrs {
		a = a.Unmap().WithZone("")
		want[a] = true
		if e.host[a] {
			continue
		}
		if err := own.Put(a.As16(), uint8(1)); err != nil {
			return changed, fmt.Errorf("egress program: host address %v: %w", a, err)
		}
		e.host[a], changed = true, true
	}
	for a := range e.host {
		if want[a] {
			continue
		}
		if err := own.Delete(a.As16()); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return changed, fmt.Errorf("egress program: host address %v: %w", a, err)
		}
		delete(e.host, a)
		changed = true
	}
	return changed, nil
}

// Hook names the kernel's hook in use: "tcx" or "clsact".
func (e *Egress) Hook() string { return e.hook.name() }

// Cookie reports whether the program tells the host's packets by where they were
// made, and not by their source address alone.
func (e *Egress) Cookie() bool { return e.cookie }

// Ensure sees to it that the program is attached to a device of the calling
// thread's network namespace, before all others there, and that no earlier one of
// ours is. It reports whether anything had to be done. An earlier one is taken
// away only when this one stands. Errors: ErrNotSupported for a kind of device
// whose frames the program cannot read.
func (e *Egress) Ensure(d Device) (changed bool, err error) {
	name := egressProgImdsgateIp
	switch d.Encap {
	case "ether":
		name = egressProgImdsgateEther
	case "none", "ppp", "sit", "ipip", "tunnel6", "gre": // an IP header comes first
	default:
		return false, fmt.Errorf("egress program on %s: %w: frames of kind %q", d.Name, ErrNotSupported, d.Encap)
	}
	changed, err = e.hook.ensure(d, e.c.Programs[name])
	if err != nil {
		return false, fmt.Errorf("egress program on %s: %s: %w", d.Name, e.Hook(), err)
	}
	return changed, nil
}

// DetachEgress takes our program off a device of the calling thread's network
// namespace, whoever attached it and by whichever hook, and reports whether there
// was one. A clsact qdisc without any filter is removed with it: it does nothing,
// and is most likely ours.
func DetachEgress(d Device) (found bool, err error) {
	// Without tcx in the kernel there is nothing to find there.
	byTCX, err := tcx{}.detach(d, 0)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, ebpf.ErrNotSupported) {
		err = nil
	}
	byFilter, cerr := clsact{}.detach(d)
	if err = errors.Join(err, cerr); err != nil {
		return false, fmt.Errorf("detach egress program from %s: %w", d.Name, err)
	}
	return byTCX || byFilter, nil
}

// Refused counts the packets refused since LoadEgress, by reason.
func (e *Egress) Refused() (map[string]uint64, error) {
	counts := make(map[string]uint64)
	for index, reason := range map[uint32]string{egressIMDS: RefusedIMDS, egressWireServer: RefusedWireServer} {
		var n uint64
		if err := e.c.Maps[egressMapRefused].Lookup(index, &n); err != nil {
			return nil, fmt.Errorf("egress program: counters: %w", err)
		}
		counts[reason] = n
	}
	return counts, nil
}

// Close lets go of the program. Where it is attached it stays, with the rules and
// host addresses that it has.
func (e *Egress) Close() { e.c.Close() }

// ours reports whether a program is an egress program of this package.
func ours(name string) bool {
	return slices.Contains([]string{egressProgImdsgateEther, egressProgImdsgateIp}, name)
}
