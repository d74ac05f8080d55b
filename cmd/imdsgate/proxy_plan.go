//go:build !forwardonly

package main

import (
	"io"
	"net/netip"
	"slices"
	"text/template"
)

// routePlan is --ensure-route without doing it.
type routePlan struct {
	print  string
	dryRun bool // Windows alone
}

// flagSet is what is used of the library's.
type flagSet interface {
	StringVar(p *string, name, value, usage string)
	BoolVar(p *bool, name string, value bool, usage string)
}

func (p *routePlan) flags(fl flagSet) {
	fl.StringVar(&p.print, "print", "", "with --ensure-route: act not, print commands that make the route instead: powershell, netsh or ip")
	ownPlanFlags(fl, p)
}

func (p *routePlan) asked() bool { return p.print != "" || p.dryRun }

// show prints the commands, or what would be done.
func (p *routePlan) show(w io.Writer, f proxyFlags) error {
	_, addr, err := upstreamURL(f.upstream)
	switch {
	case err != nil:
		return err
	case !f.ensureRoute:
		return withHint(usageError("--print and --dry-run are for --ensure-route: the proxy changes nothing else"), "add --listen :80 --ensure-route")
	case p.print != "" && !slices.Contains([]string{"powershell", "netsh", "ip"}, p.print):
		return usageError("--print %q: want powershell, netsh or ip", p.print)
	case p.print != "":
		return printRoute(w, p.print, addr.Addr())
	}
	return planOwnRoute(w, addr.Addr())
}

// printRoute writes what makes the route with the system's own means.
func printRoute(w io.Writer, form string, to netip.Addr) error {
	if to.Is6() {
		return usageError("--print: for an IPv4 address only, not %v", to)
	}
	return printedRoutes.ExecuteTemplate(w, form, map[string]any{"To": to})
}

var printedRoutes = template.Must(template.New("").Parse(`
{{- define "powershell" -}}
# In the proxy container, as ContainerAdministrator, where there is PowerShell. The
# route is gone with the container.
$ErrorActionPreference = 'Stop'
$to = '{{.To}}/32'
$default = Get-NetRoute -DestinationPrefix 0.0.0.0/0 -PolicyStore ActiveStore | Sort-Object { $_.RouteMetric + $_.InterfaceMetric } | Select-Object -First 1
if (-not $default) { throw 'there is no default route' }
if (Get-NetRoute -DestinationPrefix $to -PolicyStore ActiveStore -ErrorAction SilentlyContinue) { throw "there is a route to $to already" }
New-NetRoute -DestinationPrefix $to -InterfaceIndex $default.InterfaceIndex -NextHop $default.NextHop -PolicyStore ActiveStore | Out-Null
# Wait until it is there, and read it back.
foreach ($i in 1..50) {
  $route = Get-NetRoute -DestinationPrefix $to -PolicyStore ActiveStore -ErrorAction SilentlyContinue
  if ($route.NextHop -eq $default.NextHop) { break }
  Start-Sleep -Milliseconds 100
}
if ($route.NextHop -ne $default.NextHop) { throw "the route to $to is not there" }
# To take it back:
# Remove-NetRoute -DestinationPrefix '{{.To}}/32' -PolicyStore ActiveStore -Confirm:$false
{{end}}
{{- define "netsh" -}}
rem In the proxy container, as ContainerAdministrator, where there is netsh, as a batch
rem file. Put in the interface and the gateway of the line 0.0.0.0 with the lowest
rem metric that "route print -4 0.0.0.0" shows.
netsh interface ipv4 add route prefix={{.To}}/32 interface="Ethernet" nexthop=GATEWAY store=active
rem Wait until it is there, and read it back: netsh may say nothing and do nothing.
for /l %%i in (1,1,5) do netsh interface ipv4 show route store=active | findstr /c:"{{.To}}/32" >nul || ping -n 2 127.0.0.1 >nul
netsh interface ipv4 show route store=active | findstr /c:"{{.To}}/32" || exit /b 1
rem To take it back:
rem netsh interface ipv4 delete route prefix={{.To}}/32 interface="Ethernet" nexthop=GATEWAY store=active
{{end}}
{{- define "ip" -}}
# In the proxy container, with CAP_NET_ADMIN.
ip route add {{.To}}/32 $(ip route show default | sed -n '1s/^default \(via [0-9.]* \)\?\(dev [^ ]*\).*/\1\2/p') proto 169
# To take it back:
# ip route del {{.To}}/32 proto 169
{{end}}`))
