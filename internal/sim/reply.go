package sim

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strconv"
)

// serverName is what IMDS calls itself; MSAL's MSI v2 code accepts an answer
// only if "IMDS" is in it (docs/protocol-azure.md §1.5). frontName is the host's
// front, which answers in its place at times (§1.1, §1.4).
const (
	serverName = "IMDS/150.870.65.1854"
	frontName  = "Microsoft-IIS/10.0"
)

const (
	jsonType = "application/json; charset=utf-8"
	textType = "text/plain; charset=utf-8"
	xmlType  = "text/xml; charset=utf-8"
)

// family is the shape of an endpoint's error bodies (docs/protocol-azure.md §1.4).
type family uint8

const (
	general  family = iota // {"error":"text"}
	identity               // {"error":"code","error_description":"text"}
)

// reply is an answer, complete before its first byte is sent.
type reply struct {
	status int
	ctype  string // "" when there is no body
	body   []byte
	allow  string // of a 405
	server string // "" means IMDS itself
	length int    // of the body that a HEAD is told about
}

func (a reply) write(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Server", serverName)
	if a.server != "" {
		h.Set("Server", a.server)
	}
	if a.ctype != "" {
		h.Set("Content-Type", a.ctype)
	}
	if a.allow != "" {
		h.Set("Allow", a.allow)
	}
	h.Set("Content-Length", strconv.Itoa(max(len(a.body), a.length)))
	w.WriteHeader(a.status)
	w.Write(a.body) // an error means that the client has left
}

func okJSON(v any) reply { return reply{status: http.StatusOK, ctype: jsonType, body: encode(v)} }

// encode writes JSON as the service does: keys of trees in alphabetical order,
// no line end, and <, > and & as they are.
func encode(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(err) // trees of strings and our own structs always encode
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// generalBody is the error body of all but the identity family. Of the two
// spellings on record the one with spaces belongs to bodies that were seen live.
func generalBody(spaced bool, text string) []byte {
	if spaced {
		return []byte(`{ "error": ` + string(encode(text)) + ` }`)
	}
	return []byte(`{"error":` + string(encode(text)) + `}`)
}

func identityBody(code, description string) []byte {
	return encode(struct {
		Error       string `json:"error"`
		Description string `json:"error_description"`
	}{code, description})
}

// badRequest is a 400 in the words of the family. With the text about the
// missing header both bodies are byte for byte the live ones
// (docs/protocol-azure.md §1.4); the other texts are ours.
func badRequest(f family, text string) reply {
	if f == identity {
		return reply{status: 400, ctype: jsonType, body: identityBody("invalid_request", text)}
	}
	return reply{status: 400, ctype: jsonType, body: generalBody(true, "Bad request: . "+text)}
}

// badVersion lists the newest versions, for those who want to step down
// (cloud-init does, at this status only; docs/protocol-azure.md §1.3).
func badVersion(versions []string) reply {
	const text = "Bad request. api-version is invalid or was not specified in the request. For more information refer to aka.ms/azureimds"
	return reply{status: 400, ctype: jsonType, body: encode(struct {
		Error  string   `json:"error"`
		Newest []string `json:"newest-versions"`
	}{text, newest(versions)})}
}

// identityCodes are the error codes of the identity family by status: those of
// the swagger's list where one fits, and the two of the token endpoint
// (docs/protocol-azure.md §1.4).
var identityCodes = map[int]string{
	400: "bad_request", 401: "unknown_source", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
	410: "service_unavailable", 429: "too_many_requests", 500: "unknown", 503: "service_unavailable",
}

var statusTexts = map[int]string{
	404: "Not found", 405: "Method not allowed", 429: "Too many requests",
	500: "Failed to retrieve token from the Active directory",
}

// failure is an error of which only the status is known from the service. The
// bodies are those that docs/protocol-azure.md §1.4 settles on.
func failure(f family, status int) reply {
	a := reply{status: status, ctype: jsonType}
	text := statusTexts[status]
	if text == "" || status == 500 && f == general {
		text = http.StatusText(status)
	}
	switch {
	case f == identity:
		code := identityCodes[status]
		if code == "" {
			code = "server_error"
		}
		a.body = identityBody(code, text)
	default:
		a.body = generalBody(status == 404, text)
	}
	return a
}

// frontHead is what the host's front answers to every HEAD, before IMDS sees
// it. A body of 323 bytes is announced; it has never been captured
// (docs/protocol-azure.md §1.1). With the header the service's answer to a HEAD is not
// known; the front does not look for it, so the same is assumed.
var frontHead = reply{status: 400, ctype: xmlType, server: frontName, length: 323}

// frontDown is what the front answers while the IMDS process is away
// (docs/protocol-azure.md §1.4).
var frontDown = reply{status: 500, ctype: "text/plain", server: frontName, body: []byte("Internal Server Error")}
