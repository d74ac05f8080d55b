package upstream_test

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
)

func TestTwoThingsNeverShare(t *testing.T) {
	accept := asking(imds.InstanceRead, "/metadata/instance")
	accept.Header = http.Header{"Metadata": {"true"}, "Accept": {"text/plain"}}
	capital := tokenFor(vault)
	capital.Header = http.Header{"Metadata": {"True"}}
	other := tokenFor(vault)
	other.Query.Cloud = "other"
	action := tokenFor(vault)
	action.Query.Action = imds.IdentityInfo
	requests := map[string]upstream.Request{
		"default identity": tokenFor(vault), "other resource": tokenFor(graph), "other slash": tokenFor(vault + "/"),
		"client a": tokenFor(vault, "client_id", "a"), "client b": tokenFor(vault, "client_id", "b"),
		"object a": tokenFor(vault, "object_id", "a"), "resource id a": tokenFor(vault, "msi_res_id", "a"),
		"authority": tokenFor(vault, "authority", "a"), "claims": tokenFor(vault, "claims", "a"),
		"moved border": tokenFor(vault, "client_id", "ab", "x", ""), "moved border 2": tokenFor(vault, "client_id", "a", "bx", ""),
		"accept": accept, "capital": capital, "other cloud": other, "other action": action,
		"text": asking(imds.InstanceRead, "/metadata/instance"), "text 2": asking(imds.InstanceRead, "/metadata/instance/"),
	}
	s := &source{}
	s.answer = func(context.Context, upstream.Request) (*upstream.Answer, error) {
		return answer(200, tokenBody(fmt.Sprint(s.calls.Load()), time.Now().Add(24*time.Hour), 24*time.Hour)), nil
	}
	c := cacheOver(t, &upstream.Cache{Source: s})
	got := make(map[string]string)
	for name, r := range requests {
		tok, from := ask(t, c, r)
		if who, ok := got[tok]; ok || from != "" {
			t.Errorf("%s got the token of %s (%s)", name, who, from)
		}
		got[tok] = name
	}
	for name, r := range requests {
		if tok, from := ask(t, c, r); got[tok] != name || from != upstream.Hit {
			t.Errorf("%s got the token of %s (%q)", name, got[tok], from)
		}
	}
}

// Two workloads that policy lets ask for the same do share.
func TestWorkloadIsNotInTheKey(t *testing.T) {
	s := minting(time.Hour)
	c := cacheOver(t, &upstream.Cache{Source: s})
	ask(t, c, by("docker:a", tokenFor(vault)))
	if tok, from := ask(t, c, by("docker:b", tokenFor(vault))); tok != "t1" || from != upstream.Hit {
		t.Errorf("got %s %q, want t1 hit", tok, from)
	}
}

// A header that is not in the key could put something into everybody's answer.
func TestHeaderThatIsNotInTheKeyIsNotSent(t *testing.T) {
	var seen http.Header
	s := &source{answer: func(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
		seen = r.Header
		return answer(200, "{}"), nil
	}}
	c := cacheOver(t, &upstream.Cache{Source: s})
	r := asking(imds.InstanceRead, "/metadata/instance")
	r.Header = http.Header{"Metadata": {"True"}, "Accept": {"text/plain, */*"}, "User-Agent": {"x"}, "X-Ms-Client-Request-Id": {"1"}, "X-Client-Sku": {"y"}}
	ask(t, c, r)
	if d := cmp.Diff(http.Header{"Metadata": {"True"}, "Accept": {"text/plain, */*"}}, seen); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	tok := tokenFor(vault)
	tok.Header = r.Header
	ask(t, c, tok)
	if d := cmp.Diff(http.Header{"Metadata": {"True"}}, seen); d != "" {
		t.Errorf("a token (-want +got)\n%s", d)
	}
	r.Query.Action = imds.IdentityDocument
	ask(t, c, r)
	if d := cmp.Diff(r.Header, seen); d != "" {
		t.Errorf("a call of one's own (-want +got)\n%s", d)
	}
}

