package imds

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// The selectors of a managed identity (protocol-azure §5).
const (
	clientID      = "client_id"
	objectID      = "object_id"
	resourceID    = "msi_res_id"
	oldResourceID = "mi_res_id" // an older spelling of resourceID
)

// TakesSelector reports whether requests for the action may name an identity.
func TakesSelector(a Action) bool { return a == IdentityToken || a == IdentityCredential }

// Selector is the identity that a request names: client_id, object_id or
// msi_res_id, as which mi_res_id is read too. It reports false if none is named,
// so the service chooses, and for actions that take no selector.
func (q Query) Selector() (Param, bool) {
	if !TakesSelector(q.Action) {
		return Param{}, false
	}
	for _, p := range q.Params {
		if slices.Contains(selectors, p.Name) {
			p.Name = selectorName(p.Name)
			return p, true
		}
	}
	return Param{}, false
}

func selectorName(name string) string {
	if name == oldResourceID {
		return resourceID
	}
	return name
}

// WithSelector is the query with an identity named, which ParseSelector made; its
// Params are its own. A query that names one already, or whose action takes none,
// stays as it is, and so does every query for a selector without a name.
func (q Query) WithSelector(s Param) Query {
	if _, named := q.Selector(); named || s.Name == "" || !TakesSelector(q.Action) {
		return q
	}
	s.Name = selectorName(s.Name)
	i, _ := slices.BinarySearchFunc(q.Params, s, func(a, b Param) int { return strings.Compare(a.Name, b.Name) })
	params := make([]Param, 0, len(q.Params)+1)
	q.Params = append(append(append(params, q.Params[:i]...), s), q.Params[i:]...)
	return q
}

// ParseSelector checks the name and the value of a selector as people write them.
// GUIDs get lower case and mi_res_id becomes msi_res_id; the rest stays as it is,
// so that the service sees what was written. Errors say what is wanted.
func ParseSelector(name, value string) (Param, error) {
	p := Param{selectorName(name), value}
	switch p.Name {
	case clientID, objectID:
		if !isGUID(value) {
			return Param{}, fmt.Errorf("%s %q is not a GUID such as 00000000-0000-0000-0000-000000000001", name, value)
		}
		if p.Value = strings.ToLower(value); strings.Trim(p.Value, "0-") == "" {
			return Param{}, fmt.Errorf("%s %q names no identity: it could be read as none given", name, value)
		}
	case resourceID:
		if err := checkResourceID(value); err != nil {
			return Param{}, fmt.Errorf("%s %q: %w: want /subscriptions/GUID/resourceGroups/GROUP/providers/Microsoft.ManagedIdentity/userAssignedIdentities/NAME", name, value, err)
		}
	default:
		return Param{}, fmt.Errorf("unknown kind of identity %q: want client_id, object_id or msi_res_id", name)
	}
	return p, nil
}

func isGUID(s string) bool {
	for i := range len(s) {
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (s[i] == '-') || !dash && unhex[s[i]] < 0 {
			return false
		}
	}
	return len(s) == 36
}

// checkResourceID knows the resource ids of user-assigned identities alone,
// since no other resource is an identity. Azure compares them without case.
func checkResourceID(id string) error {
	parts := strings.Split(id, "/")
	fixed := []string{0: "", 1: "subscriptions", 3: "resourceGroups", 5: "providers", 6: "Microsoft.ManagedIdentity", 7: "userAssignedIdentities", 8: ""}
	if len(parts) != len(fixed) {
		return errors.New("not the resource id of a user-assigned identity")
	}
	for i, want := range fixed {
		switch {
		case i == 2 || i == 4 || i == 8:
		case !equalFold(parts[i], want):
			return errors.New("not the resource id of a user-assigned identity")
		}
	}
	switch {
	case !isGUID(parts[2]):
		return errors.New("the subscription is not a GUID")
	case !isGroupName(parts[4]):
		return errors.New("no resource group has such a name")
	case !isIdentityName(parts[8]):
		return errors.New("no identity has such a name")
	}
	return nil
}

// isGroupName follows Azure's naming rules for resource groups: 1 to 90 letters,
// digits, also of other scripts, and "_-.()", no dot at the end.
func isGroupName(s string) bool {
	n := 0
	for _, r := range s {
		if !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("_-.()", r) {
			return false
		}
		n++
	}
	return n > 0 && n <= 90 && s[len(s)-1] != '.'
}

// isIdentityName follows Azure's naming rules for user-assigned identities: 3 to
// 128 letters, digits, dashes and underscores, a letter or digit in front.
func isIdentityName(s string) bool {
	for i := range len(s) {
		if !isLetter(s[i]) && !isDigit(s[i]) && (i == 0 || s[i] != '-' && s[i] != '_') {
			return false
		}
	}
	return len(s) >= 3 && len(s) <= 128
}

// SameSelector reports whether two selectors are one: the same name, and values
// that are equal without regard to the case of ASCII letters. One identity under
// two kinds of name is not seen to be one, and no name is the same as nothing.
func SameSelector(a, b Param) bool {
	return a.Name != "" && selectorName(a.Name) == selectorName(b.Name) && equalFold(a.Value, b.Value)
}

// Resource is what a token is asked for: the resource of IdentityToken.
func (q Query) Resource() (string, bool) {
	if q.Action != IdentityToken {
		return "", false
	}
	return q.Param("resource")
}

// SameResource reports whether two resources are certainly one: equal byte for
// byte, or URLs that differ in the case of ASCII letters of scheme and host, or in
// a slash that is all of the path, which Entra sets aside (protocol-azure §5).
// Everything else is not the same, though Entra might think so: two slashes, a
// slash behind a longer path, a port, a user, a dot behind the host. Nothing is
// the same as no resource.
func SameResource(a, b string) bool {
	if a == b {
		return a != ""
	}
	n, m := originOf(a), originOf(b)
	if n == 0 || m == 0 || !equalFold(a[:n], b[:m]) {
		return false
	}
	a, b = a[n:], b[m:]
	if a == "/" {
		a = ""
	}
	if b == "/" {
		b = ""
	}
	return a == b
}

// originOf is the length of "scheme://host" at the start of s if a slash or
// nothing follows and the host is plain; else 0.
func originOf(s string) int {
	scheme, _, ok := strings.Cut(s, "://")
	if !ok || scheme == "" {
		return 0
	}
	for i := range len(scheme) {
		if !isLetter(scheme[i]) {
			return 0
		}
	}
	host := len(scheme) + len("://")
	i := host
	for i < len(s) && (isLetter(s[i]) || isDigit(s[i]) || s[i] == '-' || s[i] == '.') {
		i++
	}
	if i == host || i < len(s) && s[i] != '/' {
		return 0
	}
	return i
}
