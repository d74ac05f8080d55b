package imds

import (
	"reflect"
	"testing"
)

// The token request is the one that Classify makes of what SDKs send.
func TestTokenQuery(t *testing.T) {
	for _, resource := range []string{"https://vault.azure.net", "https://management.azure.com/", "api://x y"} {
		want := TokenQuery(Azure, resource)
		got, refusal := Canonical(Azure, "GET", want.Target())
		if refusal != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v, want %+v", resource, got, refusal, want)
		}
	}
}
