package redirect

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// restBetween keeps a host whose routes never stand still from keeping us busy.
const restBetween = 50 * time.Millisecond

// Run keeps the guard as it should be until ctx ends, and then returns nil: it
// calls Ensure as soon as the kernel tells that our table, an address, a device or
// a route has changed, and every interval all the same (zero means 10 s). What
// Ensure cannot put right is logged, once, and tried again.
func (g *Guard) Run(ctx context.Context, interval time.Duration) error {
	if interval == 0 {
		interval = 10 * time.Second
	}
	ctx, cancel := context.WithCancelCause(ctx)
	changed := make(chan struct{}, 1)
	var watchers sync.WaitGroup
	defer watchers.Wait()
	defer cancel(nil)
	for _, w := range watches {
		c, err := g.watch(w)
		if err != nil {
			return fmt.Errorf("guard: watch: %w", err)
		}
		context.AfterFunc(ctx, func() { c.Close() })
		watchers.Go(func() { cancel(follow(c, w.about, changed)) })
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for trouble := ""; ; {
		if trouble = g.ensureAndLog(trouble); !pause(ctx, restBetween) {
			return cause(ctx)
		}
		select {
		case <-ctx.Done():
			return cause(ctx)
		case <-changed:
		case <-tick.C:
		}
	}
}

// cause is why Run ends: a watcher that broke, or nil.
func cause(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("guard: watch: %w", err)
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func (g *Guard) ensureAndLog(last string) string {
	_, err := g.Ensure()
	if err == nil {
		return ""
	}
	if err.Error() != last {
		g.log.Error("guard: cannot be put right", "error", err)
	}
	return err.Error()
}

// watchSpec is a kind of notification, and which of them matter.
type watchSpec struct {
	protocol int
	groups   []uint32
	about    func(netlink.Message) bool
}

var watches = []watchSpec{
	{unix.NETLINK_NETFILTER, []uint32{unix.NFNLGRP_NFTABLES}, aboutOurTable},
	{unix.NETLINK_ROUTE, []uint32{
		unix.RTNLGRP_LINK, unix.RTNLGRP_TC, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE,
	}, func(netlink.Message) bool { return true }},
}

// aboutOurTable: in every nf_tables message the first attribute type is the name
// of the table, be it about a table, a chain, a rule, a set or an object.
func aboutOurTable(m netlink.Message) bool {
	if len(m.Data) < 4 || m.Data[0] != unix.NFPROTO_INET {
		return false
	}
	d, err := decoder(m.Data[4:])
	if err != nil {
		return false
	}
	for d.Next() {
		if d.Type() == unix.NFTA_TABLE_NAME {
			return d.String() == tableName
		}
	}
	return false
}

func (g *Guard) watch(w watchSpec) (c *netlink.Conn, err error) {
	err = g.host.Do(func() error {
		if c, err = netlink.Dial(w.protocol, nil); err != nil {
			return err
		}
		for _, group := range w.groups {
			if err := c.JoinGroup(group); err != nil {
				c.Close()
				return err
			}
		}
		return nil
	})
	return c, err
}

// follow signals what matters until the connection is closed.
func follow(c *netlink.Conn, about func(netlink.Message) bool, changed chan<- struct{}) error {
	for {
		messages, err := c.Receive()
		lost := errors.Is(err, unix.ENOBUFS) // more than the socket holds: anything may have changed
		if err != nil && !lost {
			return err
		}
		for _, m := range messages {
			lost = lost || about(m)
		}
		if !lost {
			continue
		}
		select {
		case changed <- struct{}{}:
		default: // is known already
		}
	}
}
