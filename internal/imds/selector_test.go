package imds

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	someGUID = "11111111-2222-3333-4444-55555555aaaa"
	someID   = "/subscriptions/" + someGUID + "/resourceGroups/rg-1/providers/Microsoft.ManagedIdentity/userAssignedIdentities/id-1"
)

func TestSelector(t *testing.T) {
	tests := []struct {
		name, method, target string
		want                 Param // no name: none
	}{
		{"none", "GET", tokenGet, Param{}},
		{"client id", "GET", tokenGet + "&client_id=a", Param{"client_id", "a"}},
		{"object id in capitals and escapes", "GET", tokenGet + "&%4fBJECT_ID=%41", Param{"object_id", "A"}},
		{"resource id", "GET", tokenGet + "&msi_res_id=%2Fx", Param{"msi_res_id", "/x"}},
		{"old name of resource id", "GET", tokenGet + "&mi_res_id=%2Fx", Param{"msi_res_id", "/x"}},
		{"certificate", "POST", "/metadata/identity/issuecredential?cred-api-version=2.0&client_id=a", Param{"client_id", "a"}},
		{"name that means nothing there", "GET", "/metadata/v1/x?client_id=a", Param{}},
		{"unknown endpoint", "GET", "/metadata/new?client_id=a", Param{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q, f := Canonical(Azure, tt.method, tt.target)
			if f != nil {
				t.Fatal(f)
			}
			if got, named := q.Selector(); got != tt.want || named != (tt.want.Name != "") {
				t.Errorf("got %v, %v, want %v", got, named, tt.want)
			}
		})
	}
}

func TestWithSelector(t *testing.T) {
	selectors := []Param{{"client_id", someGUID}, {"object_id", someGUID}, {"msi_res_id", someID}}
	for _, target := range []string{
		"GET " + tokenGet, "GET " + tokenPath, "GET " + tokenPath + "?api-version=1&authority=a&bypass_cache=true&claims=c&resource=r",
		"GET /metadata/identity/getplatformmetadata?cred-api-version=2.0", "POST /metadata/identity/issuecredential?cid=c&cred-api-version=2.0&uaid=u",
	} {
		method, target, _ := strings.Cut(target, " ")
		q, f := Canonical(Azure, method, target)
		if f != nil {
			t.Fatal(f)
		}
		for _, s := range selectors {
			got := q.WithSelector(s)
			again, f := Canonical(Azure, method, got.Target())
			if d := cmp.Diff(got, again); f != nil || d != "" {
				t.Errorf("%s with %s does not classify to itself: %v\n%s", target, s.Name, f, d)
			}
			if p, ok := got.Selector(); !ok || p != s {
				t.Errorf("%s: got selector %v, want %v", target, p, s)
			}
			if q.Target() != target {
				t.Errorf("the query itself became %s, want %s", q.Target(), target)
			}
			for i := range got.Params {
				got.Params[i].Value = "spoilt"
			}
			if q.Target() != target {
				t.Errorf("the result shares memory with the query: %s", q.Target())
			}
		}
	}
}

func TestWithSelectorLeavesAlone(t *testing.T) {
	s := Param{"client_id", someGUID}
	tests := []struct {
		name, target string
		selector     Param
	}{
		{"the caller's own choice", tokenGet + "&object_id=x", s},
		{"the caller's own choice by the old name", tokenPath + "?mi_res_id=x", s},
		{"another action", "/metadata/identity/info?api-version=2018-02-01", s},
		{"unknown endpoint", "/metadata/new", s},
		{"no selector", tokenGet, Param{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q := query(t, ask{target: tt.target})
			if d := cmp.Diff(q, q.WithSelector(tt.selector)); d != "" {
				t.Errorf("changed:\n%s", d)
			}
		})
	}
}

func TestTakesSelector(t *testing.T) {
	for _, a := range Actions() {
		want := false
		for i := range azureEndpoints {
			e := &azureEndpoints[i]
			want = want || (e.read == a || e.write == a) && strings.Contains(strings.Join(e.params, " "), clientID)
		}
		if got := TakesSelector(a); got != want {
			t.Errorf("TakesSelector(%s) = %v, its endpoints say %v", a, got, want)
		}
	}
}

