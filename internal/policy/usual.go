package policy

import "imdsgate/internal/imds"

// Usual lists the token requests that the workload can be expected to make: for
// each managed identity that a rule names and each resource beside it, the request
// of a caller that names no identity, with the one that it will get.
func (v *View) Usual() (queries []imds.Query) {
	if v.mode == Off {
		return nil
	}
	seen := make(map[string]bool)
	for j := range v.members {
		for _, o := range v.members[j].allows[indexes[imds.IdentityToken]] {
			if o.identity.selector.Name == "" {
				continue
			}
			for _, resource := range o.resources {
				q := imds.TokenQuery(imds.Azure, resource)
				d := v.Decide(q)
				if !d.Allow || d.Identity.Name == "" || seen[resource] {
					continue
				}
				seen[resource] = true
				queries = append(queries, q.WithSelector(d.Identity))
			}
		}
	}
	return queries
}
