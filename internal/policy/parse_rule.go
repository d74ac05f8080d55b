package policy

import (
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// rule reads one entry of rules.
func (p *parser) rule(n *yaml.Node) error {
	r := &rule{place: p.place(n.Line), line: n.Line}
	var denied *yaml.Node
	lines, err := p.mapping("rule", n, []field{
		{"name", func(n *yaml.Node) error { return p.ruleName(r, n) }},
		{"mode", func(n *yaml.Node) (err error) { r.mode, err = p.mode("mode", n); return err }},
		{"match", func(n *yaml.Node) error { return p.match(&r.match, n) }},
		{"allow", func(n *yaml.Node) error { return p.actions("allow", r, n) }},
		{"deny", func(n *yaml.Node) error { denied = n; return nil }},
		{"resource", func(n *yaml.Node) error { return p.resources(r, n) }},
		{"api-version", func(n *yaml.Node) error { return p.globs("api-version", &r.versions, n) }},
		{"subtree", func(n *yaml.Node) error { return p.subtrees(r, n) }},
		{"identity", func(n *yaml.Node) error { return p.identity(r, n) }},
	})
	if err != nil {
		return err
	}
	if denied != nil {
		if line, ok := lines["allow"]; ok {
			return p.errorf(lines["deny"], "rule: deny beside allow (line %d): want one of them, and another rule for the other", line)
		}
		r.deny = true
		if err := p.actions("deny", r, denied); err != nil {
			return err
		}
	}
	if r.actions == 0 {
		return p.errorf(n.Line, "rule: want a list allow or deny of at least one action: %s", actionNames(false))
	}
	if err := p.narrowing(r, lines); err != nil {
		return err
	}
	p.add(r)
	return nil
}

// narrowing refuses what means nothing, or less than it seems to.
func (p *parser) narrowing(r *rule, lines map[string]int) error {
	for _, n := range []struct {
		key   string
		of    actionSet
		names string
	}{
		{"resource", setOf(imds.IdentityToken), "identity.token"},
		{"identity", setOf(imds.IdentityToken, imds.IdentityCredential), "identity.token and identity.credential"},
		{"subtree", setOf(imds.InstanceRead), "instance.read"},
	} {
		if line, ok := lines[n.key]; ok && r.actions&n.of == 0 {
			return p.errorf(line, "%s: is for %s, of which the rule has none", n.key, n.names)
		}
	}
	if !r.deny {
		return nil
	}
	for _, key := range []string{"resource", "api-version", "identity"} {
		if line, ok := lines[key]; ok {
			return p.errorf(line, "%s: a deny cannot be narrowed by it, since the same can be had under another name: deny all, and allow what is needed", key)
		}
	}
	if r.match.proof > workload.None {
		return p.errorf(lines["match"], "match: proof: a deny for those that prove more would spare those that prove less: use it in an allow")
	}
	return nil
}

func (p *parser) ruleName(r *rule, n *yaml.Node) (err error) {
	if r.name, err = p.text("name", "a text", n); err != nil {
		return err
	}
	if strings.ContainsFunc(r.name, func(c rune) bool { return c < ' ' || c == 0x7f }) || len(r.name) > 128 {
		return p.errorf(n.Line, "name: want one line of at most 128 bytes")
	}
	if before, ok := p.names[r.name]; ok {
		return p.errorf(n.Line, "name: %s is the name of the rule in line %d, too: want another", describe(n), before)
	}
	if p.names == nil {
		p.names = make(map[string]int)
	}
	p.names[r.name] = n.Line
	return nil
}

func (p *parser) match(m *match, n *yaml.Node) error {
	glob := func(key string, to *[]glob) field {
		return field{key, func(n *yaml.Node) error { return p.globs(key, to, n) }}
	}
	labels := func(key string, to *[]labelMatch) field {
		return field{key, func(n *yaml.Node) error { return p.labels(key, to, n) }}
	}
	// Each of these, when it is there, must say something.
	inner := func(key string, fields ...field) field {
		return field{key, func(n *yaml.Node) error {
			lines, err := p.mapping(key, n, fields)
			if err == nil && len(lines) == 0 {
				err = p.errorf(n.Line, "%s: want at least one of %s", key, keys(fields))
			}
			return err
		}}
	}
	return inner("match",
		glob("name", &m.names), glob("image", &m.images),
		field{"digest", func(n *yaml.Node) error { return p.digests(m, n) }},
		labels("labels", &m.labels),
		inner("compose", glob("project", &m.project), glob("service", &m.service)),
		inner("kubernetes", glob("namespace", &m.namespace), glob("service-account", &m.account), labels("labels", &m.podLabels)),
		field{"shared", func(n *yaml.Node) error {
			var b bool
			if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" || n.Decode(&b) != nil {
				return p.errorf(n.Line, "shared: want true or false, got %s", describe(n))
			}
			m.shared = &b
			return nil
		}},
		field{"proof", func(n *yaml.Node) error {
			s, err := p.text("proof", "address, endpoint, cgroup or listener", n)
			if err != nil {
				return err
			}
			if m.proof, err = workload.ParseProof(s); err != nil || m.proof == workload.None {
				return p.errorf(n.Line, "proof: want address, endpoint, cgroup or listener, got %s", describe(n))
			}
			return nil
		}},
	).read(n)
}

