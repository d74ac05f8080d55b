package upstream_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
)

// besiege has many ask in turn for what next says, until ctx ends.
func besiege(ctx context.Context, wg *sync.WaitGroup, c upstream.Source, many int, pause time.Duration, next func(n int64) upstream.Request) {
	var n atomic.Int64
	for range many {
		wg.Go(func() {
			for ctx.Err() == nil {
				a, err := c.Answer(ctx, by("docker:evil", next(n.Add(1))))
				if err == nil {
					a.Body.Close()
				}
				if err != nil || pause < 50*time.Millisecond {
					time.Sleep(pause)
				}
			}
		})
	}
}

// Somebody who may have the same token keeps its own line full, and is the one
// that finds it is time to renew.
func TestFullLineStopsNobodysRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const life = 30 * time.Minute
		s := &source{}
		s.answer = func(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
			time.Sleep(20 * time.Millisecond)
			if r.Query.Params[1].Value == vault {
				return answer(200, tokenBody("t", time.Now().Add(life), life)), nil
			}
			return answer(403, "{}"), nil
		}
		c := cacheOver(t, &upstream.Cache{Source: &upstream.Budget{Source: s}})
		ask(t, c, by("docker:victim", tokenFor(vault)))
		time.Sleep(11 * time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		besiege(ctx, &wg, c, 44, 50*time.Millisecond, func(n int64) upstream.Request { return tokenFor(fmt.Sprint("https://junk", n)) })
		besiege(ctx, &wg, c, 4, 20*time.Millisecond, func(int64) upstream.Request { return tokenFor(vault) })
		for range 40 {
			time.Sleep(15*time.Second + 137*time.Millisecond)
			if tok, from := askToken(t, c, by("docker:victim", tokenFor(vault))); from == upstream.Stale || tok.In < 14*60 {
				t.Errorf("got %q with %d s left, want a token that was renewed in time", from, tok.In)
			}
		}
		cancel()
		wg.Wait()
	})
}

// The same for an answer that is short-lived.
func TestFullLineMakesNobodysAnswerOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{}
		s.answer = func(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
			time.Sleep(5 * time.Millisecond)
			if r.Query.Path == "/metadata/instance" {
				return answer(200, fmt.Sprintf(`{"expires_on":"%d"}`, time.Now().Unix())), nil // when it was said
			}
			return answer(404, "{}"), nil
		}
		c := cacheOver(t, &upstream.Cache{Source: &upstream.Budget{Source: s}})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		whole := asking(imds.InstanceRead, "/metadata/instance")
		besiege(ctx, &wg, c, 44, 50*time.Millisecond, func(n int64) upstream.Request {
			return asking(imds.InstanceRead, fmt.Sprint("/metadata/instance/x", n))
		})
		besiege(ctx, &wg, c, 1, 20*time.Millisecond, func(int64) upstream.Request { return whole })
		for range 60 {
			time.Sleep(10*time.Second + 137*time.Millisecond)
			said, from := askToken(t, c, by("docker:victim", whole))
			if old := time.Now().Unix() - said.On; from == upstream.Stale || old > 32 {
				t.Errorf("got %q of %d s ago, want none older than 30 s", from, old)
			}
		}
		cancel()
		wg.Wait()
	})
}

// What is not usual in a header is no way to have one thing kept many times.
func TestUnusualHeadersAreNotShared(t *testing.T) {
	long := strings.Repeat("x", 14000)
	for name, tc := range map[string]struct {
		header http.Header
		kept   bool
	}{
		"none":             {nil, true},
		"curl":             {http.Header{"Accept": {"*/*"}}, true},
		"sdk":              {http.Header{"Accept": {"application/json, text/plain,*/*"}}, true},
		"long":             {http.Header{"Accept": {long}}, false},
		"quality":          {http.Header{"Accept": {"*/*;q=0.12345"}}, false},
		"again_and_again":  {http.Header{"Accept": {"*/*,*/*"}}, false},
		"spaces":           {http.Header{"Accept": {"*/*,  text/plain"}}, false},
		"empty_part":       {http.Header{"Accept": {"*/*,"}}, false},
		"twice":            {http.Header{"Accept": {"*/*", "text/plain"}}, false},
		"long_metadata":    {http.Header{"Metadata": {long}}, false},
		"several_metadata": {http.Header{"Metadata": {"true", "true"}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := saying(200, "{}")
			c := cacheOver(t, &upstream.Cache{Source: s})
			r := asking(imds.VersionsRead, "/metadata/versions")
			r.Header = tc.header
			ask(t, c, r)
			if _, from := ask(t, c, r); (from == upstream.Hit) != tc.kept {
				t.Errorf("got %q, want it kept: %v", from, tc.kept)
			}
		})
	}
}

