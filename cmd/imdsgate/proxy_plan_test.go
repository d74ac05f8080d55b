package main

import (
	"strings"
	"testing"
)

// TestProxyPrintsItsRoute holds what the printed commands must have: the active
// store alone, a wait, a read-back, and how to undo it.
func TestProxyPrintsItsRoute(t *testing.T) {
	for form, want := range map[string][]string{
		"powershell": {"Sort-Object { $_.RouteMetric + $_.InterfaceMetric }", "New-NetRoute -DestinationPrefix $to", "-PolicyStore ActiveStore", "Start-Sleep", "throw \"the route", "# Remove-NetRoute -DestinationPrefix '169.254.169.254/32'"},
		"netsh":      {"add route prefix=169.254.169.254/32", "store=active", "ping -n 2", "|| exit /b 1", "rem netsh interface ipv4 delete route"},
		"ip":         {"ip route add 169.254.169.254/32", "# ip route del"},
	} {
		code, out, errs := called(t, nil, "proxy", "--listen", ":80", "--ensure-route", "--print", form)
		if code != exitOK {
			t.Errorf("%s: %s", form, errs)
		}
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: no %q in\n%s", form, w, out)
			}
		}
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"--listen", ":80", "--print", "netsh"}, "imdsgate: --print and --dry-run are for --ensure-route"},
		{[]string{"--listen", ":80", "--ensure-route", "--print", "bat"}, `imdsgate: --print "bat": want powershell, netsh or ip`},
		{[]string{"--listen", ":80", "--ensure-route", "--print", "netsh", "--upstream", "http://[fd00:ec2::254]"}, "imdsgate: --print: for an IPv4 address only"},
	} {
		code, out, errs := called(t, nil, append([]string{"proxy"}, tc.args...)...)
		if code != exitUsage || out != "" || !strings.HasPrefix(errs, tc.want) {
			t.Errorf("%q: got code %d, %s", tc.args, code, errs)
		}
	}
}
