package audit_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"imdsgate/internal/audit"
)

// record is the chain of one run, with so many events, in lines.
func record(events int) []string {
	var buf bytes.Buffer
	runNow(&audit.Log{Out: audit.NewStream(&buf)}, events)
	return slices.Collect(strings.Lines(buf.String()))
}

// runNow records so many events and returns when they are written.
func runNow(l *audit.Log, events int) {
	for i := range events {
		e := full()
		e.ID = uint64(i + 1)
		if err := l.Record(e); err != nil {
			panic(err)
		}
	}
	l.Run(canceled)
}

func verifyText(text string, c audit.Check) (audit.Summary, error) {
	return audit.Verify([]audit.Part{{Name: "f", R: strings.NewReader(text)}}, c)
}

// wrongs are ways to tamper with a record of ten lines, and what is said of it.
var wrongs = map[string]struct {
	tamper func(lines []string) []string
	want   string
}{
	"a_decision_was_changed": {func(l []string) []string {
		l[4] = strings.Replace(l[4], `"decision":"allow"`, `"decision":"deny"`, 1)
		return l
	}, "f:5: record 5 was changed"},
	"one_bit_was_changed": {func(l []string) []string { l[6] = l[6][:30] + string(l[6][30]^1) + l[6][31:]; return l }, "f:7: record 7 was changed"},
	"a_chain_value_was_changed": {func(l []string) []string {
		l[6] = strings.Replace(l[6], `"chain":"`+chainOf(l[6])[:1], `"chain":"`+other(chainOf(l[6])[:1]), 1)
		return l
	}, "f:7: record 7 was changed"},
	"the_last_chain_value_was_changed": {func(l []string) []string {
		l[9] = strings.Replace(l[9], chainOf(l[9]), chainOf(l[8]), 1)
		return l
	}, "f:10: record 10 was changed"},
	"a_chain_value_in_capitals": {func(l []string) []string {
		l[6] = strings.Replace(l[6], chainOf(l[6]), strings.ToUpper(chainOf(l[6])), 1)
		return l
	}, "f:7: carries no chain: it was written by an older version, or put in"},
	"a_seq_was_changed":       {func(l []string) []string { l[6] = strings.Replace(l[6], `"seq":7`, `"seq":8`, 1); return l }, "f:7: record 7 is missing before it"},
	"the_version_was_changed": {func(l []string) []string { l[0] = strings.Replace(l[0], `"version":""`, `"version":"1"`, 1); return l }, "f:1: record 1 was changed"},
	"one_was_removed":         {func(l []string) []string { return slices.Delete(l, 4, 5) }, "f:5: record 5 is missing before it"},
	"three_were_removed":      {func(l []string) []string { return slices.Delete(l, 6, 9) }, "f:7: records 7–9 are missing before it"},
	"the_first_was_removed":   {func(l []string) []string { return l[1:] }, "f:1: record 2 is the first here and no start record: what came before was cut off"},
	"one_was_removed_and_the_rest_renumbered": {func(l []string) []string {
		l = slices.Delete(l, 4, 5)
		for i := 4; i < len(l); i++ {
			l[i] = strings.Replace(l[i], fmt.Sprintf(`"seq":%d,`, i+2), fmt.Sprintf(`"seq":%d,`, i+1), 1)
		}
		return l
	}, "f:5: record 5 was changed"},
	"one_was_put_in": {func(l []string) []string { return slices.Insert(l, 5, `{"decision":"allow"}`+"\n") },
		"f:6: carries no chain: it was written by an older version, or put in"},
	"one_was_put_in_with_a_number": {func(l []string) []string {
		return slices.Insert(l, 5, strings.Replace(l[5], `"id":5`, `"id":6`, 1))
	}, "f:6: record 6 was changed"},
	"one_is_there_twice":        {func(l []string) []string { return slices.Insert(l, 5, l[4]) }, "f:6: record 5 comes after record 5: out of order, or put in"},
	"two_were_swapped":          {func(l []string) []string { l[4], l[5] = l[5], l[4]; return l }, "f:5: record 6 comes before record 5: out of order"},
	"one_was_moved_to_the_end":  {func(l []string) []string { return append(slices.Delete(slices.Clone(l), 3, 4), l[3]) }, "f:4: record 5 comes before record 4: out of order"},
	"a_line_is_torn":            {func(l []string) []string { l[4] = l[4][:40] + "\n"; return l }, "f:5: is no record"},
	"the_last_line_is_torn":     {func(l []string) []string { l[9] = l[9][:40]; return l }, "f:10: was not written to its end"},
	"the_last_newline_is_gone":  {func(l []string) []string { l[9] = strings.TrimSuffix(l[9], "\n"); return l }, "f:10: has no newline: it was cut, or is being written"},
	"two_lines_in_one":          {func(l []string) []string { l[4] = strings.TrimSuffix(l[4], "\n"); return l }, "f:5: is no record"},
	"an_empty_line":             {func(l []string) []string { return slices.Insert(l, 4, "\n") }, "f:5: is no record"},
	"carriage_returns":          {func(l []string) []string { l[4] = strings.Replace(l[4], "\n", "\r\n", 1); return l }, "f:5: carries no chain: it was written by an older version, or put in"},
	"a_space_behind":            {func(l []string) []string { l[4] = strings.Replace(l[4], "\n", " \n", 1); return l }, "f:5: carries no chain: it was written by an older version, or put in"},
	"a_chain_starts_anew":       {func(l []string) []string { return append(l, record(3)...) }, "f:11: a chain starts anew: what came before may have been cut off"},
	"the_rest_of_another_chain": {func(l []string) []string { return append(l[:5], record(9)[5:]...) }, "f:6: record 6 was changed"},
	"nothing":                   {func([]string) []string { return nil }, "f: there are no records"},
	"a_line_without_end":        {func(l []string) []string { return append(l, strings.Repeat("x", 2<<20)+"\n") }, "f:11: is longer than any record"},
	"older_lines": {func(l []string) []string {
		for i := range l {
			l[i], _, _ = strings.Cut(l[i], `,"seq"`)
			l[i] += "}\n"
		}
		return l[1:]
	}, "f:1: carries no chain: it was written by an older version, or put in"},
}

