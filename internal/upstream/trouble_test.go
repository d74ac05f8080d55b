package upstream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

// statusThen is a source of one status after another, the last for ever.
func statusThen(h http.Header, statuses ...int) *source {
	s := &source{}
	s.answer = func(context.Context, upstream.Request) (*upstream.Answer, error) {
		a := answer(statuses[min(int(s.calls.Load()), len(statuses))-1], "{}")
		for name, v := range h {
			a.Header[name] = v
		}
		return a, nil
	}
	return s
}

func TestRetryAfter(t *testing.T) {
	for name, tc := range map[string]struct {
		value string
		want  time.Duration
	}{
		"none": {"", 250 * time.Millisecond}, "seconds": {"3", 3 * time.Second}, "nonsense": {"soon", 250 * time.Millisecond},
		"below_zero": {"-5", 250 * time.Millisecond}, "date": {"Sat, 01 Jan 2000 00:00:04 GMT", 4 * time.Second},
		"past": {"Fri, 31 Dec 1999 00:00:00 GMT", 250 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // which begins with the year 2000
				b := &upstream.Budget{Source: statusThen(http.Header{"Retry-After": {tc.value}}, 429, 200), General: upstream.Rate{PerSecond: 1000}}
				first := by("docker:a", instance())
				first.Query.Method = "POST" // which is never tried again
				read(t, b, first)
				start := time.Now()
				if a, _, err := read(t, b, by("docker:b", instance())); err != nil || a.Status != 200 {
					t.Fatalf("got %v, %v, want 200", a, err)
				}
				if took := time.Since(start); took > tc.want || took < tc.want*3/4 {
					t.Errorf("took %v, want %v", took, tc.want)
				}
			})
		})
	}
}

// Nobody waits for what does not come in time.
func TestRetryAfterThatIsLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &upstream.Budget{Source: statusThen(http.Header{"Retry-After": {"86400"}}, 429, 200)}
		read(t, b, instance())
		start := time.Now()
		if _, err := b.Answer(t.Context(), instance()); !errors.Is(err, upstream.ErrBusy) || time.Since(start) != 0 {
			t.Errorf("got %v after %v, want %v at once", err, time.Since(start), upstream.ErrBusy)
		}
		if a, _, err := read(t, b, tokenFor(vault)); err != nil || a.Status != 200 {
			t.Errorf("identities have a limit of their own: got %v, %v", a, err)
		}
		time.Sleep(time.Minute)
		if _, _, err := read(t, b, instance()); err != nil {
			t.Errorf("got %v after a minute, which is the most", err)
		}
	})
}

func TestAwayForOneWorkload(t *testing.T) {
	reset := errors.New("reset")
	for name, tc := range map[string]struct {
		status int
		err    error
		want   error
	}{
		"error": {0, reset, upstream.ErrAway}, "internal": {500, nil, upstream.ErrAway},
		"unavailable": {503, nil, upstream.ErrAway}, "gone": {410, nil, upstream.ErrGone},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				good := true
				s := &source{answer: func(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
					if good || r.Workload == "docker:good" {
						return answer(200, "{}"), nil
					}
					return answer(tc.status, "{}"), tc.err
				}}
				b := &upstream.Budget{Source: s, General: upstream.Rate{PerSecond: 1000}}
				bad := by("docker:bad", instance())
				good = false
				for range 3 {
					if _, err := b.Answer(t.Context(), bad); !errors.Is(err, tc.err) {
						t.Errorf("got %v, want what the source has", err)
					}
				}
				if _, err := b.Answer(t.Context(), bad); !errors.Is(err, tc.want) || s.calls.Load() != 3 {
					t.Errorf("got %v after %d calls, want %v and no call", err, s.calls.Load(), tc.want)
				}
				if a, _, err := read(t, b, by("docker:good", instance())); err != nil || a.Status != 200 {
					t.Errorf("another workload got %v, %v: it has done nothing", a, err)
				}
				calls := s.calls.Load()
				for range 600 {
					time.Sleep(100 * time.Millisecond)
					b.Answer(t.Context(), bad)
				}
				if n := s.calls.Load() - calls; n < 90 || n > 160 {
					t.Errorf("got %d calls in a minute, want about two a second", n)
				}
				good = true
				start := time.Now()
				for {
					if _, err := b.Answer(t.Context(), bad); err == nil {
						break
					}
					time.Sleep(10 * time.Millisecond)
				}
				if took := time.Since(start); took > 600*time.Millisecond {
					t.Errorf("it took %v to notice that the service is back, want half a second", took)
				}
				for range 5 {
					if _, _, err := read(t, b, bad); err != nil {
						t.Error(err)
					}
				}
			})
		})
	}
}

