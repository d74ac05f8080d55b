//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/sim"
	"imdsgate/internal/testnet"
)

// shop is a Compose file of three services that run the same program and ask for
// the same: a token of the identity that the VM has by itself.
const shop = `version: "2.4"
x-client: &client
  image: imdsgate-e2e
  command: [/sdkclient, --tokens, /tmp, system]
  tmpfs: /tmp
services:
  web: {<<: *client}
  batch: {<<: *client}
  stranger: {<<: *client}
`

// shopPolicy gives two of them an identity each.
const shopPolicy = `allow: [versions.read, instance.read]
rules:
  - name: web is web
    match: {compose: {project: shop, service: web}, proof: listener}
    allow: [identity.token]
    resource: %[1]s
    identity: {client_id: %[2]s}
  - name: batch is batch
    match: {compose: {project: shop, service: batch}, proof: listener}
    allow: [identity.token]
    resource: %[1]s
    identity: {client_id: %[3]s}
`

// TestComposeIdentities has two services of one Compose file get two identities
// by the same call, and a third none, from a real engine.
func TestComposeIdentities(t *testing.T) {
	testnet.Require(t, testnet.Root, testnet.BPF, testnet.DockerEngine, testnet.Command("docker-compose"), testnet.Command("docker"))
	ctx, vm := deadline(t), sim.DefaultVM()
	if len(vm.User) < 2 {
		t.Fatalf("the simulator's VM has %d identities, want 2", len(vm.User))
	}
	s, d := startShop(ctx, t, fmt.Sprintf(shopPolicy, audience, vm.User[0].ClientID, vm.User[1].ClientID))
	told := composeUp(ctx, t, d)

	for service, want := range map[string]sim.Identity{"web": vm.User[0], "batch": vm.User[1]} {
		if a := told[service]; a.Error != "" || a.Claims.ClientID != want.ClientID || a.Claims.ObjectID != want.ObjectID || a.Claims.Audience != audience {
			t.Errorf("%s: got %+v, want a token of %s", service, a, want.ClientID)
		} else {
			t.Logf("%s: azidentity got the token of client_id %s (%.0f ms)", service, a.Claims.ClientID, a.Took)
		}
	}
	stranger := told["stranger"]
	reason := "container shop_stranger_1: no rule allows identity.token: add {match: {compose: {project: shop, service: stranger}}, allow: [identity.token]} to the policy's rules"
	for _, text := range []string{"403 Forbidden", `"error": "access_denied"`, reason} {
		if !strings.Contains(stranger.Error, text) {
			t.Errorf("stranger: got %q, want %s in it", stranger.Error, text)
		}
	}
	if stranger.Took >= fast || stranger.File != "" {
		t.Errorf("stranger: got an answer after %.0f ms, want one within %.0f and no token", stranger.Took, fast)
	}
	t.Logf("stranger: azidentity failed after %.0f ms: %s", stranger.Took, stranger.Error)
	identitiesInAudit(t, s, vm)
}

func startShop(ctx context.Context, t *testing.T, policy string) (*testnet.Stack, *testnet.Docker) {
	t.Helper()
	s, err := testnet.NewStack(imdsgate)
	ok(t, err)
	t.Cleanup(s.Close)
	ok(t, s.StartSim(ctx))
	d, err := testnet.StartDocker(ctx, s.VM)
	ok(t, err)
	t.Cleanup(func() { ok(t, d.Close()) })
	ok(t, d.Image(ctx, "imdsgate-e2e", map[string]string{"/sdkclient": sdkclient}))
	path := filepath.Join(s.Dir, "policy.yaml")
	ok(t, os.WriteFile(path, []byte(policy), 0o644))
	_, err = s.StartAgent(ctx, "--docker", "--docker-host", d.Host(), "--netns-dir", d.NetnsDir())
	ok(t, err)
	ok(t, s.StartProxy(ctx, "--policy", path, "--audit", "-"))
	return s, d
}

// composeUp runs the services to their end, and returns what each has told.
func composeUp(ctx context.Context, t *testing.T, d *testnet.Docker) map[string]attempt {
	t.Helper()
	file := filepath.Join(t.TempDir(), "compose.yaml")
	ok(t, os.WriteFile(file, []byte(shop), 0o600))
	run := func(ctx context.Context, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(ctx, "docker-compose", append([]string{"-p", "shop", "-f", file}, args...)...)
		cmd.Env = append(os.Environ(), "DOCKER_HOST="+d.Host())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("docker-compose %v: %v: %s", args, err, out)
		}
	}
	run(ctx, "up", "-d", "--no-build")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		run(ctx, "down", "--timeout", "2")
	})
	told := make(map[string]attempt)
	for _, service := range []string{"web", "batch", "stranger"} {
		name := "shop_" + service + "_1"
		wait := exec.CommandContext(ctx, "docker", "-H", d.Host(), "wait", name)
		if out, err := wait.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != "0" {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		log, err := d.Logs(ctx, name)
		ok(t, err)
		var a attempt
		if err := json.Unmarshal([]byte(log), &a); err != nil {
			t.Fatalf("%s: %v: %s", name, err, log)
		}
		told[service] = a
	}
	return told
}

// identitiesInAudit waits for the three answers in the record.
func identitiesInAudit(t *testing.T, s *testnet.Stack, vm *sim.VM) {
	t.Helper()
	want := map[string]string{
		"shop/web":      "allow client_id=" + vm.User[0].ClientID,
		"shop/batch":    "allow client_id=" + vm.User[1].ClientID,
		"shop/stranger": "deny ",
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for at := 0; len(want) > 0; at++ {
		var e audit.Event
		var err error
		if at, err = s.Proxy.Await(ctx, at, func(line string) bool {
			e = audit.Event{}
			return json.Unmarshal([]byte(line), &e) == nil && e.Action == "identity.token" && e.Decision != audit.Refuse
		}); err != nil {
			t.Fatalf("not in the record: %v: %v", want, err)
		}
		if got := string(e.Decision) + " " + e.Identity; got != want[e.Compose] || e.Snapshot != 1 || e.Proof.String() != "listener" {
			t.Errorf("%s: the record has %q, snapshot %d, proof %s, want %q, 1, listener", e.Compose, got, e.Snapshot, e.Proof, want[e.Compose])
		}
		delete(want, e.Compose)
	}
}
