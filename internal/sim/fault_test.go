package sim

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestStatusFaultsSpeakTheFamilysLanguage(t *testing.T) {
	rows := []struct {
		status int
		target string
		body   string
	}{
		{404, "/metadata/instance", `{ "error": "Not found" }`},
		{410, "/metadata/instance", `{"error":"Gone"}`},
		{429, "/metadata/instance", `{"error":"Too many requests"}`},
		{500, "/metadata/instance", `{"error":"Internal Server Error"}`},
		{503, "/metadata/loadbalancer", `{"error":"Service Unavailable"}`},
		{401, tokenPath, `{"error":"unknown_source","error_description":"Unauthorized"}`},
		{404, tokenPath, `{"error":"not_found","error_description":"Not found"}`},
		{410, tokenPath, `{"error":"service_unavailable","error_description":"Gone"}`},
		{429, tokenPath, `{"error":"too_many_requests","error_description":"Too many requests"}`},
		{500, tokenPath, `{"error":"unknown","error_description":"Failed to retrieve token from the Active directory"}`},
		{502, tokenPath, `{"error":"server_error","error_description":"Bad Gateway"}`},
	}
	for _, row := range rows {
		b := newBench(t, Config{Faults: []Fault{{Status: row.status}}})
		if a := b.get(row.target); a.Status != row.status || a.Body != row.body {
			t.Errorf("%d on %s: got %d %s, want %s", row.status, row.target, a.Status, a.Body, row.body)
		}
	}
}

func TestFaultCountsDownAndIsForItsPathOnly(t *testing.T) {
	b := newBench(t, Config{Faults: []Fault{{Status: 429, Path: "/Metadata/identity/", Count: 3}}})
	for range 2 {
		if a := b.get("/metadata/versions"); a.Status != 200 {
			t.Errorf("another path: got %d", a.Status)
		}
	}
	if got := count(5, func() answer { return b.get(tokenURL + arm) }); got[429] != 3 || got[200] != 2 {
		t.Errorf("got %v, want 3 refusals, then answers", got)
	}
	if got := b.Faults(); len(got) != 0 {
		t.Errorf("got %v, want a used-up fault gone", got)
	}
	if err := b.SetFaults([]Fault{{Status: 500, Path: "/metadata/vers"}, {Status: 500, Method: "POST"}}); err != nil {
		t.Fatal(err)
	}
	if a := b.get("/metadata/versions"); a.Status != 200 {
		t.Errorf("part of a name, another method: got %d, want 200", a.Status)
	}
}

func TestFaultsAddUpToTheFirstThatEndsTheRequest(t *testing.T) {
	var l faultList
	err := l.set([]Fault{{Latency: time.Second, Count: 1}, {Latency: time.Minute}, {Status: 503, Count: 1}, {Status: 404}}, start)
	if err != nil {
		t.Fatal(err)
	}
	first, second := l.apply("GET", "/x", start), l.apply("GET", "/x", start)
	if first.latency != time.Minute+time.Second || first.status != 503 {
		t.Errorf("first: got %+v", first)
	}
	if second.latency != time.Minute || second.status != 404 {
		t.Errorf("second: got %+v", second)
	}
}

func TestGoneForAWhile(t *testing.T) {
	b := newBench(t, Config{Faults: []Fault{{Gone: time.Minute}}})
	b.clock.advance(59 * time.Second)
	if a := b.get("/metadata/versions"); a.Status != 410 {
		t.Errorf("after 59 s: got %d, want 410", a.Status)
	}
	b.clock.advance(time.Second)
	if a := b.get("/metadata/versions"); a.Status != 200 {
		t.Errorf("after 60 s: got %d, want 200", a.Status)
	}
	if got := b.Faults(); len(got) != 0 {
		t.Errorf("got %v, want it gone from the list", got)
	}
}

func TestDownIsTheFrontsAnswer(t *testing.T) {
	a := newBench(t, Config{Faults: []Fault{{Down: true}}}).get(tokenURL + arm)
	if a.Status != 500 || a.Header.Get("Server") != "Microsoft-IIS/10.0" || a.Header.Get("Content-Type") != "text/plain" {
		t.Errorf("got %d %v", a.Status, a.Header)
	}
}