// chainOf is the chain value of a line.
func chainOf(line string) string {
	return strings.TrimSuffix(strings.TrimSpace(line), `"}`)[len(strings.TrimSpace(line))-2-64:]
}

// other is another digit.
func other(digit string) string {
	if digit == "0" {
		return "1"
	}
	return "0"
}

func TestTamperingIsFound(t *testing.T) {
	for name, tc := range wrongs {
		t.Run(name, func(t *testing.T) {
			lines := record(9)
			if s, err := verifyText(strings.Join(lines, ""), audit.Check{}); err != nil || s.Records != 10 {
				t.Fatalf("before: %+v, %v", s, err)
			}
			_, err := verifyText(strings.Join(tc.tamper(lines), ""), audit.Check{})
			var b *audit.Broken
			if !errors.As(err, &b) || err.Error() != tc.want {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

// A chain has no secret, and its end can be cut off without a trace: but not when
// a head is known.
func TestHeadIsHeldAgainstTheRecord(t *testing.T) {
	lines := record(9)
	head := func(line string, seq uint64) *audit.Head {
		h, err := audit.ParseHead(fmt.Sprintf("%d:%s", seq, chainOf(line)))
		if err != nil {
			t.Fatal(err)
		}
		return &h
	}
	if _, err := verifyText(strings.Join(lines[:7], ""), audit.Check{}); err != nil {
		t.Errorf("cut, and no head is known: got %v, want nothing", err)
	}
	foreign := record(9)
	for name, tc := range map[string]struct {
		lines []string
		check audit.Check
		want  string
	}{
		"the_last":                 {lines, audit.Check{Head: head(lines[9], 10)}, ""},
		"it_has_grown_since":       {lines, audit.Check{Head: head(lines[5], 6)}, ""},
		"the_start":                {lines, audit.Check{Head: head(lines[0], 1)}, ""},
		"the_end_was_cut_off":      {lines[:7], audit.Check{Head: head(lines[9], 10)}, "f:7: the chain ends at record 7, but once had 10: the rest was cut off"},
		"the_chain_was_replaced":   {foreign, audit.Check{Head: head(lines[5], 6)}, "f:6: record 6 is not the one that is known: the chain was written anew"},
		"another_restart":          {slices.Concat(lines, foreign), audit.Check{Head: head(lines[5], 6), Restarts: true}, ""},
		"no_restart_has_it":        {slices.Concat(foreign, foreign), audit.Check{Head: head(lines[5], 6), Restarts: true}, "f:20: record 6, which is known, is not here: these begin at 1"},
		"the_last_restart_is_gone": {lines[:3], audit.Check{Head: head(foreign[3], 4), Restarts: true}, "f:3: the chain ends at record 3, but once had 4: the rest was cut off"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := verifyText(strings.Join(tc.lines, ""), tc.check)
			if got := fmt.Sprint(err); got != tc.want && (tc.want != "" || err != nil) {
				t.Errorf("got %+v, %v; want %s", s, err, tc.want)
			}
		})
	}
}

func TestRestartsAreChainsOfTheirOwn(t *testing.T) {
	text := strings.Join(slices.Concat(record(2), record(1), record(4)), "")
	s, err := verifyText(text, audit.Check{Restarts: true})
	if err != nil || s.Chains != 3 || s.Records != 10 || s.Head.Seq != 5 {
		t.Errorf("got %+v (%v), want 10 records of 3 chains", s, err)
	}
	if _, err := verifyText(strings.Replace(text, `"seq":5,`, `"seq":6,`, 1), audit.Check{Restarts: true}); err == nil {
		t.Error("a changed number was not found")
	}
}

// A torn line is explained by a start record that knows it, and by no other.
func TestTornLineIsSealedToo(t *testing.T) {
	w := &picky{script: []int{-1, -1, 30}}
	l := &audit.Log{Out: audit.NewStream(w)}
	runNow(l, 4)
	text := w.String()
	s, err := verifyText(text, audit.Check{})
	if err != nil || len(s.Torn) != 1 || s.Torn[0].String() != "f:3" {
		t.Fatalf("got %+v (%v), want a torn line at f:3", s, err)
	}
	lines := strings.SplitAfter(text, "\n")
	for name, tampered := range map[string]string{
		"changed":  strings.Replace(text, lines[2], "X"+lines[2][1:], 1),
		"longer":   strings.Replace(text, lines[2], lines[2]+lines[2], 1),
		"removed":  strings.Replace(text, lines[2], "", 1),
		"replaced": strings.Replace(text, lines[2], `{"decision":"allow"}`+"\n", 1),
		"swapped":  strings.Replace(text, lines[1]+lines[2], lines[2]+lines[1], 1),
	} {
		t.Run(name, func(t *testing.T) {
			if s, err := verifyText(tampered, audit.Check{}); err == nil {
				t.Errorf("got %+v, want it to be found in\n%s", s, tampered)
			}
		})
	}
}

// sealed is a line as somebody would forge it: with the right hash.
func sealed(prev [32]byte, text string) string {
	return fmt.Sprintf("%s,\"chain\":\"%x\"}\n", text, sha256.Sum256(append(prev[:], text...)))
}

// Start records that no run writes, and those that do not belong here, though each
// is whole by itself.
func TestForgedStarts(t *testing.T) {
	lines := record(3)
	head, err := audit.ParseHead("4:" + chainOf(lines[3]))
	if err != nil {
		t.Fatal(err)
	}
	start := func(prev [32]byte, why, more string, seq int) string {
		return sealed(prev, fmt.Sprintf(`{"type":"start","why":"%s","prev":"%x"%s,"seq":%d`, why, prev, more, seq))
	}
	last, none, foreign := head.Sum, [32]byte{}, [32]byte{7}
	for name, tc := range map[string]struct{ line, want string }{
		"as_it_should_be":      {start(last, "continued", "", 5), ""},
		"of_another_chain":     {start(foreign, "continued", "", 5), "record 5 does not go on from record 4: one of them was replaced"},
		"behind_a_gap":         {start(last, "continued", "", 7), "records 5–6 are missing before it"},
		"again":                {start(last, "continued", "", 4), "record 4 comes after record 4: out of order, or put in"},
		"new":                  {start(none, "new", "", 1), "a chain starts anew: what came before may have been cut off"},
		"new_with_a_number":    {start(none, "new", "", 5), "is no start record"},
		"new_from_before":      {start(last, "new", "", 5), "is no start record"},
		"continued_from_none":  {start(none, "continued", "", 1), "is no start record"},
		"first_from_before":    {start(last, "continued", "", 1), "is no start record"},
		"torn_without_a_sum":   {start(last, "torn", "", 5), "is no start record"},
		"sum_without_torn":     {start(last, "continued", `,"torn":"00"`, 5), "is no start record"},
		"torn_line_is_missing": {start(last, "torn", `,"torn":"00"`, 5), "the torn line that was before it is not there"},
		"not_its_prev":         {sealed(last, fmt.Sprintf(`{"type":"start","why":"continued","prev":"%x","seq":5`, foreign)), "record 5 was changed"},
		"prev_in_capitals":     {sealed(last, fmt.Sprintf(`{"type":"start","why":"continued","prev":"%X","seq":5`, last)), "is no start record"},
		"short_prev":           {sealed(last, `{"type":"start","why":"continued","prev":"00","seq":5`), "is no start record"},
		"prev_is_no_text":      {sealed(last, `{"type":"start","why":"continued","prev":7,"seq":5`), "is no start record"},
		"not_json":             {sealed(last, `{"type":"start",]`+`,"seq":5`), "was not written to its end"},
		"seq_0":                {sealed(last, `{"type":"start","seq":0`), "carries no chain: it was written by an older version, or put in"},
		"seq_with_a_zero":      {sealed(last, `{"id":1,"seq":05`), "was not written to its end"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := verifyText(strings.Join(lines, "")+tc.line, audit.Check{})
			if want := "f:5: " + tc.want; tc.want == "" && err != nil || tc.want != "" && (err == nil || err.Error() != want) {
				t.Errorf("got %v, want %s", err, want)
			}
		})
	}
}

func TestErrorOfReading(t *testing.T) {
	bad := errors.New("bad disk")
	text := strings.Join(record(40), "")
	for name, r := range map[string]io.Reader{
		"at_once": iotest.ErrReader(bad), "later": io.MultiReader(strings.NewReader(text[:len(text)/2]), iotest.ErrReader(bad)),
	} {
		t.Run(name, func(t *testing.T) {
			var b *audit.Broken
			if _, err := audit.Verify([]audit.Part{{Name: "f", R: r}}, audit.Check{}); !errors.Is(err, bad) || errors.As(err, &b) {
				t.Errorf("got %v, want the reader's error", err)
			}
		})
	}
}

// FuzzVerify changes one byte of a record that is whole, or has it read anything:
// no change is accepted.
func FuzzVerify(f *testing.F) {
	w := &picky{script: []int{-1, -1, 30, 5}}
	runNow(&audit.Log{Out: audit.NewStream(w)}, 4)
	good := w.Bytes()
	f.Add(5, byte('x'), []byte(nil))
	f.Add(len(good)-1, byte('\r'), []byte(`{"type":"start","seq":1,"chain":""}`))
	f.Add(0, byte(' '), []byte(strings.Join(record(1), "")))
	f.Add(0, byte('{'), good)
	f.Fuzz(func(t *testing.T, at int, to byte, text []byte) {
		bad := bytes.Clone(good)
		i := int(uint(at) % uint(len(bad)))
		bad[i] = to
		if _, err := verifyText(string(bad), audit.Check{}); (err == nil) != bytes.Equal(bad, good) {
			t.Errorf("byte %d is %q instead of %q: %v", i, to, good[i], err)
		}
		for cut := range 2 { // behind a record that is whole, only records can stand
			all := append(bytes.Clone(good[cut*len(good):]), text...)
			s, err := audit.Verify([]audit.Part{{Name: "f", R: bytes.NewReader(all)}}, audit.Check{Restarts: true})
			if lines := bytes.Count(all, []byte("\n")); err == nil && s.Records+uint64(len(s.Torn)) != uint64(lines) {
				t.Errorf("%d records and %d torn lines of %d are accepted", s.Records, len(s.Torn), lines)
			}
		}
	})
}
