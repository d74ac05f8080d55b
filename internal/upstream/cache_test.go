package upstream_test

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/imds"
	"imdsgate/internal/sim"
	"imdsgate/internal/upstream"
)

// cacheOver is a cache that is closed at the end.
func cacheOver(t testing.TB, c *upstream.Cache) *upstream.Cache {
	t.Cleanup(c.Close)
	return c
}

// A thousand containers that ask for one token cost one call.
func TestThousandCallersOneToken(t *testing.T) {
	s := simulator(t, sim.Config{})
	c := cacheOver(t, &upstream.Cache{Source: &upstream.Budget{Source: listening(t, s)}})
	var all sync.WaitGroup
	tokens := make(chan string, 1000)
	for i := range cap(tokens) {
		all.Go(func() {
			tok, _ := ask(t, c, by(container(i), tokenFor(vault)))
			tokens <- tok
		})
	}
	all.Wait()
	close(tokens)
	first := <-tokens
	for tok := range tokens {
		if tok != first || tok == "" {
			t.Fatalf("got tokens %q and %q, want one", first, tok)
		}
	}
	if n := len(s.History()); n != 1 {
		t.Errorf("the service saw %d calls, want 1", n)
	}
}

func TestLives(t *testing.T) {
	const doc = "/metadata/instance"
	userdata := asking(imds.InstanceUserdata, doc+"/compute/userData")
	head := asking(imds.InstanceRead, doc)
	head.Query.Method = "HEAD"
	post := asking(imds.EventsApprove, "/metadata/scheduledevents")
	post.Query.Method, post.Body = "POST", []byte("{}")
	for name, tc := range map[string]struct {
		request upstream.Request
		fresh   time.Duration // 0: every request is a call
	}{
		"versions":               {asking(imds.VersionsRead, "/metadata/versions"), time.Hour},
		"instance":               {asking(imds.InstanceRead, doc), 30 * time.Second},
		"tags":                   {asking(imds.InstanceRead, doc+"/compute/tags"), 30 * time.Second},
		"network":                {asking(imds.InstanceRead, doc+"/network"), 30 * time.Second},
		"leaf_that_stays":        {asking(imds.InstanceRead, doc+"/compute/vmId"), 5 * time.Minute},
		"load_balancer":          {asking(imds.NetworkBalancer, "/metadata/loadbalancer"), 30 * time.Second},
		"tenant":                 {asking(imds.IdentityInfo, "/metadata/identity/info"), 5 * time.Minute},
		"events_are_merged":      {asking(imds.EventsRead, "/metadata/scheduledevents"), time.Second},
		"attested_document":      {asking(imds.IdentityDocument, "/metadata/attested/document"), 0},
		"credential":             {asking(imds.IdentityCredential, "/metadata/identity/getplatformmetadata"), 0},
		"user_data":              {userdata, 0},
		"provisioning":           {asking(imds.InstanceProvisioning, "/metadata/reprovisiondata"), 0},
		"legacy":                 {asking(imds.LegacyRead, "/metadata/v1/InstanceInfo"), 0},
		"unknown":                {asking(imds.Unknown, "/metadata/new"), 0},
		"action_of_no_list":      {asking("new.read", "/metadata/new"), 0},
		"head":                   {head, 0},
		"post":                   {post, 0},
		"approval_even_by_a_get": {asking(imds.EventsApprove, "/metadata/scheduledevents"), 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := saying(200, `{"a":"b"}`)
				c := cacheOver(t, &upstream.Cache{Source: s})
				_, from1 := ask(t, c, tc.request)
				time.Sleep(tc.fresh / 2)
				_, from2 := ask(t, c, tc.request)
				want := []string{"", upstream.Hit}
				if tc.fresh == 0 {
					want[1] = ""
				}
				if d := cmp.Diff(want, []string{from1, from2}); d != "" {
					t.Fatalf("(-want +got)\n%s", d)
				}
				calls := s.calls.Load()
				time.Sleep(tc.fresh/2 + time.Millisecond)
				if ask(t, c, tc.request); s.calls.Load() != calls+1 {
					t.Errorf("got %d calls, want another one at the end of its time", s.calls.Load()-calls)
				}
			})
		})
	}
}

func TestTokenUntilHalfLifeOrMargin(t *testing.T) {
	for name, tc := range map[string]struct{ life, fresh time.Duration }{
		"half_life":      {24 * time.Hour, 12 * time.Hour},
		"margin":         {8 * time.Minute, 3 * time.Minute},
		"less_than_that": {4 * time.Minute, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := minting(tc.life)
				c := cacheOver(t, &upstream.Cache{Source: s})
				ask(t, c, tokenFor(vault))
				if tc.fresh > 0 {
					time.Sleep(tc.fresh * 3 / 4)
					if tok, from := ask(t, c, tokenFor(vault)); tok != "t1" || from != upstream.Hit {
						t.Errorf("before: got %s %q, want t1 hit", tok, from)
					}
					time.Sleep(tc.fresh / 4)
				}
				if tok, from := ask(t, c, tokenFor(vault)); tok != "t2" || from != "" {
					t.Errorf("after: got %s %q, want t2, asked for", tok, from)
				}
			})
		})
	}
}

// Whoever uses a token never waits for its renewal, and always has the margin.
func TestTokenInUseIsRefreshedAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const life = time.Hour
		s := minting(life)
		c := cacheOver(t, &upstream.Cache{Source: s})
		ask(t, c, tokenFor(vault))
		for range 48 * 60 {
			time.Sleep(time.Minute)
			tok, from := askToken(t, c, tokenFor(vault))
			if from != upstream.Hit {
				t.Fatalf("got %q after %d calls, want hits alone", from, s.calls.Load())
			}
			left := time.Until(time.Unix(tok.On, 0))
			if left < 5*time.Minute {
				t.Fatalf("got a token with %v left", left)
			}
			if d := left - time.Duration(tok.In)*time.Second; d < 0 || d > 2*time.Second {
				t.Fatalf("expires_in says %ds, expires_on %v", tok.In, left)
			}
		}
		if n := s.calls.Load(); n < 96 || n > 130 {
			t.Errorf("got %d calls in 48 h for a token of 1 h, want one in 24 to 30 min", n)
		}
	})
}

func TestTokenNotInUseIsNotRefreshed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := minting(time.Hour)
		c := cacheOver(t, &upstream.Cache{Source: s})
		ask(t, c, tokenFor(vault))
		time.Sleep(48 * time.Hour)
		if n := s.calls.Load(); n != 1 {
			t.Errorf("got %d calls, want 1", n)
		}
	})
}

func TestOnlyExpiresInChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const form = ` { "expires_in" : "%s" , "access_token":"a<b>\u0026","ext_expires_in":"86399","expires_on":"%d","x":[1, {"expires_in":"5"}]}` + "\n"
		expires := time.Now().Add(3 * time.Hour).Unix()
		c := cacheOver(t, &upstream.Cache{Source: saying(200, fmt.Sprintf(form, "10800", expires))})
		for _, want := range []string{"10800", "10000", "9500"} {
			left, _ := time.ParseDuration(want + "s")
			time.Sleep(time.Until(time.Unix(expires, 0)) - left)
			_, body, err := read(t, c, tokenFor(vault))
			if d := cmp.Diff(fmt.Sprintf(form, want, expires), body); d != "" || err != nil {
				t.Errorf("%v (-want +got)\n%s", err, d)
			}
			ask(t, c, tokenFor(vault)) // Content-Length is right
		}
	})
}
