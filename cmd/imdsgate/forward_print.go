package main

import (
	"io"
	"net/netip"
	"text/template"
)

// printForward writes what does the same as forward, or a part of it, with
// the system's own means.
func printForward(w io.Writer, form string, to netip.AddrPort) error {
	family := "v4tov4"
	if to.Addr().Is6() {
		family = "v4tov6"
	}
	if form == "nft" && to.Addr().Is6() {
		return usageError("--print nft: a packet for an IPv4 address cannot be sent on to %v", to.Addr())
	}
	return printed.ExecuteTemplate(w, form, map[string]any{"Addr": to.Addr(), "Port": to.Port(), "Target": to.String(), "Family": family})
}

var printed = template.Must(template.New("").Parse(`
{{- define "powershell" -}}
# In the client container, as ContainerAdministrator, where there is PowerShell (Server
# Core; not Nano Server). What it does is gone with the container, but for portproxy's
# table, which is in the registry.
$ErrorActionPreference = 'Stop'
$default = Get-NetRoute -DestinationPrefix 0.0.0.0/0 -PolicyStore ActiveStore | Sort-Object { $_.RouteMetric + $_.InterfaceMetric } | Select-Object -First 1
if (-not $default) { throw 'there is no default route' }
New-NetIPAddress -InterfaceIndex $default.InterfaceIndex -IPAddress 169.254.169.254 -PrefixLength 32 -SkipAsSource $true -PolicyStore ActiveStore | Out-Null
# Wait until it can be used: about three seconds, unless detection is optimistic.
foreach ($i in 1..100) {
  $state = (Get-NetIPAddress -IPAddress 169.254.169.254 -PolicyStore ActiveStore -ErrorAction SilentlyContinue).AddressState
  if ($state -eq 'Preferred') { break }
  Start-Sleep -Milliseconds 100
}
if ($state -ne 'Preferred') { throw "address 169.254.169.254: state '$state'" }
netsh interface portproxy add {{.Family}} listenaddress=169.254.169.254 listenport=80 connectaddress={{.Addr}} connectport={{.Port}}
# netsh may say nothing and do nothing: read back what there is.
if (-not (netsh interface portproxy show {{.Family}} | Select-String -SimpleMatch '169.254.169.254')) { throw 'portproxy: not in its table' }
if (-not (Get-NetTCPConnection -State Listen -LocalAddress 169.254.169.254 -LocalPort 80 -ErrorAction SilentlyContinue)) { throw 'portproxy: nobody listens; does the service iphlpsvc run?' }
# To take it back:
# netsh interface portproxy delete {{.Family}} listenaddress=169.254.169.254 listenport=80
# Remove-NetIPAddress -IPAddress 169.254.169.254 -PolicyStore ActiveStore -Confirm:$false
{{end}}
{{- define "netsh" -}}
rem In the client container, as ContainerAdministrator, where there is netsh (Server
rem Core; not Nano Server), as a batch file. Put in the name of the interface that
rem "netsh interface show interface" shows.
netsh interface ipv4 add address name="Ethernet" address=169.254.169.254 mask=255.255.255.255 skipassource=true store=active
rem Wait until it can be used, and read it back: netsh may say nothing and do nothing.
for /l %%i in (1,1,10) do netsh interface ipv4 show ipaddresses | findstr /c:"169.254.169.254" | findstr /c:"Preferred" >nul || ping -n 2 127.0.0.1 >nul
netsh interface ipv4 show ipaddresses | findstr /c:"169.254.169.254" | findstr /c:"Preferred" || exit /b 1
netsh interface portproxy add {{.Family}} listenaddress=169.254.169.254 listenport=80 connectaddress={{.Addr}} connectport={{.Port}}
netsh interface portproxy show {{.Family}} | findstr /c:"169.254.169.254" || exit /b 1
netstat -an -p tcp | findstr /c:"169.254.169.254:80" | findstr LISTENING || exit /b 1
rem To take it back:
rem netsh interface portproxy delete {{.Family}} listenaddress=169.254.169.254 listenport=80
rem netsh interface ipv4 delete address name="Ethernet" address=169.254.169.254
{{end}}
{{- define "nft" -}}
# For "nft -f -" in the client container, with CAP_NET_ADMIN. The kernel forwards by
# itself, to this one address: it does not follow a proxy that moves, and it needs a
# route to 169.254.169.254 (the default route will do) and connection tracking.
# To take it back: nft delete table ip imdsgate_forward
table ip imdsgate_forward {
	chain out {
		type nat hook output priority -100;
		ip daddr 169.254.169.254 tcp dport 80 dnat to {{.Target}}
	}
}
{{end}}
{{- define "ip" -}}
# What forward does to routes in the client container. It steers calls to this
# container's own loopback, and is of no use alone: a tproxy rule hands them to
# forward's listener there, and forward carries them to {{.Target}}.
ip route replace local 169.254.169.254/32 dev lo src 127.0.0.1 table 170
ip rule add pref 2 iif lo to 169.254.169.254/32 ipproto tcp dport 80 lookup 170
# To take it back:
# ip rule del pref 2
# ip route flush table 170
{{end}}`))
