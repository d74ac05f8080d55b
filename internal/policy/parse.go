package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"imdsgate/internal/imds"
)

// Parse reads a policy file; name is what messages call it. The form is that of
// schema.json; in short:
//
//	mode: enforce             # or audit, off
//	allow: [instance.read]    # for every workload
//	deny: [events.approve]
//	rules:
//	  - name: web reads its vault
//	    match: {compose: {project: shop, service: web}}
//	    allow: [identity.token]
//	    resource: https://vault.azure.net
//	    identity: {client_id: 11111111-2222-3333-4444-555555555555}
//
// All keys may be left out; "{}" denies everything. Whatever else stands in
// the file is an error that reads "name:line: what was expected": unknown keys
// and actions, other types, an action listed twice, a second document, and an
// empty file, which is more likely an accident than a wish to deny everything.
// The action unknown cannot be allowed.
func Parse(name string, text []byte) (*Policy, error) {
	p := &parser{name: name, policy: &Policy{name: name, mode: Enforce}}
	root, err := p.document(text, "keys like allow and rules, or {} to deny everything")
	if err != nil {
		return nil, err
	}
	if err := p.file(root); err != nil {
		return nil, err
	}
	return p.policy, nil
}

type parser struct {
	name   string
	policy *Policy
	names  map[string]int // lines of the rules' names

	entries int // of rules, so far
}

func (p *parser) errorf(line int, format string, args ...any) error {
	return fmt.Errorf("%s:%d: %s", p.name, line, fmt.Sprintf(format, args...))
}

// document returns the one value in the file; want is what an empty one lacks.
func (p *parser) document(text []byte, want string) (*yaml.Node, error) {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc, second yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, p.errorf(1, "empty: want %s", want)
	case err != nil:
		return nil, p.syntax(err)
	}
	switch err := dec.Decode(&second); {
	case errors.Is(err, io.EOF):
		return doc.Content[0], nil
	case err != nil:
		return nil, p.syntax(err)
	default:
		return nil, p.errorf(second.Content[0].Line, "second document: want one")
	}
}

// syntax turns the YAML library's "yaml: line 3: text" into ours. Some of its
// messages name no line; they get the first.
func (p *parser) syntax(err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if number, what, ok := strings.Cut(rest, ": "); ok {
			if n, err := strconv.Atoi(number); err == nil {
				return p.errorf(n, "%s", what)
			}
		}
	}
	return p.errorf(1, "%s", text)
}

// field is a key of a mapping and what reads its value.
type field struct {
	key  string
	read func(*yaml.Node) error
}

// mapping reads a mapping with these keys; what is what messages call it. It
// returns the lines of the keys that are there.
func (p *parser) mapping(what string, n *yaml.Node, fields []field) (map[string]int, error) {
	if n.Kind != yaml.MappingNode {
		return nil, p.errorf(n.Line, "%s: want a mapping with the keys %s, got %s", what, keys(fields), describe(n))
	}
	lines := make(map[string]int)
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		f := find(fields, key)
		if f == nil {
			return nil, p.errorf(key.Line, "%s: unknown key %s: want %s", what, describe(key), keys(fields))
		}
		if before, ok := lines[f.key]; ok {
			return nil, p.errorf(key.Line, "%s: %s again: want one, the first is in line %d", what, f.key, before)
		}
		lines[f.key] = key.Line
		if err := f.read(value); err != nil {
			return nil, err
		}
	}
	return lines, nil
}

func find(fields []field, key *yaml.Node) *field {
	if key.Kind != yaml.ScalarNode || key.Tag == "!!merge" {
		return nil
	}
	for i := range fields {
		if fields[i].key == key.Value {
			return &fields[i]
		}
	}
	return nil
}

func keys(fields []field) string {
	var b strings.Builder
	for i, f := range fields {
		switch {
		case i > 0 && i == len(fields)-1:
			b.WriteString(" or ")
		case i > 0:
			b.WriteString(", ")
		}
		b.WriteString(f.key)
	}
	return b.String()
}

