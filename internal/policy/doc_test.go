package policy_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
)

func document(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// section is what the document has under a heading, up to the next of any level.
func section(t *testing.T, heading string) string {
	t.Helper()
	_, text, ok := strings.Cut(document(t), "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("no heading %q", heading)
	}
	text, _, _ = strings.Cut(text, "\n#")
	return text
}

var (
	fence = regexp.MustCompile("(?ms)^```yaml\n# (\\S+)\n(.*?)^```$")
	row   = regexp.MustCompile("(?m)^\\| `([\\w.-]+)` \\| (.*) \\|$")
	code  = regexp.MustCompile("`([^`]+)`")
)

// TestDocumentedPolicyPassesItsCases has docs/policy.md's policy answer its cases.
func TestDocumentedPolicyPassesItsCases(t *testing.T) {
	files := make(map[string]string)
	for _, m := range fence.FindAllStringSubmatch(document(t), -1) {
		files[m[1]] = m[2]
	}
	if got := slices.Sorted(maps.Keys(files)); !slices.Equal(got, []string{"cases.yaml", "policy.yaml"}) {
		t.Fatalf("the document shows %v", got)
	}
	p, err := policy.Parse("policy.yaml", []byte(files["policy.yaml"]))
	if err != nil {
		t.Fatal(err)
	}
	if found := p.Check(nil); len(found) > 0 {
		t.Errorf("policy check finds %v", found)
	}
	cases, err := policy.ParseCases("cases.yaml", []byte(files["cases.yaml"]))
	if err != nil {
		t.Fatal(err)
	}
	s := new(policy.Current).Set(p)
	for _, c := range cases {
		if r := c.Run(s, imds.Azure); !r.OK {
			t.Errorf("%s: %s", c.Name, r.Wrong)
		}
	}
}

// The document names every key there is, and no other.
func TestDocumentNamesTheKeys(t *testing.T) {
	type object struct {
		Properties map[string]any `json:"properties"`
	}
	var schema struct {
		object
		Defs map[string]object `json:"$defs"`
	}
	if err := json.Unmarshal(policy.Schema(), &schema); err != nil {
		t.Fatal(err)
	}
	for heading, keys := range map[string]map[string]any{"Keys of the file": schema.Properties, "Keys of a rule": schema.Defs["rule"].Properties, "Keys of match": schema.Defs["match"].Properties} {
		var got []string
		for _, m := range row.FindAllStringSubmatch(section(t, heading), -1) {
			got = append(got, m[1])
		}
		slices.Sort(got)
		if d := cmp.Diff(slices.Sorted(maps.Keys(keys)), got); d != "" {
			t.Errorf("%s: (-schema +document)\n%s", heading, d)
		}
	}
}

// The document has every action, in order, with all it stands for.
func TestDocumentNamesTheActions(t *testing.T) {
	var got, want []string
	for _, a := range imds.Actions() {
		want = append(want, fmt.Sprint(a, " ", imds.Paths(imds.Azure, a)))
	}
	for _, m := range row.FindAllStringSubmatch(section(t, "Actions"), -1) {
		var paths []string
		for _, p := range code.FindAllStringSubmatch(m[2], -1) {
			paths = append(paths, p[1])
		}
		got = append(got, fmt.Sprint(m[1], " ", paths))
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-code +document)\n%s", d)
	}
	_, secrets, _ := strings.Cut(section(t, "Actions"), "Secrets are ")
	secrets, _, _ = strings.Cut(secrets, ". More")
	for _, a := range imds.Actions() {
		if listed := strings.Contains(secrets, "`"+string(a)+"`"); listed != (a.Secret() && a != imds.Unknown) {
			t.Errorf("%s is listed as a secret: %v", a, listed)
		}
	}
}

// The document names every kind of finding.
func TestDocumentNamesTheFindings(t *testing.T) {
	text := section(t, "The commands")
	for _, kind := range []string{policy.FindingUnreachable, policy.FindingUnmatched, policy.FindingSecret, policy.FindingAnyIdentity, policy.FindingAnyResource, policy.FindingMode} {
		if !strings.Contains(text, "`"+kind+"`") {
			t.Errorf("there is no %s", kind)
		}
	}
}
