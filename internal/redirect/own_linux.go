package redirect

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
)

// Forward is the way of AttachOwn: like NFTables, from inside.
const Forward Method = "forward"

// What AttachOwn makes has names of its own: an agent that attaches the same
// namespace and a relay inside it never take away each other's.
const (
	ownTableName = "imdsgate_forward"
	ownTable     = 170 // of routes
	ownPriority  = priority + 1
	// ownLock is an abstract socket, which belongs to one network namespace and
	// goes with the process that has bound it, however that ends (unix(7)).
	ownLock = "@imdsgate-forward"
)

var (
	// ErrSteered is returned for a namespace that an agent steers.
	ErrSteered = errors.New("an agent steers this network namespace")
	// ErrTaken is returned while another process holds an Own in the namespace.
	ErrTaken = errors.New("another process forwards in this network namespace")
)

// Own is the steered namespace of the calling process itself. Its methods are not
// for concurrent use.
type Own struct {
	a    *Attachment
	lock int // descriptor
}

// AttachOwn steers the network namespace that the calling process is in, with
// CAP_NET_ADMIN alone, by an nftables tproxy rule. What a killed process has left
// is taken over. The caller ends it with Detach.
//
// Errors: ErrHostNetns in the host's namespace, as far as that can be told, and
// ErrSteered in one that an agent attends to, both not with force; ErrTaken,
// os.ErrPermission, bpf.ErrNotSupported. Nothing stays behind on any.
//
// The namespace of a container on the host's network can be told from an ordinary
// one from Linux 6.18 on only.
func AttachOwn(force bool) (*Own, error) {
	if !force {
		if inHostNetns() {
			return nil, ErrHostNetns
		}
		if err := steeredByAgent(); err != nil {
			return nil, err
		}
	}
	lock, err := lockOwn()
	if err != nil {
		return nil, err
	}
	o := &Own{a: &Attachment{Method: Forward}, lock: lock}
	switch err := o.attach(); {
	case errors.Is(err, os.ErrPermission):
		o.close() // nothing could be made, nor could it be undone
		return nil, err
	case err != nil:
		return nil, errors.Join(err, o.Detach())
	}
	return o, nil
}

func (o *Own) attach() error {
	if err := loopbackUp(); err != nil {
		return err
	}
	if err := o.a.listen(); err != nil {
		return err
	}
	if err := o.writeTables(); err != nil {
		return err
	}
	_, err := o.steer()
	return err
}

func (o *Own) close() {
	o.a.Close()
	unix.Close(o.lock)
}

func lockOwn() (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: ownLock}); err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EADDRINUSE) {
			return -1, ErrTaken
		}
		return -1, fmt.Errorf("lock: %w", err)
	}
	return fd, nil
}

// Listeners are for the captured connections, whose local address is the
// service's. The caller closes them; each call makes new ones of the same sockets.
func (o *Own) Listeners() ([]net.Listener, error) {
	var ls []net.Listener
	for _, f := range o.a.Files() {
		l, err := net.FileListener(f)
		if err != nil {
			for _, l := range ls {
				l.Close()
			}
			return nil, err
		}
		ls = append(ls, l)
	}
	return ls, nil
}

// Alive reports whether the sockets still listen: whoever has CAP_NET_ADMIN here
// can destroy them (ss -K).
func (o *Own) Alive() bool { return o.a.Alive() }

// Ensure puts back what is missing, and reports whether anything was.
func (o *Own) Ensure() (repaired bool, err error) {
	right, err := o.a.tablesRight(ownTableName)
	if err != nil {
		return false, err
	}
	if !right {
		repaired = true
		if err := o.writeTables(); err != nil {
			return true, err
		}
	}
	changed, err := o.steer()
	return repaired || changed, err
}

// Detach takes everything back, in reverse order, and closes the sockets. What is
// already gone is no error. It is the last call.
func (o *Own) Detach() error {
	defer o.close()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	var errs []error
	for _, f := range []family{inet4, inet6} {
		rule, route := f.own()
		if err := h.RuleDel(rule); err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("delete rule to %v: %w", f.destination(), err))
		}
		if err := h.RouteDel(route); err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("delete route %v: %w", f.destination(), err))
		}
	}
	return errors.Join(append(errs, deleteOwnTables())...)
}

// own is the switch and the route, under names of their own.
func (f family) own() (*netlink.Rule, *netlink.Route) {
	rule, route := f.rule(), f.route()
	rule.Priority, rule.Table, route.Table = ownPriority, ownTable, ownTable
	return rule, route
}

// steer makes routes and rules, and reports whether a rule was missing.
func (o *Own) steer() (changed bool, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return false, err
	}
	defer h.Close()
	for _, f := range o.a.families() {
		rule, route := f.own()
		switch err := h.RouteReplace(route); {
		case f == inet6 && errors.Is(err, unix.EACCES):
			continue // IPv6 is switched off here
		case err != nil:
			return false, fmt.Errorf("route %v: %w", f.destination(), err)
		}
		switch err := h.RuleAdd(rule); {
		case err == nil:
			changed = true
		case !errors.Is(err, unix.EEXIST):
			return false, fmt.Errorf("rule to %v: %w", f.destination(), err)
		}
	}
	return changed, nil
}

func (o *Own) writeTables() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	for _, f := range o.a.families() {
		listener := o.a.V4
		if f == inet6 {
			listener = o.a.V6
		}
		port, err := listenerPort(listener)
		if err != nil {
			return err
		}
		f.addTable(c, ownTableName, port)
	}
	if err := c.Flush(); err != nil {
		return nftError(err)
	}
	return nil
}

func deleteOwnTables() error {
	have, err := tablesNamed(ownTableName)
	if err != nil || len(have) == 0 {
		return err
	}
	return deleteAll(have)
}

// steeredByAgent returns ErrSteered when an agent's rule is here.
func steeredByAgent() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	rules, err := h.RuleList(int(inet4))
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	for _, r := range rules {
		if r.Priority == priority && r.Table == table {
			return ErrSteered
		}
	}
	return nil
}

// The inodes of the first namespaces. That of the first network namespace is
// fixed since Linux 6.18, and was below the first that is given out to others
// before (include/uapi/linux/nsfs.h, include/linux/proc_ns.h).
const (
	firstNetInode = 0xEFFFFFF9
	firstPIDInode = 0xEFFFFFFC
)

// inHostNetns reports whether this process is in the host's network namespace, as
// far as it can tell.
func inHostNetns() bool {
	own, err := netns.Inode("/proc/thread-self/ns/net")
	if err != nil {
		return false
	}
	pids, _ := netns.Inode("/proc/self/ns/pid")
	first, _ := netns.Inode(netns.PIDPath(1)) // hidden from many
	return hostNetns(own, first, pids)
}

// hostNetns judges by inodes, where zero is an unknown one. In a container
// process 1 shares the network namespace too, so that alone says something only
// to who is in no container, by its process ids.
func hostNetns(own, ofProcess1, pidNamespace uint64) bool {
	return own == firstNetInode || own == ofProcess1 && pidNamespace == firstPIDInode
}
