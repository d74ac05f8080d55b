package bpf

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// FenceRules says which connect the fence lets pass.
type FenceRules struct {
	Cgroup   uint64         // cgroup v2 id of the agent
	Netns    uint64         // cookie of the host's network namespace
	Upstream netip.AddrPort // the one destination
}

// Fence is the attached fence. It outlives Close and the process: the programs
// stay on the cgroup until it is removed, and after that on the sockets that
// were made in it.
type Fence struct {
	verdicts *ebpf.Map
}

// AttachFence puts the fence on the cgroup whose directory is given, in place of
// an earlier one. Errors: ErrNotSupported (needs Linux 5.7), os.ErrPermission.
func AttachFence(cgroup *os.File, r FenceRules) (*Fence, error) {
	spec, err := loadFence()
	if err != nil {
		return nil, err
	}
	if err := r.set(spec); err != nil {
		return nil, err
	}
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, classify("cgroup connect fence", "Linux 5.7", err)
	}
	defer c.Close()
	for name, typ := range map[string]ebpf.AttachType{
		fenceProgFence4: ebpf.AttachCGroupInet4Connect,
		fenceProgFence6: ebpf.AttachCGroupInet6Connect,

		fenceProgFenceBind4: ebpf.AttachCGroupInet4Bind,
		fenceProgFenceBind6: ebpf.AttachCGroupInet6Bind,

		fenceProgFenceIngress: ebpf.AttachCGroupInetIngress,
		fenceProgFenceOption:  ebpf.AttachCGroupSetsockopt,
	} {
		// Without flags an attach replaces the program that is there. A link would
		// take the fence away when the agent dies, which is when it is needed.
		err := link.RawAttachProgram(link.RawAttachProgramOptions{
			Target: int(cgroup.Fd()), Program: c.Programs[name], Attach: typ,
		})
		if err != nil {
			return nil, classify("attach "+name, "Linux 5.7", err)
		}
	}
	m, err := c.Maps[fenceMapVerdicts].Clone()
	if err != nil {
		return nil, err
	}
	return &Fence{verdicts: m}, nil
}

// set writes the rules into the program's constants.
func (r FenceRules) set(spec *ebpf.CollectionSpec) error {
	a := r.Upstream.Addr().As16()
	var words [4]uint32
	for i := range words {
		words[i] = binary.NativeEndian.Uint32(a[4*i:]) // network order in memory
	}
	var port [2]byte
	binary.BigEndian.PutUint16(port[:], r.Upstream.Port())
	for name, v := range map[string]any{
		fenceVarAgentCgroup:  r.Cgroup,
		fenceVarHostNetns:    r.Netns,
		fenceVarUpstream:     words,
		fenceVarUpstreamPort: binary.NativeEndian.Uint16(port[:]),
	} {
		if err := spec.Variables[name].Set(v); err != nil {
			return fmt.Errorf("fence: set %s: %w", name, err)
		}
	}
	return nil
}

// Refused is how many connects, binds, packets and options the fence has refused
// since it was attached.
func (f *Fence) Refused() (uint64, error) {
	var n uint64
	err := f.verdicts.Lookup(uint32(0), &n)
	return n, err
}

// Close lets go of the counters. The fence stays.
func (f *Fence) Close() error { return f.verdicts.Close() }

// CgroupID is the id of a cgroup v2 directory, as programs see it.
func CgroupID(dir *os.File) (uint64, error) {
	h, _, err := unix.NameToHandleAt(int(dir.Fd()), "", unix.AT_EMPTY_PATH)
	if err != nil {
		return 0, fmt.Errorf("cgroup id of %s: %w", dir.Name(), err)
	}
	if h.Size() < 8 {
		return 0, fmt.Errorf("cgroup id of %s: not a cgroup", dir.Name())
	}
	return binary.NativeEndian.Uint64(h.Bytes()), nil
}
