package imds

import (
	"fmt"
	"iter"
	"net/http"
	"strings"
	"testing"
)

// originals are requests that some policy allows, one for every kind of path.
var originals = []string{
	"/metadata?api-version=2021-02-01",
	"/metadata/versions",
	"/metadata/instance?api-version=2021-02-01",
	"/metadata/instance?api-version=2021-08-01&extended=true",
	"/metadata/instance/compute?api-version=2021-02-01&format=json",
	"/metadata/instance/compute/userData?api-version=2021-01-01&format=text",
	"/metadata/instance/compute/vmId?api-version=2021-02-01&format=text",
	"/metadata/instance/compute/osProfile?api-version=2021-02-01",
	"/metadata/instance/compute/tagsList/0/value?api-version=2019-06-04&format=text",
	"/metadata/instance/network?api-version=2021-02-01",
	"/metadata/instance/network/interface/0/ipv4/ipAddress/0/publicIpAddress?api-version=2017-04-02&format=text",
	"/metadata/instance/network/interface/0/macAddress?api-version=2021-02-01&format=text",
	"/metadata/reprovisiondata?api-version=2019-06-01",
	"/metadata/attested/document?api-version=2018-10-01&nonce=1234567890",
	"/metadata/identity/oauth2/token?api-version=2018-02-01&client_id=c-1&resource=https%3A%2F%2Fvault.azure.net",
	"/metadata/identity/oauth2/token?api-version=2018-02-01&mi_res_id=%2Fsubscriptions%2Fs&resource=r",
	"/metadata/identity/oauth2/token?api-version=2018-02-01&msi_res_id=%2Fsubscriptions%2Fs&resource=r",
	"/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fvault.azure.net%2F",
	"/metadata/identity/info?api-version=2018-02-01",
	"/metadata/identity/getplatformmetadata?api-version=1&cred-api-version=2.0",
	"/metadata/scheduledevents?api-version=2020-07-01",
	"/metadata/loadbalancer?api-version=2020-10-01",
	"/metadata/v1/InstanceInfo",
}

// twin is a request that some parser on the way could take for its original.
type twin struct {
	target string
	edit   func(*http.Request)
	other  bool // another name altogether: Unknown is right for it too
}