// globs reads one pattern or several, of which one must match.
func (p *parser) globs(key string, to *[]glob, n *yaml.Node) error {
	return p.texts(key, "a pattern", n, func(line int, s string) error {
		if strings.Count(s, "*") > 8 {
			return p.errorf(line, "%s: want at most 8 times * in a pattern", key)
		}
		*to = append(*to, makeGlob(s))
		return nil
	})
}

// labels reads patterns for the values of labels, all of which must be there.
func (p *parser) labels(what string, to *[]labelMatch, n *yaml.Node) error {
	if n.Kind != yaml.MappingNode || len(n.Content) == 0 {
		return p.errorf(n.Line, "%s: want a mapping of labels, like {team: shop}, got %s", what, describe(n))
	}
	for i := 0; i < len(n.Content); i += 2 {
		key, err := p.text(what, "the key of a label", n.Content[i])
		if err != nil {
			return err
		}
		l := labelMatch{key: key}
		if slices.ContainsFunc(*to, func(l labelMatch) bool { return l.key == key }) {
			return p.errorf(n.Content[i].Line, "%s: %q again: want it once", what, key)
		}
		// An empty value is one that labels often have.
		if v := n.Content[i+1]; v.Kind == yaml.ScalarNode && v.Tag == "!!str" && v.Value == "" {
			l.values = []glob{makeGlob("")}
		} else if err := p.globs(what+": "+key, &l.values, v); err != nil {
			return err
		}
		*to = append(*to, l)
	}
	return nil
}

func (p *parser) digests(m *match, n *yaml.Node) error {
	return p.texts("digest", "sha256: and 64 hexadecimal digits", n, func(line int, s string) error {
		digits, ok := strings.CutPrefix(s, "sha256:")
		if !ok || len(digits) != 64 || strings.Trim(digits, "0123456789abcdef") != "" {
			return p.errorf(line, "digest: want sha256: and 64 hexadecimal digits in lower case, got %q", s)
		}
		m.digests = append(m.digests, s)
		return nil
	})
}

func (p *parser) resources(r *rule, n *yaml.Node) error {
	return p.texts("resource", "a resource, like https://vault.azure.net", n, func(line int, s string) error {
		if strings.ContainsAny(s, "*?") {
			return p.errorf(line, "resource: want it in full, without * or ?")
		}
		r.resources = append(r.resources, s)
		return nil
	})
}

func (p *parser) subtrees(r *rule, n *yaml.Node) error {
	return p.texts("subtree", "a part of the instance document, like compute/tags", n, func(line int, s string) error {
		paths, err := imds.ParseSubtree(s)
		if err != nil {
			return p.errorf(line, "subtree: %v", err)
		}
		r.subtrees = append(r.subtrees, subtree{s, paths})
		return nil
	})
}

// identity reads a selector, or the word default.
func (p *parser) identity(r *rule, n *yaml.Node) error {
	const want = "identity: want one of client_id, object_id, msi_res_id, like {client_id: GUID}, or default for what the service gives to those that name none"
	r.identity.set = true
	if n.Kind == yaml.ScalarNode && n.Tag == "!!str" && n.Value == "default" {
		return nil
	}
	if n.Kind != yaml.MappingNode || len(n.Content) != 2 {
		return p.errorf(n.Line, want+", got %s", describe(n))
	}
	key := n.Content[0]
	if key.Kind != yaml.ScalarNode { // of an alias, Value is a name
		return p.errorf(key.Line, want+", got %s", describe(key))
	}
	value, err := p.text("identity", "an id", n.Content[1])
	if err != nil {
		return err
	}
	if r.identity.selector, err = imds.ParseSelector(key.Value, value); err != nil {
		return p.errorf(key.Line, "identity: %v", err)
	}
	return nil
}
