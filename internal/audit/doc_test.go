package audit_test

import (
	"fmt"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/audit"
)

// section is what a document has under a heading, up to the next of its level.
func section(t *testing.T, doc, heading string) string {
	t.Helper()
	_, text, ok := strings.Cut(doc, "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("no heading %q", heading)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	return text
}

// jsonNames are those of a struct, in their order, with a mark for what can be left out.
func jsonNames(typ reflect.Type) (names []string) {
	for f := range typ.Fields() {
		if f.Anonymous {
			names = append(names, jsonNames(f.Type)...)
			continue
		}
		name, opts, _ := strings.Cut(f.Tag.Get("json"), ",")
		names = append(names, fmt.Sprint(name, " ", opts == "omitempty" || opts == "omitzero"))
	}
	return names
}

var fieldRow = regexp.MustCompile("(?m)^\\| `(\\w+)` \\| (–?) ?\\|")

// docs/audit.md names every field there is, and no other.
func TestDocumentNamesTheFields(t *testing.T) {
	b, err := os.ReadFile("../../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	for heading, typ := range map[string]reflect.Type{
		"Fields of an event": reflect.TypeFor[audit.Line](), "Fields of a start record": reflect.TypeFor[audit.Start](),
	} {
		var got []string
		for _, m := range fieldRow.FindAllStringSubmatch(section(t, string(b), heading), -1) {
			got = append(got, fmt.Sprint(m[1], " ", m[2] == "–"))
		}
		if d := cmp.Diff(jsonNames(typ), got); d != "" {
			t.Errorf("%s: (-code +document), true: can be left out\n%s", heading, d)
		}
	}
}

// Its example is a record that is whole, with the head that it shows.
func TestDocumentShowsARecord(t *testing.T) {
	b, err := os.ReadFile("../../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "```json\n")
	text, _, _ = strings.Cut(text, "```")
	s, err := verifyText(text, audit.Check{})
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("ok: %d records, seq 1–%d, head %v\n", s.Records, s.Head.Seq, s.Head)
	if !strings.Contains(section(t, string(b), "Check a record"), want) {
		t.Errorf("the document does not show %s", want)
	}
}
