package imds

import (
	"bufio"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// ask is a request as text. Zero fields mean GET, HTTP/1.1, Host
// 169.254.169.254; Metadata: true is sent unless bare is set.
type ask struct {
	method, target, proto, host string
	bare                        bool
	lines                       []string // further header lines
	body                        string
}

// request lets net/http read the text, as a server would.
func (a ask) request(t testing.TB) *http.Request {
	t.Helper()
	or := func(s, otherwise string) string {
		if s == "" {
			return otherwise
		}
		return s
	}
	var b strings.Builder
	b.WriteString(or(a.method, "GET") + " " + a.target + " " + or(a.proto, "HTTP/1.1") + "\r\n")
	b.WriteString("Host: " + or(a.host, "169.254.169.254") + "\r\n")
	if !a.bare {
		b.WriteString("Metadata: true\r\n")
	}
	for _, l := range a.lines {
		b.WriteString(l + "\r\n")
	}
	b.WriteString("\r\n" + a.body)
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(b.String())))
	if err != nil {
		t.Fatalf("read request %q: %v", b.String(), err)
	}
	return r
}

const (
	tokenPath = "/metadata/identity/oauth2/token"
	tokenGet  = tokenPath + "?api-version=2018-02-01&resource=https%3A%2F%2Fmanagement.azure.com%2F"
	eventPost = "/metadata/scheduledevents?api-version=2020-07-01"
)

