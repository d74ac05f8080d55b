package gate

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/upstream"
)

// refuse answers in the words of the cloud.
func (x *exchange) refuse(d audit.Decision, r *imds.Refusal) {
	x.event.Decision, x.event.Reason = d, r.Error()
	x.event.Blanked, x.event.Cut, x.event.Kept = nil, nil, nil
	body := r.Body()
	h := x.w.Header()
	clear(h) // an answer may have been prepared
	maps.Copy(h, r.Header())
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if x.r.ContentLength != 0 && !x.read {
		// What follows the header was not read: it is no start of a request.
		// net/http looks for its end when we are done, with no limit of its own.
		h.Set("Connection", "close")
		x.readBy(x.g.limits.BodyTime)
	}
	x.head(r.Status)
	if x.r.Method != http.MethodHead {
		n, _ := x.w.Write(body) // an error means that the client left; the refusal stands
		x.event.Bytes = int64(n)
	}
	_ = x.flush()
}

// left ends a request whose client is gone, or whose connection was cut.
func (x *exchange) left(d audit.Decision) {
	x.event.Decision, x.event.Reason = d, "the connection ended before the answer was sent"
	x.cut = true
}

// fail ends a request that was allowed and has no answer, or not all of one. A
// client must not take a part for the whole, so a begun answer is cut off.
func (x *exchange) fail(err error) {
	if x.r.Context().Err() != nil {
		x.left(audit.Error)
		return
	}
	if x.cut = x.sent; !x.sent {
		x.refuse(audit.Error, failure(x.q, err))
	}
	x.event.Decision, x.event.Reason = audit.Error, err.Error()
}

// failure words for the client why there is no answer. What the error says
// about this host stays in the record.
func failure(q imds.Query, err error) *imds.Refusal {
	switch {
	case errors.Is(err, upstream.ErrTimeout):
		return imds.Timeout(q, upstream.ErrTimeout.Error())
	case errors.Is(err, upstream.ErrTooLarge):
		return imds.BadAnswer(q, upstream.ErrTooLarge.Error())
	case errors.Is(err, imds.ErrNotDocument):
		return imds.BadAnswer(q, "the answer of the metadata service cannot be filtered")
	case errors.Is(err, upstream.ErrBusy):
		return imds.Busy(q, upstream.ErrBusy.Error())
	case errors.Is(err, upstream.ErrGone): // some clients wait longer for a 410
		r := imds.Unavailable(q, upstream.ErrGone.Error())
		r.Status = http.StatusGone
		return r
	default:
		return imds.Unavailable(q, "the metadata service cannot be reached")
	}
}

// answer hands on what the source said.
func (x *exchange) answer(a *upstream.Answer, d policy.Decision) {
	if a.Status < 200 || a.Status > 599 {
		x.fail(upstream.ErrProtocol)
		return
	}
	if len(d.Blank)+len(d.Cut.Keep)+len(d.Cut.Drop) > 0 {
		var err error
		if a, err = x.blank(a, d); err != nil {
			x.fail(err)
			return
		}
	}
	if err := x.stream(a); err != nil {
		x.fail(err)
		return
	}
	x.event.Decision = audit.Allow
}

// blank takes the parts out of an answer that its caller may not see. An answer
// that cannot be read, and so not be blanked, is not handed on.
func (x *exchange) blank(a *upstream.Answer, d policy.Decision) (*upstream.Answer, error) {
	out := &upstream.Answer{Status: a.Status, Header: a.Header.Clone(), Body: http.NoBody}
	for _, name := range []string{"Etag", "Content-Md5", "Digest", "Content-Digest"} {
		out.Header.Del(name) // they tell of the whole
	}
	if x.r.Method == http.MethodHead {
		out.Header.Del("Content-Length") // it would tell the size of what is denied
		return out, nil
	}
	body, err := x.whole(a)
	if err != nil {
		return nil, err
	}
	// An error of the service holds no data, and is not of the form that Blank knows.
	if a.Status < 300 {
		edit := func(body []byte) ([]byte, error) { return x.takeOut(body, d) }
		if a.Bytes != nil {
			body, err = a.Edit(taken(d), edit)
		} else {
			body, err = edit(body)
		}
		if err != nil {
			return nil, err
		}
	}
	out.Body, out.Size, out.Bytes = io.NopCloser(bytes.NewReader(body)), int64(len(body)), body
	return out, nil
}

