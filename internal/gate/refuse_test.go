package gate

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

// untouched is a Source that must not be asked.
func untouched(t testing.TB) sourceFunc {
	return func(_ context.Context, r upstream.Request) (*upstream.Answer, error) {
		t.Errorf("the source was asked for %s", r.Query.Target())
		return answer("{}"), nil
	}
}

// Each row is one request that must not reach the source, as bytes.
func TestRefused(t *testing.T) {
	const evil = "GET /metadata/identity/oauth2/token?api-version=2018-02-01&resource=evil HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n\r\n"
	for name, tc := range map[string]struct {
		send     string
		status   int
		decision audit.Decision
		reason   string // how the event's reason starts
		closes   bool   // whether the connection must end
	}{
		// Understood, and against the rules of the service.
		"probe_without_header":    {"GET " + token + " HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", 400, audit.Refuse, "metadata_header_missing: ", false},
		"spoofed_forwarded_for":   {request("GET", token, "X-Forwarded-For: 127.0.0.1\r\n"), 400, audit.Refuse, "forwarding_header: ", false},
		"dns_rebinding":           {strings.Replace(request("GET", token), "169.254.169.254", "evil.example", 1), 400, audit.Refuse, "host: ", false},
		"path_traversal":          {request("GET", "/metadata/instance/../identity/oauth2/token"), 400, audit.Refuse, "path: ", false},
		"double_slash":            {request("GET", "//metadata/identity/oauth2/token"), 400, audit.Refuse, "path: ", false},
		"parameter_twice":         {request("GET", token+"&resource=b"), 400, audit.Refuse, "duplicate_parameter: ", false},
		"absolute_form":           {request("GET", "http://169.254.169.254"+token), 400, audit.Refuse, "target_form: ", false},
		"absolute_form_elsewhere": {request("GET", "http://10.0.0.1"+token), 400, audit.Refuse, "target_form: ", false},
		"connect":                 {"CONNECT 10.0.0.1:80 HTTP/1.1\r\nHost: 10.0.0.1:80\r\n\r\n", 405, audit.Refuse, "method: ", false},
		"trace":                   {request("TRACE", instance), 405, audit.Refuse, "method: ", false},
		"options_asterisk":        {request("OPTIONS", "*"), 400, audit.Refuse, "target_form: ", false},
		"upgrade_to_h2c":          {request("GET", instance, "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"), 400, audit.Refuse, "connection_header: ", false},
		"http2_preface":           {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, audit.Refuse, "protocol: ", true},

		// A body where none belongs: the next request cannot be told from it.
		"get_with_body_that_is_a_request":      {request("GET", instance, "Content-Length: 999\r\n") + evil, 400, audit.Refuse, "body: ", true},
		"length_and_chunks_on_get":             {request("GET", instance, "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n") + "0\r\n\r\n" + evil, 400, audit.Refuse, "body: ", true},
		"length_and_chunks_on_post":            {request("POST", eventsAt, "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n") + "0\r\n\r\n" + evil, 400, audit.Refuse, "transfer_encoding: ", true},
		"chunked_post":                         {request("POST", eventsAt, "Transfer-Encoding: chunked\r\n") + "0\r\n\r\n" + evil, 400, audit.Refuse, "transfer_encoding: ", true},
		"expect_continue":                      {request("POST", eventsAt, "Content-Length: 5\r\nExpect: 100-continue\r\n"), 400, audit.Refuse, "connection_header: ", true},
		"denied_post_whose_body_is_a_request":  {request("POST", "/metadata/identity/issuecredential?cred-api-version=2.0", "Content-Length: 200\r\n") + evil, 403, audit.Deny, "no rule allows identity.credential", true},
		"post_larger_than_the_service_accepts": {request("POST", eventsAt, "Content-Length: 65537\r\n"), 400, audit.Refuse, "body_too_large: ", true},

		// What net/http does not give to a handler.
		"not_http":                {"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", 400, audit.Refuse, "malformed: ", true},
		"two_lengths":             {request("POST", eventsAt, "Content-Length: 5\r\nContent-Length: 6\r\n") + evil, 400, audit.Refuse, "malformed: ", true},
		"negative_length":         {request("POST", eventsAt, "Content-Length: -1\r\n"), 400, audit.Refuse, "malformed: ", true},
		"unknown_transfer_coding": {request("POST", eventsAt, "Transfer-Encoding: xchunked\r\n") + evil, 501, audit.Refuse, "malformed: ", true},
		"space_before_the_colon":  {request("GET", instance, "Transfer-Encoding : chunked\r\n") + evil, 400, audit.Refuse, "malformed: ", true},
		"nul_in_a_header":         {request("GET", instance, "X-A: a\x00b\r\n"), 400, audit.Refuse, "malformed: ", true},
		"no_host":                 {"GET " + token + " HTTP/1.1\r\nMetadata: true\r\n\r\n", 400, audit.Refuse, "malformed: ", true},
		"two_hosts":               {request("GET", token, "Host: evil.example\r\n"), 400, audit.Refuse, "malformed: ", true},
		"newline_in_the_target":   {"GET /metadata\x0b/instance HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", 400, audit.Refuse, "malformed: ", true},
		"http_0_9":                {"GET /metadata/instance\r\n\r\n", 400, audit.Refuse, "malformed: ", true},
		"http_3":                  {strings.Replace(request("GET", instance), "HTTP/1.1", "HTTP/3.0", 1), 505, audit.Refuse, "malformed: ", true},
		"odd_expectation":         {request("POST", eventsAt, "Content-Length: 5\r\nExpect: more\r\n") + "hello", 417, audit.Refuse, "malformed: ", true},
		"header_too_large":        {request("GET", instance, "X-A: "+strings.Repeat("a", 17<<10)+"\r\n"), 431, audit.Refuse, "header_too_large: ", true},

		// Policy.
		"denied_action":    {request("GET", "/metadata/reprovisiondata?api-version=2019-06-01"), 403, audit.Deny, "no rule allows instance.provisioning: add {match: {name: web}, allow: [instance.provisioning]} to the policy's rules", false},
		"unknown_endpoint": {request("GET", "/metadata/new"), 403, audit.Deny, "unknown is every endpoint", false},
	} {
		t.Run(name, func(t *testing.T) {
			g, sink := newGate(t, untouched(t))
			g.Limits.BodyTime = 50 * time.Millisecond // some rows never send the body they announce
			s := start(t, g, listen(t))
			p := dial(t, s.addr)
			p.send(t, tc.send)
			r, body := p.response(t, "GET")
			if r.StatusCode != tc.status {
				t.Errorf("got status %d, want %d", r.StatusCode, tc.status)
			}
			e := sink.next(t)
			if e.Decision != tc.decision || e.Status != tc.status || !strings.HasPrefix(e.Reason, tc.reason) || e.Upstream {
				t.Errorf("got event %+v\nwant %s, status %d, reason %q", e, tc.decision, tc.status, tc.reason)
			}
			if e.Workload != "static:web" {
				t.Errorf("got workload %q in the event, want static:web", e.Workload)
			}
			if r.Close != tc.closes {
				t.Errorf("Connection: close is %v, want %v", r.Close, tc.closes)
			}
			if tc.closes {
				p.closed(t)
			} else {
				inCloudsWords(t, r, body)
				p.send(t, request("GET", "/metadata/identity/info?api-version=2018-02-01"))
				if r, _ := p.response(t, "GET"); r.StatusCode != 403 || sink.next(t).Action != imds.IdentityInfo {
					t.Errorf("the next request got %d, want 403", r.StatusCode)
				}
			}
			s.stop()
			<-s.done
			sink.none(t)
		})
	}
}

