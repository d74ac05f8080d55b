package imds

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// What the rules above rely on net/http for, seen through a real connection.
func TestBehindServer(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q, f := Classify(Azure, r)
		if f == nil {
			_, _ = io.WriteString(w, q.Method+" "+q.Target())
			return
		}
		for name, values := range f.Header() {
			w.Header()[name] = values
		}
		w.WriteHeader(f.Status)
		_, _ = w.Write(f.Body())
	}))
	defer srv.Close()

	const host = "Host: 169.254.169.254\r\n"
	const meta = "Metadata: true\r\n"
	tests := []struct {
		name, request string
		status        int
		body          string // "" means whatever net/http says
	}{
		{"get", "GET " + tokenGet + " HTTP/1.1\r\n" + host + meta + "\r\n", 200, "GET " + tokenGet},
		{"header-less probe", "GET " + tokenPath + " HTTP/1.1\r\n" + host + "\r\n", 400,
			`{"error":"invalid_request","error_description":"Required metadata header not specified"}`},
		{"post", "POST " + eventPost + " HTTP/1.1\r\n" + host + meta + "Content-Length: 2\r\n\r\n{}", 200, "POST " + eventPost},
		{"post of length zero", "POST " + eventPost + " HTTP/1.1\r\n" + host + meta + "Content-Length: 0\r\n\r\n", 200, "POST " + eventPost},
		{"post without length", "POST " + eventPost + " HTTP/1.1\r\n" + host + meta + "\r\n", 400, `{"error":"Content-Length is required"}`},
		{"absolute form", "GET http://169.254.169.254/metadata/versions HTTP/1.1\r\n" + host + meta + "\r\n", 400,
			`{"error":"the request target must be a path, such as /metadata/instance"}`},
		{"connect", "CONNECT 169.254.169.254:80 HTTP/1.1\r\n" + host + meta + "\r\n", 405, `{"error":"method not allowed"}`},
		{"two hosts", "GET /metadata/versions HTTP/1.1\r\n" + host + host + meta + "\r\n", 400, ""},
		{"two lengths", "POST " + eventPost + " HTTP/1.1\r\n" + host + meta + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400, ""},
		{"length and chunks", "POST " + eventPost + " HTTP/1.1\r\n" + host + meta + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, `{"error":"Transfer-Encoding is not supported"}`},
		{"metadata with space before the colon", "GET /metadata/versions HTTP/1.1\r\n" + host + "Metadata : true\r\n\r\n", 400, ""},
		{"folded header", "GET /metadata/versions HTTP/1.1\r\n" + host + "Metadata:\r\n true\r\n\r\n", 200, "GET /metadata/versions"},
		{"http 1.0 without host", "GET /metadata/versions HTTP/1.0\r\n" + meta + "\r\n", 400, `{"error":"the Host header does not name the metadata service"}`},
		{"http 2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, `{"error":"only HTTP/1.0 and HTTP/1.1 are served"}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := net.Dial("tcp", strings.TrimPrefix(srv.URL, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := io.WriteString(c, tt.request); err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != tt.status || tt.body != "" && string(body) != tt.body {
				t.Errorf("got %d %s, %v, want %d %s", resp.StatusCode, body, err, tt.status, tt.body)
			}
		})
	}
}
