// Package bpf holds the eBPF programs, and everything that knows their C
// layouts. Nothing of the eBPF library leaves it.
package bpf

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// ErrNotSupported means that this kernel is too old, or built without what a
// program needs. Errors of missing privilege are os.ErrPermission instead.
var ErrNotSupported = errors.New("not supported by this kernel")

// Steer is the parsed steering program, from which each namespace gets its own
// copy. Safe for concurrent use.
type Steer struct {
	spec *ebpf.CollectionSpec
}

// LoadSteer parses the program and loads it once, to learn whether this process
// and this kernel can. Errors: ErrNotSupported (it needs Linux 5.17),
// os.ErrPermission (it needs CAP_BPF and CAP_NET_ADMIN in the first user
// namespace).
func LoadSteer() (*Steer, error) {
	spec, err := loadSteer()
	if err != nil {
		return nil, err
	}
	s := &Steer{spec: spec}
	c, err := s.load()
	if err != nil {
		return nil, classify("sk_lookup", "Linux 5.17", err)
	}
	c.Close()
	return s, nil
}

func (s *Steer) load() (*ebpf.Collection, error) {
	return ebpf.NewCollection(s.spec.Copy())
}

// classify puts one of the package's sentinels in front of a kernel error.
func classify(feature, kernel string, err error) error {
	switch {
	// EACCES is the verifier's word for what this kernel does not know, and would
	// pass for os.ErrPermission.
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: %w: needs CAP_BPF and CAP_NET_ADMIN: %w", feature, os.ErrPermission, err)
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%s: %w (needs %s): %w", feature, ErrNotSupported, kernel, err)
	}
	return fmt.Errorf("%s: %w", feature, err)
}

// Attach gives the metadata address, port 80, of the network namespace ns (a
// descriptor) to the listeners v4 and v6 (nil: none for that family; the address
// is then refused to everybody). The link is closed by the caller; the program
// stays attached while any process holds it, or until DetachLink.
func (s *Steer) Attach(ns int, v4, v6 *os.File) (*os.File, error) {
	c, err := s.load()
	if err != nil {
		return nil, classify("sk_lookup", "Linux 5.17", err)
	}
	defer c.Close()
	for slot, f := range []*os.File{v4, v6} {
		if f == nil {
			continue
		}
		if err := putListener(c.Maps[steerMapGate], uint32(slot), f); err != nil {
			return nil, err
		}
	}
	l, err := link.AttachNetNs(ns, c.Programs[steerProgSteer])
	if err != nil {
		return nil, fmt.Errorf("attach sk_lookup: %w", err)
	}
	defer l.Close()
	fd, err := unix.FcntlInt(uintptr(l.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("attach sk_lookup: %w", err)
	}
	return os.NewFile(uintptr(fd), "sk_lookup link"), nil
}

func putListener(m *ebpf.Map, slot uint32, f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var perr error
	err = rc.Control(func(fd uintptr) { perr = m.Put(slot, uint64(fd)) })
	if err = errors.Join(err, perr); err != nil {
		return fmt.Errorf("put listener into sockmap: %w", err)
	}
	return nil
}

// openLink wraps a copy of a link's descriptor.
func openLink(f *os.File) (link.Link, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	l, err := link.NewFromFD(fd)
	if err != nil {
		return nil, fmt.Errorf("not a bpf link: %w", err)
	}
	return l, nil
}

// LinkNetns is the inode of the network namespace that a link from Attach is
// attached to; zero when that namespace is gone or the link was detached.
func LinkNetns(f *os.File) (uint64, error) {
	l, err := openLink(f)
	if err != nil {
		return 0, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return 0, err
	}
	ns := info.NetNs()
	if ns == nil || ebpf.AttachType(ns.AttachType) != ebpf.AttachSkLookup {
		return 0, fmt.Errorf("link %d is no sk_lookup link", info.ID)
	}
	return uint64(ns.NetnsInode), nil
}

// DetachLink takes the program out of its namespace, whoever else holds the
// link. A namespace that is gone is no error.
func DetachLink(f *os.File) error {
	l, err := openLink(f)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := l.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) {
		return fmt.Errorf("detach sk_lookup: %w", err)
	}
	return nil
}

// NetnsLinks counts the sk_lookup links of any owner that are attached to the
// network namespace with this inode. Needs CAP_SYS_ADMIN.
func NetnsLinks(inode uint64) (int, error) {
	it := new(link.Iterator)
	defer it.Close()
	n := 0
	for it.Next() {
		info, err := it.Link.Info()
		if err != nil {
			return 0, err
		}
		ns := info.NetNs()
		if ns != nil && ebpf.AttachType(ns.AttachType) == ebpf.AttachSkLookup && uint64(ns.NetnsInode) == inode {
			n++
		}
	}
	return n, it.Err()
}

// Loaded counts the programs of this package that the kernel holds, whoever
// loaded them. Needs CAP_SYS_ADMIN.
func Loaded() (int, error) {
	n := 0
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return n, nil
		}
		if err != nil {
			return 0, err
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		info, err := p.Info()
		p.Close()
		if err != nil {
			return 0, err
		}
		switch info.Name {
		case steerProgSteer, fenceProgFence4, fenceProgFence6, fenceProgFenceBind4, fenceProgFenceBind6, fenceProgFenceIngress, fenceProgFenceOption, egressProgImdsgateEther, egressProgImdsgateIp:
			n++
		}
	}
}
