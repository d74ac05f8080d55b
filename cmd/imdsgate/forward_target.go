package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// captured are the addresses that callers are steered from: gate.ServiceAddrs,
// without the weight of the gate.
var captured = []netip.AddrPort{netip.MustParseAddrPort("169.254.169.254:80"), netip.MustParseAddrPort("[fd00:ec2::254]:80")}

// envFilePoll is how often a file with the target is read. Polling sees changes
// through mounts of every kind.
const envFilePoll = 500 * time.Millisecond

// target is where calls are carried to; it can change.
type target struct {
	file    string // that is followed; empty means none
	current atomic.Pointer[destination]
}

// destination is a target until it is replaced.
type destination struct {
	addr netip.AddrPort
	gone context.Context // cancelled when it is replaced
	end  context.CancelFunc
}

func (t *target) now() *destination { return t.current.Load() }

func (t *target) set(a netip.AddrPort) {
	ctx, cancel := context.WithCancel(context.Background())
	if old := t.current.Swap(&destination{a, ctx, cancel}); old != nil {
		old.end()
	}
}

func (d *destination) replaced() bool { return d.gone.Err() != nil }

// dial connects, and gives up when the destination is replaced.
func (d *destination) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.gone, cancel)()
	return new(net.Dialer).DialContext(ctx, "tcp", d.addr.String())
}

// target says where calls go at first.
func (f *forwardFlags) target(getenv func(string) string) (*target, error) {
	t := &target{file: f.envFile}
	from, value := "--to", f.to
	if f.to == "" {
		from, value = addressVariable, getenv(addressVariable)
	}
	if f.envFile != "" {
		v, err := readEnvFile(f.envFile, addressVariable)
		switch {
		case err == nil:
			from, value = addressVariable+" in "+f.envFile, v
		case value == "": // the environment's will do until the file is there
			return nil, withHint(usageError("--env-file: %v", err), "'imdsgate locate --watch --env-file FILE' writes and keeps it; give its folder to the container, not the file alone")
		}
	}
	if value == "" {
		return nil, withHint(usageError("forward: no address of the proxy: neither --to nor "+addressVariable+" is set"),
			"'imdsgate locate' finds it: docker run -e "+addressVariable+"=$(imdsgate locate) ...")
	}
	a, err := parseTarget(value)
	if err != nil {
		return nil, withHint(usageError("%s: %v", from, err), "give one address, as 'imdsgate locate' prints it")
	}
	t.set(a)
	return t, nil
}

var errSeveralAddresses = errors.New("this looks like several addresses")

// parseTarget reads ADDRESS or ADDRESS:PORT. Names are refused, since whoever
// answers for them could choose where credentials come from.
func parseTarget(s string) (netip.AddrPort, error) {
	s = strings.TrimSpace(s)
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		var addr netip.Addr
		addr, err = netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"))
		a = netip.AddrPortFrom(addr, 80)
	}
	switch {
	case err != nil && several(s):
		return netip.AddrPort{}, fmt.Errorf("%q: %w, want one", s, errSeveralAddresses)
	case err != nil:
		return netip.AddrPort{}, fmt.Errorf("%q: want one IP address, and a port if that is not 80", s)
	}
	a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	switch {
	case a.Port() == 0 || a.Addr().IsUnspecified() || a.Addr().IsMulticast():
		return netip.AddrPort{}, fmt.Errorf("%q: nobody can listen there", s)
	case slices.Contains(captured, a):
		return netip.AddrPort{}, fmt.Errorf("%q: this is the metadata service's own address, where calls come from", s)
	}
	return a, nil
}

// several reports whether s is addresses that were put together, with something
// in between or nothing: 172.17.0.3172.18.0.2 is what a template over a
// container's networks prints.
func several(s string) bool {
	if strings.Count(s, ".") > 3 {
		return true
	}
	parts := strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune(" ,;|\t\n", r) })
	return len(parts) > 1 && !slices.ContainsFunc(parts, func(p string) bool {
		_, err := netip.ParseAddr(p)
		_, perr := netip.ParseAddrPort(p)
		return err != nil && perr != nil
	})
}

// follow reads the file again and again until ctx is cancelled. What cannot be
// used changes nothing, and is reported once.
func (t *target) follow(ctx context.Context, log *slog.Logger) {
	if t.file == "" {
		return
	}
	tick := time.NewTicker(envFilePoll)
	defer tick.Stop()
	var complaint string
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		value, err := readEnvFile(t.file, addressVariable)
		var a netip.AddrPort
		if err == nil {
			a, err = parseTarget(value)
		}
		switch {
		case err == nil && a != t.now().addr:
			from := t.now().addr
			t.set(a)
			log.Info("the proxy has another address", "from", from.String(), "to", a.String())
			complaint = ""
		case err == nil:
			complaint = ""
		case err.Error() != complaint:
			complaint = err.Error()
			log.Warn("address of the proxy not read: the last one stays", "file", t.file, "error", err)
		}
	}
}
