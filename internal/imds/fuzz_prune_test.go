package imds

import (
	"bytes"
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// fuzzPlaces are requests for documents, and fuzzCuts what may be cut of them.
var (
	fuzzPlaces = []string{"", "/compute", "/compute/osProfile", "/compute/tagsList", "/network", "/network/interface/0", "/network/interface/0/ipv4/ipAddress"}
	fuzzCuts   = []string{"compute", "compute/name", "compute/osProfile", "compute/osProfile/adminUsername", "compute/tags", "compute/tagsList", "network",
		"network/interface", "network/interface/mac", "network/interface/macAddress", "network/interface/ipv4", "network/interface/ipv4/ipAddress/publicIpAddress"}
)

func chosen(bits uint16) (cuts []string) {
	for i, c := range fuzzCuts {
		if bits>>i&1 == 1 {
			cuts = append(cuts, c)
		}
	}
	return cuts
}

// FuzzPrune compares Prune with a slow reading of the same document by
// encoding/json, which has a path for every value.
func FuzzPrune(f *testing.F) {
	for i, s := range []string{
		vmBody, `{"COMPUTE":{"0":{"tag\u017f":[1,{"a":"}"}]},"tags":null},"x":-1.5e3 }`, `[{"macAddress":"a"},[{"mac":{}}],"b"]`,
		`{"compute":{"compute":{"name":1},"compute/name":2},"compute":3}`, `{"":{"compute":1}}`, `[]`, `"x"`, `{`, "",
	} {
		for _, place := range []uint8{0, uint8(i)} {
			f.Add([]byte(s), place, uint16(0), uint16(1<<i))
			f.Add([]byte(s), place, uint16(1<<i|2), uint16(1<<3))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte, place uint8, keep, drop uint16) {
		q := query(t, ask{target: instanceRoot + fuzzPlaces[int(place)%len(fuzzPlaces)]})
		c := Cut{Keep: chosen(keep), Drop: chosen(drop)}
		before := bytes.Clone(body)
		got, err := Prune(q, c, body)
		if !bytes.Equal(body, before) {
			t.Fatal("the argument was modified")
		}
		slow := slowCut{c}
		stays := slow.judge(q.Subtree)
		start := bytes.TrimLeft(body, " \t\r\n")
		isDocument := json.Valid(body) && (start[0] == '{' || start[0] == '[')
		switch {
		case stays == whole && !bytes.Equal(got, body):
			t.Fatalf("got %s, %v, want the body", got, err)
		case stays == whole:
			return
		case stays == gone || !isDocument:
			if err == nil {
				t.Fatalf("got %s, want an error", got)
			}
			return
		case err != nil:
			t.Fatal(err)
		}
		want := slow.prune(q.Subtree, readTree(t, body))
		if tree := readTree(t, got); !reflect.DeepEqual(tree, want) {
			t.Fatalf("%s of %s %+v:\ngot  %v\nwant %v", q.Subtree, body, c, tree, want)
		}
		if again, err := Prune(q, c, got); err != nil || !bytes.Equal(again, got) {
			t.Fatalf("a second time: got %s, %v, want %s", again, err, got)
		}
	})
}

// What a slow reader says of a path.
const (
	gone = iota
	partly
	whole
)

type slowCut struct{ Cut }

func (c slowCut) judge(path string) int {
	below := func(of string) func(string) bool { return func(s string) bool { return s != of && foldWithin(s, of) } }
	above := func(s string) bool { return foldWithin(path, s) }
	kept := len(c.Keep) == 0 || slices.ContainsFunc(c.Keep, above)
	switch {
	case slices.ContainsFunc(c.Drop, above):
		return gone
	case kept && !slices.ContainsFunc(c.Drop, below(path)):
		return whole
	case kept || slices.ContainsFunc(c.Keep, below(path)):
		return partly
	}
	return gone
}

// foldWithin folds letter case as Unicode does, and takes paths apart.
func foldWithin(subtree, of string) bool {
	a, b := strings.Split(subtree, "/"), strings.Split(of, "/")
	if subtree == "" {
		a = nil
	}
	if of == "" {
		b = nil
	}
	return len(a) >= len(b) && slices.EqualFunc(a[:len(b)], b, strings.EqualFold)
}

// member is a pair of an object; objects are slices of them, for their order and
// for duplicates.
type member struct {
	key   string
	value any
}

func (c slowCut) prune(path string, v any) any {
	judged := c.judge(path)
	switch v := v.(type) {
	case []member:
		if judged == gone {
			return []member{}
		} else if judged == whole {
			return v
		}
		out := make([]member, len(v))
		for i, m := range v {
			below := path
			if strings.Trim(m.key, "0123456789") != "" || m.key == "" {
				// A slash in a key does not part it.
				below = join(path, strings.ReplaceAll(m.key, "/", "\x00"))
				if m.key == "" {
					below = join(path, "\x00")
				}
			}
			out[i] = member{m.key, c.prune(below, m.value)}
		}
		return out
	case []any:
		if judged == gone {
			return []any{}
		} else if judged == whole {
			return v
		}
		out := make([]any, len(v))
		for i := range v {
			out[i] = c.prune(path, v[i])
		}
		return out
	}
	if judged == whole {
		return v
	}
	return ""
}

// readTree reads valid JSON.
func readTree(t *testing.T, body []byte) any {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	var read func() any
	token := func() json.Token {
		tok, err := d.Token()
		if err != nil {
			t.Fatalf("read %s: %v", body, err)
		}
		return tok
	}
	read = func() any {
		switch tok := token(); tok {
		case json.Delim('{'):
			out := []member{}
			for d.More() {
				key := token().(string)
				out = append(out, member{key, read()})
			}
			token()
			return out
		case json.Delim('['):
			out := []any{}
			for d.More() {
				out = append(out, read())
			}
			token()
			return out
		default:
			return tok
		}
	}
	return read()
}
