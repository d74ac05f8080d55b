package sim

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"regexp"
	"time"

	"github.com/smallstep/pkcs7"
)

// attestedLife is how long a document is good for: what the published examples
// of one kind have (docs/protocol-azure.md §1.7; the real period is not known).
const attestedLife = 6 * time.Hour

// nonces are what the service's swagger allows; its documentation speaks of ten
// digits (docs/protocol-azure.md §1.7).
var nonces = regexp.MustCompile(`^[0-9A-Za-z]{1,32}$`)

type plan struct {
	Name      string `json:"name"`
	Product   string `json:"product"`
	Publisher string `json:"publisher"`
}

type document struct {
	LicenseType *string `json:"licenseType,omitempty"` // since 2020-09-01
	Nonce       string  `json:"nonce"`
	Plan        plan    `json:"plan"`
	TimeStamp   struct {
		CreatedOn string `json:"createdOn"`
		ExpiresOn string `json:"expiresOn"`
	} `json:"timeStamp"`
	VMID           string  `json:"vmId"`
	SubscriptionID *string `json:"subscriptionId,omitempty"` // since 2019-04-30
	SKU            *string `json:"sku,omitempty"`            // since 2019-11-01
}

// attested answers with signed proof of which VM this is.
func (s *Server) attested(c *call) reply {
	nonce := c.query["nonce"]
	if nonce != "" && !nonces.MatchString(nonce) {
		return badRequest(general, "Nonce is invalid")
	}
	signed, err := s.keys.sign(encode(s.document(c.version, nonce, s.now().UTC())))
	if err != nil {
		return failure(general, http.StatusInternalServerError)
	}
	return okJSON(map[string]string{"encoding": "pkcs7", "signature": base64.StdEncoding.EncodeToString(signed)})
}

func (s *Server) document(version, nonce string, now time.Time) document {
	if nonce == "" {
		nonce = now.Format("20060102-150405")
	}
	d := document{Nonce: nonce, VMID: s.vm.compute("vmId"), Plan: s.plan()}
	// The service writes UTC with a minus sign, which a time layout does not.
	const layout = "01/02/06 15:04:05 -0000"
	d.TimeStamp.CreatedOn = now.Format(layout)
	d.TimeStamp.ExpiresOn = now.Add(attestedLife).Format(layout)
	field := func(name, first string) *string {
		if version < first {
			return nil
		}
		v := s.vm.compute(name)
		return &v
	}
	d.LicenseType = field("licenseType", "2020-09-01")
	d.SubscriptionID = field("subscriptionId", "2019-04-30")
	d.SKU = field("sku", "2019-11-01")
	return d
}

func (s *Server) plan() plan {
	field := func(name string) string {
		v, _ := lookup(s.vm.Instance, "compute", "plan", name).(string)
		return v
	}
	return plan{Name: field("name"), Product: field("product"), Publisher: field("publisher")}
}

// sign makes a PKCS#7 SignedData around content, without signed attributes: so
// the service's own example has it.
func (k *Keys) sign(content []byte) ([]byte, error) {
	sd, err := pkcs7.NewSignedData(content)
	if err != nil {
		return nil, fmt.Errorf("sign document: %w", err)
	}
	sd.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA256)
	if err := sd.SignWithoutAttr(k.signer, k.signerBy, pkcs7.SignerInfoConfig{}); err != nil {
		return nil, fmt.Errorf("sign document: %w", err)
	}
	return sd.Finish()
}
