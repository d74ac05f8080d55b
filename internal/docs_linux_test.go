package internal_test

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"imdsgate/internal/audit"
	"imdsgate/internal/discover"
	"imdsgate/internal/policy"
)

var fence = regexp.MustCompile("(?ms)^```(yaml|json)\n(.*?)^```$")

// TestExamplesAreRead has the program read the files and lines that the README
// shows: what people copy from it must work.
func TestExamplesAreRead(t *testing.T) {
	read := make(map[string]int)
	for _, m := range fence.FindAllStringSubmatch(string(repository(t)["README.md"].Data), -1) {
		kind, text := m[1], m[2]
		name, _, _ := strings.Cut(strings.TrimPrefix(text, "# "), "\n")
		var err error
		switch {
		case name == "workloads.yaml":
			_, err = discover.ParseStatic(name, []byte(text))
		case name == "policy.yaml":
			_, err = policy.Parse(name, []byte(text))
		case kind == "json":
			name = "audit line"
			dec := json.NewDecoder(strings.NewReader(text))
			dec.DisallowUnknownFields()
			err = dec.Decode(new(audit.Event))
		default:
			t.Errorf("an example of which nobody knows what it is: %.40q", text)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		read[name]++
	}
	for _, name := range []string{"workloads.yaml", "policy.yaml", "audit line"} {
		if read[name] == 0 {
			t.Errorf("README.md shows no %s", name)
		}
	}
}
