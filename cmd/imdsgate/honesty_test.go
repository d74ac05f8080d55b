//go:build !forwardonly

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// words is a text without its line breaks and marks.
func words(s string) string {
	return strings.Join(strings.Fields(strings.NewReplacer("**", "", "> ", "").Replace(s)), " ")
}

// TestHonesty has the documents, and on Windows every help that it matters for, say
// what was run and what was not, in the same words.
func TestHonesty(t *testing.T) {
	for _, name := range []string{"README.md", "docs/windows.md"} {
		b, err := os.ReadFile(filepath.Join("../..", name))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(words(string(b)), words(honesty)) {
			t.Errorf("%s does not say:%s", name, honesty)
		}
	}
	for _, args := range [][]string{{"--help"}, {"forward", "--help"}, {"agent", "--help"}, {"service", "--help"}} {
		code, out, errs := called(t, nil, args...)
		switch {
		case runtime.GOOS != "windows" && args[0] == "service": // there is none
		case code != exitOK:
			t.Errorf("%q: %s", args, errs)
		case strings.Contains(words(out), words(honesty)) != (runtime.GOOS == "windows"):
			t.Errorf("%q on %s:\n%s", args, runtime.GOOS, out)
		}
	}
}

var dockerLine = regexp.MustCompile(`(?m)^(CMD|ENTRYPOINT) (\[.*\])$`)

// TestWindowsFiles has the program take what the files in deploy/windows give it.
func TestWindowsFiles(t *testing.T) {
	commands := make(map[string][]string)
	for _, name := range []string{"Dockerfile.nanoserver", "Dockerfile.servercore"} {
		for _, m := range dockerLine.FindAllSubmatch(windowsFile(t, name), -1) {
			var argv []string
			if err := json.Unmarshal(m[2], &argv); err != nil {
				t.Errorf("%s: %s: %v", name, m[0], err)
			}
			if string(m[1]) == "CMD" {
				commands[name] = argv
			}
		}
	}
	var compose struct {
		Services map[string]struct{ Command []string }
	}
	if err := yaml.Unmarshal(windowsFile(t, "compose.yaml"), &compose); err != nil {
		t.Fatal(err)
	}
	for _, service := range []string{"proxy", "forward"} {
		commands["compose.yaml "+service] = compose.Services[service].Command
	}
	var set struct {
		Spec struct {
			Template struct {
				Spec struct{ Containers []struct{ Args []string } }
			}
		}
	}
	if err := yaml.Unmarshal(windowsFile(t, "daemonset.yaml"), &set); err != nil || len(set.Spec.Template.Spec.Containers) != 1 {
		t.Fatalf("daemonset.yaml: %v, %+v", err, set)
	}
	commands["daemonset.yaml"] = set.Spec.Template.Spec.Containers[0].Args
	for name, argv := range commands {
		cmd, rest, err := rootCmd(&env{ctx: t.Context()}).Find(argv)
		if err != nil || len(argv) == 0 || !slices.Contains([]string{"proxy", "forward"}, cmd.Name()) {
			t.Errorf("%s: %q: %v", name, argv, err)
		} else if err := cmd.ParseFlags(rest); err != nil {
			t.Errorf("%s: %q: %v", name, argv, err)
		}
	}
}

func windowsFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../deploy/windows", name))
	if err != nil {
		t.Fatal(err)
	}
	return bytes.ReplaceAll(b, []byte("\r\n"), []byte("\n"))
}
