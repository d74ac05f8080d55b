package policy

import (
	"strings"

	"imdsgate/internal/imds"
)

// strayParam may choose the identity of a certificate, as client_id does, if what
// design papers say of it is live (protocol-azure §5). Policy has no word for it:
// no rule that is for one identity is for such a query.
const strayParam = "uaid"

// asked is what rules look at of a query, taken out of it once.
type asked struct {
	q        *imds.Query
	selector imds.Param
	named    bool // the caller named an identity
	id       uint64
	stray    bool // it named one in a word that policy lacks
	resource string
	key      uint64    // of the resource
	version  [2]string // api-version and cred-api-version
}

func ask(q *imds.Query) asked {
	a := asked{q: q}
	if a.selector, a.named = q.Selector(); a.named {
		a.id = selectorKey(a.selector)
	}
	_, a.stray = q.Param(strayParam)
	if r, ok := q.Resource(); ok {
		a.resource, a.key = r, resourceKey(r)
	}
	a.version[0], _ = q.Param("api-version")
	a.version[1], _ = q.Param("cred-api-version")
	return a
}

func (a *asked) versionIn(globs []glob) bool {
	given := false
	for _, v := range a.version {
		if v == "" {
			continue
		}
		if given = matchAny(globs, v); !given {
			return false
		}
	}
	return given
}

func (a *asked) resourceIn(resources []string) bool {
	for _, r := range resources {
		if imds.SameResource(a.resource, r) {
			return true
		}
	}
	return false
}

// resourceKey is equal for any two resources that imds.SameResource takes for one,
// seldom for others, and never 0.
func resourceKey(s string) uint64 { return foldedKey(strings.TrimSuffix(s, "/")) }

// selectorKey is the same for selectors and imds.SameSelector; 0 for no name.
func selectorKey(p imds.Param) uint64 {
	if p.Name == "" {
		return 0
	}
	return foldedKey(p.Name)*31 ^ foldedKey(p.Value) | 1
}

func foldedKey(s string) uint64 {
	h := uint64(14695981039346656037) // FNV-1a
	for i := range len(s) {
		b := s[i]
		if 'A' <= b && b <= 'Z' {
			b += 'a' - 'A'
		}
		h = (h ^ uint64(b)) * 1099511628211
	}
	return h | 1
}
