package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/imds"
)

// The reasons for which the gate means to answer otherwise than the service.
const (
	whyRelay     = "a header of a relay marks a request that somebody else has made; the service's body for it is not published"
	whyTwice     = "two parsers could read it differently; the service's body for it is not published"
	whyPlain     = "what two parsers could read differently is refused, not repaired"
	whyUnknown   = "what nobody has documented cannot be decided on"
	whyMethod    = "the gate's `Allow` names HEAD, as HEAD goes with GET; the service's body is not published"
	whyCase      = "policy must match without letter case, so what goes out is the documented spelling; whether the service minds letter case is not known"
	whySelector  = "which identity is meant is not documented, so policy cannot decide"
	whyHeader    = "the header is demanded everywhere, also where the service once did without"
	whyHost      = "another name for the address is how a web page gets to it (DNS rebinding)"
	whyFraming   = "more than the protocol needs, and a way to smuggle a request"
	whyProbe     = "the gate answers by itself, at once and at no cost: status and body are the service's, `Server` and `x-ms-request-id` are missing"
	whyNoAnswer  = "there is no answer to hand on; 503 is what clients try again after"
	whyHalf      = "half an answer is none"
	withMetadata = "Metadata: true"
)

// unwantedCases are requests that the gate means to answer otherwise.
func unwantedCases() []conformanceCase {
	with := func(more ...string) []string { return append([]string{withMetadata}, more...) }
	return []conformanceCase{
		{name: "X-Forwarded-For", target: instance + v21, headers: with("X-Forwarded-For: 10.0.0.1"), why: whyRelay},
		{name: "X-Forwarded-For on token", target: tokenArm, headers: with("X-Forwarded-For: 10.0.0.1"), why: whyRelay},
		{name: "Forwarded", target: instance + v21, headers: with("Forwarded: for=10.0.0.1"), why: whyRelay},
		{name: "Via", target: tokenArm, headers: with("Via: 1.1 x"), why: whyRelay},
		{name: "claims of the Guest Proxy Agent", target: instance + v21, headers: with(`x-ms-azure-host-claims: {"isRoot":"true"}`), why: whyRelay},
		{name: "parameter twice", target: instance + v21 + "&format=json&format=json", why: whyTwice},
		{name: "parameter twice on token", target: tokenArm + "&resource=" + arm, why: whyTwice},
		{name: "parameter twice, in two letter cases", target: tokenArm + "&Resource=" + arm, why: whyTwice},
		{name: "semicolon in the query", target: instance + v21 + ";format=text", why: whyPlain},
		{name: "bad escape in the query", target: instance + v21 + "&format=%zz", why: whyPlain},
		{name: "name without value", target: instance + v21 + "&format", why: whyPlain},
		{name: "unknown parameter", target: instance + v21 + "&x=1", why: whyUnknown},
		{name: "unknown parameter on token", target: tokenArm + "&x=1", why: whyUnknown},
		{name: "format on token", target: tokenArm + "&format=text", why: whyUnknown},
		{name: "unknown path", target: "/metadata/nothing" + v21, why: whyUnknown},
		{name: "maintenance", target: "/metadata/maintenance" + v21, why: whyUnknown},
		{name: "unknown section", target: instance + "/nothing" + v21, why: whyUnknown},
		{name: "root", target: "/", why: whyUnknown},
		{name: "PUT instance", method: "PUT", target: instance + v21, why: whyMethod},
		{name: "DELETE token", method: "DELETE", target: tokenArm, why: whyMethod},
		{name: "POST token", method: "POST", target: tokenArm, why: whyMethod},
		{name: "PUT events", method: "PUT", target: events + "2020-07-01", why: whyMethod},
		{name: "path in another letter case", target: "/Metadata/Instance" + v21, why: whyCase},
		{name: "key in another letter case", target: instance + "/compute/VMID" + v21 + "&format=text", why: whyCase},
		{name: "parameter in another letter case", target: instance + "?API-Version=2021-02-01", why: whyCase},
		{name: "two selectors", target: tokenArm + "&client_id=" + plainID + "&object_id=" + plainID, why: whySelector},
		{name: "empty selector", target: tokenArm + "&client_id=", why: whySelector},
		{name: "path of before the header, without", target: "/metadata/v1/InstanceInfo", headers: []string{}, why: whyHeader},
		{name: "escape in the path", target: "/metadata/%69nstance" + v21, why: whyPlain},
		{name: "two slashes", target: "/metadata//instance" + v21, why: whyPlain},
		{name: "two dots", target: "/metadata/versions/../instance" + v21, why: whyPlain},
		{name: "another Host", target: instance + v21, host: "metadata.example", why: whyHost},
		{name: "body on GET", target: instance + v21, body: "x", why: whyFraming},
		{name: "Upgrade", target: instance + v21, headers: with("Connection: Upgrade", "Upgrade: h2c"), why: whyFraming},
		{name: "chunked approval", method: "POST", target: events + "2020-07-01", headers: with("Transfer-Encoding: chunked"), body: "1\r\nx\r\n0\r\n\r\n", why: whyFraming},
		{name: "approval without a length", method: "POST", target: events + "2020-07-01", headers: with("X-No-Length: 1"), why: whyFraming},
		{name: "token, connection reset", target: tokenTarget + "https://reset.example", faults: []string{"reset"}, why: whyNoAnswer},
		{name: "attested document, connection reset", target: attested, faults: []string{"reset"}, why: whyNoAnswer},
		{name: "token, cut in half", target: tokenTarget + "https://half.example", faults: []string{"cut"}, why: whyHalf},
	}
}

