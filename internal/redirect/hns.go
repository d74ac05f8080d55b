package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
)

// A Policy is one of Windows' Host Networking Service (HNS), on the endpoint of a
// container. The shapes are those of hnslib v0.1.3 (hcn/hcnpolicy.go); none of them
// has been sent to a real HNS by this project.
type Policy struct {
	Type     string
	Settings any // of this package's own; JSON as HNS takes it
}

// The types of policies.
const (
	PolicyACL      = "ACL"
	PolicyWFPProxy = "L4WFPPROXY"
	PolicyProxy    = "L4Proxy"
)

type aclSettings struct {
	Protocols       string
	Action          string
	Direction       string
	RemoteAddresses string
	RemotePorts     string
	RuleType        string
	Priority        uint16
}

type fiveTuple struct {
	Protocols       string
	RemoteAddresses string
	RemotePorts     string
	Priority        uint16
}

type exceptions struct{}

type wfpProxySettings struct {
	OutboundProxyPort  string
	FilterTuple        fiveTuple
	UserSID            string `json:",omitempty"`
	InboundExceptions  exceptions
	OutboundExceptions exceptions
}

type proxySettings struct {
	IP          string
	Port        string
	Protocol    int
	Destination string
	OutboundNAT bool
}

// protocolTCP is TCP's number, and aclPriority also what tells our rule from
// those of others.
const (
	protocolTCP = "6"
	aclPriority = 169
)

// BlockPolicy drops what a container sends to the service itself. It is for
// containers that have a forward: their calls stay inside. rule is "Switch" where
// the network's switch has VFP (l2bridge, overlay), "Host" elsewhere (nat).
func BlockPolicy(service netip.AddrPort, rule string) Policy {
	return Policy{PolicyACL, aclSettings{
		Protocols: protocolTCP, Action: "Block", Direction: "Out", RemoteAddresses: service.Addr().String(),
		RemotePorts: strconv.Itoa(int(service.Port())), RuleType: rule, Priority: aclPriority,
	}}
}

// WFPProxyPolicy leads a container's calls to a listener on this port in its own
// compartment: a side-car's. What a user with this SID sends is let through; empty
// is nobody's. It needs HNS 13.2 (Server 2022) and process isolation.
func WFPProxyPolicy(service netip.AddrPort, port uint16, userSID string) Policy {
	return Policy{PolicyWFPProxy, wfpProxySettings{
		OutboundProxyPort: strconv.Itoa(int(port)), UserSID: userSID,
		FilterTuple: fiveTuple{Protocols: protocolTCP, RemoteAddresses: service.Addr().String(), RemotePorts: strconv.Itoa(int(service.Port())), Priority: 1},
	}}
}

// ProxyPolicy leads a container's calls to the proxy, on its network's switch. It
// needs VFP (l2bridge, overlay), and HNS 9.5, 10.5, 11.11, 12.1 or 13.1 at least.
func ProxyPolicy(service, proxy netip.AddrPort) Policy {
	return Policy{PolicyProxy, proxySettings{
		IP: service.Addr().String(), Port: strconv.Itoa(int(service.Port())), Protocol: 6, Destination: proxy.String(), OutboundNAT: true,
	}}
}

// JSON is the settings as HNS takes them, for people.
func (p Policy) JSON() string {
	b, _ := json.Marshal(p.Settings) // they are this package's: nothing in them can fail
	return string(b)
}

// policyRequest is what changes an endpoint's policies.
type policyRequest struct {
	ResourceType, RequestType string
	Settings                  struct{ Policies []Policy }
}

// request is the JSON of a change; what is "Add" or "Remove".
func request(what string, p Policy) ([]byte, error) {
	r := policyRequest{ResourceType: "Policy", RequestType: what}
	r.Settings.Policies = []Policy{p}
	return json.Marshal(r)
}

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
	ErrNoEndpoint = errors.New("no endpoint, or several, with this address")
	ErrNoEffect   = errors.New("HNS reported success and did nothing")
)

// Endpoints sets policies on the endpoints of containers, which it knows by their
// address. Each change is read back. Not for concurrent use.
type Endpoints struct{ hns hns }

// Apply sees that an endpoint has these policies, and reports whether one had to
// be added. Errors: ErrNoEndpoint; ErrNoEffect; errors.ErrUnsupported for a policy
// that this HNS does not know, and for a system without HNS: then nothing was
// changed.
func (e *Endpoints) Apply(addr netip.Addr, policies []Policy) (added bool, err error) {
	for _, p := range policies {
		if err := e.hns.supports(p.Type); err != nil {
			return false, fmt.Errorf("policy %s: %w", p.Type, err)
		}
	}
	for _, p := range policies {
		put, err := e.set(addr, p, true)
		added = added || put
		if err != nil {
			return added, err
		}
	}
	return added, nil
}

// Remove sees that an endpoint has none of these policies. An endpoint that is
// gone is no error: its policies went with it.
func (e *Endpoints) Remove(addr netip.Addr, policies []Policy) error {
	for _, p := range slices.Backward(policies) {
		if _, err := e.set(addr, p, false); err != nil && !errors.Is(err, ErrNoEndpoint) {
			return err
		}
	}
	return nil
}

// set brings about that a policy is there, or is not, and reports whether it had to.
func (e *Endpoints) set(addr netip.Addr, p Policy, there bool) (changed bool, err error) {
	ep, err := e.find(addr)
	if err != nil {
		return false, fmt.Errorf("endpoint of %v: %w", addr, err)
	}
	has, err := ep.has(p)
	if err != nil || has == there {
		return false, err
	}
	what := "Add"
	if !there {
		what = "Remove"
	}
	r, err := request(what, p)
	if err != nil {
		return false, err
	}
	if err := e.hns.modify(ep.id, r); err != nil {
		return false, fmt.Errorf("endpoint %s: %s %s: %w", ep.id, what, p.Type, err)
	}
	if ep, err = e.find(addr); err == nil {
		has, err = ep.has(p)
	}
	if err != nil {
		return true, fmt.Errorf("endpoint of %v: read back: %w", addr, err)
	}
	if has != there {
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
	if len(found) != 1 { // networks may overlap: better none than another container's
		return endpoint{}, ErrNoEndpoint
	}
	return found[0], nil
}

// has reports whether a policy is among those that HNS tells of.
func (ep endpoint) has(p Policy) (bool, error) {
	b, err := json.Marshal(p.Settings)
	if err != nil {
		return false, err
	}
	var want any
	if err := json.Unmarshal(b, &want); err != nil {
		return false, err
	}
	return slices.ContainsFunc(ep.policies, func(r rawPolicy) bool {
		var got any
		return r.kind == p.Type && json.Unmarshal(r.settings, &got) == nil && within(want, got)
	}), nil
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
