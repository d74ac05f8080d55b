package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/testnet"
)

// auditEvents reads a proxy's audit file.
func auditEvents(t *testing.T, path string) (events []audit.Event) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var e audit.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if e.Decision != "" {
			events = append(events, e)
		}
	}
	return events
}

// auditFile is a path that the proxy's user may write to.
func auditFile(t *testing.T, s *testnet.Stack) string {
	t.Helper()
	dir := filepath.Join(s.Dir, "audit")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "audit.jsonl")
}

// putPolicy writes a policy as people should: beside it, and then renamed.
func putPolicy(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// reload has the proxy read its policy again, and waits until it has said so.
func reload(t *testing.T, p *testnet.Process, from int, want string) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := p.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	at, err := p.Await(ctx, from, func(line string) bool { return strings.Contains(line, want) })
	if err != nil {
		t.Fatalf("%v: %s", err, p.Output())
	}
	return at + 1
}

// TestReloadUnderLoad has 64 clients, half of them on one connection each, call
// through 1,000 reloads of a policy that allows and denies in turns, and some
// files that are wrong. Each decision must be that of the snapshot it names; no
// request fails, no connection ends.
func TestReloadUnderLoad(t *testing.T) {
	const clients, reloads = 64, 1000
	testnet.Require(t, testnet.BPF)
	s, cs := newStack(t, "web")
	if _, err := s.StartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	texts := [2]string{"allow: [instance.read]\n", "rules:\n- {match: {name: web}, allow: [versions.read]}\n"} // of odd snapshots, of even ones
	path, record := filepath.Join(s.Dir, "policy.yaml"), auditFile(t, s)
	putPolicy(t, path, texts[0])
	if err := s.StartProxy(t.Context(), "--policy", path, "--audit", record, "--audit-rate", "0"); err != nil {
		t.Fatal(err)
	}
	stop := startLoad(t, s, cs[0], clients, "keep")
	at, wrong := 0, 0
	for n := 2; n <= reloads+1; n++ {
		if n%100 == 0 {
			putPolicy(t, path, "allow: [instance.read\n")
			at = reload(t, s.Proxy, at, "the last good one stays in force")
			wrong++
		}
		putPolicy(t, path, texts[(n+1)%2])
		at = reload(t, s.Proxy, at, fmt.Sprintf(`"msg":"policy","snapshot":%d,`, n))
	}
	got := stop()
	if err := s.Proxy.Stop(); err != nil {
		t.Fatal(err)
	}
	if got.Refused+got.Reset+len(got.Other) > 0 || len(got.Status) > 1 || got.OK == 0 || got.Status[403] == 0 {
		t.Errorf("got %+v, want 200 and 403 alone", got)
	}
	events, snapshots, perConn := auditEvents(t, record), make(map[uint64]bool), make(map[uint64]int)
	for _, e := range events {
		if want := [2]audit.Decision{audit.Deny, audit.Allow}[e.Snapshot%2]; e.Decision != want {
			t.Fatalf("snapshot %d: %s, want %s: %+v", e.Snapshot, e.Decision, want, e)
		}
		snapshots[e.Snapshot] = true
		perConn[e.Conn]++
	}
	kept := 0
	for _, n := range perConn {
		if n > 1 {
			kept++
		}
	}
	if len(events) != got.OK+got.Status[403] || kept != clients/2 {
		t.Errorf("%d decisions for %d answers, %d connections of many requests, want %d", len(events), got.OK+got.Status[403], kept, clients/2)
	}
	t.Logf("%d reloads, %d wrong files: %d answers (%d allowed, %d denied) under %d snapshots, slowest %v; 0 failed; %d kept connections, none ended",
		reloads, wrong, len(events), got.OK, got.Status[403], len(snapshots), got.Slowest.Round(time.Millisecond), kept)
}

