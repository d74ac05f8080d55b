package imds

import (
	"errors"
	"strings"
	"testing"
)

const vmBody = `{"compute":{"name":"vm","osProfile":{"adminUsername":"a","computerName":"c"},"tags":"k:v","tagsList":[{"name":"k","value":"v"}],"userData":"dQ=="},` +
	`"network":{"interface":[{"ipv4":{"ipAddress":[{"privateIpAddress":"p"}]},"macAddress":"m"},{"macAddress":"n"}]}}`

func keep(s ...string) Cut { return Cut{Keep: s} }
func drop(s ...string) Cut { return Cut{Drop: s} }

func TestPrune(t *testing.T) {
	tests := []struct {
		name, at  string // below /metadata/instance
		cut       Cut
		body, out string
	}{
		{"nothing to cut", "", Cut{}, "not looked at", "not looked at"},
		{"all is kept", "/compute/osProfile", keep("network", "compute"), "not looked at", "not looked at"},
		{"what is dropped lies elsewhere", "/compute", drop("network", "compute2"), "not looked at", "not looked at"},

		{"drop an object", "", drop("compute/osProfile"), vmBody, strings.Replace(vmBody, `{"adminUsername":"a","computerName":"c"}`, `{}`, 1)},
		{"drop a section", "", drop("network"), `{"compute":{"a":1},"network":{"interface":[]}}`, `{"compute":{"a":1},"network":{}}`},
		{"drop both forms of tags", "/compute", drop("compute/tags", "compute/tagsList"), `{"name":"vm","tags":"k:v","tagsList":[{"name":"k"}]}`, `{"name":"vm","tags":"","tagsList":[]}`},
		{"drop in all elements", "/network", drop("network/interface/macAddress"), `{"interface":[{"macAddress":"a","x":1},{"macAddress":"b"}]}`, `{"interface":[{"macAddress":"","x":1},{"macAddress":""}]}`},
		{"drop in one element that was asked for", "/network/interface/0", drop("network/interface/ipv4"), `{"ipv4":{"a":1},"macAddress":"m"}`, `{"ipv4":{},"macAddress":"m"}`},
		{"drop in an array that was asked for", "/network/interface", drop("network/interface/ipv4"), ` [ {"ipv4":{"a":1} } , {} ] `, ` [ {"ipv4":{} } , {} ] `},
		{"keep one leaf", "", keep("compute/name"), vmBody, `{"compute":{"name":"vm","osProfile":{},"tags":"","tagsList":[],"userData":""},"network":{}}`},
		{"keep several, in elements too", "", keep("compute/osProfile/computerName", "network/interface/macAddress"), vmBody,
			`{"compute":{"name":"","osProfile":{"adminUsername":"","computerName":"c"},"tags":"","tagsList":[],"userData":""},"network":{"interface":[{"ipv4":{},"macAddress":"m"},{"macAddress":"n"}]}}`},
		{"drop beats keep", "", Cut{Keep: []string{"compute"}, Drop: []string{"compute/osProfile/adminUsername"}}, `{"compute":{"osProfile":{"adminUsername":"a","computerName":"c"}},"network":{"a":1}}`, `{"compute":{"osProfile":{"adminUsername":"","computerName":"c"}},"network":{}}`},
		{"drop beats what is kept below it", "", Cut{Keep: []string{"compute/osProfile/adminUsername"}, Drop: []string{"compute/osProfile"}}, `{"compute":{"osProfile":{"adminUsername":"a"}}}`, `{"compute":{"osProfile":{}}}`},
		{"kept twice, once inside the other", "", keep("compute", "compute/name"), `{"compute":{"a":1,"name":2},"network":{}}`, `{"compute":{"a":1,"name":2},"network":{}}`},
		{"unknown keys are not kept", "", keep("compute/name"), `{"compute":{"name":"vm","newer":{"secret":1}},"other":[1]}`, `{"compute":{"name":"vm","newer":{}},"other":[]}`},
		{"keys of 2017-03-01", "/network", drop("network/interface/macAddress", "network/interface/mac", "network/interface/ipv4/ipAddress/publicip"),
			`{"interface":[{"ipv4":{"ipaddress":[{"ipaddress":"a","publicip":"b"}]},"mac":"m"}]}`, `{"interface":[{"ipv4":{"ipaddress":[{"ipaddress":"a","publicip":""}]},"mac":""}]}`},

		{"any letter case", "", drop("compute/tags"), `{"COMPUTE":{"Tags":"a","TAGS":"b"}}`, `{"COMPUTE":{"Tags":"","TAGS":""}}`},
		{"duplicate keys", "", drop("compute/tags"), `{"compute":{"tags":"a"},"compute":{"tags":"b","tags":{"c":1}}}`, `{"compute":{"tags":""},"compute":{"tags":"","tags":{}}}`},
		{"escaped keys", "", drop("compute/tags"), `{"\u0063ompute":{"t\u0061gs":"a"}}`, `{"\u0063ompute":{"t\u0061gs":""}}`},
		{"key that folds by unicode", "", drop("compute/tags"), `{"compute":{"tag\u017f":"a","tagſ":"b"}}`, `{"compute":{"tag\u017f":"","tagſ":""}}`},
		{"longer and shorter keys", "", drop("compute/tags"), `{"compute":{"tag":"a","tagsX":"b","tags/x":"c"}}`, `{"compute":{"tag":"a","tagsX":"b","tags/x":"c"}}`},
		{"same key at another place", "", drop("compute/name"), `{"name":"a","compute":{"plan":{"name":"b"},"name":"c"}}`, `{"name":"a","compute":{"plan":{"name":"b"},"name":""}}`},
		{"key that is a path", "", keep("compute/tags"), `{"compute/tags":"a","compute":{"tags":"b"}}`, `{"compute/tags":"","compute":{"tags":"b"}}`},
		{"array as an object of indexes", "", drop("network/interface/macAddress"), `{"network":{"interface":{"0":{"macAddress":"a","x":1},"1":{"macAddress":"b"}}}}`, `{"network":{"interface":{"0":{"macAddress":"","x":1},"1":{"macAddress":""}}}}`},
		{"arrays in arrays", "", drop("network/interface/macAddress"), `{"network":{"interface":[[[{"macAddress":"a"}]],[]]}}`, `{"network":{"interface":[[[{"macAddress":""}]],[]]}}`},
		{"object that came as text", "", drop("compute/osProfile/adminUsername"), `{"compute":{"osProfile":"adminUsername=a"}}`, `{"compute":{"osProfile":""}}`},
		{"array that came as text", "", keep("network/interface/macAddress"), `{"network":{"interface":["macAddress=a",7,null]}}`, `{"network":{"interface":["","",""]}}`},
		{"values of every kind", "", keep("network"), `{"a":"\"}","b":-1.5e3,"c":true,"d":null,"e":[1,"]"],"f":{"g":"}"},"h":""}`, `{"a":"","b":"","c":"","d":"","e":[],"f":{},"h":""}`},
		{"space stays", "", drop("compute/tags"), "\n{ \"compute\" :\t{ \"tags\" : \"a\" , \"n\":1 } }\n", "\n{ \"compute\" :\t{ \"tags\" : \"\" , \"n\":1 } }\n"},
		{"not valid utf8", "", drop("compute/tags"), "{\"compute\":{\"\xff\":\"\xfe\",\"tags\":\"\xff\"}}", "{\"compute\":{\"\xff\":\"\xfe\",\"tags\":\"\"}}"},
		{"not set already", "", drop("compute/tags", "compute/osProfile"), `{"compute":{"tags":"","osProfile":{}}}`, `{"compute":{"tags":"","osProfile":{}}}`},
		{"empty document", "", keep("compute/name"), `{}`, `{}`},

		{"names", "?format=text", drop("compute/tags"), "compute/\nnetwork/\n", "compute/\nnetwork/\n"},
		{"extended keeps what is its own", "?extended=true", keep("compute/name"), `{"compute":{"name":"vm","tags":"a"},"extended":{"compute":{"ppsType":"b"}},"network":{"c":1}}`, `{"compute":{"name":"vm","tags":""},"extended":{"compute":{"ppsType":"b"}},"network":{}}`},
		{"extended is cut, too", "?extended=", drop("compute/tags"), `{"compute":{"tags":"a"},"extended":{}}`, `{"compute":{"tags":""},"extended":{}}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q := query(t, ask{target: instanceRoot + tt.at})
			body := []byte(tt.body)
			got, err := Prune(q, tt.cut, body)
			if err != nil || string(got) != tt.out {
				t.Fatalf("got  %s, %v\nwant %s", got, err, tt.out)
			}
			if string(body) != tt.body {
				t.Errorf("the argument was modified: %s", body)
			}
			if tt.body == tt.out && &got[0] != &body[0] {
				t.Error("got a copy, want the body itself")
			}
			if again, err := Prune(q, tt.cut, got); err != nil || string(again) != tt.out {
				t.Errorf("a second time: got %s, %v", again, err)
			}
		})
	}
}

func TestPruneFailsClosed(t *testing.T) {
	get := func(target string) Query { return query(t, ask{target: target}) }
	cut := drop("compute/tags")
	tests := []struct {
		name     string
		query    Query
		cut      Cut
		body     string
		document bool // the body is to blame
	}{
		{"all of the answer is dropped", get("/metadata/instance/compute/tags?format=text"), cut, "k:v", false},
		{"more than the answer is dropped", get("/metadata/instance/compute/osProfile"), drop("compute"), `{}`, false},
		{"by an index", get("/metadata/instance/compute/tagsList/0/value?format=text"), drop("compute/tagsList"), "v", false},
		{"in another case", get("/metadata/instance/COMPUTE/TAGS?format=text"), cut, "k:v", false},
		{"nothing of the answer is kept", get("/metadata/instance/network"), keep("compute"), `{}`, false},
		{"newer key that is not kept", get("/metadata/instance/compute/newer?format=text"), keep("compute/name"), "x", false},
		{"the document is dropped", get("/metadata/instance"), drop(""), `{}`, false},
		{"answer of another action", get("/metadata/loadbalancer"), cut, `{}`, false},
		{"user data", get("/metadata/instance/compute/userData?format=text"), cut, `{}`, false},
		{"extended by its path", get("/metadata/instance/extended"), cut, `{}`, false},

		{"empty", get("/metadata/instance"), cut, "", true},
		{"leaf in place of a node", get("/metadata/instance/compute"), cut, `"tags"`, true},
		{"null", get("/metadata/instance"), cut, "null", true},
		{"cut short", get("/metadata/instance"), cut, `{"compute":{"tags":"x`, true},
		{"two documents", get("/metadata/instance"), cut, `{} {"compute":{"tags":"x"}}`, true},
		{"comment", get("/metadata/instance"), cut, `{/**/}`, true},
		{"byte order mark", get("/metadata/instance"), cut, "\ufeff{}", true},
		{"xml", get("/metadata/instance?format=xml"), cut, "<tags>x</tags>", true},
		{"values where names should be", get("/metadata/instance/compute?format=text"), cut, "tags=k:v", true},
		{"document where names should be", get("/metadata/instance/compute?format=TEXT"), cut, `{"tags":"k:v"}`, true},
		{"text that was not asked for", get("/metadata/instance/compute"), cut, "tags\n", true},
		{"head with a body", query(t, ask{method: "HEAD", target: "/metadata/instance"}), cut, "x", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Prune(tt.query, tt.cut, []byte(tt.body))
			if err == nil || got != nil || errors.Is(err, ErrNotDocument) != tt.document {
				t.Errorf("got %q, %v, want an error", got, err)
			}
		})
	}
	if got, err := Prune(query(t, ask{method: "HEAD", target: "/metadata/instance"}), cut, nil); err != nil || len(got) != 0 {
		t.Errorf("head without a body: got %q, %v", got, err)
	}
}

// Of the extended document what InstanceRead stands for can be denied, and what
// InstanceUserdata stands for.
func TestBlankExtended(t *testing.T) {
	const body = `{"compute":{"name":"vm","userData":"dQ=="},"extended":{"compute":{"hasCustomData":true}},"network":{"interface":[]}}`
	q := query(t, ask{target: "/metadata/instance?api-version=2021-08-01&extended=true"})
	for _, tt := range []struct {
		denied []Action
		want   string
	}{
		{nil, body},
		{denyUserdata, strings.Replace(body, "dQ==", "", 1)},
		{[]Action{InstanceRead}, `{"compute":{},"extended":{"compute":{"hasCustomData":true}},"network":{}}`},
		{[]Action{InstanceUserdata, InstanceRead}, `{"compute":{},"extended":{"compute":{"hasCustomData":true}},"network":{}}`},
	} {
		if got, err := Blank(q, tt.denied, []byte(body)); err != nil || string(got) != tt.want {
			t.Errorf("without %v: got %s, %v, want %s", tt.denied, got, err, tt.want)
		}
	}
	if got, err := Blank(q, []Action{InstanceRead}, []byte(`[{"compute":{}}]`)); !errors.Is(err, ErrNotDocument) || got != nil {
		t.Errorf("array: got %s, %v", got, err)
	}
}

func BenchmarkPrune(b *testing.B) {
	q := query(b, ask{target: "/metadata/instance"})
	body := []byte(strings.Replace(vmBody, `{"name":"k","value":"v"}`, strings.Repeat(`{"name":"some-name","value":"some value"},`, 90)+"{}", 1))
	cut := Cut{Keep: []string{"compute"}, Drop: []string{"compute/tags", "compute/tagsList"}}
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Prune(q, cut, body); err != nil {
			b.Fatal(err)
		}
	}
}
