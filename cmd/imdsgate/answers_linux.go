package main

import (
	"context"
	"net/http"

	"imdsgate/internal/policy"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

// fetchAhead fetches the usual tokens of a workload that has appeared, within the
// budget, as if it had asked. What fails is asked for again when it asks.
func (f *answerFlags) fetchAhead(ctx context.Context, v *policy.View, id workload.ID) {
	var requests []upstream.Request
	for _, q := range v.Usual() {
		requests = append(requests, upstream.Request{Query: q, Header: http.Header{"Metadata": {"true"}}, Workload: id})
	}
	_ = f.kept.Prefetch(ctx, requests)
}
