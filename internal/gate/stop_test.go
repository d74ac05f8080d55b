package gate

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
)

func TestRequestInFlightEndsWithItsListener(t *testing.T) {
	for name, tc := range map[string]struct {
		needs, took time.Duration
		decision    audit.Decision
	}{
		"in_time":  {9 * time.Second, 9 * time.Second, audit.Allow},
		"too_slow": {time.Hour, 10 * time.Second, audit.Error},
	} {
		t.Run(name, func(t *testing.T) {
			slow := func(ctx context.Context, _ upstream.Request) (*upstream.Answer, error) {
				if !wait(ctx.Done(), tc.needs) {
					return nil, ctx.Err()
				}
				return answer("{}"), nil
			}
			synctest.Test(t, func(t *testing.T) {
				g, sink := newGate(t, sourceFunc(slow))
				p := newPipes()
				s := start(t, g, p.listener())
				busy, idle, fresh := p.dial(), p.dial(), p.dial()
				idle.send(t, request("GET", "/metadata/identity/info"))
				idle.response(t, "GET")
				sink.next(t)
				busy.send(t, request("GET", instance))
				synctest.Wait()
				begin := time.Now()
				s.stop()
				idle.closed(t)
				took(t, begin, 0)
				fresh.closed(t) // it may have been about to ask
				took(t, begin, 5*time.Second)
				if tc.decision == audit.Allow {
					if r, _ := busy.response(t, "GET"); r.StatusCode != 200 || !r.Close {
						t.Errorf("got %d, close %v, want 200 and the end of the connection", r.StatusCode, r.Close)
					}
				}
				busy.closed(t)
				if err := <-s.done; err != nil {
					t.Errorf("serve: %v", err)
				}
				took(t, begin, tc.took)
				if e := sink.next(t); e.Decision != tc.decision {
					t.Errorf("got %+v, want %s", e, tc.decision)
				}
				sink.none(t)
			})
		})
	}
}

func TestShutdownIsAsPatientAsItsContext(t *testing.T) {
	hang := func(ctx context.Context, _ upstream.Request) (*upstream.Answer, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	synctest.Test(t, func(t *testing.T) {
		g, sink := newGate(t, sourceFunc(hang))
		p := newPipes()
		s := start(t, g, p.listener())
		c := p.dial()
		c.send(t, request("GET", instance))
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		begin := time.Now()
		if err := g.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
		}
		took(t, begin, 3*time.Second)
		c.closed(t)
		if err := <-s.done; err != nil {
			t.Errorf("serve: %v", err)
		}
		if e := sink.next(t); e.Decision != audit.Error || e.Action != imds.InstanceRead {
			t.Errorf("got %+v, want an error", e)
		}
		l := newPipes()
		if err := g.Serve(t.Context(), l.listener()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("serve after it: got %v, want %v", err, net.ErrClosed)
		}
		<-l.closed
		if err := g.Shutdown(t.Context()); err != nil {
			t.Errorf("again: %v", err)
		}
	})
}
