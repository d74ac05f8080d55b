package main

import (
	"fmt"
	"slices"
	"strings"

	"imdsgate/internal/imds"
	"imdsgate/internal/sim"
)

// conformanceCase is one request that the service documents an answer to, or
// that has one all the same.
type conformanceCase struct {
	name    string
	method  string // empty: GET
	target  string
	proto   string   // empty: HTTP/1.1
	host    string   // empty: the service's address
	headers []string // as on the wire; nil: Metadata: true
	body    string   // {event} stands for the id of an event that there is
	vm      string   // of conformanceVMs; empty: the default one
	faults  []string // of the simulator, as in simulate --fault

	// fresh says that the service issues a token of its own for each call.
	fresh bool

	// why is empty where the gate's answer must be the service's own. Else it
	// is the reason for which the gate means to answer otherwise.
	why string
}

// conformanceVMs are what instance files say of the VMs that cases need.
var conformanceVMs = map[string]string{
	"": "",
	"several": "identity: {system: null, resources: [https://management.azure.com/]}\n" +
		"instance: {compute: {customData: Y3VzdG9t, userData: dXNlcg==}}\n" +
		"reprovisiondata: <Environment/>\nversions: [2018-02-01, 2019-03-11, 2019-06-01]\n",
	"nobody": "identity: {system: null, userAssigned: []}\nloadbalancer: null\n",
}

const (
	v21      = "?api-version=2021-02-01"
	arm      = "https://management.azure.com/"
	tokenArm = tokenTarget + arm
	plainID  = "c1c10000-0000-0000-0000-000000000001"
	resID    = "/subscriptions/00000000-0000-0000-0000-000000000001/resourceGroups/rg-sim/providers/Microsoft.ManagedIdentity/userAssignedIdentities/web"
	events   = "/metadata/scheduledevents?api-version="
	attested = "/metadata/attested/document?api-version=2020-09-01"
	balancer = "/metadata/loadbalancer?api-version=2020-10-01"
	instance = "/metadata/instance"
)

