package sim

import (
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"
)

// defaultHistory is how many exchanges are remembered when Config does not say.
const defaultHistory = 1000

// Exchange is one request to the protocol listener and what it got.
type Exchange struct {
	Time   time.Time   `json:"time"`
	Method string      `json:"method"`
	Target string      `json:"target"` // as on the request line, tokens taken out
	Status int         `json:"status"` // 0: there was no answer
	Peer   string      `json:"peer"`   // address and port
	Header http.Header `json:"header"` // values that are tokens are replaced by "(token)"
}

// history is a ring of the newest exchanges.
type history struct {
	mu   sync.Mutex
	ring []Exchange
	next int // where the oldest is, once the ring is full
}

func (h *history) add(e Exchange) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.ring) < cap(h.ring) {
		h.ring = append(h.ring, e)
		return
	}
	h.ring[h.next] = e
	h.next = (h.next + 1) % len(h.ring)
}

func (h *history) all() []Exchange {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]Exchange, 0, len(h.ring))
	out = append(out, h.ring[h.next:]...)
	return append(out, h.ring[:h.next]...)
}

func (h *history) clear() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ring, h.next = h.ring[:0], 0
}

// jwts find signed tokens wherever they stand.
var jwts = regexp.MustCompile(`eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*`)

// secretHeader tells whether a header's values are tokens by its name.
func secretHeader(name string) bool {
	name = strings.ToLower(name)
	for _, word := range []string{"authorization", "cookie", "token", "secret", "identity-header", "key"} {
		if strings.Contains(name, word) {
			return true
		}
	}
	return false
}

// redacted copies headers without what must not be written down.
func redacted(h http.Header) http.Header {
	const instead = "(token)"
	out := make(http.Header, len(h))
	for name, values := range h {
		for _, v := range values {
			if secretHeader(name) {
				v = instead
			}
			out[name] = append(out[name], jwts.ReplaceAllString(v, instead))
		}
	}
	return out
}

func (s *Server) record(r *http.Request, status int) {
	e := Exchange{
		Time: s.now(), Method: r.Method, Target: jwts.ReplaceAllString(r.RequestURI, "(token)"),
		Status: status, Peer: r.RemoteAddr, Header: redacted(r.Header),
	}
	s.history.add(e)
	if s.observe != nil {
		s.observe(e)
	}
}

// History returns the newest exchanges, oldest first. An exchange is there
// before the first byte of its answer is sent.
func (s *Server) History() []Exchange { return s.history.all() }

// ClearHistory forgets all exchanges.
func (s *Server) ClearHistory() { s.history.clear() }
