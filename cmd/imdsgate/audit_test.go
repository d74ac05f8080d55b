//go:build !forwardonly

package main

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/audit"
)

// tested is a spec with the flags' defaults.
func tested(to string) auditSpec { return auditSpec{to: to, size: "100MiB", keep: 5} }

func TestAuditSpecIsRefused(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	cases := map[string]struct {
		spec auditSpec
		want string
	}{
		"nothing":       {tested(""), "--audit: want a file, syslog[:TAG], journald, or - for stdout"},
		"no_folder":     {tested(filepath.Join(dir, "no", "audit")), "--audit: folder " + filepath.Join(dir, "no") + " does not exist"},
		"folder":        {tested(dir), "--audit: audit: " + dir + ": not a regular file: it is a folder"},
		"link":          {tested(link), "--audit: audit: " + link + ": not a regular file: it is a symbolic link"},
		"empty_tag":     {tested("syslog:"), `--audit "syslog:": want a tag of 1 to 32 letters, digits, dots and dashes`},
		"tag_of_a_path": {tested("syslog:a/b"), `--audit "syslog:a/b": want a tag of 1 to 32 letters, digits, dots and dashes`},
		"no_size":       {auditSpec{to: "-", size: "", keep: 1}, `--audit-size "": want a size of at least 4KiB, or 0`},
		"small":         {auditSpec{to: "-", size: "4095", keep: 1}, `--audit-size "4095": want a size of at least 4KiB, or 0`},
		"below_zero":    {auditSpec{to: "-", size: "-1", keep: 1}, `--audit-size "-1": want a size of at least 4KiB, or 0`},
		"unit_of_1000":  {auditSpec{to: "-", size: "100MB", keep: 1}, `--audit-size "100MB": want a size of at least 4KiB, or 0`},
		"too_large":     {auditSpec{to: "-", size: "99999999999999GiB", keep: 1}, `--audit-size "99999999999999GiB": want a size of at least 4KiB, or 0`},
		"none_kept":     {auditSpec{to: "-", size: "0", keep: 0}, "--audit-keep: want more than zero"},
	}
	if err := os.Symlink(filepath.Join(dir, "file"), link); err != nil {
		if runtime.GOOS != "windows" { // where ordinary users may not make links
			t.Fatal(err)
		}
		delete(cases, "link")
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			sink, closer, err := openAuditSink(tc.spec, io.Discard, slog.New(slog.DiscardHandler))
			var coded *codedError
			if !errors.As(err, &coded) || coded.code != exitUsage || err.Error() != tc.want {
				t.Errorf("got %v, %v, %v; want %s", sink, closer, err, tc.want)
			}
		})
	}
}

func TestAuditSizes(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "4KiB": 4096, "5000": 5000, "5000B": 5000, "100MiB": 100 << 20, "2GiB": 2 << 30} {
		if got, err := (&auditSpec{size: text}).bytes(); got != want || err != nil {
			t.Errorf("%s: got %d (%v), want %d", text, got, err, want)
		}
	}
}

// stuck is a pipe that nobody reads.
type stuck struct{ free chan struct{} }

func (s stuck) Write([]byte) (int, error) { <-s.free; return 0, io.ErrClosedPipe }

// The end of a proxy does not wait for who does not read its lines.
func TestAuditCloseGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := stuck{make(chan struct{})}
		defer close(s.free)
		var log bytes.Buffer
		sink, closer, err := openAuditSink(tested("-"), s, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		if err := sink.Record(audit.Event{}); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := closer.Close(); err != nil || time.Since(begin) != auditTime || !strings.Contains(log.String(), "audit lines were not written") {
			t.Errorf("got %v after %v, and the log %q", err, time.Since(begin), &log)
		}
	})
}

// The last lines are written before the proxy ends, and it logs the chain's head.
func TestAuditCloseWritesTheRest(t *testing.T) {
	var out, log bytes.Buffer
	sink, closer, err := openAuditSink(tested("-"), &out, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if err := sink.Record(audit.Event{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := closer.Close(); err != nil {
		t.Fatal(err)
	}
	sum, err := audit.Verify([]audit.Part{{Name: "out", R: &out}}, audit.Check{})
	if err != nil || sum.Records != 101 || !strings.Contains(log.String(), "head="+sum.Head.String()) {
		t.Errorf("got %+v (%v), and the log %q", sum, err, &log)
	}
}
