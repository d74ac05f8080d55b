package gate

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

// With the cache behind it the gate says where an answer is from, and what it
// takes out for one caller is there for the next.
func TestKeptAnswers(t *testing.T) {
	const doc = `{"compute":{"name":"vm","userData":"c2VjcmV0"}}`
	var calls atomic.Int32
	cache := &upstream.Cache{Source: sourceFunc(func(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
		calls.Add(1)
		if r.Workload != "static:web" {
			t.Errorf("the source was asked for %q", r.Workload)
		}
		return answer(doc), nil
	})}
	t.Cleanup(cache.Close)
	trusted := parsePolicy(t, "allow: [instance.read, instance.userdata]")
	_, blanked, s := serving(t, cache)
	g, whole := newGate(t, cache)
	g.Policy = trusted
	s2 := start(t, g, listen(t))
	for i, step := range []struct {
		to    *running
		sink  events
		from  string
		shows bool
	}{{s, blanked, "", false}, {s2, whole, upstream.Hit, true}, {s, blanked, upstream.Hit, false}, {s2, whole, upstream.Hit, true}} {
		p := dial(t, step.to.addr)
		p.send(t, request("GET", instance))
		r, body := p.response(t, "GET")
		if r.StatusCode != 200 || strings.Contains(body, "c2VjcmV0") != step.shows || step.shows && body != doc || r.ContentLength != int64(len(body)) {
			t.Errorf("step %d: got %d %s", i, r.StatusCode, body)
		}
		if e := step.sink.next(t); e.Cache != step.from || e.Bytes != int64(len(body)) || !e.Upstream || e.Decision != audit.Allow {
			t.Errorf("step %d: got %+v, want cache %q", i, e, step.from)
		}
	}
	if n := calls.Load(); n != 1 {
		t.Errorf("got %d calls, want 1", n)
	}
}

func TestNothingLeftInTheBudget(t *testing.T) {
	for name, tc := range map[string]struct {
		err          error
		status       int
		code, reason string
	}{
		"busy": {upstream.ErrBusy, 429, "too_many_requests", imds.ReasonBusy},
		"away": {upstream.ErrAway, 503, "service_unavailable", imds.ReasonUnavailable},
		"gone": {upstream.ErrGone, 410, "service_unavailable", imds.ReasonUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			_, sink, s := serving(t, sourceFunc(func(context.Context, upstream.Request) (*upstream.Answer, error) { return nil, tc.err }))
			p := dial(t, s.addr)
			p.send(t, request("GET", token))
			r, body := p.response(t, "GET")
			if r.StatusCode != tc.status || !strings.Contains(body, `"error":"`+tc.code+`"`) || r.Header.Get(imds.ReasonHeader) != tc.reason {
				t.Errorf("got %d %v %s, want %d %s", r.StatusCode, r.Header, body, tc.status, tc.code)
			}
			if e := sink.next(t); e.Decision != audit.Error || e.Reason != tc.err.Error() || e.Upstream || e.Cache != "" {
				t.Errorf("got %+v, want an error", e)
			}
		})
	}
}

// BenchmarkKept is a request through a connection, by net/http on both sides of
// the gate, for a token that is kept.
func BenchmarkKept(b *testing.B) {
	body := `{"access_token":"` + strings.Repeat("x", 1500) + `","expires_in":"86000","expires_on":"4102444800"}`
	cache := &upstream.Cache{Source: says(body)}
	b.Cleanup(cache.Close)
	g, _ := newGate(b, cache)
	g.Audit = audit.Tee{}
	g.Directory = new(workload.Directory)
	g.Directory.Set(1, workload.Workload{ID: "static:web"})
	keepAlive(b, g)
}