func TestLongKeyIsNotKept(t *testing.T) {
	c := cacheOver(t, &upstream.Cache{Source: minting(time.Hour)})
	r := tokenFor(vault, "claims", strings.Repeat("x", 1000))
	ask(t, c, r)
	if _, from := ask(t, c, r); from != "" || c.Bytes() != 0 {
		t.Errorf("got %q, and %d bytes are kept, want none", from, c.Bytes())
	}
}

// An answer that is one caller's is not told to those who asked at the same time.
func TestPrivateAnswerIsItsLeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlow()
		c := cacheOver(t, &upstream.Cache{Source: s})
		a := askLater(t.Context(), c, instance())
		synctest.Wait()
		b := askLater(t.Context(), c, instance())
		synctest.Wait()
		for _, body := range []string{"first", "second"} {
			private := answer(200, body)
			private.Header["Set-Cookie"] = []string{"s=" + body}
			s.let <- private
			synctest.Wait()
		}
		if a, b := <-a, <-b; a.body != "first" || b.body != "second" || b.from != "" {
			t.Errorf("got %+v and %+v, want to each its own", a, b)
		}
	})
}

// What was asked for before an approval is not told to those who ask after it.
func TestApprovalEndsOldEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{}
		var approved atomic.Bool
		s.answer = func(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
			if r.Query.Action == imds.EventsApprove {
				approved.Store(true)
				return answer(200, ""), nil
			}
			body := fmt.Sprint(approved.Load())
			if r.Workload == "docker:slow" {
				time.Sleep(time.Minute)
			}
			return answer(200, body), nil
		}
		c := cacheOver(t, &upstream.Cache{Source: s})
		events := asking(imds.EventsRead, "/metadata/scheduledevents")
		approve := asking(imds.EventsApprove, "/metadata/scheduledevents")
		approve.Query.Method, approve.Body = "POST", []byte("{}")
		slow := askLater(t.Context(), c, by("docker:slow", events))
		time.Sleep(10 * time.Second)
		if _, _, err := readIn(t.Context(), c, approve); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"", upstream.Hit} {
			if body, from, err := readIn(t.Context(), c, events); body != "true" || from != want || err != nil {
				t.Errorf("got %q %q, %v, want what is so after the approval, %q", body, from, err, want)
			}
		}
		if o := <-slow; o.body != "false" {
			t.Errorf("got %+v, want the answer of its own call", o)
		}
	})
}

// Flights that fail one after another for somebody else's reasons end with the
// second: that one is one's own.
func TestSecondTryIsOnesOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{}
		s.answer = func(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
			time.Sleep(10 * time.Millisecond)
			if r.Workload == "docker:evil" {
				return nil, upstream.ErrBusy
			}
			return answer(200, "{}"), nil
		}
		c := cacheOver(t, &upstream.Cache{Source: s})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		besiege(ctx, &wg, c, 20, 0, func(int64) upstream.Request { return tokenFor(vault) })
		for range 50 {
			time.Sleep(15 * time.Millisecond)
			if _, _, err := readIn(t.Context(), c, by("docker:victim", tokenFor(vault))); err != nil {
				t.Errorf("got %v, want an answer", err)
			}
		}
		cancel()
		wg.Wait()
	})
}

// Who leaves again and again does not have the service work on more at once than
// the budget allows, and what it worked on is kept.
func TestWhoLeavesFreesNoPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now, most atomic.Int32
		s := &source{}
		s.answer = func(ctx context.Context, _ upstream.Request) (*upstream.Answer, error) {
			most.Store(max(most.Load(), now.Add(1)))
			ended := make(chan struct{})
			time.AfterFunc(time.Second, func() { now.Add(-1); close(ended) }) // it does not notice who leaves
			select {
			case <-ended:
				return answer(200, tokenBody("t", time.Now().Add(time.Hour), time.Hour)), nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		c := cacheOver(t, &upstream.Cache{Source: &upstream.Budget{Source: s}})
		for i := range 40 {
			ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
			readIn(ctx, c, by("docker:evil", tokenFor(fmt.Sprint("https://junk", i))))
			cancel()
		}
		time.Sleep(2 * time.Second)
		if n := most.Load(); n > 4 {
			t.Errorf("the service worked on %d at once, want 4 at most", n)
		}
		if _, from := ask(t, c, tokenFor("https://junk0")); from != upstream.Hit {
			t.Errorf("got %q, want what the call brought that was left", from)
		}
	})
}