func TestBypass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := minting(24 * time.Hour)
		c := cacheOver(t, &upstream.Cache{Source: s})
		bypass, plain := tokenFor(vault, "bypass_cache", "True"), tokenFor(vault)
		for i, step := range []struct {
			pause       time.Duration
			request     upstream.Request
			token, from string
		}{
			{0, plain, "t1", ""},
			{0, bypass, "t2", ""},           // not from the cache
			{0, plain, "t2", upstream.Hit},  // what it brought is everybody's
			{0, bypass, "t2", upstream.Hit}, // but not again and again
			{9 * time.Second, bypass, "t2", upstream.Hit},
			{time.Second, bypass, "t3", ""},
			{0, plain, "t3", upstream.Hit},
			{0, tokenFor(vault, "bypass_cache", "false"), "t4", ""}, // a request of its own
		} {
			time.Sleep(step.pause)
			if tok, from := ask(t, c, step.request); tok != step.token || from != step.from {
				t.Errorf("step %d: got %s %q, want %s %q", i, tok, from, step.token, step.from)
			}
		}
	})
}

// A bypass that fails is told so, and spoils nothing.
func TestBypassThatFails(t *testing.T) {
	s := minting(24 * time.Hour)
	good := s.answer
	c := cacheOver(t, &upstream.Cache{Source: s})
	ask(t, c, tokenFor(vault))
	for _, status := range []int{400, 429, 500} {
		s.answer = saying(status, "{}").answer
		if a, _, err := read(t, c, tokenFor(vault, "bypass_cache", "true")); err != nil || a.Status != status {
			t.Errorf("got %v, %v, want %d", a, err, status)
		}
		if tok, from := ask(t, c, tokenFor(vault)); tok != "t1" || from != upstream.Hit {
			t.Errorf("after a bypass with %d: got %s %q, want t1 hit", status, tok, from)
		}
	}
	s.answer = good
}

// A call that began earlier brings nothing newer, however late it ends.
func TestSlowCallDoesNotReplaceNewerOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlow()
		c := cacheOver(t, &upstream.Cache{Source: s})
		plain := askLater(t.Context(), c, tokenFor(vault))
		time.Sleep(time.Second)
		synctest.Wait()
		bypass := tokenFor(vault, "bypass_cache", "true")
		fast := s.source.answer
		s.answer = minting(time.Hour).answer
		ask(t, c, bypass)
		s.answer = fast
		s.let <- answer(200, tokenBody("old", time.Now().Add(time.Hour), time.Hour))
		<-plain
		if tok, from := ask(t, c, tokenFor(vault)); tok == "old" || from != upstream.Hit {
			t.Errorf("got %s %q, want the newer one", tok, from)
		}
	})
}

// The service's no ends what was kept.
func TestNoEndsWhatWasKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := minting(time.Hour)
		c := cacheOver(t, &upstream.Cache{Source: s})
		ask(t, c, tokenFor(vault))
		time.Sleep(30 * time.Minute)
		for _, status := range []int{403, 500} {
			s.answer = saying(status, "{}").answer
			if a, _, err := read(t, c, tokenFor(vault)); err != nil || a.Status != status {
				t.Errorf("got %v, %v, want %d: there is nothing to fall back on", a, err, status)
			}
		}
	})
}

func TestIdentityTakenAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := minting(time.Hour)
		c := cacheOver(t, &upstream.Cache{Source: s})
		ask(t, c, tokenFor(vault))
		s.answer = saying(400, `{"error":"invalid_request","error_description":"Identity not found"}`).answer
		time.Sleep(30 * time.Minute)
		for range 2 {
			if a, _, err := read(t, c, tokenFor(vault)); err != nil || a.Status != 400 {
				t.Errorf("got %v, %v, want 400", a, err)
			}
			s.answer = saying(500, "{}").answer
		}
		time.Sleep(time.Second)
		if a, _, err := read(t, c, tokenFor(vault)); err != nil || a.Status != 500 {
			t.Errorf("got %v, %v, want 500: there is nothing to fall back on", a, err)
		}
	})
}
