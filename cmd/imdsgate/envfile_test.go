package main

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
)

func TestEnvFile(t *testing.T) {
	for _, tc := range []struct {
		name, text, value string
		missing           bool
		after             string // when it was set to 10.0.0.1
	}{
		{"empty", "", "", true, "A=10.0.0.1\n"},
		{"only", "A=1\n", "1", false, "A=10.0.0.1\n"},
		{"others_stay", "# A=0\nB=2\nA=1\nAA=3\n", "1", false, "# A=0\nB=2\nA=10.0.0.1\nAA=3\n"},
		{"last_counts_one_is_left", "A=1\nB=2\nA=3\n", "3", false, "A=10.0.0.1\nB=2\n"},
		{"no_final_newline", "B=2\nA=1", "1", false, "B=2\nA=10.0.0.1\n"},
		{"other_without_final_newline", "B=2", "", true, "B=2\nA=10.0.0.1\n"},
		{"windows_lines", "B=2\r\nA=1\r\n", "1", false, "B=2\r\nA=10.0.0.1\n"},
		{"quotes_are_part", "A=\"1\"\n", "\"1\"", false, "A=10.0.0.1\n"},
		{"no_spaces_before", " A=1\n", "", true, " A=1\nA=10.0.0.1\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "env")
			if err := os.WriteFile(path, []byte(tc.text), 0o640); err != nil {
				t.Fatal(err)
			}
			v, err := readEnvFile(path, "A")
			if v != tc.value || errors.Is(err, os.ErrNotExist) != tc.missing {
				t.Errorf("read %q, %v, want %q, missing %v", v, err, tc.value, tc.missing)
			}
			for range 2 { // the second changes nothing
				if err := writeEnvFile(path, "A", "10.0.0.1"); err != nil {
					t.Fatal(err)
				}
			}
			got, err := os.ReadFile(path)
			if err != nil || string(got) != tc.after {
				t.Errorf("wrote %q, %v, want %q", got, err, tc.after)
			}
			if st, err := os.Stat(path); err != nil || runtime.GOOS != "windows" && st.Mode().Perm() != 0o640 {
				t.Errorf("mode %v, %v, want as before", st.Mode(), err)
			}
		})
	}
}

// TestEnvFileIsReplaced reads while others write: never a part of the text.
func TestEnvFileIsReplaced(t *testing.T) {
	dir := t.TempDir()
	real, path := filepath.Join(dir, "real"), filepath.Join(dir, "link")
	if err := writeEnvFile(real, "A", "10.0.0.1"); err != nil { // a new file
		t.Fatal(err)
	}
	if err := os.Symlink(real, path); err != nil {
		path = real // not everywhere may everybody
	}
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := writeEnvFile(path, "A", []string{"10.0.0.1", "10.0.0.22"}[i%2]); err != nil && runtime.GOOS != "windows" {
				t.Error(err)
			}
		}
	})
	for range 2000 {
		if v, err := readEnvFile(path, "A"); err != nil && runtime.GOOS != "windows" || err == nil && v != "10.0.0.1" && v != "10.0.0.22" {
			t.Errorf("read %q, %v", v, err)
		}
	}
	close(stop)
	writer.Wait()
	if st, err := os.Lstat(real); err != nil || !st.Mode().IsRegular() {
		t.Errorf("%v, %v: the link's target was not written to", st, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
