package sim

import (
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The bodies on record, byte for byte (docs/protocol-azure.md §1.4), and ours where
// the service's are not known.
func TestRefusals(t *testing.T) {
	const (
		instanceURL = "/metadata/instance?api-version=2021-02-01"
		tokenURL    = "/metadata/identity/oauth2/token?api-version=2018-02-01"
		resource    = "&resource=https://management.azure.com/"
		noHeader    = `{ "error": "Bad request: . Required metadata header not specified" }`
		noHeaderID  = `{"error":"invalid_request","error_description":"Required metadata header not specified"}`
		version     = `{"error":"Bad request. api-version is invalid or was not specified in the request. For more information refer to aka.ms/azureimds","newest-versions":["2025-04-07","2024-07-17","2024-03-15"]}`
		notFoundID  = `{"error":"not_found","error_description":"Not found"}`
		notFound    = `{ "error": "Not found" }`
		noIdentity  = `{"error":"invalid_request","error_description":"Identity not found"}`
		several     = `{"error":"invalid_request","error_description":"Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request"}`
		duplicate   = `{ "error": "Bad request: . Duplicate query parameter" }`
		forwarded   = `{ "error": "Bad request: . X-Forwarded-For header is not allowed" }`
	)
	header := []string{"Metadata", "true"}
	rows := []struct {
		name, method, target string
		vm                   string
		headers              []string
		status               int
		body                 string
	}{
		{name: "no header on instance", target: instanceURL, status: 400, body: noHeader},
		{name: "no header on versions", target: "/metadata/versions", status: 400, body: noHeader},
		{name: "no header on an unknown path", target: "/metadata/nothing", status: 400, body: noHeader},
		{name: "header with another value", target: instanceURL, headers: []string{"Metadata", "1"}, status: 400, body: noHeader},
		{name: "empty header", target: instanceURL, headers: []string{"Metadata", ""}, status: 400, body: noHeader},
		{name: "header twice", target: instanceURL, headers: []string{"Metadata", "true", "Metadata", "true"}, status: 400, body: noHeader},
		{name: "probe of the token path", target: tokenPath, status: 400, body: noHeaderID},
		{name: "probe with a query", target: tokenURL + resource, status: 400, body: noHeaderID},
		{name: "no header on issuecredential", method: "POST", target: "/metadata/identity/issuecredential?cred-api-version=2.0", status: 400, body: noHeaderID},
		{name: "spoofed_forwarded_for", target: instanceURL, headers: append(header, "X-Forwarded-For", "10.0.0.1"), status: 400, body: forwarded},
		{name: "spoofed_forwarded_for_empty", target: instanceURL, headers: append(header, "x-forwarded-for", ""), status: 400, body: forwarded},
		{name: "spoofed_forwarded_for_on_token", target: tokenURL + resource, headers: append(header, "X-Forwarded-For", "10.0.0.1"), status: 400,
			body: `{"error":"invalid_request","error_description":"X-Forwarded-For header is not allowed"}`},
		{name: "query_name_twice", target: instanceURL + "&format=text&format=json", headers: header, status: 400, body: duplicate},
		{name: "query_name_twice_on_token", target: tokenURL + resource + resource, headers: header, status: 400,
			body: `{"error":"invalid_request","error_description":"Duplicate query parameter"}`},
		{name: "query_with_semicolon", target: instanceURL + ";format=text", headers: header, status: 400, body: `{ "error": "Bad request: . Query string is invalid" }`},
		{name: "query_with_bad_escape", target: instanceURL + "&x=%zz", headers: header, status: 400, body: `{ "error": "Bad request: . Query string is invalid" }`},

		{name: "no api-version", target: "/metadata/instance", headers: header, status: 400, body: version},
		{name: "unlisted api-version", target: "/metadata/instance?api-version=2022-01-01", headers: header, status: 400, body: version},
		{name: "api-version before the endpoint's first", target: "/metadata/instance?api-version=2017-03-01", headers: header, status: 400, body: version},
		{name: "old api-version on attested", target: "/metadata/attested/document?api-version=2018-04-02", headers: header, status: 400, body: version},
		{name: "old api-version on token", target: "/metadata/identity/oauth2/token?api-version=2017-12-01" + resource, headers: header, status: 400, body: version},
		{name: "instance version on scheduled events", target: "/metadata/scheduledevents?api-version=2021-02-01", headers: header, status: 400,
			body: strings.Replace(version, `"2025-04-07","2024-07-17","2024-03-15"`, `"2020-07-01","2019-08-01","2019-04-01"`, 1)},
		{name: "bare metadata", target: "/metadata", headers: header, status: 400, body: version},
		{name: "bare metadata with slash", target: "/metadata/?api-version=2021-02-01", headers: header, status: 400, body: version},
		{name: "VM with old versions only", vm: "versions: [2019-03-11, 2019-06-01]", target: "/metadata/instance?api-version=2021-08-01", headers: header, status: 400,
			body: strings.Replace(version, `"2025-04-07","2024-07-17","2024-03-15"`, `"2019-06-01","2019-03-11"`, 1)},

		{name: "leaf without format", target: "/metadata/instance/compute/vmId?api-version=2021-02-01", headers: header, status: 400,
			body: `{ "error": "Bad request: . Leaf nodes need format=text" }`},
		{name: "leaf as json", target: "/metadata/instance/compute/vmId?api-version=2021-02-01&format=json", headers: header, status: 400,
			body: `{ "error": "Bad request: . Leaf nodes need format=text" }`},
		{name: "unknown format", target: instanceURL + "&format=xml", headers: header, status: 400, body: `{ "error": "Bad request: . Format is invalid" }`},
		{name: "unknown element", target: "/metadata/instance/compute/nothing?api-version=2021-02-01", headers: header, status: 404, body: notFound},
		{name: "element of a newer version", target: "/metadata/instance/compute/userData?api-version=2020-12-01&format=text", headers: header, status: 404, body: notFound},
		{name: "key in another letter case", target: "/metadata/instance/compute/vmid?api-version=2021-02-01&format=text", headers: header, status: 404, body: notFound},
		{name: "index past the end", target: "/metadata/instance/network/interface/1?api-version=2021-02-01", headers: header, status: 404, body: notFound},
		{name: "index with a sign", target: "/metadata/instance/network/interface/+0?api-version=2021-02-01", headers: header, status: 404, body: notFound},
		{name: "negative index", target: "/metadata/instance/network/interface/-1?api-version=2021-02-01", headers: header, status: 404, body: notFound},
		{name: "below a leaf", target: "/metadata/instance/compute/vmId/0?api-version=2021-02-01&format=text", headers: header, status: 404, body: notFound},
		{name: "two slashes", target: "/metadata/instance//compute?api-version=2021-02-01", headers: header, status: 404, body: notFound},
		{name: "longer name", target: "/metadata/instances?api-version=2021-02-01", headers: header, status: 404, body: notFound},
		{name: "root", target: "/", headers: header, status: 404, body: notFound},
		{name: "legacy without header", target: "/metadata/v1/InstanceInfo", status: 404, body: notFound},
		{name: "legacy with header", target: "/metadata/v1/maintenance", headers: header, status: 404, body: notFound},
		{name: "maintenance", target: "/metadata/maintenance", headers: header, status: 404, body: notFound},
		{name: "no reprovisioning data", target: "/metadata/reprovisiondata?api-version=2019-06-01", headers: header, status: 404, body: notFound},
		{name: "no load balancer", vm: "loadbalancer: null", target: "/metadata/loadbalancer?api-version=2020-10-01", headers: header, status: 404,
			body: `{"error":"No load balancer metadata is found. Check if your virtual machine is using any nonbasic SKU load balancer and retry later."}`},
		{name: "getplatformmetadata", target: "/metadata/identity/getplatformmetadata?cred-api-version=2.0", headers: header, status: 404, body: notFoundID},
		{name: "issuecredential", method: "POST", target: "/metadata/identity/issuecredential?cred-api-version=2.0", headers: header, status: 404, body: notFoundID},
		{name: "credential", method: "POST", target: "/metadata/identity/credential?cred-api-version=1.0", headers: header, status: 404, body: notFoundID},

		{name: "verb on instance", method: "PUT", target: instanceURL, headers: header, status: 405, body: `{"error":"Method not allowed"}`},
		{name: "verb on token", method: "POST", target: tokenURL + resource, headers: header, status: 405,
			body: `{"error":"method_not_allowed","error_description":"Method not allowed"}`},
		{name: "verb on scheduled events", method: "DELETE", target: "/metadata/scheduledevents?api-version=2020-07-01", headers: header, status: 405, body: `{"error":"Method not allowed"}`},
		{name: "verb without header", method: "PUT", target: instanceURL, status: 400, body: noHeader},

		{name: "nonce too long", target: "/metadata/attested/document?api-version=2021-02-01&nonce=" + strings.Repeat("1", 33), headers: header, status: 400,
			body: `{ "error": "Bad request: . Nonce is invalid" }`},
		{name: "nonce with a quote", target: "/metadata/attested/document?api-version=2021-02-01&nonce=%22", headers: header, status: 400,
			body: `{ "error": "Bad request: . Nonce is invalid" }`},

		{name: "no resource", target: tokenURL, headers: header, status: 400,
			body: `{"error":"invalid_request","error_description":"Required query variable 'resource' is missing"}`},
		{name: "resource is not an App ID URI", target: tokenURL + "&resource=nothing", headers: header, status: 400,
			body: `{"error":"invalid_resource","error_description":"AADSTS50001: The application named nothing was not found in the tenant named 00000000-0000-0000-0000-00000000000a."}`},
		{name: "resource off the list", vm: "identity: {resources: [https://vault.azure.net]}", target: tokenURL + "&resource=https://x", headers: header, status: 400,
			body: `{"error":"invalid_resource","error_description":"AADSTS50001: The application named https://x was not found in the tenant named 00000000-0000-0000-0000-00000000000a."}`},
		{name: "unknown client_id", target: tokenURL + resource + "&client_id=c1c10000-0000-0000-0000-00000000000f", headers: header, status: 400, body: noIdentity},
		{name: "object id as client_id", target: tokenURL + resource + "&client_id=c1c10000-0000-0000-0000-0000000000f1", headers: header, status: 400, body: noIdentity},
		{name: "no identity", vm: "identity: {system: null, userAssigned: []}", target: tokenURL + resource, headers: header, status: 400, body: noIdentity},
		{name: "no identity and info", vm: "identity: null", target: "/metadata/identity/info?api-version=2018-02-01", headers: header, status: 400, body: noIdentity},
		{name: "several user identities, none chosen", vm: "identity: {system: null}", target: tokenURL + resource, headers: header, status: 400, body: several},
		{name: "two selectors", target: tokenURL + resource + "&client_id=a&msi_res_id=b", headers: header, status: 400,
			body: `{"error":"invalid_request","error_description":"Only one of client_id, object_id and msi_res_id may be specified"}`},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			b := newBench(t, Config{VM: vmWith(t, row.vm)})
			if row.method == "" {
				row.method = "GET"
			}
			a := b.do(b.Handler(), row.method, row.target, "", row.headers...)
			if a.Status != row.status || a.Body != row.body {
				t.Errorf("%s %s\n got %d %s\nwant %d %s", row.method, row.target, a.Status, a.Body, row.status, row.body)
			}
			if got := a.Header.Get("Content-Type"); got != "application/json; charset=utf-8" {
				t.Errorf("got Content-Type %q", got)
			}
			if got := a.Header.Get("Server"); !strings.Contains(got, "IMDS") {
				t.Errorf("got Server %q, want IMDS in it", got)
			}
		})
	}
}

