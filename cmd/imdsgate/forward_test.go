package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"imdsgate/internal/relay"
)

// called runs a command line in this process that is to end by itself.
func called(t *testing.T, environ map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	e := &env{stdin: strings.NewReader(""), stdout: &out, stderr: &errs, getenv: func(k string) string { return environ[k] }, ctx: t.Context()}
	code = run(e, args)
	return code, out.String(), errs.String()
}

func TestParseTarget(t *testing.T) {
	for _, tc := range []struct{ value, want string }{
		{"172.17.0.2", "172.17.0.2:80"},
		{" 172.17.0.2\r\n", "172.17.0.2:80"},
		{"172.17.0.2:8080", "172.17.0.2:8080"},
		{"fd00::2", "[fd00::2]:80"},
		{"[fd00::2]", "[fd00::2]:80"},
		{"[fd00::2]:8080", "[fd00::2]:8080"},
		{"::ffff:172.17.0.2", "172.17.0.2:80"},
		{"169.254.169.254:8080", "169.254.169.254:8080"}, // another port is not captured

		{"172.17.0.2172.18.0.2", `"172.17.0.2172.18.0.2": this looks like several addresses, want one`},
		{"172.17.0.2 172.18.0.2", `"172.17.0.2 172.18.0.2": this looks like several addresses, want one`},
		{"172.17.0.2,fd00::2", `"172.17.0.2,fd00::2": this looks like several addresses, want one`},
		{"fd00::2;fd00::3", `"fd00::2;fd00::3": this looks like several addresses, want one`},
		{"172.17.0.2\n172.18.0.2", `"172.17.0.2\n172.18.0.2": this looks like several addresses, want one`},
		{"proxy", `"proxy": want one IP address, and a port if that is not 80`},
		{"proxy:80", `"proxy:80": want one IP address, and a port if that is not 80`},
		{"172.17.0.2:http", `"172.17.0.2:http": want one IP address, and a port if that is not 80`},
		{"http://172.17.0.2", `"http://172.17.0.2": want one IP address, and a port if that is not 80`},
		{"\"172.17.0.2\"", `"\"172.17.0.2\"": want one IP address, and a port if that is not 80`},
		{"", `"": want one IP address, and a port if that is not 80`},
		{"0.0.0.0", `"0.0.0.0": nobody can listen there`},
		{"172.17.0.2:0", `"172.17.0.2:0": nobody can listen there`},
		{"224.0.0.1", `"224.0.0.1": nobody can listen there`},
		{"169.254.169.254", `"169.254.169.254": this is the metadata service's own address, where calls come from`},
		{"fd00:ec2::254", `"fd00:ec2::254": this is the metadata service's own address, where calls come from`},
		{"::ffff:169.254.169.254", `"::ffff:169.254.169.254": this is the metadata service's own address, where calls come from`},
	} {
		t.Run(tc.value, func(t *testing.T) {
			a, err := parseTarget(tc.value)
			got := a.String()
			if err != nil {
				got = err.Error()
				if a.IsValid() {
					t.Errorf("got %v beside an error", a)
				}
			}
			if got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

// TestForwardRefuses holds what is refused before anything is done. Each row ends
// with a hint.
func TestForwardRefuses(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	some := map[string]string{addressVariable: "172.17.0.2"}
	for _, tc := range []struct {
		name    string
		environ map[string]string
		args    []string
		want    string // how stderr begins
	}{
		{"no_address", nil, nil, "imdsgate: forward: no address of the proxy: neither --to nor IMSProxyIpAddress is set\nhint: 'imdsgate locate' finds it"},
		{"two_addresses_in_the_environment", map[string]string{addressVariable: "172.17.0.2172.18.0.2"}, nil, `imdsgate: IMSProxyIpAddress: "172.17.0.2172.18.0.2": this looks like several addresses, want one` + "\nhint: "},
		{"two_addresses_in_the_flag", nil, []string{"--to", "172.17.0.2 172.18.0.2"}, `imdsgate: --to: "172.17.0.2 172.18.0.2": this looks like several addresses, want one` + "\nhint: "},
		{"no_file", nil, []string{"--env-file", filepath.Join(dir, "missing")}, "imdsgate: --env-file: open "},
		{"no_line_in_the_file", nil, []string{"--env-file", file("other", "OTHER=1\n")}, "imdsgate: --env-file: " + filepath.Join(dir, "other") + ": no line IMSProxyIpAddress=…"},
		{"bad_line_in_the_file", some, []string{"--env-file", file("bad", "IMSProxyIpAddress=proxy\n")}, "imdsgate: IMSProxyIpAddress in " + filepath.Join(dir, "bad") + `: "proxy": want one IP address`},
		{"flag_and_file", nil, []string{"--to", "172.17.0.2", "--env-file", file("good", "IMSProxyIpAddress=172.17.0.2\n")}, "imdsgate: --to and --env-file exclude each other\nhint: "},
		{"command_without_dashes", some, []string{"curl"}, "imdsgate: forward: unexpected argument \"curl\"\nhint: put -- before the command: imdsgate forward -- curl\n"},
		{"argument_before_dashes", some, []string{"x", "--", "curl"}, "imdsgate: forward: unexpected argument \"x\"\nhint: "},
		{"nothing_after_dashes", some, []string{"--"}, "imdsgate: forward: no command after --\nhint: "},
		{"unknown_form", some, []string{"--print", "iptables"}, `imdsgate: --print "iptables": want netsh, nft or ip` + "\nhint: "},
		{"print_and_command", some, []string{"--print", "nft", "--", "curl"}, "imdsgate: --print and a command exclude each other\nhint: "},
		{"nft_to_ipv6", nil, []string{"--to", "fd00::2", "--print", "nft"}, "imdsgate: --print nft: a packet for an IPv4 address cannot be sent on to fd00::2\nhint: "},
		{"no_time_to_dial", some, []string{"--dial-time", "0s"}, "imdsgate: --dial-time: want more than zero\nhint: "},
		{"negative_idle_time", some, []string{"--idle-time", "-1s"}, "imdsgate: --idle-time: want zero or more\nhint: "},
		{"no_connections", some, []string{"--max-connections", "0"}, "imdsgate: --max-connections: want more than zero\nhint: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, out, errs := called(t, tc.environ, append([]string{"forward"}, tc.args...)...)
			if code != exitUsage || out != "" || !strings.HasPrefix(errs, tc.want) || !strings.Contains(errs, "\nhint: ") {
				t.Errorf("got code %d, stdout %q, stderr\n%s\nwant code %d, and\n%s", code, out, errs, exitUsage, tc.want)
			}
		})
	}
}

func TestForwardPrints(t *testing.T) {
	file := filepath.Join(t.TempDir(), "proxy.env")
	if err := os.WriteFile(file, []byte("IMSProxyIpAddress=172.17.0.9:8080\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	environ := map[string]string{addressVariable: "172.17.0.2"}
	for _, tc := range []struct {
		name string
		args []string
		want []string // lines
	}{
		{"netsh", []string{"--print", "netsh"}, []string{
			`netsh interface ipv4 add address name="Ethernet" address=169.254.169.254 mask=255.255.255.255 skipassource=true store=active`,
			"netsh interface portproxy add v4tov4 listenaddress=169.254.169.254 listenport=80 connectaddress=172.17.0.2 connectport=80",
			"netsh interface portproxy show v4tov4",
		}},
		{"netsh_ipv6", []string{"--to", "[fd00::2]:8080", "--print", "netsh"}, []string{
			"netsh interface portproxy add v4tov6 listenaddress=169.254.169.254 listenport=80 connectaddress=fd00::2 connectport=8080",
		}},
		{"nft", []string{"--print", "nft"}, []string{"\t\tip daddr 169.254.169.254 tcp dport 80 dnat to 172.17.0.2:80"}},
		{"file_before_environment", []string{"--env-file", file, "--print", "nft"}, []string{"\t\tip daddr 169.254.169.254 tcp dport 80 dnat to 172.17.0.9:8080"}},
		{"flag_before_environment", []string{"--to", "172.17.0.7", "--print", "nft"}, []string{"\t\tip daddr 169.254.169.254 tcp dport 80 dnat to 172.17.0.7:80"}},
		{"environment_until_the_file_is_there", []string{"--env-file", file + "-missing", "--print", "nft"}, []string{"\t\tip daddr 169.254.169.254 tcp dport 80 dnat to 172.17.0.2:80"}},
		{"ip", []string{"--print", "ip"}, []string{
			"# forward's listener there, and forward carries them to 172.17.0.2:80.",
			"ip route replace local 169.254.169.254/32 dev lo src 127.0.0.1 table 170",
			"ip rule add pref 2 iif lo to 169.254.169.254/32 ipproto tcp dport 80 lookup 170",
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, out, errs := called(t, environ, append([]string{"forward"}, tc.args...)...)
			if code != exitOK || errs != "" {
				t.Fatalf("code %d: %s", code, errs)
			}
			for _, line := range tc.want {
				if !strings.Contains(out, "\n"+line+"\n") {
					t.Errorf("no line\n%s\nin\n%s", line, out)
				}
			}
		})
	}
}

func TestForwardElsewhere(t *testing.T) {
	if runtime.GOOS == "linux" {
		t.Skip("this is about other platforms")
	}
	code, _, errs := called(t, nil, "forward", "--to", "172.17.0.2")
	if code != exitUnsupported || !strings.Contains(errs, "hint: 'imdsgate forward --print netsh'") {
		t.Errorf("code %d: %s", code, errs)
	}
}

func TestEnvFile(t *testing.T) {
	for _, tc := range []struct {
		name, text, value string
		missing           bool
		after             string // when it was set to 10.0.0.1
	}{
		{"empty", "", "", true, "A=10.0.0.1\n"},
		{"only", "A=1\n", "1", false, "A=10.0.0.1\n"},
		{"others_stay", "# A=0\nB=2\nA=1\nAA=3\n", "1", false, "# A=0\nB=2\nA=10.0.0.1\nAA=3\n"},
		{"last_counts_one_is_left", "A=1\nB=2\nA=3\n", "3", false, "A=10.0.0.1\nB=2\n"},
		{"no_final_newline", "B=2\nA=1", "1", false, "B=2\nA=10.0.0.1\n"},
		{"other_without_final_newline", "B=2", "", true, "B=2\nA=10.0.0.1\n"},
		{"windows_lines", "B=2\r\nA=1\r\n", "1", false, "B=2\r\nA=10.0.0.1\n"},
		{"quotes_are_part", "A=\"1\"\n", "\"1\"", false, "A=10.0.0.1\n"},
		{"no_spaces_before", " A=1\n", "", true, " A=1\nA=10.0.0.1\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "env")
			if err := os.WriteFile(path, []byte(tc.text), 0o640); err != nil {
				t.Fatal(err)
			}
			v, err := readEnvFile(path, "A")
			if v != tc.value || errors.Is(err, os.ErrNotExist) != tc.missing {
				t.Errorf("read %q, %v, want %q, missing %v", v, err, tc.value, tc.missing)
			}
			for range 2 { // the second changes nothing
				if err := writeEnvFile(path, "A", "10.0.0.1"); err != nil {
					t.Fatal(err)
				}
			}
			got, err := os.ReadFile(path)
			if err != nil || string(got) != tc.after {
				t.Errorf("wrote %q, %v, want %q", got, err, tc.after)
			}
			if st, err := os.Stat(path); err != nil || runtime.GOOS != "windows" && st.Mode().Perm() != 0o640 {
				t.Errorf("mode %v, %v, want as before", st.Mode(), err)
			}
		})
	}
}

// TestEnvFileIsReplaced reads while others write: never a part of the text.
func TestEnvFileIsReplaced(t *testing.T) {
	dir := t.TempDir()
	real, path := filepath.Join(dir, "real"), filepath.Join(dir, "link")
	if err := writeEnvFile(real, "A", "10.0.0.1"); err != nil { // a new file
		t.Fatal(err)
	}
	if err := os.Symlink(real, path); err != nil {
		path = real // not everywhere may everybody
	}
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := writeEnvFile(path, "A", []string{"10.0.0.1", "10.0.0.22"}[i%2]); err != nil && runtime.GOOS != "windows" {
				t.Error(err)
			}
		}
	})
	for range 2000 {
		if v, err := readEnvFile(path, "A"); err != nil && runtime.GOOS != "windows" || err == nil && v != "10.0.0.1" && v != "10.0.0.22" {
			t.Errorf("read %q, %v", v, err)
		}
	}
	close(stop)
	writer.Wait()
	if st, err := os.Lstat(real); err != nil || !st.Mode().IsRegular() {
		t.Errorf("%v, %v: the link's target was not written to", st, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// fakeCapture is a listener on loopback in the place of a captured address.
type fakeCapture struct {
	l        net.Listener
	detached chan struct{}
}

func (c *fakeCapture) Listeners() ([]net.Listener, error) { return []net.Listener{c.l}, nil }
func (c *fakeCapture) Ensure() (bool, error)              { return false, nil }
func (c *fakeCapture) Detach() error {
	c.l.Close() // it may be closed already
	close(c.detached)
	return nil
}

// lines is a log that can be waited for.
type lines struct {
	mu   sync.Mutex
	text string
	more chan struct{}
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text += string(b)
	close(l.more)
	l.more = make(chan struct{})
	return len(b), nil
}

func (l *lines) await(t *testing.T, words string) {
	t.Helper()
	for timeout := time.After(20 * time.Second); ; {
		l.mu.Lock()
		text, more := l.text, l.more
		l.mu.Unlock()
		if strings.Contains(text, words) {
			return
		}
		select {
		case <-more:
		case <-timeout:
			t.Fatalf("log has no %q:\n%s", words, text)
		}
	}
}

// sayOn answers every connection of a listener with words.
func sayOn(t *testing.T, words string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Write([]byte(words))
			c.Close()
		}
	}()
	return l
}

func askAddr(t *testing.T, a net.Addr) string {
	t.Helper()
	c, err := net.Dial("tcp", a.String())
	if err != nil {
		return "error"
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	b, err := io.ReadAll(c)
	if err != nil {
		return "error"
	}
	return string(b)
}

// TestForwarder goes through a life: the target moves, is not there, and is there
// again; the capture is destroyed and made again; the end.
func TestForwarder(t *testing.T) {
	first, second := sayOn(t, "first"), sayOn(t, "second")
	file := filepath.Join(t.TempDir(), "proxy.env")
	put := func(a string) {
		t.Helper()
		if err := writeEnvFile(file, addressVariable, a); err != nil {
			t.Fatal(err)
		}
	}
	put(first.Addr().String())
	tgt, err := (&forwardFlags{envFile: file}).target(func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	opened := make(chan *fakeCapture, 2)
	log := &lines{more: make(chan struct{})}
	fail := errors.New("not now")
	results := []error{nil, fail, nil}
	f := &forwarder{target: tgt, log: slog.New(slog.NewTextHandler(log, nil)), relay: relay.Relay{}, open: func() (capture, error) {
		err := results[0]
		results = results[1:]
		if err != nil {
			return nil, err
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Error(err)
		}
		c := &fakeCapture{l, make(chan struct{})}
		opened <- c
		return c, nil
	}}
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- f.Run(ctx, func() { close(ready) }) }()
	<-ready
	c := <-opened
	want := func(words string) {
		t.Helper()
		if got := askAddr(t, c.l.Addr()); got != words {
			t.Errorf("got %q, want %q", got, words)
		}
	}
	want("first")
	put(second.Addr().String())
	log.await(t, `msg="the proxy has another address"`)
	want("second")
	put("172.17.0.2 172.18.0.2")
	log.await(t, "the last one stays")
	want("second")
	gone := sayOn(t, "")
	gone.Close()
	put(gone.Addr().String())
	log.await(t, "to="+gone.Addr().String())
	want("error")
	log.await(t, "the proxy does not answer")
	put(first.Addr().String())
	log.await(t, "from="+gone.Addr().String())
	want("first")
	log.await(t, "the proxy answers again")

	c.l.Close() // as whoever destroys the socket
	<-c.detached
	log.await(t, "capture cannot be made")
	c = <-opened
	want("first")

	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	<-c.detached
	if strings.Count(log.text, "the last one stays") != 1 {
		t.Errorf("the bad line was not reported once:\n%s", log.text)
	}
}

// TestDialMovesOn gives up on an address that says nothing as soon as there is
// another one.
func TestDialMovesOn(t *testing.T) {
	second := sayOn(t, "second")
	tgt := &target{}
	tgt.set(netip.MustParseAddrPort("127.0.0.1:1"))
	to := tgt.now()
	tgt.set(second.Addr().(*net.TCPAddr).AddrPort())
	if !to.replaced() {
		t.Fatal("not replaced")
	}
	if c, err := to.dial(t.Context()); err == nil {
		c.Close()
		t.Error("connected to an address that was replaced")
	}
	f := &forwarder{target: tgt, log: slog.New(slog.DiscardHandler)}
	c, err := f.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, _ := io.ReadAll(c); string(b) != "second" {
		t.Errorf("got %q", b)
	}
}
