package main

import (
	"net"
	"strings"
)

// notifyReady tells the service manager, if it asked to be told, that the start
// is over (sd_notify(3)). Nobody depends on the outcome.
func notifyReady(getenv func(string) string) {
	name := getenv("NOTIFY_SOCKET")
	if name == "" {
		return
	}
	if abstract, ok := strings.CutPrefix(name, "@"); ok {
		name = "\x00" + abstract
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	c.Write([]byte("READY=1"))
}