// inCloudsWords checks that SDKs can read a refusal.
func inCloudsWords(t *testing.T, r *http.Response, body string) {
	t.Helper()
	var v struct{ Error string }
	if err := json.Unmarshal([]byte(body), &v); err != nil || v.Error == "" || r.Header.Get(imds.ReasonHeader) == "" {
		t.Errorf("got %q, %v, want a refusal in Azure's words", body, r.Header)
	}
}

func TestDenialTellsWhatToAdd(t *testing.T) {
	g, sink := newGate(t, untouched(t))
	g.Policy = parsePolicy(t, "allow: []")
	s := start(t, g, listen(t))
	p := dial(t, s.addr)
	p.send(t, request("GET", token))
	r, body := p.response(t, "GET")
	want := `{"error":"access_denied","error_description":"imdsgate policy: container web: no rule allows identity.token: add {match: {name: web}, allow: [identity.token]} to the policy's rules"}`
	if r.StatusCode != 403 || body != want {
		t.Errorf("got %d %s\nwant 403 %s", r.StatusCode, body, want)
	}
	compare(t, sink.next(t), web(audit.Event{Verb: "GET", Action: imds.IdentityToken,
		Target:   "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.example",
		Decision: audit.Deny, Rule: "p.yaml:default", Reason: "no rule allows identity.token: add {match: {name: web}, allow: [identity.token]} to the policy's rules",
		Snapshot: 1, Status: 403, Bytes: int64(len(want))}))
}

