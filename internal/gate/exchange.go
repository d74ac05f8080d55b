package gate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

// exchange is one request on its way through the gate.
type exchange struct {
	g     *Gate
	c     *conn
	w     http.ResponseWriter
	r     *http.Request
	q     imds.Query // what the client asked for
	ask   imds.Query // what the service is asked for: the same, maybe with an identity
	event audit.Event

	read bool // the request's body was read to its end
	sent bool // the header of an answer went out
	last bool // the connection takes no further request
	cut  bool // what went out is not a whole answer: the connection must end
}

// maxVerb cuts a method, of which callers may send kilobytes, in the record.
const maxVerb = 16

func (g *Gate) begin(w http.ResponseWriter, r *http.Request) *exchange {
	c, ok := r.Context().Value(connKey{}).(*conn)
	if ok {
		c.handling()
	} else {
		c = new(conn)
	}
	x := &exchange{g: g, c: c, w: w, r: r, event: c.event()}
	x.event.Verb = r.Method[:min(len(r.Method), maxVerb)]
	return x
}

// end records the request, whatever happened to it.
func (x *exchange) end() {
	if p := recover(); p != nil {
		x.panicked(p)
	}
	x.event.Duration = time.Since(x.event.Time).Microseconds()
	x.g.record(x.event)
	if x.cut {
		panic(http.ErrAbortHandler) // net/http closes the connection without a word
	}
}

// serve is the way of a request that nothing goes wrong with, and the places
// where it can leave it.
func (x *exchange) serve() {
	q, bad := imds.Classify(x.g.Cloud, x.r, x.c.hosts...)
	x.q = q
	x.event.Action, x.event.Target = q.Action, q.Redacted()
	if bad != nil {
		x.c.name(&x.event)
		x.refuse(audit.Refuse, bad)
		return
	}
	who, ok := x.identify()
	if !ok {
		return
	}
	d, ok := x.decide(who)
	if !ok {
		return
	}
	body, ok := x.body()
	if !ok || !x.enter() {
		return
	}
	defer x.leave()
	a, err := x.g.Source.Answer(x.r.Context(), upstream.Request{
		Query: x.ask, Header: imds.ForwardHeader(x.r.Header), Body: body, Workload: who.ID,
	})
	if err != nil {
		x.fail(err)
		return
	}
	defer a.Body.Close()
	x.event.Cache = a.Cache
	x.answer(a, d)
}

// identify finds out who is asking. A listener that the directory does not know
// yet gets a moment: it may have been handed over ahead of its name.
func (x *exchange) identify() (*workload.Workload, bool) {
	who, ok := x.g.Directory.Lookup(x.c.evidence)
	if !ok && x.c.evidence.Proof == workload.Listener {
		who, ok = x.hold()
	}
	if ok {
		describe(&x.event, who)
		return who, true
	}
	if x.r.Context().Err() != nil {
		x.left(audit.Refuse)
		return who, false
	}
	x.last = true // the next connection may come from a listener that is known
	x.refuse(audit.Refuse, imds.Forbidden(x.q, "the gate does not know which workload is asking"))
	return who, false
}

// hold asks the directory again and again until HoldTime is over. The directory
// is a map that nobody can wait for; the pauses grow from 1 ms to 32 ms.
func (x *exchange) hold() (*workload.Workload, bool) {
	ctx, cancel := context.WithTimeout(x.r.Context(), x.g.limits.HoldTime)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 32*time.Millisecond) {
		if !wait(ctx.Done(), pause) {
			return nil, false
		}
		if who, ok := x.g.Directory.Lookup(x.c.evidence); ok {
			return who, true
		}
	}
}

// wait reports false if done was closed before d had passed.
func wait(done <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
		return false
	case <-t.C:
		return true
	}
}

// body reads the body of a POST. Other methods have none: Classify saw to that.
func (x *exchange) body() ([]byte, bool) {
	if x.r.Method != http.MethodPost {
		return nil, true
	}
	limit := x.g.limits.BodyBytes
	if x.r.ContentLength > limit {
		x.refuse(audit.Refuse, x.tooLarge())
		return nil, false
	}
	x.readBy(x.g.limits.BodyTime)
	b, err := io.ReadAll(io.LimitReader(x.r.Body, limit+1))
	x.readBy(0)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		x.refuse(audit.Refuse, &imds.Refusal{Status: http.StatusRequestTimeout, Reason: "body_timeout",
			Text: "the body of the request did not arrive in time", Family: x.q.Family})
	case err != nil:
		x.left(audit.Refuse)
	case int64(len(b)) > limit:
		x.refuse(audit.Refuse, x.tooLarge())
	default:
		x.read = true
		return b, true
	}
	return nil, false
}

// readBy bounds the reading of a body; 0 takes the bound away, or else it would
// seem later that the client left.
func (x *exchange) readBy(d time.Duration) {
	if x.c.Conn == nil {
		return
	}
	var at time.Time
	if d > 0 {
		at = time.Now().Add(d)
	}
	x.c.SetReadDeadline(at) // fails on a closed connection, and so will the reading
}

func (x *exchange) tooLarge() *imds.Refusal {
	return &imds.Refusal{Status: http.StatusRequestEntityTooLarge, Reason: "body_too_large",
		Text: fmt.Sprintf("the body of the request is larger than %d bytes", x.g.limits.BodyBytes), Family: x.q.Family}
}

// enter takes one of the listener's places for requests to the source.
func (x *exchange) enter() bool {
	select {
	case x.c.slots() <- struct{}{}:
		return true
	default:
	}
	t := time.NewTimer(x.g.limits.QueueTime)
	defer t.Stop()
	select {
	case x.c.slots() <- struct{}{}:
		return true
	case <-x.r.Context().Done():
		x.left(audit.Refuse)
	case <-t.C:
		x.refuse(audit.Refuse, imds.Busy(x.q, "too many requests of this workload are under way"))
	}
	return false
}

func (x *exchange) leave() { <-x.c.slots() }

// panicked ends a request in which something panicked. The value may hold
// anything, so only its type is logged, unless it is the runtime's.
func (x *exchange) panicked(p any) {
	what := fmt.Sprintf("%T", p)
	if err, ok := p.(runtime.Error); ok {
		what = err.Error()
	}
	x.g.Log.Error("panic while a request was served", "panic", what, "stack", string(debug.Stack()))
	x.fail(errors.New("the gate itself failed"))
}