func TestTokenTTL(t *testing.T) {
	b := newBench(t, Config{})
	before := decode[map[string]string](t, b.get(tokenURL+arm))
	if err := b.SetFaults([]Fault{{TokenTTL: 30 * time.Second}}); err != nil {
		t.Fatal(err)
	}
	short := decode[map[string]string](t, b.get(tokenURL+arm))
	if short["expires_in"] != "30" || short["expires_on"] != "1768472130" || short["access_token"] == before["access_token"] {
		t.Errorf("got expires_in %s, expires_on %s, want a new token of 30 s", short["expires_in"], short["expires_on"])
	}
	b.clock.advance(28 * time.Second)
	if again := decode[map[string]string](t, b.get(tokenURL+arm)); again["access_token"] == short["access_token"] {
		t.Error("two seconds before its end the token was not renewed")
	}
	if err := b.SetFaults([]Fault{{TokenTTL: -time.Minute, Count: 1}}); err != nil {
		t.Fatal(err)
	}
	b.get("/metadata/versions") // does not use the fault up
	expired := decode[map[string]string](t, b.get(tokenURL+arm))
	if expired["expires_in"] != "0" || expired["expires_on"] != "1768472068" {
		t.Errorf("got expires_in %s, expires_on %s, want an expired token", expired["expires_in"], expired["expires_on"])
	}
	if back := decode[map[string]string](t, b.get(tokenURL+arm)); back["access_token"] != before["access_token"] {
		t.Error("afterwards: got another token than before the fault")
	}
}

func TestLatency(t *testing.T) {
	asked, fire := make(chan time.Duration, 1), make(chan time.Time)
	b := newBench(t, Config{
		Faults: []Fault{{Latency: 200 * time.Millisecond, Count: 2}},
		After:  func(d time.Duration) <-chan time.Time { asked <- d; return fire },
	})
	got := make(chan answer)
	go func() { got <- b.get("/metadata/versions") }()
	if d := <-asked; d != 200*time.Millisecond {
		t.Errorf("got a pause of %v, want 200 ms", d)
	}
	if h := b.History(); len(h) != 0 {
		t.Errorf("answered before the pause was over: %v", h)
	}
	fire <- start
	if a := <-got; a.Status != 200 {
		t.Errorf("got %d, want 200", a.Status)
	}

	ctx, leave := context.WithCancel(t.Context())
	left := make(chan struct{})
	go func() { defer close(left); hangUntil(b, ctx) }()
	<-asked
	leave()
	<-left
}

// client makes a connection of its own for each request.
func client(t *testing.T) *http.Client {
	tr := &http.Transport{DisableKeepAlives: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func TestReset(t *testing.T) {
	b := newBench(t, Config{Faults: []Fault{{Reset: true, Count: 1}}})
	srv := httptest.NewServer(b.Handler())
	defer srv.Close()
	_, err := client(t).Get(srv.URL + "/metadata/versions")
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a connection reset", err)
	}
	res, err := client(t).Get(srv.URL + "/metadata/versions")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	io.Copy(io.Discard, res.Body)
	if res.StatusCode != 400 {
		t.Errorf("afterwards: got %d, want 400", res.StatusCode)
	}
	var statuses []int
	for _, x := range b.History() {
		statuses = append(statuses, x.Status)
	}
	if diff := cmp.Diff([]int{0, 400}, statuses); diff != "" {
		t.Errorf("history (-want +got):\n%s", diff)
	}
}

func TestCut(t *testing.T) {
	b := newBench(t, Config{Faults: []Fault{{Cut: true}}})
	srv := httptest.NewServer(b.Handler())
	defer srv.Close()
	res, err := client(t).Get(srv.URL + "/metadata/versions")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if !errors.Is(err, io.ErrUnexpectedEOF) || int64(len(body)) != res.ContentLength/2 {
		t.Errorf("got %d of %d bytes and %v, want half and an unexpected end", len(body), res.ContentLength, err)
	}
}

func TestHangLastsUntilTheClientLeaves(t *testing.T) {
	arrived := make(chan struct{})
	b := newBench(t, Config{Faults: []Fault{{Hang: true}}, Seen: func(Exchange) { close(arrived) }})
	srv := httptest.NewServer(b.Handler())
	defer srv.Close()
	ctx, leave := context.WithCancel(t.Context())
	r, _ := http.NewRequestWithContext(ctx, "GET", srv.URL, nil)
	got := make(chan error)
	go func() {
		res, err := client(t).Do(r)
		if err == nil {
			res.Body.Close()
		}
		got <- err
	}()
	<-arrived
	leave()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the client's own end", err)
	}
}

