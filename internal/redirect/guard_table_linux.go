package redirect

import (
	"encoding/binary"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The guard speaks to nf_tables itself, in the handful of messages that it needs,
// and uses of google/nftables the expressions alone. Its Conn cannot do what the
// table stands on: in v0.3.0 AddTable sends flags 0 whatever Table.Flags says, and
// GetRules leaves out the expressions that it does not know, socket among them.

// ownerPersist are the flags owner and persist of a table (linux/netfilter/nf_tables.h).
const ownerPersist = 0x2 | 0x4

// tableOwner is NFTA_TABLE_OWNER of linux/netfilter/nf_tables.h.
const tableOwner = 7

// ruleset is what the table contains.
type ruleset struct {
	counters []string
	chains   []chain
	rules    []rule
}

// chain is a chain of our table. Base chains are of type filter with policy accept.
type chain struct {
	name     string
	base     bool
	hook     uint32
	priority int32
	odd      bool // as read: of another type or policy
}

type rule struct {
	chain string
	exprs []expr.Any
}

func (s *ruleset) add(chain string, match []expr.Any, end ...expr.Any) {
	s.rules = append(s.rules, rule{chain, slices.Concat(match, end)})
}

type count struct{ packets, bytes uint64 }

// messages makes the table anew, whatever is there: the first message creates it
// if it is missing, and changes nothing if it is not, since it has no flags
// attribute; so the second one cannot fail. The counters begin at counts.
func (s ruleset) messages(flags uint32, counts map[string]count) []netlink.Message {
	all := []netlink.Message{
		message(unix.NFT_MSG_NEWTABLE, netlink.Create, func(e *netlink.AttributeEncoder) {
			e.String(unix.NFTA_TABLE_NAME, tableName)
		}),
		deleteTable(),
		message(unix.NFT_MSG_NEWTABLE, netlink.Create, func(e *netlink.AttributeEncoder) {
			e.String(unix.NFTA_TABLE_NAME, tableName)
			e.Uint32(unix.NFTA_TABLE_FLAGS, flags)
		}),
	}
	for _, name := range s.counters {
		all = append(all, newCounter(name, counts[name]))
	}
	for _, c := range s.chains {
		all = append(all, c.message())
	}
	for _, r := range s.rules {
		all = append(all, r.message())
	}
	return all
}

func deleteTable() netlink.Message {
	return message(unix.NFT_MSG_DELTABLE, 0, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_TABLE_NAME, tableName)
	})
}

func newCounter(name string, from count) netlink.Message {
	return message(unix.NFT_MSG_NEWOBJ, netlink.Create, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_OBJ_TABLE, tableName)
		e.String(unix.NFTA_OBJ_NAME, name)
		e.Uint32(unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_COUNTER)
		e.Nested(unix.NFTA_OBJ_DATA, func(e *netlink.AttributeEncoder) error {
			e.Uint64(unix.NFTA_COUNTER_BYTES, from.bytes)
			e.Uint64(unix.NFTA_COUNTER_PACKETS, from.packets)
			return nil
		})
	})
}

func (c chain) message() netlink.Message {
	return message(unix.NFT_MSG_NEWCHAIN, netlink.Create, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_CHAIN_TABLE, tableName)
		e.String(unix.NFTA_CHAIN_NAME, c.name)
		if !c.base {
			return
		}
		e.Nested(unix.NFTA_CHAIN_HOOK, func(e *netlink.AttributeEncoder) error {
			e.Uint32(unix.NFTA_HOOK_HOOKNUM, c.hook)
			e.Uint32(unix.NFTA_HOOK_PRIORITY, uint32(c.priority))
			return nil
		})
		e.Uint32(unix.NFTA_CHAIN_POLICY, nfAccept)
		e.String(unix.NFTA_CHAIN_TYPE, "filter")
	})
}

// nfAccept is NF_ACCEPT of linux/netfilter.h.
const nfAccept = 1

func (r rule) message() netlink.Message {
	return message(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_RULE_TABLE, tableName)
		e.String(unix.NFTA_RULE_CHAIN, r.chain)
		e.Nested(unix.NFTA_RULE_EXPRESSIONS, func(e *netlink.AttributeEncoder) error {
			for _, x := range r.exprs {
				e.Do(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, func() ([]byte, error) {
					return expr.Marshal(unix.NFPROTO_INET, x)
				})
			}
			return nil
		})
	})
}

// message is one message about the inet family. What fill writes is short and of
// our own making, so that encoding cannot fail.
func message(kind int, flags netlink.HeaderFlags, fill func(*netlink.AttributeEncoder)) netlink.Message {
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	fill(e)
	attributes, err := e.Encode()
	if err != nil {
		panic("nf_tables message: " + err.Error())
	}
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind), Flags: netlink.Request | flags},
		Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, attributes...),
	}
}

