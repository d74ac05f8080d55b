package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// TestEveryCommandHasExamples holds for those to come, too.
func TestEveryCommandHasExamples(t *testing.T) {
	var stdout, stderr bytes.Buffer
	e := &env{stdin: strings.NewReader(""), stdout: &stdout, stderr: &stderr, getenv: func(string) string { return "" }, ctx: t.Context()}
	root := rootCmd(e)
	for _, cmd := range append([]*cobra.Command{root}, root.Commands()...) {
		if cmd.Hidden {
			continue
		}
		stdout.Reset()
		args := strings.Fields(cmd.CommandPath())[1:]
		if code := run(e, append(args, "--help")); code != exitOK || stderr.Len() != 0 {
			t.Errorf("%s --help: got exit code %d, stderr %q", cmd.CommandPath(), code, stderr.String())
		}
		if !strings.Contains(stdout.String(), "\nExamples:\n  imdsgate ") {
			t.Errorf("%s --help: got no examples in\n%s", cmd.CommandPath(), stdout.String())
		}
		if cmd.Short == "" {
			t.Errorf("%s: got no short description", cmd.CommandPath())
		}
	}
}
