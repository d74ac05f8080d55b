package internal_test

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"unicode"
)

// walk calls f with every file of the repository, by its path from the root with
// slashes. What is not ours is left out: packages of other languages, results.
func walk(t *testing.T, f func(name string)) {
	t.Helper()
	err := filepath.WalkDir("..", func(name string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case !e.IsDir():
			f(strings.TrimPrefix(filepath.ToSlash(name), "../"))
		case slices.Contains([]string{".git", "node_modules", "bin", "build"}, e.Name()):
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// repository is every document and test file, and the names of all others.
func repository(t *testing.T) fstest.MapFS {
	t.Helper()
	files := make(fstest.MapFS)
	walk(t, func(name string) {
		files[name] = &fstest.MapFile{}
		if !strings.HasSuffix(name, ".md") && !strings.HasSuffix(name, "_test.go") {
			return
		}
		b, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		files[name].Data = b
	})
	return files
}

var (
	link    = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ +(.+?) *$`)
	named   = regexp.MustCompile("`((?:Test|Fuzz)[A-Z]\\w*)(?:/([^`]+))?`")
)

// untrue lists what the documents say of the repository and is not so: links to
// files and headings, and tests by their names, that are not there.
func untrue(files fstest.MapFS) (lines []string) {
	for name, f := range files {
		if !strings.HasSuffix(name, ".md") {
			continue
		}
		text := string(f.Data)
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if why := brokenLink(files, name, m[1]); why != "" {
				lines = append(lines, fmt.Sprintf("%s: link %s: %s", name, m[1], why))
			}
		}
		for _, m := range named.FindAllStringSubmatch(text, -1) {
			if !hasTest(files, m[1], m[2]) {
				lines = append(lines, fmt.Sprintf("%s: there is no test %s", name, strings.Trim(m[0], "`")))
			}
		}
	}
	slices.Sort(lines)
	return lines
}

// brokenLink says what is wrong with a link, if it leads to this repository.
func brokenLink(files fstest.MapFS, from, to string) string {
	to, anchor, _ := strings.Cut(to, "#")
	if strings.Contains(to, ":") {
		return "" // another site
	}
	target := from
	if to != "" {
		target = path.Join(path.Dir(from), to)
	}
	if _, err := fs.Stat(files, target); err != nil {
		return "no such file"
	}
	if anchor == "" {
		return ""
	}
	for _, m := range heading.FindAllStringSubmatch(string(files[target].Data), -1) {
		if slug(m[1]) == anchor {
			return ""
		}
	}
	return "no such heading"
}

// slug is a heading's anchor, as GitHub makes it.
func slug(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsLetter(r) || unicode.IsDigit(r) || r == '-' || r == '_':
			return unicode.ToLower(r)
		case r == ' ':
			return '-'
		}
		return -1
	}, heading)
}

// hasTest reports whether there is such a test, and in its folder a row of that
// name, if one is given.
func hasTest(files fstest.MapFS, test, row string) bool {
	for name, f := range files {
		if !strings.HasSuffix(name, "_test.go") || !strings.Contains(string(f.Data), "\nfunc "+test+"(") {
			continue
		}
		if row == "" {
			return true
		}
		for other, f := range files {
			text := string(f.Data)
			if path.Dir(other) == path.Dir(name) && (strings.Contains(text, `"`+row+`"`) ||
				strings.Contains(text, `"`+strings.ReplaceAll(row, "_", " ")+`"`)) {
				return true
			}
		}
	}
	return false
}

func TestDocumentsAreTrue(t *testing.T) {
	for _, line := range untrue(repository(t)) {
		t.Error(line)
	}
}

// TestUntrueDocumentsAreFound has the check above find something.
func TestUntrueDocumentsAreFound(t *testing.T) {
	files := fstest.MapFS{
		"README.md": {Data: []byte("[a](docs/A.md) [b](docs/A.md#the-3-laws-in-brief) [c](#here) [web](https://example.test/x) [folder](docs)\n# Here\n" +
			"`TestOne` `TestOne/a_row` `FuzzTwo`")},
		"docs/A.md": {Data: []byte("# The 3 laws, in brief\n[up](../README.md)\n" +
			"[gone](B.md) [far](../C.md) [no heading](#laws) [nor there](../README.md#the-3-laws-in-brief) `TestThree` `TestOne/no_row`")},
		"internal/x/x_test.go": {Data: []byte("package x\n\nfunc TestOne(t *testing.T) {\n\trun(\"a row\")\n}\n\nfunc FuzzTwo(f *testing.F) {}\n")},
	}
	want := []string{
		"docs/A.md: link #laws: no such heading",
		"docs/A.md: link ../C.md: no such file",
		"docs/A.md: link ../README.md#the-3-laws-in-brief: no such heading",
		"docs/A.md: link B.md: no such file",
		"docs/A.md: there is no test TestOne/no_row",
		"docs/A.md: there is no test TestThree",
	}
	got := untrue(files)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
