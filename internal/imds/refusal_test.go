package imds

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// Bodies of the service, byte for byte (protocol-azure §6).
func TestBodiesOfTheService(t *testing.T) {
	identity := func(text string) *Refusal { return &Refusal{Status: 400, Reason: "x", Family: Identity, Text: text} }
	probe := func(a ask) *Refusal {
		_, f := Classify(Azure, a.request(t))
		return f
	}
	tests := []struct {
		name    string
		refusal *Refusal
		want    string
		size    int
	}{
		{"instance without header", probe(ask{target: "/metadata/instance?api-version=2021-02-01", bare: true}),
			`{ "error": "Bad request: . Required metadata header not specified" }`, 68},
		{"instance with wrong header", probe(ask{target: "/metadata/instance", bare: true, lines: []string{"Metadata: no"}}),
			`{ "error": "Bad request: . Required metadata header not specified" }`, 68},
		{"versions without header", probe(ask{target: "/metadata/versions", bare: true}),
			`{ "error": "Bad request: . Required metadata header not specified" }`, 68},
		{"token without header", probe(ask{target: tokenPath, bare: true}),
			`{"error":"invalid_request","error_description":"Required metadata header not specified"}`, 88},
		{"identity not found", identity("Identity not found"),
			`{"error":"invalid_request","error_description":"Identity not found"}`, 68},
		{"several identities", identity("Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request"),
			`{"error":"invalid_request","error_description":"Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request"}`, 168},
		{"no resource", identity("Required query variable 'resource' is missing"),
			`{"error":"invalid_request","error_description":"Required query variable 'resource' is missing"}`, 95},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.refusal == nil {
				t.Fatal("got no refusal")
			}
			got := string(tt.refusal.Body())
			if got != tt.want || len(got) != tt.size || tt.refusal.Status != 400 {
				t.Errorf("got %d %s (%d bytes)\nwant %s (%d bytes)", tt.refusal.Status, got, len(got), tt.want, tt.size)
			}
			if got := tt.refusal.Header().Get("Content-Type"); got != "application/json; charset=utf-8" {
				t.Errorf("got content type %q", got)
			}
		})
	}
}

func TestDecided(t *testing.T) {
	token := query(t, ask{target: tokenGet})
	instance := query(t, ask{target: "/metadata/instance"})
	tests := []struct {
		make         func(Query, string) *Refusal
		status       int
		reason, code string
	}{
		{Forbidden, 403, "forbidden", "access_denied"},
		{Busy, 429, "busy", "too_many_requests"},
		{Unavailable, 503, "unavailable", "service_unavailable"},
		{Timeout, 504, "timeout", "service_unavailable"},
		{BadAnswer, 502, "bad_answer", "server_error"},
	}
	for _, tt := range tests {
		t.Run(tt.reason, func(t *testing.T) {
			f := tt.make(token, "why")
			if want := `{"error":"` + tt.code + `","error_description":"why"}`; string(f.Body()) != want || f.Status != tt.status {
				t.Errorf("got %d %s, want %d %s", f.Status, f.Body(), tt.status, want)
			}
			if f.Header().Get(ReasonHeader) != tt.reason || len(f.Header()) != 2 {
				t.Errorf("got header %v", f.Header())
			}
			if got := string(tt.make(instance, "why").Body()); got != `{"error":"why"}` {
				t.Errorf("general family: got %s", got)
			}
		})
	}
}

func TestMethodRefusalInBothFamilies(t *testing.T) {
	for target, want := range map[string]string{
		tokenPath:            `{"error":"method_not_allowed","error_description":"method not allowed"}`,
		"/metadata/instance": `{"error":"method not allowed"}`,
	} {
		_, f := Classify(Azure, ask{method: "PUT", target: target}.request(t))
		if f == nil || f.Status != 405 || string(f.Body()) != want {
			t.Errorf("%s: got %v, want 405 %s", target, f, want)
		}
	}
}

// A 403 with this word means to azidentity and @azure/identity that there is no
// managed identity at all (protocol-azure §8).
func TestNeverUnreachable(t *testing.T) {
	texts := []string{
		"unreachable", "IMDS is Unreachable now", "UNREACHABLE unreachable", "unreachunreachableable",
		"unreach\xffable", strings.Repeat("x", maxText-5) + "unreachable", strings.Repeat("unreachable", 200),
	}
	for _, q := range []Query{{Family: Identity}, {Family: General}} {
		for _, text := range texts {
			refusals := []*Refusal{Forbidden(q, text), Busy(q, text), Unavailable(q, text), Timeout(q, text), BadAnswer(q, text),
				{Status: 403, Text: text, Family: q.Family}}
			for i, f := range refusals {
				made := i < len(refusals)-1
				if body := strings.ToLower(string(f.Body())); strings.Contains(body, "unreachable") || len(body) > maxText+100 {
					t.Errorf("got body %.80q", body)
				}
				if made && strings.Contains(strings.ToLower(f.Text), "unreachable") {
					t.Errorf("got text %.80q", f.Text)
				}
			}
		}
	}
}

func TestTextCannotBreakOut(t *testing.T) {
	texts := []string{`"}`, "a\nb\r\n\x00\u2028", "</script><script>", "\xff\xfe", strings.Repeat("é", maxText), strings.Repeat("\\", maxText)}
	for _, text := range texts {
		for _, family := range []Family{General, Identity} {
			body := Forbidden(Query{Family: family}, text).Body()
			var fields map[string]string
			if err := json.Unmarshal(body, &fields); err != nil || len(fields) > 2 {
				t.Errorf("%.20q: got %s: %v", text, body, err)
			}
			if strings.ContainsAny(string(body), "<>\n\r\x00\u2028") {
				t.Errorf("%.20q: got raw %q", text, body)
			}
		}
	}
}

// What the client sent must not come back to it.
func TestRefusalsRepeatNothing(t *testing.T) {
	const mark = "Zq7Zq7"
	for _, a := range []ask{
		{target: "/metadata/" + mark + "%00"}, {target: "/metadata/versions?" + mark + "=1"}, {target: "/metadata/versions", host: mark},
		{target: "/metadata/versions", bare: true, lines: []string{"Metadata: " + mark}}, {target: "/metadata/versions", method: mark},
		{target: "/metadata/versions", lines: []string{"X-Forwarded-" + mark + ": " + mark}}, {target: tokenGet + "&resource=" + mark},
	} {
		_, f := Classify(Azure, a.request(t))
		if f == nil {
			t.Fatalf("%+v: got no refusal", a)
		}
		if s := f.Error() + string(f.Body()) + fmt.Sprint(f.Header()); strings.Contains(strings.ToLower(s), strings.ToLower(mark)) {
			t.Errorf("%+v: got %s", a, s)
		}
	}
}

func TestRefusalIsAnError(t *testing.T) {
	var f *Refusal
	err := fmt.Errorf("serve: %w", Forbidden(Query{}, "no rule"))
	if !errors.As(err, &f) || err.Error() != "serve: forbidden: no rule" {
		t.Errorf("got %v", err)
	}
}