func TestEndpoints(t *testing.T) {
	userdata := []Action{InstanceUserdata}
	whole := []Action{InstanceRead, InstanceUserdata}
	tests := []struct {
		name, method, target string
		action               Action
		forward              string // "" means target
		covers               []Action
	}{
		{name: "versions", target: "/metadata/versions", action: VersionsRead},
		{name: "bare root lists versions", target: "/metadata?api-version=2021-02-01", action: VersionsRead},
		{name: "instance", target: "/metadata/instance?api-version=2021-02-01", action: InstanceRead, covers: userdata},
		{name: "instance head", method: "HEAD", target: "/metadata/instance?api-version=2021-02-01", action: InstanceRead, covers: userdata},
		{name: "instance without version", target: "/metadata/instance", action: InstanceRead, covers: userdata},
		{name: "instance with slash", target: "/metadata/instance/?api-version=2021-02-01", action: InstanceRead, covers: userdata, forward: "/metadata/instance?api-version=2021-02-01"},
		{name: "instance extended", target: "/metadata/instance?api-version=2021-08-01&extended=true", action: InstanceProvisioning, covers: whole},
		{name: "instance extended false", target: "/metadata/instance?extended=false", action: InstanceProvisioning, covers: whole},
		{name: "compute", target: "/metadata/instance/compute?api-version=2021-02-01&format=json", action: InstanceRead, covers: userdata},
		{name: "compute name", target: "/metadata/instance/compute/name?api-version=2021-02-01&format=text", action: InstanceRead},
		{name: "compute newer field", target: "/metadata/instance/compute/notYetDocumented?format=text", action: InstanceRead},
		{name: "compute numeric key", target: "/metadata/instance/compute/0?format=text", action: Unknown},
		{name: "tags list", target: "/metadata/instance/compute/tagsList/0/name?format=text", action: InstanceRead},
		{name: "network", target: "/metadata/instance/network?api-version=2021-02-01", action: InstanceRead},
		{name: "network address", target: "/metadata/instance/network/interface/0/ipv4/ipAddress/0/publicIpAddress?api-version=2021-02-01&format=text", action: InstanceRead},
		{name: "user data", target: "/metadata/instance/compute/userData?api-version=2021-01-01&format=text", action: InstanceUserdata},
		{name: "custom data", target: "/metadata/instance/compute/customData?api-version=2019-02-01&format=text", action: InstanceUserdata},
		{name: "user data shouted", target: "/METADATA/Instance/COMPUTE/USERDATA/?FORMAT=text&API-Version=2021-01-01", action: InstanceUserdata, forward: "/metadata/instance/compute/userData?api-version=2021-01-01&format=text"},
		{name: "user data elsewhere", target: "/metadata/instance/userdata?format=text", action: InstanceUserdata, forward: "/metadata/instance/userData?format=text"},
		{name: "below user data", target: "/metadata/instance/compute/userdata/0", action: InstanceUserdata, forward: "/metadata/instance/compute/userData/0"},
		{name: "behind numeric key", target: "/metadata/instance/compute/0/userdata", action: InstanceUserdata, forward: "/metadata/instance/compute/0/userData"},
		{name: "extended section", target: "/metadata/instance/extended/compute/ppsType?format=text", action: InstanceProvisioning},
		{name: "other section", target: "/metadata/instance/secrets", action: Unknown},
		{name: "key that is none", target: "/metadata/instance/compute/user-data", action: Unknown},
		{name: "reprovision data", target: "/metadata/reprovisiondata?api-version=2019-06-01", action: InstanceProvisioning},
		{name: "attested", target: "/metadata/attested/document?api-version=2018-10-01&nonce=1234567890", action: IdentityDocument},
		{name: "attested root", target: "/metadata/attested", action: Unknown},
		{name: "token", target: tokenGet, action: IdentityToken},
		{name: "token as people type it", target: tokenPath + "?resource=https://management.azure.com/&api-version=2018-02-01", action: IdentityToken, forward: tokenGet},
		{name: "token by client id", target: tokenPath + "?api-version=2018-02-01&client_id=00000000-0000-0000-0000-000000000001&resource=r", action: IdentityToken},
		{name: "token by old resource id name", target: tokenPath + "?api-version=2018-02-01&mi_res_id=%2Fsubscriptions%2Fs&resource=r", action: IdentityToken},
		{name: "token with claims", target: tokenPath + "?api-version=2018-02-01&claims=%7B%7D&resource=r", action: IdentityToken},
		{name: "token without version", target: tokenPath + "?resource=r", action: IdentityToken},
		{name: "token unsorted", target: tokenPath + "?resource=r&bypass_cache=true&authority=a&api-version=1", action: IdentityToken, forward: tokenPath + "?api-version=1&authority=a&bypass_cache=true&resource=r"},
		{name: "below token", target: tokenPath + "/x", action: Unknown},
		{name: "identity info", target: "/metadata/identity/info?api-version=2018-02-01", action: IdentityInfo},
		{name: "platform metadata", target: "/metadata/identity/getPlatformMetadata?cred-api-version=2.0", action: IdentityCredential, forward: "/metadata/identity/getplatformmetadata?cred-api-version=2.0"},
		{name: "issue credential", method: "POST", target: "/metadata/identity/issuecredential?cid=c&cred-api-version=2.0&uaid=u", action: IdentityCredential},
		{name: "older credential", method: "POST", target: "/metadata/identity/credential?cred-api-version=1.0", action: IdentityCredential},
		{name: "events", target: eventPost, action: EventsRead},
		{name: "events approve", method: "POST", target: eventPost, action: EventsApprove},
		{name: "load balancer", target: "/metadata/loadbalancer?api-version=2020-10-01&format=json", action: NetworkBalancer},
		{name: "legacy root", target: "/metadata/v1/", action: LegacyRead, forward: "/metadata/v1"},
		{name: "legacy", target: "/Metadata/V1/InstanceInfo", action: LegacyRead, forward: "/metadata/v1/InstanceInfo"},
		{name: "maintenance", target: "/metadata/maintenance", action: Unknown},
		{name: "root", target: "/", action: Unknown},
		{name: "another cloud", target: "/latest/meta-data/iam/security-credentials/", action: Unknown, forward: "/latest/meta-data/iam/security-credentials"},
		{name: "unknown keeps its case", target: "/metadata/New?Some=v&other=w", action: Unknown},
		{name: "empty query", target: "/metadata/versions?", action: VersionsRead, forward: "/metadata/versions"},
		{name: "empty value", target: tokenPath + "?resource=", action: IdentityToken},
		{name: "space as plus", target: tokenPath + "?resource=a+b", action: IdentityToken, forward: tokenPath + "?resource=a%20b"},
		{name: "escaped plus stays", target: tokenPath + "?resource=a%2bb", action: IdentityToken, forward: tokenPath + "?resource=a%2Bb"},
		{name: "needless escapes", target: tokenPath + "?%72esource=%61", action: IdentityToken, forward: tokenPath + "?resource=a"},
		{name: "equals sign in value", target: tokenPath + "?resource=a=b", action: IdentityToken, forward: tokenPath + "?resource=a%3Db"},
		{name: "not ascii", target: tokenPath + "?resource=%c3%a9", action: IdentityToken, forward: tokenPath + "?resource=%C3%A9"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := ask{method: tt.method, target: tt.target}
			if tt.method == "POST" {
				a.lines, a.body = []string{"Content-Length: 2"}, "{}"
			}
			q, f := Classify(Azure, a.request(t))
			if f != nil {
				t.Fatalf("got refusal %v, want %s", f, tt.action)
			}
			want := tt.forward
			if want == "" {
				want = tt.target
			}
			if q.Action != tt.action || q.Target() != want {
				t.Errorf("got %s %s, want %s %s", q.Action, q.Target(), tt.action, want)
			}
			if d := cmp.Diff(tt.covers, q.Covers); d != "" {
				t.Errorf("covers (-want +got):\n%s", d)
			}
			if got, want := q.Family == Identity, strings.HasPrefix(q.Path, "/metadata/identity/"); got != want {
				t.Errorf("identity family: got %v, want %v", got, want)
			}
			a.target = q.Target()
			again, f := Classify(Azure, a.request(t))
			if d := cmp.Diff(q, again); f != nil || d != "" {
				t.Errorf("the target does not classify to the same query: %v\n%s", f, d)
			}
		})
	}
}

