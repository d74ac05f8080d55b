package testnet

import (
	"context"
	"net"
	"time"

	"imdsgate/internal/netns"
)

// Dial connects from inside a namespace.
func Dial(ctx context.Context, ns *netns.Handle, network, address string) (net.Conn, error) {
	var c net.Conn
	err := ns.Do(func() error {
		// Happy eyeballs would dial from a goroutine of its own, outside.
		d := net.Dialer{FallbackDelay: -1}
		var err error
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Ask connects from inside a namespace, and returns what the other side says
// before it closes, and the peer address that the client saw. The whole takes at
// most a second and a half: longer than one retransmitted SYN.
func Ask(ns *netns.Handle, network, address string) (said, peer string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 1500*time.Millisecond)
	defer cancel()
	c, err := Dial(ctx, ns, network, address)
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	return hear(ctx, c)
}

func hear(ctx context.Context, c net.Conn) (said, peer string, err error) {
	if d, ok := ctx.Deadline(); ok {
		c.SetDeadline(d)
	}
	buf := make([]byte, 256)
	n, err := c.Read(buf)
	return string(buf[:n]), c.RemoteAddr().String(), err
}

// Say accepts connections until the listener is closed, and answers each with
// the same words, before it reads anything.
func Say(l net.Listener, words string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		c.Write([]byte(words))
		c.Close()
	}
}