// The byte counts that captures of the live service give.
func TestRefusalLengths(t *testing.T) {
	b := newBench(t, Config{VM: vmWith(t, "identity: {system: null}")})
	const token = tokenPath + "?api-version=2018-02-01&resource=https://vault.azure.net"
	got := []string{
		b.do(b.Handler(), "GET", tokenPath, "").Header.Get("Content-Length"),
		b.get(token + "&client_id=x").Header.Get("Content-Length"),
		b.get(token).Header.Get("Content-Length"),
	}
	if diff := cmp.Diff([]string{"88", "68", "168"}, got); diff != "" {
		t.Errorf("Content-Length (-want +got):\n%s", diff)
	}
}

func TestHeaderIsAcceptedAsTheServiceDoes(t *testing.T) {
	b := newBench(t, Config{})
	for _, value := range []string{"true", "True", "TRUE", "True ", " true"} {
		if a := b.do(b.Handler(), "GET", "/metadata/versions", "", "Metadata", value); a.Status != http.StatusOK {
			t.Errorf("Metadata: %q: got %d %s, want 200", value, a.Status, a.Body)
		}
	}
}

func TestMethodNotAllowedNamesTheMethods(t *testing.T) {
	b := newBench(t, Config{})
	a := b.do(b.Handler(), "PATCH", "/metadata/scheduledevents?api-version=2020-07-01", "", "Metadata", "true")
	if got := a.Header.Get("Allow"); got != "GET, POST" {
		t.Errorf("got Allow %q, want %q", got, "GET, POST")
	}
}

