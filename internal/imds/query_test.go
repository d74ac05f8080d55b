package imds

import (
	"strings"
	"testing"
)

func query(t testing.TB, a ask) Query {
	t.Helper()
	q, f := Classify(Azure, a.request(t))
	if f != nil {
		t.Fatalf("%s: got refusal %v", a.target, f)
	}
	return q
}

func TestParam(t *testing.T) {
	q := query(t, ask{target: tokenPath + "?RESOURCE=https://vault.azure.net&client_id=%41&api-version="})
	for name, want := range map[string]string{"resource": "https://vault.azure.net", "client_id": "A", "api-version": ""} {
		if got, ok := q.Param(name); !ok || got != want {
			t.Errorf("Param(%q) = %q, %v, want %q", name, got, ok, want)
		}
	}
	for _, name := range []string{"", "RESOURCE", "object_id"} {
		if got, ok := q.Param(name); ok {
			t.Errorf("Param(%q) = %q, want none", name, got)
		}
	}
}

func TestRedacted(t *testing.T) {
	long := strings.Repeat("x", 300)
	tests := []struct{ name, target, want string }{
		{"path alone", "/metadata/versions", "/metadata/versions"},
		{"what selects is shown", tokenGet + "&client_id=c", tokenPath + "?api-version=2018-02-01&client_id=c&resource=https://management.azure.com/"},
		{"what could be secret is not", tokenPath + "?authority=a&bypass_cache=secret&claims=%7B%7D", tokenPath + "?authority=…&bypass_cache=…&claims=…"},
		{"truth values are shown", tokenPath + "?bypass_cache=true", tokenPath + "?bypass_cache=true"},
		{"nonce by its length", "/metadata/attested/document?api-version=1&nonce=1234567890", "/metadata/attested/document?api-version=1&nonce=…(10)"},
		{"unknown parameters are not shown", "/metadata/new?token=abc", "/metadata/new?token=…"},
		{"long value is cut", tokenPath + "?resource=" + long, tokenPath + "?resource=" + long[:256] + "…"},
		{"longest path that is not cut", "/" + long[:255], "/" + long[:255]},
		{"long path is cut", "/" + long[:256], "/" + long[:255] + "…"},
		{"line break cannot come through", tokenPath + "?resource=%22%E2%80%A8x", tokenPath + "?resource=%22%E2%80%A8x"},
		{"pair cannot be forged", tokenPath + "?resource=a%26client_id%3Db", tokenPath + "?resource=a%26client_id%3Db"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := query(t, ask{target: tt.target}).Redacted(); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}
