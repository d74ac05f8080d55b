package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"imdsgate/internal/testnet"
)

// keep leaves everything up until ctx ends, says on stderr what to try, and shows
// the proxy's record of what is tried.
func (d *demo) keep(ctx context.Context) {
	d.invite()
	for {
		at, err := d.stack.Proxy.Await(ctx, d.audits, func(line string) bool { return strings.Contains(line, `"decision"`) })
		if err != nil { // of ctx, or somebody has tried what happens without a proxy
			<-ctx.Done()
			return
		}
		fmt.Fprintln(d.e.stderr, d.stack.Proxy.Lines()[at])
		d.audits = at + 1
	}
}

// invite says how to enter a container, and what to try there.
func (d *demo) invite() {
	w, user := d.e.stderr, ""
	if d.e.getenv(inUserNamespace) != "" {
		user = fmt.Sprintf(" --user --preserve-credentials --target %d", os.Getpid())
	}
	fmt.Fprintln(w, "\nIt stays up until Ctrl-C. To try for yourself, enter a container in another terminal:")
	for _, c := range []*testnet.Container{d.web, d.batch} {
		fmt.Fprintf(w, "  %-6s nsenter%s --net=%s sh\n", c.Name+":", user, c.NS.Path())
	}
	fmt.Fprintln(w, "and call the service:")
	for _, x := range []struct{ what, curl, url string }{
		{"a fact", "curl -s", instanceURL},
		{"a token, which the policy allows to web alone", "curl -s", tokenURL},
		{"around the gate, where the guard drops it", "curl -m 3 --interface eth0", instanceURL},
	} {
		fmt.Fprintf(w, "  %s:\n    %s -H Metadata:true '%s'\n", x.what, x.curl, x.url)
	}
	fmt.Fprintln(w, "Each call that arrives at the proxy appears here:")
}
