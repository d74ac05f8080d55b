package bench

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"imdsgate/internal/netns"
	"imdsgate/internal/testnet"
)

// system is something that answers metadata requests, as a container reaches it.
type system struct {
	name string
	base string // http://host:port
	logs string // file that grows by a line for each request; empty: none

	from *netns.Handle // who asks, if it is not the container
}

const service = "http://" + testnet.IMDS4

// nginxConf is how every nginx here begins; %s is a folder.
const nginxConf = `daemon off; user root; worker_processes auto; pid %[1]s/pid; error_log stderr warn;
events { worker_connections 1024; }
http {
  client_body_temp_path %[1]s/a; proxy_temp_path %[1]s/b; fastcgi_temp_path %[1]s/c; uwsgi_temp_path %[1]s/d; scgi_temp_path %[1]s/e;
  sendfile on; tcp_nopush on;
`

// nginxCache keeps answers and connections: once as Debian's configuration has the
// rest, with a log of the requests, as the gate has one, and once with all that
// makes it faster.
const nginxCache = `  upstream imds { server 169.254.169.254:80; keepalive 64; }
  proxy_cache_path %[1]s/cache keys_zone=imds:1m;
  proxy_cache imds; proxy_cache_key $request_uri; proxy_cache_valid 200 1h; proxy_ignore_headers Cache-Control Expires Set-Cookie Vary;
  proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host 169.254.169.254;
  server { listen %[2]s:8081; access_log %[1]s/access.log; location / { proxy_pass http://imds; } }
  server { listen %[2]s:8082; access_log off; open_file_cache max=1000; keepalive_requests 1000000000; location / { proxy_pass http://imds; } }
}
`

// haproxyConf keeps what the service marks as not to be kept, as all others here do.
const haproxyConf = `defaults
  mode http
  timeout connect 5s
  timeout client 1m
  timeout server 1m
  http-reuse always
cache imds
  total-max-size 16
  max-object-size 100000
  max-age 3600
frontend kept
  bind %[1]s:8083
  http-request cache-use imds
  http-response set-header Cache-Control max-age=3600
  http-response cache-store imds
  default_backend imds
frontend passed
  bind %[1]s:8084
  default_backend imds
backend imds
  server imds 169.254.169.254:80
`

// peers starts all others on the VM's bridge. Those that keep answers come first.
func peers(t *testing.T, s *testnet.Stack) (keep, pass []system) {
	t.Helper()
	bridge := "172.30.1.1"
	dir := folder(t, s, "nginx")
	nginx(t, s, s.VM.NS, dir, fmt.Sprintf(nginxConf+nginxCache, dir, bridge))
	conf := filepath.Join(s.Dir, "haproxy.cfg")
	write(t, conf, fmt.Sprintf(haproxyConf, bridge))
	spawn(t, s, s.VM.NS, exec.Command("haproxy", "-db", "-f", conf))
	for port, idle := range map[int]int{8085: 0, 8086: 64} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s:%d %s %d", reverseEnv, bridge, port, service, idle))
		spawn(t, s, s.VM.NS, cmd)
	}
	at := func(port int) string { return fmt.Sprintf("http://%s:%d", bridge, port) }
	reverse := system{name: "Go ReverseProxy", base: at(8085)}
	keep = []system{
		{name: "nginx proxy_cache", base: at(8081), logs: filepath.Join(dir, "access.log")},
		{name: "nginx proxy_cache, tuned, no log", base: at(8082)},
		{name: "HAProxy http, cache", base: at(8083)},
		reverse,
	}
	return keep, []system{reverse, {name: "Go ReverseProxy, 64 idle", base: at(8086)}, {name: "HAProxy http", base: at(8084)}}
}

// nginx starts one with a master, so that it has a worker for each CPU. Its
// workers outlive a master that is killed, but not the process namespace.
func nginx(t *testing.T, s *testnet.Stack, ns *netns.Handle, dir, conf string) {
	t.Helper()
	path := filepath.Join(dir, "nginx.conf")
	write(t, path, conf)
	cmd := exec.Command("nginx", "-c", path, "-p", dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	spawn(t, s, ns, cmd)
}

// direct starts an nginx on the loopback of a container, that has the answer in
// its configuration: nothing on that way can be faster.
func direct(t *testing.T, s *testnet.Stack, c *testnet.Container, body string) system {
	t.Helper()
	dir := folder(t, s, "direct")
	server := fmt.Sprintf("  access_log off; keepalive_requests 1000000000; default_type text/plain;\n  server { listen 127.0.0.1:8080; location / { return 200 %q; } }\n}\n", body)
	nginx(t, s, c.NS, dir, fmt.Sprintf(nginxConf, dir)+server)
	return system{name: "nginx on loopback, fixed answer", base: "http://127.0.0.1:8080"}
}

func spawn(t *testing.T, s *testnet.Stack, ns *netns.Handle, cmd *exec.Cmd) {
	t.Helper()
	if _, err := s.Spawn(ns, filepath.Base(cmd.Args[0]), cmd); err != nil {
		t.Fatal(err)
	}
}

func folder(t *testing.T, s *testnet.Stack, name string) string {
	t.Helper()
	dir := filepath.Join(s.Dir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// ask gets one answer from inside a namespace, and waits for a server that does not
// listen yet.
func ask(t *testing.T, ns *netns.Handle, url string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		for again := time.Tick(20 * time.Millisecond); ; {
			c, err := testnet.Dial(ctx, ns, network, address)
			if err == nil || ctx.Err() != nil {
				return c, err
			}
			<-again
		}
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = testnet.IMDS4
	req.Header.Set("Metadata", "true")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%s: %s, %v: %s", url, resp.Status, err, strings.TrimSpace(string(b)))
	}
	return string(b)
}
