// Package upstream is where answers come from. Everything here is a Source;
// what adds something to answers is a Source over another Source.
package upstream

import (
	"context"
	"io"
	"net/http"

	"imdsgate/internal/imds"
)

// Request is what is asked of a Source: the canonical query, the headers that
// pass from the client to the service, and the body of a POST (nil otherwise).
type Request struct {
	Query  imds.Query
	Header http.Header
	Body   []byte
}

// Answer is a response of the service, whatever its status. Body is never nil
// and the receiver closes it. Header holds no hop-by-hop fields.
type Answer struct {
	Status int
	Header http.Header
	Body   io.ReadCloser
	Size   int64 // bytes of Body, or -1 if not known
}

// Source answers requests. An error means that there is no answer: the service
// could not be reached or did not speak HTTP in time. Cancelling the context
// ends the request, also while the body is being read.
type Source interface {
	Answer(ctx context.Context, r Request) (*Answer, error)
}
