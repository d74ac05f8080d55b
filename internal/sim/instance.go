package sim

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// extendedSince is the first api-version of extended=true
// (docs/protocol-azure.md §1.3).
const extendedSince = "2021-08-01"

func (s *Server) versions(*call) reply {
	return okJSON(map[string][]string{"apiVersions": s.vm.Versions})
}

// instance walks the tree of docs/protocol-azure.md §1.6.
func (s *Server) instance(c *call) reply {
	format := c.query["format"]
	if format != "" && format != "json" && format != "text" {
		return badRequest(general, "Format is invalid")
	}
	tree, ok := s.tree(c)
	if !ok {
		return failure(general, http.StatusNotFound)
	}
	v, ok := s.walk(tree, c.path[len(instanceRoot):])
	if !ok {
		return failure(general, http.StatusNotFound)
	}
	text, node := listing(v)
	switch {
	case format == "text":
		return reply{status: http.StatusOK, ctype: textType, body: []byte(text)}
	case node:
		return okJSON(v)
	default:
		return badRequest(general, "Leaf nodes need format=text")
	}
}

// tree is the instance as the request's version shows it. With extended=true
// the service answers in full or not at all, so it is false then while the
// fault "partial" holds (docs/protocol-azure.md §1.3).
func (s *Server) tree(c *call) (map[string]any, bool) {
	tree := s.trees[c.version]
	extended := c.query["extended"] == "true" && c.version >= extendedSince
	if c.faults.partial {
		return withoutLateParts(tree), !extended
	}
	if extended && s.vm.Extended != nil {
		tree = maps.Clone(tree)
		tree["extended"] = s.vm.Extended
	}
	return tree, true
}

// withoutLateParts is what a VM can see of itself early in its boot: no network
// interfaces and no keys.
func withoutLateParts(tree map[string]any) map[string]any {
	tree = maps.Clone(tree)
	if compute, ok := tree["compute"].(map[string]any); ok && compute["publicKeys"] != nil {
		compute = maps.Clone(compute)
		compute["publicKeys"] = []any{}
		tree["compute"] = compute
	}
	tree["network"] = map[string]any{"interface": []any{}}
	return tree
}

// walk follows keys and array indexes, separated by slashes; rest is "" or
// starts with one.
func (s *Server) walk(v any, rest string) (any, bool) {
	if rest == "" {
		return v, true
	}
	for segment := range strings.SplitSeq(rest[1:], "/") {
		var ok bool
		switch node := v.(type) {
		case map[string]any:
			v, ok = s.child(node, segment)
		case []any:
			// Digits only: Atoi would take "+0" and "00" as well.
			i, err := strconv.Atoi(segment)
			if ok = err == nil && i >= 0 && i < len(node) && strconv.Itoa(i) == segment; ok {
				v = node[i]
			}
		}
		if !ok {
			return nil, false
		}
	}
	return v, true
}

func (s *Server) child(node map[string]any, name string) (any, bool) {
	if v, ok := node[name]; ok || !s.anyCase {
		return v, ok
	}
	for key, v := range node {
		if strings.EqualFold(key, name) {
			return v, true
		}
	}
	return nil, false
}

// listing is the text form of a value: of a node the names of its children, one
// a line, nodes with a slash behind, no line end after the last; of a leaf the
// value itself. It reports whether v is a node.
func listing(v any) (string, bool) {
	var lines []string
	switch v := v.(type) {
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			lines = append(lines, name+slash(v[name]))
		}
	case []any:
		for i := range v {
			lines = append(lines, strconv.Itoa(i)+slash(v[i]))
		}
	default:
		return fmt.Sprint(v), false
	}
	return strings.Join(lines, "\n"), true
}

func slash(v any) string {
	switch v.(type) {
	case map[string]any, []any:
		return "/"
	}
	return ""
}