// whole is the body of an answer, if it is not too long to be looked through.
func (x *exchange) whole(a *upstream.Answer) ([]byte, error) {
	limit := x.g.limits.BlankBytes
	body, err := a.Bytes, error(nil)
	if body == nil {
		body, err = io.ReadAll(io.LimitReader(a.Body, limit+1))
	}
	if err == nil && int64(len(body)) > limit {
		err = upstream.ErrTooLarge
	}
	return body, err
}

func (x *exchange) takeOut(body []byte, d policy.Decision) ([]byte, error) {
	body, err := imds.Blank(x.q, d.Blank, body)
	if err != nil {
		return nil, err
	}
	return imds.Prune(x.q, d.Cut, body)
}

// taken names what takeOut takes out. The rest of what it depends on, the query,
// is what the kept answer was kept for.
func taken(d policy.Decision) string {
	if len(d.Blank) == 1 && len(d.Cut.Keep)+len(d.Cut.Drop) == 0 {
		return string(d.Blank[0])
	}
	var b strings.Builder
	for _, a := range d.Blank {
		b.WriteString(string(a) + ",")
	}
	b.WriteString(";" + strings.Join(d.Cut.Keep, ",") + ";" + strings.Join(d.Cut.Drop, ","))
	return b.String()
}

var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// stream sends an answer as it comes. Each piece goes out at once if more is to
// follow, so that a long poll is not kept back. An error before the first byte
// leaves the way open for a refusal.
func (x *exchange) stream(a *upstream.Answer) error {
	x.announce(a)
	if len(a.Bytes) > 0 {
		if err := x.send(a, a.Bytes); err != nil {
			return err
		}
		return x.flush()
	}
	if a.Size < 0 {
		x.start(a)
		if err := x.flush(); err != nil {
			return err
		}
	}
	buf := buffers.Get().(*[32 << 10]byte)
	defer buffers.Put(buf)
	for {
		n, err := a.Body.Read(buf[:])
		if n > 0 {
			if err := x.send(a, buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if a.Size >= 0 && x.event.Bytes != a.Size {
		return io.ErrUnexpectedEOF
	}
	x.start(a)
	return x.flush()
}

// announce prepares the header: that of the answer and the length of the body,
// but nothing that net/http would add where the service said nothing.
func (x *exchange) announce(a *upstream.Answer) {
	h := x.w.Header()
	maps.Copy(h, a.Header)
	for _, name := range []string{"Date", "Content-Type"} {
		if _, ok := h[name]; !ok {
			h[name] = nil
		}
	}
	switch {
	case x.r.Method == http.MethodHead: // the length is that of the GET's body
	case a.Size >= 0:
		h.Set("Content-Length", strconv.FormatInt(a.Size, 10))
	default:
		h.Del("Content-Length")
	}
}

// start begins to send an answer of the source, once.
func (x *exchange) start(a *upstream.Answer) {
	x.head(a.Status)
	x.event.Upstream = true
}

// head sends the status line and the header, once.
func (x *exchange) head(status int) {
	if x.sent {
		return
	}
	if x.last || x.c.stopping() {
		x.w.Header().Set("Connection", "close")
	}
	x.sent = true
	x.event.Status = status
	x.w.WriteHeader(status)
}

// send writes one piece of the body.
func (x *exchange) send(a *upstream.Answer, p []byte) error {
	x.start(a)
	n, err := x.w.Write(p)
	x.event.Bytes += int64(n)
	if err == nil && x.event.Bytes != a.Size {
		err = x.flush()
	}
	return err
}

// flush makes net/http send what it has, and tells whether that worked.
func (x *exchange) flush() error {
	if f, ok := x.w.(interface{ FlushError() error }); ok {
		return f.FlushError()
	}
	return nil
}
