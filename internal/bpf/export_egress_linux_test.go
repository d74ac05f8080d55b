package bpf

import (
	"errors"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// Judge runs the program for a kind of device on one frame.
func (e *Egress) Judge(encap string, frame []byte) (refused bool, err error) {
	name := egressProgImdsgateEther
	if encap != "ether" {
		name = egressProgImdsgateIp
	}
	verdict, err := e.c.Programs[name].Run(&ebpf.RunOptions{Data: frame})
	return int32(verdict) == 2, err // TC_ACT_SHOT
}

// UseClsact makes e use the hook of older kernels.
func (e *Egress) UseClsact() { e.hook = clsact{} }

// Stranger is a tc program of somebody else, which lets everything pass and asks
// nobody after it, as those of eBPF CNIs do.
type Stranger struct {
	p *ebpf.Program
	l link.Link
}

// NewStrangerProgram loads one and attaches it nowhere.
func NewStrangerProgram() (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "stranger", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
}

// NewStranger attaches one to a device of the calling thread's namespace, before
// all that are there.
func NewStranger(index int) (*Stranger, error) {
	p, err := NewStrangerProgram()
	if err != nil {
		return nil, err
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: p, Attach: ebpf.AttachTCXEgress, Anchor: link.Head()})
	if err != nil {
		p.Close()
		return nil, err
	}
	return &Stranger{p, l}, nil
}

// Close takes it away.
func (s *Stranger) Close() error { return errors.Join(s.l.Close(), s.p.Close()) }
