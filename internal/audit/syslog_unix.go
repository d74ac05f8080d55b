//go:build unix

package audit

import (
	"bytes"
	"os"
	"strconv"
	"time"
)

// syslogPaths are where daemons listen: Linux, macOS, the BSDs.
var syslogPaths = []string{"/dev/log", "/var/run/syslog", "/var/run/log"}

// Of RFC 5424, section 6.2.1. The lines tell who was given which credentials:
// authpriv is the facility for what is not for everybody to read.
const (
	authpriv = 10 << 3
	warning  = 4
	notice   = 5
	info     = 6
)

// severity is the same for syslog and journald.
func severity(e *Event) int {
	if e == nil {
		return info
	}
	switch e.Decision {
	case Allow:
		return info
	case Deny, Refuse:
		return notice
	}
	return warning
}

type syslog struct {
	datagram
	tag string
	now func() time.Time
	buf []byte
}

// DialSyslog sends lines to the machine's syslog daemon, facility authpriv, in the
// form that the C library's syslog has (RFC 3164, without a host). The line is the
// message. Each run begins a chain. An empty path is the platform's own.
//
// Where nobody listens the error is that of the socket, which can be os.ErrNotExist;
// later, a daemon that goes and comes back is dialled again.
func DialSyslog(path, tag string) (Out, error) {
	s := &syslog{tag: tag, now: time.Now, datagram: datagram{paths: syslogPaths, patience: sendTime}}
	if path != "" {
		s.paths = []string{path}
	}
	if err := s.dial(); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *syslog) Write(line []byte, e *Event) error {
	b := append(s.buf[:0], '<')
	b = strconv.AppendInt(b, int64(authpriv|severity(e)), 10)
	b = s.now().AppendFormat(append(b, '>'), time.Stamp+" ")
	b = append(append(b, s.tag...), '[')
	b = append(strconv.AppendInt(b, int64(os.Getpid()), 10), "]: "...)
	s.buf = append(b, bytes.TrimSpace(line)...)
	return s.send(s.buf)
}
