package bpf

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tcx is the hook of Linux 6.6.
type tcx struct{}

func (tcx) name() string { return "tcx" }

func (t tcx) ensure(d Device, p *ebpf.Program) (changed bool, err error) {
	id, err := programID(p)
	if err != nil {
		return false, err
	}
	at, err := link.QueryPrograms(link.QueryOptions{Target: d.Index, Attach: ebpf.AttachTCXEgress})
	if err != nil {
		return false, err
	}
	if len(at.Programs) == 0 || at.Programs[0].ID != id {
		if err := t.putFirst(d, p, at.Programs, id); err != nil {
			return false, err
		}
		changed = true
	}
	stale, err := t.detach(d, id)
	return changed || stale, err
}

// putFirst attaches p before all others. If it stands behind one, it is moved,
// and the device is without it for a moment: the kernel has no other way.
func (tcx) putFirst(d Device, p *ebpf.Program, at []link.AttachedProgram, id ebpf.ProgramID) error {
	opts := link.RawAttachProgramOptions{Target: d.Index, Program: p, Attach: ebpf.AttachTCXEgress, Anchor: link.Head()}
	for _, a := range at {
		if a.ID == id {
			if err := link.RawDetachProgram(link.RawDetachProgramOptions{Target: d.Index, Program: p, Attach: ebpf.AttachTCXEgress}); err != nil {
				return err
			}
		}
	}
	return link.RawAttachProgram(opts)
}

// detach takes away every program of ours but keep.
func (tcx) detach(d Device, keep ebpf.ProgramID) (found bool, err error) {
	at, err := link.QueryPrograms(link.QueryOptions{Target: d.Index, Attach: ebpf.AttachTCXEgress})
	if err != nil {
		return false, err
	}
	for _, a := range at.Programs {
		if a.ID == keep {
			continue
		}
		gone, err := detachIfOurs(d, a.ID)
		if err != nil {
			return found, err
		}
		found = found || gone
	}
	return found, nil
}

func detachIfOurs(d Device, id ebpf.ProgramID) (bool, error) {
	p, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil || !ours(info.Name) {
		return false, err
	}
	err = link.RawDetachProgram(link.RawDetachProgramOptions{Target: d.Index, Program: p, Attach: ebpf.AttachTCXEgress})
	if errors.Is(err, unix.ENOENT) {
		err = nil
	}
	return err == nil, err
}

func programID(p *ebpf.Program) (ebpf.ProgramID, error) {
	info, err := p.Info()
	if err != nil {
		return 0, err
	}
	id, ok := info.ID()
	if !ok {
		return 0, fmt.Errorf("the kernel gives programs no ids: %w", ErrNotSupported)
	}
	return id, nil
}

// clsact is the hook of older kernels: a cls_bpf filter on the egress side of a
// clsact qdisc.
type clsact struct{}

// filterName is how our filter is told from others.
const filterName = "imdsgate_egress"

func (clsact) name() string { return "clsact" }

func qdisc(d Device) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: d.Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

// filter is ours. Its priority is the first there is, and its handle one that
// nobody else will think of: eBPF CNIs replace handle 1 without a look.
func filter(d Device, p *ebpf.Program) *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: d.Index, Parent: netlink.HANDLE_MIN_EGRESS,
			Priority: 1, Handle: 0x1691, Protocol: unix.ETH_P_ALL,
		},
		Fd: p.FD(), Name: filterName, DirectAction: true,
	}
}

func (c clsact) ensure(d Device, p *ebpf.Program) (changed bool, err error) {
	id, err := programID(p)
	if err != nil {
		return false, err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return false, err
	}
	defer h.Close()
	first, mine, err := c.find(h, d)
	if err != nil {
		return false, err
	}
	if len(mine) > 0 && first == mine[0] && mine[0].Id == int(id) && mine[0].DirectAction {
		return false, nil
	}
	if err := h.QdiscAdd(qdisc(d)); err != nil && !errors.Is(err, unix.EEXIST) {
		return false, fmt.Errorf("qdisc: %w", err)
	}
	// Replaced in place, the filter would stay behind others of its priority; a new
	// one goes before them (net/sched/cls_bpf.c). The device is without it for a
	// moment.
	if len(mine) > 0 && first != mine[0] {
		if err := h.FilterDel(mine[0]); err != nil {
			return false, fmt.Errorf("move filter: %w", err)
		}
	}
	if err := h.FilterReplace(filter(d, p)); err != nil {
		return false, fmt.Errorf("filter: %w", err)
	}
	return true, nil
}

// find returns the first filter of the device's egress side, and those of ours.
func (clsact) find(h *netlink.Handle, d Device) (first netlink.Filter, mine []*netlink.BpfFilter, err error) {
	all, err := h.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: d.Index}}, netlink.HANDLE_MIN_EGRESS)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil, nil // no clsact qdisc
	}
	if err != nil {
		return nil, nil, fmt.Errorf("list filters: %w", err)
	}
	for _, f := range all {
		b, ok := f.(*netlink.BpfFilter)
		if ok && b.Name == filterName {
			mine = append(mine, b)
		}
		if first == nil {
			first = f
		}
	}
	return first, mine, nil
}

func (c clsact) detach(d Device) (found bool, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return false, err
	}
	defer h.Close()
	_, mine, err := c.find(h, d)
	if err != nil || len(mine) == 0 {
		return false, err
	}
	for _, f := range mine {
		if err := h.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
			return false, fmt.Errorf("delete filter: %w", err)
		}
	}
	dev := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: d.Index}}
	for _, side := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		left, err := h.FilterList(dev, side)
		if err != nil || len(left) > 0 {
			return true, err
		}
	}
	if err := h.QdiscDel(qdisc(d)); err != nil && !errors.Is(err, unix.ENOENT) {
		return true, fmt.Errorf("delete qdisc: %w", err)
	}
	return true, nil
}
