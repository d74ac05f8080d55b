package policy_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
)

func compile(t testing.TB, text []byte) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("schema.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// plainValue is a YAML value as JSON has it. It reports false for what JSON lacks.
func plainValue(n *yaml.Node) (v any, ok bool) {
	switch n.Kind {
	case yaml.DocumentNode:
		return plainValue(n.Content[0])
	case yaml.SequenceNode:
		list := []any{}
		for _, c := range n.Content {
			x, ok := plainValue(c)
			if !ok {
				return nil, false
			}
			list = append(list, x)
		}
		return list, true
	case yaml.MappingNode:
		m := make(map[string]any)
		for i := 0; i < len(n.Content); i += 2 {
			x, ok := plainValue(n.Content[i+1])
			if !ok || n.Content[i].Kind != yaml.ScalarNode {
				return nil, false
			}
			m[n.Content[i].Value] = x
		}
		return m, true
	case yaml.ScalarNode:
		if n.Tag == "!!str" || n.Tag == "!!timestamp" {
			return n.Value, true
		}
		return v, n.Decode(&v) == nil
	}
	return nil, false
}

// schemaAccepts reports whether a text is one document of YAML, and then whether a
// schema accepts it.
func schemaAccepts(s *jsonschema.Schema, text string) (isYAML bool, err error) {
	dec := yaml.NewDecoder(strings.NewReader(text))
	var n, second yaml.Node
	if dec.Decode(&n) != nil || !errors.Is(dec.Decode(&second), io.EOF) {
		return false, nil
	}
	v, ok := plainValue(&n)
	if !ok {
		return false, nil
	}
	return true, s.Validate(v)
}

// parserOnly is what a schema cannot see: what its $comment says, and the messages
// that mean it.
var parserOnly = map[string]*regexp.Regexp{
	"two rules of one name":                                         regexp.MustCompile(`is the name of the rule in line`),
	"an action in both allow and deny of the file":                  regexp.MustCompile(`is in allow, too`),
	"keys given twice":                                              regexp.MustCompile(` again: want one|labels: ".*" again: want it once`),
	"aliases and a second document":                                 regexp.MustCompile(`second document|an alias`),
	"subtrees with keys that the instance document does not have":   regexp.MustCompile(`: subtree: subtree "`),
	"identities' resource ids in detail":                            regexp.MustCompile(`: identity: ms?i_res_id "`),
	"texts of more than 1024 bytes where some letters have several": regexp.MustCompile(` of 1 to 1024 bytes, got `),
	"names of more than one line or of more than 128 bytes":         regexp.MustCompile(`name: want one line`),
	"keys of labels that are not texts":                             regexp.MustCompile(`want the key of a label|labels: want texts, got "<<"`),
}

// hold compares parser and schema about one text, and returns the kind of trouble
// that the parser alone saw.
func hold(t *testing.T, s *jsonschema.Schema, text string, parseErr error) (alone string) {
	t.Helper()
	isYAML, schemaErr := schemaAccepts(s, text)
	if !isYAML {
		if parseErr == nil {
			t.Errorf("the parser accepts what is no document: %s", text)
		}
		return ""
	}
	switch {
	case parseErr == nil && schemaErr != nil:
		t.Errorf("the parser accepts, the schema does not: %v\n%s", schemaErr, text)
	case parseErr != nil && schemaErr == nil:
		for what, message := range parserOnly {
			if message.MatchString(parseErr.Error()) {
				return what
			}
		}
		t.Errorf("the schema accepts, and the parser says %v\n%s", parseErr, text)
	}
	return ""
}

func TestSchemaAgreesWithTheParser(t *testing.T) {
	s := compile(t, policy.Schema())
	seen := make(map[string]bool)
	check := func(text string) {
		t.Helper()
		_, err := policy.Parse("p.yaml", []byte(text))
		seen[hold(t, s, text, err)] = true
	}
	for _, text := range right {
		check(text)
	}
	for _, tc := range wrong {
		check(tc.text)
	}
	for _, text := range []string{aRule("name: " + strings.Repeat("é", 100)), aRule("resource: " + strings.Repeat("é", 1000)), aRule("identity: {msi_res_id: /a/b/c/d/e/f/g/h}"),
		"rules: [{name: &client_id x, allow: [identity.token], identity: {*client_id : x}}]"} {
		check(text)
	}
	accepted, refused := 0, 0
	for seed := range uint64(1200) {
		g := newGen(seed)
		text := g.policy().text()
		check(text)
		changed := g.mutated(text)
		check(changed)
		if isYAML, err := schemaAccepts(s, changed); isYAML && err == nil {
			accepted++
		} else {
			refused++
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("of mutations %d are accepted, %d refused", accepted, refused)
	if accepted < 100 || refused < 500 {
		t.Error("the generator is broken")
	}
	var comment struct {
		Comment string `json:"$comment"`
	}
	if err := json.Unmarshal(policy.Schema(), &comment); err != nil {
		t.Fatal(err)
	}
	for what := range parserOnly {
		if !strings.Contains(comment.Comment, what) {
			t.Errorf("$comment does not list %q", what)
		}
		if !seen[what] && what != "aliases and a second document" { // which a schema is never shown
			t.Errorf("no text shows that the parser alone refuses %s", what)
		}
	}
}

// mutated changes one thing somewhere in a document.
func (g gen) mutated(text string) string {
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		panic(err)
	}
	var change func(v any) any
	strange := func() any {
		return pick[any](g, nil, true, 7, "", "x", "*", "a?", []any{}, []any{"x"}, []any{""}, map[string]any{}, map[string]any{"x": "y"}, "enforce", "default", "identity.token", []any{"identity.token"},
			[]any{"unknown"}, "compute/tags", []any{"instance.read", "instance.read"}, strings.Repeat("*a", 9), digestA, map[string]any{"client_id": idA}, map[string]any{"client_id": "00000000-0000-0000-0000-000000000000"}, map[string]any{"msi_res_id": armID})
	}
	change = func(v any) any {
		switch v := v.(type) {
		case map[string]any:
			names := slices.Sorted(maps.Keys(v))
			if len(names) == 0 || g.one(4) {
				v[pick(g, "name", "mode", "match", "allow", "deny", "resource", "subtree", "identity", "api-version", "proof", "shared", "labels", "rules", "digest", "x")] = strange()
				return v
			}
			name := pick(g, names...)
			if g.one(5) {
				delete(v, name)
				return v
			}
			v[name] = change(v[name])
			return v
		case []any:
			if len(v) == 0 || g.one(5) {
				return append(v, strange())
			}
			if g.one(6) {
				return v[1:]
			}
			i := g.IntN(len(v))
			v[i] = change(v[i])
			return v
		}
		return strange()
	}
	b, err := json.Marshal(change(v))
	if err != nil {
		panic(err)
	}
	return string(b)
}

// Every action that there is can be written in an editor that knows the schema.
func TestSchemaHasEveryAction(t *testing.T) {
	s := compile(t, policy.Schema())
	for _, a := range imds.Actions() {
		for _, key := range []string{"allow", "deny"} {
			_, err := schemaAccepts(s, fmt.Sprintf("%s: [%s]", key, a))
			if want := key == "deny" || a != imds.Unknown; (err == nil) != want {
				t.Errorf("%s: [%s]: got %v", key, a, err)
			}
		}
	}
}

func TestCasesSchemaAgreesWithTheParser(t *testing.T) {
	s := compile(t, policy.CasesSchema())
	check := func(text string) {
		t.Helper()
		_, err := policy.ParseCases("c.yaml", []byte(text))
		hold(t, s, text, err)
	}
	for _, tc := range wrongCases {
		check(tc.text)
	}
	good := aCase("identity: default, rule: x, without: [compute]")
	check(good)
	check(ofWorkload("image: x, digest: x, labels: {a: '', b: 1, c: true}, image-labels: {}, compose: {project: a, service: b}, kubernetes: {namespace: x, service-account: y, labels: {}}, proof: none, members: [{name: x}]"))
	if _, err := policy.ParseCases("c.yaml", []byte(good)); err != nil {
		t.Error(err)
	}
}

func TestSchemasAreTheCallers(t *testing.T) {
	for name, schema := range map[string]func() []byte{"policy": policy.Schema, "cases": policy.CasesSchema} {
		b := schema()
		if b[0] = 'x'; schema()[0] != '{' {
			t.Errorf("%s: the schema itself was changed", name)
		}
	}
}
