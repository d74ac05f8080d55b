package imds

import (
	"errors"
	"strings"
	"testing"
)

var denyUserdata = []Action{InstanceUserdata}

func TestBlank(t *testing.T) {
	tests := []struct{ name, body, want string }{
		{"instance", `{"compute":{"customData":"Yw==","name":"vm","userData":"dQ=="},"network":{}}`, `{"compute":{"customData":"","name":"vm","userData":""},"network":{}}`},
		{"nothing set", `{"compute":{"customData":"", "userData" : ""}}`, `{"compute":{"customData":"", "userData" : ""}}`},
		{"no such key", ` { "name" : "userData" , "n":1.5e3 } `, ` { "name" : "userData" , "n":1.5e3 } `},
		{"space stays", "{ \"userData\" :\n \"dQ==\" , \"a\":1 }\n", "{ \"userData\" :\n \"\" , \"a\":1 }\n"},
		{"any letter case", `{"USERDATA":"a","CustomData":"b","userdata":"c"}`, `{"USERDATA":"","CustomData":"","userdata":""}`},
		{"duplicate keys", `{"userData":"","userData":"a","userData":"b"}`, `{"userData":"","userData":"","userData":""}`},
		{"escaped key", `{"\u0075serD\u0061ta":"a"}`, `{"\u0075serD\u0061ta":""}`},
		{"key that folds by unicode", `{"u\u017ferData":"a","uſerData":"b"}`, `{"u\u017ferData":"","uſerData":""}`},
		{"deep", `{"a":[{"b":{"userData":"x"}},{"customData":"y"}]}`, `{"a":[{"b":{"userData":""}},{"customData":""}]}`},
		{"value is an object", `{"userData":{"a":["}",{"b":"\""}],"c":{}},"d":1}`, `{"userData":"","d":1}`},
		{"value is an array", `{"userData":["]",[1]],"d":1}`, `{"userData":"","d":1}`},
		{"value is a number", `{"userData":12,"d":1}`, `{"userData":"","d":1}`},
		{"value is a number at the end", `{"userData":-1.5}`, `{"userData":""}`},
		{"value is null", `{"userData":null }`, `{"userData":"" }`},
		{"value is an escaped empty look-alike", `{"userData":"\""}`, `{"userData":""}`},
		{"key inside a string", `{"tags":"\"userData\":\"x\"","a":"b"}`, `{"tags":"\"userData\":\"x\"","a":"b"}`},
		{"string with backslash at the end", `{"a":"\\","userData":"x"}`, `{"a":"\\","userData":""}`},
		{"value that is the key", `{"name":"userData","value":"userData"}`, `{"name":"userData","value":"userData"}`},
		{"longer key", `{"userDataSize":"1","myUserData":"2"}`, `{"userDataSize":"1","myUserData":"2"}`},
		{"not valid utf8", "{\"a\":\"\xff\",\"userData\":\"\xfe\"}", "{\"a\":\"\xff\",\"userData\":\"\"}"},
		{"empty object", `{}`, `{}`},
	}
	q := query(t, ask{target: "/metadata/instance?api-version=2021-02-01"})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			body := []byte(tt.body)
			got, err := Blank(q, denyUserdata, body)
			if err != nil || string(got) != tt.want {
				t.Errorf("got %s, %v, want %s", got, err, tt.want)
			}
			if string(body) != tt.body {
				t.Errorf("the argument was modified: %s", body)
			}
			if tt.body == tt.want && &got[0] != &body[0] {
				t.Error("got a copy, want the body itself")
			}
		})
	}
}

func TestBlankFailsClosed(t *testing.T) {
	q := query(t, ask{target: "/metadata/instance/compute?api-version=2021-02-01"})
	for name, body := range map[string]string{
		"empty": "", "space": " \n", "array": `[{"userData":"x"}]`, "string": `"userData"`, "null": "null", "text": "compute/\n", "xml": "<a/>",
		"cut short": `{"userData":"x`, "two documents": `{} {"userData":"x"}`, "comment": `{/**/}`, "byte order mark": "\ufeff{}",
		"single quotes": `{'userData':'x'}`, "trailing comma": `{"a":1,}`, "gzip": "\x1f\x8b\x08\x00", "utf-16": "{\x00}\x00",
	} {
		if got, err := Blank(q, denyUserdata, []byte(body)); !errors.Is(err, ErrNotDocument) || got != nil {
			t.Errorf("%s: got %q, %v, want ErrNotDocument", name, got, err)
		}
	}
	if got, err := Blank(q, []Action{InstanceRead}, []byte("{}")); err == nil {
		t.Errorf("denied action is the query's own: got %s", got)
	}
	q.Covers = []Action{IdentityInfo}
	if got, err := Blank(q, []Action{IdentityInfo}, []byte("{}")); err == nil {
		t.Errorf("denied action that cannot be removed: got %s", got)
	}
}

func TestBlankNothingToDo(t *testing.T) {
	const body = `{"userData":"x"}`
	instance := query(t, ask{target: "/metadata/instance"})
	tests := []struct {
		name   string
		query  Query
		denied []Action
		body   string
	}{
		{"nothing denied", instance, nil, body},
		{"other action denied", instance, []Action{IdentityToken}, body},
		{"answer without user data", query(t, ask{target: "/metadata/loadbalancer"}), denyUserdata, "not looked at"},
		{"head", query(t, ask{method: "HEAD", target: "/metadata/instance"}), denyUserdata, ""},
		{"names", query(t, ask{target: "/metadata/instance?format=text"}), denyUserdata, "compute/\nnetwork/\n"},
		{"names of compute", query(t, ask{target: "/metadata/instance/compute?format=TEXT"}), denyUserdata, "name\r\ntagsList/\r\nuserData"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Blank(tt.query, tt.denied, []byte(tt.body))
			if err != nil || string(got) != tt.body {
				t.Errorf("got %s, %v, want %s", got, err, tt.body)
			}
		})
	}
}

func TestBlankTextThatIsNoList(t *testing.T) {
	q := query(t, ask{target: "/metadata/instance?format=text"})
	for _, body := range []string{`{"userData":"x"}`, "userData: x", "a/b", "c2VjcmV0Cg==", strings.Repeat("x", 65)} {
		if got, err := Blank(q, denyUserdata, []byte(body)); !errors.Is(err, ErrNotDocument) || got != nil {
			t.Errorf("%s: got %q, %v, want ErrNotDocument", body, got, err)
		}
	}
}

func BenchmarkBlank(b *testing.B) {
	q := query(b, ask{target: "/metadata/instance"})
	body := []byte(`{"compute":{"customData":"","tagsList":[` + strings.Repeat(`{"name":"some-name","value":"some value"},`, 90) +
		`{}],"userData":"dXNlciBkYXRh"}}`)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Blank(q, denyUserdata, body); err != nil {
			b.Fatal(err)
		}
	}
}
