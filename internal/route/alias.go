package route

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// ErrDuplicate is returned for an address that a neighbour has.
var ErrDuplicate = errors.New("the address is in use on this network")

const (
	// aliasPoll is between looks at an address that cannot be used yet, and
	// aliasWait how long that may take: duplicate address detection needs about
	// three seconds where it is not optimistic (CreateUnicastIpAddressEntry).
	aliasPoll = 100 * time.Millisecond
	aliasWait = 10 * time.Second
)

// Alias is an address that this machine, or this container, has beside its own,
// so that calls to it stay here. Not for concurrent use.
type Alias struct {
	table
	addr  netip.Addr
	mine  *address                             // that we added
	after func(time.Duration) <-chan time.Time // time.After, but in tests
}

// add makes the address usable, unless it is there already: then it is left alone
// throughout.
func (a *Alias) add(ctx context.Context) error {
	there, err := a.addresses(a.addr)
	if err != nil {
		return fmt.Errorf("address %v: %w", a.addr, err)
	}
	if len(there) == 0 {
		if err := a.put(); err != nil {
			return errors.Join(fmt.Errorf("address %v: %w", a.addr, err), a.Remove())
		}
	}
	if err := a.await(ctx); err != nil {
		return errors.Join(fmt.Errorf("address %v: %w", a.addr, err), a.Remove())
	}
	return nil
}

// put adds it to the interface of the default route.
func (a *Alias) put() error {
	def, err := best(a, a.addr)
	if err != nil {
		return err
	}
	mine := address{addr: a.addr, link: def.link}
	switch err := a.addAddress(mine); {
	case errors.Is(err, errExists): // somebody was faster
		return nil
	case err != nil:
		return err
	}
	a.mine = &mine
	return nil
}

// await waits until the address can be used. That an address was added and is
// nowhere is not a matter of time.
func (a *Alias) await(ctx context.Context) error {
	for waited := time.Duration(0); ; waited += aliasPoll {
		there, err := a.addresses(a.addr)
		switch {
		case err != nil:
			return fmt.Errorf("read back: %w", err)
		case len(there) == 0:
			return fmt.Errorf("read back: %w", ErrNotThere)
		case slices.ContainsFunc(there, func(x address) bool { return x.state == preferred || x.state == deprecated }):
			return nil
		case there[0].state == duplicate:
			return ErrDuplicate
		case there[0].state != tentative:
			return errors.New("the system says that it is not valid")
		case waited >= aliasWait:
			return fmt.Errorf("not usable after %v", aliasWait)
		}
		select {
		case <-a.after(aliasPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Ours reports whether the address was added here, and will be removed.
func (a *Alias) Ours() bool { return a.mine != nil }

// Link is the name of the interface that has the address.
func (a *Alias) Link() string {
	there, err := a.addresses(a.addr)
	if err != nil || len(there) == 0 {
		return "?"
	}
	return a.name(there[0].link)
}

// Ensure puts the address back if it was taken away, whoever had added it, and
// reports whether it had to.
func (a *Alias) Ensure(ctx context.Context) (repaired bool, err error) {
	there, err := a.addresses(a.addr)
	if err != nil || len(there) > 0 {
		return false, err
	}
	a.mine = nil
	return true, a.add(ctx)
}

// Remove takes the address away if it was added here. What is gone already is no
// error; what stays although the system says otherwise is ErrNotThere.
func (a *Alias) Remove() error {
	if a.mine == nil {
		return nil
	}
	mine := *a.mine
	if err := a.deleteAddress(mine); err != nil && !errors.Is(err, errGone) {
		return fmt.Errorf("remove address %v: %w", a.addr, err)
	}
	there, err := a.addresses(a.addr)
	if err != nil {
		return fmt.Errorf("remove address %v: read back: %w", a.addr, err)
	}
	if slices.ContainsFunc(there, func(x address) bool { return x.link == mine.link }) {
		return fmt.Errorf("remove address %v: read back: %w", a.addr, ErrNotThere)
	}
	a.mine = nil
	return nil
}