// A second request behind the first is one more request, never part of it.
func TestPipelining(t *testing.T) {
	for name, tc := range map[string]struct {
		second string
		status int
		reason string
	}{
		"proper":    {request("GET", instance), 200, "instance.read is allowed by the list allow"},
		"smuggled":  {request("GET", token, "X-Forwarded-For: 10.0.0.1\r\n"), 400, "forwarding_header: "},
		"malformed": {"BAD\r\n\r\n", 400, "malformed: "},
		"too_large": {request("GET", instance, "X-A: "+strings.Repeat("a", 40<<10)+"\r\n"), 431, "header_too_large: "},
	} {
		t.Run(name, func(t *testing.T) {
			_, sink, s := serving(t, says("{}"))
			p := dial(t, s.addr)
			p.send(t, request("GET", instance)+tc.second)
			if r, _ := p.response(t, "GET"); r.StatusCode != 200 {
				t.Errorf("first: got %d, want 200", r.StatusCode)
			}
			if r, _ := p.response(t, "GET"); r.StatusCode != tc.status {
				t.Errorf("second: got %d, want %d", r.StatusCode, tc.status)
			}
			first, second := sink.next(t), sink.next(t)
			if first.Status != 200 || second.Status != tc.status || !strings.HasPrefix(second.Reason, tc.reason) {
				t.Errorf("got events %+v\nand %+v", first, second)
			}
			if first.Conn != second.Conn || first.ID == second.ID {
				t.Errorf("got connections %d, %d and ids %d, %d", first.Conn, second.Conn, first.ID, second.ID)
			}
			p.Close()
			s.stop()
			<-s.done
			sink.none(t)
		})
	}
}

func TestLongMethodIsCutInTheRecord(t *testing.T) {
	_, sink, s := serving(t, untouched(t))
	p := dial(t, s.addr)
	p.send(t, request(strings.Repeat("M", 9000), instance))
	p.response(t, "GET")
	if e := sink.next(t); e.Verb != strings.Repeat("M", 16) {
		t.Errorf("got a verb of %d bytes, want 16", len(e.Verb))
	}
}

// Only what was steered to the listener proves that it comes from its netns.
func TestCallerOfTheRealPortIsTurnedAway(t *testing.T) {
	g, sink := newGate(t, untouched(t))
	l := listen(t)
	l.Local = ServiceAddrs()
	s := start(t, g, l)
	for range 3 {
		dial(t, s.addr).closed(t)
	}
	s.stop()
	<-s.done
	const reason = "the connection was made to the gate's own port, not to the metadata service"
	first := sink.next(t)
	if first.Decision != audit.Refuse || first.Reason != reason || first.Count != 1 || first.Proof != workload.None || first.Workload != "static:web" || !first.Peer.IsValid() {
		t.Errorf("got %+v, want a refusal of one connection that proves nothing", first)
	}
	if rest := sink.next(t); rest.Reason != reason || rest.Count != 2 || rest.Proof != workload.None {
		t.Errorf("got %+v, want an event for the two others", rest)
	}
	sink.none(t)
}

func TestRequestFromAnotherServerHasNoEvidence(t *testing.T) {
	g, sink := newGate(t, untouched(t))
	r, err := http.NewRequest("GET", "http://169.254.169.254"+token, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.RequestURI, r.Header = token, http.Header{"Metadata": {"true"}}
	w := &written{header: http.Header{}}
	g.ServeHTTP(w, r)
	if e := sink.next(t); w.status != 403 || e.Decision != audit.Refuse || e.Workload != "" {
		t.Errorf("got %d, %+v, want a refusal", w.status, e)
	}
}

// written is a response that nobody reads.
type written struct {
	header http.Header
	status int
}

func (w *written) Header() http.Header         { return w.header }
func (w *written) WriteHeader(s int)           { w.status = s }
func (w *written) Write(p []byte) (int, error) { return len(p), nil }
