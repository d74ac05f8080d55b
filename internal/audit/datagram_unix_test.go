//go:build unix

package audit

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// daemon takes datagrams at a path.
type daemon struct {
	t    *testing.T
	path string
	conn *net.UnixConn
}

func startDaemon(t *testing.T) *daemon {
	t.Helper()
	d := &daemon{t: t, path: filepath.Join(t.TempDir(), "log")}
	d.start()
	t.Cleanup(func() { d.conn.Close() })
	return d
}

func (d *daemon) start() {
	d.t.Helper()
	var err error
	if d.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: d.path, Net: "unixgram"}); err != nil {
		d.t.Fatal(err)
	}
}

// restart leaves nobody at the socket in between.
func (d *daemon) restart() {
	d.t.Helper()
	d.conn.Close()
	os.Remove(d.path)
	d.start()
}

func (d *daemon) next() string {
	d.t.Helper()
	b := make([]byte, 1<<20)
	d.conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, err := d.conn.Read(b)
	if err != nil {
		d.t.Fatal(err)
	}
	return string(b[:n])
}

func writeAll(l *Log, out Out, events ...Event) {
	l.Out = out
	for _, e := range events {
		l.Record(e)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	l.Run(ctx)
}

func TestSyslogMessage(t *testing.T) {
	d := startDaemon(t)
	out, err := DialSyslog(d.path, "imdsgate")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	writeAll(new(Log), out, Event{Decision: Allow}, Event{Decision: Deny}, Event{Decision: Refuse}, Event{Decision: Error, Reason: "a\nb"})
	for i, want := range []string{"86", "86", "85", "85", "84"} {
		got := d.next()
		if !regexp.MustCompile(`^<` + want + `>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d imdsgate\[\d+\]: \{".*"seq":\d,"chain":"[0-9a-f]{64}"\}$`).MatchString(got) {
			t.Errorf("message %d: got %q, want priority %s", i, got, want)
		}
	}
}

func TestJournalFields(t *testing.T) {
	d := startDaemon(t)
	out, err := DialJournal(d.path, "imdsgate")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	writeAll(new(Log), out, Event{Decision: Deny, Workload: "static:web\nIMDSGATE_DECISION=allow", Name: "web\x00\xff", Action: "identity.token", Rule: "p.yaml:1"})
	start, _, _ := strings.Cut(d.next(), "MESSAGE=")
	if want := "PRIORITY=6\nSYSLOG_IDENTIFIER=imdsgate\nSYSLOG_FACILITY=10\n"; start != want {
		t.Errorf("start record: got %q, want %q", start, want)
	}
	fields, message, _ := strings.Cut(d.next(), "MESSAGE=")
	want := "PRIORITY=5\nSYSLOG_IDENTIFIER=imdsgate\nSYSLOG_FACILITY=10\nIMDSGATE_DECISION=deny\n" +
		"IMDSGATE_WORKLOAD=static:web\ufffdIMDSGATE_DECISION=allow\nIMDSGATE_NAME=web\ufffd\ufffd\nIMDSGATE_ACTION=identity.token\nIMDSGATE_RULE=p.yaml:1\n"
	if fields != want {
		t.Errorf("got %q, want %q", fields, want)
	}
	if text, rest, _ := strings.Cut(message, "\n"); rest != "" || !strings.HasPrefix(text, `{"time"`) || !strings.HasSuffix(text, `"}`) {
		t.Errorf("got message %q", message)
	}
}

// A daemon that comes back is found again; while it is away, lines are lost and
// counted.
func TestDaemonComesBack(t *testing.T) {
	d := startDaemon(t)
	out, err := DialSyslog(d.path, "imdsgate")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	l := new(Log)
	writeAll(l, out, Event{ID: 1})
	d.next()
	d.next()
	d.restart()
	writeAll(l, out, Event{ID: 2})
	if got := d.next(); l.Lost() != 0 || !strings.Contains(got, `"id":2,`) || !strings.Contains(got, `"seq":3,`) {
		t.Errorf("after a restart: lost %d, got %q; want event 2 as record 3", l.Lost(), got)
	}
	d.conn.Close()
	os.Remove(d.path)
	writeAll(l, out, Event{ID: 3}, Event{ID: 4})
	if l.Lost() != 2 {
		t.Errorf("nobody there: lost %d, want 2", l.Lost())
	}
	d.start()
	writeAll(l, out, Event{ID: 5})
	if got := d.next(); !strings.Contains(got, `"id":5,`) || !strings.Contains(got, `"lost":2,"seq":4,`) {
		t.Errorf("got %q, want event 5 as record 4, and that 2 are lost", got)
	}
}

func TestDaemonThatDoesNotRead(t *testing.T) {
	d := startDaemon(t)
	s := &syslog{tag: "x", now: time.Now, datagram: datagram{paths: []string{d.path}, patience: time.Millisecond}}
	defer s.Close()
	var told []error
	l := &Log{Report: func(err error) { told = append(told, err) }}
	big := Event{Reason: strings.Repeat("x", 30<<10)}
	for range 400 {
		if writeAll(l, s, big); l.Lost() > 0 {
			break
		}
	}
	if l.Lost() == 0 || len(told) == 0 || !errors.Is(told[0], os.ErrDeadlineExceeded) {
		t.Fatalf("lost %d, told %v: want the deadline", l.Lost(), told)
	}
	for seq := l.Head().Seq; seq > 0; seq-- {
		d.next()
	}
	writeAll(l, s, Event{ID: 9})
	if got := d.next(); !strings.Contains(got, `"id":9,`) || !strings.Contains(got, `,"lost":`) {
		t.Errorf("got %.200q, want event 9, and how many are lost", got)
	}
}

func TestLineTooLargeForTheDaemon(t *testing.T) {
	d := startDaemon(t)
	s := &syslog{tag: "x", now: time.Now, datagram: datagram{paths: []string{d.path}, patience: time.Second}}
	defer s.Close()
	var told []error
	l := &Log{Report: func(err error) { told = append(told, err) }}
	writeAll(l, s, Event{Reason: strings.Repeat("x", 8<<20)}, Event{ID: 9})
	if len(told) != 2 || !errors.Is(told[0], syscall.EMSGSIZE) || told[1] != nil || l.Lost() != 1 {
		t.Errorf("lost %d, told %v: want that one is too large", l.Lost(), told)
	}
}

func TestNoDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if _, err := DialSyslog(path, "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("syslog: got %v", err)
	}
	if _, err := DialJournal(path, "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("journal: got %v", err)
	}
}