// Who leaves, and who asks for too much, says nothing about the service.
func TestWhatIsNoFailure(t *testing.T) {
	b := &upstream.Budget{Source: &source{answer: func(ctx context.Context, r upstream.Request) (*upstream.Answer, error) {
		switch r.Query.Path {
		case "/hang":
			<-ctx.Done()
			return nil, ctx.Err()
		case "/large":
			return nil, upstream.ErrTooLarge
		}
		return answer(404, "{}"), nil
	}}, General: upstream.Rate{PerSecond: 1000}}
	for range 5 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		b.Answer(ctx, asking(imds.InstanceRead, "/hang"))
		cancel()
		b.Answer(t.Context(), asking(imds.InstanceRead, "/large"))
	}
	if a, _, err := read(t, b, instance()); err != nil || a.Status != 404 {
		t.Errorf("got %v, %v, want to be let through", a, err)
	}
}

// A caller that reads slowly holds a place only for a body that is still to come
// and too large for memory, and for half a minute at most.
func TestPlaceIsHeldUntilTheBodyIsOver(t *testing.T) {
	long, huge := strings.Repeat("x", 100<<10), strings.Repeat("x", 300<<10)
	for name, tc := range map[string]struct {
		body string
		size int64
		end  func(io.ReadCloser)
		held bool
	}{
		"short":         {"{}", 2, func(io.ReadCloser) {}, false},
		"long":          {long, int64(len(long)), func(io.ReadCloser) {}, false},
		"unknown":       {"{}", -1, func(io.ReadCloser) {}, false},
		"huge":          {huge, int64(len(huge)), func(io.ReadCloser) {}, true},
		"huge_unknown":  {huge, -1, func(io.ReadCloser) {}, true},
		"huge_read":     {huge, -1, func(b io.ReadCloser) { io.Copy(io.Discard, b) }, false},
		"huge_close":    {huge, -1, func(b io.ReadCloser) { b.Close(); b.Close() }, false},
		"huge_too_slow": {huge, -1, func(io.ReadCloser) { time.Sleep(30 * time.Second) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &source{answer: func(context.Context, upstream.Request) (*upstream.Answer, error) {
					a := answer(200, tc.body)
					a.Size = tc.size
					return a, nil
				}}
				b := &upstream.Budget{Source: s, General: upstream.Rate{PerSecond: 1000, AtOnce: 1}}
				a, err := b.Answer(t.Context(), instance())
				if err != nil {
					t.Fatal(err)
				}
				defer a.Body.Close()
				tc.end(a.Body)
				next, err := b.Answer(t.Context(), instance())
				if errors.Is(err, upstream.ErrBusy) != tc.held {
					t.Errorf("got %v, want a place: %v", err, !tc.held)
				}
				if err == nil {
					body, err := io.ReadAll(next.Body)
					if next.Body.Close(); err != nil || string(body) != tc.body {
						t.Errorf("got %d bytes, %v, want %d", len(body), err, len(tc.body))
					}
				}
			})
		})
	}
}

// The number of workloads that anybody can make up is no way to fill memory.
func TestManyWorkloads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{answer: func(context.Context, upstream.Request) (*upstream.Answer, error) { return nil, errors.New("away") }}
		b := &upstream.Budget{Source: s, General: upstream.Rate{PerSecond: 1e6}}
		busy := 0
		for i := range 5000 {
			if _, err := b.Answer(t.Context(), by(workload.ID(fmt.Sprint("address:", i)), instance())); errors.Is(err, upstream.ErrBusy) {
				busy++
			}
		}
		if busy != 5000-4096 {
			t.Errorf("%d were refused, want those beyond 4096", busy)
		}
		time.Sleep(2 * time.Minute)
		s.answer = saying(200, "{}").answer
		if _, _, err := read(t, b, by("docker:new", instance())); err != nil {
			t.Errorf("got %v: those that failed long ago are still known", err)
		}
	})
}

// A 429 that is over within two seconds is not the client's affair.
func TestThrottledForAMoment(t *testing.T) {
	for name, tc := range map[string]struct {
		method, retryAfter string
		statuses           []int
		status, calls      int
	}{
		"once":                {"GET", "", []int{429, 200}, 200, 2},
		"three_times":         {"GET", "", []int{429, 429, 429, 200}, 200, 4},
		"for_long":            {"GET", "", []int{429}, 429, 5},
		"for_longer_it_says":  {"GET", "3", []int{429, 200}, 429, 1},
		"on_what_acts":        {"POST", "", []int{429, 200}, 429, 1},
		"and_then_another_no": {"GET", "", []int{429, 503}, 503, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := http.Header{}
				if tc.retryAfter != "" {
					h.Set("Retry-After", tc.retryAfter)
				}
				s := statusThen(h, tc.statuses...)
				r := instance()
				r.Query.Method = tc.method
				start := time.Now()
				a, _, err := read(t, &upstream.Budget{Source: s}, r)
				if err != nil || a.Status != tc.status {
					t.Fatalf("got %v, %v, want %d", a, err, tc.status)
				}
				if got := int(s.calls.Load()); got < tc.calls || got > tc.calls+1 && tc.status == 429 || got != tc.calls && tc.status != 429 {
					t.Errorf("got %d calls, want %d", got, tc.calls)
				}
				if took := time.Since(start); took > 2*time.Second {
					t.Errorf("took %v, want 2s at most", took)
				}
			})
		})
	}
}
