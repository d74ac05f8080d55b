package upstream_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/imds"
	"imdsgate/internal/sim"
	"imdsgate/internal/upstream"
)

const management = "https://management.azure.com/"

// ways are those in which the service can be away.
var ways = map[string]sim.Fault{
	"front_answers_500": {Down: true},
	"unavailable":       {Status: 503},
	"gone":              {Gone: 24 * time.Hour},
	"throttled":         {Status: 429},
	"reset":             {Reset: true},
	"hang":              {Hang: true},
}

// inTime runs a test in made-up time, with the simulator and all that is before
// it.
func inTime(t *testing.T, ttl time.Duration, test func(t *testing.T, s *sim.Server, c *upstream.Cache)) {
	simulator(t, sim.Config{}) // its keys are made in real time
	synctest.Test(t, func(t *testing.T) {
		s := simulator(t, sim.Config{TokenTTL: ttl})
		test(t, s, cacheOver(t, &upstream.Cache{Source: &upstream.Budget{Source: piping(t, s)}}))
	})
}

func setFaults(t *testing.T, s *sim.Server, f ...sim.Fault) {
	t.Helper()
	if err := s.SetFaults(f); err != nil {
		t.Fatal(err)
	}
}

// The service is away for ten minutes, in the middle of which the token should
// have been renewed: nobody notices, and two seconds after it is back nothing is stale.
func TestAwayForTenMinutes(t *testing.T) {
	for name, fault := range ways {
		t.Run(name, func(t *testing.T) {
			inTime(t, 40*time.Minute, func(t *testing.T, s *sim.Server, c *upstream.Cache) {
				first, _ := ask(t, c, tokenFor(management))
				ask(t, c, instance())
				time.Sleep(15*time.Minute - time.Second)
				setFaults(t, s, fault)
				s.ClearHistory()
				from := make(map[string]int)
				var longest time.Duration
				for i := range 10 * 60 * 5 {
					time.Sleep(200 * time.Millisecond)
					start := time.Now()
					tok, how := ask(t, c, by(container(i%7), tokenFor(management)))
					if from[how]++; tok != first {
						t.Fatalf("got %q after %d calls, want the token that there is", tok, i)
					}
					longest = max(longest, time.Since(start))
				}
				if from[upstream.Hit] == 0 || from[upstream.Stale] == 0 || len(from) != 2 {
					t.Errorf("got answers from %v, want hits, and stale ones after half its life", from)
				}
				if longest > time.Second {
					t.Errorf("somebody waited for %v, want a second at most", longest)
				}
				if n := len(s.History()); n < 2 || n > 1200 {
					t.Errorf("the service was asked %d times in 10 minutes, want twice a second at most", n)
				}
				setFaults(t, s)
				back := time.Now()
				for time.Sleep(100 * time.Millisecond); ; time.Sleep(100 * time.Millisecond) {
					if _, how := ask(t, c, tokenFor(management)); how != upstream.Stale {
						break
					}
				}
				if took := time.Since(back); took > 2*time.Second {
					t.Errorf("it took %v to recover, want 2s", took)
				}
			})
		})
	}
}

// A token is served until it really expires, and not a moment longer.
func TestAwayUntilTokenExpires(t *testing.T) {
	for name, fault := range ways {
		t.Run(name, func(t *testing.T) {
			inTime(t, 6*time.Minute, func(t *testing.T, s *sim.Server, c *upstream.Cache) {
				first, _ := askToken(t, c, tokenFor(management))
				time.Sleep(30 * time.Second)
				setFaults(t, s, fault)
				expires := time.Unix(first.On, 0)
				for time.Until(expires) > 0 {
					a, body, err := read(t, c, tokenFor(management))
					if err != nil || a.Status != 200 || !strings.Contains(body, first.Token) {
						t.Fatalf("with %v left: got %v, %v, want the token", time.Until(expires), a, err)
					}
					time.Sleep(time.Second)
				}
				if a, _, err := read(t, c, tokenFor(management)); err == nil && a.Status == 200 {
					t.Errorf("%v after its end: got a token (%q)", -time.Until(expires), a.Cache)
				}
			})
		})
	}
}

