package upstream_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/upstream"
)

// slow is a source whose calls end when they are let, or cancelled.
type slow struct {
	source
	let   chan *upstream.Answer
	ended chan error // of each call that was cancelled
}

func newSlow() *slow {
	s := &slow{let: make(chan *upstream.Answer), ended: make(chan error, 9)}
	s.answer = func(ctx context.Context, _ upstream.Request) (*upstream.Answer, error) {
		select {
		case a := <-s.let:
			return a, nil
		case <-ctx.Done():
			s.ended <- context.Cause(ctx)
			return nil, context.Cause(ctx)
		}
	}
	return s
}

func TestWaiterThatLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlow()
		c := cacheOver(t, &upstream.Cache{Source: s})
		gone := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		leader := askLater(ctx, c, tokenFor(vault))
		synctest.Wait()
		other := askLater(t.Context(), c, tokenFor(vault))
		synctest.Wait()
		cancel(gone)
		if o := <-leader; !errors.Is(o.err, gone) {
			t.Errorf("who left got %v, want its own reason", o.err)
		}
		synctest.Wait()
		s.let <- answer(200, tokenBody("t", time.Now().Add(time.Hour), time.Hour))
		if o := <-other; o.err != nil || o.from != upstream.Flight || !strings.Contains(o.body, `"t"`) {
			t.Errorf("who stayed got %+v, want the answer of the flight", o)
		}
		if n := s.calls.Load(); n != 1 || len(s.ended) != 0 {
			t.Errorf("got %d calls, %d cancelled, want 1 and 0", n, len(s.ended))
		}
	})
}

func TestLastWaiterThatLeavesEndsTheCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlow()
		c := cacheOver(t, &upstream.Cache{Source: s})
		ctx, cancel := context.WithCancel(t.Context())
		a, b := askLater(ctx, c, tokenFor(vault)), askLater(ctx, c, tokenFor(vault))
		synctest.Wait()
		cancel()
		<-a
		<-b
		if err := <-s.ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the call ended with %v, want canceled", err)
		}
		// The next one does not join what was cancelled.
		next := askLater(t.Context(), c, tokenFor(vault))
		s.let <- answer(200, "{}")
		if o := <-next; o.err != nil || s.calls.Load() != 2 {
			t.Errorf("got %+v after %d calls, want an answer of the second", o, s.calls.Load())
		}
	})
}

func TestWaitersOwnDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlow()
		c := cacheOver(t, &upstream.Cache{Source: s})
		patient := askLater(t.Context(), c, tokenFor(vault))
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		start := time.Now()
		_, _, err := readIn(ctx, c, tokenFor(vault))
		if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || took != 300*time.Millisecond {
			t.Errorf("got %v after %v, want its own deadline", err, took)
		}
		_, _, err = readIn(ctx, c, tokenFor(graph))
		synctest.Wait()
		if !errors.Is(err, context.DeadlineExceeded) || s.calls.Load() != 1 {
			t.Errorf("got %v and %d calls: who is late already asks nobody", err, s.calls.Load())
		}
		s.let <- answer(200, "{}")
		if o := <-patient; o.err != nil {
			t.Error(o.err)
		}
	})
}

// Who has something valid at hand waits a second, and the call goes on for those
// who come after.
func TestSlowCallGoesOnBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := minting(time.Hour)
		c := cacheOver(t, &upstream.Cache{Source: s})
		ask(t, c, tokenFor(vault))
		mint := s.answer
		s.answer = func(ctx context.Context, r upstream.Request) (*upstream.Answer, error) {
			select {
			case <-time.After(3 * time.Second):
				return mint(ctx, r)
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		time.Sleep(30 * time.Minute)
		for _, step := range []struct {
			pause, took time.Duration
			token, from string
		}{
			{0, time.Second, "t1", upstream.Stale},
			{time.Second, 0, "t1", upstream.Stale},
			{1500 * time.Millisecond, 0, "t2", upstream.Hit},
		} {
			time.Sleep(step.pause)
			start := time.Now()
			if tok, from := ask(t, c, tokenFor(vault)); tok != step.token || from != step.from || time.Since(start) != step.took {
				t.Errorf("got %s %q after %v, want %s %q after %v", tok, from, time.Since(start), step.token, step.from, step.took)
			}
		}
		if n := s.calls.Load(); n != 2 {
			t.Errorf("got %d calls, want 2", n)
		}
	})
}

