package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/netns"
	"imdsgate/internal/sim"
	"imdsgate/internal/testnet"
)

const (
	answersPolicy = "allow: [versions.read, instance.read, instance.userdata, identity.token, identity.document]\n"
	service       = testnet.IMDS4 + ":80"
	tokenTarget   = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource="
)

// answersSetup is a stack with agent and proxy for tests of answers.
type answersSetup struct {
	sim        []string // flags; without any the platform's limits hold
	proxy      []string // flags
	policy     string   // empty: answersPolicy
	containers int      // bare ones
}

func startAnswers(t *testing.T, u answersSetup) (*testnet.Stack, []*testnet.Container) {
	t.Helper()
	testnet.Require(t, testnet.Namespaces, testnet.BPF)
	s, err := testnet.NewStack(binary(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	cs := make([]*testnet.Container, u.containers)
	for i := range cs {
		if cs[i], err = s.NewBareContainer(fmt.Sprintf("c%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	policy := filepath.Join(s.Dir, "policy.yaml")
	if u.policy == "" {
		u.policy = answersPolicy
	}
	if err := os.WriteFile(policy, []byte(u.policy), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.StartSim(t.Context(), u.sim...); err != nil {
		t.Fatal(err)
	}
	if n, err := s.StartAgent(t.Context(), "--fence", "require"); err != nil || n != u.containers {
		t.Fatalf("agent: %d attached, %v", n, err)
	}
	if err := s.StartProxy(t.Context(), append([]string{"--policy", policy, "--audit", "-"}, u.proxy...)...); err != nil {
		t.Fatal(err)
	}
	return s, cs
}

// reply is what a client sees.
type reply struct {
	status int
	header http.Header
	body   []byte
	took   time.Duration
}

func get(target string) string {
	return "GET " + target + " HTTP/1.1\r\nHost: " + testnet.IMDS4 + "\r\nMetadata: true\r\n\r\n"
}

// callIn sends a request as it stands on a new connection from inside a namespace.
// The error is one of the connection: none of HTTP's statuses is.
func callIn(ctx context.Context, ns *netns.Handle, request string) (reply, error) {
	begun := time.Now()
	c, err := testnet.Dial(ctx, ns, "tcp4", service)
	if err != nil {
		return reply{}, err
	}
	defer c.Close()
	return askOn(ctx, c, request, begun)
}

func askOn(ctx context.Context, c net.Conn, request string, begun time.Time) (reply, error) {
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := io.WriteString(c, request); err != nil {
		return reply{}, err
	}
	method, _, _ := strings.Cut(request, " ")
	resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		return reply{}, err
	}
	body, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, body, time.Since(begun)}, err
}

// manage calls the simulator's management API, which only the fabric reaches.
func manage(t *testing.T, s *testnet.Stack, method, path string, in, out any) {
	t.Helper()
	text, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return testnet.Dial(ctx, s.Fabric.NS, network, address)
		},
	}}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://127.0.0.1:8170"+path, bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode > 299 {
		t.Fatalf("%s %s: %s, %v: %s", method, path, resp.Status, err, body)
	}
	if out != nil {
		if err := json.Unmarshal(body, out); err != nil {
			t.Fatal(err)
		}
	}
}

// setFaults makes the simulator misbehave, in the words of simulate --fault.
func setFaults(t *testing.T, s *testnet.Stack, texts ...string) {
	t.Helper()
	faults := make([]sim.Fault, len(texts))
	for i, text := range texts {
		var err error
		if faults[i], err = sim.ParseFault(text); err != nil {
			t.Fatal(err)
		}
	}
	manage(t, s, http.MethodPut, "/faults", faults, nil)
}

// calls is what the service was asked.
func calls(t *testing.T, s *testnet.Stack) []sim.Exchange {
	t.Helper()
	var all []sim.Exchange
	manage(t, s, http.MethodGet, "/history", nil, &all)
	return all
}

// auditOf is what the proxy has recorded so far.
func auditOf(t *testing.T, s *testnet.Stack) []audit.Event {
	t.Helper()
	var all []audit.Event
	for _, line := range s.Proxy.Lines() {
		if !strings.Contains(line, `"decision"`) {
			continue
		}
		var e audit.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		all = append(all, e)
	}
	return all
}

// quantile is the smallest of the times that a share q of them does not exceed.
func quantile(times []time.Duration, q float64) time.Duration {
	if len(times) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(times))
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// containersEnv has a test run with another number of containers, where descriptors
// are few: agent and test hold four of them for each.
const containersEnv = "IMDSGATE_CONTAINERS"

// fleetSize is the number of containers of a test that is about many.
func fleetSize(t *testing.T, usual int) int {
	t.Helper()
	text := os.Getenv(containersEnv)
	if text == "" {
		return usual
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: want a number of containers", containersEnv, text)
	}
	return n
}
