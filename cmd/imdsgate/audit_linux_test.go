package main

import (
	"bufio"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// TestAuditReaderGoes takes away whoever reads the audit lines from the proxy's
// stdout: requests are answered all the same.
func TestAuditReaderGoes(t *testing.T) {
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "{}") }))
	defer service.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary(t), "proxy", "--listen", "127.0.0.1:0", "--upstream", service.URL, "--log-json")
	cmd.Stdout = w
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("proxy: %v", err)
		}
	}()
	w.Close()
	var ready struct{ Listen string }
	s := bufio.NewScanner(log)
	for ready.Listen == "" && s.Scan() {
		if err := json.Unmarshal(s.Bytes(), &ready); err != nil {
			t.Fatal(err)
		}
	}
	go io.Copy(io.Discard, log)
	ask := func() int {
		t.Helper()
		req, err := http.NewRequest(http.MethodGet, "http://"+ready.Listen+"/metadata/versions", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Metadata", "true")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	if got := ask(); got != 200 {
		t.Fatalf("with a reader: %d", got)
	}
	if _, err := bufio.NewReader(r).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	r.Close()
	for range 5 {
		if got := ask(); got != 200 {
			t.Errorf("without a reader: %d", got)
		}
	}
}