// A try behind a token that is failing gets a second; who has nothing to fall
// back on any more, and finds such a try under way, is not content with that.
func TestShortTryIsNotTheLastWord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := minting(4 * time.Minute)
		c := cacheOver(t, &upstream.Cache{Source: s})
		ask(t, c, tokenFor(vault))
		mint := s.answer
		s.answer = saying(503, "{}").answer
		time.Sleep(4*time.Minute - 800*time.Millisecond)
		ask(t, c, tokenFor(vault)) // now it is known to fail
		s.answer = func(ctx context.Context, r upstream.Request) (*upstream.Answer, error) {
			select {
			case <-time.After(3 * time.Second):
				return mint(ctx, r)
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		time.Sleep(600 * time.Millisecond)
		synctest.Wait()
		if _, from := ask(t, c, tokenFor(vault)); from != upstream.Stale {
			t.Fatalf("got %q, want stale: this begins the try", from)
		}
		time.Sleep(300 * time.Millisecond)
		calls := s.calls.Load()
		if _, from := ask(t, c, tokenFor(vault)); from != "" || s.calls.Load() != calls+1 {
			t.Errorf("got %q after %d calls, want a call of its own", from, s.calls.Load()-calls)
		}
	})
}

// A call that nobody else bounds does not go on for ever.
func TestFlightIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlow()
		c := cacheOver(t, &upstream.Cache{Source: s})
		if _, _, err := read(t, c, tokenFor(vault)); !errors.Is(err, upstream.ErrTimeout) {
			t.Errorf("got %v, want %v", err, upstream.ErrTimeout)
		}
	})
}

func TestErrorIsEverybodysInTheFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlow()
		c := cacheOver(t, &upstream.Cache{Source: s})
		a, b := askLater(t.Context(), c, tokenFor(vault)), askLater(t.Context(), c, tokenFor(vault))
		synctest.Wait()
		s.let <- answer(404, "{}")
		for _, o := range []outcome{<-a, <-b} {
			if o.err != nil || o.body != "{}" {
				t.Errorf("got %+v, want the 404", o)
			}
		}
		if n := s.calls.Load(); n != 1 {
			t.Errorf("got %d calls, want 1", n)
		}
	})
}

// A panic is the caller's that asked, where the gate sees to it.
func TestPanicOfTheSource(t *testing.T) {
	s := &source{answer: func(context.Context, upstream.Request) (*upstream.Answer, error) { panic("broken") }}
	c := cacheOver(t, &upstream.Cache{Source: &upstream.Budget{Source: s, Identity: upstream.Rate{AtOnce: 1}}})
	for range 2 { // its place in the budget is free again
		func() {
			defer func() {
				if p := recover(); p != "broken" {
					t.Errorf("got %v, want the panic", p)
				}
			}()
			c.Answer(t.Context(), tokenFor(vault))
		}()
	}
}

// Policy's names are looked at for nothing but whose turn it is.
func TestFlightOfABusyWorkloadIsNoReasonToWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := minting(time.Hour)
		c := cacheOver(t, &upstream.Cache{Source: &upstream.Budget{Source: s, Identity: upstream.Rate{PerSecond: 1, Burst: 1}}})
		var noisy []<-chan outcome
		for i := range 4 {
			noisy = append(noisy, askLater(t.Context(), c, by("docker:noisy", tokenFor(strings.Repeat("x", i+1)))))
			synctest.Wait()
		}
		// The last of them would come after 3 s; the quiet one wants the same.
		start := time.Now()
		if _, _, err := readIn(t.Context(), c, by("docker:quiet", tokenFor("xxxx"))); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > time.Second+time.Millisecond {
			t.Errorf("took %v, want its own turn after a second", took)
		}
		for _, o := range noisy {
			if o := <-o; o.err != nil {
				t.Error(o.err)
			}
		}
		if n := s.calls.Load(); n != 4 {
			t.Errorf("got %d calls, want 4", n)
		}
	})
}

// A flight that fails for its leader's reasons is not the end for others.
func TestLeadersErrorIsNotTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{}
		s.answer = func(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
			time.Sleep(time.Second)
			if r.Workload == "docker:noisy" {
				return nil, upstream.ErrBusy
			}
			return answer(200, "{}"), nil
		}
		c := cacheOver(t, &upstream.Cache{Source: s})
		noisy := askLater(t.Context(), c, by("docker:noisy", tokenFor(vault)))
		synctest.Wait()
		quiet := askLater(t.Context(), c, by("docker:quiet", tokenFor(vault)))
		if o := <-noisy; !errors.Is(o.err, upstream.ErrBusy) {
			t.Errorf("the noisy one got %+v, want %v", o, upstream.ErrBusy)
		}
		if o := <-quiet; o.err != nil || o.body != "{}" {
			t.Errorf("the quiet one got %+v, want an answer", o)
		}
	})
}
