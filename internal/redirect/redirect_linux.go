// Package redirect decides how a container's connection to the metadata service
// comes to us, and makes it so inside the container's network namespace.
//
// Whatever the method, four things are made in one order, the last being the
// switch: a listener on loopback, what hands it the address's connections, a
// local route in a table of our own, and the rule that leads TCP port 80 of the
// address (and nothing else) to that table. The rule matches packets generated
// in the namespace only: a plain local route would answer the container's bridge
// neighbours with the container's identity.
package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"imdsgate/internal/bpf"
	"imdsgate/internal/netns"
)

// The addresses that are captured, with the one port that is.
var (
	IMDS4 = netip.MustParseAddrPort("169.254.169.254:80")
	IMDS6 = netip.MustParseAddrPort("[fd00:ec2::254]:80")
)

// backlog bounds the connections that wait in the kernel for each listener while
// the proxy is away, at about 7 KiB each.
const backlog = 256

// Method names a way of capturing.
type Method string

const (
	// SkLookup hands over connections with an sk_lookup program (Linux 5.17).
	SkLookup Method = "sklookup"
	// NFTables hands them over with an nftables tproxy rule on loopback. It needs no
	// BPF, and works for whoever owns the namespace's user namespace.
	NFTables Method = "nftables"
	// Auto picks the best method that works.
	Auto Method = "auto"
)

// ErrHostNetns is returned for a namespace that must never be steered: the
// host's own, or the agent's.
var ErrHostNetns = errors.New("this is the host's own network namespace")

// Attachment is what was opened inside one namespace. The descriptors may be
// shared with other processes: closing them here ends nothing there.
type Attachment struct {
	Netns  netns.ID
	Method Method
	V4     *os.File // listener, never nil
	V6     *os.File // listener, nil where the namespace has no IPv6
	Link   *os.File // sk_lookup link, nil with other methods
}

// Files lists the descriptors in the order V4, V6, Link, without the nil ones.
func (a *Attachment) Files() []*os.File {
	var fs []*os.File
	for _, f := range []*os.File{a.V4, a.V6, a.Link} {
		if f != nil {
			fs = append(fs, f)
		}
	}
	return fs
}

// Close closes this process's descriptors. Nothing is undone in the namespace.
func (a *Attachment) Close() {
	for _, f := range a.Files() {
		f.Close()
	}
}

// Alive reports whether both listeners still listen and the program is still
// attached: whoever holds a link can detach it.
func (a *Attachment) Alive() bool {
	if !netns.Listening(a.V4) || a.V6 != nil && !netns.Listening(a.V6) {
		return false
	}
	if a.Link == nil {
		return true
	}
	inode, err := bpf.LinkNetns(a.Link)
	return err == nil && inode == a.Netns.Inode
}

// Redirector attaches and detaches by one method. Safe for concurrent use on
// different namespaces.
type Redirector struct {
	method Method
	why    []string
	steer  *bpf.Steer
	never  map[uint64]bool
}

// New picks a method. Errors: bpf.ErrNotSupported or os.ErrPermission when m
// cannot work here; with Auto, when nothing can.
func New(m Method) (*Redirector, error) {
	r := &Redirector{method: m}
	if err := r.findHost(); err != nil {
		return nil, err
	}
	switch m {
	case SkLookup, Auto:
		s, err := bpf.LoadSteer()
		if err == nil {
			r.method, r.steer = SkLookup, s
			return r, nil
		}
		if m == SkLookup {
			return nil, err
		}
		r.why = append(r.why, "sklookup: "+firstLine(err))
	case NFTables:
	default:
		return nil, fmt.Errorf("unknown capture method %q: want auto, sklookup or nftables", m)
	}
	r.method = NFTables
	if err := probeNFTables(); err != nil {
		return nil, errors.Join(append(asErrors(r.why), err)...)
	}
	return r, nil
}

func asErrors(ss []string) []error {
	var es []error
	for _, s := range ss {
		es = append(es, errors.New(s))
	}
	return es
}

func firstLine(err error) string {
	s, _, _ := strings.Cut(err.Error(), "\n")
	return s
}

// Method is the method in use.
func (r *Redirector) Method() Method { return r.method }

// Why says, a line each, why better methods are not in use.
func (r *Redirector) Why() []string { return r.why }

// findHost notes the namespaces that are never to be steered. That of process 1
// may be hidden from us, and the caller's own is known then.
func (r *Redirector) findHost() error {
	r.never = make(map[uint64]bool)
	own, err := netns.Current()
	if err != nil {
		return fmt.Errorf("own network namespace: %w", err)
	}
	defer own.Close()
	r.never[own.ID().Inode] = true
	var st unix.Stat_t
	if err := unix.Stat(netns.PIDPath(1), &st); err == nil {
		r.never[st.Ino] = true
	}
	return nil
}

// Host reports whether a namespace is the host's, or the agent's own.
func (r *Redirector) Host(id netns.ID) bool { return r.never[id.Inode] }

// Attach steers a namespace. Every step is idempotent, so that what a dead agent
// left behind is taken over. Errors: ErrHostNetns; nothing stays behind on any.
func (r *Redirector) Attach(ns *netns.Handle) (*Attachment, error) {
	if r.Host(ns.ID()) {
		return nil, ErrHostNetns
	}
	a := &Attachment{Netns: ns.ID(), Method: r.method}
	err := ns.Do(func() error {
		if err := loopbackUp(); err != nil {
			return err
		}
		return a.listen()
	})
	if err == nil && r.method == SkLookup {
		err = r.attachProgram(ns, a)
	}
	switched := false
	if err == nil {
		err = ns.Do(func() error {
			var err error
			switched, err = a.install()
			return err
		})
	}
	if err != nil {
		return nil, errors.Join(err, r.abandon(ns, a, switched))
	}
	return a, nil
}