// docs/protocol-azure.md §1.1: the host's front, not IMDS, answers a HEAD.
func TestHeadIsAnsweredByTheFront(t *testing.T) {
	b := newBench(t, Config{})
	a := b.do(b.Handler(), "HEAD", "/metadata/instance?api-version=2021-02-01", "", "Metadata", "true")
	got := []string{a.Header.Get("Server"), a.Header.Get("Content-Type"), a.Header.Get("Content-Length")}
	if diff := cmp.Diff([]string{"Microsoft-IIS/10.0", "text/xml; charset=utf-8", "323"}, got); diff != "" || a.Status != 400 {
		t.Errorf("status %d, headers (-want +got):\n%s", a.Status, diff)
	}
}

func TestAnyCase(t *testing.T) {
	b := newBench(t, Config{AnyCase: true})
	a := b.get("/Metadata/Instance/Compute/VMID?API-Version=2021-02-01&Format=text")
	if a.Status != 200 || a.Body != "5f0d5b1e-7c1a-4a0e-9a53-000000000001" {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
	if a := b.get("/metadata/instance?format=text&Format=json&api-version=2021-02-01"); a.Status != 400 {
		t.Errorf("one name in two letter cases: got %d, want 400", a.Status)
	}
	if a := b.get("/metadata/IDENTITY/nothing"); a.Status != 404 || !strings.Contains(a.Body, "not_found") {
		t.Errorf("got %d %s, want the identity family's 404", a.Status, a.Body)
	}
}
