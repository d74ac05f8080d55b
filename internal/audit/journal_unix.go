//go:build unix

package audit

import (
	"bytes"
	"strconv"
	"strings"
	"unicode"
)

// journalPath is where journald listens for its native protocol
// (systemd.io/JOURNAL_NATIVE_PROTOCOL).
const journalPath = "/run/systemd/journal/socket"

type journal struct {
	datagram
	tag string
	buf []byte
}

// DialJournal sends lines to systemd's journal: the line as MESSAGE, and what
// people look for as fields of their own, IMDSGATE_DECISION, IMDSGATE_WORKLOAD,
// IMDSGATE_NAME, IMDSGATE_ACTION and IMDSGATE_RULE. Each run begins a chain. An empty
// path is the system's journal.
//
// Where nobody listens the error is that of the socket, which can be os.ErrNotExist.
func DialJournal(path, tag string) (Out, error) {
	if path == "" {
		path = journalPath
	}
	j := &journal{tag: tag, datagram: datagram{paths: []string{path}, patience: sendTime}}
	if err := j.dial(); err != nil {
		return nil, err
	}
	return j, nil
}

func (j *journal) Write(line []byte, e *Event) error {
	b := field(j.buf[:0], "PRIORITY", strconv.Itoa(severity(e)))
	b = field(b, "SYSLOG_IDENTIFIER", j.tag)
	b = field(b, "SYSLOG_FACILITY", strconv.Itoa(authpriv>>3))
	if e != nil {
		b = field(b, "IMDSGATE_DECISION", string(e.Decision))
		b = field(b, "IMDSGATE_WORKLOAD", string(e.Workload))
		b = field(b, "IMDSGATE_NAME", e.Name)
		b = field(b, "IMDSGATE_ACTION", string(e.Action))
		b = field(b, "IMDSGATE_RULE", e.Rule)
	}
	b = append(b, "MESSAGE="...)
	b = append(append(b, bytes.TrimSpace(line)...), '\n')
	j.buf = b
	return j.send(b)
}

// field appends one that is not empty. What is not printable in it is replaced: a
// newline would begin another field.
func field(b []byte, key, value string) []byte {
	if value == "" {
		return b
	}
	value = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, value)
	return append(append(append(append(b, key...), '='), value...), '\n')
}