// checkDiffers checks that the case belongs on the list, and that it is the gate
// itself that has answered, unless the service was merely asked in better words.
func (c *conformanceCase) checkDiffers(t *testing.T, direct [2]answered, gate answered) {
	t.Helper()
	if cmp.Equal(gate, direct[0]) || cmp.Equal(gate, direct[1]) {
		t.Errorf("the gate's answer is the service's: take it off the list")
	}
	if c.why == whyProbe {
		for i := range direct {
			delete(direct[i].Header, "Server")
			delete(direct[i].Header, "X-Ms-Request-Id")
		}
		delete(gate.Header, imds.ReasonHeader)
		if diff := cmp.Diff(direct[1], gate); diff != "" {
			t.Errorf("but for three headers (-service +gate):\n%s", diff)
		}
		return
	}
	if _, own := gate.Header[imds.ReasonHeader]; own == (c.why == whyCase) {
		t.Errorf("the gate has answered itself: %v", own)
	}
	if c.why != whyCase && gate.Status < 400 {
		t.Errorf("got %d, want an error", gate.Status)
	}
}

// row is the case's line in docs/conformance.md.
func (c *conformanceCase) row(direct, gate answered) string {
	said := func(a answered) string {
		switch a.Status {
		case 0:
			return "no answer"
		case -1:
			return "half an answer"
		}
		if reason := a.Header[imds.ReasonHeader]; reason != "" {
			return fmt.Sprintf("%d `%s`", a.Status, reason)
		}
		return fmt.Sprint(a.Status)
	}
	return fmt.Sprintf("| %s | %s | %s |\n", c.name, said(direct), said(gate))
}

func capital(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

// updateEnv has the test write the document instead of comparing it.
const updateEnv = "IMDSGATE_UPDATE_DOCS"

const conformanceDoc = "../../docs/conformance.md"

// checkConformanceDoc compares the document with what the cases have shown.
func checkConformanceDoc(t *testing.T, rows map[string]string, same int) {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, `# What differs from the service

Read this to know what a container can tell from its answers. `+"`TestConformance`"+` puts %d requests to Azure's service, as the
simulator plays it, from the VM, and once more from a container by gate and agent, with a policy that allows all. The
answers to %d of them are the same in status, headers and body, byte for byte; the others are here, by reason. The test writes
this document (%s=1) and holds it.

- Of a kept answer, the digits of `+"`expires_in`"+` are counted anew. `+"`Date`"+` and `+"`x-ms-request-id`"+` are those of the call that it came by.
- What policy denies is a 403, and its part of the instance document is blanked: [protocol-azure](protocol-azure.md).
- The simulator is not the service. Where the service's own answer is not published the simulator's is a guess, and being
  the same as the guess says only that the gate adds nothing of its own; [protocol-azure](protocol-azure.md) says what is **unsure**.
`, len(rows)+same, same, updateEnv)
	byReason := make(map[string][]string)
	var reasons []string
	for _, c := range documentedCases() {
		if c.why == "" {
			continue
		}
		if byReason[c.why] == nil {
			reasons = append(reasons, c.why)
		}
		byReason[c.why] = append(byReason[c.why], rows[c.name])
	}
	for _, why := range reasons {
		fmt.Fprintf(&b, "\n%s:\n\n| Request | Service | Gate |\n|---|---|---|\n%s", capital(why), strings.Join(byReason[why], ""))
	}
	if os.Getenv(updateEnv) != "" {
		if err := os.WriteFile(conformanceDoc, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(conformanceDoc)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(b.String(), string(have)); diff != "" {
		t.Errorf("docs/conformance.md is not what the test shows; %s=1 writes it (-want +have):\n%s", updateEnv, diff)
	}
}
