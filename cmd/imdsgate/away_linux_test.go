package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/testnet"
)

// asked is one answer to somebody who asks again and again.
type asked struct {
	at     time.Time // when the request began
	status int       // 0: the connection broke
	took   time.Duration
	body   string
}

// keepAsking asks once each interval, whether or not the last request is over,
// until ctx ends. Each request has as long as the SDKs give it.
func keepAsking(ctx context.Context, c *testnet.Container, target string, interval time.Duration) []asked {
	var all []asked
	var mu sync.Mutex
	var under sync.WaitGroup
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for ctx.Err() == nil {
		under.Go(func() {
			begun := time.Now()
			patience, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			r, err := callIn(patience, c.NS, get(target))
			if err != nil {
				r.status = 0
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, asked{begun, r.status, time.Since(begun), string(r.body)})
		})
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	under.Wait()
	return all
}

// The times of TestAway.
const (
	tokenLife   = 8 * time.Second
	awayFor     = 10 * time.Second
	watchedFor  = 3 * time.Second // after that
	askInterval = 200 * time.Millisecond
)

// shortTokens has the simulator issue tokens of that life.
var shortTokens = fmt.Sprintf("token-ttl=%v,path=/metadata/identity", tokenLife)

// TestAway takes the service away while a container asks for a token every 200 ms
// that it has been given before, and lets the token expire: until then no
// request fails. When the service is back it is noticed within 2 s. Of the ways
// to be away, "frozen" is a service whose kernel takes connections while it does
// not run, and which answers everybody afterwards.
func TestAway(t *testing.T) {
	t.Parallel()
	var all sync.WaitGroup // all the ways at once, however few processors there are
	for _, tc := range []struct{ name, fault string }{
		{"down", "down"}, {"unreachable", "reset"}, {"frozen", ""}, {"half_bodies", "cut"},
		{"updating", "status=410"}, {"throttled", "status=429"}, {"broken", "status=503"},
	} {
		all.Go(func() { t.Run(tc.name, func(t *testing.T) { awayUntilExpiry(t, tc.fault) }) })
	}
	all.Wait()
}

func awayUntilExpiry(t *testing.T, fault string) {
	s, cs := startAnswers(t, answersSetup{containers: 1, sim: []string{"--fault", shortTokens}})
	target := tokenTarget + "https://vault.azure.net"
	expires := firstToken(t, cs[0], target)
	leave, comeBack := func() { setFaults(t, s, shortTokens, fault) }, func() { setFaults(t, s, shortTokens) }
	if fault == "" {
		leave, comeBack = func() { s.Sim.Signal(syscall.SIGSTOP) }, func() { s.Sim.Signal(syscall.SIGCONT) }
		defer comeBack()
	}
	leave()
	ctx, stop := context.WithTimeout(t.Context(), awayFor+watchedFor)
	defer stop()
	var back time.Time
	var restored sync.WaitGroup
	restored.Go(func() {
		time.Sleep(awayFor) // the outage itself
		back = time.Now()
		comeBack()
	})
	told := keepAsking(ctx, cs[0], target, askInterval)
	restored.Wait()
	judgeAway(t, told, expires, back)
	if !slices.ContainsFunc(auditOf(t, s), func(e audit.Event) bool { return e.Cache == "stale" && e.Status == 200 }) {
		t.Error("the audit does not say that anything was stale")
	}
}

// firstToken has a token issued, and returns when it ends: by the time of day, or
// by what is left of its life, whichever says so first; both are in whole seconds.
func firstToken(t *testing.T, c *testnet.Container, target string) time.Time {
	t.Helper()
	begun := time.Now()
	r, err := callIn(t.Context(), c.NS, get(target))
	if err != nil || r.status != 200 {
		t.Fatalf("got %d, %v", r.status, err)
	}
	var token struct {
		On int64 `json:"expires_on,string"`
		In int64 `json:"expires_in,string"`
	}
	if err := json.Unmarshal(r.body, &token); err != nil {
		t.Fatal(err)
	}
	expires := begun.Add(time.Duration(token.In) * time.Second)
	if on := time.Unix(token.On, 0); on.Before(expires) {
		expires = on
	}
	return expires
}

// judgeAway counts what those who asked while the service was away were told.
func judgeAway(t *testing.T, all []asked, expires, back time.Time) {
	t.Helper()
	var kept, failedEarly, late int
	var slowest, recovered time.Duration
	told := make(map[int]int)
	for _, a := range all {
		switch {
		case a.at.Add(a.took).Before(expires) || a.at.Before(expires) && a.status == 200:
			kept++
			slowest = max(slowest, a.took)
			if a.status != 200 {
				failedEarly++
			}
		case a.at.Before(back):
			late++
			told[a.status]++
			if a.status == 200 && a.at.After(expires.Add(time.Second)) && a.at.Add(a.took).Before(back) {
				t.Errorf("%v after its end a token was served", a.at.Sub(expires))
			}
		case a.status != 200:
			recovered = max(recovered, a.at.Add(a.took).Sub(back))
		}
	}
	if failedEarly > 0 {
		t.Errorf("%d of %d requests failed while the token was valid", failedEarly, kept)
	}
	last := all[len(all)-1]
	for _, a := range all {
		if a.at.After(last.at) {
			last = a
		}
	}
	if recovered > 2*time.Second || last.status != 200 {
		t.Errorf("errors until %v after the service was back, the last answer is %d; want 2s at most", recovered, last.status)
	}
	t.Logf("token valid: %d requests, %d failed, the slowest took %v; after its end: %d requests got %v; back: the last error came %v after",
		kept, failedEarly, slowest.Round(time.Millisecond), late, told, recovered.Round(time.Millisecond))
}

// patient is a client that tries again as azidentity does: up to six times after
// 404, 410, 429, 5xx and broken connections, after 2 s, 4 s … 25 s, here divided
// by pace.
func patient(ctx context.Context, c *testnet.Container, target string, pace time.Duration) (statuses []string, last reply) {
	pause := 2 * time.Second / pace
	for try := 0; ; try++ {
		r, err := callIn(ctx, c.NS, get(target))
		switch {
		case err != nil:
			statuses, r.status = append(statuses, "broken"), 0
		default:
			statuses = append(statuses, fmt.Sprint(r.status))
		}
		again := r.status == 0 || r.status == 404 || r.status == 410 || r.status == 429 || r.status >= 500
		if !again || try == 6 || ctx.Err() != nil {
			return statuses, r
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, 25*time.Second/pace)
	}
}

// TestPatientClient has clients that try again as SDKs do ask for what nobody has
// been given before, while the service is in trouble: in the end all have it.
func TestPatientClient(t *testing.T) {
	t.Parallel()
	var all sync.WaitGroup // all troubles at once, however few processors there are
	for _, tc := range []struct {
		name, fault string
		pace        time.Duration
		tries       int // at most
	}{
		// Time runs at ten times the speed.
		{"gone_for_70s", "gone=7s", 10, 7},
		{"storm_of_429", "status=429,count=20", 10, 7},
		{"throttled_for_a_moment", "status=429,count=3", 10, 1},
		{"resets", "reset,count=3", 10, 5},
		{"half_bodies", "cut,count=3", 10, 5},
		{"down_for_three_calls", "down,count=3", 10, 5},
		{"hangs_once", "hang,count=1", 1, 2}, // which takes the client's patience, 10 s
	} {
		all.Go(func() { t.Run(tc.name, func(t *testing.T) { patientClients(t, tc.fault, tc.pace, tc.tries) }) })
	}
	all.Wait()
}

func patientClients(t *testing.T, fault string, pace time.Duration, tries int) {
	s, cs := startAnswers(t, answersSetup{containers: 20})
	setFaults(t, s, fault)
	ctx, stop := context.WithTimeout(t.Context(), 40*time.Second)
	defer stop()
	begun := time.Now()
	seen := make([][]string, len(cs))
	var clients sync.WaitGroup
	for i, c := range cs {
		clients.Go(func() {
			var last reply
			if seen[i], last = patient(ctx, c, tokenTarget+"https://vault.azure.net", pace); last.status != 200 {
				t.Errorf("container %d gave up: %v: %s", i, seen[i], last.body)
			}
		})
	}
	clients.Wait()
	took, ways := time.Since(begun), make(map[string]int)
	for i, statuses := range seen {
		if len(statuses) > tries {
			t.Errorf("container %d tried %d times, want %d at most", i, len(statuses), tries)
		}
		ways[strings.Join(statuses, " ")]++
	}
	t.Logf("%d clients after %v, %d calls to the service; what they saw: %v", len(cs), took.Round(time.Millisecond), len(calls(t, s)), ways)
}