func TestParseSelector(t *testing.T) {
	id := func(old, with string) string { return strings.Replace(someID, old, with, 1) }
	tests := []struct {
		name, kind, value string
		want              Param  // no name: an error
		err               string // part of it
	}{
		{"client id", "client_id", someGUID, Param{"client_id", someGUID}, ""},
		{"guid in capitals", "object_id", strings.ToUpper(someGUID), Param{"object_id", someGUID}, ""},
		{"resource id", "msi_res_id", someID, Param{"msi_res_id", someID}, ""},
		{"old name", "mi_res_id", someID, Param{"msi_res_id", someID}, ""},
		{"resource id as the portal has it", "msi_res_id", id("resourceGroups", "resourcegroups"), Param{"msi_res_id", id("resourceGroups", "resourcegroups")}, ""},
		{"group with all that is allowed", "msi_res_id", id("rg-1", "Grüße_(1).x"), Param{"msi_res_id", id("rg-1", "Grüße_(1).x")}, ""},
		{"longest identity name", "msi_res_id", id("id-1", strings.Repeat("i", 128)), Param{"msi_res_id", id("id-1", strings.Repeat("i", 128))}, ""},

		{"no name", "", someGUID, Param{}, "want client_id, object_id or msi_res_id"},
		{"name in capitals", "CLIENT_ID", someGUID, Param{}, "want client_id"},
		{"other parameter", "resource", someGUID, Param{}, "want client_id"},
		{"empty guid", "client_id", "", Param{}, "not a GUID"},
		{"guid of zeros", "client_id", "00000000-0000-0000-0000-000000000000", Param{}, "names no identity"},
		{"guid in braces", "client_id", "{" + someGUID + "}", Param{}, "not a GUID"},
		{"guid without dashes", "client_id", strings.ReplaceAll(someGUID, "-", ""), Param{}, "not a GUID"},
		{"guid with a dash elsewhere", "client_id", "1111111-12222-3333-4444-55555555aaaa", Param{}, "not a GUID"},
		{"guid and a line break", "client_id", someGUID + "\n", Param{}, "not a GUID"},
		{"guid of other digits", "client_id", strings.Replace(someGUID, "1", "g", 1), Param{}, "not a GUID"},
		{"name for a guid", "client_id", "my-identity", Param{}, "not a GUID"},
		{"resource id for a guid", "client_id", someID, Param{}, "not a GUID"},
		{"guid for a resource id", "msi_res_id", someGUID, Param{}, "userAssignedIdentities"},
		{"resource id without slash", "msi_res_id", someID[1:], Param{}, "userAssignedIdentities"},
		{"resource id with slash at the end", "msi_res_id", someID + "/", Param{}, "userAssignedIdentities"},
		{"resource id of a virtual machine", "msi_res_id", id("Microsoft.ManagedIdentity/userAssignedIdentities", "Microsoft.Compute/virtualMachines"), Param{}, "userAssignedIdentities"},
		{"subscription that is none", "msi_res_id", id(someGUID, "prod"), Param{}, "subscription"},
		{"no group", "msi_res_id", id("rg-1", ""), Param{}, "resource group"},
		{"group with dot at the end", "msi_res_id", id("rg-1", "rg."), Param{}, "resource group"},
		{"group too long", "msi_res_id", id("rg-1", strings.Repeat("g", 91)), Param{}, "resource group"},
		{"group with query in it", "msi_res_id", id("rg-1", "rg?x=1"), Param{}, "resource group"},
		{"group of bytes", "msi_res_id", id("rg-1", "rg\xff"), Param{}, "resource group"},
		{"short identity name", "msi_res_id", id("id-1", "id"), Param{}, "no identity"},
		{"identity name with a dash in front", "msi_res_id", id("id-1", "-id"), Param{}, "no identity"},
		{"identity name with a space", "msi_res_id", someID + " ", Param{}, "no identity"},
		{"pattern", "msi_res_id", id("id-1", "id-*"), Param{}, "no identity"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseSelector(tt.kind, tt.value)
			if got != tt.want || (err == nil) != (tt.want.Name != "") {
				t.Errorf("got %v, %v, want %v", got, err, tt.want)
			}
			if err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %v, want it to hold %q", err, tt.err)
			}
		})
	}
}

func TestSameSelector(t *testing.T) {
	tests := []struct {
		name string
		a, b Param
		want bool
	}{
		{"equal", Param{"client_id", "a"}, Param{"client_id", "a"}, true},
		{"letter case", Param{"client_id", "aB"}, Param{"client_id", "Ab"}, true},
		{"two spellings of the name", Param{"mi_res_id", "a"}, Param{"msi_res_id", "a"}, true},
		{"other value", Param{"client_id", "a"}, Param{"client_id", "b"}, false},
		{"other kind, same value", Param{"client_id", "a"}, Param{"object_id", "a"}, false},
		{"longer", Param{"client_id", "a"}, Param{"client_id", "a "}, false},
		{"letter that folds by unicode", Param{"msi_res_id", "k"}, Param{"msi_res_id", "\u212a"}, false},
		{"none and none", Param{}, Param{}, false},
		{"value without name", Param{"", "a"}, Param{"", "a"}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got, turned := SameSelector(tt.a, tt.b), SameSelector(tt.b, tt.a); got != tt.want || turned != tt.want {
				t.Errorf("got %v and %v, want %v", got, turned, tt.want)
			}
		})
	}
}

