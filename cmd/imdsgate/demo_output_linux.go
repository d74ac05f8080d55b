package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"imdsgate/internal/redirect"
	"imdsgate/internal/testnet"
)

// demoOutput tells the demo's story: text with colour on a terminal, plain text
// elsewhere, or nothing but one JSON object.
type demoOutput struct {
	w      io.Writer // of the text
	result io.Writer // of the JSON object, nil for text
	color  bool
}

func newDemoOutput(e *env, asJSON bool) *demoOutput {
	if asJSON {
		return &demoOutput{w: io.Discard, result: e.stdout}
	}
	return &demoOutput{w: e.stdout, color: isTerminal(e.stdout) && e.getenv("NO_COLOR") == ""}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func (o *demoOutput) paint(code, s string) string {
	if !o.color {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (o *demoOutput) scene(s string)               { fmt.Fprintf(o.w, "\n%s\n", o.paint("1", s)) }
func (o *demoOutput) line(format string, a ...any) { fmt.Fprintf(o.w, "  "+format+"\n", a...) }

func (o *demoOutput) intro(m redirect.Method, why string, fence bool) {
	o.scene("imdsgate demo: two containers, one metadata service, and a gate between")
	o.line("capture method %s", m)
	if why != "" {
		o.line("(better ones are not available here: %s)", why)
	}
	if !fence {
		o.line("no fence around handed-over sockets (it needs root, BPF and cgroup v2)")
	}
}

func (o *demoOutput) built(took time.Duration) {
	o.scene("Built out of network namespaces")
	o.line("fabric  169.254.169.254, the simulated cloud")
	o.line("vm      eth0 to the fabric, bridge br0, agent")
	o.line("web     container with an app of its own on 0.0.0.0:80")
	o.line("batch   container whose client uses IPv4-mapped IPv6 sockets")
	o.line("in %d ms", took.Milliseconds())
}

func (o *demoOutput) started(s *testnet.Stack, took time.Duration) {
	o.scene("Started, as real processes")
	o.line("simulator pid %d, agent pid %d, proxy pid %d, in %d ms", s.Sim.PID(), s.Agent.PID(), s.Proxy.PID(), took.Milliseconds())
}

func (o *demoOutput) client(c demoClient) {
	o.scene(fmt.Sprintf("Container %s calls http://169.254.169.254 (%s)", c.Name, c.Socket))
	o.line("taken for %s: proof %s, by %s; it sees its peer as %s", o.paint("36", c.Workload), c.Proof, c.Method, c.Peer)
	for _, a := range c.Asked {
		color := "32"
		if a.Decision != "allow" {
			color = "33"
		}
		o.line("GET %s", a.Target)
		o.line("  %s %s  (%.1f ms)", o.paint(color, fmt.Sprint(a.Status)), o.paint(color, a.Decision), a.TookMS)
		o.line("  told  %s", oneLine(a.Told))
		if a.Identity != "" {
			o.line("  as    %s, which the policy chose: the caller named none", a.Identity)
		}
		o.line("  why   %s (rule %s)", a.Reason, a.Rule)
	}
}

func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > 160 {
		s = string(r[:160]) + "…"
	}
	return s
}

func (o *demoOutput) ownPort(said string) {
	o.scene("Port 80 of web itself is still web's")
	o.line("from inside and from batch: %q", said)
}

func (o *demoOutput) proxy(p demoProxy) {
	o.scene("What the kernel says of the proxy")
	o.line("uid %s, effective capabilities %s, no_new_privs %v, in an empty network namespace", p.UID, p.Capabilities, p.NoNewPrivs)
}

func (o *demoOutput) restart(r demoRestart) {
	o.scene("The proxy is killed; a call waits; the proxy comes back")
	o.line("%s after %.0f ms: never refused", o.paint("32", fmt.Sprint(r.Status)), r.WaitedMS)
}

func (o *demoOutput) upstream(n int, from []string) {
	o.scene("What the metadata service saw")
	o.line("%d requests, all from %s, the VM", n, strings.Join(from, ", "))
}

// end prints the last line, or the object.
func (o *demoOutput) end(r demoResult) error {
	if o.result != nil {
		return writeJSON(o.result, r)
	}
	last := o.paint("1;32", "demo: ok") + fmt.Sprintf(" (%d ms, method %s)", r.TookMS, r.Method)
	switch {
	case r.Error == errInterrupted.Error():
		last = "demo: " + r.Error
	case !r.OK:
		last = o.paint("1;31", "demo: failed") + ": " + r.Error
	}
	_, err := fmt.Fprintf(o.w, "\n%s\n", last)
	return err
}
