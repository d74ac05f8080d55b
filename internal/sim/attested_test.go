package sim

import (
	"crypto/x509"
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/smallstep/pkcs7"
)

// verified checks an attested document against the management API's authority
// and returns what is signed.
func verified(t *testing.T, b *bench, a answer) string {
	t.Helper()
	got := decode[map[string]string](t, a)
	if got["encoding"] != "pkcs7" {
		t.Errorf("got encoding %q, want pkcs7", got["encoding"])
	}
	der, err := base64.StdEncoding.DecodeString(got["signature"])
	if err != nil {
		t.Fatal(err)
	}
	p7, err := pkcs7.Parse(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(b.manage("GET", "/ca.pem", "").Body)) {
		t.Fatal("/ca.pem holds no certificate")
	}
	if err := p7.VerifyWithChainAtTime(roots, b.clock.Now()); err != nil {
		t.Fatalf("verify: %v", err)
	}
	if err := p7.GetOnlySigner().VerifyHostname("sim.metadata.azure.com"); err != nil {
		t.Error(err)
	}
	return string(p7.Content)
}

func TestAttestedDocument(t *testing.T) {
	const (
		head  = `{"licenseType":"",`
		stamp = `"timeStamp":{"createdOn":"01/15/26 10:15:00 -0000","expiresOn":"01/15/26 16:15:00 -0000"},"vmId":"5f0d5b1e-7c1a-4a0e-9a53-000000000001"`
		plan  = `"plan":{"name":"","product":"","publisher":""},`
		sub   = `,"subscriptionId":"00000000-0000-0000-0000-000000000001"`
	)
	rows := []struct{ name, version, nonce, want string }{
		{"newest", "2025-04-07", "1234567890", head + `"nonce":"1234567890",` + plan + stamp + sub + `,"sku":"server"}`},
		{"no nonce", "2025-04-07", "", head + `"nonce":"20260115-101500",` + plan + stamp + sub + `,"sku":"server"}`},
		{"longest nonce", "2019-11-01", strings.Repeat("aZ9x", 8), `{"nonce":"` + strings.Repeat("aZ9x", 8) + `",` + plan + stamp + sub + `,"sku":"server"}`},
		{"with subscription", "2019-04-30", "1", `{"nonce":"1",` + plan + stamp + sub + `}`},
		{"oldest", "2018-10-01", "1", `{"nonce":"1",` + plan + stamp + `}`},
	}
	b := newBench(t, Config{})
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			target := "/metadata/attested/document?api-version=" + row.version
			if row.nonce != "" {
				target += "&nonce=" + row.nonce
			}
			if diff := cmp.Diff(row.want, verified(t, b, b.get(target))); diff != "" {
				t.Errorf("document (-want +got):\n%s", diff)
			}
		})
	}
}

func TestForgedDocumentDoesNotVerify(t *testing.T) {
	b := newBench(t, Config{})
	der, _ := base64.StdEncoding.DecodeString(decode[map[string]string](t, b.get("/metadata/attested/document?api-version=2018-10-01&nonce=1111111111"))["signature"])
	forged := strings.Replace(string(der), "1111111111", "2222222222", 1)
	p7, err := pkcs7.Parse([]byte(forged))
	if err != nil {
		t.Fatal(err)
	}
	if err := p7.Verify(); err == nil {
		t.Error("a changed document verified")
	}
}

func TestSignerIsNotTrustedByOthers(t *testing.T) {
	other, err := NewKeys(start)
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t, Config{})
	der, _ := base64.StdEncoding.DecodeString(decode[map[string]string](t, b.get("/metadata/attested/document?api-version=2018-10-01"))["signature"])
	p7, err := pkcs7.Parse(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(other.ca)
	if err := p7.VerifyWithChainAtTime(roots, start); err == nil {
		t.Error("the document verified against another simulator's authority")
	}
	if got := other.signer.NotAfter.Sub(start); got < 300*24*time.Hour {
		t.Errorf("certificates are good for %v, want about a year", got)
	}
}