// file is the whole document.
func (p *parser) file(n *yaml.Node) error {
	var short [2]*rule
	list := func(i int, key string, deny bool) func(*yaml.Node) error {
		return func(n *yaml.Node) error {
			r := &rule{place: p.place(n.Line), line: n.Line, deny: deny, top: true}
			short[i] = r
			return p.actions(key, r, n)
		}
	}
	var rules *yaml.Node
	_, err := p.mapping("policy", n, []field{
		{"mode", func(n *yaml.Node) (err error) { p.policy.mode, err = p.mode("mode", n); return err }},
		{"allow", list(0, "allow", false)},
		{"deny", list(1, "deny", true)},
		{"rules", func(n *yaml.Node) error { rules = n; return nil }},
	})
	if err != nil {
		return err
	}
	if a, d := short[0], short[1]; a != nil && d != nil && a.actions&d.actions != 0 {
		return p.errorf(d.line, "deny: %s is in allow, too (line %d): want it in one place", (a.actions & d.actions).list()[0], a.line)
	}
	for _, r := range short {
		if r != nil && r.actions != 0 {
			p.add(r)
		}
	}
	if rules == nil {
		return nil
	}
	return p.list("rules", "rules", rules, func(n *yaml.Node) error { return p.rule(n) })
}

// place is where a rule stands, without the file's folder.
func (p *parser) place(line int) string {
	return base(p.name) + ":" + strconv.Itoa(line)
}

// add appends a rule, with the file's mode where it has none of its own.
func (p *parser) add(r *rule) {
	if r.own = r.mode != ""; !r.own {
		r.mode = p.policy.mode
	}
	p.policy.rules = append(p.policy.rules, r)
	if !r.top {
		p.entries++
	}
	r.finish(p.entries)
}

// list reads a list; want is what its items are.
func (p *parser) list(what, want string, n *yaml.Node, item func(*yaml.Node) error) error {
	if n.Kind != yaml.SequenceNode {
		return p.errorf(n.Line, "%s: want a list of %s, got %s", what, want, describe(n))
	}
	for _, i := range n.Content {
		if err := item(i); err != nil {
			return err
		}
	}
	return nil
}

// texts reads one text or a list of at least one.
func (p *parser) texts(what, want string, n *yaml.Node, item func(line int, s string) error) error {
	one := func(n *yaml.Node) error {
		s, err := p.text(what, want, n)
		if err != nil {
			return err
		}
		return item(n.Line, s)
	}
	if n.Kind != yaml.SequenceNode {
		return one(n)
	}
	if len(n.Content) == 0 {
		return p.errorf(n.Line, "%s: want at least one, or leave the key out", what)
	}
	return p.list(what, want, n, one)
}

const maxValue = 1024 // bytes of a text in the file

// text reads one text that is not empty.
func (p *parser) text(what, want string, n *yaml.Node) (string, error) {
	switch {
	case n.Kind != yaml.ScalarNode || n.Tag != "!!str" && n.Tag != "!!timestamp": // 2018-02-01 is one
		hint := ""
		if n.Kind == yaml.ScalarNode && n.Tag != "!!null" {
			hint = ": put it in quotes"
		}
		return "", p.errorf(n.Line, "%s: want %s, got %s%s", what, want, describe(n), hint)
	case n.Value == "" || len(n.Value) > maxValue:
		return "", p.errorf(n.Line, "%s: want %s of 1 to %d bytes, got %d", what, want, maxValue, len(n.Value))
	}
	return n.Value, nil
}

func (p *parser) mode(what string, n *yaml.Node) (Mode, error) {
	s := n.Value
	// YAML 1.1 reads off as false; people mean the mode.
	if n.Kind == yaml.ScalarNode && (n.Tag == "!!str" || n.Tag == "!!bool") {
		switch m := Mode(s); m {
		case Enforce, Audit, Off:
			return m, nil
		}
	}
	return "", p.errorf(n.Line, "%s: want enforce, audit or off, got %s", what, describe(n))
}

// actions reads the list of a rule's actions.
func (p *parser) actions(key string, r *rule, n *yaml.Node) error {
	return p.list(key, "actions", n, func(n *yaml.Node) error {
		if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
			return p.errorf(n.Line, "%s: want the name of an action, got %s", key, describe(n))
		}
		a, err := imds.ParseAction(n.Value)
		if err != nil {
			return p.errorf(n.Line, "%s: %v: want one of %s", key, err, actionNames(r.deny))
		}
		if !r.deny && a == imds.Unknown {
			return p.errorf(n.Line, "%s: %s", key, neverKnown)
		}
		if r.actions&setOf(a) != 0 {
			return p.errorf(n.Line, "%s: %s again: want it once", key, a)
		}
		r.actions |= setOf(a)
		return nil
	})
}

// actionNames lists what a key can have.
func actionNames(deny bool) string {
	var names []string
	for _, a := range all {
		if deny || a != imds.Unknown {
			names = append(names, string(a))
		}
	}
	return strings.Join(names, ", ")
}

// describe names a value in a message.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	if n.Tag == "!!null" {
		return "nothing"
	}
	if len(n.Value) > 64 {
		return strconv.Quote(n.Value[:64]) + "…"
	}
	return strconv.Quote(n.Value)
}
