package sim

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"
)

// Keys are what the simulator signs with: a key for tokens, and a certificate
// authority with one signer for attested documents. Nobody trusts them but who
// asks the management API. Safe for concurrent use.
type Keys struct {
	token    *rsa.PrivateKey
	tokenID  string // "kid" and "x5t" of tokens
	ca       *x509.Certificate
	signer   *x509.Certificate
	signerBy *rsa.PrivateKey
}

// signerName is the signer's subject alternative name. Real ones end in
// metadata.azure.com too, under an authority that is trusted
// (docs/protocol-azure.md §1.7).
const signerName = "sim.metadata.azure.com"

// NewKeys makes keys. Their certificates are good from a day before now to a
// year after it. It takes a fraction of a second.
func NewKeys(now time.Time) (*Keys, error) {
	token, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, fmt.Errorf("make token key: %w", err)
	}
	id := sha256.Sum256(token.N.Bytes())
	k := &Keys{token: token, tokenID: base64.RawURLEncoding.EncodeToString(id[:20])}
	if err := k.certify(now); err != nil {
		return nil, fmt.Errorf("make certificates: %w", err)
	}
	return k, nil
}

func (k *Keys) certify(now time.Time) error {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca := template("imdsgate simulator CA", 1, now)
	ca.IsCA, ca.BasicConstraintsValid, ca.MaxPathLenZero = true, true, true
	ca.KeyUsage = x509.KeyUsageCertSign
	if k.ca, err = certificate(ca, ca, caKey.Public(), caKey); err != nil {
		return err
	}
	if k.signerBy, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		return err
	}
	signer := template(signerName, 2, now)
	signer.DNSNames = []string{signerName}
	signer.KeyUsage = x509.KeyUsageDigitalSignature
	signer.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	k.signer, err = certificate(signer, k.ca, k.signerBy.Public(), caKey)
	return err
}

func template(name string, serial int64, now time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    now.Add(-24 * time.Hour),
		NotAfter:     now.Add(365 * 24 * time.Hour),
	}
}

func certificate(t, parent *x509.Certificate, pub any, by *ecdsa.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, by)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// CAPEM is the certificate that attested documents lead up to.
func (k *Keys) CAPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: k.ca.Raw})
}

// JWKS is the JSON Web Key Set (RFC 7517) that tokens are verified with.
func (k *Keys) JWKS() []byte {
	type jwk struct {
		Kty string `json:"kty"`
		Use string `json:"use"`
		Alg string `json:"alg"`
		Kid string `json:"kid"`
		X5t string `json:"x5t"`
		N   string `json:"n"`
		E   string `json:"e"`
	}
	b64 := base64.RawURLEncoding.EncodeToString
	set := map[string][]jwk{"keys": {{
		Kty: "RSA", Use: "sig", Alg: "RS256", Kid: k.tokenID, X5t: k.tokenID,
		N: b64(k.token.N.Bytes()), E: b64(big.NewInt(int64(k.token.E)).Bytes()),
	}}}
	out, _ := json.Marshal(set) // strings only
	return out
}
