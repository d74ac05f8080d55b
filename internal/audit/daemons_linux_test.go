package audit_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/testnet"
)

// daemonTime is how long a daemon may take to be there, or to pass a line on.
const daemonTime = 20 * time.Second

// startDaemon runs a daemon until the end of the test.
func startDaemon(t *testing.T, name string, args ...string) (*exec.Cmd, io.Reader) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), daemonTime)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, os.Stderr
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		cmd.Wait()
		r.Close()
	})
	return cmd, r
}

// dialled waits for the daemon's socket.
func dialled(t *testing.T, dial func(path, tag string) (audit.Out, error), path string) audit.Out {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(daemonTime); ; <-tick.C {
		out, err := dial(path, "imdsgate")
		if err == nil {
			t.Cleanup(func() { out.Close() })
			return out
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// hard are events that daemons could spoil: long ones, and all that is hostile.
func hard() []audit.Event {
	var events []audit.Event
	for _, h := range hostile {
		e := full()
		e.Name, e.Reason = h.text, h.text
		events = append(events, e)
	}
	e := full()
	e.Target = "/metadata/instance?" + strings.Repeat("é", 3<<10) // 6 KiB
	return append(events, e, full())
}

// TestRsyslog has the lines go through the real daemon, into the file that its
// documentation calls traditional.
func TestRsyslog(t *testing.T) {
	testnet.Require(t, testnet.Command("rsyslogd"))
	dir := t.TempDir()
	socket, conf := filepath.Join(dir, "log"), filepath.Join(dir, "conf")
	text := fmt.Sprintf(`module(load="imuxsock" SysSock.Use="off")
input(type="imuxsock" Socket=%q)
authpriv.* action(type="omfile" file="/dev/stdout" template="RSYSLOG_TraditionalFileFormat")
`, socket)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	_, r := startDaemon(t, "rsyslogd", "-n", "-f", conf, "-i", filepath.Join(dir, "pid"))
	out := dialled(t, audit.DialSyslog, socket)
	l, events := new(audit.Log), hard()
	written(t, l, out, events...)
	var record bytes.Buffer
	s := bufio.NewScanner(r)
	for n := 0; n <= len(events) && s.Scan(); n++ {
		before, line, ok := strings.Cut(s.Text(), ": ")
		if !ok || !strings.Contains(before, " imdsgate[") {
			t.Errorf("got %q, want the tag before the line", s.Text())
		}
		record.WriteString(strings.TrimPrefix(line, " ") + "\n")
	}
	intact(t, l, &record, len(events)+1)
}

// intact wants to find in r what the log has written.
func intact(t *testing.T, l *audit.Log, r io.Reader, records int) {
	t.Helper()
	head := l.Head()
	s, err := audit.Verify([]audit.Part{{Name: "record", R: r}}, audit.Check{Head: &head})
	if err != nil || s.Records != uint64(records) || l.Lost() != 0 {
		t.Errorf("got %+v (%v), %d lost; want %d records up to %v", s, err, l.Lost(), records, head)
	}
}

// TestJournald has the lines go through the real daemon, in a mount namespace with
// a /run of its own.
func TestJournald(t *testing.T) {
	const journald = "/lib/systemd/systemd-journald"
	testnet.Require(t, testnet.Root, testnet.Command("unshare"), testnet.Command("nsenter"), testnet.Command("journalctl"), testnet.Command(journald))
	cmd, _ := startDaemon(t, "unshare", "--mount", "--propagation", "private", "sh", "-c",
		"mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/log && mkdir -p /run/systemd/journal && exec "+journald)
	pid := fmt.Sprint(cmd.Process.Pid)
	out := dialled(t, audit.DialJournal, "/proc/"+pid+"/root/run/systemd/journal/socket")
	l, events := new(audit.Log), hard()
	written(t, l, out, events...)
	journalctl := func(args ...string) []byte {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), daemonTime)
		defer cancel()
		b, err := exec.CommandContext(ctx, "nsenter", append([]string{"-t", pid, "-m", "journalctl", "--no-pager"}, args...)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	journalctl("--sync")
	intact(t, l, bytes.NewReader(journalctl("-t", "imdsgate", "-o", "cat")), len(events)+1)
	found := bytes.Split(bytes.TrimSpace(journalctl("-o", "json", "IMDSGATE_WORKLOAD=static:web", "IMDSGATE_DECISION=allow")), []byte("\n"))
	if len(found) != len(events) {
		t.Fatalf("got %d entries by their fields, want %d", len(found), len(events))
	}
	var last map[string]any
	if err := json.Unmarshal(found[len(found)-1], &last); err != nil {
		t.Fatal(err)
	}
	for field, want := range map[string]string{
		"IMDSGATE_NAME": "web", "IMDSGATE_ACTION": "instance.read", "IMDSGATE_RULE": "p.yaml:2", "PRIORITY": "6", "SYSLOG_FACILITY": "10",
	} {
		if last[field] != want {
			t.Errorf("%s: got %v, want %s", field, last[field], want)
		}
	}
}
