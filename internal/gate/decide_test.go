package gate

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

const clientA, clientB = "aaaaaaaa-0000-0000-0000-000000000001", "bbbbbbbb-0000-0000-0000-000000000002"

// echo answers with the target that was asked for.
func echo(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
	return answer(r.Query.Target()), nil
}

// set puts a policy in force.
func set(t testing.TB, g *Gate, text string) {
	t.Helper()
	p, err := policy.Parse("p.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	g.Policy.Set(p)
}

// Two workloads that ask for the same get two identities, and neither can name
// the other's.
func TestIdentityIsAdded(t *testing.T) {
	g, sink := newGate(t, sourceFunc(echo))
	g.Directory.Set(1, workload.Workload{ID: "static:web", Name: "web"})
	g.Directory.Set(2, workload.Workload{ID: "static:batch", Name: "batch"})
	set(t, g, fmt.Sprintf("rules:\n- {match: {name: web}, allow: [identity.token], identity: {client_id: %s}}\n"+
		"- {match: {name: batch}, allow: [identity.token], identity: {client_id: %s}}\n", clientA, clientB))
	for id, own := range map[uint64]string{1: clientA, 2: clientB} {
		l := listen(t)
		l.Attachment = id
		s := start(t, g, l)
		p := dial(t, s.addr)
		for _, tc := range []struct {
			target, effective string
			status            int
		}{
			{token, own, 200}, {token + "&client_id=" + own, own, 200}, {token + "&client_id=" + strings.ToUpper(own), strings.ToUpper(own), 200},
			{token + "&client_id=cccccccc-0000-0000-0000-000000000003", "", 403}, {token + "&object_id=" + own, "", 403}, {token + "&mi_res_id=x", "", 403},
			{token + "&client_id=", "", 400},
		} {
			p.send(t, request("GET", tc.target))
			r, body := p.response(t, "GET")
			e := sink.next(t)
			if r.StatusCode != tc.status || tc.status == 200 && (!strings.Contains(body, "client_id="+tc.effective+"&") || e.Identity != "client_id="+tc.effective) {
				t.Errorf("%d: %s: got %d %s, record %q, want %d for %s", id, tc.target, r.StatusCode, body, e.Identity, tc.status, tc.effective)
			}
			if asked := strings.Contains(e.Target, "client_id"); asked != strings.Contains(tc.target, "client_id") {
				t.Errorf("%d: %s: the record has %s, want what the client asked for", id, tc.target, e.Target)
			}
		}
		p.Close()
		s.stop()
	}
}

// What was decided about a workload is decided anew when the policy or its
// description has changed, also on a connection that stays.
func TestDecisionFollowsChanges(t *testing.T) {
	g, sink, s := serving(t, says("{}"))
	p := dial(t, s.addr)
	ask := func(status int, snapshot uint64) {
		t.Helper()
		p.send(t, request("GET", "/metadata/versions"))
		r, _ := p.response(t, "GET")
		if e := sink.next(t); r.StatusCode != status || e.Snapshot != snapshot {
			t.Errorf("got %d by snapshot %d, want %d by %d", r.StatusCode, e.Snapshot, status, snapshot)
		}
	}
	set(t, g, "rules: [{match: {labels: {team: shop}}, allow: [versions.read]}]\n")
	ask(403, 2)
	g.Directory.Set(1, workload.Workload{ID: "static:web", Name: "web", Labels: map[string]string{"team": "shop"}})
	ask(200, 2)
	g.Directory.Set(1, workload.Workload{ID: "static:web", Name: "web", ImageLabels: map[string]string{"team": "shop"}})
	ask(403, 2)
	set(t, g, "allow: [versions.read]\n")
	ask(200, 3)
	g.Policy.Set(nil)
	ask(403, 4)
}

// A workload that is known by its address alone keeps its view with its connection.
func TestAddressMeetsThePolicy(t *testing.T) {
	g, sink := newGate(t, says("{}"))
	set(t, g, "rules: [{match: {name: 127.0.0.*}, allow: [versions.read]}, {match: {proof: listener}, allow: [instance.read]}]\n")
	l := listen(t)
	l.Attachment, l.Proof = 0, workload.Address
	s := start(t, g, l)
	p := dial(t, s.addr)
	for range 2 {
		for target, status := range map[string]int{"/metadata/versions": 200, instance: 403} {
			p.send(t, request("GET", target))
			if r, _ := p.response(t, "GET"); r.StatusCode != status {
				t.Errorf("%s: got %d, want %d", target, r.StatusCode, status)
			}
			sink.next(t)
		}
	}
	p.Close()
	s.stop()
}

// A caller that may read a part of the document gets it with the rest taken out,
// and the record says so.
func TestAnswerIsCut(t *testing.T) {
	const doc = `{"compute":{"name":"vm","tags":"a:b","tagsList":[{"name":"a","value":"b"}],"userData":"eA=="},"network":{"interface":[]}}`
	for name, tc := range map[string]struct {
		rules, want string
		cut, kept   []string
	}{
		"dropped": {"allow: [instance.read]\nrules: [{deny: [instance.read], subtree: compute/tags}]\n",
			`{"compute":{"name":"vm","tags":"","tagsList":[],"userData":""},"network":{"interface":[]}}`, []string{"compute/tags", "compute/tagsList"}, nil},
		"kept": {"rules: [{allow: [instance.read], subtree: compute/name}]\n",
			`{"compute":{"name":"vm","tags":"","tagsList":[],"userData":""},"network":{}}`, nil, []string{"compute/name"}},
	} {
		t.Run(name, func(t *testing.T) {
			g, sink, s := serving(t, says(doc))
			set(t, g, tc.rules)
			p := dial(t, s.addr)
			p.send(t, request("GET", instance)+request("HEAD", instance))
			if r, body := p.response(t, "GET"); r.StatusCode != 200 || body != tc.want {
				t.Errorf("got %d %s\nwant 200 %s", r.StatusCode, body, tc.want)
			}
			if r, _ := p.response(t, "HEAD"); r.Header.Get("Content-Length") != "" {
				t.Errorf("HEAD tells the length of the whole: %s", r.Header.Get("Content-Length"))
			}
			e := sink.next(t)
			if fmt.Sprint(e.Cut, e.Kept, e.Blanked) != fmt.Sprint(tc.cut, tc.kept, []imds.Action{imds.InstanceUserdata}) {
				t.Errorf("the record has cut %v, kept %v, blanked %v", e.Cut, e.Kept, e.Blanked)
			}
		})
	}
}

// In mode audit everything passes whole, and the record says what would have been.
func TestAuditModeLetsPass(t *testing.T) {
	const doc = `{"compute":{"userData":"eA=="}}`
	g, sink, s := serving(t, says(doc))
	set(t, g, "mode: audit\nallow: [instance.read]\nrules: [{mode: enforce, deny: [identity.token]}]\n")
	p := dial(t, s.addr)
	for _, tc := range []struct {
		target string
		status int
		want   audit.Event
	}{
		{instance, 200, audit.Event{Decision: audit.Allow, Mode: "audit", Would: "cut"}},
		{"/metadata/versions", 200, audit.Event{Decision: audit.Allow, Mode: "audit", Would: "deny"}},
		{token, 403, audit.Event{Decision: audit.Deny}},
		// It could be a token by another spelling, and those are denied for real.
		{"/metadata/nobody/knows", 403, audit.Event{Decision: audit.Deny}},
	} {
		p.send(t, request("GET", tc.target))
		r, body := p.response(t, "GET")
		if r.StatusCode != tc.status || tc.status == 200 && body != doc {
			t.Errorf("%s: got %d %s, want %d", tc.target, r.StatusCode, body, tc.status)
		}
		if e := sink.next(t); e.Decision != tc.want.Decision || e.Mode != tc.want.Mode || e.Would != tc.want.Would || len(e.Blanked) > 0 {
			t.Errorf("%s: the record has %s, mode %q, would %q, blanked %v", tc.target, e.Decision, e.Mode, e.Would, e.Blanked)
		}
	}
}

// Each decision is that of the snapshot it names, while policies change.
func TestEachDecisionHasItsSnapshot(t *testing.T) {
	g, sink, s := serving(t, says("{}"))
	set(t, g, "deny: [versions.read]\n") // 2: even ones deny
	var wg sync.WaitGroup
	const clients, each = 8, 40
	for range clients {
		wg.Go(func() {
			p := dial(t, s.addr)
			defer p.Close()
			for range each {
				p.send(t, request("GET", "/metadata/versions"))
				p.response(t, "GET")
			}
		})
	}
	texts := []string{"allow: [versions.read]\n", "deny: [versions.read]\n"}
	for i := range 200 {
		set(t, g, texts[i%2])
	}
	wg.Wait()
	for range clients * each {
		if e := sink.next(t); (e.Snapshot%2 == 1) != (e.Decision == audit.Allow) {
			t.Errorf("snapshot %d: %s", e.Snapshot, e.Decision)
		}
	}
}
