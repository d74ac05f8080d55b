package internal_test

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

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
		case name == "policy.yaml" || name == "policy/policy.yaml, readable by everybody":
			_, err = policy.Parse(name, []byte(text))
		case name == "compose.mine.yaml":
			err = overrides(text)
		case kind == "json":
			name = "audit line"
			dec := json.NewDecoder(strings.NewReader(text))
			dec.DisallowUnknownFields()
			err = dec.Decode(new(audit.Line))
		default:
			t.Errorf("an example of which nobody knows what it is: %.40q", text)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		read[name]++
	}
	for _, name := range []string{"workloads.yaml", "policy.yaml", "compose.mine.yaml", "audit line"} {
		if read[name] == 0 {
			t.Errorf("README.md shows no %s", name)
		}
	}
}

// overrides checks that a file for Compose changes nothing but command and volumes
// of services that are there, and keeps their subcommand.
func overrides(text string) error {
	type service struct {
		Command []string
		Volumes []any
	}
	var ours struct{ Services map[string]service }
	b, err := os.ReadFile("../deploy/docker/compose.yaml")
	if err != nil {
		return err
	}
	if err := yaml.Unmarshal(b, &ours); err != nil {
		return err
	}
	var theirs struct{ Services map[string]service }
	dec := yaml.NewDecoder(strings.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(&theirs); err != nil {
		return err
	}
	for name, s := range theirs.Services {
		if have, ok := ours.Services[name]; !ok || len(s.Command) == 0 || s.Command[0] != have.Command[0] {
			return fmt.Errorf("service %q, command %q: compose.yaml has %q", name, s.Command, have.Command)
		}
	}
	return nil
}
