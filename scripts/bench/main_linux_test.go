package bench

import (
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

var (
	full     = flag.Bool("full", false, "measure; without it each part runs once, for a moment")
	rounds   = flag.Int("rounds", 5, "with -full: runs of each, interleaved; the median counts")
	each     = flag.Duration("each", 4*time.Second, "with -full: length of a run")
	only     = flag.String("only", "", "parts to run, separated by commas: "+strings.Join(partNames(), ","))
	out      = flag.String("out", "", "file for the results, as JSON")
	profiles = flag.String("profiles", "", "folder for a CPU profile of the proxy in each row of requests")
)

// See package main: the main thread must not be one that enters namespaces.
func init() { runtime.LockOSThread() }

// reverseEnv makes the test binary a reverse proxy, for the benchmark: where it
// listens, where it leads, and how many idle connections it keeps.
const reverseEnv = "IMDSGATE_BENCH_REVERSE"

func TestMain(m *testing.M) {
	if spec := os.Getenv(reverseEnv); spec != "" {
		fmt.Println("error:", reverse(spec))
		os.Exit(1)
	}
	flag.Parse()
	goleak.VerifyTestMain(m)
}

// reverse is Go's reverse proxy with nothing added: what one writes in a minute. No
// idle connections to keep means Go's own two for each host.
func reverse(spec string) error {
	var listen, to string
	var idle int
	if _, err := fmt.Sscan(spec, &listen, &to, &idle); err != nil {
		return err
	}
	target, err := url.Parse(to)
	if err != nil {
		return err
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = idle
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return http.Serve(l, &httputil.ReverseProxy{
		Transport: transport,
		// The service refuses X-Forwarded-For, which Rewrite does not add.
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) },
	})
}