func TestAccepted(t *testing.T) {
	const versions = "/metadata/versions"
	tests := []struct {
		name  string
		ask   ask
		hosts []string
	}{
		{"metadata in capitals", ask{target: versions, bare: true, lines: []string{"METADATA: TRUE"}}, nil},
		{"metadata with spaces", ask{target: versions, bare: true, lines: []string{"Metadata: \t true \t"}}, nil},
		{"host with port", ask{target: versions, host: "169.254.169.254:80"}, nil},
		{"ipv6 host", ask{target: versions, host: "[FD00:EC2::254]"}, nil},
		{"ipv6 host with port", ask{target: versions, host: "[fd00:ec2::254]:80"}, nil},
		{"further host", ask{target: versions, host: "10.0.0.5:80"}, []string{"", "10.0.0.5"}},
		{"further host with its port", ask{target: versions, host: "127.0.0.1:41234"}, []string{"127.0.0.1:41234"}},
		{"keep alive", ask{target: versions, lines: []string{"Connection: Keep-Alive"}}, nil},
		{"close", ask{target: versions, lines: []string{"Connection: close"}}, nil},
		{"http 1.0", ask{target: versions, proto: "HTTP/1.0"}, nil},
		{"length zero on get", ask{target: versions, lines: []string{"Content-Length: 0"}}, nil},
		{"empty post", ask{method: "POST", target: eventPost, lines: []string{"Content-Length: 0"}}, nil},
		{"largest post", ask{method: "POST", target: eventPost, lines: []string{"Content-Length: 65536"}}, nil},
		{"sixteen parameters", ask{target: "/metadata/new?a=&b=&c=&d=&e=&f=&g=&h=&i=&j=&k=&l=&m=&n=&o=&p="}, nil},
		{"longest target", ask{target: "/metadata/new?a=" + strings.Repeat("0", maxTarget-len("/metadata/new?a="))}, nil},
		{"header that looks forwarded", ask{target: versions, lines: []string{"X-Forward: 1", "X-Ms-Azure: 1"}}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, f := Classify(Azure, tt.ask.request(t), tt.hosts...); f != nil {
				t.Errorf("got refusal %v", f)
			}
		})
	}
}

