package policy_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

// twinPolicies narrow in each way that there is: what one of them denies, another
// allows.
var twinPolicies = map[string]spec{
	"all": {Allow: known()},
	"narrowed": {Rules: []ruleSpec{
		{Name: "vault", Allow: []string{"identity.token"}, Resource: []string{vault}, Version: []string{"2018-*"}, Identity: map[string]string{"client_id": idA}},
		{Name: "parts", Allow: []string{"instance.read"}, Subtree: []string{"compute/osProfile", "network/interface/ipv4", "compute/tags"}},
		{Name: "certificates", Allow: []string{"identity.credential"}, Identity: "default"},
		{Name: "version", Allow: []string{"versions.read", "events.read", "instance.userdata"}, Version: []string{"2021-02-01"}},
	}},
	"denied": {Allow: known(), Rules: []ruleSpec{
		{Name: "tags", Deny: []string{"instance.read"}, Subtree: []string{"compute/tags", "compute/osProfile", "network/interface/mac"}},
		{Name: "secrets", Deny: []string{"identity.token", "identity.credential", "instance.userdata", "instance.provisioning", "events.approve", "unknown"}},
	}},
	"facts":   {Allow: []string{"instance.read"}},
	"nothing": {},
	"other":   {Rules: []ruleSpec{{Name: "b", Match: &matchSpec{Name: []string{"db"}}, Allow: known()}, {Name: "default", Allow: []string{"identity.token"}, Resource: []string{storage}, Identity: "default"}}},
}

func known() (names []string) {
	for _, a := range imds.Actions() {
		if a != imds.Unknown {
			names = append(names, string(a))
		}
	}
	return names
}

// originals are requests for every path that an action stands for.
func originals() (out []string) {
	rests := map[string][]string{
		"/metadata/instance/compute/…":       {"vmId", "tags", "tagsList", "osProfile", "osProfile/adminUsername"},
		"/metadata/instance/network…":        {"", "/interface/0/macAddress", "/interface/0/ipv4/ipAddress/0/publicIpAddress"},
		"/metadata/instance/…/userData…":     {"compute/userData"},
		"/metadata/instance/…/customData…":   {"compute/customData"},
		"/metadata/instance?extended=…":      {"true"},
		"/metadata/instance/extended…":       {"", "/compute/ppsType"},
		"/metadata/v1/…":                     {"InstanceInfo"},
		"/…":                                 {"metadata/nobody/knows"},
		"/metadata/identity/oauth2/token":    {"?resource=" + vault, "?resource=" + vault + "&client_id=" + idA, "?resource=" + storage, "?resource=" + vault + "&object_id=" + idB},
		"/metadata/identity/issuecredential": {"", "?client_id=" + idA, "?uaid=" + idA},
	}
	for _, a := range imds.Actions() {
		for _, p := range imds.Paths(imds.Azure, a) {
			method, path, _ := strings.Cut(p, " ")
			endings, pattern := rests[path], path
			if endings == nil {
				endings = []string{""}
			}
			for _, e := range endings {
				switch {
				case strings.Contains(pattern, "…/userData…"), strings.Contains(pattern, "…/customData…"):
					path = "/metadata/instance/" + e
				default:
					path = strings.TrimSuffix(pattern, "…") + e
				}
				sep := "?"
				if strings.Contains(path, "?") {
					sep = "&"
				}
				out = append(out, method+" "+path+sep+"api-version=2021-02-01", method+" "+path+sep+"api-version=2018-02-01")
			}
		}
	}
	return out
}

// twin is another spelling of a request, or one that means something else and
// looks like it.
type twin struct {
	target string
	edit   func(*http.Request)
	other  bool // it means something else: the slow reading says what becomes of it
}

