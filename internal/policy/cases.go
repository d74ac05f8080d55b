package policy

import (
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"imdsgate/internal/imds"
	"imdsgate/internal/workload"
)

// Case is one question to a policy, and the answer that is wanted.
type Case struct {
	Name     string
	Line     int
	Workload workload.Workload
	Proof    workload.Proof // Listener if the file says nothing
	Method   string
	Target   string

	Want     string   // allow, deny or refuse: the request is not a proper one
	Identity string   // as Effective says it; empty: of no concern
	Rule     string   // the name of the rule that decides; empty: of no concern
	Without  []string // actions and subtrees that go from the answer; nil: of no concern
	Only     []string // subtrees that alone are left; nil: all, if Without is given
}

// Result is what came of a case. Wrong is empty if all was as wanted.
type Result struct {
	Case        string      `json:"case"`
	Line        int         `json:"line"`
	OK          bool        `json:"ok"`
	Wrong       string      `json:"wrong,omitempty"`
	Explanation Explanation `json:"explanation"`
}

// Run asks the snapshot. A request that is refused whoever sends it decides as
// "refuse".
func (c *Case) Run(s *Snapshot, cloud imds.Cloud) Result {
	out := Result{Case: c.Name, Line: c.Line}
	out.Explanation = s.ExplainTarget(&c.Workload, c.Proof, cloud, c.Method, c.Target)
	out.Wrong = c.compare(&out.Explanation)
	out.OK = out.Wrong == ""
	return out
}

func (c *Case) compare(e *Explanation) string {
	var wrong []string
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if e.Decision != c.Want {
		say("got %s, want %s", e.Decision, c.Want)
	}
	if c.Identity != "" && !strings.EqualFold(e.Identity, c.Identity) {
		say("got identity %q, want %q", e.Identity, c.Identity)
	}
	if c.Rule != "" && !strings.HasSuffix(e.Rule, fmt.Sprintf(" %q", c.Rule)) {
		say("got rule %s, want %q", e.Rule, c.Rule)
	}
	if only := slices.Sorted(slices.Values(e.Keep)); (c.Without != nil || c.Only != nil) && !slices.Equal(only, c.Only) {
		say("got only %v of the answer, want only %v", only, c.Only)
	}
	if c.Without != nil {
		got := append([]string{}, e.Drop...)
		for _, a := range e.Without {
			got = append(got, string(a))
		}
		slices.Sort(got)
		if !slices.Equal(got, c.Without) {
			say("got an answer without %v, want without %v", got, c.Without)
		}
	}
	if len(wrong) > 0 {
		say("%s", e.Reason)
	}
	return strings.Join(wrong, "; ")
}

// ParseCases reads a file of cases, as strictly as Parse. The form is
//
//	cases:
//	  - name: web reads its vault
//	    workload: {name: web, compose: {project: shop, service: web}}
//	    request: GET /metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net
//	    want: allow
//	    identity: client_id=11111111-2222-3333-4444-555555555555
func ParseCases(name string, text []byte) ([]Case, error) {
	p := &parser{name: name}
	root, err := p.document(text, "the key cases")
	if err != nil {
		return nil, err
	}
	var cases []Case
	read := func(n *yaml.Node) error {
		c, err := p.testCase(n)
		cases = append(cases, c)
		return err
	}
	lines, err := p.mapping("cases file", root, []field{{"cases", func(n *yaml.Node) error { return p.list("cases", "cases", n, read) }}})
	switch {
	case err != nil:
		return nil, err
	case len(lines) == 0 || len(cases) == 0:
		return nil, p.errorf(root.Line, "cases: want at least one: a test of nothing proves nothing")
	}
	return cases, nil
}

func (p *parser) testCase(n *yaml.Node) (Case, error) {
	c := Case{Line: n.Line, Proof: workload.Listener}
	text := func(key, want string, to *string) field {
		return field{key, func(n *yaml.Node) (err error) { *to, err = p.text(key, want, n); return err }}
	}
	lines, err := p.mapping("case", n, []field{
		text("name", "a text", &c.Name),
		{"workload", func(n *yaml.Node) error { return p.workload(&c, &c.Workload, n, true) }},
		{"request", func(n *yaml.Node) error { return p.request(&c, n) }},
		{"want", func(n *yaml.Node) error {
			if c.Want = n.Value; n.Kind != yaml.ScalarNode || c.Want != "allow" && c.Want != "deny" && c.Want != "refuse" {
				return p.errorf(n.Line, "want: want allow, deny or refuse, got %s", describe(n))
			}
			return nil
		}},
		text("identity", "client_id=…, object_id=…, msi_res_id=… or default", &c.Identity),
		text("rule", "the name of a rule", &c.Rule),
		{"without", func(n *yaml.Node) error {
			c.Without = []string{}
			return p.parts("without", "an action or a subtree", &c.Without, n)
		}},
		{"only", func(n *yaml.Node) error {
			c.Only = []string{}
			return p.parts("only", "a subtree", &c.Only, n)
		}},
	})
	if err != nil {
		return c, err
	}
	for _, key := range []string{"name", "workload", "request", "want"} {
		if _, ok := lines[key]; !ok {
			return c, p.errorf(n.Line, "case: want the key %s", key)
		}
	}
	slices.Sort(c.Without)
	return c, nil
}

