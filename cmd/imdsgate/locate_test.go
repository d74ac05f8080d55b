package main

import (
	"strings"
	"testing"
)

func TestLocateRefuses(t *testing.T) {
	for _, tc := range []struct {
		name string
		args []string
		code int
		want string // how stderr begins
	}{
		{"label_and_name", []string{"--label", "a", "--name", "b"}, exitUsage, "imdsgate: --label and --name exclude each other\nhint: "},
		{"empty_label", []string{"--label", ""}, exitUsage, "imdsgate: --label, --name: want a text\nhint: "},
		{"two_forms", []string{"--json", "--export", "sh"}, exitUsage, "imdsgate: --env-file, --export and --json exclude each other\nhint: "},
		{"empty_file_name", []string{"--env-file", ""}, exitUsage, "imdsgate: --env-file: want the path of a file\nhint: "},
		{"unknown_shell", []string{"--export", "fish"}, exitUsage, `imdsgate: --export "fish": want sh or powershell` + "\nhint: "},
		{"watch_and_wait", []string{"--watch", "--wait", "3s"}, exitUsage, "imdsgate: --watch waits by itself: leave out --wait\nhint: "},
		{"negative_wait", []string{"--wait", "-3s"}, exitUsage, "imdsgate: --wait -3s: want a time that is not negative\nhint: "},
		{"stray_argument", []string{"proxy"}, exitUsage, `imdsgate: locate: unexpected argument "proxy"` + "\nhint: "},
		{"no_engine", []string{"--engine", "tcp://127.0.0.1:1"}, exitFailure, "imdsgate: locate: container engine: "},
		{"no_engine_for_a_while", []string{"--engine", "tcp://127.0.0.1:1", "--wait", "10ms"}, exitFailure, "imdsgate: locate: waited for 10ms: container engine: "},
		{"engine_is_nonsense", []string{"--engine", "nonsense"}, exitFailure, "imdsgate: locate: container engine: "},
		{"engine_is_nonsense_watch", []string{"--engine", "nonsense", "--watch"}, exitFailure, "imdsgate: locate: container engine: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, out, errs := called(t, nil, append([]string{"locate"}, tc.args...)...)
			if code != tc.code || out != "" || !strings.HasPrefix(errs, tc.want) || !strings.Contains(errs, "\nhint: ") {
				t.Errorf("got code %d, stdout %q, stderr\n%s\nwant code %d, and\n%s", code, out, errs, tc.code, tc.want)
			}
		})
	}
}
