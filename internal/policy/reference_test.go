package policy_test

import (
	"slices"
	"strings"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// This is what the language means, once more and slowly: sentence by sentence, a
// piece of the document at a time, and with no code of the package.

// leaves are pieces of the instance document, some under two names.
var leaves = []string{"compute/vmId", "compute/name", "compute/tags", "compute/tagsList/name", "compute/osProfile/adminUsername", "compute/osProfile/computerName", "compute/newer",
	"network/interface/macAddress", "network/interface/mac", "network/interface/ipv4/ipAddress/privateIpAddress", "network/interface/ipv4/ipAddress/ipAddress",
	"network/interface/ipv4/ipAddress/publicIpAddress", "network/interface/ipv4/subnet/address", "network/interface/ipv6/ipAddress/privateIpAddress"}

var synonyms = map[string]string{
	"compute/tags": "compute/tagsList", "compute/tagsList": "compute/tags",
	"network/interface/mac":                             "network/interface/macAddress",
	"network/interface/ipv4/ipAddress/privateIpAddress": "network/interface/ipv4/ipAddress/ipAddress",
}

func under(path, of string) bool { return of == "" || path == of || strings.HasPrefix(path, of+"/") }

func contains[T comparable](list []T, x T) bool { return slices.Contains(list, x) }

// stays reports whether a cut leaves a piece.
func stays(c imds.Cut, leaf string) bool {
	in := func(list []string) bool {
		return slices.ContainsFunc(list, func(s string) bool { return under(leaf, s) })
	}
	return (len(c.Keep) == 0 || in(c.Keep)) && !in(c.Drop)
}

func (r *ruleSpec) deny() bool { return len(r.Deny) > 0 }

func (r *ruleSpec) speaks(a imds.Action) bool {
	return contains(append(slices.Clone(r.Allow), r.Deny...), string(a))
}

// about reports whether a rule's subtrees have a piece.
func (r *ruleSpec) about(leaf string) bool {
	return len(r.Subtree) == 0 || slices.ContainsFunc(r.Subtree, func(s string) bool { return under(leaf, s) || synonyms[s] != "" && under(leaf, synonyms[s]) })
}

// slowly is one caller alone, or one member.
type slowly struct {
	s      spec
	w      workload.Workload
	proof  workload.Proof
	shared bool
}

// all are the rules with those of the short form in front.
func (s spec) all() (out []ruleSpec) {
	if len(s.Allow) > 0 {
		out = append(out, ruleSpec{Allow: s.Allow})
	}
	if len(s.Deny) > 0 {
		out = append(out, ruleSpec{Deny: s.Deny})
	}
	return append(out, s.Rules...)
}

// rules are those of one kind that match and speak of the action. Only firm ones,
// if wanted, have a mode of their own that is enforce.
func (x slowly) rules(a imds.Action, deny, firm bool) (out []ruleSpec) {
	for _, r := range x.s.all() {
		inForce := r.Mode == "" && !firm || r.Mode == "enforce"
		if inForce && r.deny() == deny && r.speaks(a) && x.matches(&r) {
			out = append(out, r)
		}
	}
	return out
}

func anyGlob(patterns []string, s string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return slowGlob([]rune(p), []rune(s)) })
}

func (x slowly) matches(r *ruleSpec) bool {
	m := r.Match
	if m == nil {
		return true
	}
	w := x.w
	if m.Name != nil && !anyGlob(m.Name, w.Name) {
		return false
	}
	if unknown := w.Image == "" && w.ImageID != "" && r.deny(); m.Image != nil && !unknown && (w.Image == "" || !anyGlob(m.Image, w.Image)) {
		return false
	}
	if m.Digest != nil && !contains(m.Digest, w.ImageID) && !slices.ContainsFunc(m.Digest, func(d string) bool { return strings.HasSuffix(w.Image, "@"+d) }) {
		return false
	}
	for key, patterns := range m.Labels {
		value, ok := w.Labels[key]
		if image, brought := w.ImageLabels[key]; brought && r.deny() {
			value, ok = image, true
		}
		if !ok || !anyGlob(patterns, value) {
			return false
		}
	}
	if m.Compose != nil {
		project, own := w.Labels[workload.ComposeProject]
		service := w.Labels[workload.ComposeService]
		if !own {
			project, service = w.ImageLabels[workload.ComposeProject], w.ImageLabels[workload.ComposeService]
		}
		granted := own && w.Pod == nil
		if project == "" || !granted && !r.deny() || !anyGlob(m.Compose.Project, project) || !anyGlob(m.Compose.Service, service) {
			return false
		}
	}
	if m.Kubernetes != nil && (w.Pod == nil || w.Pod.Claimed && !r.deny() || !anyGlob(m.Kubernetes.Namespace, w.Pod.Namespace)) {
		return false
	}
	if m.Shared != nil && *m.Shared != x.shared {
		return false
	}
	order := []string{"none", "address", "endpoint", "cgroup", "listener"}
	return m.Proof == "" || slices.Index(order, m.Proof) <= slices.Index(order, x.proof.String())
}

