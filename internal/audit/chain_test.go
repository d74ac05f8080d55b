package audit_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/audit"
)

// The formula of docs/audit.md, worked out here by hand.
func TestChainIsWhatTheDocumentSays(t *testing.T) {
	var buf bytes.Buffer
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	l := &audit.Log{Version: "1.2.3", Now: func() time.Time { return now }}
	written(t, l, audit.NewStream(&buf), full(), audit.Event{}, full())
	prev := make([]byte, 32)
	lines := strings.Split(strings.TrimSuffix(buf.String(), "\n"), "\n")
	for i, line := range lines {
		text, rest, ok := strings.Cut(line, `,"chain":"`)
		sum := sha256.Sum256(append(bytes.Clone(prev), text...))
		if !ok || rest != hex.EncodeToString(sum[:])+`"}` {
			t.Fatalf("line %d: got %q, want chain %x", i+1, line, sum)
		}
		prev = sum[:]
		var got audit.Line
		if err := json.Unmarshal([]byte(line), &got); err != nil || got.Seq != uint64(i+1) {
			t.Errorf("line %d: got seq %d (%v)", i+1, got.Seq, err)
		}
	}
	if len(lines) != 4 || l.Head().Seq != 4 || l.Head().Sum != [32]byte(prev) {
		t.Errorf("got head %v after %d lines, want 4:%x", l.Head(), len(lines), prev)
	}
	var s audit.Start
	dec := json.NewDecoder(strings.NewReader(lines[0]))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		t.Fatal(err)
	}
	if b, err := hex.DecodeString(s.Run); err != nil || len(b) != 16 {
		t.Errorf("got run %q, want 32 hexadecimal digits", s.Run)
	}
	want := audit.Start{Type: "start", Time: now, Version: "1.2.3", Run: s.Run, Why: audit.New, Prev: strings.Repeat("0", 64), Seq: 1, Chain: s.Chain}
	if d := cmp.Diff(want, s); d != "" {
		t.Errorf("start (-want +got)\n%s", d)
	}
}

func TestHeadIsReadAsWritten(t *testing.T) {
	h := audit.Head{Seq: 18446744073709551615, Sum: sha256.Sum256([]byte("x"))}
	if got, err := audit.ParseHead(h.String()); err != nil || got != h {
		t.Errorf("got %v (%v), want %v", got, err, h)
	}
	sum := strings.Repeat("a", 64)
	for name, text := range map[string]string{
		"nothing": "", "no_number": ":" + sum, "no_chain": "7", "short_chain": "7:" + sum[2:], "long_chain": "7:" + sum + "aa",
		"record_0": "0:" + sum, "below_0": "-1:" + sum, "too_large": "18446744073709551616:" + sum, "not_hexadecimal": "7:" + sum[1:] + "g",
	} {
		t.Run(name, func(t *testing.T) {
			if h, err := audit.ParseHead(text); err == nil {
				t.Errorf("got %v, want an error", h)
			}
		})
	}
}

var errFull = errors.New("no space left")

// picky takes lines as its script says: -1 as a whole, else so many bytes.
type picky struct {
	bytes.Buffer
	script []int
}

func (p *picky) Write(b []byte) (int, error) {
	if len(p.script) == 0 {
		return p.Buffer.Write(b)
	}
	n := p.script[0]
	p.script = p.script[1:]
	if n < 0 {
		return p.Buffer.Write(b)
	}
	p.Buffer.Write(b[:min(n, len(b))])
	return min(n, len(b)), errFull
}

// What is lost is said by the next record, and the chain is whole all the same.
func TestLostLinesAreSaidInTheChain(t *testing.T) {
	const whole = -1
	for name, tc := range map[string]struct {
		script  []int // of the writes: the start record, then events
		lost    uint64
		torn    int
		records uint64
	}{
		"one_not_written":         {[]int{whole, whole, 0}, 1, 0, 5},
		"two_in_a_row":            {[]int{whole, 0, 0}, 2, 0, 4},
		"no_start_at_first":       {[]int{0, 0, 0}, 3, 0, 3},
		"half_a_line":             {[]int{whole, whole, 20}, 1, 1, 6},
		"half_a_start":            {[]int{20}, 1, 1, 5},
		"half_twice":              {[]int{whole, whole, 20, 30}, 2, 2, 5},
		"all_but_the_newline":     {[]int{whole, whole, len(eventLines(t, full())) - 1}, 1, 0, 7},
		"the_last":                {[]int{whole, whole, whole, whole, whole, 0}, 1, 0, 6},
		"the_last_torn":           {[]int{whole, whole, whole, whole, whole, 9}, 1, 1, 7},
		"newline_alone_after_one": {[]int{whole, whole, 20, 1}, 2, 1, 5},
	} {
		t.Run(name, func(t *testing.T) {
			w := &picky{script: tc.script}
			var told []error
			l := &audit.Log{Report: func(err error) { told = append(told, err) }}
			written(t, l, audit.NewStream(w), full(), full(), full(), full(), full())
			got, err := audit.Verify([]audit.Part{{Name: "x", R: bytes.NewReader(w.Bytes())}}, audit.Check{})
			if err != nil {
				t.Fatalf("%v in\n%s", err, w)
			}
			if got.Lost != tc.lost || len(got.Torn) != tc.torn || got.Records != tc.records || l.Lost() != tc.lost {
				t.Errorf("got %d lost (%d counted), torn %v, %d records; want %d, %d, %d in\n%s", got.Lost, l.Lost(), got.Torn, got.Records, tc.lost, tc.torn, tc.records, w)
			}
			if len(told) != 2 || !errors.Is(told[0], errFull) || told[1] != nil {
				t.Errorf("was told %v, want the loss, once, and that it is over", told)
			}
		})
	}
}
