package imds

import (
	"strings"
	"testing"
)

func TestAttacks(t *testing.T) {
	const instance = "/metadata/instance?api-version=2021-02-01"
	type attack struct {
		name   string
		ask    ask
		reason string
		allow  string // of a 405; other refusals are 400
	}
	tests := []attack{
		{"absolute form", ask{target: "http://169.254.169.254/metadata/versions"}, "target_form", ""},
		{"absolute form of another host", ask{target: "http://example.test/metadata/versions"}, "target_form", ""},
		{"asterisk", ask{method: "OPTIONS", target: "*"}, "target_form", ""},
		{"connect", ask{method: "CONNECT", target: "169.254.169.254:80"}, "method", "GET, HEAD"},
		{"trace", ask{method: "TRACE", target: "/metadata/versions"}, "method", "GET, HEAD"},
		{"put aws token", ask{method: "PUT", target: "/latest/api/token"}, "method", "GET, HEAD"},
		{"lower case method", ask{method: "get", target: "/metadata/versions"}, "method", "GET, HEAD"},
		{"post token", ask{method: "POST", target: tokenGet, lines: []string{"Content-Length: 0"}}, "method", "GET, HEAD"},
		{"get issuecredential", ask{target: "/metadata/identity/issuecredential"}, "method", "POST"},
		{"delete events", ask{method: "DELETE", target: eventPost}, "method", "GET, HEAD, POST"},
		{"http 2 by name", ask{target: instance, proto: "HTTP/2.0"}, "protocol", ""},
		{"long target", ask{target: instance + strings.Repeat("0", maxTarget-len(instance)+1)}, "target_too_long", ""},

		{"host of an attacker", ask{target: instance, host: "rebind.example.test"}, "host", ""},
		{"host with another port", ask{target: instance, host: "169.254.169.254:8080"}, "host", ""},
		{"host as hex", ask{target: instance, host: "0xa9fea9fe"}, "host", ""},
		{"host v4 mapped", ask{target: instance, host: "[::ffff:169.254.169.254]"}, "host", ""},
		{"host with dot", ask{target: instance, host: "169.254.169.254."}, "host", ""},
		{"host with suffix", ask{target: instance, host: "169.254.169.254.example.test"}, "host", ""},
		{"host with two ports", ask{target: instance, host: "169.254.169.254:80:80"}, "host", ""},

		{"escaped slash", ask{target: "/metadata%2finstance"}, "path", ""},
		{"escaped letter", ask{target: "/metadata/instance/compute/%75serData"}, "path", ""},
		{"escaped question mark", ask{target: "/metadata/versions%3f"}, "path", ""},
		{"escaped nul", ask{target: "/metadata/versions%00"}, "path", ""},
		{"double escape", ask{target: "/metadata/%2575serData"}, "path", ""},
		{"backslash", ask{target: `/metadata\instance`}, "path", ""},
		{"matrix parameter", ask{target: "/metadata/instance;x/compute"}, "path", ""},
		{"not ascii", ask{target: "/metadata/inst\u00e4nce"}, "path", ""},
		{"long s", ask{target: "/metadata/in\u017ftance"}, "path", ""},
		{"double slash", ask{target: "/metadata//versions"}, "path", ""},
		{"double slash in front", ask{target: "//169.254.169.254/metadata/versions"}, "path", ""},
		{"double slash at the end", ask{target: "/metadata/versions//"}, "path", ""},
		{"dot", ask{target: "/metadata/./versions"}, "path", ""},
		{"dot at the end", ask{target: "/metadata/versions/."}, "path", ""},
		{"dot dot", ask{target: "/metadata/versions/../identity/info"}, "path", ""},
		{"segment with dot at the end", ask{target: "/metadata/instance/compute/userData."}, "path", ""},
		{"fragment", ask{target: "/metadata/versions#x"}, "path", ""},
		{"stream name", ask{target: "/metadata/instance/compute/userData::$DATA"}, "path", ""},

		{"query without value", ask{target: "/metadata/instance?format"}, "query", ""},
		{"query of only a word", ask{target: "/metadata/instance?api-version=1&x"}, "query", ""},
		{"empty pair", ask{target: "/metadata/instance?api-version=1&&format=json"}, "query", ""},
		{"ampersand at the end", ask{target: instance + "&"}, "query", ""},
		{"semicolon in query", ask{target: "/metadata/instance?api-version=1;format=json"}, "query", ""},
		{"short escape", ask{target: instance + "%2"}, "query", ""},
		{"bad escape", ask{target: instance + "%zz"}, "query", ""},
		{"unicode escape", ask{target: instance + "%u0041"}, "query", ""},
		{"nul in value", ask{target: instance + "%00"}, "query", ""},
		{"newline in value", ask{target: instance + "%0d%0aMetadata:%20true"}, "query", ""},
		{"delete in value", ask{target: instance + "%7f"}, "query", ""},
		{"c1 control in value", ask{target: instance + "%c2%85"}, "query", ""},
		{"overlong utf8", ask{target: instance + "%c0%af"}, "query", ""},
		{"raw bytes", ask{target: instance + "\u00e9"}, "query", ""},
		{"fragment in query", ask{target: instance + "#x"}, "query", ""},
		{"second question mark in name", ask{target: "/metadata/instance??api-version=1"}, "unknown_parameter", ""},
		{"duplicate", ask{target: tokenGet + "&resource=https%3A%2F%2Fvault.azure.net"}, "duplicate_parameter", ""},
		{"duplicate with the same value", ask{target: instance + "&api-version=2021-02-01"}, "duplicate_parameter", ""},
		{"duplicate in another case", ask{target: tokenGet + "&RESOURCE=x"}, "duplicate_parameter", ""},
		{"duplicate behind an escape", ask{target: tokenGet + "&%72esource=x"}, "duplicate_parameter", ""},
		{"duplicate on unknown endpoint", ask{target: "/metadata/new?a=1&A=2"}, "duplicate_parameter", ""},
		{"unknown name", ask{target: tokenGet + "&debug=1"}, "unknown_parameter", ""},
		{"name of another endpoint", ask{target: "/metadata/instance/compute?extended=true"}, "unknown_parameter", ""},
		{"name that folds by unicode", ask{target: tokenPath + "?re%C5%BFource=x"}, "unknown_parameter", ""},
		{"array name", ask{target: tokenPath + "?resource%5B%5D=x"}, "unknown_parameter", ""},
		{"name with space", ask{target: tokenPath + "?+resource=x"}, "unknown_parameter", ""},
		{"empty name", ask{target: "/metadata/new?=x"}, "unknown_parameter", ""},
		{"long name", ask{target: "/metadata/new?" + strings.Repeat("n", 65) + "=x"}, "unknown_parameter", ""},
		{"odd name on unknown endpoint", ask{target: "/metadata/new?a%26b=x"}, "unknown_parameter", ""},
		{"seventeen parameters", ask{target: "/metadata/new?a=" + strings.Repeat("&b=", 16)}, "too_many_parameters", ""},
		{"two identities", ask{target: tokenGet + "&client_id=a&object_id=b"}, "identity_ambiguous", ""},
		{"two spellings of a resource id", ask{target: tokenGet + "&msi_res_id=a&mi_res_id=a"}, "identity_ambiguous", ""},
		{"empty identity", ask{target: tokenGet + "&client_id="}, "identity_empty", ""},

		{"no metadata header", ask{target: instance, bare: true}, "metadata_header_missing", ""},
		{"no metadata header on legacy", ask{target: "/metadata/v1/InstanceInfo", bare: true}, "metadata_header_missing", ""},
		{"empty metadata header", ask{target: instance, bare: true, lines: []string{"Metadata:"}}, "metadata_header_invalid", ""},
		{"metadata false", ask{target: instance, bare: true, lines: []string{"Metadata: false"}}, "metadata_header_invalid", ""},
		{"metadata 1", ask{target: instance, bare: true, lines: []string{"Metadata: 1"}}, "metadata_header_invalid", ""},
		{"metadata twice", ask{target: instance, lines: []string{"Metadata: true"}}, "metadata_header_invalid", ""},
		{"metadata list", ask{target: instance, bare: true, lines: []string{"Metadata: true, true"}}, "metadata_header_invalid", ""},
		{"metadata with underscore", ask{target: instance, bare: true, lines: []string{"Meta_data: true"}}, "metadata_header_missing", ""},

		{"upgrade", ask{target: instance, lines: []string{"Connection: Upgrade", "Upgrade: h2c"}}, "connection_header", ""},
		{"upgrade alone", ask{target: instance, lines: []string{"Upgrade: websocket"}}, "connection_header", ""},
		{"http2 settings", ask{target: instance, lines: []string{"HTTP2-Settings: AAMAAABkAARAAAAA"}}, "connection_header", ""},
		{"connection drops metadata", ask{target: instance, lines: []string{"Connection: close, Metadata"}}, "connection_header", ""},
		{"expect", ask{method: "POST", target: eventPost, lines: []string{"Content-Length: 2", "Expect: 100-continue"}, body: "{}"}, "connection_header", ""},
		{"body on get", ask{target: instance, lines: []string{"Content-Length: 2"}, body: "{}"}, "body", ""},
		{"chunked get", ask{target: instance, lines: []string{"Transfer-Encoding: chunked"}, body: "0\r\n\r\n"}, "body", ""},
		{"body on head", ask{method: "HEAD", target: instance, lines: []string{"Content-Length: 2"}, body: "{}"}, "body", ""},
		{"chunked post", ask{method: "POST", target: eventPost, lines: []string{"Transfer-Encoding: chunked"}, body: "0\r\n\r\n"}, "transfer_encoding", ""},
		{"post without length", ask{method: "POST", target: eventPost}, "content_length_missing", ""},
		{"post too large", ask{method: "POST", target: eventPost, lines: []string{"Content-Length: 65537"}}, "body_too_large", ""},
	}
	for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port", "X-Forwarded-Server",
		"X-Forwarded", "X-Forwarded-Anything-At-All-However-Long-It-Is", "x-forwarded-for", "X_Forwarded_For", "Forwarded", "X-Real-IP", "Via",
		"True-Client-IP", "X-Client-IP", "CF-Connecting-IP", "X-Original-URL", "X-Rewrite-URL", "X-HTTP-Method-Override",
		"X-MS-Azure-Host-Claims", "X-MS-Azure-Host-Date", "X-MS-Azure-Host-Authorization"} {
		for _, value := range []string{": 127.0.0.1", ":"} {
			tests = append(tests, attack{name + value, ask{target: tokenGet, lines: []string{name + value}}, "forwarding_header", ""})
		}
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, f := Classify(Azure, tt.ask.request(t))
			if f == nil {
				t.Fatalf("got no refusal, want %s", tt.reason)
			}
			status := 400
			if tt.allow != "" {
				status = 405
			}
			if f.Reason != tt.reason || f.Status != status || f.Allow != tt.allow {
				t.Errorf("got %d %s allow %q, want %d %s allow %q", f.Status, f.Reason, f.Allow, status, tt.reason, tt.allow)
			}
			if f.Header().Get(ReasonHeader) != tt.reason || f.Header().Get("Allow") != tt.allow {
				t.Errorf("got header %v", f.Header())
			}
		})
	}
}
