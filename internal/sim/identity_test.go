package sim

import (
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/go-cmp/cmp"
)

const (
	tokenURL  = tokenPath + "?api-version=2018-02-01&resource="
	arm       = "https://management.azure.com/"
	systemID  = "5a5a0000-0000-0000-0000-000000000001"
	webID     = "c1c10000-0000-0000-0000-000000000001"
	jobsID    = "c1c10000-0000-0000-0000-000000000002"
	webRes    = "/subscriptions/00000000-0000-0000-0000-000000000001/resourceGroups/rg-sim/providers/Microsoft.ManagedIdentity/userAssignedIdentities/web"
	systemRes = "/subscriptions/00000000-0000-0000-0000-000000000001/resourceGroups/rg-sim/providers/Microsoft.Compute/virtualMachines/vm-sim-0"
)

// publicKey reads the key from the management API, as a relying party would.
func publicKey(t *testing.T, b *bench) (*rsa.PublicKey, string) {
	t.Helper()
	set := decode[struct {
		Keys []struct{ Kty, Use, Alg, Kid, N, E string }
	}](t, b.manage("GET", "/jwks.json", ""))
	if len(set.Keys) != 1 || set.Keys[0].Kty != "RSA" || set.Keys[0].Alg != "RS256" || set.Keys[0].Use != "sig" {
		t.Fatalf("got %+v, want one RSA key", set)
	}
	number := func(s string) *big.Int {
		raw, err := base64.RawURLEncoding.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return new(big.Int).SetBytes(raw)
	}
	return &rsa.PublicKey{N: number(set.Keys[0].N), E: int(number(set.Keys[0].E).Int64())}, set.Keys[0].Kid
}

// claimsOf verifies a token with the key of the management API.
func claimsOf(t *testing.T, b *bench, token string) jwt.MapClaims {
	t.Helper()
	key, kid := publicKey(t, b)
	claims := jwt.MapClaims{}
	_, err := jwt.ParseWithClaims(token, claims, func(tok *jwt.Token) (any, error) {
		if tok.Header["kid"] != kid {
			t.Errorf("got kid %v, want %s", tok.Header["kid"], kid)
		}
		return key, nil
	}, jwt.WithValidMethods([]string{"RS256"}), jwt.WithTimeFunc(b.clock.Now))
	if err != nil {
		t.Fatalf("verify token: %v", err)
	}
	return claims
}

func TestToken(t *testing.T) {
	b := newBench(t, Config{})
	a := b.get(tokenURL + arm)
	// A map of strings: a field of another type does not decode.
	got := decode[map[string]string](t, a)
	token := got["access_token"]
	delete(got, "access_token")
	want := map[string]string{
		"client_id": systemID, "expires_in": "86400", "expires_on": "1768558500", "ext_expires_in": "86399",
		"not_before": "1768471800", "resource": arm, "token_type": "Bearer",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("answer (-want +got):\n%s", diff)
	}
	if id := requestID(a); id != "" {
		t.Errorf("got x-ms-request-id %q, want none on tokens", id)
	}
	claims := claimsOf(t, b, token)
	delete(claims, "uti")
	const tenant = "00000000-0000-0000-0000-00000000000a"
	wantClaims := jwt.MapClaims{
		"aud": arm, "iss": "https://sts.windows.net/" + tenant + "/", "idp": "https://sts.windows.net/" + tenant + "/",
		"iat": 1768471800.0, "nbf": 1768471800.0, "exp": 1768558500.0, "tid": tenant,
		"oid": "5a5a0000-0000-0000-0000-0000000000f1", "sub": "5a5a0000-0000-0000-0000-0000000000f1",
		"appid": systemID, "appidacr": "2", "idtyp": "app", "ver": "1.0", "xms_mirid": systemRes,
	}
	if diff := cmp.Diff(wantClaims, claims); diff != "" {
		t.Errorf("claims (-want +got):\n%s", diff)
	}
}

func TestForgedTokenDoesNotVerify(t *testing.T) {
	b := newBench(t, Config{})
	token := decode[map[string]string](t, b.get(tokenURL+arm))["access_token"]
	key, _ := publicKey(t, b)
	parts := strings.Split(token, ".")
	payload, _ := base64.RawURLEncoding.DecodeString(parts[1])
	parts[1] = base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(payload), "vm-sim-0", "vm-sim-1", 1)))
	_, err := jwt.Parse(strings.Join(parts, "."), func(*jwt.Token) (any, error) { return key, nil }, jwt.WithTimeFunc(b.clock.Now))
	if err == nil {
		t.Error("a changed token verified")
	}
}

