package sim

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var start = time.Date(2026, 1, 15, 10, 15, 0, 0, time.UTC)

var testKeys = sync.OnceValues(func() (*Keys, error) { return NewKeys(start) })

// clock stands still until a test moves it.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// bench is a server, its clock, and the means to ask it without a network.
type bench struct {
	*Server
	t     *testing.T
	clock *clock
}

// newBench has no limits unless the config sets some.
func newBench(t *testing.T, c Config) *bench {
	t.Helper()
	keys, err := testKeys()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, clock: &clock{now: start}}
	c.Keys, c.Now = keys, b.clock.Now
	if c.Limits == (Limits{}) {
		c.Limits.Off = true
	}
	if b.Server, err = New(c); err != nil {
		t.Fatal(err)
	}
	return b
}

type answer struct {
	Status int
	Header http.Header
	Body   string
}

// do sends a request; headers are name, value, name, value…
func (b *bench) do(h http.Handler, method, target, body string, headers ...string) answer {
	b.t.Helper()
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	for i := 0; i < len(headers); i += 2 {
		r.Header[http.CanonicalHeaderKey(headers[i])] = append(r.Header.Values(headers[i]), headers[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return answer{Status: w.Code, Header: w.Header(), Body: w.Body.String()}
}

// get asks the metadata service, with the header that it wants.
func (b *bench) get(target string) answer {
	b.t.Helper()
	return b.do(b.Handler(), "GET", target, "", "Metadata", "true")
}

func (b *bench) manage(method, target, body string) answer {
	b.t.Helper()
	return b.do(b.Manage(), method, target, body)
}

func decode[T any](t *testing.T, a answer) T {
	t.Helper()
	var v T
	if a.Status != http.StatusOK {
		t.Fatalf("got status %d %s, want 200", a.Status, a.Body)
	}
	if err := json.Unmarshal([]byte(a.Body), &v); err != nil {
		t.Fatalf("body %s: %v", a.Body, err)
	}
	return v
}

// vmWith is the default VM with a file laid over it.
func vmWith(t *testing.T, yaml string) *VM {
	t.Helper()
	vm, err := ParseVM("vm.yaml", []byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	return vm
}
