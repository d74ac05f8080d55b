//go:build linux

package e2e

import (
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/golang-jwt/jwt/v5"
)

// keySet is what tokens are verified with, by key id.
type keySet map[string]*rsa.PublicKey

// keys asks the simulator for its keys.
func (b *bench) keys(t *testing.T) keySet {
	t.Helper()
	var set struct {
		Keys []struct{ Kid, N, E string }
	}
	ok(t, json.Unmarshal(b.manage(t, http.MethodGet, "/jwks.json", ""), &set))
	keys := make(keySet)
	for _, k := range set.Keys {
		n, err := base64.RawURLEncoding.DecodeString(k.N)
		ok(t, err)
		e, err := base64.RawURLEncoding.DecodeString(k.E)
		ok(t, err)
		keys[k.Kid] = &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}
	}
	return keys
}

// tokenClaims are the claims that tests look at.
type tokenClaims struct {
	jwt.RegisteredClaims
	ObjectID   string `json:"oid"`
	ClientID   string `json:"appid"`
	ResourceID string `json:"xms_mirid"`
}

// verify reads a token from its file and checks its signature and its time.
func (keys keySet) verify(t *testing.T, file, audience string) (token string, c tokenClaims) {
	t.Helper()
	text, err := os.ReadFile(file)
	ok(t, err)
	_, err = jwt.ParseWithClaims(string(text), &c, func(j *jwt.Token) (any, error) {
		kid, _ := j.Header["kid"].(string)
		if keys[kid] == nil {
			return nil, fmt.Errorf("unknown key %q", kid)
		}
		return keys[kid], nil
	}, jwt.WithValidMethods([]string{"RS256"}), jwt.WithExpirationRequired(), jwt.WithAudience(audience))
	ok(t, err)
	return string(text), c
}

// piece is how many characters of a token in a row are taken for a leak.
const piece = 16

// leak returns a piece of the token that stands in the text, or "".
func leak(text, token string) string {
	for i := 0; i+piece <= len(token); i++ {
		if strings.Contains(text, token[i:i+piece]) {
			return token[i : i+piece]
		}
	}
	return ""
}

func TestLeak(t *testing.T) {
	const token = "eyJhbGciOiJSUzI1NiJ9.eyJvaWQiOiIwMDAwIiwiYXVkIjoieCJ9.c2lnbmF0dXJlLW9mLWEtdG9rZW4"
	parts := strings.Split(token, ".")
	for _, c := range []struct {
		name, text string
		want       bool
	}{
		{"whole", "token=" + token, true},
		{"payload", `{"payload":"` + parts[1] + `"}`, true},
		{"signature", parts[2], true},
		{"end_of_signature", "…" + parts[2][len(parts[2])-piece:], true},
		{"middle_of_payload", parts[1][3 : 3+piece], true},
		{"other_text", `{"target":"/metadata/identity/oauth2/token?resource=x","status":200}`, false},
		{"less_than_a_piece", parts[1][:piece-1], false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := leak(c.text, token) != ""; got != c.want {
				t.Errorf("leak found: %v, want %v", got, c.want)
			}
		})
	}
}
