//go:build !forwardonly

package main

import (
	"fmt"
	"net/netip"
	"net/url"
	"strings"
)

const defaultUpstream = "http://169.254.169.254"

// upstreamURL checks the flag --upstream: plain HTTP to an address, nothing
// else. Names are refused, since whoever answers for them could choose where
// credentials come from.
func upstreamURL(s string) (*url.URL, netip.AddrPort, error) {
	bad := func(why string) (*url.URL, netip.AddrPort, error) {
		return nil, netip.AddrPort{}, withHint(usageError("--upstream %q: %s", s, why),
			"give an address, like "+defaultUpstream+" or http://127.0.0.1:8169")
	}
	if s == "" {
		return bad("is empty")
	}
	u, err := url.Parse(s)
	if err != nil {
		return bad("not a URL")
	}
	if u.Scheme != "http" {
		return bad("metadata services speak plain http")
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return bad("want scheme, address and port only")
	}
	addr, err := netip.ParseAddr(u.Hostname())
	if err != nil || addr.Zone() != "" {
		return bad(fmt.Sprintf("%q is not an IP address", u.Hostname()))
	}
	port := uint16(80)
	if p := u.Port(); p != "" {
		ap, err := netip.ParseAddrPort("0.0.0.0:" + p)
		if err != nil || ap.Port() == 0 {
			return bad(fmt.Sprintf("%q is not a port", p))
		}
		port = ap.Port()
	}
	return &url.URL{Scheme: "http", Host: u.Host}, netip.AddrPortFrom(addr.Unmap(), port), nil
}
