package imds

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestActions(t *testing.T) {
	all := Actions()
	for _, a := range all {
		got, err := ParseAction(string(a))
		if err != nil || got != a {
			t.Errorf("ParseAction(%q) = %q, %v", a, got, err)
		}
	}
	if n := len(slices.Compact(slices.Sorted(slices.Values(all)))); n != len(all) {
		t.Errorf("got %d different actions of %d", n, len(all))
	}
	for _, s := range []string{"", "Identity.Token", "identity.token ", "identity"} {
		if a, err := ParseAction(s); err == nil {
			t.Errorf("ParseAction(%q) = %q, want an error", s, a)
		}
	}
	for i := range azureEndpoints {
		for _, a := range []Action{azureEndpoints[i].read, azureEndpoints[i].write} {
			if a != "" && !slices.Contains(all, a) {
				t.Errorf("%s stands for %q, which is not listed", azureEndpoints[i].path, a)
			}
		}
	}
}

func TestSecret(t *testing.T) {
	secret := []Action{InstanceUserdata, InstanceProvisioning, IdentityToken, IdentityCredential, IdentityDocument, Unknown, "not.listed", ""}
	for _, a := range secret {
		if !a.Secret() {
			t.Errorf("%q is not secret", a)
		}
	}
	for _, a := range Actions() {
		if got, want := a.Secret(), slices.Contains(secret, a); got != want {
			t.Errorf("%q.Secret() = %v, want %v", a, got, want)
		}
	}
}

// The table of docs/protocol-azure.md §3 and the one in the code say the same.
func TestDocumentedEndpoints(t *testing.T) {
	doc, err := os.ReadFile("../../docs/protocol-azure.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := func(path, method string, a Action) bool {
		for line := range strings.Lines(string(doc)) {
			cells := strings.Split(line, "|")
			if len(cells) > 3 && strings.Contains(cells[1], "`"+path+"`") && strings.TrimSpace(cells[2]) == method && strings.Contains(cells[3], "`"+string(a)+"`") {
				return true
			}
		}
		return false
	}
	for i := range azureEndpoints {
		e := &azureEndpoints[i]
		if e.read != "" && !documented(e.path, "GET", e.read) {
			t.Errorf("GET %s as %s is not documented", e.path, e.read)
		}
		if e.write != "" && !documented(e.path, "POST", e.write) {
			t.Errorf("POST %s as %s is not documented", e.path, e.write)
		}
	}
	for _, a := range Actions() {
		if !strings.Contains(string(doc), "`"+string(a)+"`") {
			t.Errorf("action %s is not documented", a)
		}
	}
	if !strings.Contains(string(doc), headerless) {
		t.Errorf("the body %s is not documented", headerless)
	}
}
