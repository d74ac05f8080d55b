package sim

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// Whatever is asked, the answer is one of the service's statuses, and an error
// has a body in its shape.
func FuzzRequest(f *testing.F) {
	for _, seed := range []string{
		"/metadata/instance?api-version=2021-02-01", "/metadata/instance/compute/tagsList/0/name?api-version=2025-04-07&format=text",
		"/Metadata/İnstance?api-version=2021-02-01", tokenURL + arm + "&client_id=" + webID, eventsURL + "2020-07-01",
		"/metadata/instance//?api-version=2017-04-02", "/%2e%2e/metadata/v1", "*", "/metadata/attested/document?nonce=%00&api-version=2018-10-01",
	} {
		f.Add("GET", seed, "", false)
		f.Add("POST", seed, `{"StartRequests":[{"EventId":"x"}]}`, true)
	}
	keys, err := testKeys()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, method, target, body string, anyCase bool) {
		u, err := url.ParseRequestURI(target)
		if err != nil || method == "" || method == http.MethodHead {
			return
		}
		s, err := New(Config{Keys: keys, Limits: Limits{Off: true}, AnyCase: anyCase})
		if err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequest("GET", "/", strings.NewReader(body))
		r.Method, r.URL, r.RequestURI = method, u, target
		r.Header.Set("Metadata", "true")
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		switch w.Code {
		case 200:
		case 400, 404, 405:
			var v struct{ Error string }
			if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil || v.Error == "" {
				t.Errorf("got %d %q: want an error in JSON", w.Code, w.Body)
			}
		default:
			t.Errorf("got status %d", w.Code)
		}
	})
}

// A file gives a VM that can be served, or an error that names the file.
func FuzzParseVM(f *testing.F) {
	for _, seed := range []string{
		"", "instance: {compute: {tags: 'a:1'}}", "identity: null", "a: &a [*a]", "<<: {a: b}", "instance:\n  network: {interface: [{}]}",
		"? [a]\n: b", "versions: [2019-06-01]", "instance: {compute: null, network: ~}", "!!binary x", "loadbalancer: {inboundRules: [{}]}",
	} {
		f.Add([]byte(seed))
	}
	keys, err := testKeys()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		vm, err := ParseVM("vm.yaml", data)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "vm.yaml:") {
				t.Errorf("got %v: want the file in it", err)
			}
			return
		}
		s, err := New(Config{VM: vm, Keys: keys, Limits: Limits{Off: true}})
		if err != nil {
			t.Fatalf("a VM from a file is refused: %v", err)
		}
		r := httptest.NewRequest("GET", "/metadata/instance?api-version="+vm.Versions[len(vm.Versions)-1], nil)
		r.Header.Set("Metadata", "true")
		s.Handler().ServeHTTP(httptest.NewRecorder(), r)
	})
}
