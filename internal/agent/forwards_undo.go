package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"imdsgate/internal/discover"
)

// Undo takes back what Run has given, also what one before has, and also while there
// is no proxy: side-cars, and policies at each address of a client. It tells forwards
// in clients to end, which they do within a second, and does not wait for that. A
// client that may have policies and has no address to find them by is an error.
func (f *Forwards) Undo(ctx context.Context) error {
	s, err := f.Clients.Look(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range s.Clients {
		if c.Sidecar != "" {
			s.Orphans = append(s.Orphans, c.Sidecar)
		}
		if f.By == ByExec {
			errs = append(errs, f.Clients.Put(ctx, c.ID, map[string][]byte{endFile: []byte(time.Now().String())}))
		}
		errs = append(errs, f.clear(c))
	}
	for _, id := range s.Orphans {
		errs = append(errs, f.Clients.RemoveSidecar(ctx, id))
	}
	return errors.Join(errs...)
}

// ErrNoAddress is that a client's policies cannot be found.
var ErrNoAddress = errors.New("the client has no address: its policies cannot be looked for")

// clear removes a client's policies.
func (f *Forwards) clear(c discover.Client) error {
	ps := f.wanted(c)
	if len(ps) == 0 {
		return nil
	}
	if len(c.Addrs) == 0 {
		return fmt.Errorf("client %s: %w", c.Name, ErrNoAddress)
	}
	var errs []error
	for _, a := range c.Addrs {
		errs = append(errs, f.HNS.Remove(a, ps))
	}
	return errors.Join(errs...)
}
