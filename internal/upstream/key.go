package upstream

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"imdsgate/internal/imds"
)

// keys name what a request asks for. Nothing about who asks is in them: policy
// has decided before, and what somebody may not see is taken out afterwards.
type keys struct {
	flight string // of the call
	slot   string // of what is kept; another than flight for a call that must pass by it
	bypass bool   // bypass_cache: the caller wants none of what is kept
	life   life
}

// life is how long the answers to an action are good, from when they came.
type life struct {
	token bool          // until shortly before the token in it expires; the others are not used
	fresh time.Duration // served without asking
	stale time.Duration // after that, served while the service is away
}

// lifeOf is what protocol-azure §9 says of the action, and whether its answers
// may be kept at all: signed documents, certificates, user data, provisioning
// data and what nobody knows may not.
func (c *Cache) lifeOf(q *imds.Query) (life, bool) {
	switch q.Action {
	case imds.IdentityToken:
		return life{token: true}, true
	case imds.VersionsRead:
		return life{fresh: time.Hour, stale: 24 * time.Hour}, true
	case imds.InstanceRead:
		if name, ok := strings.CutPrefix(q.Path, "/metadata/instance/compute/"); ok && fixed[name] {
			return life{fresh: 5 * time.Minute, stale: c.stale()}, true
		}
		return life{fresh: 30 * time.Second, stale: c.stale()}, true
	case imds.NetworkBalancer:
		return life{fresh: 30 * time.Second, stale: c.stale()}, true
	case imds.IdentityInfo:
		return life{fresh: 5 * time.Minute, stale: c.stale()}, true
	case imds.EventsRead:
		return life{fresh: time.Second}, true // simultaneous polls, and no more
	}
	return life{}, false
}

// fixed are leaves that stay as they are for as long as the VM runs.
var fixed = map[string]bool{
	"azEnvironment": true, "location": true, "name": true, "offer": true, "osType": true, "publisher": true,
	"resourceGroupName": true, "resourceId": true, "sku": true, "subscriptionId": true, "vmId": true, "zone": true,
}

// keysOf reports false for a request that is handed on as it is, by itself.
func (c *Cache) keysOf(r *Request) (keys, bool) {
	l, ok := c.lifeOf(&r.Query)
	if !ok || r.Query.Method != http.MethodGet || len(r.Body) > 0 || !usual(r) {
		return keys{}, false
	}
	k := keys{life: l}
	i := slices.IndexFunc(r.Query.Params, func(p imds.Param) bool { return p.Name == "bypass_cache" })
	if k.bypass = i >= 0 && strings.EqualFold(r.Query.Params[i].Value, "true"); !k.bypass {
		i = -1
	}
	var buf [512]byte
	k.slot = string(appendKey(buf[:0], r, i))
	if k.flight = k.slot; k.bypass {
		k.flight = string(appendKey(buf[:0], r, -1))
	}
	if r.Query.Action == imds.EventsRead {
		after := "#" + strconv.FormatUint(c.approvals.Load(), 10)
		k.slot, k.flight = k.slot+after, k.flight+after
	}
	return k, true
}

// usual reports whether the headers that would be in the key are among the few
// that clients send: whoever could have an answer kept under as many keys as it
// likes would push out those of others.
func usual(r *Request) bool {
	names := sent(r.Query.Action)
	for _, name := range names {
		if len(r.Header[name]) > 1 {
			return false
		}
	}
	return len(r.Header.Get("Metadata")) <= len("true") && (len(names) == 1 || usualAccept(r.Header.Get("Accept")))
}

// usualAccept is for nothing, or each of three types once at most, in any order.
func usualAccept(v string) bool {
	if v == "" {
		return true
	}
	var seen []string
	for i, part := range strings.SplitN(v, ",", 4) {
		if i > 0 {
			part = strings.TrimPrefix(part, " ")
		}
		switch part {
		case "*/*", "application/json", "text/plain":
		default:
			return false
		}
		if slices.Contains(seen, part) {
			return false
		}
		seen = append(seen, part)
	}
	return true
}

// appendKey writes what the answer depends on, each part with its length before
// it: no two requests that differ in one of them have the same key. The
// parameter number skip is left out.
func appendKey(dst []byte, r *Request, skip int) []byte {
	q := &r.Query
	dst = appendPart(dst, string(q.Cloud))
	dst = appendPart(dst, string(q.Action))
	dst = appendPart(dst, q.Method)
	dst = appendPart(dst, q.Path)
	for i := range q.Params {
		if i != skip {
			dst = appendPart(appendPart(dst, q.Params[i].Name), q.Params[i].Value)
		}
	}
	for _, name := range sent(q.Action) {
		dst = append(dst, '#') // no length begins so
		for _, v := range r.Header[name] {
			dst = appendPart(dst, v)
		}
	}
	return dst
}

func appendPart(dst []byte, s string) []byte {
	for n := len(s); ; n >>= 5 {
		if n < 32 {
			dst = append(dst, '@'|byte(n))
			break
		}
		dst = append(dst, '`'|byte(n&31))
	}
	return append(dst, s...)
}

// sent are the headers that go out with a call whose answer others get too: all
// of them are part of the key. What a caller could say beside it, and the
// service might listen to, would end up in everybody's answer. Tokens come in one
// form, whatever a client accepts: SDKs, which differ in that, share them.
func sent(a imds.Action) []string {
	if a == imds.IdentityToken {
		return sentNames[:1]
	}
	return sentNames[:]
}

var sentNames = [...]string{"Metadata", "Accept"}

// shared is the request that is made for everybody.
func shared(r Request) Request {
	h := make(http.Header, len(sentNames))
	for _, name := range sent(r.Query.Action) {
		if v := r.Header[name]; len(v) > 0 {
			h[name] = slices.Clone(v)
		}
	}
	r.Header = h
	return r
}
