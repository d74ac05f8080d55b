package sim

import (
	"context"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"
)

func count(n int, ask func() answer) map[int]int {
	out := make(map[int]int)
	for range n {
		out[ask().Status]++
	}
	return out
}

func TestGeneralLimit(t *testing.T) {
	b := newBench(t, Config{Limits: Limits{General: 5}})
	ask := func() answer { return b.get("/metadata/instance?api-version=2021-02-01") }
	if got := count(8, ask); got[200] != 5 || got[429] != 3 {
		t.Errorf("8 at once: got %v, want 5 answers and 3 refusals", got)
	}
	a := ask()
	if a.Status != 429 || a.Body != `{"error":"Too many requests"}` || a.Header.Get("Retry-After") != "" {
		t.Errorf("got %d %s %v", a.Status, a.Body, a.Header)
	}
	b.clock.advance(200 * time.Millisecond)
	if got := count(2, ask); got[200] != 1 {
		t.Errorf("a fifth of a second later: got %v, want 1 answer", got)
	}
	b.clock.advance(time.Hour)
	if got := count(8, ask); got[200] != 5 {
		t.Errorf("an hour later: got %v, want 5 answers and not a stock of them", got)
	}
}

// The limit is the VM's: endpoints share it, and so do requests that the
// service refuses; the identity endpoints have their own.
func TestLimitsAreByCategory(t *testing.T) {
	b := newBench(t, Config{Limits: Limits{General: 2}})
	b.get("/metadata/versions")
	b.get("/metadata/nothing")
	if a := b.get("/metadata/scheduledevents?api-version=2020-07-01"); a.Status != 429 {
		t.Errorf("third request: got %d, want 429", a.Status)
	}
	if got := count(25, func() answer { return b.get(tokenURL + arm) }); got[200] != 20 || got[429] != 5 {
		t.Errorf("25 tokens: got %v, want 20 answers", got)
	}
	a := b.get(tokenURL + arm)
	if a.Status != 429 || a.Body != `{"error":"too_many_requests","error_description":"Too many requests"}` {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
}

func TestZeroLimitsAreThePlatforms(t *testing.T) {
	keys, err := testKeys()
	if err != nil {
		t.Fatal(err)
	}
	c := &clock{now: start}
	s, err := New(Config{Keys: keys, Now: c.Now})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{Server: s, t: t, clock: c}
	if got := count(10, func() answer { return b.get("/metadata/versions") }); got[200] != 5 {
		t.Errorf("got %v, want 5 answers", got)
	}
}

func TestConcurrentIdentityRequests(t *testing.T) {
	arrived := make(chan struct{}, 5)
	b := newBench(t, Config{
		Limits: Limits{Identity: 100},
		Faults: []Fault{{Hang: true, Path: "/metadata/identity"}},
		Seen: func(x Exchange) {
			if x.Status == 0 {
				arrived <- struct{}{}
			}
		},
	})
	ctx, leave := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() { hangUntil(b, ctx) })
	}
	for range 5 {
		<-arrived
	}
	if a := b.get(tokenURL + arm); a.Status != 429 {
		t.Errorf("sixth at once: got %d, want 429", a.Status)
	}
	if a := b.get("/metadata/versions"); a.Status != 200 {
		t.Errorf("general request meanwhile: got %d, want 200", a.Status)
	}
	leave()
	wg.Wait()
	if err := b.SetFaults(nil); err != nil {
		t.Fatal(err)
	}
	if got := count(6, func() answer { return b.get(tokenURL + arm) }); got[200] != 6 {
		t.Errorf("after they left: got %v, want all answered", got)
	}
}

// hangUntil sends a token request that the client gives up with ctx.
func hangUntil(b *bench, ctx context.Context) {
	defer func() {
		if v := recover(); v != http.ErrAbortHandler {
			b.t.Errorf("got panic %v, want http.ErrAbortHandler", v)
		}
	}()
	r := httptest.NewRequestWithContext(ctx, "GET", tokenURL+arm, nil)
	b.Handler().ServeHTTP(httptest.NewRecorder(), r)
}

func TestParseLimits(t *testing.T) {
	for text, want := range map[string]Limits{
		"":                                    {},
		"off":                                 {Off: true},
		"general=10":                          {General: 10},
		"general=0.5,identity=1,concurrent=2": {General: 0.5, Identity: 1, Concurrent: 2},
	} {
		if got, err := ParseLimits(text); err != nil || got != want {
			t.Errorf("%q: got %+v %v, want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"on", "general", "general=", "general=0", "general=-1", "general=NaN", "general=1e9", "concurrent=1.5", "other=1", "general=1,"} {
		if got, err := ParseLimits(text); err == nil {
			t.Errorf("%q: got %+v, want an error", text, got)
		}
	}
}

func TestSlowLimit(t *testing.T) {
	b := newBench(t, Config{Limits: Limits{General: 0.5}})
	ask := func() answer { return b.get("/metadata/versions") }
	if got := count(2, ask); got[200] != 1 {
		t.Errorf("got %v, want 1 answer", got)
	}
	b.clock.advance(2 * time.Second)
	if got := count(2, ask); got[200] != 1 {
		t.Errorf("two seconds later: got %v, want 1 answer", got)
	}
}
