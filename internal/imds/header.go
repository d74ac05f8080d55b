package imds

import (
	"net/http"
	"slices"
	"strings"
)

// headers is what Classify needs to know of a request's header fields.
type headers struct {
	metadata     int  // how many Metadata values there are
	metadataTrue bool // whether the last of them is "true"
	forwarded    bool // something between the client and us has left its mark
	hop          bool // asks for another protocol or an unusual connection
	chunked      bool // Transfer-Encoding
	length       bool // Content-Length
}

// class is what a header field means to Classify.
type class uint8

const (
	plain class = iota
	forwarding
	metadata
	connection
	hopByHop
	chunked
	length
)

// classes is keyed by lower-case names, underscores written as dashes: gateways
// of the CGI kind take the two for the same name.
var classes = map[string]class{
	"metadata":          metadata,
	"connection":        connection,
	"upgrade":           hopByHop,
	"http2-settings":    hopByHop,
	"expect":            hopByHop,
	"transfer-encoding": chunked,
	"content-length":    length,

	// Where the request came from, before the proxy that says so.
	"forwarded":                forwarding,
	"via":                      forwarding,
	"x-real-ip":                forwarding,
	"true-client-ip":           forwarding,
	"x-client-ip":              forwarding,
	"x-cluster-client-ip":      forwarding,
	"cf-connecting-ip":         forwarding,
	"fastly-client-ip":         forwarding,
	"x-original-forwarded-for": forwarding,
	"x-original-host":          forwarding,
	// What was asked for, before the proxy that rewrote it.
	"x-original-url":         forwarding,
	"x-rewrite-url":          forwarding,
	"x-http-method":          forwarding,
	"x-http-method-override": forwarding,
	"x-method-override":      forwarding,
}

// forwardingPrefixes mark whole families: X-Forwarded-*, and the claims and
// signature that the Guest Proxy Agent adds and no client may (protocol-azure §2).
var forwardingPrefixes = [...]string{"x-forwarded", "x-ms-azure-host-"}

func classOf(name string) class {
	var buf [32]byte
	n := min(len(name), len(buf))
	for i := range n {
		buf[i] = lowerByte(name[i])
		if buf[i] == '_' {
			buf[i] = '-'
		}
	}
	for _, p := range forwardingPrefixes {
		if n >= len(p) && string(buf[:len(p)]) == p {
			return forwarding
		}
	}
	return classes[string(buf[:n])] // a name that was cut is longer than all of the table
}

func inspect(h http.Header) (hs headers) {
	for name, values := range h {
		switch classOf(name) {
		case forwarding:
			hs.forwarded = true // an empty value is a mark too
		case metadata:
			hs.metadata += len(values)
			hs.metadataTrue = len(values) > 0 && equalFold(strings.Trim(values[len(values)-1], " \t"), "true")
		case connection:
			hs.hop = hs.hop || slices.ContainsFunc(values, unusualConnection)
		case hopByHop:
			hs.hop = true
		case chunked:
			hs.chunked = true
		case length:
			hs.length = true
		}
	}
	return hs
}

// unusualConnection reports whether a Connection value names anything but
// keep-alive and close. Naming a field there asks proxies to remove it.
func unusualConnection(value string) bool {
	for option := range strings.SplitSeq(value, ",") {
		option = strings.Trim(option, " \t")
		if option != "" && !equalFold(option, "keep-alive") && !equalFold(option, "close") {
			return true
		}
	}
	return false
}

// ForwardHeader is what of a client's header passes to the service: Metadata,
// Accept, User-Agent, Content-Type, and what SDKs send to be recognised and to
// find their requests again (X-Client-*, X-Ms-Client-*, X-Ms-Correlation-Id,
// X-Ms-Return-Client-Request-Id; protocol-azure §7). It is a list of what
// passes, so that a header nobody thought of stays outside. Accept-Encoding is
// not on it: answers that are filtered must not be compressed.
//
// The result shares nothing with h; names are in canonical form.
func ForwardHeader(h http.Header) http.Header {
	out := make(http.Header, len(h))
	for name, values := range h {
		key := http.CanonicalHeaderKey(name)
		if passes(key) {
			out[key] = append(out[key], values...)
		}
	}
	return out
}

func passes(key string) bool {
	switch key {
	case "Metadata", "Accept", "User-Agent", "Content-Type", "X-Ms-Correlation-Id", "X-Ms-Return-Client-Request-Id":
		return true
	}
	return classOf(key) == plain && (strings.HasPrefix(key, "X-Client-") || strings.HasPrefix(key, "X-Ms-Client-"))
}

// AnswerHeader is what of the service's header passes to the client: everything
// but the hop-by-hop fields of RFC 9110 §7.6.1 and those that Connection names.
// Content-Length stays, and is wrong once a body was changed.
//
// The result shares nothing with h; names are in canonical form.
func AnswerHeader(h http.Header) http.Header {
	out := make(http.Header, len(h))
	for name, values := range h {
		key := http.CanonicalHeaderKey(name)
		out[key] = append(out[key], values...)
	}
	for _, value := range out["Connection"] {
		for option := range strings.SplitSeq(value, ",") {
			delete(out, http.CanonicalHeaderKey(strings.Trim(option, " \t")))
		}
	}
	for _, key := range [...]string{"Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate",
		"Proxy-Authorization", "Te", "Trailer", "Transfer-Encoding", "Upgrade"} {
		delete(out, key)
	}
	return out
}
