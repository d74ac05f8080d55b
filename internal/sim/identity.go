package sim

import (
	"crypto/rand"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// defaultTokenTTL is the life of a token of a managed identity
// (docs/protocol-azure.md §1.8.2).
const defaultTokenTTL = 24 * time.Hour

// backdated is how much earlier than its issue a token is valid from
// (docs/protocol-azure.md §1.8.2).
const backdated = 300 * time.Second

// maxTokens bounds the platform's cache: a client may ask for any number of
// resources.
const maxTokens = 1000

// tokenKey is what the platform caches tokens by (docs/protocol-azure.md §1.8.3). A
// resource with and one without a slash behind are two. ttl is there for the
// fault that shortens lives: it must not meet tokens from before.
type tokenKey struct {
	client, resource string
	ttl              time.Duration
}

type issued struct {
	token   string
	at, exp time.Time
}

// fresh tells whether a cached token is still handed out: until a tenth of its
// life, or five minutes, are left. When the platform renews is not published.
func (t issued) fresh(now time.Time) bool {
	margin := min(5*time.Minute, t.exp.Sub(t.at)/10)
	return now.Before(t.exp.Add(-margin))
}

type tokenCache struct {
	mu sync.Mutex
	by map[tokenKey]issued
}

// token answers docs/protocol-azure.md §1.8. bypass_cache and authority are accepted
// and have no effect: a caller cannot force a refresh (§1.8.3).
func (s *Server) token(c *call) reply {
	resource := c.query["resource"]
	if resource == "" {
		return badRequest(identity, "Required query variable 'resource' is missing")
	}
	id, why := s.vm.pick(c.query)
	if why != "" {
		return badRequest(identity, why)
	}
	if !s.vm.knows(resource) {
		return reply{status: http.StatusBadRequest, ctype: jsonType, body: identityBody("invalid_resource",
			"AADSTS50001: The application named "+resource+" was not found in the tenant named "+s.vm.Tenant+".")}
	}
	ttl := s.tokenTTL
	if c.faults.tokenTTL != 0 {
		ttl = c.faults.tokenTTL
	}
	t, err := s.issue(id, resource, ttl)
	if err != nil {
		return failure(identity, http.StatusInternalServerError)
	}
	return okJSON(tokenBody(t, id, resource, s.now()))
}

// tokenBody holds strings only, as the service's does; MSAL for Python needs
// expires_in to look like a whole number.
func tokenBody(t issued, id Identity, resource string, now time.Time) map[string]string {
	seconds := func(d time.Duration) string { return strconv.Itoa(max(0, int(d.Seconds()))) }
	unix := func(t time.Time) string { return strconv.FormatInt(t.Unix(), 10) }
	return map[string]string{
		"access_token":   t.token,
		"client_id":      id.ClientID,
		"expires_in":     seconds(t.exp.Sub(now)),
		"expires_on":     unix(t.exp),
		"ext_expires_in": seconds(t.exp.Sub(t.at) - time.Second),
		"not_before":     unix(t.at.Add(-backdated)),
		"resource":       resource,
		"token_type":     "Bearer",
	}
}

// issue hands out the cached token of an identity for a resource, or a new one.
func (s *Server) issue(id Identity, resource string, ttl time.Duration) (issued, error) {
	s.tokens.mu.Lock()
	defer s.tokens.mu.Unlock()
	now := s.now()
	key := tokenKey{client: id.ClientID, resource: resource, ttl: ttl}
	if t, ok := s.tokens.by[key]; ok && t.fresh(now) {
		return t, nil
	}
	if s.tokens.by == nil || len(s.tokens.by) >= maxTokens {
		s.tokens.by = make(map[tokenKey]issued)
	}
	t := issued{at: now, exp: now.Add(ttl)}
	var err error
	if t.token, err = s.keys.mint(id, s.vm.Tenant, resource, t); err != nil {
		return issued{}, err
	}
	s.tokens.by[key] = t
	return t, nil
}

// mint signs an access token with the claims of an app-only Entra v1 token.
func (k *Keys) mint(id Identity, tenant, resource string, t issued) (string, error) {
	start := t.at.Add(-backdated).Unix()
	issuer := "https://sts.windows.net/" + tenant + "/"
	token := jwt.NewWithClaims(jwt.SigningMethodRS256, jwt.MapClaims{
		"aud": resource, "iss": issuer, "iat": start, "nbf": start, "exp": t.exp.Unix(),
		"appid": id.ClientID, "appidacr": "2", "idp": issuer, "idtyp": "app",
		"oid": id.ObjectID, "sub": id.ObjectID, "tid": tenant, "ver": "1.0",
		"uti": rand.Text(), "xms_mirid": id.ResourceID,
	})
	token.Header["kid"], token.Header["x5t"] = k.tokenID, k.tokenID
	return token.SignedString(k.token)
}

// pick chooses the identity by the rules of docs/protocol-azure.md §1.8.1, or says
// why there is none. A selector that is empty counts as not given.
func (vm *VM) pick(query map[string]string) (Identity, string) {
	selector, value := "", ""
	for _, name := range []string{"client_id", "object_id", "msi_res_id", "mi_res_id"} {
		if query[name] == "" {
			continue
		}
		if selector != "" {
			return Identity{}, "Only one of client_id, object_id and msi_res_id may be specified"
		}
		selector, value = name, query[name]
	}
	if selector == "" {
		return vm.standard()
	}
	for _, id := range vm.identities() {
		name := map[string]string{"client_id": id.ClientID, "object_id": id.ObjectID}[selector]
		if name == "" {
			name = id.ResourceID
		}
		if strings.EqualFold(name, value) {
			return id, ""
		}
	}
	return Identity{}, "Identity not found"
}

// standard is the identity of a request that names none.
func (vm *VM) standard() (Identity, string) {
	switch {
	case vm.System != nil:
		return *vm.System, ""
	case len(vm.User) == 1:
		return vm.User[0], ""
	case len(vm.User) > 1:
		return Identity{}, "Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request"
	default:
		return Identity{}, "Identity not found"
	}
}

var guids = regexp.MustCompile(`^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$`)

// knows tells whether Entra would find the resource in the tenant.
func (vm *VM) knows(resource string) bool {
	for _, r := range vm.Resources {
		if strings.TrimSuffix(r, "/") == strings.TrimSuffix(resource, "/") {
			return true
		}
	}
	u, err := url.Parse(resource)
	return len(vm.Resources) == 0 && (guids.MatchString(resource) || err == nil && u.IsAbs())
}

func (s *Server) identityInfo(*call) reply {
	if len(s.vm.identities()) == 0 {
		return badRequest(identity, "Identity not found")
	}
	return okJSON(map[string]string{"tenantId": s.vm.Tenant})
}

// loadBalancer answers docs/protocol-azure.md §1.10.
func (s *Server) loadBalancer(*call) reply {
	if s.vm.Balancer == nil {
		return reply{status: http.StatusNotFound, ctype: jsonType, body: generalBody(false,
			"No load balancer metadata is found. Check if your virtual machine is using any nonbasic SKU load balancer and retry later.")}
	}
	return okJSON(map[string]any{"loadbalancer": s.vm.Balancer})
}

// reprovisionData hands a pre-provisioned VM its OVF document
// (docs/protocol-azure.md §1.3).
func (s *Server) reprovisionData(*call) reply {
	if s.vm.Reprovision == "" {
		return failure(general, http.StatusNotFound)
	}
	return reply{status: http.StatusOK, ctype: xmlType, body: []byte(s.vm.Reprovision)}
}