// documentedCases are what the service documents, and has, for its endpoints.
func documentedCases() []conformanceCase {
	cases := []conformanceCase{
		{name: "versions", target: "/metadata/versions"},
		{name: "versions with parameters", target: "/metadata/versions?api-version=2021-02-01&format=json"},
		{name: "versions with a slash", target: "/metadata/versions/"},
		{name: "versions, no header", target: "/metadata/versions", headers: []string{}, why: whyProbe},
		{name: "bare metadata", target: "/metadata"},
		{name: "bare metadata with a slash", target: "/metadata/" + v21 + "&format=json"},

		{name: "instance, no header", target: instance + v21, headers: []string{}, why: whyProbe},
		{name: "instance, empty header", target: instance + v21, headers: []string{"Metadata:"}, why: whyProbe},
		{name: "instance, header 1", target: instance + v21, headers: []string{"Metadata: 1"}, why: whyProbe},
		{name: "instance, header twice", target: instance + v21, headers: []string{"Metadata: true", "Metadata: true"}, why: whyProbe},
		{name: "instance, header True", target: instance + v21, headers: []string{"Metadata: True"}},
		{name: "instance, header with spaces, in lower case", target: instance + v21, headers: []string{"metadata:   true  "}},
		{name: "instance, no version", target: instance},
		{name: "instance, no such version", target: instance + "?api-version=2022-01-01"},
		{name: "instance, version latest", target: instance + "?api-version=latest"},
		{name: "instance, version is too new for the VM", target: instance + "?api-version=2021-08-01", vm: "several"},
		{name: "instance, old versions only", target: instance + "?api-version=2019-06-01", vm: "several"},
		{name: "instance with a slash", target: instance + "/" + v21},
		{name: "instance as json", target: instance + v21 + "&format=json"},
		{name: "instance as text", target: instance + v21 + "&format=text"},
		{name: "instance as xml", target: instance + v21 + "&format=xml"},
		{name: "instance, extended", target: instance + "?api-version=2021-08-01&extended=true"},
		{name: "instance, extended by an old version", target: instance + "?api-version=2019-06-01&extended=true"},
		{name: "instance, HTTP/1.0", target: instance + v21, proto: "HTTP/1.0"},
		{name: "instance, client headers", target: instance + v21, headers: []string{"Metadata: true", "User-Agent: x/1", "Accept: */*", "x-ms-client-request-id: 7d0c", "Accept-Encoding: gzip"}},
		{name: "instance, Host with port", target: instance + v21, host: "169.254.169.254:80"},
		{name: "HEAD of instance", method: "HEAD", target: instance + v21},
		{name: "HEAD of token", method: "HEAD", target: tokenArm},
		{name: "compute", target: instance + "/compute" + v21},
		{name: "compute as text", target: instance + "/compute" + v21 + "&format=text"},
		{name: "name", target: instance + "/compute/name" + v21 + "&format=text"},
		{name: "name without format", target: instance + "/compute/name" + v21},
		{name: "name as json", target: instance + "/compute/name" + v21 + "&format=json"},
		{name: "name with a slash", target: instance + "/compute/name/" + v21 + "&format=text"},
		{name: "tag by index", target: instance + "/compute/tagsList/0/name" + v21 + "&format=text"},
		{name: "tags", target: instance + "/compute/tagsList" + v21},
		{name: "tag past the end", target: instance + "/compute/tagsList/9" + v21},
		{name: "no such key", target: instance + "/compute/nothing" + v21},
		{name: "key of a newer version", target: instance + "/compute/userData?api-version=2020-12-01&format=text"},
		{name: "below a leaf", target: instance + "/compute/vmId/0" + v21 + "&format=text", why: whyUnknown},
		{name: "network", target: instance + "/network" + v21},
		{name: "interfaces as text", target: instance + "/network/interface" + v21 + "&format=text"},
		{name: "private address", target: instance + "/network/interface/0/ipv4/ipAddress/0/privateIpAddress" + v21 + "&format=text"},
		{name: "public address", target: instance + "/network/interface/0/ipv4/ipAddress/0/publicIpAddress" + v21 + "&format=text"},
		{name: "MAC address", target: instance + "/network/interface/0/macAddress" + v21 + "&format=text"},
		{name: "user data", target: instance + "/compute/userData" + v21 + "&format=text"},
		{name: "custom data", target: instance + "/compute/customData?api-version=2019-06-01&format=text", vm: "several"},
		{name: "extended as a path", target: instance + "/extended/compute" + v21},
		{name: "reprovision data that is not there", target: "/metadata/reprovisiondata?api-version=2019-06-01"},
		{name: "reprovision data", target: "/metadata/reprovisiondata?api-version=2019-06-01", vm: "several"},

		{name: "attested document", target: attested},
		{name: "attested document, nonce", target: attested + "&nonce=1234567890"},
		{name: "attested document, letters for a nonce", target: attested + "&nonce=a1B2c3&format=json"},
		{name: "attested document, bad nonce", target: attested + "&nonce=a-b"},
		{name: "attested document, old version", target: "/metadata/attested/document?api-version=2018-04-02"},
		{name: "attested document, no header", target: attested, headers: []string{}, why: whyProbe},

		{name: "token", target: tokenArm},
		{name: "token, no slash at the end", target: strings.TrimSuffix(tokenArm, "/")},
		{name: "token, escaped resource", target: tokenTarget + "https%3A%2F%2Fvault.azure.net"},
		{name: "token, a plus in the resource", target: tokenTarget + "https://a.example/b+c"},
		{name: "token by client_id", target: tokenArm + "&client_id=" + plainID},
		{name: "token by object_id", target: tokenArm + "&object_id=c1c10000-0000-0000-0000-0000000000f2"},
		{name: "token by msi_res_id", target: tokenArm + "&msi_res_id=" + resID},
		{name: "token by mi_res_id", target: tokenArm + "&mi_res_id=" + resID},
		{name: "token, authority", target: tokenTarget + "https://graph.example&authority=https://login.example/x"},
		{name: "token, bypass_cache", target: tokenTarget + "https://bypass.example&bypass_cache=true"},
		{name: "token, claims", target: tokenTarget + "https://claims.example&claims=%7B%7D"},
		{name: "token, no such identity", target: tokenArm + "&client_id=00000000-0000-0000-0000-00000000dead"},
		{name: "token, no resource", target: "/metadata/identity/oauth2/token?api-version=2018-02-01"},
		{name: "token, empty resource", target: tokenTarget},
		{name: "token, old version", target: "/metadata/identity/oauth2/token?api-version=2017-12-01&resource=" + arm},
		{name: "token, no version", target: "/metadata/identity/oauth2/token?resource=" + arm},
		{name: "token, several identities and none named", target: tokenArm, vm: "several"},
		{name: "token, one of several identities", target: tokenArm + "&client_id=" + plainID, vm: "several"},
		{name: "token, unknown resource", target: tokenTarget + "https://unknown.example&client_id=" + plainID, vm: "several"},
		{name: "token, no identity", target: tokenArm, vm: "nobody"},
		{name: "probe of the token path", target: "/metadata/identity/oauth2/token", headers: []string{}, why: whyProbe},
		{name: "probe with a query", target: tokenArm, headers: []string{}, why: whyProbe},
		{name: "identity info", target: "/metadata/identity/info?api-version=2018-02-01"},
		{name: "identity info, no identity", target: "/metadata/identity/info?api-version=2018-02-01", vm: "nobody"},
		{name: "identity info, no header", target: "/metadata/identity/info?api-version=2018-02-01", headers: []string{}, why: whyProbe},
		{name: "platform metadata", target: "/metadata/identity/getplatformmetadata?cred-api-version=2.0&client_id=" + plainID},
		{name: "issue of a credential", method: "POST", target: "/metadata/identity/issuecredential?cred-api-version=2.0", body: `{"csr":""}`},
		{name: "issue of a credential, no header", method: "POST", target: "/metadata/identity/issuecredential?cred-api-version=2.0", headers: []string{}, why: whyProbe},
		{name: "credential", method: "POST", target: "/metadata/identity/credential?cred-api-version=1.0", body: "{}"},

		{name: "events, version of another endpoint", target: events + "2021-02-01"},
		{name: "events, version latest", target: events + "latest"},
		{name: "events, no header", target: events + "2020-07-01", headers: []string{}, why: whyProbe},
		{name: "approval", method: "POST", target: events + "2020-07-01", body: `{"StartRequests":[{"EventId":"{event}"}]}`},
		{name: "approval of nothing", method: "POST", target: events + "2020-07-01", body: `{"StartRequests":[{"EventId":"nothing"}]}`},
		{name: "approval, no JSON", method: "POST", target: events + "2020-07-01", body: `x`},
		{name: "approval, no header", method: "POST", target: events + "2020-07-01", headers: []string{}, body: `{}`, why: whyProbe},

		{name: "load balancer", target: balancer},
		{name: "load balancer as json", target: balancer + "&format=json"},
		{name: "no load balancer", target: balancer, vm: "nobody"},
		{name: "load balancer, old version", target: "/metadata/loadbalancer?api-version=2020-09-01"},
		{name: "path of before the header", target: "/metadata/v1/InstanceInfo"},
		{name: "root of before the header", target: "/metadata/v1"},
	}
	for _, v := range sim.DefaultVM().Versions {
		cases = append(cases, conformanceCase{name: "instance of " + v, target: instance + "?api-version=" + v})
	}
	for _, v := range []string{"2017-03-01", "2017-08-01", "2017-11-01", "2019-01-01", "2019-04-01", "2019-08-01", "2020-07-01"} {
		cases = append(cases, conformanceCase{name: "events of " + v, target: events + v})
	}
	for _, at := range []string{"GET getplatformmetadata?cred-api-version=2.0", "POST issuecredential?cred-api-version=2.0", "POST credential?cred-api-version=1.0"} {
		for _, p := range []string{"api-version=2018-02-01", "bypass_cache=true", "cid=1", "uaid=1", "client_id=" + plainID, "object_id=" + plainID, "msi_res_id=" + resID, "mi_res_id=" + resID} {
			method, path, _ := strings.Cut(at, " ")
			name, _, _ := strings.Cut(p, "=")
			cases = append(cases, conformanceCase{name: path + ", " + name, method: method, target: "/metadata/identity/" + path + "&" + p})
		}
	}
	return slices.Concat(cases, troubleCases(), unwantedCases())
}

