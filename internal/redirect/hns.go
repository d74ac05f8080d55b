package redirect

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
)

// A Policy is one of Windows' Host Networking Service (HNS), on the endpoint of a
// container. The shapes are those of hnslib v0.1.3 (hcn/hcnpolicy.go); none of them
// has been sent to a real HNS by this project.
type Policy struct {
	Type     string
	Settings any // of this package's own: settings; JSON as HNS takes it
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

// settings are a policy's, as far as they say whose it is.
type settings interface {
	target() string                         // what tells ours from others': the same whatever it leads to
	read(json.RawMessage) (settings, error) // of the same kind
}

func readAs[S settings](b json.RawMessage) (settings, error) {
	var s S
	err := json.Unmarshal(b, &s)
	return s, err
}

// Others may allow what ours blocks: that is theirs.
func (s aclSettings) target() string {
	return fmt.Sprint(s.RemoteAddresses, " ", s.RemotePorts, " ", s.Priority, " ", s.Action, " ", s.Direction)
}
func (s wfpProxySettings) target() string {
	return s.FilterTuple.RemoteAddresses + " " + s.FilterTuple.RemotePorts
}
func (s proxySettings) target() string { return s.IP + " " + s.Port }

func (s aclSettings) read(b json.RawMessage) (settings, error) { return readAs[aclSettings](b) }
func (s wfpProxySettings) read(b json.RawMessage) (settings, error) {
	return readAs[wfpProxySettings](b)
}
func (s proxySettings) read(b json.RawMessage) (settings, error) { return readAs[proxySettings](b) }

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
