package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

// loadEnv makes the test binary a load generator: so many clients that call the
// address, a new connection for each request, until SIGTERM. With the word keep
// every second client keeps its connection. It prints its counts as JSON.
const loadEnv = "IMDSGATE_TEST_LOAD"

func init() {
	testMains = append(testMains, func() (bool, int) {
		if os.Getenv(loadEnv) == "" {
			return false, 0
		}
		return true, loadMain(os.Getenv(loadEnv))
	})
}

// counts is what came of the requests.
type counts struct {
	OK      int           `json:"ok"`
	Refused int           `json:"refused"` // connection refused
	Reset   int           `json:"reset"`   // reset, or ended without an answer
	Status  map[int]int   `json:"status"`  // answers other than 200
	Other   []string      `json:"other"`   // anything else
	Slowest time.Duration `json:"slowest"`
}

func (c *counts) add(d counts) {
	c.OK, c.Refused, c.Reset = c.OK+d.OK, c.Refused+d.Refused, c.Reset+d.Reset
	c.Slowest = max(c.Slowest, d.Slowest)
	c.Other = append(c.Other, d.Other...)
	for s, n := range d.Status {
		c.Status[s] += n
	}
}

func loadMain(spec string) int {
	var clients int
	var url, keep string
	if n, err := fmt.Sscanf(spec, "%d %s %s", &clients, &url, &keep); n < 2 {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	total := counts{Status: make(map[int]int)}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			c := call(ctx, url, keep == "keep" && i%2 == 1)
			mu.Lock()
			defer mu.Unlock()
			total.add(c)
		})
	}
	fmt.Println("calling")
	wg.Wait()
	json.NewEncoder(os.Stdout).Encode(total)
	return 0
}

// call asks again and again. A request under way when ctx ends is finished.
func call(ctx context.Context, url string, keep bool) counts {
	c := counts{Status: make(map[int]int)}
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: !keep, DialContext: (&net.Dialer{}).DialContext,
	}}
	for ctx.Err() == nil {
		req, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			panic(err)
		}
		req.Header.Set("Metadata", "true")
		start := time.Now()
		resp, err := client.Do(req)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		c.Slowest = max(c.Slowest, time.Since(start))
		switch {
		case err == nil && resp.StatusCode == 200:
			c.OK++
		case err == nil:
			c.Status[resp.StatusCode]++
		case errors.Is(err, syscall.ECONNREFUSED):
			c.Refused++
		case errors.Is(err, syscall.ECONNRESET), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
			strings.Contains(err.Error(), "server closed idle connection"):
			c.Reset++
		default:
			c.Other = append(c.Other, err.Error())
		}
	}
	return c
}
