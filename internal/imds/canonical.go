package imds

import "net/http"

// Canonical classifies a request of which only the method and the target, path
// and query, are known: all else is as the cloud's clients send it. A POST has a
// body of no bytes.
func Canonical(c Cloud, method, target string) (Query, *Refusal) {
	r := &http.Request{
		Method: method, RequestURI: target, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Host: "169.254.169.254",
		Header: http.Header{"Metadata": {"true"}},
	}
	if method == http.MethodPost {
		r.Header["Content-Length"] = []string{"0"}
	}
	return Classify(c, r)
}

// TokenQuery is the request for a token as SDKs make it: the version is the one
// that they pin (protocol-azure §5), and no identity is named.
func TokenQuery(c Cloud, resource string) Query {
	return Query{
		Cloud: c, Action: IdentityToken, Method: http.MethodGet, Path: "/metadata/identity/oauth2/token", Family: Identity,
		Params: []Param{{"api-version", "2018-02-01"}, {"resource", resource}},
	}
}
