package audit_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"imdsgate/internal/audit"
)

func openFile(t *testing.T, path string, size int64, keep int) *audit.File {
	t.Helper()
	f, err := audit.OpenFile(path, size, keep, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// run is what one process writes to a file between its start and its end.
func run(t *testing.T, path string, size int64, keep, events int) *audit.Log {
	t.Helper()
	f, l := openFile(t, path, size, keep), new(audit.Log)
	written(t, l, f, make([]audit.Event, events)...)
	f.Close()
	return l
}

func verifyFiles(t *testing.T, paths ...string) (audit.Summary, error) {
	t.Helper()
	var parts []audit.Part
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, audit.Part{Name: filepath.Base(p), R: bytes.NewReader(b)})
	}
	return audit.Verify(parts, audit.Check{})
}

// whole wants the files to hold one chain, of so many records.
func whole(t *testing.T, records uint64, paths ...string) audit.Summary {
	t.Helper()
	s, err := verifyFiles(t, paths...)
	if err != nil || s.Records != records || s.First != 1 || s.Head.Seq != records {
		t.Errorf("got records %d–%d (%d in all), %v; want 1–%d", s.First, s.Head.Seq, s.Records, err, records)
	}
	return s
}

func appendTo(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.WriteString(f, text); err != nil {
		t.Fatal(err)
	}
}

func TestChainGoesOnWhereTheFileEnds(t *testing.T) {
	line := eventLines(t, audit.Event{})
	for name, tc := range map[string]struct {
		between func(t *testing.T, path string)
		records uint64
		torn    int
	}{
		"restart":            {func(*testing.T, string) {}, 8, 0},
		"torn_by_a_crash":    {func(t *testing.T, p string) { appendTo(t, p, line[:50]) }, 8, 1},
		"torn_twice":         {func(t *testing.T, p string) { appendTo(t, p, line[:50]+"\n"+line[:9]) }, 8, 2},
		"torn_with_its_end":  {func(t *testing.T, p string) { appendTo(t, p, line[:50]+"\n") }, 8, 1},
		"torn_in_a_chain":    {func(t *testing.T, p string) { appendTo(t, p, line[:len(line)-10]) }, 8, 1},
		"newline_is_missing": {chop, 8, 0},
		"started_without_an_event": {func(t *testing.T, p string) {
			run(t, p, 0, 1, 0)
		}, 8, 0},
		"long_torn_line": {func(t *testing.T, p string) { appendTo(t, p, strings.Repeat("x", 200<<10)) }, 8, 1},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "audit")
			first := run(t, path, 0, 1, 3)
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			tc.between(t, path)
			second := run(t, path, 0, 1, 3)
			after, err := os.ReadFile(path)
			if err != nil || !bytes.HasPrefix(after, before) {
				t.Errorf("%v: what was there was changed:\n%s\nnow\n%s", err, before, after)
			}
			s := whole(t, tc.records, path)
			if len(s.Torn) != tc.torn || s.Head != second.Head() || first.Head().Seq != 4 {
				t.Errorf("got torn %v, head %v; want %d and head %v", s.Torn, s.Head, tc.torn, second.Head())
			}
		})
	}
}

// chop takes the last byte away, as a crash in the middle of a write does.
func chop(t *testing.T, path string) {
	st, err := os.Stat(path)
	if err == nil {
		err = os.Truncate(path, st.Size()-1)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// What was put into a file by others is not explained away as torn.
func TestOthersLinesAreFound(t *testing.T) {
	for name, text := range map[string]string{
		"event_without_a_chain": `{"decision":"allow"}` + "\n", "unterminated": `{"decision":"allow"}`,
		"event_behind_a_torn_line": "{\"time\"\n" + `{"decision":"allow"}` + "\n", "event_before_a_torn_line": `{"decision":"allow"}` + "\n{\"ti",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "audit")
			run(t, path, 0, 1, 1)
			appendTo(t, path, text)
			run(t, path, 0, 1, 1)
			var b *audit.Broken
			if s, err := verifyFiles(t, path); !errors.As(err, &b) || b.Line != 3 {
				t.Errorf("got %v (%v), want line 3 to be found", s, err)
			}
		})
	}
}

