package status

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listen opens the socket at path, for this process's user and root alone. A
// socket that nobody listens on any more is replaced; whatever else is there is an
// error, and so is a socket that is in use. The folder must be there.
func Listen(path string) (net.Listener, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != os.ModeSocket:
		return nil, fmt.Errorf("%s is there and no socket", path)
	default:
		c, err := net.Dial("unix", path)
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) { // a full queue, too, is somebody's
			return nil, fmt.Errorf("%s: %w", path, syscall.EADDRINUSE)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // by name it could be another's
	if err = os.Chmod(path, 0o600); err == nil {
		info, err = os.Lstat(path)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return &own{UnixListener: l, path: path, file: info}, nil
}

// own lets in who the kernel says is root or this process's user.
type own struct {
	*net.UnixListener
	path string
	file os.FileInfo
}

// Close removes the socket's file, if it is still this socket's.
func (l *own) Close() error {
	if info, err := os.Lstat(l.path); err == nil && os.SameFile(info, l.file) {
		os.Remove(l.path)
	}
	return l.UnixListener.Close()
}

// Accept closes the connections of others.
func (l *own) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if ours(c) {
			return c, nil
		}
		c.Close()
	}
}

func ours(c *net.UnixConn) bool {
	rc, err := c.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	var inner error
	err = rc.Control(func(fd uintptr) { cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return err == nil && inner == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
}
