//go:build unix

package audit

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// sendTime is how long a daemon may take to make room for a line.
const sendTime = 2 * time.Second

// datagram sends to a daemon of this machine. It dials again when the daemon was
// started anew.
type datagram struct {
	paths    []string      // the first that can be dialled is taken
	patience time.Duration // for a daemon that does not read
	conn     *net.UnixConn
	begun    bool
}

func (d *datagram) dial() error {
	var errs []error
	for _, path := range d.paths {
		c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
		if err == nil {
			c.SetWriteBuffer(maxLine) // larger lines fail, and are counted
			d.conn = c
			return nil
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("audit: %w", errors.Join(errs...))
}

func (d *datagram) send(b []byte) error {
	fresh := d.conn == nil
	for {
		if d.conn == nil {
			if err := d.dial(); err != nil {
				return err
			}
		}
		d.conn.SetWriteDeadline(time.Now().Add(d.patience))
		_, err := d.conn.Write(b)
		if err == nil {
			d.begun = true
			return nil
		}
		if errors.Is(err, os.ErrDeadlineExceeded) || tooLarge(err) {
			return fmt.Errorf("audit: %w", err)
		}
		d.conn.Close()
		d.conn = nil
		if fresh {
			return fmt.Errorf("audit: %w", err)
		}
		fresh = true
	}
}

func tooLarge(err error) bool { return errors.Is(err, syscall.EMSGSIZE) }

// Begin starts the chain once: what is lost on the way nobody can know.
func (d *datagram) Begin(int, Head) (*Tail, error) {
	if d.begun {
		return nil, nil
	}
	return new(Tail), nil
}

func (*datagram) End() {}

// Close closes the connection.
func (d *datagram) Close() error {
	if d.conn == nil {
		return nil
	}
	return d.conn.Close()
}
