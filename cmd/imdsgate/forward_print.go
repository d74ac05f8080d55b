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
{{- define "netsh" -}}
rem In the client container, as ContainerAdministrator, where there is netsh (Server
rem Core; not Nano Server). Put in the name that "netsh interface show interface" shows.
netsh interface ipv4 add address name="Ethernet" address=169.254.169.254 mask=255.255.255.255 skipassource=true store=active
netsh interface portproxy add {{.Family}} listenaddress=169.254.169.254 listenport=80 connectaddress={{.Addr}} connectport={{.Port}}
rem netsh may say nothing and do nothing. See what there is now:
netsh interface portproxy show {{.Family}}
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
