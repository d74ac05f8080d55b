//go:build linux

package e2e

import (
	"fmt"
	"math"
	"net/http"
	"os"
	"strings"
	"testing"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/sim"
	"imdsgate/internal/testnet"
)

const (
	tokenPolicy = "allow: [versions.read, instance.read, identity.token]\n"

	// audience is what the SDKs make of the scope that the clients ask for.
	audience = "https://management.azure.com"

	// fast is how soon an SDK has to be done with an answer that it does not try
	// again, in milliseconds. Those that it does try again take 7 s to 80 s.
	fast = 2000.0
)

// identityCase is a credential and whose token it gets, or which error.
type identityCase struct {
	name, credential string
	want             sim.Identity
	wantError        string
}

// identityCases are all the ways to name each identity of the simulator's VM,
// and one that it does not have.
func identityCases() []identityCase {
	vm := sim.DefaultVM()
	cases := []identityCase{
		{name: "system_assigned", credential: "system", want: *vm.System},
		{name: "unknown_client_id", credential: "client-id=c1c10000-0000-0000-0000-00000000dead", wantError: "Identity not found"},
	}
	for _, id := range vm.User {
		name := id.ResourceID[strings.LastIndex(id.ResourceID, "/")+1:]
		cases = append(cases,
			identityCase{name: name + "_by_client_id", credential: "client-id=" + id.ClientID, want: id},
			identityCase{name: name + "_by_object_id", credential: "object-id=" + id.ObjectID, want: id},
			identityCase{name: name + "_by_resource_id", credential: "resource-id=" + id.ResourceID, want: id})
	}
	return cases
}

func TestTokens(t *testing.T) {
	for _, method := range []string{"sklookup", "nftables"} {
		t.Run(method, func(t *testing.T) {
			b := start(t, setup{method: method, policy: tokenPolicy, containers: []string{"go", "js"}})
			tokens := make(map[string]bool)
			asked := make(map[string]int)
			for _, c := range clients {
				t.Run(c.name, func(t *testing.T) { asked[c.name] = eachIdentity(t, b, c, tokens) })
			}
			b.onlyTheVM(t)
			events := b.events(t)
			for _, c := range clients {
				if n := asked[c.name]; n > 0 {
					tokensInAudit(t, events["static:"+c.name], method, n)
				}
			}
			noTokenIn(t, b, tokens)
		})
	}
}

// eachIdentity has a client ask for a token of each identity. It returns the
// number of tokens asked for, and adds those that came to tokens.
func eachIdentity(t *testing.T, b *bench, c client, tokens map[string]bool) (asked int) {
	ctx, keys, cases := deadline(t), b.keys(t), identityCases()
	credentials := make([]string, len(cases))
	for i, x := range cases {
		credentials[i] = x.credential
	}
	// A process of its own: the first one's SDK has the token of the system's
	// identity already.
	first, second := c.start(ctx, t, b, credentials...), c.start(ctx, t, b, "default")
	cases = append(cases, identityCase{name: "default_credential", credential: "default", want: *sim.DefaultVM().System})
	for i, got := range append(first.attempts(t), second.attempts(t)...) {
		t.Run(cases[i].name, func(t *testing.T) {
			if token := cases[i].check(t, got, keys); token != "" {
				tokens[token] = true
			}
		})
	}
	return len(cases)
}

// check compares what an SDK tells, and the token that it got, with the case.
func (x identityCase) check(t *testing.T, got attempt, keys keySet) (token string) {
	if x.wantError != "" {
		if !strings.Contains(got.Error, x.wantError) || got.File != "" {
			t.Errorf("%s: got error %q, want one with %q", x.credential, got.Error, x.wantError)
		}
		if got.Took >= fast {
			t.Errorf("%s: took %v ms, want less than %v", x.credential, got.Took, fast)
		}
		return ""
	}
	if got.Error != "" {
		t.Fatalf("%s: %s", x.credential, got.Error)
	}
	token, claims := keys.verify(t, got.File, audience)
	if claims.ObjectID != x.want.ObjectID || claims.ClientID != x.want.ClientID || claims.ResourceID != x.want.ResourceID {
		t.Errorf("%s: got the token of %+v, want that of %+v", x.credential, claims, x.want)
	}
	if got.Claims.ObjectID != claims.ObjectID || got.Claims.ClientID != claims.ClientID || got.Claims.Audience != audience {
		t.Errorf("%s: the client tells of %+v, the token of %+v", x.credential, got.Claims, claims)
	}
	// MSAL for JavaScript counts from when it asked, to the rounded second.
	early := claims.ExpiresAt.Unix() - got.ExpiresOn
	if most := int64(math.Ceil(got.Took / 1000)); early < 0 || early > most {
		t.Errorf("%s: the SDK has the expiry %d, the token %d; want it 0 to %d s early", x.credential, got.ExpiresOn, claims.ExpiresAt.Unix(), most)
	}
	return token
}

