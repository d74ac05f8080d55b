package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// parseYAML reads the one document of a file. It returns nil for a file that
// holds nothing but comments.
func parseYAML(file string, data []byte) (*yaml.Node, error) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, nil
	} else if err != nil {
		return nil, syntaxError(file, err)
	}
	if err := dec.Decode(&second); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: want one YAML document, got several", file)
	}
	if len(doc.Content) == 0 || isNull(doc.Content[0]) {
		return nil, nil
	}
	return doc.Content[0], nil
}

// syntaxError gives the parser's "yaml: line 3: text" the form of all others.
func syntaxError(file string, err error) error {
	msg := strings.TrimPrefix(err.Error(), "yaml: ")
	if rest, ok := strings.CutPrefix(msg, "line "); ok {
		return fmt.Errorf("%s:%s", file, rest)
	}
	return fmt.Errorf("%s: %s", file, msg)
}

// merge lays over on base: mappings key by key, all else as a whole. Neither
// is changed.
func merge(base, over *yaml.Node) *yaml.Node {
	if base.Kind != yaml.MappingNode || over.Kind != yaml.MappingNode {
		return over
	}
	out := *base
	out.Line = over.Line
	out.Content = slices.Clone(base.Content)
	for i := 0; i+1 < len(over.Content); i += 2 {
		key, value := over.Content[i], over.Content[i+1]
		if j := find(&out, key.Value); j >= 0 {
			out.Content[j+1] = merge(out.Content[j+1], value)
		} else {
			out.Content = append(out.Content, key, value)
		}
	}
	return &out
}

// find is the index of a key in a mapping's content, or −1.
func find(m *yaml.Node, key string) int {
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == key {
			return i
		}
	}
	return -1
}

// reader turns YAML into values of a shape. Its errors say file, line, path and
// what was wanted.
type reader struct {
	file string

	// partial reads a file that is still to be laid over the default: nothing
	// in a mapping is filled in or missed.
	partial bool
}

func (r reader) errorf(n *yaml.Node, path, format string, args ...any) error {
	if path == "" {
		path = "file"
	}
	return fmt.Errorf("%s:%d: %s: %s", r.file, n.Line, path, fmt.Sprintf(format, args...))
}

func (r reader) read(s *shape, n *yaml.Node, path string) (any, error) {
	switch {
	case n.Kind == yaml.AliasNode:
		return nil, r.errorf(n, path, "want %s, got an alias; write the value out", s.kind)
	case s.kind == object && n.Kind == yaml.MappingNode:
		return r.object(s, n, path)
	case s.kind == list && n.Kind == yaml.SequenceNode:
		return r.list(s, n, path)
	case s.kind <= number && n.Kind == yaml.ScalarNode:
		return r.scalar(s.kind, n, path)
	default:
		return nil, r.errorf(n, path, "want %s, got %s", s.kind, describe(n))
	}
}

func (r reader) object(s *shape, n *yaml.Node, path string) (any, error) {
	out := make(map[string]any)
	lines := make(map[string]int)
	var errs []error
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		f := s.fields[key.Value]
		switch {
		case f == nil:
			errs = append(errs, r.errorf(key, path, "unknown key %q: want one of %s", key.Value, names(s.fields)))
			continue
		case lines[key.Value] > 0:
			errs = append(errs, r.errorf(key, path, "key %q a second time, after line %d", key.Value, lines[key.Value]))
			continue
		}
		lines[key.Value] = key.Line
		if isNull(value) {
			continue // taken away
		}
		v, err := r.read(f, value, join(path, key.Value))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out[key.Value] = v
	}
	errs = append(errs, r.fill(s, n, path, out, lines))
	return out, errors.Join(errs...)
}

// fill adds the empty values of fields that are not given; seen has the keys
// that are, also those that were taken away.
func (r reader) fill(s *shape, n *yaml.Node, path string, out map[string]any, seen map[string]int) error {
	if r.partial {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(s.fields)) {
		f := s.fields[name]
		switch {
		case f.required && out[name] == nil && seen[name] == 0, f.required && out[name] == "":
			return r.errorf(n, path, "key %q is missing", name)
		case f.required && out[name] == nil:
			return r.errorf(n, path, "key %q cannot be null", name)
		case seen[name] == 0 && !f.optional:
			out[name] = f.empty()
		}
	}
	return nil
}

func (r reader) list(s *shape, n *yaml.Node, path string) (any, error) {
	out := make([]any, len(n.Content))
	var errs []error
	// A list replaces the default's, so what is in it has to be complete.
	r.partial = false
	for i, c := range n.Content {
		at := fmt.Sprintf("%s[%d]", path, i)
		if isNull(c) {
			errs = append(errs, r.errorf(c, at, "want %s, got null", s.elem.kind))
			continue
		}
		var err error
		if out[i], err = r.read(s.elem, c, at); err != nil {
			errs = append(errs, err)
		}
	}
	return out, errors.Join(errs...)
}

func (r reader) scalar(k kind, n *yaml.Node, path string) (any, error) {
	switch k {
	case flag:
		if n.Tag == "!!bool" {
			return strings.EqualFold(n.Value, "true"), nil
		}
	case number:
		if i, err := strconv.Atoi(n.Value); n.Tag == "!!int" && err == nil {
			return i, nil
		}
	default:
		if n.Tag == "!!bool" {
			return strings.ToLower(n.Value), nil
		}
		return n.Value, nil
	}
	return nil, r.errorf(n, path, "want %s, got %s", k, describe(n))
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

func describe(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case isNull(n):
		return "null"
	default:
		return strconv.Quote(n.Value)
	}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func names(f fields) string { return strings.Join(slices.Sorted(maps.Keys(f)), ", ") }
