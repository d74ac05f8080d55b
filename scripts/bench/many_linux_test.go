package bench

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imdsgate/internal/testnet"
)

// many measures what many containers cost: the memory of a proxy that has nothing
// to do, and all of them asking for one token in the same instant, of a service
// that enforces the platform's limits. All but one have nothing but a loopback: the
// gate needs no more.
func (b *bench) many(t *testing.T) {
	b.start(t, nil, nil)
	n := b.plan.containers
	cs := append(b.attach(t, n-1), b.client)
	first := b.memory(t)
	b.report.add(t, fmt.Sprintf("memory of the idle proxy, %d containers", n), "MiB", series{first / 1024}, nil, atMost(32))
	b.attach(t, n/2)
	b.report.add(t, "memory for each further container", "KiB", series{(b.memory(t) - first) / float64(n/2)}, nil, atMost(12))
	b.oneToken(t, cs)
}

// attach makes further containers, and returns when the proxy has their listeners.
func (b *bench) attach(t *testing.T, n int) (cs []*testnet.Container) {
	t.Helper()
	before := descriptors(t, b.Proxy.PID())
	for i := range n {
		c, err := b.NewBareContainer(fmt.Sprintf("%d-of-%d", i, n))
		if err != nil {
			t.Fatal(err)
		}
		cs = append(cs, c)
	}
	if _, err := b.WriteWorkloads(); err != nil {
		t.Fatal(err)
	}
	b.Agent.Signal(syscall.SIGHUP)
	deadline := time.After(time.Minute)
	for again := time.Tick(50 * time.Millisecond); descriptors(t, b.Proxy.PID()) < before+n; {
		select {
		case <-again:
		case <-deadline:
			t.Fatalf("a minute after the agent was told of %d more containers the proxy has %d descriptors, before %d: %s",
				n, descriptors(t, b.Proxy.PID()), before, b.Agent.Output())
		}
	}
	return cs
}

func descriptors(t *testing.T, pid int) int {
	t.Helper()
	es, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(es)
}

// memory is the proxy's resident memory in KiB, once it has stayed the same for two
// seconds, or after the time that it is given to settle.
func (b *bench) memory(t *testing.T) (kib float64) {
	t.Helper()
	const still = 4
	same := 0
	for end, again := time.After(b.plan.settle), time.Tick(500*time.Millisecond); same < still; {
		select {
		case <-again:
		case <-end:
			return kib
		}
		text := valueIn(fmt.Sprintf("/proc/%d/status", b.Proxy.PID()), "VmRSS")
		now, err := strconv.ParseFloat(strings.TrimSuffix(text, " kB"), 64)
		if err != nil {
			t.Fatalf("VmRSS of the proxy is %q", text)
		}
		if same++; now != kib {
			same, kib = 0, now
		}
	}
	return kib
}

// oneToken has all ask at once, each round for another token.
func (b *bench) oneToken(t *testing.T, cs []*testnet.Container) {
	var calls, failed, p99 series
	for round := range b.plan.rounds {
		resource := fmt.Sprintf("https://r%d.example", round)
		shots := volley(t, cs, "/metadata/identity/oauth2/token?api-version=2018-02-01&resource="+url.QueryEscape(resource))
		var times series
		bad := 0.0
		for _, s := range shots {
			if s.err != nil {
				bad++
				t.Logf("a container got %v", s.err)
				continue
			}
			times = append(times, float64(s.took.Microseconds())/1000)
		}
		failed, p99 = append(failed, bad), append(p99, times.quantile(0.99))
		calls = append(calls, float64(b.asked(t, resource)))
	}
	name := fmt.Sprintf("%d containers ask for one token at once", len(cs))
	b.report.add(t, name, "calls to the service", calls, nil, goal{"1", func(r *row) bool { return all(r.Runs, 1) }})
	b.report.add(t, name, "errors", failed, nil, goal{"0", func(r *row) bool { return all(r.Runs, 0) }})
	b.report.add(t, name, "p99, ms", p99, nil, goal{})
}

func all(s series, want float64) bool {
	for _, v := range s {
		if v != want {
			return false
		}
	}
	return true
}

// asked counts the calls to the service that were about something.
func (b *bench) asked(t *testing.T, about string) (n int) {
	t.Helper()
	seen, err := b.History(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range seen {
		if target, err := url.QueryUnescape(s.Target); err == nil && strings.Contains(target, about) {
			n++
		}
	}
	return n
}

// shot is one container's request.
type shot struct {
	fd   int
	took time.Duration
	err  error
}

// volley sends one request from each container at the same instant, on a
// connection that begins only then. The sockets are made before: a socket belongs
// to the namespace that it was made in.
func volley(t *testing.T, cs []*testnet.Container, target string) []*shot {
	t.Helper()
	var shots []*shot
	for _, c := range cs {
		s := new(shot)
		err := c.NS.Do(func() (err error) {
			s.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		shots = append(shots, s)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	fire := make(chan struct{})
	var ready, done sync.WaitGroup
	for _, s := range shots {
		ready.Add(1)
		done.Go(func() {
			ready.Done()
			<-fire
			begun := time.Now()
			s.err = s.shoot(ctx, target)
			s.took = time.Since(begun)
		})
	}
	ready.Wait()
	close(fire)
	done.Wait()
	return shots
}

func (s *shot) shoot(ctx context.Context, target string) error {
	f := os.NewFile(uintptr(s.fd), "socket")
	defer f.Close()
	if err := unix.Connect(s.fd, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{169, 254, 169, 254}}); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return err
	}
	defer c.Close()
	if d, ok := ctx.Deadline(); ok {
		c.SetDeadline(d)
	}
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nMetadata: true\r\nConnection: close\r\n\r\n", target, testnet.IMDS4); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		return fmt.Errorf("status %s", resp.Status)
	}
	return nil
}
