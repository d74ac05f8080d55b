package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imdsgate/internal/testnet"
)

// shot is one request of a volley, and what came of it.
type shot struct {
	request string
	fd      int
	reply   reply
	err     error
}

// volley sends one request for each container and target at the same instant,
// each on a connection that begins only then. The sockets are made before, since
// a socket belongs to the namespace that it was made in.
func volley(t *testing.T, cs []*testnet.Container, targets func(container int) []string) (shots []*shot, took time.Duration) {
	t.Helper()
	for i, c := range cs {
		for _, target := range targets(i) {
			x := &shot{request: get(target)}
			err := c.NS.Do(func() (err error) {
				x.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			shots = append(shots, x)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	fire := make(chan struct{})
	var ready, done sync.WaitGroup
	for _, x := range shots {
		ready.Add(1)
		done.Go(func() {
			ready.Done()
			<-fire
			x.reply, x.err = x.shoot(ctx)
		})
	}
	ready.Wait()
	begun := time.Now()
	close(fire)
	done.Wait()
	return shots, time.Since(begun)
}

func (x *shot) shoot(ctx context.Context) (reply, error) {
	begun := time.Now()
	f := os.NewFile(uintptr(x.fd), "socket")
	defer f.Close()
	if err := unix.Connect(x.fd, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{169, 254, 169, 254}}); err != nil {
		return reply{}, fmt.Errorf("connect: %w", err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return reply{}, err
	}
	defer c.Close()
	return askOn(ctx, c, x.request, begun)
}

// allServed checks that each shot got 200, and returns how long they took.
func allServed(t *testing.T, shots []*shot) []time.Duration {
	t.Helper()
	var times []time.Duration
	failed := make(map[string]int)
	for _, x := range shots {
		switch {
		case x.err != nil:
			failed[x.err.Error()]++
		case x.reply.status != 200:
			failed[fmt.Sprintf("%d %s", x.reply.status, x.reply.body)]++
		default:
			times = append(times, x.reply.took)
		}
	}
	for why, n := range failed {
		t.Errorf("%d of %d got %s", n, len(shots), why)
	}
	return times
}

// TestThousandContainersAskForOneToken has as many containers as there are ask
// for the same token in the same instant, of a service that enforces the
// platform's limits: there is one call, and nobody is turned away.
func TestThousandContainersAskForOneToken(t *testing.T) {
	n := fleetSize(t, 1000)
	begun := time.Now()
	s, cs := startAnswers(t, answersSetup{containers: n})
	t.Logf("%d containers were steered after %v", n, time.Since(begun).Round(time.Millisecond))
	shots, took := volley(t, cs, func(int) []string { return []string{tokenTarget + "https://vault.azure.net"} })
	times := allServed(t, shots)
	all := calls(t, s)
	if len(all) != 1 || all[0].Status != 200 {
		t.Errorf("the service got %d calls, want 1: %+v", len(all), all)
	}
	tokens := make(map[string]bool)
	for _, x := range shots {
		_, token, _ := strings.Cut(string(x.reply.body), `"access_token":"`)
		token, _, _ = strings.Cut(token, `"`)
		tokens[token] = true
	}
	if len(tokens) != 1 {
		t.Errorf("got %d tokens, want all to have the same", len(tokens))
	}
	t.Logf("%d containers, one instant: %d calls to the service, %d errors, p50 %v, p99 %v, the last after %v",
		n, len(all), len(shots)-len(times), quantile(times, 0.5), quantile(times, 0.99), took)
}

// TestContainersAskForDifferentTokens has 200 containers ask for five tokens
// each, of which there are five, or sixty, in all. No 429 reaches anybody, and
// all have theirs in the time that the budget for so many calls implies.
func TestContainersAskForDifferentTokens(t *testing.T) {
	const perSecond, burst = 16.0, 4.0 // of --budget, as it is unless told otherwise
	for _, tc := range []struct {
		name  string
		kinds int
	}{{"five_in_all", 5}, {"sixty_in_all", 60}} {
		t.Run(tc.name, func(t *testing.T) {
			s, cs := startAnswers(t, answersSetup{containers: 200})
			shots, took := volley(t, cs, func(i int) []string {
				targets := make([]string, 5)
				for k := range targets {
					targets[k] = fmt.Sprintf("%shttps://r%d.example", tokenTarget, (5*i+k)%tc.kinds)
				}
				return targets
			})
			times := allServed(t, shots)
			all := calls(t, s)
			for _, e := range all {
				if e.Status != 200 {
					t.Errorf("the service said %d: the budget met the platform's limit", e.Status)
				}
			}
			if len(all) != tc.kinds {
				t.Errorf("the service got %d calls, want %d", len(all), tc.kinds)
			}
			ideal := time.Duration((float64(tc.kinds) - burst) / perSecond * float64(time.Second))
			if bound := ideal + ideal/2 + 2*time.Second; took > bound {
				t.Errorf("took %v, want at most %v", took, bound)
			}
			t.Logf("200 containers, 1000 requests for %d tokens: %d calls, %d errors, p50 %v, p99 %v, the last after %v; the budget alone implies %v",
				tc.kinds, len(all), len(shots)-len(times), quantile(times, 0.5), quantile(times, 0.99), took, ideal)
		})
	}
}
