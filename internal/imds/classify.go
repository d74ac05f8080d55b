package imds

import (
	"net/http"
	"slices"
	"strings"
)

const maxBody = 64 << 10 // bytes of a POST's body

// fault is a reason to refuse a request for what it is, whoever sent it.
type fault struct {
	status       int
	reason, text string
}

// The faults, in the order in which they are looked for. Each text is constant:
// nothing that the client sent is repeated to it.
var (
	faultCloud     = fault{400, "cloud", "this metadata protocol is not served here"}
	faultProtocol  = fault{400, "protocol", "only HTTP/1.0 and HTTP/1.1 are served"}
	faultForm      = fault{400, "target_form", "the request target must be a path, such as /metadata/instance"}
	faultLong      = fault{400, "target_too_long", "the request target is longer than 8192 bytes"}
	faultForwarded = fault{400, "forwarding_header", "the request carries a header of a proxy (X-Forwarded-For, Forwarded, Via or the like): call the metadata service directly"}
	faultHost      = fault{400, "host", "the Host header does not name the metadata service"}
	faultPath      = fault{400, "path", "the path is not in plain form: no escapes, empty or dot segments"}
	faultMethod    = fault{405, "method", "method not allowed"}
	faultHop       = fault{400, "connection_header", "Upgrade, HTTP2-Settings, Expect and connection options other than keep-alive and close are not supported"}
	faultMissing   = fault{400, "metadata_header_missing", "Required metadata header not specified"}
	faultInvalid   = fault{400, "metadata_header_invalid", "Required metadata header not specified"}
	faultBody      = fault{400, "body", "a request body is not allowed here"}
	faultChunked   = fault{400, "transfer_encoding", "Transfer-Encoding is not supported"}
	faultLength    = fault{400, "content_length_missing", "Content-Length is required"}
	faultTooLarge  = fault{400, "body_too_large", "the request body is larger than 65536 bytes"}
	faultTooMany   = fault{400, "too_many_parameters", "the query has more than 16 parameters"}
	faultQuery     = fault{400, "query", "the query is not in plain form: name=value pairs joined by &"}
	faultParameter = fault{400, "unknown_parameter", "the query has a parameter that this endpoint does not know"}
	faultDuplicate = fault{400, "duplicate_parameter", "the query names a parameter twice"}
	faultSelector  = fault{400, "identity_empty", "client_id, object_id and msi_res_id must not be empty"}
	faultSelectors = fault{400, "identity_ambiguous", "at most one of client_id, object_id, msi_res_id may be given"}
)

// Classify returns the canonical form of a request that a server received, or
// why it is refused whoever sent it. hosts are the Host values accepted besides
// 169.254.169.254 and [fd00:ec2::254], written as in a Host header (an IPv6
// address in brackets); each also with the port 80 named.
//
// It looks at the request line and the headers as they came and never at r.URL,
// whose parser repairs what must be refused. Exactly one result is meaningful
// for serving; beside a Refusal the Query holds what had been understood so far,
// fit for records alone: its Method, Path and Action may be empty.
//
// api-version is left to the service to check (protocol-azure §2).
func Classify(c Cloud, r *http.Request, hosts ...string) (Query, *Refusal) {
	path, query, _ := strings.Cut(r.RequestURI, "?")
	q := Query{Cloud: c, Family: azureFamily(path)}
	e, why := classify(&q, r, path, query, hosts)
	if why == nil {
		return q, nil
	}
	f := &Refusal{Status: why.status, Reason: why.reason, Text: why.text, Family: q.Family}
	if why == &faultMethod {
		f.Allow = e.allow()
	}
	return q, f
}

// classify fills q in as far as it gets. The order matters: a forwarding header
// outranks all that a relay could have spoiled, and a missing Metadata header
// outranks the query, since clients probe with and without one (§8).
func classify(q *Query, r *http.Request, path, query string, hosts []string) (*endpoint, *fault) {
	h := inspect(r.Header)
	switch {
	case q.Cloud != Azure:
		return &unknownTree, &faultCloud
	case r.Proto != "HTTP/1.1" && r.Proto != "HTTP/1.0":
		return &unknownTree, &faultProtocol
	case r.Method == http.MethodConnect:
		return &unknownTree, &faultMethod
	case path == "" || path[0] != '/':
		return &unknownTree, &faultForm
	case len(r.RequestURI) > maxTarget:
		return &unknownTree, &faultLong
	case h.forwarded:
		return &unknownTree, &faultForwarded
	case !hostAllowed(r.Host, hosts):
		return &unknownTree, &faultHost
	case !plainPath(path):
		return &unknownTree, &faultPath
	}
	var e *endpoint
	e, q.Path = azureEndpoint(path)
	q.Action, q.Covers = e.action(r.Method), e.covers
	if q.Action == "" {
		return e, &faultMethod
	}
	q.Method = r.Method
	if q.Action == InstanceRead {
		q.Subtree = subtreeOf(q.Path)
	}
	if why := h.fault(r); why != nil {
		return e, why
	}
	var why *fault
	if q.Params, why = parseQuery(query, e.params); why != nil {
		return e, why
	}
	if _, ok := q.Param(extendedParam); ok && e.params != nil {
		q.extend()
	}
	return e, selectorFault(q)
}

// extend makes of a query for the instance document one for the extended one.
func (q *Query) extend() { q.Action, q.Subtree, q.Covers = InstanceProvisioning, "", withInstance }

// plainPath reports whether every parser reads the path alike: letters, digits,
// "-._~" and single slashes, no dot at either end of a segment. That covers "."
// and ".."; other such dots are dropped by parsers that think of Windows files.
func plainPath(path string) bool {
	last := byte('/')
	for i := 1; i < len(path); i++ {
		b := path[i]
		switch {
		case b == '/' && (last == '/' || last == '.'), b == '.' && last == '/':
			return false
		case b != '/' && !isUnreserved(b):
			return false
		}
		last = b
	}
	return last != '.'
}

func hostAllowed(host string, more []string) bool {
	if isHost(host, "169.254.169.254") || isHost(host, "[fd00:ec2::254]") {
		return true
	}
	for _, m := range more {
		if m != "" && isHost(host, m) {
			return true
		}
	}
	return false
}

func isHost(host, want string) bool {
	return equalFold(host, want) ||
		hasPrefixFold(host, want) && host[len(want):] == ":80"
}

// fault looks at what goes with the request: connection options, the cloud's
// own header, the body.
func (h *headers) fault(r *http.Request) *fault {
	switch {
	case h.hop:
		return &faultHop
	case h.metadata == 0:
		return &faultMissing
	case h.metadata > 1 || !h.metadataTrue:
		return &faultInvalid
	}
	if r.Method != http.MethodPost {
		if r.ContentLength != 0 || h.chunked || len(r.TransferEncoding) > 0 {
			return &faultBody
		}
		return nil
	}
	switch {
	case h.chunked || len(r.TransferEncoding) > 0:
		return &faultChunked
	case r.ContentLength < 0 || r.ContentLength == 0 && !h.length:
		return &faultLength
	case r.ContentLength > maxBody:
		return &faultTooLarge
	}
	return nil
}

// selectorFault refuses more than one selector of an identity, because which
// one wins is not documented, and an empty one, because it may stand for the
// default identity (protocol-azure §5).
func selectorFault(q *Query) *fault {
	if q.Family != Identity {
		return nil
	}
	n := 0
	for i := range q.Params {
		if slices.Contains(selectors, q.Params[i].Name) {
			n++
			if q.Params[i].Value == "" {
				return &faultSelector
			}
		}
	}
	if n > 1 {
		return &faultSelectors
	}
	return nil
}
