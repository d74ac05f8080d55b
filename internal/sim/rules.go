package sim

import (
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// call is a request that has passed the rules which all endpoints share.
type call struct {
	*http.Request
	path    string            // as asked, without one trailing slash
	family  family            // how it wants its errors
	query   map[string]string // decoded; names are unique
	version string            // "" where none is needed
	faults  effects
}

// endpoint is a row of docs/protocol-azure.md §1.3.
type endpoint struct {
	path    string
	tree    bool     // everything below the path as well
	methods string   // as in an Allow header
	own     []string // api-versions; nil means the VM's
	since   string   // first api-version; "" means that none is needed
	serve   func(*Server, *call) reply
}

// endpoints lists what the service has. What is not here is a 404, and that on
// purpose: getplatformmetadata, issuecredential and credential (MSI v2) hand out
// certificates that the simulator has no Entra to redeem at, and clients take
// the 404 for a host without MSI v2 and fall back to tokens; /metadata/v1 is
// from before 2017; /metadata/maintenance was never seen.
var endpoints = []endpoint{
	{path: "/metadata/versions", methods: "GET", serve: (*Server).versions},
	{path: "/metadata/instance", tree: true, methods: "GET", since: "2017-04-02", serve: (*Server).instance},
	{path: "/metadata/attested/document", methods: "GET", since: "2018-10-01", serve: (*Server).attested},
	{path: tokenPath, methods: "GET", since: "2018-02-01", serve: (*Server).token},
	{path: "/metadata/identity/info", methods: "GET", since: "2018-02-01", serve: (*Server).identityInfo},
	{path: "/metadata/scheduledevents", methods: "GET, POST", own: eventVersions, since: "2017-08-01", serve: (*Server).scheduledEvents},
	{path: "/metadata/loadbalancer", methods: "GET", since: "2020-10-01", serve: (*Server).loadBalancer},
	{path: "/metadata/reprovisiondata", methods: "GET", since: "2019-06-01", serve: (*Server).reprovisionData},
}

const (
	tokenPath    = "/metadata/identity/oauth2/token"
	identityRoot = "/metadata/identity"
	instanceRoot = "/metadata/instance"
	legacyRoot   = "/metadata/v1"
)

// within tells whether path is root or below it.
func within(path, root string) bool {
	rest, ok := strings.CutPrefix(path, root)
	return ok && (rest == "" || rest[0] == '/')
}

// match finds the endpoint of a path.
func match(path string) *endpoint {
	for i, e := range endpoints {
		if path == e.path || e.tree && within(path, e.path) {
			return &endpoints[i]
		}
	}
	return nil
}

// offered are the api-versions of an endpoint, oldest first.
func (s *Server) offered(e *endpoint) []string {
	if e.own != nil {
		return e.own
	}
	return since(s.vm.Versions, e.since)
}

// answer applies the rules of docs/protocol-azure.md §1.2 and asks the endpoint.
// The order in which a request with several faults is told of them is not
// published: header first is what every capture shows.
func (s *Server) answer(c *call) reply {
	route := s.fold(c.path)
	if within(route, legacyRoot) {
		return failure(general, http.StatusNotFound) // asked for no header when it existed
	}
	if v := strings.Join(c.Header.Values("Metadata"), ","); !strings.EqualFold(strings.TrimSpace(v), "true") {
		return badRequest(c.family, "Required metadata header not specified")
	}
	if _, ok := c.Header["X-Forwarded-For"]; ok {
		return badRequest(c.family, "X-Forwarded-For header is not allowed")
	}
	var why string
	if c.query, why = s.parseQuery(c.URL.RawQuery); why != "" {
		return badRequest(c.family, why)
	}
	e := match(route)
	switch {
	case route == "/metadata":
		return badVersion(s.vm.Versions)
	case e == nil:
		return failure(c.family, http.StatusNotFound)
	case !slices.Contains(strings.Split(e.methods, ", "), c.Method):
		a := failure(c.family, http.StatusMethodNotAllowed)
		a.allow = e.methods
		return a
	}
	if e.since != "" {
		c.version = c.query["api-version"]
		if !slices.Contains(s.offered(e), c.version) {
			return badVersion(s.offered(e))
		}
	}
	return e.serve(s, c)
}

// parseQuery decodes a query whose names are unique, or says why not.
func (s *Server) parseQuery(raw string) (map[string]string, string) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return nil, "Query string is invalid"
	}
	out := make(map[string]string, len(values))
	for name, v := range values {
		name = s.fold(name)
		if _, twice := out[name]; twice || len(v) > 1 {
			return nil, "Duplicate query parameter"
		}
		out[name] = v[0]
	}
	return out, ""
}

// fold is the form in which names are compared.
func (s *Server) fold(name string) string {
	if s.anyCase {
		return strings.ToLower(name)
	}
	return name
}

func familyOf(path string) family {
	if within(strings.ToLower(path), identityRoot) {
		return identity
	}
	return general
}