func TestParseFault(t *testing.T) {
	for text, want := range map[string]Fault{
		"status=429,path=/metadata/identity,count=3": {Status: 429, Path: "/metadata/identity", Count: 3},
		"latency=200ms":                      {Latency: 200 * time.Millisecond},
		"hang":                               {Hang: true},
		"reset,method=POST":                  {Reset: true, Method: "POST"},
		"gone=60s":                           {Gone: time.Minute},
		"token-ttl=30s":                      {TokenTTL: 30 * time.Second},
		"token-ttl=-1m":                      {TokenTTL: -time.Minute},
		"partial,count=1":                    {Partial: true, Count: 1},
		"down":                               {Down: true},
		"cut":                                {Cut: true},
		"latency=1s,status=500":              {Latency: time.Second, Status: 500},
		"hang=false,reset=true,path=/a/b/c/": {Reset: true, Path: "/a/b/c/"},
	} {
		got, err := ParseFault(text)
		if err != nil || got != want {
			t.Errorf("%q: got %+v %v, want %+v", text, got, err, want)
		}
		wire, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		var back Fault
		if err := json.Unmarshal(wire, &back); err != nil || back != want {
			t.Errorf("%q: by way of %s: got %+v %v", text, wire, back, err)
		}
	}
}

func TestParseFaultRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"":                       `fault "": unknown key "": want one of path,`,
		"slow":                   `unknown key "slow"`,
		"path=/metadata":         "it does nothing",
		"hang=false":             "it does nothing",
		"status":                 `status: cannot use "true"`,
		"status=200":             "status: want 400 to 599, got 200",
		"status=600":             "status: want 400 to 599, got 600",
		"status=500,hang":        "want one of status, hang, reset, cut, down and gone",
		"gone=60":                `gone: cannot use "60"`,
		"gone=-60s":              "cannot be below 0",
		"latency=-1s":            "cannot be below 0",
		"hang,count=-1":          "cannot be below 0",
		"token-ttl=0s":           `token-ttl: cannot use "0s"`,
		"hang,path=metadata":     `path: want a leading slash, got "metadata"`,
		"hang=perhaps":           `hang takes no value, got "perhaps"`,
		"hang=1":                 `hang takes no value, got "1"`,
		"partial=":               `partial takes no value, got ""`,
		"reset,count=3,times=10": `unknown key "times"`,
	} {
		if _, err := ParseFault(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

func TestFaultJSONRefuses(t *testing.T) {
	for text, want := range map[string]string{
		`{"status":"x"}`:              `status: cannot use "x"`,
		`{"status":null}`:             "cannot use",
		`{"down":1}`:                  `down takes no value, got "1"`,
		`{"status":429,"more":1}`:     `unknown key "more"`,
		`{"status":429.5}`:            `status: cannot use "429.5"`,
		`{}`:                          "it does nothing",
		`[]`:                          "fault:",
		`{"latency":["1s"]}`:          "latency: cannot use",
		`{"hang":true,"reset":true}`:  "want one of",
		`{"hang":true,"count":"abc"}`: "count: cannot use",
	} {
		var f Fault
		if err := json.Unmarshal([]byte(text), &f); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", text, err, want)
		}
	}
}
