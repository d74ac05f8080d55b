package sim

import (
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestManagementIsNotOnTheProtocolListener(t *testing.T) {
	b := newBench(t, Config{})
	for _, path := range []string{"/faults", "/history", "/events", "/jwks.json", "/ca.pem", "/healthz"} {
		for _, method := range []string{"GET", "PUT", "POST", "DELETE"} {
			for _, headers := range [][]string{nil, {"Metadata", "true"}} {
				if a := b.do(b.Handler(), method, path, `[]`, headers...); a.Status != 400 && a.Status != 404 {
					t.Errorf("%s %s: got %d %s", method, path, a.Status, a.Body)
				}
			}
		}
	}
	if a := b.manage("GET", "/metadata/versions", ""); a.Status != 404 {
		t.Errorf("protocol on the management API: got %d, want 404", a.Status)
	}
}

func TestFaultsAtRunTime(t *testing.T) {
	b := newBench(t, Config{})
	if a := b.manage("GET", "/faults", ""); a.Body != "[]\n" {
		t.Errorf("none: got %d %q", a.Status, a.Body)
	}
	a := b.manage("PUT", "/faults", `[{"status":503,"count":2,"path":"/metadata/versions"},{"latency":"1ms"}]`)
	if want := `[{"count":2,"path":"/metadata/versions","status":503},{"latency":"1ms"}]` + "\n"; a.Status != 200 || a.Body != want {
		t.Errorf("PUT: got %d %q, want %q", a.Status, a.Body, want)
	}
	if a := b.get("/metadata/versions"); a.Status != 503 {
		t.Errorf("got %d, want the fault's 503", a.Status)
	}
	if a := b.manage("GET", "/faults", ""); !strings.HasPrefix(a.Body, `[{"count":1,`) {
		t.Errorf("GET: got %q, want the count that is left", a.Body)
	}
	for body, want := range map[string]string{
		`[{"status":1}]`:              "status: want 400 to 599",
		`{"status":500}`:              "read body",
		`[{"status":500},{"hung":1}]`: `unknown key "hung"`,
		``:                            "read body",
	} {
		if a := b.manage("PUT", "/faults", body); a.Status != 400 || !strings.Contains(a.Body, want) {
			t.Errorf("PUT %s: got %d %q, want %q", body, a.Status, a.Body, want)
		}
	}
	if got := b.Faults(); len(got) != 2 {
		t.Errorf("after refusals: got %v, want the faults from before", got)
	}
	if a := b.manage("DELETE", "/faults", ""); a.Status != http.StatusNoContent || len(b.Faults()) != 0 {
		t.Errorf("DELETE: got %d, faults %v", a.Status, b.Faults())
	}
	if a := b.manage("POST", "/faults", "[]"); a.Status != 405 {
		t.Errorf("POST: got %d, want 405", a.Status)
	}
}

func TestHealth(t *testing.T) {
	if a := newBench(t, Config{}).manage("GET", "/healthz", ""); a.Status != 200 || a.Body != "ok\n" {
		t.Errorf("got %d %q", a.Status, a.Body)
	}
}

func TestHistory(t *testing.T) {
	b := newBench(t, Config{History: 3})
	for _, version := range []string{"2017-04-02", "2018-02-01", "2019-02-01", "2020-06-01", "nothing"} {
		b.get("/metadata/instance?api-version=" + version)
	}
	want := []Exchange{
		{Time: start, Method: "GET", Target: "/metadata/instance?api-version=2019-02-01", Status: 200, Peer: "192.0.2.1:1234", Header: http.Header{"Metadata": {"true"}}},
		{Time: start, Method: "GET", Target: "/metadata/instance?api-version=2020-06-01", Status: 200, Peer: "192.0.2.1:1234", Header: http.Header{"Metadata": {"true"}}},
		{Time: start, Method: "GET", Target: "/metadata/instance?api-version=nothing", Status: 400, Peer: "192.0.2.1:1234", Header: http.Header{"Metadata": {"true"}}},
	}
	if diff := cmp.Diff(want, decode[[]Exchange](t, b.manage("GET", "/history", ""))); diff != "" {
		t.Errorf("history (-want +got):\n%s", diff)
	}
	if a := b.manage("DELETE", "/history", ""); a.Status != http.StatusNoContent {
		t.Errorf("DELETE: got %d", a.Status)
	}
	if a := b.manage("GET", "/history", ""); a.Body != "[]\n" {
		t.Errorf("after DELETE: got %s", a.Body)
	}
	b.get("/metadata/versions")
	if got := b.History(); len(got) != 1 || got[0].Target != "/metadata/versions" {
		t.Errorf("afterwards: got %v", got)
	}
}

func TestRefusedByLimitIsInHistory(t *testing.T) {
	b := newBench(t, Config{Limits: Limits{General: 1}})
	b.get("/metadata/versions")
	b.get("/metadata/versions")
	if got := b.History(); len(got) != 2 || got[1].Status != 429 {
		t.Errorf("got %v", got)
	}
}

func TestHistoryHoldsNoTokens(t *testing.T) {
	b := newBench(t, Config{})
	token := decode[map[string]string](t, b.get(tokenURL+arm))["access_token"]
	b.do(b.Handler(), "GET", "/metadata/versions?access_token="+token, "",
		"Authorization", "Bearer opaque-secret", "X-Identity-Header", "opaque-secret", "Cookie", "opaque-secret",
		"X-Aws-Ec2-Metadata-Token", "opaque-secret", "X-Note", "seen "+token+" here", "X-Plain", "kept")
	text := b.manage("GET", "/history", "").Body
	if strings.Contains(text, token) || strings.Contains(text, "opaque-secret") {
		t.Errorf("a token is in the history: %s", text)
	}
	for _, want := range []string{`"X-Plain":["kept"]`, `"X-Note":["seen (token) here"]`, `"Authorization":["(token)"]`} {
		if !strings.Contains(text, want) {
			t.Errorf("got %s, want %s in it", text, want)
		}
	}
}