// troubleCases are those in which the service answers that it cannot. Each asks
// for something that nothing is kept of.
func troubleCases() (cases []conformanceCase) {
	for i, fault := range []string{"down", "status=403", "status=404", "status=410", "status=429", "status=500", "status=503", "gone=1m"} {
		cases = append(cases,
			conformanceCase{name: "token, " + fault, target: fmt.Sprintf("%shttps://trouble%d.example", tokenTarget, i), faults: []string{fault}},
			conformanceCase{name: "instance, " + fault, target: instance + "/compute/plan?api-version=" + sim.DefaultVM().Versions[10+i], faults: []string{fault}},
			conformanceCase{name: "attested document, " + fault, target: attested, faults: []string{fault}})
	}
	return append(cases,
		conformanceCase{name: "instance, early in the boot", target: instance + "?api-version=2025-04-07&format=json", faults: []string{"partial"}},
		conformanceCase{name: "instance, extended, early in the boot", target: instance + "?api-version=2025-04-07&extended=true", faults: []string{"partial"}},
		conformanceCase{name: "attested document, cut in half", target: attested, faults: []string{"cut"}},
		conformanceCase{name: "token, slow", target: tokenTarget + "https://slow.example", faults: []string{"latency=50ms"}},
		conformanceCase{name: "token with a short life", target: tokenTarget + "https://short.example", faults: []string{"token-ttl=60s"}},
		conformanceCase{name: "token that is expired", target: tokenTarget + "https://expired.example", faults: []string{"token-ttl=-60s"}, fresh: true})
}