// parts reads a list of subtrees, and of actions where those can be. A subtree is
// all that it covers.
func (p *parser) parts(key, want string, to *[]string, n *yaml.Node) error {
	return p.list(key, "parts of an answer", n, func(n *yaml.Node) error {
		s, err := p.text(key, want, n)
		if err != nil {
			return err
		}
		if _, err := imds.ParseAction(s); err == nil && key == "without" {
			*to = append(*to, s)
			return nil
		}
		paths, err := imds.ParseSubtree(s)
		if err != nil {
			return p.errorf(n.Line, "%s: %v", key, err)
		}
		*to = append(*to, paths...)
		slices.Sort(*to)
		*to = slices.Compact(*to)
		return nil
	})
}

// request is a method and a target, as in the first line of a request.
func (p *parser) request(c *Case, n *yaml.Node) error {
	s, err := p.text("request", "a method and a path", n)
	if err != nil {
		return err
	}
	var ok bool
	c.Method, c.Target, ok = strings.Cut(s, " ")
	if !ok || strings.Contains(c.Target, " ") || !strings.HasPrefix(c.Target, "/") {
		return p.errorf(n.Line, "request: want a method and a path, like GET /metadata/instance?api-version=2021-02-01, got %s", describe(n))
	}
	return nil
}

// workload reads the description of a workload; only the outermost has a proof
// and members.
func (p *parser) workload(c *Case, w *workload.Workload, n *yaml.Node, outermost bool) error {
	text := func(key string, to *string) field {
		return field{key, func(n *yaml.Node) (err error) { *to, err = p.text(key, "a text", n); return err }}
	}
	labels := func(key string, to *map[string]string) field {
		return field{key, func(n *yaml.Node) error { return p.plainLabels(key, to, n) }}
	}
	var pod workload.Pod
	var project, service string
	fields := []field{
		text("name", &w.Name), text("image", &w.Image), text("digest", &w.ImageID),
		labels("labels", &w.Labels), labels("image-labels", &w.ImageLabels),
		{"compose", func(n *yaml.Node) error {
			_, err := p.mapping("compose", n, []field{text("project", &project), text("service", &service)})
			if err == nil && (project == "" || service == "") {
				err = p.errorf(n.Line, "compose: want both project and service")
			}
			return err
		}},
		{"kubernetes", func(n *yaml.Node) error {
			w.Pod = &pod
			_, err := p.mapping("kubernetes", n, []field{text("namespace", &pod.Namespace), text("service-account", &pod.ServiceAccount), labels("labels", &pod.Labels)})
			return err
		}},
	}
	if outermost {
		fields = append(fields, field{"proof", func(n *yaml.Node) (err error) {
			if c.Proof, err = workload.ParseProof(n.Value); n.Kind != yaml.ScalarNode || err != nil {
				return p.errorf(n.Line, "proof: want none, address, endpoint, cgroup or listener, got %s", describe(n))
			}
			return nil
		}}, field{"members", func(n *yaml.Node) error {
			return p.list("members", "workloads", n, func(n *yaml.Node) error {
				w.Members = append(w.Members, workload.Workload{})
				return p.workload(c, &w.Members[len(w.Members)-1], n, false)
			})
		}})
	}
	lines, err := p.mapping("workload", n, fields)
	if err != nil {
		return err
	}
	if _, named := lines["name"]; !named {
		return p.errorf(n.Line, "workload: want the key name")
	}
	if project != "" {
		if w.Labels == nil {
			w.Labels = make(map[string]string)
		}
		w.Labels[workload.ComposeProject], w.Labels[workload.ComposeService] = project, service
	}
	return nil
}

func (p *parser) plainLabels(what string, to *map[string]string, n *yaml.Node) error {
	if n.Kind != yaml.MappingNode {
		return p.errorf(n.Line, "%s: want a mapping of labels, got %s", what, describe(n))
	}
	if *to == nil {
		*to = make(map[string]string)
	}
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode || value.Kind != yaml.ScalarNode || key.Tag == "!!merge" || value.Tag == "!!null" {
			return p.errorf(key.Line, "%s: want texts, got %s: %s", what, describe(key), describe(value))
		}
		if _, ok := (*to)[key.Value]; ok {
			return p.errorf(key.Line, "%s: %q again: want it once", what, key.Value)
		}
		(*to)[key.Value] = value.Value
	}
	return nil
}