// Facts are served for a while too; events are not, and nothing is for ever.
func TestAwayFacts(t *testing.T) {
	inTime(t, 0, func(t *testing.T, s *sim.Server, c *upstream.Cache) {
		events := asking(imds.EventsRead, "/metadata/scheduledevents")
		events.Query.Params[0].Value = "2020-07-01"
		ask(t, c, instance())
		ask(t, c, events)
		time.Sleep(2 * time.Second)
		setFaults(t, s, sim.Fault{Status: 503})
		if a, _, err := read(t, c, events); err != nil || a.Status != 503 {
			t.Errorf("events: got %v, %v, want to hear that there are none to be had", a, err)
		}
		for range 15 * 60 / 5 {
			if a, _, err := read(t, c, instance()); err != nil || a.Status != 200 {
				t.Fatalf("got %v, %v, want facts", a, err)
			}
			time.Sleep(5 * time.Second)
		}
		time.Sleep(time.Minute)
		if a, _, err := read(t, c, instance()); err != nil || a.Status != 503 {
			t.Errorf("after 15 min: got %v, %v, want 503", a, err)
		}
	})
}

// The service says 410 for 70 s, to somebody who has nothing to fall back on.
func TestGoneForSeventySeconds(t *testing.T) {
	inTime(t, 0, func(t *testing.T, s *sim.Server, c *upstream.Cache) {
		setFaults(t, s, sim.Fault{Gone: 70 * time.Second})
		start := time.Now()
		for {
			a, _, err := read(t, c, tokenFor(management))
			if err == nil && a.Status == 200 {
				break
			}
			if !errors.Is(err, upstream.ErrGone) && (err != nil || a.Status != 410) {
				t.Errorf("got %v, %v, want 410 or %v", a, err, upstream.ErrGone)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if took := time.Since(start); took < 70*time.Second || took > 72*time.Second {
			t.Errorf("took %v, want 70s, and 2s more at most", took)
		}
		if n := len(s.History()); n > 180 {
			t.Errorf("the service was asked %d times, want about twice a second", n)
		}
	})
}

// Somebody else on the VM uses its limit up: many ask, few calls go out.
func TestThrottleStorm(t *testing.T) {
	inTime(t, 0, func(t *testing.T, s *sim.Server, c *upstream.Cache) {
		setFaults(t, s, sim.Fault{Status: 429, Count: 10})
		start := time.Now()
		_, errs := flood(t, c, 100, func(i int) upstream.Request {
			return by(container(i), tokenFor(management, "client_id", fmt.Sprint(i%5)))
		})
		for _, err := range errs {
			if !errors.Is(err, upstream.ErrBusy) {
				t.Errorf("got %v, want %v", err, upstream.ErrBusy)
			}
		}
		if took := time.Since(start); took > 6*time.Second {
			t.Errorf("somebody waited for %v", took)
		}
		if n := len(s.History()); n > 15 {
			t.Errorf("the service was asked %d times, want ten in the storm, and once for each thing", n)
		}
		for {
			if a, _, err := read(t, c, tokenFor(management)); err == nil && a.Status == 200 {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("it took %v until the storm was over", took)
		}
	})
}

// What breaks off is an error for those who wait, once, and is not kept.
func TestBrokenAnswersAreNotKept(t *testing.T) {
	body := tokenBody("secret", time.Now().Add(24*time.Hour), 24*time.Hour)
	for name, text := range map[string]string{
		"half_a_body":      fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body[:len(body)/2]),
		"length_too_large": fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body)+5, body),
		"length_too_small": fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body)-5, body),
		"half_a_chunk":     fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s", len(body)+1, body),
		"nothing":          "",
		"no_http":          "SSH-2.0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			var broken atomic.Bool
			broken.Store(true)
			s := serve(t, func(_ int32, c net.Conn) {
				if _, err := readRequest(bufio.NewReader(c), 0); err != nil {
					return
				}
				if broken.Load() {
					io.WriteString(c, text)
					return
				}
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			})
			c := cacheOver(t, &upstream.Cache{Source: &upstream.Budget{Source: s.client(t, &upstream.Client{})}})
			a, got, err := read(t, c, tokenFor(vault))
			switch {
			case name == "length_too_small":
				if err != nil || a.Status != 200 || got != body[:len(body)-5] {
					t.Errorf("got %v %q: the length is all that there is to go by", err, got)
				}
			case err == nil:
				t.Errorf("got %d %q, want an error", a.Status, got)
			}
			broken.Store(false)
			if a, got, err := read(t, c, tokenFor(vault)); err != nil || got != body || a.Cache != "" {
				t.Errorf("got %v %q, want the whole from the service", err, got)
			}
			if a, got, err := read(t, c, tokenFor(vault)); err != nil || len(got) < len(body)-1 || a.Cache != upstream.Hit {
				t.Errorf("got %v %q, want a hit", err, got)
			}
		})
	}
}

