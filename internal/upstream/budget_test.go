package upstream_test

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/imds"
	"imdsgate/internal/sim"
	"imdsgate/internal/upstream"
)

// instance is a call of the general kind.
func instance() upstream.Request { return asking(imds.InstanceRead, "/metadata/instance") }

// flood asks n times at once, and gives the times at which answers came.
func flood(t *testing.T, s upstream.Source, n int, r func(i int) upstream.Request) (times []time.Time, errs []error) {
	t.Helper()
	var mu sync.Mutex
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			a, err := s.Answer(t.Context(), r(i))
			if err == nil {
				_, err = io.Copy(io.Discard, a.Body)
				a.Body.Close()
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
			} else {
				times = append(times, time.Now())
			}
		})
	}
	all.Wait()
	return times, errs
}

// However many ask, the platform's limits are kept: the simulator, which has
// them, and any window of a second say so.
func TestPlatformsLimitsAreKept(t *testing.T) {
	for name, tc := range map[string]struct {
		request  upstream.Request
		n, limit int
	}{
		"general":  {instance(), 30, 5},
		"identity": {tokenFor("https://management.azure.com/"), 120, 20},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := simulator(t, sim.Config{})
				b := &upstream.Budget{Source: piping(t, s), Wait: time.Hour}
				times, errs := flood(t, b, tc.n, func(i int) upstream.Request { return by(container(i%10), tc.request) })
				if len(times) != tc.n {
					t.Errorf("got %d answers and %v, want %d", len(times), errs, tc.n)
				}
				h := s.History()
				for i, e := range h {
					if e.Status != 200 {
						t.Errorf("call %d got %d", i, e.Status)
					}
					if i >= tc.limit && e.Time.Sub(h[i-tc.limit].Time) < time.Second {
						t.Errorf("calls %d to %d came within %v", i-tc.limit, i, e.Time.Sub(h[i-tc.limit].Time))
					}
				}
				if took := times[len(times)-1].Sub(h[0].Time); took > 2*time.Duration(tc.n/tc.limit)*time.Second {
					t.Errorf("took %v for %d calls: less than half of what is allowed", took, tc.n)
				}
			})
		})
	}
}

func TestCallsAtOnceAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now, most int
		var mu sync.Mutex
		s := &source{}
		s.answer = func(context.Context, upstream.Request) (*upstream.Answer, error) {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			now--
			mu.Unlock()
			return answer(200, "{}"), nil
		}
		b := &upstream.Budget{Source: s, Wait: time.Minute}
		flood(t, b, 40, func(i int) upstream.Request { return by(container(i), tokenFor(vault)) })
		if most != 4 {
			t.Errorf("got %d at once, want 4", most)
		}
		most = 0
		flood(t, b, 20, func(i int) upstream.Request { return by("docker:one", tokenFor(vault)) })
		if most != 3 {
			t.Errorf("one workload had %d at once, want 3: one is for others", most)
		}
	})
}

// A workload that asks as fast as it can delays another, which asks seldom, not at
// all.
func TestNoisyNeighbour(t *testing.T) {
	for name, request := range map[string]upstream.Request{"general": instance(), "identity": tokenFor(vault)} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := simulator(t, sim.Config{})
				b := &upstream.Budget{Source: piping(t, s)}
				ctx, cancel := context.WithCancel(t.Context())
				var noise sync.WaitGroup
				var busy, served int
				var mu sync.Mutex
				for range 60 {
					noise.Go(func() {
						for ctx.Err() == nil {
							_, _, err := readIn(ctx, b, by("docker:noisy", request))
							mu.Lock()
							if errors.Is(err, upstream.ErrBusy) {
								busy++
							} else if err == nil {
								served++
							}
							mu.Unlock()
							if err != nil {
								time.Sleep(time.Millisecond)
							}
						}
					})
				}
				time.Sleep(10 * time.Second)
				for i := range 20 {
					start := time.Now()
					if _, _, err := readIn(t.Context(), b, by("docker:quiet", request)); err != nil {
						t.Errorf("call %d: %v", i, err)
					}
					if took := time.Since(start); took > time.Millisecond {
						t.Errorf("call %d took %v, want no time", i, took)
					}
					time.Sleep(time.Second)
				}
				cancel()
				noise.Wait()
				if busy == 0 || served < 40 {
					t.Errorf("the noisy one was served %d times and refused %d times, want both", served, busy)
				}
				for _, e := range s.History() {
					if e.Status == 429 {
						t.Fatal("the platform's limit was met")
					}
				}
			})
		})
	}
}

func TestWaitingIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &upstream.Budget{Source: saying(200, "{}"), General: upstream.Rate{PerSecond: 0.01, Burst: 1}, Queue: 3}
		read(t, b, instance())
		start := time.Now()
		_, errs := flood(t, b, 5, func(int) upstream.Request { return instance() })
		for _, err := range errs {
			if !errors.Is(err, upstream.ErrBusy) {
				t.Errorf("got %v, want %v", err, upstream.ErrBusy)
			}
		}
		if took := time.Since(start); len(errs) != 5 || took != 5*time.Second {
			t.Errorf("got %d errors after %v, want 5 after 5s: two at once, three when they had waited", len(errs), took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := readIn(ctx, b, instance()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want one's own deadline", err)
		}
		time.Sleep(100 * time.Second)
		if _, _, err := read(t, b, instance()); err != nil {
			t.Errorf("those who left have taken a turn: %v", err)
		}
	})
}
