package main

import (
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAuditFileIsNoPipe: a named pipe would hold up the start until somebody reads.
func TestAuditFileIsNoPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := openAuditSink(tested(path), io.Discard, slog.New(slog.DiscardHandler))
	var coded *codedError
	if want := "--audit: audit: " + path + ": not a regular file: it is a named pipe"; !errors.As(err, &coded) || coded.code != exitUsage || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// TestAuditDaemonIsNotThere: exit code 3, this machine lacks something.
func TestAuditDaemonIsNotThere(t *testing.T) {
	for _, tc := range []struct{ to, socket string }{{"syslog", "/dev/log"}, {"syslog:web", "/dev/log"}, {"journald", "/run/systemd/journal/socket"}} {
		if unix.Access(tc.socket, unix.F_OK) == nil {
			continue // it is
		}
		_, _, err := openAuditSink(tested(tc.to), io.Discard, slog.New(slog.DiscardHandler))
		var coded *codedError
		var hinted *hintError
		if !errors.As(err, &coded) || coded.code != exitUnsupported || !errors.As(err, &hinted) {
			t.Errorf("%s: got %v, want an error of exit code %d with a hint", tc.to, err, exitUnsupported)
		}
	}
}