func pathTwins(path, query string) iter.Seq[twin] {
	return func(yield func(twin) bool) {
		emit := func(p string, other bool) bool { return yield(twin{target: p + query, other: other}) }
		for i := range len(path) {
			head, b, tail := path[:i], path[i], path[i+1:]
			instead := []string{fmt.Sprintf("%%%02x", b), fmt.Sprintf("%%%02X", b), fmt.Sprintf("%%25%02x", b), fmt.Sprintf("%%u00%02x", b),
				string(rune(b) - ' ' + '\uff00'), string(rune(b)) + "\u200b", string(rune(b)) + "%00", "%c0%" + fmt.Sprintf("%02x", b|0x80)}
			switch {
			case b == '/':
				instead = append(instead, "//", "/./", "/../", "/x/../", "/%2e/", "/.%2e/", "/;/", "/;x=1/", ";/", `\`, `/\`, "/ ", " /", "/.", "/...", "./", "%09/", "\t/")
			case isLetter(b):
				instead = append(instead, string(rune(b^0x20)))
			}
			if isDigit(b) && path[i-1] == '/' {
				for _, s := range []string{"00", "01", "+0", "-0", "0x0", "0a", "1e0", "0.0", "0,1", "*", "%2a", "-1", "0/0", "18446744073709551616", "[0]"} {
					if !emit(head+s+tail, true) {
						return
					}
				}
			}
			for _, s := range instead {
				if !emit(head+s+tail, false) {
					return
				}
			}
		}
		for _, s := range []string{"/", "//", "/.", "/..", "/../", "/../x", ".", "..", "%20", " ", "%00", "\x00", ";", ";x", ";.json", "#", "#x", "%23", "%3f", "%3Fx=1",
			"*", "::$DATA", "\t", "\r", "\n", "\u00a0", "\\", "/%2e%2e", "%", "%2"} {
			if !emit(path+s, false) {
				return
			}
		}
		for _, s := range []string{".json", "~", "~1", "-", "_", "x"} {
			if !emit(path+s, true) {
				return
			}
		}
		for _, s := range []string{"http://169.254.169.254", "HTTP://169.254.169.254:80", "https://x.test", "//169.254.169.254", "/", "/.", "/..", "/%2e", "/x/..", "/metadata/..",
			" ", "*", "\\", "169.254.169.254", "@169.254.169.254"} {
			if !emit(s+path, false) {
				return
			}
		}
		_ = emit(strings.ToUpper(path), false) && emit(strings.ToUpper(path)+"/", false) && emit(strings.ToLower(path), false)
	}
}

func queryTwins(path, query string) iter.Seq[twin] {
	return func(yield func(twin) bool) {
		emit := func(pairs ...string) bool { return yield(twin{target: path + "?" + strings.Join(pairs, "&")}) }
		pairs := strings.Split(strings.TrimPrefix(query, "?"), "&")
		for i, pair := range pairs {
			name, value, _ := strings.Cut(pair, "=")
			rest := append(append([]string{}, pairs[:i]...), pairs[i+1:]...)
			for _, p := range []string{
				name + "=" + escapeAll(strings.NewReplacer("%3A", ":", "%2F", "/").Replace(value)),
				escapeAll(name) + "=" + value, strings.ToUpper(name) + "=" + value, escapeAll(strings.ToUpper(name)) + "=" + value, pair,
				pair + "&" + pair, pair + "&" + strings.ToUpper(name) + "=x", pair + "&" + escapeAll(name) + "=x", name + "=x&" + pair, name + "&" + pair, pair + "&" + name,
				pair + "&", "&" + pair, "&&" + pair, pair + ";x=1", "x=1;" + pair, pair + "&x=1", pair + "&%00=1", pair + "%00", pair + "%0a", pair + "%", pair + "%1", pair + "%gg",
				pair + "#x", "?" + pair, name + "[]=" + value, name + "[0]=" + value, "+" + pair, "%20" + pair, name + "%20=" + value, name + "%00=" + value, "\u00a0" + pair, name, "=" + value,
				"mi_res_id=x&" + pair, pair + "&msi_res_id=x", pair + "&MI_RES_ID=x", pair + "&CLIENT_ID=x", pair + "&%6fbject_id=x", pair + "&extended=true", pair + "&EXTENDED=",
				pair + "&api-version=2017-03-01", "API-VERSION=2017-03-01&" + pair, pair + "&%61pi-version=2025-04-07",
				name + "%3D" + value, strings.ReplaceAll(pair, "-", "\u2010"), strings.ReplaceAll(name, "e", "%C4%97") + "=" + value,
			} {
				if !emit(append([]string{p}, rest...)...) || !emit(append(append([]string{}, rest...), p)...) {
					return
				}
			}
		}
	}
}

func escapeAll(s string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, "%%%02x", s[i])
	}
	return b.String()
}

func headerTwins(target string) iter.Seq[twin] {
	edits := []func(*http.Request){
		func(r *http.Request) { delete(r.Header, "Metadata") },
		func(r *http.Request) { r.Header["Metadata"] = []string{"true", "true"} },
		func(r *http.Request) { r.Header["Metadata"] = []string{"false", "true"} },
		func(r *http.Request) { r.Header["Metadata"] = []string{} },
		func(r *http.Request) { r.Header["METADATA"] = []string{"true"} },
		func(r *http.Request) { r.ContentLength = 1 },
		func(r *http.Request) { r.ContentLength = -1 },
		func(r *http.Request) { r.TransferEncoding = []string{"chunked"} },
		func(r *http.Request) { r.Proto = "HTTP/2.0" },
	}
	for _, v := range []string{"", "false", "1", "yes", "tru\u0435", "true\x00", "true;", "\u00a0true", "t rue"} {
		edits = append(edits, func(r *http.Request) { r.Header["Metadata"] = []string{v} })
	}
	for _, v := range []string{"", "x.test", "169.254.169.254:81", "169.254.169.254.", "169.254.169.254@x.test", "2852039166", "169.254.43518", "0251.0376.0251.0376",
		"[::ffff:a9fe:a9fe]", "fd00:ec2::254", "localhost", "metadata", "169.254.169.254:80:80", ":80"} {
		edits = append(edits, func(r *http.Request) { r.Host = v })
	}
	for _, v := range []string{"GET ", "get", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", ""} {
		edits = append(edits, func(r *http.Request) { r.Method = v })
	}
	for _, k := range []string{"X-Forwarded-For", "x-forwarded-for", "X_Forwarded_For", "X-Forwarded-Host", "X-Forwarded-Prefix", "Forwarded", "Via", "X-Real-Ip", "X-Original-Url",
		"X-Rewrite-Url", "X-Http-Method-Override", "True-Client-Ip", "X-Ms-Azure-Host-Claims", "Upgrade", "Http2-Settings", "Expect", "Transfer-Encoding"} {
		edits = append(edits, func(r *http.Request) { r.Header[k] = nil }, func(r *http.Request) { r.Header[k] = []string{"", "x"} })
	}
	for _, v := range []string{"Upgrade", "Metadata", "close, X-Forwarded-For", "keep-alive,te", "closed"} {
		edits = append(edits, func(r *http.Request) { r.Header["Connection"] = []string{"close", v} })
	}
	return func(yield func(twin) bool) {
		for _, e := range edits {
			if !yield(twin{target: target, edit: e}) {
				return
			}
		}
	}
}

// newerKey reports whether q could be a newer field of the instance, beside what
// its original asks for and not in or around it.
func newerKey(q, original Query) bool {
	return q.Action == InstanceRead && strings.Count(q.Path, "/") > 3 && (original.Action != InstanceRead ||
		!Within(q.Subtree, original.Subtree) && !Within(original.Subtree, q.Subtree))
}

// addsSelector reports whether q is its original with an identity named besides.
func addsSelector(q, original Query) bool {
	s, _ := q.Selector()
	_, named := original.Selector()
	return !named && s.Value == "x" && len(q.Params) == len(original.Params)+1 && q.Action == original.Action
}

// sameMeaning compares what policy looks at.
func sameMeaning(q, original Query) bool {
	s, named := q.Selector()
	t, wanted := original.Selector()
	a, _ := q.Resource()
	b, _ := original.Resource()
	return q.Subtree == original.Subtree && named == wanted && (!named || SameSelector(s, t)) && strings.EqualFold(a, b)
}

// Every twin is refused or is its original: same action, same subtree, same
// identity, same target.
func TestEvilTwins(t *testing.T) {
	cases, refused := 0, 0
	for _, target := range originals {
		original := query(t, ask{target: target})
		if original.Target() != target {
			t.Fatalf("%s is not canonical: got %s", target, original.Target())
		}
		try := func(tw twin) {
			cases++
			r := ask{target: target}.request(t)
			r.RequestURI = tw.target
			if tw.edit != nil {
				tw.edit(r)
			}
			q, f := Classify(Azure, r)
			switch {
			case f != nil:
				refused++
			case tw.edit != nil:
				t.Errorf("%s with its header changed: got %s", target, q.Action)
			case tw.other && q.Action == Unknown:
			case tw.other && newerKey(q, original):
			case tw.other && q.Action == LegacyRead && original.Action == LegacyRead: // the whole tree is one action
			case q.Action == InstanceProvisioning && original.Path == instanceRoot: // more than its original, and more guarded
			case addsSelector(q, original): // policy sees it
			case !sameMeaning(q, original):
				t.Errorf("%q has the meaning %q %q, its original %s", tw.target, q.Subtree, q.Params, target)
			case q.Action != original.Action || !strings.EqualFold(q.Target(), target):
				t.Errorf("%q is taken for %s %s, its original is %s %s", tw.target, q.Action, q.Target(), original.Action, target)
			}
		}
		path, query, found := strings.Cut(target, "?")
		if found {
			query = "?" + query
			for tw := range queryTwins(path, query) {
				try(tw)
			}
		}
		for tw := range pathTwins(path, query) {
			try(tw)
		}
		for tw := range headerTwins(target) {
			try(tw)
		}
	}
	t.Logf("%d twins, %d refused", cases, refused)
	if cases < 500 || refused < cases/2 {
		t.Errorf("got %d twins, %d refused: the generator is broken", cases, refused)
	}
}
