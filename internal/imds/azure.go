package imds

import (
	"slices"
	"strings"
)

// endpoint is one row of the table in protocol-azure §3.
type endpoint struct {
	path   string   // documented form; empty for those of azureTrees
	read   Action   // what GET and HEAD stand for; empty when they are refused
	write  Action   // what POST stands for; empty when it is refused
	params []string // documented parameter names; nil: any name of the shape plainName
	covers []Action // see Query.Covers
}

// Parameter lists of more than one endpoint. A name that is not on its
// endpoint's list is refused: it may select something that policy has no word for.
var (
	versionOnly   = []string{"api-version"}
	versionFormat = []string{"api-version", "format"}
	selectors     = []string{clientID, objectID, resourceID, oldResourceID}
	credential    = append([]string{"api-version", "cred-api-version", "bypass_cache", "cid", "uaid"}, selectors...)
	withUserdata  = []Action{InstanceUserdata}
	withInstance  = []Action{InstanceRead, InstanceUserdata} // of the extended document
)

// extendedParam turns a read of /metadata/instance into one of provisioning
// data, whatever its value (protocol-azure §4).
const extendedParam = "extended"

// extendedKey is the key of what that adds to the document.
const extendedKey = "extended"

var azureEndpoints = []endpoint{
	// The bare root answers 400 with the list of newest versions: it is no
	// more than a reading of versions, so it is classified as one.
	{path: "/metadata", read: VersionsRead, params: versionFormat},
	{path: "/metadata/versions", read: VersionsRead, params: versionFormat},
	{path: "/metadata/instance", read: InstanceRead, covers: withUserdata,
		params: []string{"api-version", "format", extendedParam}},
	{path: "/metadata/instance/compute", read: InstanceRead, covers: withUserdata, params: versionFormat},
	{path: "/metadata/reprovisiondata", read: InstanceProvisioning, params: versionOnly},
	{path: "/metadata/attested/document", read: IdentityDocument, params: []string{"api-version", "format", "nonce"}},
	{path: "/metadata/identity/oauth2/token", read: IdentityToken,
		params: append([]string{"api-version", "resource", "authority", "bypass_cache", "claims"}, selectors...)},
	{path: "/metadata/identity/info", read: IdentityInfo, params: versionOnly},
	{path: "/metadata/identity/getplatformmetadata", read: IdentityCredential, params: credential},
	{path: "/metadata/identity/issuecredential", write: IdentityCredential, params: credential},
	{path: "/metadata/identity/credential", write: IdentityCredential, params: credential},
	{path: "/metadata/scheduledevents", read: EventsRead, write: EventsApprove, params: versionOnly},
	{path: "/metadata/loadbalancer", read: NetworkBalancer, params: versionFormat},
	{path: "/metadata/v1", read: LegacyRead},
}

// Endpoints that match more than one path, or by more than the path.
var (
	legacyTree   = endpoint{read: LegacyRead}
	unknownTree  = endpoint{read: Unknown}
	instanceTree = endpoint{read: InstanceRead, params: versionFormat}
	userdataTree = endpoint{read: InstanceUserdata, params: versionFormat}
	extendedTree = endpoint{read: InstanceProvisioning, params: versionFormat}
)

// azureTrees names them for people; "…" is any rest.
var azureTrees = []struct {
	action  Action
	pattern string
}{
	{InstanceRead, "/metadata/instance/compute/…"},
	{InstanceRead, "/metadata/instance/network…"},
	{InstanceUserdata, "/metadata/instance/…/userData…"},
	{InstanceUserdata, "/metadata/instance/…/customData…"},
	{InstanceProvisioning, "/metadata/instance?extended=…"},
	{InstanceProvisioning, "/metadata/instance/extended…"},
	{LegacyRead, "/metadata/v1/…"},
	{Unknown, "/…"},
}

// Paths lists what an action stands for, for people: "GET /metadata/versions". A
// path with "…" is one of many, "/…" all that no other action has. HEAD is allowed
// wherever GET is and not listed. It is nil for an action that the cloud lacks.
func Paths(c Cloud, a Action) []string {
	if c != Azure || a == "" {
		return nil
	}
	var out []string
	for i := range azureEndpoints {
		e := &azureEndpoints[i]
		if e.read == a {
			out = append(out, "GET "+e.path)
		}
		if e.write == a {
			out = append(out, "POST "+e.path)
		}
	}
	for _, t := range azureTrees {
		if t.action == a {
			out = append(out, "GET "+t.pattern)
		}
	}
	return out
}

// azureByPath finds an endpoint by its path in lower case.
var azureByPath = func() map[string]*endpoint {
	m := make(map[string]*endpoint, len(azureEndpoints))
	for i := range azureEndpoints {
		m[strings.ToLower(azureEndpoints[i].path)] = &azureEndpoints[i]
	}
	return m
}()

// Endpoint is a documented path of a service, for those who check that they
// have thought of all of it.
type Endpoint struct {
	Path    string
	Methods []string // GET, which HEAD goes with, and POST
	Params  []string // documented names; nil: any plain name
}

// Endpoints lists the endpoints of a cloud that have one path each; trees of
// paths, and what is not documented, are not among them. None for a cloud that
// is not served.
func Endpoints(c Cloud) []Endpoint {
	if c != Azure {
		return nil
	}
	list := make([]Endpoint, 0, len(azureEndpoints))
	for i := range azureEndpoints {
		e := &azureEndpoints[i]
		x := Endpoint{Path: e.path, Params: slices.Clone(e.params)}
		if e.read != "" {
			x.Methods = append(x.Methods, "GET")
		}
		if e.write != "" {
			x.Methods = append(x.Methods, "POST")
		}
		list = append(list, x)
	}
	return list
}

// action is what the method stands for here, or "" when it is refused.
func (e *endpoint) action(method string) Action {
	switch method {
	case "GET", "HEAD":
		return e.read
	case "POST":
		return e.write
	}
	return ""
}

// allow is the value of the Allow header of a 405.
func (e *endpoint) allow() string {
	switch {
	case e.write == "":
		return "GET, HEAD"
	case e.read == "":
		return "POST"
	}
	return "GET, HEAD, POST"
}

const (
	instanceRoot   = "/metadata/instance"
	instancePrefix = instanceRoot + "/"
	legacyPrefix   = "/metadata/v1/"
	identityPrefix = "/metadata/identity"
)

// azureEndpoint finds the endpoint of a path that passed checkPath, and the
// path's canonical form. Every path has one: what is not in the table is
// unknownTree and keeps its letter case, since there is no documented one.
func azureEndpoint(path string) (*endpoint, string) {
	if len(path) > 1 && path[len(path)-1] == '/' {
		path = path[:len(path)-1]
	}
	var buf [64]byte
	if low, ok := lower(buf[:0], path); ok {
		if e := azureByPath[string(low)]; e != nil {
			return e, e.path
		}
	}
	switch {
	case hasPrefixFold(path, instancePrefix):
		return azureInstance(path)
	case hasPrefixFold(path, legacyPrefix):
		return &legacyTree, respell(path, legacyPrefix)
	}
	return &unknownTree, path
}

// azureFamily is the error shape of a path, also of one that is refused for its
// spelling (protocol-azure §6).
func azureFamily(path string) Family {
	if !hasPrefixFold(path, identityPrefix) {
		return General
	}
	if rest := path[len(identityPrefix):]; rest != "" && (isLetter(rest[0]) || isDigit(rest[0])) {
		return General
	}
	return Identity
}
