// Package imds is the vocabulary of instance metadata services: which cloud,
// which action a request stands for, its one canonical form, and how that cloud
// words a refusal. It is pure: it reads a request and returns values.
//
// Protocol facts cite the section of docs/protocol-azure.md that holds their source.
package imds

import "fmt"

// Cloud names a metadata protocol.
type Cloud string

// Azure is Microsoft Azure's Instance Metadata Service.
const Azure Cloud = "azure"

// Action is what a request asks for, in words that are the same on every cloud.
// Policy speaks of actions, never of paths.
type Action string

// The actions. Secret reports which of them hand out credentials or secrets.
const (
	VersionsRead         Action = "versions.read"         // which API versions exist
	InstanceRead         Action = "instance.read"         // facts about the VM
	InstanceUserdata     Action = "instance.userdata"     // user data and custom data
	InstanceProvisioning Action = "instance.provisioning" // data for a VM that is being provisioned
	IdentityInfo         Action = "identity.info"         // tenant of the VM's identity
	IdentityToken        Action = "identity.token"        // an access token of a managed identity
	IdentityCredential   Action = "identity.credential"   // a certificate to get tokens with (MSI v2)
	IdentityDocument     Action = "identity.document"     // signed proof of which VM this is
	EventsRead           Action = "events.read"           // scheduled maintenance
	EventsApprove        Action = "events.approve"        // start scheduled maintenance early
	NetworkBalancer      Action = "network.balancer"      // load balancer facts
	LegacyRead           Action = "legacy.read"           // endpoints older than the Metadata header
	Unknown              Action = "unknown"               // an endpoint that is not on the list
)

// Actions lists every action, Unknown last. The caller owns the slice.
func Actions() []Action {
	return []Action{
		VersionsRead, InstanceRead, InstanceUserdata, InstanceProvisioning,
		IdentityInfo, IdentityToken, IdentityCredential, IdentityDocument,
		EventsRead, EventsApprove, NetworkBalancer, LegacyRead, Unknown,
	}
}

// ParseAction is the inverse of string(Action). It accepts the documented
// spelling alone and is an error for anything else, the empty string too.
func ParseAction(s string) (Action, error) {
	for _, a := range Actions() {
		if string(a) == s {
			return a, nil
		}
	}
	return "", fmt.Errorf("unknown action %q", s)
}

// Secret reports whether the answer to the action holds credentials, secrets or
// a signed proof of identity: such answers are kept in memory alone and their
// bodies are never recorded. An action that is not on the list is secret, since
// nobody has shown that it is not.
func (a Action) Secret() bool {
	switch a {
	case VersionsRead, InstanceRead, IdentityInfo, EventsRead, EventsApprove, NetworkBalancer, LegacyRead:
		return false
	}
	return true
}

// Family is the shape of an endpoint's error bodies (protocol-azure §6).
type Family uint8

const (
	// General errors are {"error": "text"}.
	General Family = iota
	// Identity errors are {"error":"code","error_description":"text"}.
	Identity
)

// Param is one decoded pair of the query.
type Param struct{ Name, Value string }

// Query is a request in canonical form: two requests that the service would
// answer alike have the same Query, and what is forwarded is made from it.
// Its slices may be shared between queries and must not be modified.
type Query struct {
	Cloud  Cloud
	Action Action

	// Covers lists further actions whose data is part of the answer, because
	// the request is for an ancestor of theirs. A caller that may do Action
	// but not one of these must not see that part: see Blank.
	Covers []Action

	// Subtree is the part of the instance document that InstanceRead asks for:
	// keys joined by "/", documented ones in documented letter case, array
	// indexes left out ("network/interface/ipv4"). Empty for all of it, and for
	// every other action.
	Subtree string

	Method string  // GET, HEAD or POST
	Path   string  // starts with a slash, documented letter case, no trailing slash
	Params []Param // sorted by name; names are unique and in documented letter case
	Family Family
}