// docs/protocol-azure.md §1.8.1.
func TestWhichIdentity(t *testing.T) {
	const oneUser = `identity: {system: null, userAssigned: [{clientId: only, objectId: o, resourceId: /r}]}`
	rows := []struct{ name, vm, query, client string }{
		{"system is the default", "", "", systemID},
		{"the only user identity is the default", oneUser, "", "only"},
		{"client_id", "", "&client_id=" + webID, webID},
		{"client_id in upper case", "", "&client_id=" + strings.ToUpper(jobsID), jobsID},
		{"object_id", "", "&object_id=c1c10000-0000-0000-0000-0000000000f2", jobsID},
		{"msi_res_id", "", "&msi_res_id=" + url.QueryEscape(webRes), webID},
		{"mi_res_id in another letter case", "", "&mi_res_id=" + url.QueryEscape(strings.ToLower(webRes)), webID},
		{"client_id of the system identity", "", "&client_id=" + systemID, systemID},
		{"empty selector is none", "", "&client_id=", systemID},
		{"user identity without a system one", "identity: {system: null}", "&client_id=" + jobsID, jobsID},
		{"unknown query names do not matter", "", "&authority=x&bypass_cache=true&more=1", systemID},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			b := newBench(t, Config{VM: vmWith(t, row.vm)})
			got := decode[map[string]string](t, b.get(tokenURL+arm+row.query))
			if got["client_id"] != row.client {
				t.Errorf("got client_id %s, want %s", got["client_id"], row.client)
			}
			if appid := claimsOf(t, b, got["access_token"])["appid"]; appid != row.client {
				t.Errorf("got appid %v, want %s", appid, row.client)
			}
		})
	}
}

func TestKnownResources(t *testing.T) {
	b := newBench(t, Config{VM: vmWith(t, "identity: {resources: [https://vault.azure.net, 0000]}")})
	for _, resource := range []string{"https://vault.azure.net", "https://vault.azure.net/", "0000"} {
		if got := decode[map[string]string](t, b.get(tokenURL+resource)); got["resource"] != resource {
			t.Errorf("got resource %s, want %s", got["resource"], resource)
		}
	}
	open := newBench(t, Config{})
	for _, resource := range []string{"https://vault.azure.net", "api://app", "797f4846-ba00-4fd7-ba43-dac1f8f63013"} {
		decode[map[string]string](t, open.get(tokenURL+resource))
	}
}

func TestPlatformCache(t *testing.T) {
	b := newBench(t, Config{})
	ask := func(query string) map[string]string {
		return decode[map[string]string](t, b.get(tokenURL+query))
	}
	first := ask(arm)
	b.clock.advance(time.Hour)
	again := ask(arm + "&bypass_cache=true")
	if again["access_token"] != first["access_token"] || again["expires_on"] != first["expires_on"] {
		t.Error("an hour later: got another token, want the same")
	}
	if again["expires_in"] != "82800" {
		t.Errorf("an hour later: got expires_in %s, want 82800", again["expires_in"])
	}
	slash := ask(strings.TrimSuffix(arm, "/"))
	if slash["access_token"] == first["access_token"] {
		t.Error("another resource has the same token")
	}
	if aud := claimsOf(t, b, slash["access_token"])["aud"]; aud != "https://management.azure.com" {
		t.Errorf("got aud %v, want the resource as it was asked for", aud)
	}
	if ask(arm + "&client_id=" + webID)["access_token"] == first["access_token"] {
		t.Error("another identity has the same token")
	}
	b.clock.advance(22*time.Hour + 54*time.Minute)
	if ask(arm)["access_token"] != first["access_token"] {
		t.Error("six minutes before its end the token was renewed")
	}
	b.clock.advance(2 * time.Minute)
	renewed := ask(arm)
	if renewed["access_token"] == first["access_token"] || renewed["expires_in"] != "86400" {
		t.Error("four minutes before its end the token was not renewed")
	}
}

func TestPlatformCacheIsBounded(t *testing.T) {
	b := newBench(t, Config{})
	b.tokens.by = make(map[tokenKey]issued)
	for i := range maxTokens {
		b.tokens.by[tokenKey{ttl: time.Duration(i)}] = issued{}
	}
	b.get(tokenURL + arm)
	if n := len(b.tokens.by); n != 1 {
		t.Errorf("got %d tokens in a full cache, want it emptied for the new one", n)
	}
}

func TestOneTokenForThoseWhoAskAtOnce(t *testing.T) {
	b := newBench(t, Config{})
	var mu sync.Mutex
	tokens := make(map[string]bool)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			var got map[string]string
			a := b.get(tokenURL + arm)
			if err := json.Unmarshal([]byte(a.Body), &got); err != nil {
				t.Errorf("got %d %s: %v", a.Status, a.Body, err)
			}
			mu.Lock()
			defer mu.Unlock()
			tokens[got["access_token"]] = true
		})
	}
	wg.Wait()
	if len(tokens) != 1 {
		t.Errorf("got %d tokens, want 1", len(tokens))
	}
}

func TestIdentityInfo(t *testing.T) {
	a := newBench(t, Config{}).get("/metadata/identity/info?api-version=2018-02-01")
	if a.Status != 200 || a.Body != `{"tenantId":"00000000-0000-0000-0000-00000000000a"}` {
		t.Errorf("got %d %s", a.Status, a.Body)
	}
}
