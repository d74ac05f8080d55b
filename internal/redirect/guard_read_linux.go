package redirect

import (
	"encoding/binary"
	"errors"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// guardTable is our table in the inet family, which holds IPv4 and IPv6.
type guardTable struct {
	flags uint32
	owner uint32 // netlink port of the socket that owns it, 0 for none
}

// rawExpr is an expression of a rule as the kernel tells it.
type rawExpr struct {
	name string
	data []byte
}

// ask sends one question about nf_tables, in the calling thread's namespace, and
// decodes each answer. The socket that owns the table is not used: an answer that
// is left behind in it would be taken for one to the next transaction.
func ask(question netlink.Message, decode func(*netlink.AttributeDecoder) error) error {
	c, err := dialNetfilter()
	if err != nil {
		return err
	}
	defer c.Close()
	answers, err := c.Execute(question)
	if err != nil {
		return err
	}
	for _, a := range answers {
		if len(a.Data) < 4 || a.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES {
			continue
		}
		d, err := decoder(a.Data[4:])
		if err != nil {
			return err
		}
		if err := decode(d); err != nil {
			return err
		}
	}
	return nil
}

func decoder(b []byte) (*netlink.AttributeDecoder, error) {
	d, err := netlink.NewAttributeDecoder(b)
	if err == nil {
		d.ByteOrder = binary.BigEndian
	}
	return d, err
}

// readTable is nil where there is no table of ours.
func readTable() (*guardTable, error) {
	t := &guardTable{}
	err := ask(message(unix.NFT_MSG_GETTABLE, 0, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_TABLE_NAME, tableName)
	}), func(d *netlink.AttributeDecoder) error {
		for d.Next() {
			switch d.Type() {
			case unix.NFTA_TABLE_FLAGS:
				t.flags = d.Uint32()
			case tableOwner:
				t.owner = d.Uint32()
			}
		}
		return d.Err()
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	return t, err
}

// readChains lists our table's chains in the order they were made.
func readChains() ([]chain, error) {
	var all []chain
	err := ask(message(unix.NFT_MSG_GETCHAIN, netlink.Dump, func(*netlink.AttributeEncoder) {}), func(d *netlink.AttributeDecoder) error {
		var c chain
		ours, policy, kind := false, uint32(nfAccept), "filter"
		for d.Next() {
			switch d.Type() {
			case unix.NFTA_CHAIN_TABLE:
				ours = d.String() == tableName
			case unix.NFTA_CHAIN_NAME:
				c.name = d.String()
			case unix.NFTA_CHAIN_TYPE:
				kind = d.String()
			case unix.NFTA_CHAIN_POLICY:
				policy = d.Uint32()
			case unix.NFTA_CHAIN_HOOK:
				c.base = true
				d.Nested(c.readHook)
			}
		}
		c.odd = policy != nfAccept || kind != "filter"
		if ours {
			all = append(all, c)
		}
		return d.Err()
	})
	return all, err
}

func (c *chain) readHook(d *netlink.AttributeDecoder) error {
	for d.Next() {
		switch d.Type() {
		case unix.NFTA_HOOK_HOOKNUM:
			c.hook = d.Uint32()
		case unix.NFTA_HOOK_PRIORITY:
			c.priority = int32(d.Uint32())
		}
	}
	return nil
}

// readRules lists our table's rules by chain, in order.
func readRules() (map[string][][]rawExpr, error) {
	all := make(map[string][][]rawExpr)
	err := ask(message(unix.NFT_MSG_GETRULE, netlink.Dump, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_RULE_TABLE, tableName)
	}), func(d *netlink.AttributeDecoder) error {
		var table, chain string
		var exprs []rawExpr
		for d.Next() {
			switch d.Type() {
			case unix.NFTA_RULE_TABLE:
				table = d.String()
			case unix.NFTA_RULE_CHAIN:
				chain = d.String()
			case unix.NFTA_RULE_EXPRESSIONS:
				d.Nested(func(d *netlink.AttributeDecoder) error {
					for d.Next() {
						x, err := decodeExpr(d.Bytes())
						if err != nil {
							return err
						}
						exprs = append(exprs, x)
					}
					return nil
				})
			}
		}
		if table == tableName { // old kernels do not filter
			all[chain] = append(all[chain], exprs)
		}
		return d.Err()
	})
	return all, err
}

func decodeExpr(b []byte) (x rawExpr, err error) {
	d, err := decoder(b)
	if err != nil {
		return x, err
	}
	for d.Next() {
		switch d.Type() {
		case unix.NFTA_EXPR_NAME:
			x.name = d.String()
		case unix.NFTA_EXPR_DATA:
			x.data = d.Bytes()
		}
	}
	return x, d.Err()
}

// readCounts reads our table's counters; without a table there are none.
func readCounts() (map[string]count, error) {
	all := make(map[string]count)
	err := ask(message(unix.NFT_MSG_GETOBJ, netlink.Dump, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_OBJ_TABLE, tableName)
		e.Uint32(unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_COUNTER)
	}), func(d *netlink.AttributeDecoder) error {
		var table, name string
		var c count
		for d.Next() {
			switch d.Type() {
			case unix.NFTA_OBJ_TABLE:
				table = d.String()
			case unix.NFTA_OBJ_NAME:
				name = d.String()
			case unix.NFTA_OBJ_DATA:
				d.Nested(func(d *netlink.AttributeDecoder) error {
					for d.Next() {
						switch d.Type() {
						case unix.NFTA_COUNTER_BYTES:
							c.bytes = d.Uint64()
						case unix.NFTA_COUNTER_PACKETS:
							c.packets = d.Uint64()
						}
					}
					return nil
				})
			}
		}
		if table == tableName {
			all[name] = c
		}
		return d.Err()
	})
	return all, err
}
