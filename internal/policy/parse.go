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

// Parse reads a policy file; name is what messages call it. The form is
//
//	# actions not listed are denied
//	allow: [instance.read, identity.token]
//	deny: [events.approve]
//
// Both keys may be left out; "{}" denies everything. Whatever else stands in
// the file is an error that reads "name:line: what was expected": unknown keys
// and actions, other types, an action listed twice, a second document, and an
// empty file, which is more likely an accident than a wish to deny everything.
// The action unknown cannot be allowed.
func Parse(name string, text []byte) (*Policy, error) {
	p := parser{builder: builder{name: name}, seen: make(map[imds.Action]listing)}
	root, err := p.document(text)
	if err != nil {
		return nil, err
	}
	if err := p.mapping(root); err != nil {
		return nil, err
	}
	return p.policy(), nil
}

// listing is where an action was listed before.
type listing struct {
	key  string
	line int
}

type parser struct {
	builder
	seen map[imds.Action]listing
}

func (p *parser) errorf(line int, format string, args ...any) error {
	return fmt.Errorf("%s:%d: %s", p.name, line, fmt.Sprintf(format, args...))
}

// document returns the one value in the file.
func (p *parser) document(text []byte) (*yaml.Node, error) {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc, second yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, p.errorf(1, "empty: want the keys allow and deny, or {} to deny everything")
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

func (p *parser) mapping(n *yaml.Node) error {
	if n.Kind != yaml.MappingNode {
		return p.errorf(n.Line, "want the keys allow and deny, got %s", describe(n))
	}
	lines := make(map[string]int)
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode || key.Value != "allow" && key.Value != "deny" {
			return p.errorf(key.Line, "unknown key %s: want allow or deny", describe(key))
		}
		if before, ok := lines[key.Value]; ok {
			return p.errorf(key.Line, "%s again: want one, the first is in line %d", key.Value, before)
		}
		lines[key.Value] = key.Line
		if err := p.list(key.Value, value); err != nil {
			return err
		}
	}
	return nil
}

func (p *parser) list(key string, n *yaml.Node) error {
	if n.Kind != yaml.SequenceNode {
		return p.errorf(n.Line, "%s: want a list of actions, got %s", key, describe(n))
	}
	for _, item := range n.Content {
		if err := p.item(key, item); err != nil {
			return err
		}
	}
	return nil
}

func (p *parser) item(key string, n *yaml.Node) error {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
		return p.errorf(n.Line, "%s: want the name of an action, got %s", key, describe(n))
	}
	a, err := imds.ParseAction(n.Value)
	if err != nil {
		return p.errorf(n.Line, "%s: %v: want one of %s", key, err, actions(key))
	}
	if before, ok := p.seen[a]; ok {
		return p.errorf(n.Line, "%s: %s is already in %s in line %d: want it in one place", key, a, before.key, before.line)
	}
	p.seen[a] = listing{key, n.Line}
	switch {
	case key == "deny":
		p.deny(a, strconv.Itoa(n.Line))
	case a == imds.Unknown:
		return p.errorf(n.Line, "allow: %s", neverKnown)
	default:
		p.allow(a, strconv.Itoa(n.Line))
	}
	return nil
}

// actions lists what a key can have.
func actions(key string) string {
	var names []string
	for _, a := range imds.Actions() {
		if key == "deny" || a != imds.Unknown {
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
	return strconv.Quote(n.Value)
}