// Resets of kept connections and of new ones: with a token there is no failure.
func TestResets(t *testing.T) {
	s := simulator(t, sim.Config{})
	c := cacheOver(t, &upstream.Cache{Source: &upstream.Budget{Source: listening(t, s)}})
	ask(t, c, tokenFor(management))
	setFaults(t, s, sim.Fault{Reset: true})
	for range 10 {
		if _, from := ask(t, c, tokenFor(management)); from != upstream.Hit {
			t.Errorf("got %q, want a hit", from)
		}
	}
	if _, _, err := read(t, c, tokenFor(vault)); err == nil || strings.Contains(err.Error(), "eyJ") {
		t.Errorf("got %v, want an error", err)
	}
	setFaults(t, s)
	if _, from := ask(t, c, tokenFor(vault)); from != "" {
		t.Errorf("got %q, want an answer", from)
	}
}

// Corrections of the clock: a token is never served when it is over, whichever
// clock says so, and a wrong clock is no reason not to be served.
func TestClockSteps(t *testing.T) {
	for name, tc := range map[string]struct {
		offset, step time.Duration // of the time of day, from the start and later
		after        time.Duration // when it is asked again
		from, token  string
	}{
		"none":                             {0, 0, time.Minute, upstream.Hit, "t1"},
		"forward_within_its_life":          {0, 10 * time.Minute, time.Minute, upstream.Hit, "t1"},
		"forward_beyond_its_life":          {0, 2 * time.Hour, time.Minute, "", "t2"},
		"back_before_its_time":             {0, -24 * time.Hour, time.Minute, upstream.Hit, "t1"},
		"back_and_its_life_is_over":        {0, -24 * time.Hour, 61 * time.Minute, "", "t2"},
		"slow_from_the_start":              {-24 * time.Hour, 0, 61 * time.Minute, "", "t2"},
		"slow_from_the_start_and_in_time":  {-24 * time.Hour, 0, 10 * time.Minute, upstream.Hit, "t1"},
		"slow_and_then_corrected":          {-24 * time.Hour, 24 * time.Hour, 10 * time.Minute, upstream.Hit, "t1"},
		"fast_from_the_start":              {24 * time.Hour, 0, time.Minute, "", "t2"},
		"fast_by_less_than_the_token_has":  {20 * time.Minute, 0, 10 * time.Minute, upstream.Hit, "t1"},
		"forward_to_less_than_the_margin":  {0, 55 * time.Minute, 10 * time.Second, "", "t2"},
		"forward_and_back":                 {0, 0, 25 * time.Minute, upstream.Hit, "t1"},
		"forward_by_all_that_there_is":     {0, 60 * time.Minute, 0, "", "t2"},
		"forward_by_almost_half_its_time":  {0, 29 * time.Minute, 0, upstream.Hit, "t1"},
		"back_by_less_than_what_had_gone":  {0, -time.Minute, 2 * time.Minute, upstream.Hit, "t1"},
		"back_by_more_than_the_half_later": {0, -40 * time.Minute, 31 * time.Minute, "", "t2"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				offset := tc.offset
				s := minting(time.Hour)
				c := cacheOver(t, &upstream.Cache{Source: s, Now: func() time.Time { return time.Now().Add(offset) }})
				ask(t, c, tokenFor(vault))
				offset += tc.step
				time.Sleep(tc.after)
				tok, from := askToken(t, c, tokenFor(vault))
				if tok.Token != tc.token || from != tc.from {
					t.Errorf("got %s %q, want %s %q", tok.Token, from, tc.token, tc.from)
				}
				if left := time.Until(time.Unix(tok.On, 0)); time.Duration(tok.In)*time.Second > left {
					t.Errorf("expires_in says %ds with %v left", tok.In, left)
				}
			})
		})
	}
}