// twinsOf are many twins of a target.
func twinsOf(method, target string) (out []twin) {
	path, query, _ := strings.Cut(target, "?")
	add := func(other bool, targets ...string) {
		for _, s := range targets {
			out = append(out, twin{target: s, other: other})
		}
	}
	for i := range len(path) {
		head, b, tail := path[:i], path[i], path[i+1:]+"?"+query
		add(false, head+fmt.Sprintf("%%%02x", b)+tail, head+fmt.Sprintf("%%25%02X", b)+tail)
		switch {
		case b == '/':
			for _, s := range []string{"//", "/./", "/../", "/x/../", "/%2e/", "/;x=1/", `\`, "/%00/", "/.", "%2f"} {
				add(false, head+s+tail)
			}
		case 'a' <= b|0x20 && b|0x20 <= 'z':
			add(false, head+string(rune(b^0x20))+tail)
		}
	}
	for _, s := range []string{"/", "//", "/.", "/..", "%20", ";", ";x=1", "#", "%23", "%3f", "%00", "*", "\\", "/%2e%2e", "?"} {
		add(false, path+s+"?"+query)
	}
	for _, s := range []string{"x", ".json", "/x", "/0", "~", "-"} {
		add(true, path+s+"?"+query)
	}
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		add(true, path[:i]+"?"+query) // the parent: for more than the original
	}
	add(false, "http://169.254.169.254"+target, "//169.254.169.254"+target, "/metadata/.."+target, "/"+target, strings.ToUpper(path)+"?"+query)
	out = append(out, queryTwins(path, query)...)
	add(true, path, target+"&format=text", target+"&format=JSON", target+"&extended=false")
	for _, s := range []string{"client_id=" + idB, "client_id=" + strings.ToUpper(idA), "object_id=" + idA, "msi_res_id=" + armID, "mi_res_id=" + armID, "client_id=", "principal_id=" + idA, "uaid=" + idB,
		"client_id=" + idA + "&object_id=" + idB, "CLIENT_ID=" + idB, "client%5fid=" + idB, "client_id=%20" + idA} {
		add(true, target+"&"+s)
	}
	for _, edit := range []func(*http.Request){
		func(r *http.Request) { r.Header.Set("X-Forwarded-For", "10.0.0.1") },
		func(r *http.Request) { r.Header.Set("X-Original-Url", "/metadata/versions") },
		func(r *http.Request) { r.Header.Set("X-Http-Method-Override", "POST") },
		func(r *http.Request) { r.Header.Del("Metadata") },
		func(r *http.Request) { r.Header["Metadata"] = []string{"true", "true"} },
		func(r *http.Request) { r.Header.Set("Metadata", "false") },
		func(r *http.Request) { r.Host = "metadata.example.test" },
		func(r *http.Request) { r.Method = "PUT" },
		func(r *http.Request) { r.Method = strings.ToLower(method) },
		func(r *http.Request) { r.ContentLength, r.TransferEncoding = -1, []string{"chunked"} },
	} {
		out = append(out, twin{target: target, edit: edit})
	}
	return out
}

// queryTwins write the pairs of a query in other ways.
func queryTwins(path, query string) (out []twin) {
	pairs := strings.Split(query, "&")
	for i, pair := range pairs {
		name, value, _ := strings.Cut(pair, "=")
		rest := append(slices.Clone(pairs[:i]), pairs[i+1:]...)
		emit := func(other bool, changed ...string) {
			for _, c := range changed {
				out = append(out, twin{target: path + "?" + strings.Join(append([]string{c}, rest...), "&"), other: other})
				out = append(out, twin{target: path + "?" + strings.Join(append(slices.Clone(rest), c), "&"), other: other})
			}
		}
		emit(false, pair, name+"="+escapeAll(value), escapeAll(name)+"="+value, strings.ToUpper(name)+"="+value,
			pair+"&"+pair, pair+"&"+strings.ToUpper(name)+"=x", name+"=x&"+pair, pair+"&"+escapeAll(name)+"=x", pair+";"+name+"=x", pair+"#x", pair+"%00", pair+"%0a", pair+"%",
			"&"+pair, name, name+"[]="+value, name+"%20="+value, "+"+pair, name+"%3D"+value)
		emit(true, pair+"&x=1", pair+"x", name+"="+value+"/", name+"=%20"+value, name+"="+strings.ToUpper(value), name+"="+value+".", name+"="+value+"%2F%2F", name+"=", "api-version=2019-02-01", "api-version=2021-02-01")
	}
	return out
}

func escapeAll(s string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, "%%%02x", s[i])
	}
	return b.String()
}

func classify(method string, tw twin) (imds.Query, *imds.Refusal) {
	r := &http.Request{Method: method, RequestURI: tw.target, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Host: "169.254.169.254", Header: http.Header{"Metadata": {"true"}}}
	if method == http.MethodPost {
		r.Header["Content-Length"] = []string{"0"}
	}
	if tw.edit != nil {
		tw.edit(r)
	}
	return imds.Classify(imds.Azure, r)
}

// tally counts twins by what became of them.
type tally struct{ run, refused, denied, same, other int }

// TestEvilTwins asks every policy about twins of requests that it allows and of
// requests that it denies. A twin is refused, or decided as its original, with the
// same request as its effect; of those that mean something else the slow reading of
// the language says what becomes of them. What is denied is never had by its twin.
func TestEvilTwins(t *testing.T) {
	var ofAllowed, ofDenied tally
	for name, s := range twinPolicies {
		v := force(t, s.text()).View(&web, workload.Listener)
		x := slowly{s: s, w: web, proof: workload.Listener}
		for _, request := range originals() {
			method, target, _ := strings.Cut(request, " ")
			original := ask(t, request)
			d := v.Decide(original)
			count := &ofDenied
			if d.Allow {
				count = &ofAllowed
			}
			for _, tw := range twinsOf(method, target) {
				count.run++
				q, f := classify(method, tw)
				if f != nil {
					count.refused++
					continue
				}
				e := v.Decide(q)
				switch {
				case tw.edit != nil:
					t.Errorf("%s: %s with its header changed is let through", name, request)
				case tw.other:
					count.other++
					if want := x.allows(q); e.Allow != want {
						t.Errorf("%s: %s, looking like %s: got %+v, want allow %v", name, tw.target, request, e, want)
					}
					if e.Allow && !d.Allow && sameData(q, original) {
						t.Errorf("%s: %s is denied, and had by %s", name, request, tw.target)
					}
				case e.Allow != d.Allow:
					t.Errorf("%s: %s: allow %v, and its twin %s %v", name, request, d.Allow, tw.target, e.Allow)
				case !e.Allow:
					count.denied++
				default:
					count.same++
					if why := differ(original, d, q, e); why != "" {
						t.Errorf("%s: %s and its twin %s: %s", name, request, tw.target, why)
					}
				}
			}
		}
	}
	t.Logf("of allowed requests: %+v", ofAllowed)
	t.Logf("of denied requests:  %+v", ofDenied)
	for _, c := range []tally{ofAllowed, ofDenied} {
		if c.run < 500 || c.refused < c.run/4 || c.other == 0 || c.same+c.denied == 0 {
			t.Errorf("got %+v: the generator is broken", c)
		}
	}
}

// allows is what the slow reading says of a query.
func (x slowly) allows(q imds.Query) bool {
	if q.Action != imds.InstanceRead {
		ok, _, _ := x.grant(q)
		return ok
	}
	// A part that is nobody's leaf is one itself.
	for _, leaf := range append(leaves, q.Subtree) {
		if under(leaf, q.Subtree) && leaf != "" && x.sees(leaf, q) {
			return true
		}
	}
	return false
}

// sameData reports whether two queries, though they differ in a word that rules
// look at, would be answered with the same data: no version, and no format, makes
// another of it.
func sameData(a, b imds.Query) bool {
	return a.Action == b.Action && a.Path == b.Path && a.Action == imds.InstanceRead
}

// differ says in what the effects of two allowed queries differ.
func differ(q imds.Query, d policy.Decision, r imds.Query, e policy.Decision) string {
	switch {
	case q.Action != r.Action || q.Subtree != r.Subtree:
		return fmt.Sprintf("%s %q, then %s %q", q.Action, q.Subtree, r.Action, r.Subtree)
	case d.Rule != e.Rule || policy.Effective(q, d) != policy.Effective(r, e):
		return fmt.Sprintf("%s as %s, then %s as %s", d.Rule, policy.Effective(q, d), e.Rule, policy.Effective(r, e))
	case !slices.Equal(d.Blank, e.Blank) || !slices.Equal(d.Cut.Keep, e.Cut.Keep) || !slices.Equal(d.Cut.Drop, e.Cut.Drop):
		return fmt.Sprintf("%v %+v, then %v %+v", d.Blank, d.Cut, e.Blank, e.Cut)
	}
	if a, b := q.WithSelector(d.Identity).Target(), r.WithSelector(e.Identity).Target(); !strings.EqualFold(a, b) {
		return a + ", then " + b
	}
	return ""
}
