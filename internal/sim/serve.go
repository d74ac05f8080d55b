package sim

import (
	"net"
	"net/http"
	"strings"
)

// serve takes one request to the protocol listener: limits, then faults, then
// the rules, then the endpoint. The exchange is on record before the first byte
// of the answer is sent.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	c := &call{Request: r, path: strings.TrimSuffix(r.URL.Path, "/"), family: familyOf(r.URL.Path)}
	done, ok := s.limits.admit(c.family, s.now())
	if !ok {
		s.finish(w, c, failure(c.family, http.StatusTooManyRequests))
		return
	}
	defer done()
	c.faults = s.faults.apply(r.Method, strings.ToLower(c.path), s.now())
	if !s.survives(w, c) {
		return
	}
	s.finish(w, c, s.decide(c))
}

// decide is the answer of the service, or of what stands before it.
func (s *Server) decide(c *call) reply {
	switch {
	case c.faults.down:
		return frontDown
	case c.faults.status != 0:
		return failure(c.family, c.faults.status)
	case c.Method == http.MethodHead:
		return frontHead
	default:
		return s.answer(c)
	}
}

func (s *Server) finish(w http.ResponseWriter, c *call, a reply) {
	if within(s.fold(c.path), instanceRoot) && a.server == "" {
		// Not on tokens, and in the service's own letter case (docs/protocol-azure.md §1.5).
		w.Header()["x-ms-request-id"] = []string{newUUID()}
	}
	s.record(c.Request, a.status)
	if c.faults.cut {
		a.length = len(a.body)
		a.body = a.body[:a.length/2]
	}
	a.write(w)
	if c.faults.cut {
		http.NewResponseController(w).Flush() // an error means that the client has left
		panic(http.ErrAbortHandler)
	}
}

// survives plays the faults that end in no answer, and latency before the
// others. It reports whether there is to be an answer.
func (s *Server) survives(w http.ResponseWriter, c *call) bool {
	if c.faults.latency > 0 {
		select {
		case <-s.after(c.faults.latency):
		case <-c.Context().Done():
			s.record(c.Request, 0)
			panic(http.ErrAbortHandler)
		}
	}
	switch {
	case c.faults.hang:
		s.record(c.Request, 0)
		<-c.Context().Done()
		panic(http.ErrAbortHandler)
	case c.faults.reset:
		s.record(c.Request, 0)
		reset(w)
		return false
	}
	return true
}

// reset ends the connection with a TCP reset, or where there is no TCP
// connection to be had, by cutting it off.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0) // on failure it is an orderly close, which ends the call too
	}
	conn.Close()
}
