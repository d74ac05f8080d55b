package upstream

import (
	"bytes"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"imdsgate/internal/imds"
)

// entry is an answer in memory. What it points to is never changed.
//
// Its ages are counted by the monotonic clock, which no correction of the time
// of day moves; a token expires by whichever clock says so first.
type entry struct {
	status int
	header http.Header
	body   []byte

	at      time.Time     // when the call for it began
	refresh time.Duration // the age from which on a better one is fetched behind it
	fresh   time.Duration // the age until which it is served without asking
	dead    time.Duration // the age until which it is served if it must be
	expires time.Time     // of a token, by the time of day; zero for other answers
	digits  [2]int        // where in body a token's expires_in is; both 0 if nowhere
	bypass  bool          // it came by a call that passed the cache by

	failing atomic.Bool  // the last call for a better one has failed
	again   atomic.Int64 // the age, in ns, until which no other is begun behind it
	said    atomic.Pointer[wording]
	edits   edits
}

// wording is a token's answer as it is worded for one second of its life.
type wording struct {
	left   int64
	header http.Header
	body   []byte
}

// left is how much of the entry's life is left at most, below 0 if it is over.
func (e *entry) left(age time.Duration, wall time.Time) time.Duration {
	left := e.dead - age
	if !e.expires.IsZero() {
		left = min(left, e.expires.Sub(wall))
	}
	return left
}

// isFresh reports whether the entry may be served without asking.
func (e *entry) isFresh(age, left, margin time.Duration) bool {
	return age < e.fresh && (e.expires.IsZero() || left > margin)
}

// claim reports whether the caller is to fetch a better one behind the entry:
// once every probeEvery.
func (e *entry) claim(age time.Duration) bool {
	again := e.again.Load()
	return int64(age) >= again && e.again.CompareAndSwap(again, int64(age+probeEvery))
}

// weight is about how much memory the entry takes, in bytes. A token's body is
// there twice, as it came and as it is worded; others have room for edits.
func (e *entry) weight(key string) uint32 {
	n := 512 + len(key) + 2*len(e.body)
	if e.digits[1] == 0 {
		n += (maxEdits - 1) * len(e.body)
	}
	for name, values := range e.header {
		n += 64 + len(name)
		for _, v := range values {
			n += 16 + len(v)
		}
	}
	return uint32(n)
}

// inMemory is an answer whose body is in memory.
type inMemory struct {
	Answer
	reader bytes.Reader
}

// Read copies, so that nobody gets hold of what is shared.
func (m *inMemory) Read(p []byte) (int, error) { return m.reader.Read(p) }
func (m *inMemory) Close() error               { return nil }

// asItCame is the answer byte for byte.
func (e *entry) asItCame(how string) *Answer { return e.answer(e.header, e.body, how) }

// worded is the answer as it is at this moment: expires_in says what is left of
// a token, all else is as it came.
func (e *entry) worded(left time.Duration, how string) *Answer {
	if e.digits[1] == 0 {
		return e.asItCame(how)
	}
	seconds := int64(max(left, 0) / time.Second)
	w := e.said.Load()
	if w == nil || w.left != seconds {
		w = e.word(seconds)
		e.said.Store(w)
	}
	return e.answer(w.header, w.body, how)
}

func (e *entry) word(seconds int64) *wording {
	body := make([]byte, 0, len(e.body)+8)
	body = append(body, e.body[:e.digits[0]]...)
	body = strconv.AppendInt(body, seconds, 10)
	body = append(body, e.body[e.digits[1]:]...)
	h := e.header
	if _, ok := h["Content-Length"]; ok && len(body) != len(e.body) {
		h = maps.Clone(h)
		h["Content-Length"] = []string{strconv.Itoa(len(body))}
	}
	return &wording{left: seconds, header: h, body: body}
}

func (e *entry) answer(h http.Header, body []byte, how string) *Answer {
	m := &inMemory{Answer: Answer{Status: e.status, Header: h, Size: int64(len(body)), Bytes: body, Cache: how}}
	if e.digits[1] == 0 { // the body is the same every time
		m.edits = &e.edits
	}
	m.reader.Reset(body)
	m.Body = m
	return &m.Answer
}

// plain reports whether the header leaves an answer to be anybody's, at any
// time: nothing that IMDS sends does otherwise.
func plain(h http.Header) bool {
	for _, name := range [...]string{"Vary", "Set-Cookie", "Content-Encoding", "Content-Md5", "Digest", "Content-Digest", "Content-Range"} {
		if _, ok := h[name]; ok {
			return false
		}
	}
	for _, v := range h["Cache-Control"] {
		v = strings.ToLower(v)
		if strings.Contains(v, "no-store") || strings.Contains(v, "private") {
			return false
		}
	}
	return true
}

// keepFor sets how long the entry is good, and reports whether it may be kept.
// jitter is from 0 to 1.
func (e *entry) keepFor(l life, wall time.Time, margin time.Duration, jitter float64) bool {
	if e.status != http.StatusOK || !plain(e.header) {
		return false
	}
	if l.token {
		t, ok := readToken(e.body)
		e.expires, e.digits = t.expires, t.digits
		e.dead = min(t.in, t.expires.Sub(wall))
		if !ok || e.dead <= 0 {
			return false
		}
		e.fresh = min(e.dead/2, e.dead-margin)
	} else {
		e.fresh, e.dead = l.fresh, l.fresh+l.stale
	}
	e.refresh = e.fresh
	if l.stale > 0 || l.token {
		e.refresh = time.Duration(float64(e.fresh) * (0.8 + 0.1*jitter))
	}
	return true
}

// keepError is the same for an error: what floods ask for again and again may be
// repeated to them for a second.
func (e *entry) keepError(q *imds.Query) bool {
	if e.status != http.StatusTooManyRequests && !(e.status == http.StatusBadRequest && q.Action == imds.IdentityToken && noIdentity(e.body)) {
		return false
	}
	e.fresh, e.dead, e.refresh = errorLife, errorLife, errorLife
	return len(e.header["Set-Cookie"]) == 0
}
