package upstream_test

import (
	"strings"
	"testing"
	"time"

	"imdsgate/internal/sim"
	"imdsgate/internal/upstream"
)

// Who asks while a token is valid gets it, also when the service says nothing and
// the token ends before our patience does.
func TestLastOfATokenWhileTheServiceIsSilent(t *testing.T) {
	inTime(t, 20*time.Second, func(t *testing.T, s *sim.Server, c *upstream.Cache) {
		first, _ := askToken(t, c, tokenFor(management))
		expires := time.Unix(first.On, 0)
		time.Sleep(12 * time.Second)
		setFaults(t, s, sim.Fault{Hang: true})
		left := time.Until(expires)
		start := time.Now()
		a, body, err := read(t, c, tokenFor(management))
		if err != nil || a.Status != 200 || !strings.Contains(body, first.Token) || a.Cache != upstream.Stale {
			t.Fatalf("with %v left: got %v, %v, want the token", left, a, err)
		}
		if took := time.Since(start); took != left/2 {
			t.Errorf("took %v, want half of %v", took, left)
		}
	})
}