// What outranks what, when a request has more than one fault.
func TestOrderOfChecks(t *testing.T) {
	tests := []struct {
		name, reason string
		ask          ask
	}{
		{"forwarding before metadata", "forwarding_header", ask{target: tokenPath, bare: true, lines: []string{"Via: 1.1 x"}}},
		{"forwarding before host", "forwarding_header", ask{target: tokenPath, host: "x.test", lines: []string{"Via: 1.1 x"}}},
		{"forwarding before path", "forwarding_header", ask{target: "/metadata/%2e", lines: []string{"Via: 1.1 x"}}},
		{"metadata before query", "metadata_header_missing", ask{target: tokenPath + "?a&a", bare: true}},
		{"metadata before body", "metadata_header_missing", ask{target: tokenPath, bare: true, lines: []string{"Content-Length: 1"}, body: "."}},
		{"method before metadata", "method", ask{method: "PUT", target: tokenPath, bare: true}},
		{"header-less probe", "metadata_header_missing", ask{target: tokenPath, bare: true}},
		{"header-less probe with query", "metadata_header_missing", ask{target: tokenGet, bare: true}},
		{"header-less probe for certificates", "metadata_header_missing", ask{method: "POST", bare: true,
			target: "/metadata/identity/credential?cred-api-version=1.0", lines: []string{"Content-Length: 1"}, body: "."}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q, f := Classify(Azure, tt.ask.request(t))
			if f == nil || f.Reason != tt.reason {
				t.Fatalf("got %v, want %s", f, tt.reason)
			}
			if f.Family != Identity && strings.HasPrefix(tt.ask.target, tokenPath) {
				t.Errorf("got the general family on an identity path")
			}
			if f.Reason == "metadata_header_missing" && (q.Action == "" || q.Path == "") {
				t.Errorf("got query %+v, want what was understood", q)
			}
		})
	}
}

func TestNotReadByNetHTTP(t *testing.T) {
	base := func() *http.Request { return ask{target: "/metadata/versions"}.request(t) }
	tests := []struct {
		name, reason string
		change       func(*http.Request)
	}{
		{"zero request", "protocol", func(r *http.Request) { *r = http.Request{} }},
		{"no target", "target_form", func(r *http.Request) { r.RequestURI = "" }},
		{"relative target", "target_form", func(r *http.Request) { r.RequestURI = "metadata/versions" }},
		{"no host", "host", func(r *http.Request) { r.Host = "" }},
		{"control character in path", "path", func(r *http.Request) { r.RequestURI = "/metadata/\x01" }},
		{"delete in path", "path", func(r *http.Request) { r.RequestURI = "/metadata/\x7f" }},
		{"space in path", "path", func(r *http.Request) { r.RequestURI = "/metadata/versions x" }},
		{"header of odd spelling", "forwarding_header", func(r *http.Request) { r.Header["x-FORWARDED-for"] = nil }},
		{"metadata in two spellings", "metadata_header_invalid", func(r *http.Request) { r.Header["metadata"] = []string{"true"} }},
		{"transfer encoding in header", "body", func(r *http.Request) { r.Header["Transfer-Encoding"] = []string{"gzip"} }},
		{"unknown length", "body", func(r *http.Request) { r.ContentLength = -1 }},
		{"url says otherwise", "", func(r *http.Request) { r.URL.Path = "/metadata/identity/oauth2/token" }},
		{"no url", "", func(r *http.Request) { r.URL = nil }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := base()
			tt.change(r)
			q, f := Classify(Azure, r)
			switch {
			case tt.reason == "" && (f != nil || q.Action != VersionsRead):
				t.Errorf("got %s, %v, want %s", q.Action, f, VersionsRead)
			case tt.reason != "" && (f == nil || f.Reason != tt.reason):
				t.Errorf("got %v, want %s", f, tt.reason)
			}
		})
	}
	for _, host := range []string{"", ":80"} {
		r := base()
		r.Host = host
		if _, f := Classify(Azure, r, ""); f == nil || f.Reason != "host" {
			t.Errorf("host %q and an empty further host: got %v, want a refusal", host, f)
		}
	}
	if _, f := Classify("elsewhere", base()); f == nil || f.Reason != "cloud" {
		t.Errorf("another cloud: got %v, want a refusal", f)
	}
}

func BenchmarkClassify(b *testing.B) {
	sdk := []string{"User-Agent: azsdk-go-azidentity/v1.15.0", "X-Client-Sku: MSAL.Go", "X-Client-Ver: 1.10.1",
		"X-Ms-Client-Request-Id: 00000000-0000-0000-0000-000000000001", "Accept-Encoding: gzip"}
	for name, target := range map[string]string{
		"token":    tokenGet,
		"instance": "/metadata/instance?api-version=2021-02-01",
		"leaf":     "/metadata/instance/network/interface/0/macAddress?api-version=2021-02-01&format=text",
	} {
		b.Run(name, func(b *testing.B) {
			r := ask{target: target, lines: sdk}.request(b)
			b.ReportAllocs()
			for b.Loop() {
				if _, f := Classify(Azure, r); f != nil {
					b.Fatal(f)
				}
			}
		})
	}
}