func param(q imds.Query, name string) string {
	v, _ := q.Param(name)
	return v
}

// plain writes a resource in one way: scheme and host in lower case, and without a
// path that is but a slash.
func plain(s string) string {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		return s
	}
	host, path, more := strings.Cut(rest, "/")
	if more && path != "" {
		path = "/" + path
	}
	return strings.ToLower(scheme+"://"+host) + path
}

// narrowed reports whether version and resource are what an allow is for.
func narrowed(r *ruleSpec, a imds.Action, q imds.Query) bool {
	if len(r.Version) > 0 && !anyGlob(r.Version, param(q, "api-version")) {
		return false
	}
	if len(r.Resource) == 0 || a != imds.IdentityToken {
		return true
	}
	return slices.ContainsFunc(r.Resource, func(s string) bool { return plain(s) == plain(param(q, "resource")) })
}

// selected is the identity that a query names, as "kind=value" in lower case.
func selected(q imds.Query) string {
	for _, name := range []string{"client_id", "object_id", "msi_res_id", "mi_res_id"} {
		if v := param(q, name); v != "" {
			return strings.ToLower(strings.Replace(name, "mi_", "msi_", 1) + "=" + v)
		}
	}
	return ""
}

// wants is the identity of a rule: empty for any, "default", or as selected has it.
func (r *ruleSpec) wants() string {
	switch id := r.Identity.(type) {
	case string:
		return id
	case map[string]string:
		for name, v := range id {
			return strings.ToLower(strings.Replace(name, "mi_", "msi_", 1) + "=" + v)
		}
	case map[string]any:
		for name, v := range id {
			return strings.ToLower(strings.Replace(name, "mi_", "msi_", 1) + "=" + v.(string))
		}
	}
	return ""
}

// grant says whether the caller alone may do what it asks for, which rule allows
// it, and which identity is added ("": none).
func (x slowly) grant(q imds.Query) (ok bool, rule, adds string) {
	for _, d := range x.rules(q.Action, true, false) {
		if q.Action != imds.InstanceRead || len(d.Subtree) == 0 {
			return false, d.Name, ""
		}
	}
	named := selected(q)
	for _, r := range x.rules(q.Action, false, false) {
		if !narrowed(&r, q.Action, q) {
			continue
		}
		want := r.wants()
		takes := q.Action == imds.IdentityToken || q.Action == imds.IdentityCredential
		switch {
		case !takes || want == "":
		case slices.ContainsFunc(q.Params, func(p imds.Param) bool { return p.Name == "uaid" }):
			continue
		case named == "" && want != "default":
			adds = want
		case named != "" && named != want:
			continue
		}
		return true, r.Name, adds
	}
	return false, "", ""
}

// sees reports whether the caller alone may read a piece of the document.
func (x slowly) sees(leaf string, q imds.Query) bool {
	for _, d := range x.rules(imds.InstanceRead, true, false) {
		if d.about(leaf) {
			return false
		}
	}
	return slices.ContainsFunc(x.rules(imds.InstanceRead, false, false), func(r ruleSpec) bool { return narrowed(&r, imds.InstanceRead, q) && r.about(leaf) })
}

// covers reports whether the caller alone may have what comes along with an answer.
func (x slowly) covers(a imds.Action, q imds.Query) bool {
	if len(x.rules(a, true, false)) > 0 {
		return false
	}
	return slices.ContainsFunc(x.rules(a, false, false), func(r ruleSpec) bool {
		return narrowed(&r, a, q) && (a != imds.InstanceRead || len(r.Subtree) == 0)
	})
}
