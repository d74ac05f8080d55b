//go:build unix

package audit

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// O_NONBLOCK: to open a named pipe must not wait for its reader.
const openFlags = unix.O_NOFOLLOW | unix.O_NONBLOCK

// openAppend opens or makes the file for reading and appending.
func openAppend(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|openFlags, 0o600)
}

// openRead opens a file that is there.
func openRead(path string) (*os.File, error) { return os.OpenFile(path, os.O_RDONLY|openFlags, 0) }

// lockTime is how long another process may take to write a line.
const lockTime = 2 * time.Second

// lock takes the file for this process alone.
func lock(f *os.File) error {
	for end := time.Now().Add(lockTime); ; time.Sleep(time.Millisecond) {
		err := flock(f, unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			return err
		}
	}
}

func unlock(f *os.File) { flock(f, unix.LOCK_UN) }

// flock works on f without changing its mode, as Fd would.
func flock(f *os.File, how int) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := c.Control(func(fd uintptr) { failed = unix.Flock(int(fd), how) }); err != nil {
		return err
	}
	return failed
}
