package imds

import (
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestForwardHeader(t *testing.T) {
	pass := http.Header{
		"Metadata":                      {"True"},
		"Accept":                        {"*/*", "text/plain"},
		"User-Agent":                    {"curl/8"},
		"Content-Type":                  {"application/json"},
		"X-Client-Sku":                  {"MSAL.Go"},
		"X-Client-Ver":                  {"1"},
		"X-Ms-Client-Request-Id":        {"r"},
		"X-Ms-Correlation-Id":           {"c"},
		"X-Ms-Return-Client-Request-Id": {"true"},
	}
	h := pass.Clone()
	for _, name := range []string{"Accept-Encoding", "Authorization", "Connection", "Content-Length", "Cookie", "Expect", "Forwarded", "Host",
		"Keep-Alive", "Proxy-Authorization", "Proxy-Connection", "Range", "Te", "Transfer-Encoding", "Upgrade", "Via", "X-Client-Ip",
		"X_Client_Sku", "X-Forwarded-For", "X-Ms-Azure-Host-Claims", "X-Ms-Version", "X-Aws-Ec2-Metadata-Token", "X-Unknown"} {
		h.Set(name, "x")
	}
	h["x-client-os"] = []string{"linux"} // not in canonical form
	pass["X-Client-Os"] = []string{"linux"}

	got := ForwardHeader(h)
	if d := cmp.Diff(pass, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	got["Metadata"][0] = "changed"
	if h.Get("Metadata") != "True" {
		t.Error("the result shares values with the argument")
	}
	if got := ForwardHeader(http.Header{}); len(got) != 0 {
		t.Errorf("got %v of nothing: a header was invented", got)
	}
}

func TestAnswerHeader(t *testing.T) {
	pass := http.Header{
		"Content-Type":    {"application/json; charset=utf-8"},
		"Content-Length":  {"2"},
		"Server":          {"IMDS/150.870.65.1854"},
		"X-Ms-Request-Id": {"r"},
		"Set-Cookie":      {"a", "b"},
	}
	h := pass.Clone()
	h["Connection"] = []string{"close, X-Hop", "x-other"}
	for _, name := range []string{"X-Hop", "X-Other", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Te",
		"Trailer", "Transfer-Encoding", "Upgrade"} {
		h.Set(name, "x")
	}
	got := AnswerHeader(h)
	if d := cmp.Diff(pass, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	got["Server"][0] = "changed"
	if h.Get("Server") != "IMDS/150.870.65.1854" {
		t.Error("the result shares values with the argument")
	}
}
