package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"imdsgate/internal/testnet"
)

// TestPrefetch has a container's usual token fetched when the container appears:
// its first call is answered from memory, and the service was asked once.
func TestPrefetch(t *testing.T) {
	testnet.Require(t, testnet.BPF)
	s, cs := newStack(t, "web", "idle")
	if _, err := s.StartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	path, record := filepath.Join(s.Dir, "policy.yaml"), auditFile(t, s)
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(demoPolicy, "https://management.azure.com", "https://vault.azure.net")), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.StartProxy(t.Context(), "--policy", path, "--audit", record, "--prefetch"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		seen, err := s.History(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(seen) == 1 && strings.Contains(seen[0].Target, "client_id=c1c10000-0000-0000-0000-000000000001") && seen[0].Status == 200 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	// It came to the service; its answer may be a moment on its way still.
	as := askAsDemo(t, s, cs[0], "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net")
	if as[0].Status != 200 || !strings.Contains(as[0].Body, "c1c10000-0000-0000-0000-000000000001") {
		t.Errorf("got %d %.80s", as[0].Status, as[0].Body)
	}
	if seen, err := s.History(ctx); err != nil || len(seen) != 1 {
		t.Errorf("the service was asked %d times (%v), want once", len(seen), err)
	}
	if err := s.Proxy.Stop(); err != nil {
		t.Fatal(err)
	}
	if e := auditEvents(t, record); len(e) != 1 || e[0].Cache != "hit" && e[0].Cache != "flight" {
		t.Errorf("the record has %+v, want one answer from memory", e)
	}
}
