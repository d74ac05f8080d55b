package imds

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
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

// The table of docs/protocol-azure.md §3 and the code say the same.
func TestDocumentedEndpoints(t *testing.T) {
	doc, err := os.ReadFile("../../docs/protocol-azure.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(doc), "\n## §3 ")
	section, _, _ = strings.Cut(section, "\n## ")
	documented := make(map[Action][]string)
	for line := range strings.Lines(section) {
		if cells := strings.Split(line, "|"); len(cells) > 4 && strings.Contains(cells[3], "`") {
			a := Action(strings.Split(cells[3], "`")[1])
			for i, span := range strings.Split(cells[1], "`") {
				if i%2 == 1 {
					documented[a] = append(documented[a], strings.TrimSpace(cells[2])+" "+span)
				}
			}
		}
	}
	for _, a := range Actions() {
		want, got := slices.Sorted(slices.Values(documented[a])), slices.Sorted(slices.Values(Paths(Azure, a)))
		if d := cmp.Diff(want, got); d != "" || len(got) == 0 {
			t.Errorf("%s (-documented +code):\n%s", a, d)
		}
		delete(documented, a)
	}
	if len(documented) > 0 {
		t.Errorf("actions that are none: %v", documented)
	}
	if !strings.Contains(string(doc), headerless) {
		t.Errorf("the body %s is not documented", headerless)
	}
}

// What Paths lists stands for the action that it lists it for.
func TestPaths(t *testing.T) {
	for _, a := range Actions() {
		for _, path := range Paths(Azure, a) {
			method, pattern, _ := strings.Cut(path, " ")
			target := strings.NewReplacer("/…/", "/compute/", "/…", "/x", "=…", "=x", "…", "").Replace(pattern)
			if q, f := Canonical(Azure, method, target); f != nil || q.Action != a {
				t.Errorf("%s: %s is %s, %v, want %s", path, target, q.Action, f, a)
			}
		}
	}
	if got := Paths("elsewhere", VersionsRead); got != nil {
		t.Errorf("another cloud: got %v", got)
	}
	if got := Paths(Azure, ""); got != nil {
		t.Errorf("no action: got %v", got)
	}
}
