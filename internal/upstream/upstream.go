// Package upstream is where answers come from. Everything here is a Source;
// what adds something to answers is a Source over another Source.
package upstream

import (
	"context"
	"io"
	"net/http"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// Request is what is asked of a Source: the canonical query, the headers that
// pass from the client to the service, and the body of a POST (nil otherwise).
type Request struct {
	Query  imds.Query
	Header http.Header
	Body   []byte

	// Workload is who asks, for Budget's sharing out alone: no answer depends on
	// it, and nothing of it is sent.
	Workload workload.ID

	party *party // set by Cache: everybody who waits for the answer
}

// Answer is a response of the service, whatever its status. Body is never nil
// and the receiver closes it. Header holds no hop-by-hop fields; like Bytes it
// may be shared with other answers and is not to be changed.
type Answer struct {
	Status int
	Header http.Header
	Body   io.ReadCloser
	Size   int64 // bytes of Body, or -1 if not known

	// Bytes is the whole of Body where it is in memory, for those who would
	// rather write it than read it; nil where it is not.
	Bytes []byte

	// Cache says where a Cache has the answer from: Hit, Stale or Flight; empty
	// when the service was asked for this request alone.
	Cache string

	edits *edits // of the kept answer that this one is; nil if there is none
}

// Where an answer comes from, if the service was not asked for it alone.
const (
	Hit    = "hit"    // kept from an earlier call, and still good
	Stale  = "stale"  // kept from an earlier call, and handed out because the service is away
	Flight = "flight" // of a call that somebody else had begun
)

// Source answers requests. An error means that there is no answer: the service
// could not be reached or did not speak HTTP in time. Cancelling the context
// ends the request, also while the body is being read.
type Source interface {
	Answer(ctx context.Context, r Request) (*Answer, error)
}