// askAsDemo has the demo's own client call from a container.
func askAsDemo(t *testing.T, s *testnet.Stack, c *testnet.Container, args ...string) []answer {
	t.Helper()
	p, err := s.Spawn(c.NS, "client", exec.Command(s.Binary, append([]string{"demo-part", "client"}, args...)...))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Fatalf("%v: %s", err, p.Output())
	}
	var as []answer
	for _, line := range p.Lines() {
		var a answer
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		as = append(as, a)
	}
	return as
}

// TestLearnRoundTrip runs the demo's traffic under a policy that only records,
// learns a policy from the record, checks it, and enforces it: what was seen is
// allowed, and nothing else is.
func TestLearnRoundTrip(t *testing.T) {
	const (
		sizeURL  = "http://169.254.169.254/metadata/instance/compute/vmSize?api-version=2021-02-01&format=text"
		nameURL  = "http://169.254.169.254/metadata/instance/compute/name?api-version=2021-02-01&format=text"
		vaultURL = "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"
		otherID  = tokenURL + "&client_id=c1c10000-0000-0000-0000-000000000001"
	)
	testnet.Require(t, testnet.BPF)
	s, cs := newStack(t, "web", "batch", "idle")
	if _, err := s.StartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	path, record := filepath.Join(s.Dir, "policy.yaml"), auditFile(t, s)
	putPolicy(t, path, "mode: audit\n")
	if err := s.StartProxy(t.Context(), "--policy", path, "--audit", record); err != nil {
		t.Fatal(err)
	}
	traffic := map[*testnet.Container][]string{
		cs[0]: {instanceURL, tokenURL},
		cs[1]: {"--mapped", sizeURL, tokenURL},
	}
	statuses := func(what string, want int) {
		t.Helper()
		for c, args := range traffic {
			for i, a := range askAsDemo(t, s, c, args...) {
				if a.Status != want {
					t.Errorf("%s: %s, request %d: got %d, want %d: %s", what, c.Name, i, a.Status, want, a.Body)
				}
			}
		}
	}
	statuses("recording", 200)

	var learned, said, checked bytes.Buffer
	e := &env{stdout: &learned, stderr: &said, getenv: os.Getenv, ctx: t.Context()}
	if code := run(e, []string{"policy", "learn", record}); code != exitOK {
		t.Fatalf("learn: exit %d: %s", code, said.String())
	}
	t.Logf("learned:\n%s%s", learned.String(), said.String())
	putPolicy(t, path, learned.String())
	e.stdout = &checked
	if code := run(e, []string{"policy", "check", path}); code != exitOK {
		t.Fatalf("check: exit %d: %s%s", code, checked.String(), said.String())
	}
	reload(t, s.Proxy, 0, `"msg":"policy","snapshot":2,`)
	statuses("enforcing", 200)

	denied := 0
	for _, x := range []struct {
		c    *testnet.Container
		args []string
	}{
		{cs[0], []string{vaultURL, otherID, "http://169.254.169.254/metadata/versions", "http://169.254.169.254/metadata/attested/document?api-version=2021-02-01",
			"http://169.254.169.254/metadata/instance/compute/userData?api-version=2021-02-01&format=text"}},
		{cs[1], []string{nameURL, vaultURL, otherID}},
		{cs[2], []string{instanceURL, sizeURL, tokenURL}},
	} {
		for i, a := range askAsDemo(t, s, x.c, x.args...) {
			if a.Status != 403 {
				t.Errorf("%s: %s: got %d, want 403", x.c.Name, x.args[i], a.Status)
			}
			denied++
		}
	}
	if a := askAsDemo(t, s, cs[1], instanceURL)[0]; !strings.Contains(a.Body, `"vmSize":"Standard_D2s_v5"`) || strings.Contains(a.Body, "vm-sim-0") {
		t.Errorf("batch: the whole document is not cut to vmSize: %s", a.Body)
	}
	t.Logf("enforced: all that was seen is allowed; %d other requests denied", denied)
}
