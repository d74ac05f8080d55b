package imds

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestParseRecord(t *testing.T) {
	long := strings.Repeat("x", 300)
	tests := []struct {
		name, method, target string
		hidden               []string
	}{
		{"path alone", "GET", "/metadata/versions", nil},
		{"subtree", "HEAD", "/metadata/instance/network/interface/0/ipv4?api-version=2021-02-01&format=json", nil},
		{"token", "GET", tokenGet + "&client_id=c", nil},
		{"old name", "GET", tokenGet + "&mi_res_id=%2Fx", nil},
		{"what was escaped", "GET", tokenPath + "?resource=a%26client_id%3Db%20%25%E2%80%A6", nil},
		{"authority and claims", "GET", tokenPath + "?authority=a&claims=%7B%7D&resource=r", []string{"authority", "claims"}},
		{"odd truth value", "GET", tokenPath + "?bypass_cache=1&resource=r", []string{"bypass_cache"}},
		{"nonce", "GET", "/metadata/attested/document?api-version=2018-10-01&nonce=1234567890", []string{"nonce"}},
		{"value that was cut", "GET", tokenPath + "?client_id=" + long + "&resource=r", []string{"client_id"}},
		{"value that was cut in an escape", "GET", tokenPath + "?resource=" + strings.Repeat("%22", 100), []string{"resource"}},
		{"extended", "GET", "/metadata/instance?extended=true", nil},
		{"extended by an odd value", "GET", "/metadata/instance?extended=yes", []string{"extended"}},
		{"certificate", "POST", "/metadata/identity/issuecredential?cid=c&cred-api-version=2.0&uaid=u", []string{"cid", "uaid"}},
		{"unknown", "GET", "/metadata/New?format=x&token=abc", []string{"token"}},
		{"longest path", "GET", "/" + long[:255], nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want, f := Canonical(Azure, tt.method, tt.target)
			if f != nil {
				t.Fatal(f)
			}
			got, hidden, err := ParseRecord(tt.method, want.Redacted())
			want.Params = slices.DeleteFunc(want.Params, func(p Param) bool { return slices.Contains(tt.hidden, p.Name) })
			if d := cmp.Diff(want, got, cmpopts.EquateEmpty()); err != nil || d != "" {
				t.Errorf("%v (-want +got):\n%s", err, d)
			}
			if d := cmp.Diff(tt.hidden, hidden); d != "" {
				t.Errorf("hidden (-want +got):\n%s", d)
			}
		})
	}
}

func TestParseRecordErrors(t *testing.T) {
	tests := []struct{ name, method, target, want string }{
		{"empty", "GET", "", "not the target"},
		{"absolute form", "GET", "http://169.254.169.254/metadata/versions", "not the target"},
		{"path that is not plain", "GET", "/metadata//versions", "not the target"},
		{"path that was cut", "GET", "/" + strings.Repeat("x", 255) + "…", "was cut"},
		{"path that was cut before a query", "GET", "/" + strings.Repeat("x", 255) + "…?a=…", "was cut"},
		{"too long", "GET", "/metadata/versions?format=" + strings.Repeat("x", maxTarget), "not the target"},
		{"method", "PUT", "/metadata/versions", "method not allowed"},
		{"no method", "", "/metadata/versions", "method not allowed"},
		{"post of a token", "POST", tokenPath, "method not allowed"},
		{"unknown parameter", "GET", tokenPath + "?debug=…", "does not know"},
		{"parameter twice, once hidden", "GET", tokenPath + "?resource=a&resource=…", "twice"},
		{"two selectors", "GET", tokenPath + "?client_id=a&object_id=b", "at most one"},
		{"two selectors, one hidden", "GET", tokenPath + "?client_id=a&object_id=…", "at most one"},
		{"empty selector", "GET", tokenPath + "?client_id=", "must not be empty"},
		{"name hidden", "GET", tokenPath + "?…=a", "plain form"},
		{"no value", "GET", tokenPath + "?resource", "plain form"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q, hidden, err := ParseRecord(tt.method, tt.target)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
			if d := cmp.Diff(Query{}, q); d != "" || hidden != nil {
				t.Errorf("got %v, %v beside the error", q, hidden)
			}
		})
	}
}
