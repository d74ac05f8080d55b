package audit_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/audit"
)

func names(t *testing.T, dir string) (got []string) {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		got = append(got, e.Name())
	}
	return got
}

func TestFilesAreRotated(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit")
	const size, keep = 2000, 3
	l := run(t, path, size, keep, 30)
	if d := cmp.Diff([]string{"audit", "audit.1", "audit.2", "audit.3"}, names(t, dir)); d != "" {
		t.Fatalf("(-want +got)\n%s", d)
	}
	s, err := verifyFiles(t, path+".1", path, path+".3", path+".2") // in any order
	if err != nil || s.Head != l.Head() || s.First <= 1 || s.Records != s.Head.Seq-s.First+1 || s.Chains != 1 {
		t.Errorf("got %+v (%v), want one chain up to %v", s, err, l.Head())
	}
	for _, name := range names(t, dir) {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || st.Size() > size || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: got %d bytes, mode %v (%v)", name, st.Size(), st.Mode(), err)
		}
		if _, err := verifyFiles(t, filepath.Join(dir, name)); err != nil {
			t.Errorf("by itself: %v", err)
		}
	}
	if _, err := verifyFiles(t, path+".3", path+".1", path); err == nil || !strings.Contains(err.Error(), "missing before it") {
		t.Errorf("without one of them: got %v, want that records are missing", err)
	}
}

// A crash between two renames, or between rename and open, loses nothing.
func TestRotationGoesOnAfterACrash(t *testing.T) {
	for name, tc := range map[string]struct{ from, to string }{
		"before_the_last_rename": {"audit.1", "audit.2"}, "before_the_new_file": {"audit", "audit.1"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "audit")
			run(t, path, 0, 5, 3)
			if tc.from == "audit.1" {
				if err := os.Rename(path, path+".1"); err != nil {
					t.Fatal(err)
				}
				run(t, path, 0, 5, 2)
			}
			if err := os.Rename(filepath.Join(dir, tc.from), filepath.Join(dir, tc.to)); err != nil {
				t.Fatal(err)
			}
			run(t, path, 900, 5, 4)
			all, err := filepath.Glob(path + "*")
			if err != nil {
				t.Fatal(err)
			}
			s, err := verifyFiles(t, all...)
			if err != nil || s.First != 1 || s.Chains != 1 {
				t.Errorf("got %+v (%v) of %v, want one chain from 1", s, err, all)
			}
		})
	}
}

func TestRotationThatFailsLosesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit")
	if err := os.MkdirAll(path+".1/full", 0o700); err != nil { // no file can take its place
		t.Fatal(err)
	}
	var told []error
	f, err := audit.OpenFile(path, 600, 1, func(err error) { told = append(told, err) })
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	written(t, &audit.Log{Report: func(err error) { t.Error(err) }}, f, make([]audit.Event, 8)...)
	whole(t, 9, path)
	if len(told) == 0 {
		t.Error("nobody was told")
	}
}

// A file whose first line was cut off still has its place among the others.
func TestFirstLineOfAFileIsTorn(t *testing.T) {
	line := eventLines(t, audit.Event{})
	for name, torn := range map[string]string{"short": line[:50], "long": strings.Repeat("x", 100<<10)} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "audit")
			run(t, path, 0, 1, 3)
			if err := os.Rename(path, path+".1"); err != nil {
				t.Fatal(err)
			}
			appendTo(t, path, torn)
			run(t, path, 0, 1, 2)
			for _, order := range [][]string{{path, path + ".1"}, {path + ".1", path}} {
				if s := whole(t, 7, order...); len(s.Torn) != 1 {
					t.Errorf("got torn %v, want one", s.Torn)
				}
			}
		})
	}
}
