package imds

import (
	"encoding/json"
	"net/http"
	"strings"
)

// ReasonHeader is the response header that tells a refusal of ours from one of
// the service: its value is Refusal.Reason.
const ReasonHeader = "X-Imdsgate-Reason"

// Refusal is a request that does not go to the service, and the answer that the
// client gets instead, in the words of its cloud. It is an error for callers
// that pass it on; it never wraps another.
type Refusal struct {
	Status int    // HTTP status
	Reason string // short, stable, for records and ReasonHeader: "forwarding_header"
	Text   string // for people; Body cleans it, so it may quote what is not trusted
	Family Family
	Allow  string // the Allow header of a 405, else empty
}

func (f *Refusal) Error() string { return f.Reason + ": " + f.Text }

// The reasons of refusals that are decided after Classify.
const (
	ReasonForbidden   = "forbidden"
	ReasonBusy        = "busy"
	ReasonUnavailable = "unavailable"
	ReasonTimeout     = "timeout"
	ReasonBadAnswer   = "bad_answer"
)

// Forbidden refuses what policy does not allow: 403, which SDKs do not retry
// (protocol-azure §8). text should name the rule that is missing.
func Forbidden(q Query, text string) *Refusal {
	return decided(q, http.StatusForbidden, ReasonForbidden, text)
}

// Busy refuses for now, because the caller is over its share of the platform's
// rate limit: 429, which SDKs retry after a pause.
func Busy(q Query, text string) *Refusal {
	return decided(q, http.StatusTooManyRequests, ReasonBusy, text)
}

// Unavailable says that the service is away: 503, which SDKs retry.
func Unavailable(q Query, text string) *Refusal {
	return decided(q, http.StatusServiceUnavailable, ReasonUnavailable, text)
}

// Timeout says that the service did not answer in time: 504, which SDKs retry.
func Timeout(q Query, text string) *Refusal {
	return decided(q, http.StatusGatewayTimeout, ReasonTimeout, text)
}

// BadAnswer says that the service answered, but with something that may not be
// passed on: not the document it should be (see Blank), or too large to be
// looked through. 502.
func BadAnswer(q Query, text string) *Refusal {
	return decided(q, http.StatusBadGateway, ReasonBadAnswer, text)
}

func decided(q Query, status int, reason, text string) *Refusal {
	return &Refusal{Status: status, Reason: reason, Text: speakable(text), Family: q.Family}
}

// Header is the response header of the refusal, without Content-Length. The
// caller owns it.
func (f *Refusal) Header() http.Header {
	h := http.Header{
		"Content-Type": {"application/json; charset=utf-8"},
		ReasonHeader:   {f.Reason},
	}
	if f.Allow != "" {
		h.Set("Allow", f.Allow)
	}
	return h
}

// headerless is the service's body for a missing Metadata header outside the
// identity endpoints, spaces and all (protocol-azure §6).
const headerless = `{ "error": "Bad request: . Required metadata header not specified" }`

// Body is the response body of the refusal. Without the Metadata header it is
// the service's own, byte for byte; else it is JSON of the family's shape.
func (f *Refusal) Body() []byte {
	if f.Family == General {
		if f.Reason == faultMissing.reason || f.Reason == faultInvalid.reason {
			return []byte(headerless)
		}
		return encode(struct {
			Error string `json:"error"`
		}{speakable(f.Text)})
	}
	return encode(struct {
		Error string `json:"error"`
		Text  string `json:"error_description"`
	}{identityCode(f.Status), speakable(f.Text)})
}

// identityCode is the error code of the identity family that fits a status; all
// are from the service's API description (protocol-azure §6).
func identityCode(status int) string {
	switch status {
	case http.StatusForbidden:
		return "access_denied"
	case http.StatusMethodNotAllowed:
		return "method_not_allowed"
	case http.StatusTooManyRequests:
		return "too_many_requests"
	case http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusGone:
		return "service_unavailable"
	case http.StatusBadGateway:
		return "server_error"
	}
	return "invalid_request"
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil { // structs of strings always marshal
		return []byte(`{"error":"server_error"}`)
	}
	return b
}

const maxText = 1024 // bytes of a refusal's text

// speakable makes a text fit for a body: UTF-8, cut to 1024 bytes, and
// without the word that makes SDKs take a 403 for Docker Desktop's proxy, and
// with it the credential for absent (protocol-azure §8).
func speakable(text string) string {
	const word, instead = "unreachable", "unavailable" // of equal length
	text = strings.ToValidUTF8(text, "\uFFFD")
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "") // not half a character
	}
	for i := 0; i+len(word) <= len(text); i++ {
		if equalFold(text[i:i+len(word)], word) {
			text = text[:i] + instead + text[i+len(word):]
		}
	}
	return text
}