// tokensInAudit checks that the audit knows of each token that was asked for,
// and of the one probe of the default credential.
func tokensInAudit(t *testing.T, events []audit.Event, method string, asked int) {
	t.Helper()
	allowed, probes := 0, 0
	for _, e := range events {
		switch {
		case e.Action == imds.IdentityToken && e.Decision == audit.Allow:
			allowed++
		case isProbe(e):
			probes++
		default:
			t.Errorf("unexpected event: %+v", e)
		}
		if e.Method != method {
			t.Errorf("event %d: method %s, want %s", e.ID, e.Method, method)
		}
	}
	if allowed != asked || probes != 1 {
		t.Errorf("audit has %d requests for tokens and %d probes, want %d and 1", allowed, probes, asked)
	}
}

// isProbe tells the request by which a default credential finds out whether
// there is a metadata service: neither header nor query, and any answer will do.
func isProbe(e audit.Event) bool {
	return e.Decision == audit.Refuse && e.Status == http.StatusBadRequest &&
		e.Target == "/metadata/identity/oauth2/token" && strings.HasPrefix(e.Reason, "metadata_header")
}

// noTokenIn checks that no piece of a token is in what the gate wrote.
func noTokenIn(t *testing.T, b *bench, tokens map[string]bool) {
	t.Helper()
	if want := 1 + len(sim.DefaultVM().User); len(tokens) != want {
		t.Errorf("got %d different tokens, want %d, one for each identity", len(tokens), want)
	}
	for token := range tokens {
		for _, p := range []*testnet.Process{b.Proxy, b.Agent} {
			if l := leak(p.Output(), token); l != "" {
				t.Errorf("a piece of a token is in the output of the %s: %s…", p.Name, l[:4])
			}
		}
	}
}

// Without a policy file nobody gets a token; the SDK fails at once and its user
// reads which rule is missing.
func TestDenied(t *testing.T) {
	b := start(t, setup{containers: []string{"go", "js"}})
	credentials := []string{"system", "client-id=" + sim.DefaultVM().User[0].ClientID, "default"}
	asked := make(map[string]bool)
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			all := c.start(deadline(t), t, b, credentials...).attempts(t)
			asked[c.name] = true
			for _, got := range all {
				if !strings.Contains(got.Error, "no rule allows identity.token: add {match: {name: "+c.name+"}, allow: [identity.token]} to the policy's rules") {
					t.Errorf("%s: error does not name the missing rule: %q", got.Credential, got.Error)
				}
				if got.Took >= fast {
					t.Errorf("%s: took %v ms, want less than %v", got.Credential, got.Took, fast)
				}
			}
		})
	}
	if all := b.history(t); len(all) != 0 {
		t.Errorf("the service was asked: %+v", all)
	}
	events := b.events(t)
	for _, c := range clients {
		if !asked[c.name] {
			continue
		}
		denied, probes := 0, 0
		for _, e := range events["static:"+c.name] {
			switch {
			case e.Decision == audit.Deny && e.Action == imds.IdentityToken && e.Status == http.StatusForbidden:
				denied++
			case isProbe(e):
				probes++
			default:
				t.Errorf("unexpected event: %+v", e)
			}
		}
		if denied != len(credentials) || probes != 1 {
			t.Errorf("%s: audit has %d denials and %d probes, want %d and 1: nothing is tried again", c.name, denied, probes, len(credentials))
		}
	}
}

// While the service is being updated it answers 410; SDKs wait and ask again.
func TestGoneForAWhile(t *testing.T) {
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := start(t, setup{policy: tokenPolicy, sim: []string{"--fault", "gone=70s,path=/metadata/identity"}, containers: []string{c.name}})
			ctx := deadline(t)
			client := c.start(ctx, t, b, "system")
			_, err := b.Proxy.Await(ctx, 0, func(line string) bool { return strings.Contains(line, `"status":410`) })
			ok(t, err)
			b.manage(t, http.MethodDelete, "/faults", "")
			got := client.attempts(t)[0]
			if got.Error != "" {
				t.Fatalf("the SDK gave up: %s", got.Error)
			}
			b.keys(t).verify(t, got.File, audience)
			var statuses []string
			for _, e := range b.events(t)["static:"+c.name] {
				statuses = append(statuses, fmt.Sprintf("%s %d", e.Decision, e.Status))
			}
			if got, want := strings.Join(statuses, ", "), "allow 410, allow 200"; got != want {
				t.Errorf("audit has %s, want %s", got, want)
			}
		})
	}
}

// The lock file must do with any registry.
func TestLockFileNamesNoRegistry(t *testing.T) {
	text, err := os.ReadFile("js/package-lock.json")
	ok(t, err)
	if strings.Contains(string(text), `"resolved"`) {
		t.Error(`js/package-lock.json has "resolved" addresses: npm must read js/.npmrc when it writes it`)
	}
}
