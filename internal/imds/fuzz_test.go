package imds

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// FuzzClassify holds Classify to its contract for any request: it returns, what
// it lets pass is a documented action in a form that net/url reads alike, and
// that form classifies to itself.
func FuzzClassify(f *testing.F) {
	for _, target := range originals {
		f.Add("GET", target, "169.254.169.254", "Metadata", "true", int64(0))
		f.Add("POST", strings.ToUpper(target), "[fd00:ec2::254]:80", "X-Forwarded-For", "", int64(2))
	}
	f.Add("GET", "/metadata/x?a=%C3%A9+%2b&B=~", "10.0.0.5", "Connection", "close, te", int64(-1))
	actions := Actions()
	f.Fuzz(func(t *testing.T, method, target, host, name, value string, size int64) {
		r := &http.Request{Method: method, RequestURI: target, Host: host, Proto: "HTTP/1.1", ContentLength: size,
			Header: http.Header{"Metadata": {"true"}, name: {value}}}
		q, refusal := Classify(Azure, r, "10.0.0.5")
		if refusal != nil {
			checkRefusal(t, refusal)
			_ = q.Redacted()
			return
		}
		if !slices.Contains(actions, q.Action) || !slices.Contains([]string{"GET", "HEAD", "POST"}, q.Method) {
			t.Fatalf("got %s %s", q.Method, q.Action)
		}
		u, err := url.ParseRequestURI(q.Target())
		if err != nil || u.Path != q.Path || u.EscapedPath() != q.Path || u.Fragment != "" || u.Host != "" {
			t.Fatalf("net/url reads %q as %+v, %v", q.Target(), u, err)
		}
		sameParams(t, q, u.RawQuery)
		path, raw, _ := strings.Cut(target, "?")
		sameParams(t, q, raw) // the client's own spelling means the same, too
		if strings.TrimSuffix(strings.ToLower(path), "/") != strings.TrimSuffix(strings.ToLower(q.Path), "/") {
			t.Fatalf("%q became %q", target, q.Path)
		}

		r.RequestURI = q.Target()
		if again, refusal := Classify(Azure, r, "10.0.0.5"); refusal != nil || !reflect.DeepEqual(again, q) {
			t.Fatalf("%q classifies to %+v, %v, want %+v", q.Target(), again, refusal, q)
		}
		checkSubtree(t, q)
		checkRecord(t, q)
		if s := q.Redacted(); strings.ContainsAny(s, " \n\r\x00\"\\") || !strings.HasPrefix(s, "/") {
			t.Fatalf("redacted: %q", s)
		}
	})
}

// checkSubtree holds the subtree against the path, read another way.
func checkSubtree(t *testing.T, q Query) {
	t.Helper()
	want := ""
	if q.Action == InstanceRead {
		segments := strings.Split(q.Path, "/")[3:]
		want = strings.Join(slices.DeleteFunc(segments, func(s string) bool { return s[0] <= '9' }), "/")
	}
	if q.Subtree != want {
		t.Fatalf("%s %s has the subtree %q, want %q", q.Action, q.Path, q.Subtree, want)
	}
}

// checkRecord holds what a record tells against what was recorded: less, and
// nothing else.
func checkRecord(t *testing.T, q Query) {
	t.Helper()
	got, hidden, err := ParseRecord(q.Method, q.Redacted())
	if err != nil {
		if len(q.Path) <= maxShown {
			t.Fatalf("%s: %v", q.Redacted(), err)
		}
		return
	}
	if len(got.Params)+len(hidden) != len(q.Params) {
		t.Fatalf("%s: got %v without %v of %v", q.Redacted(), got.Params, hidden, q.Params)
	}
	for _, name := range hidden {
		if _, ok := q.Param(name); !ok {
			t.Fatalf("%s: %s was not there", q.Redacted(), name)
		}
	}
	for _, p := range got.Params {
		if v, ok := q.Param(p.Name); !ok || v != p.Value {
			t.Fatalf("%s: got %v, want %q", q.Redacted(), p, v)
		}
	}
	if got.Params = q.Params; !reflect.DeepEqual(got, q) {
		t.Fatalf("%s: got %+v, want %+v", q.Redacted(), got, q)
	}
}

