package redirect

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"imdsgate/internal/bpf"
	"imdsgate/internal/netns"
)

// tableName is our table in a container's namespace, one for each family.
const tableName = "imdsgate"

// chainName is the one chain in it.
const chainName = "own"

func (f family) table(name string) *nftables.Table {
	t := &nftables.Table{Name: name, Family: nftables.TableFamilyIPv4}
	if f == inet6 {
		t.Family = nftables.TableFamilyIPv6
	}
	return t
}

// writeTables makes the tables anew in one transaction, in the calling thread's
// namespace:
//
//	table ip imdsgate { chain own { type filter hook prerouting priority mangle;
//	  iif lo ip daddr 169.254.169.254 tcp dport 80 tproxy to 127.0.0.1:PORT accept } }
//
// tproxy, not DNAT: the connection keeps its address and no conntrack is needed.
func (a *Attachment) writeTables() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	for _, f := range a.families() {
		listener := a.V4
		if f == inet6 {
			listener = a.V6
		}
		port, err := listenerPort(listener)
		if err != nil {
			return err
		}
		f.addTable(c, tableName, port)
	}
	if err := c.Flush(); err != nil {
		return nftError(err)
	}
	return nil
}

// addTable makes a table anew.
func (f family) addTable(c *nftables.Conn, name string, port uint16) {
	// Adding before deleting makes the deletion of a missing table no error.
	c.AddTable(f.table(name))
	c.DelTable(f.table(name))
	t := c.AddTable(f.table(name))
	chain := c.AddChain(&nftables.Chain{
		Name: chainName, Table: t, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle,
	})
	c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: f.tproxy(port)})
}

func nftError(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, os.ErrPermission):
		return fmt.Errorf("tproxy: %w: needs CAP_NET_ADMIN: %w", os.ErrPermission, err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT):
		return fmt.Errorf("tproxy: %w (needs nf_tables and nft_tproxy): %w", bpf.ErrNotSupported, err)
	}
	return fmt.Errorf("tproxy: %w", err)
}

// tproxy is the rule's expressions.
func (f family) tproxy(port uint16) []expr.Any {
	addr, offset, size, nfproto := IMDS4.Addr().AsSlice(), uint32(16), uint32(4), byte(unix.NFPROTO_IPV4)
	if f == inet6 {
		addr, offset, size, nfproto = IMDS6.Addr().AsSlice(), 24, 16, unix.NFPROTO_IPV6
	}
	to := f.loopback().To4()
	if f == inet6 {
		to = f.loopback()
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIF, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(loopback)},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: addr},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(IMDS4.Port())},
		&expr.Immediate{Register: 1, Data: to},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.TProxy{Family: nfproto, TableFamily: nfproto, RegAddr: 1, RegPort: 2},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
}

func listenerPort(f *os.File) (uint16, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var port uint16
	var kerr error
	if err := rc.Control(func(fd uintptr) { port, kerr = netns.LocalPort(int(fd)) }); err != nil {
		return 0, err
	}
	return port, kerr
}

// tablesRight reports whether the tables of this name in the calling thread's namespace are
// there, each with the one rule that leads to this attachment's listener.
func (a *Attachment) tablesRight(name string) (bool, error) {
	have, err := tablesNamed(name)
	if err != nil || len(have) < len(a.families()) {
		return false, err
	}
	c, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("nftables: %w", err)
	}
	for _, f := range a.families() {
		listener := a.V4
		if f == inet6 {
			listener = a.V6
		}
		port, err := listenerPort(listener)
		if err != nil {
			return false, err
		}
		t := f.table(name)
		rules, err := c.GetRules(t, &nftables.Chain{Name: chainName, Table: t})
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("nftables: read rules: %w", err)
		}
		if len(rules) != 1 || !leadsTo(rules[0], port) {
			return false, nil
		}
	}
	return true, nil
}

// leadsTo reports whether a rule loads a port for tproxy.
func leadsTo(r *nftables.Rule, port uint16) bool {
	want := binaryutil.BigEndian.PutUint16(port)
	return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
		im, ok := e.(*expr.Immediate)
		return ok && im.Register == 2 && bytes.Equal(im.Data, want)
	})
}

// ownTables lists our tables in the calling thread's namespace.
func ownTables() ([]*nftables.Table, error) { return tablesNamed(tableName) }

// tablesNamed lists the tables of this name, for IPv4 and IPv6.
func tablesNamed(name string) ([]*nftables.Table, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	all, err := c.ListTables()
	if err != nil {
		return nil, fmt.Errorf("nftables: list tables: %w", err)
	}
	var ours []*nftables.Table
	for _, t := range all {
		if t.Name == name && (t.Family == nftables.TableFamilyIPv4 || t.Family == nftables.TableFamilyIPv6) {
			ours = append(ours, t)
		}
	}
	return ours, nil
}

func deleteTables() error {
	ours, err := ownTables()
	if err != nil || len(ours) == 0 {
		return err
	}
	return deleteAll(ours)
}

func deleteAll(tables []*nftables.Table) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	for _, t := range tables {
		c.DelTable(t)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nftables: delete tables: %w", err)
	}
	return nil
}

// probeNFTables attaches in a namespace made for it, to learn whether this
// process and this kernel can.
func probeNFTables() error {
	ns, err := netns.New()
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			return fmt.Errorf("nftables: %w: needs CAP_SYS_ADMIN: %w", os.ErrPermission, err)
		}
		return err
	}
	defer ns.Close()
	r := &Redirector{method: NFTables, never: map[uint64]bool{}}
	a, err := r.Attach(ns)
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	a.Close()
	return nil
}
