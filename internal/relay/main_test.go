package relay

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// relayEnv makes the test binary a relay, for the benchmark: "LISTEN TARGET".
const relayEnv = "RELAY_BENCH"

func TestMain(m *testing.M) {
	if args := os.Getenv(relayEnv); args != "" {
		if err := alone(args); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func alone(args string) error {
	address, target, _ := strings.Cut(args, " ")
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	r := &Relay{Dial: dialTo(target)}
	return r.Run(context.Background(), l)
}

func dialTo(address string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", address)
	}
}
