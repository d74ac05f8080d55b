package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"imdsgate/internal/gate"
)

// called runs a command line in this process that is to end by itself.
func called(t *testing.T, environ map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	e := &env{stdin: strings.NewReader(""), stdout: &out, stderr: &errs, getenv: func(k string) string { return environ[k] }, ctx: t.Context()}
	code = run(e, args)
	return code, out.String(), errs.String()
}

func TestCapturedAreTheGates(t *testing.T) {
	if got := gate.ServiceAddrs(); !slices.Equal(got, captured) {
		t.Errorf("the gate has %v, forward %v", got, captured)
	}
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
		{"unknown_form", some, []string{"--print", "iptables"}, `imdsgate: --print "iptables": want powershell, netsh, nft or ip` + "\nhint: "},
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
			`netsh interface portproxy show v4tov4 | findstr /c:"169.254.169.254" || exit /b 1`,
		}},
		{"powershell", []string{"--print", "powershell"}, []string{
			"New-NetIPAddress -InterfaceIndex $default.InterfaceIndex -IPAddress 169.254.169.254 -PrefixLength 32 -SkipAsSource $true -PolicyStore ActiveStore | Out-Null",
			"  Start-Sleep -Milliseconds 100",
			"if ($state -ne 'Preferred') { throw \"address 169.254.169.254: state '$state'\" }",
			"# Remove-NetIPAddress -IPAddress 169.254.169.254 -PolicyStore ActiveStore -Confirm:$false",
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