func sameParams(t *testing.T, q Query, raw string) {
	t.Helper()
	values, err := url.ParseQuery(raw)
	if err != nil || len(values) != len(q.Params) {
		t.Fatalf("net/url reads %q as %v, %v; want %v", raw, values, err, q.Params)
	}
	for name, v := range values {
		i := slices.IndexFunc(q.Params, func(p Param) bool { return strings.EqualFold(p.Name, name) })
		if i < 0 || len(v) != 1 || v[0] != q.Params[i].Value {
			t.Fatalf("net/url reads %s as %q, want one of %v", name, v, q.Params)
		}
	}
}

func checkRefusal(t *testing.T, f *Refusal) {
	t.Helper()
	if f.Status != 400 && f.Status != 405 || (f.Status == 405) != (f.Allow != "") || f.Reason == "" || f.Text == "" {
		t.Fatalf("got refusal %+v", f)
	}
	if !json.Valid(f.Body()) || bytes.Contains(f.Body(), []byte("unreachable")) {
		t.Fatalf("got body %s", f.Body())
	}
}

// FuzzBlank compares Blank with a slow reading of the same document by
// encoding/json: nothing of the user data is left, nothing else is gone.
func FuzzBlank(f *testing.F) {
	for _, s := range []string{
		`{"compute":{"customData":"Yw==","name":"vm","userData":"dQ=="},"network":{"interface":[{"macAddress":"00"}]}}`,
		`{"USERDATA":[1,{"a":"}"}],"userData":null,"a":{"\u0075serData":-1.5e3 }}`, `{"a":"\\\"","userData":"\""}`, `[]`, `{`, "",
	} {
		f.Add([]byte(s))
	}
	q := Query{Cloud: Azure, Action: InstanceRead, Covers: withUserdata, Method: "GET", Path: "/metadata/instance"}
	f.Fuzz(func(t *testing.T, body []byte) {
		before := bytes.Clone(body)
		got, err := Blank(q, denyUserdata, body)
		if !bytes.Equal(body, before) {
			t.Fatal("the argument was modified")
		}
		isDocument := json.Valid(body) && bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte("{"))
		if (err == nil) != isDocument {
			t.Fatalf("got error %v for a body of which document is %v", err, isDocument)
		}
		if err != nil {
			return
		}
		if want := tokens(t, body, true); !reflect.DeepEqual(tokens(t, got, false), want) {
			t.Fatalf("got %s of %s, want tokens %v", got, body, want)
		}
		if again, err := Blank(q, denyUserdata, got); err != nil || !bytes.Equal(again, got) {
			t.Fatalf("a second time: got %s, %v, want %s", again, err, got)
		}
	})
}

// tokens lists the document's tokens, in order and with duplicates; with blank
// set the values of user data are read as "".
func tokens(t *testing.T, body []byte, blank bool) (out []any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	type level struct{ object, key bool }
	var stack []level
	for {
		tok, err := d.Token()
		if err != nil {
			return out // the document was valid: this is its end
		}
		out = append(out, tok)
		top := len(stack) - 1
		switch v := tok.(type) {
		case json.Delim:
			if v == '{' || v == '[' {
				stack = append(stack, level{object: v == '{', key: v == '{'})
				continue
			}
			stack = stack[:top]
			top--
		case string:
			if top >= 0 && stack[top].key {
				stack[top].key = false
				if blank && (strings.EqualFold(v, "userData") || strings.EqualFold(v, "customData")) {
					var skipped json.RawMessage
					if err := d.Decode(&skipped); err != nil {
						t.Fatalf("decode value of %s: %v", v, err)
					}
					out = append(out, "")
					stack[top].key = true
				}
				continue
			}
		}
		if top >= 0 && stack[top].object {
			stack[top].key = true
		}
	}
}