// request is the case as it goes over the wire.
func (c *conformanceCase) request(event string) string {
	or := func(s, standard string) string {
		if s == "" {
			return standard
		}
		return s
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s\r\nHost: %s\r\n", or(c.method, "GET"), c.target, or(c.proto, "HTTP/1.1"), or(c.host, "169.254.169.254"))
	headers := c.headers
	if headers == nil {
		headers = []string{"Metadata: true"}
	}
	for _, h := range headers {
		b.WriteString(h + "\r\n")
	}
	body := strings.ReplaceAll(c.body, "{event}", event)
	if (body != "" || c.method == "POST") && !slices.ContainsFunc(headers, func(h string) bool {
		return strings.HasPrefix(h, "Transfer-Encoding") || h == "X-No-Length: 1"
	}) {
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(body))
	}
	b.WriteString("\r\n" + body)
	return b.String()
}

// endpointsMissed lists what of the table of endpoints no case asks for: paths,
// methods and parameters.
func endpointsMissed(cases []conformanceCase) (missed []string) {
	asked := make(map[string]bool)
	for _, c := range cases {
		path, query, _ := strings.Cut(c.target, "?")
		path = strings.TrimSuffix(path, "/")
		at := "GET " + path
		if c.method != "" {
			at = c.method + " " + path
		}
		asked[at] = true
		for pair := range strings.SplitSeq(query, "&") {
			name, _, _ := strings.Cut(pair, "=")
			asked[path+"?"+name] = true
		}
	}
	for _, e := range imds.Endpoints(imds.Azure) {
		for _, m := range e.Methods {
			if !asked[m+" "+e.Path] {
				missed = append(missed, m+" "+e.Path)
			}
		}
		for _, p := range e.Params {
			if !asked[e.Path+"?"+p] {
				missed = append(missed, e.Path+"?"+p)
			}
		}
	}
	return missed
}