// A file from before there was a chain stays what it is, and is said to have none.
func TestOlderFileHasNoChain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit")
	appendTo(t, path, `{"time":"2030-01-02T02:04:05Z","id":1,"decision":"allow"}`+"\n")
	run(t, path, 0, 1, 1)
	_, err := verifyFiles(t, path)
	if b, e := os.ReadFile(path); e != nil || !strings.Contains(string(b), `"why":"new","prev":"000`) {
		t.Errorf("%v: got %s, want that a chain is new here", e, b)
	}
	if want := "audit:1: carries no chain: it was written by an older version, or put in"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// What logrotate and people do to a file while it is written.
func TestFileIsFollowed(t *testing.T) {
	for name, tc := range map[string]struct {
		act   func(path string) error
		files []string
	}{
		"moved_away":           {func(p string) error { return os.Rename(p, p+".1") }, []string{"audit.1", "audit"}},
		"moved_and_made_anew":  {func(p string) error { return errors.Join(os.Rename(p, p+"-2030"), os.WriteFile(p, nil, 0o600)) }, []string{"audit-2030", "audit"}},
		"copied_and_truncated": {func(p string) error { return errors.Join(copyFile(p, p+".1"), os.Truncate(p, 0)) }, []string{"audit.1", "audit"}},
		"replaced_by_a_copy":   {func(p string) error { return errors.Join(copyFile(p, p+".x"), os.Rename(p+".x", p)) }, []string{"audit"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "audit")
			f, l := openFile(t, path, 0, 1), new(audit.Log)
			written(t, l, f, full(), full())
			if err := tc.act(path); err != nil {
				t.Fatal(err)
			}
			written(t, l, f, full(), full())
			for i, n := range tc.files {
				tc.files[i] = filepath.Join(dir, n)
			}
			whole(t, 6, tc.files...)
			if l.Lost() != 0 {
				t.Errorf("lost %d", l.Lost())
			}
		})
	}
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o600)
}

// In a planned restart two proxies write for some seconds, into one file.
func TestTwoProcessesWriteOneChain(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit")
	const each = 150
	done := make(chan error, 2)
	for i := range 2 {
		f := openFile(t, path, 20<<10, 50)
		go func() {
			l := &audit.Log{}
			for range each {
				e := full()
				e.Conn = uint64(i)
				written(t, l, f, e)
			}
			if l.Lost() > 0 {
				done <- fmt.Errorf("process %d lost %d", i, l.Lost())
				return
			}
			done <- nil
		}()
	}
	if err := errors.Join(<-done, <-done); err != nil {
		t.Fatal(err)
	}
	all, err := filepath.Glob(path + "*")
	if err != nil || len(all) < 3 {
		t.Fatalf("got %v (%v), want several files", all, err)
	}
	s, err := verifyFiles(t, all...)
	if err != nil || s.First != 1 || s.Chains != 1 {
		t.Fatalf("got %+v (%v), want one chain", s, err)
	}
	n := 0
	for _, p := range all {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		n += strings.Count(string(b), `"decision"`)
	}
	if n != 2*each {
		t.Errorf("got %d events, want %d", n, 2*each)
	}
}

func TestFileThatComesAndGoes(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "audit")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	f, l := openFile(t, path, 0, 1), new(audit.Log)
	written(t, l, f, full())
	if err := os.Rename(filepath.Dir(path), filepath.Join(dir, "away")); err != nil {
		t.Fatal(err)
	}
	written(t, l, f, full(), full())
	if l.Lost() != 2 {
		t.Errorf("lost %d, want 2: there is no folder", l.Lost())
	}
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	written(t, l, f, full())
	if s := whole(t, 4, filepath.Join(dir, "away", "audit"), path); s.Lost != 2 {
		t.Errorf("the chain says that %d are lost, want 2", s.Lost)
	}
}
