package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// endpoint is a container's place on a network, with its policies as HNS has them.
type endpoint struct {
	id       string
	addrs    []netip.Addr
	policies []rawPolicy
}

type rawPolicy struct {
	kind     string
	settings json.RawMessage
}

// hns is what is used of the service, so that tests can play it.
type hns interface {
	supports(policy string) error // errors.ErrUnsupported
	endpoints() ([]endpoint, error)
	modify(id string, request []byte) error
}

// Errors of Endpoints.
var (
	ErrNoEndpoint = errors.New("no endpoint with this address")
	ErrEndpoints  = errors.New("several endpoints with this address") // networks overlap: better none than another container's
	ErrNoEffect   = errors.New("HNS reported success and did nothing")
)

// Endpoints sets policies on the endpoints of containers, which it knows by their
// address. Each change is read back. Not for concurrent use.
type Endpoints struct{ hns hns }

// Apply sees that an endpoint has these policies, and no other of ours with the same
// target, as one that leads to an old proxy; and reports whether something had to
// change. Errors: ErrNoEndpoint; ErrEndpoints; ErrNoEffect; errors.ErrUnsupported for
// a policy that this HNS does not know, and for a system without HNS: then nothing
// was changed.
func (e *Endpoints) Apply(addr netip.Addr, policies []Policy) (changed bool, err error) {
	for _, p := range policies {
		if err := e.hns.supports(p.Type); err != nil {
			return false, fmt.Errorf("policy %s: %w", p.Type, err)
		}
	}
	for _, p := range policies {
		steps := []func(netip.Addr, Policy) (bool, error){e.clearOthers, e.add}
		if p.Type == PolicyACL {
			slices.Reverse(steps) // what blocks is there at each moment
		}
		for _, step := range steps {
			did, err := step(addr, p)
			changed = changed || did
			if err != nil {
				return changed, err
			}
		}
	}
	return changed, nil
}

// Remove sees that an endpoint has none of these policies, and none with the same
// target: what one leads to does not matter. An endpoint that is gone is no error:
// its policies went with it. Errors: ErrEndpoints; ErrNoEffect.
func (e *Endpoints) Remove(addr netip.Addr, policies []Policy) error {
	for _, p := range slices.Backward(policies) {
		if _, err := e.clear(addr, p, func(rawPolicy, Policy) bool { return false }); err != nil && !errors.Is(err, ErrNoEndpoint) {
			return err
		}
	}
	return nil
}

// add brings about that a policy is there, and reports whether it had to.
func (e *Endpoints) add(addr netip.Addr, p Policy) (changed bool, err error) {
	ep, err := e.find(addr)
	if err != nil {
		return false, err
	}
	if ep.has(p) {
		return false, nil
	}
	return e.change(addr, ep, "Add", p, true)
}

// clearOthers removes policies with a policy's target, but not itself.
func (e *Endpoints) clearOthers(addr netip.Addr, p Policy) (changed bool, err error) {
	return e.clear(addr, p, rawPolicy.is)
}

// clear removes policies with a policy's target, except those to keep.
func (e *Endpoints) clear(addr netip.Addr, p Policy, keep func(rawPolicy, Policy) bool) (changed bool, err error) {
	ep, err := e.find(addr)
	if err != nil {
		return false, err
	}
	for _, o := range ep.like(p, keep) {
		did, err := e.change(addr, ep, "Remove", o, false)
		changed = changed || did
		if err != nil {
			return changed, err
		}
	}
	return changed, nil
}

// change asks for a change and looks whether it has come about.
func (e *Endpoints) change(addr netip.Addr, ep endpoint, what string, p Policy, there bool) (changed bool, err error) {
	r, err := request(what, p)
	if err != nil {
		return false, err
	}
	if err := e.hns.modify(ep.id, r); err != nil {
		return false, fmt.Errorf("endpoint %s: %s %s: %w", ep.id, what, p.Type, err)
	}
	again, err := e.find(addr)
	if err != nil {
		return true, fmt.Errorf("read back: %w", err)
	}
	if again.has(p) != there {
		return false, fmt.Errorf("endpoint %s: %s %s: read back: %w", ep.id, what, p.Type, ErrNoEffect)
	}
	return true, nil
}

func (e *Endpoints) find(addr netip.Addr) (endpoint, error) {
	all, err := e.hns.endpoints()
	if err != nil {
		return endpoint{}, err
	}
	var found []endpoint
	for _, ep := range all {
		if slices.Contains(ep.addrs, addr) {
			found = append(found, ep)
		}
	}
	switch len(found) {
	case 0:
		return endpoint{}, fmt.Errorf("endpoint of %v: %w", addr, ErrNoEndpoint)
	case 1:
		return found[0], nil
	}
	return endpoint{}, fmt.Errorf("endpoint of %v: %w", addr, ErrEndpoints)
}

// like are the policies that HNS tells of with a policy's type and target, each once,
// in the form that this package gives them; except those to keep.
func (ep endpoint) like(p Policy, keep func(rawPolicy, Policy) bool) (found []Policy) {
	want := p.Settings.(settings)
	for _, r := range ep.policies {
		if r.kind != p.Type || keep(r, p) {
			continue
		}
		s, err := want.read(r.settings)
		if err == nil && s.target() == want.target() && !slices.Contains(found, Policy{r.kind, s}) {
			found = append(found, Policy{r.kind, s})
		}
	}
	return found
}

// has reports whether a policy is among those that HNS tells of.
func (ep endpoint) has(p Policy) bool {
	return slices.ContainsFunc(ep.policies, func(r rawPolicy) bool { return r.is(p) })
}

// is reports whether HNS tells of this policy.
func (r rawPolicy) is(p Policy) bool {
	var want, got any
	return r.kind == p.Type && json.Unmarshal([]byte(p.JSON()), &want) == nil && json.Unmarshal(r.settings, &got) == nil && within(want, got)
}

// within reports whether got has all that want says: HNS adds what it takes for
// granted, and leaves out what is empty.
func within(want, got any) bool {
	w, ok := want.(map[string]any)
	if !ok {
		return want == got
	}
	g, _ := got.(map[string]any)
	for k, v := range w {
		if empty, ok := v.(map[string]any); ok && len(empty) == 0 {
			continue
		}
		if !within(v, g[k]) {
			return false
		}
	}
	return true
}