func TestResource(t *testing.T) {
	for target, want := range map[string]string{
		tokenGet: "https://management.azure.com/", tokenPath + "?RESOURCE=%41": "A", tokenPath + "?resource=": "", tokenPath: "none",
		"/metadata/new?resource=x": "none", "/metadata/v1/x?resource=x": "none",
	} {
		got, ok := query(t, ask{target: target}).Resource()
		if ok != (want != "none") || ok && got != want {
			t.Errorf("%s: got %q, %v, want %q", target, got, ok, want)
		}
	}
}

func TestSameResource(t *testing.T) {
	const vault = "https://vault.azure.net"
	tests := []struct {
		name, a, b string
		want       bool
	}{
		{"equal", vault, vault, true},
		{"slash at the end", vault, vault + "/", true},
		{"case of scheme and host", vault, "HTTPS://Vault.Azure.NET/", true},
		{"equal with a path", vault + "/a", "https://VAULT.azure.net/a", true},
		{"app by guid", "api://" + someGUID, "API://" + strings.ToUpper(someGUID), true},
		{"written alike, whatever it is", vault + "//x?y", vault + "//x?y", true},

		{"nothing", "", "", false},
		{"other host", vault, "https://vault.azure.com", false},
		{"host as a prefix", vault, vault + ".evil.test", false},
		{"two slashes", vault, vault + "//", false},
		{"one slash and two", vault + "/", vault + "//", false},
		{"three slashes in front", vault, "https:///vault.azure.net", false},
		{"case of the path", vault + "/a", vault + "/A", false},
		{"slash behind a path", vault + "/a", vault + "/a/", false},
		{"path", vault, vault + "/a", false},
		{"dot path", vault, vault + "/.", false},
		{"scope", vault, vault + "/.default", false},
		{"other scheme", vault, "http://vault.azure.net", false},
		{"no scheme", vault, "vault.azure.net", false},
		{"no scheme, other case", "vault.azure.net", "Vault.azure.net", false},
		{"no scheme, slash", "vault.azure.net", "vault.azure.net/", false},
		{"port", vault, vault + ":443", false},
		{"user", vault, "https://vault.azure.net@evil.test", false},
		{"user in other case", "https://User@vault.azure.net", "https://user@vault.azure.net", false},
		{"dot behind the host", vault, vault + ".", false},
		{"query", vault, vault + "?", false},
		{"query behind a slash", vault, vault + "/?", false},
		{"fragment", vault, vault + "#", false},
		{"backslash", vault, vault + `\`, false},
		{"escape", vault, "https://v%61ult.azure.net", false},
		{"space", vault, vault + " ", false},
		{"two resources", vault, vault + " https://graph.microsoft.com", false},
		{"letter that folds by unicode", "https://kusto.test", "https://\u212austo.test", false},
		{"guid in other case", someGUID, strings.ToUpper(someGUID), false},
		{"no host", "https://", "https:///", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got, turned := SameResource(tt.a, tt.b), SameResource(tt.b, tt.a); got != tt.want || turned != tt.want {
				t.Errorf("got %v and %v, want %v", got, turned, tt.want)
			}
		})
	}
}

// What every decision of a policy calls takes no memory.
func TestNoAllocations(t *testing.T) {
	token := query(t, ask{target: tokenGet + "&mi_res_id=%2Fx"})
	leaf := ask{target: "/metadata/instance/compute/osProfile/adminUsername"}.request(t)
	indexed := ask{target: "/metadata/instance/network/interface/0/ipv4/ipAddress/0/publicIpAddress"}.request(t)
	newer := ask{target: "/metadata/instance/compute/notYetDocumented"}.request(t)
	held := false
	for name, f := range map[string]func(){
		"Selector":            func() { token.Selector() },
		"Resource":            func() { token.Resource() },
		"TakesSelector":       func() { held = TakesSelector(token.Action) },
		"SameSelector":        func() { held = SameSelector(Param{"mi_res_id", someID}, Param{"msi_res_id", "/X"}) },
		"SameResource":        func() { held = SameResource("https://vault.azure.net", "HTTPS://VAULT.azure.net/") },
		"Within":              func() { held = Within("compute/OSPROFILE/adminUsername", "compute/osProfile") },
		"Classify":            func() { Classify(Azure, leaf) },
		"Classify an index":   func() { Classify(Azure, indexed) },
		"Classify newer keys": func() { Classify(Azure, newer) },
	} {
		if got := testing.AllocsPerRun(100, f); got > 0 {
			t.Errorf("%s: %v allocations, want none", name, got)
		}
	}
	_ = held
}