// abandon takes back what a failed Attach has made, but not the switch if that was
// there before: an older attachment may still live by it.
func (r *Redirector) abandon(ns *netns.Handle, a *Attachment, switched bool) error {
	defer a.Close()
	if switched {
		return r.Detach(ns, a)
	}
	if a.Link != nil {
		return bpf.DetachLink(a.Link)
	}
	return nil
}

func (r *Redirector) attachProgram(ns *netns.Handle, a *Attachment) error {
	f, err := os.Open(ns.Path())
	if err != nil {
		return err
	}
	defer f.Close()
	a.Link, err = r.steer.Attach(int(f.Fd()), a.V4, a.V6)
	return err
}

// listen opens the listeners. A namespace without IPv6 gets none for it.
func (a *Attachment) listen() error {
	var err error
	a.V4, _, err = netns.ListenTransparent(netip.MustParseAddr("127.0.0.1"), backlog)
	if err != nil {
		return err
	}
	a.V6, _, err = netns.ListenTransparent(netip.IPv6Loopback(), backlog)
	if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) {
		return nil
	}
	return err
}

// install makes everything that hands connections to the listeners and is not
// the program: the nftables rules, the routes, and last the switch. It reports
// whether the switch was off before. What an attachment by another method has left
// is taken away.
func (a *Attachment) install() (switched bool, err error) {
	if a.Method == NFTables {
		if err := a.writeTables(); err != nil {
			return false, err
		}
	}
	leftover := false
	for _, family := range a.families() {
		changed, err := steerOn(family)
		if err != nil {
			return switched, err
		}
		switched = switched || changed
		leftover = leftover || !changed
	}
	if leftover && a.Method != NFTables {
		return switched, deleteTables()
	}
	return switched, nil
}

func (a *Attachment) families() []family {
	if a.V6 == nil {
		return []family{inet4}
	}
	return []family{inet4, inet6}
}

// Ensure puts back what is missing in a namespace that is attached, or leads to
// other listeners, and reports whether the switch or the tables had to be; a route
// is written anew in any case.
func (r *Redirector) Ensure(ns *netns.Handle, a *Attachment) (repaired bool, err error) {
	if r.Host(ns.ID()) {
		return false, ErrHostNetns
	}
	err = ns.Do(func() error {
		if a.Method == NFTables {
			right, err := a.tablesRight(tableName)
			if err != nil {
				return err
			}
			if !right {
				repaired = true
				if err := a.writeTables(); err != nil {
					return err
				}
			}
		}
		for _, family := range a.families() {
			changed, err := steerOn(family)
			if err != nil {
				return err
			}
			repaired = repaired || changed
		}
		return nil
	})
	return repaired, err
}

// Detach takes everything back, in reverse order, and leaves the namespace as it
// was. The listeners stay open in whichever process holds them. What is already
// gone is no error; a Attachment that was never finished may be passed.
func (r *Redirector) Detach(ns *netns.Handle, a *Attachment) error {
	if r.Host(ns.ID()) {
		return ErrHostNetns
	}
	var errs []error
	errs = append(errs, ns.Do(func() error {
		var errs []error
		for _, family := range []family{inet4, inet6} {
			errs = append(errs, steerOff(family))
		}
		// Whatever the method: an earlier attachment may have had another.
		if err := deleteTables(); a.Method == NFTables {
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}))
	if a.Link != nil {
		errs = append(errs, bpf.DetachLink(a.Link))
	}
	return errors.Join(errs...)
}

// Verify checks an attachment that somebody else held against the kernel before
// its name is believed: both listeners were created in ns and listen, and the
// link is attached to ns.
func (r *Redirector) Verify(ns *netns.Handle, a *Attachment) error {
	if r.Host(ns.ID()) {
		return ErrHostNetns
	}
	if a.Method != r.method {
		return fmt.Errorf("attached by %s, this agent uses %s", a.Method, r.method)
	}
	if a.V4 == nil || (a.Method == SkLookup) != (a.Link != nil) {
		return errors.New("descriptors missing")
	}
	for _, f := range []*os.File{a.V4, a.V6} {
		if f == nil {
			continue
		}
		if err := verifyListener(ns.ID(), f); err != nil {
			return err
		}
	}
	if a.Link == nil {
		return nil
	}
	inode, err := bpf.LinkNetns(a.Link)
	if err != nil {
		return err
	}
	if inode != ns.ID().Inode {
		return fmt.Errorf("link belongs to net:[%d], not to %v", inode, ns.ID())
	}
	return nil
}

func verifyListener(want netns.ID, f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var cookie uint64
	var kerr error
	if err := rc.Control(func(fd uintptr) { cookie, kerr = netns.Cookie(int(fd)) }); err != nil {
		return err
	}
	if kerr != nil {
		return kerr
	}
	if cookie != want.Cookie {
		return fmt.Errorf("listener belongs to another namespace than %v", want)
	}
	if !netns.Listening(f) {
		return errors.New("listener no longer listens")
	}
	return nil
}