func dialNetfilter() (*netlink.Conn, error) { return netlink.Dial(unix.NETLINK_NETFILTER, nil) }

// answerTime bounds the wait for the kernel, which answers before the send
// returns: it is for surprises.
const answerTime = 5 * time.Second

// transact sends messages as one transaction: all of them, or none and an error.
func transact(c *netlink.Conn, messages []netlink.Message) error {
	if err := c.SetReadDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	messages[len(messages)-1].Header.Flags |= netlink.Acknowledge
	sent, err := c.SendMessages(slices.Concat(edge(unix.NFNL_MSG_BATCH_BEGIN), messages, edge(unix.NFNL_MSG_BATCH_END)))
	if err != nil {
		return err
	}
	last := sent[len(sent)-2].Header.Sequence
	for {
		answers, err := c.Receive()
		if err != nil {
			drain(c)
			return err
		}
		for _, a := range answers {
			if a.Header.Type == netlink.Error && a.Header.Sequence == last {
				return nil
			}
		}
	}
}

// edge begins or ends a transaction.
func edge(kind netlink.HeaderType) []netlink.Message {
	m := netlink.Message{Header: netlink.Header{Type: kind, Flags: netlink.Request}, Data: make([]byte, 4)}
	binary.BigEndian.PutUint16(m.Data[2:], unix.NFNL_SUBSYS_NFTABLES)
	return []netlink.Message{m}
}

// drain reads the further answers to a transaction that failed: one for every
// message with a mistake. They are all there already.
func drain(c *netlink.Conn) {
	if c.SetReadDeadline(time.Now().Add(10*time.Millisecond)) != nil {
		return
	}
	for range 1000 {
		if _, err := c.Receive(); isTimeout(err) {
			return
		}
	}
}

func isTimeout(err error) bool {
	t, ok := err.(interface{ Timeout() bool })
	return ok && t.Timeout()
}

// difference says in what the table differs from s and flags, "" in nothing. It
// looks in the calling thread's namespace.
func (s ruleset) difference(flags uint32) (string, error) {
	t, err := readTable()
	switch {
	case err != nil:
		return "", fmt.Errorf("guard: read table: %w", err)
	case t == nil:
		return "no table", nil
	case t.flags != flags:
		return fmt.Sprintf("table with flags %#x, want %#x", t.flags, flags), nil
	}
	chains, err := readChains()
	if err != nil {
		return "", fmt.Errorf("guard: read chains: %w", err)
	}
	if !slices.Equal(chains, s.chains) {
		return "other chains", nil
	}
	rules, err := readRules()
	if err != nil {
		return "", fmt.Errorf("guard: read rules: %w", err)
	}
	for _, c := range chains {
		same, err := sameRules(rules[c.name], s.of(c.name))
		if err != nil {
			return "", fmt.Errorf("guard: read rules: %w", err)
		}
		if !same {
			return "other rules in chain " + c.name, nil
		}
	}
	return "", nil
}

func (s ruleset) of(chain string) (all [][]expr.Any) {
	for _, r := range s.rules {
		if r.chain == chain {
			all = append(all, r.exprs)
		}
	}
	return all
}

func sameRules(have [][]rawExpr, want [][]expr.Any) (bool, error) {
	if len(have) != len(want) {
		return false, nil
	}
	for i := range have {
		if len(have[i]) != len(want[i]) {
			return false, nil
		}
		for j, x := range want[i] {
			same, err := have[i][j].same(x)
			if err != nil || !same {
				return false, err
			}
		}
	}
	return true, nil
}

// same compares an expression as the kernel tells it with one of ours. Ours takes
// the same way through bytes, so that both have lost the same.
func (r rawExpr) same(x expr.Any) (bool, error) {
	b, err := expr.Marshal(unix.NFPROTO_INET, x)
	if err != nil {
		return false, err
	}
	mine, err := decodeExpr(b)
	if err != nil || mine.name != r.name {
		return false, err
	}
	fresh := func() expr.Any { return reflect.New(reflect.TypeOf(x).Elem()).Interface().(expr.Any) }
	have, want := fresh(), fresh()
	if err := expr.Unmarshal(unix.NFPROTO_INET, r.data, have); err != nil {
		return false, err
	}
	if err := expr.Unmarshal(unix.NFPROTO_INET, mine.data, want); err != nil {
		return false, err
	}
	return reflect.DeepEqual(have, want), nil
}
