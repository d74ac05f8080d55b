//go:build !forwardonly

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"github.com/spf13/cobra"

	"imdsgate/internal/sim"
)

// simulateFlags are the flags of "simulate" as they were given.
type simulateFlags struct {
	listen, manage string
	instance       string
	limits         string
	faults         []string
	ignoreCase     bool
	logRequests    bool
	asJSON         bool
}

func simulateCmd(e *env) *cobra.Command {
	var f simulateFlags
	cmd := &cobra.Command{
		Use:   "simulate",
		Short: "Play the cloud's metadata service, for laptops and tests",
		Long: `Plays Azure's Instance Metadata Service: instance data, tokens of managed
identities, attested documents, scheduled events, and the limits and errors that
the service has. Tokens and certificates are the simulator's own and good for
nothing elsewhere.

The real service is at 169.254.169.254:80. To have the simulator there, run it
with --listen 169.254.169.254:80 inside a network namespace of its own.

A fault is key=value pairs with commas between them:
  status=429        an error, in the shape of the endpoint
  latency=200ms     a pause before the answer; goes with every other fault
  hang              accept, and never answer
  reset             reset the connection
  cut               half of the answer's body, then the end of the connection
  down              the host's front answers: 500 in plain text
  gone=60s          410 for a while
  partial           instance data as it is early in a VM's boot
  token-ttl=10m     how long new tokens live; below 0 they are expired already, and
                    below 5 min the proxy keeps none
and, to say which requests it is for:
  path=/metadata/identity   this path and all below it
  method=GET
  count=3                   so many requests only

The file for --instance has what is different from the default VM, under instance,
identity, extended, loadbalancer, reprovisiondata and versions:
  instance:
    compute: {name: web-1, location: northeurope}
  identity:
    system: null    # no identity of its own
    userAssigned:
      - clientId: 11111111-2222-3333-4444-555555555555
        objectId: 66666666-7777-8888-9999-000000000000
        resourceId: /subscriptions/5a5a0000-0000-0000-0000-00000000000a/resourcegroups/rg/providers/Microsoft.ManagedIdentity/userAssignedIdentities/web

The management API (--manage) changes faults while it runs, schedules events and
shows what was asked: /faults /history /events /jwks.json /ca.pem /healthz.
It asks nobody who they are.`,
		Example: `  imdsgate simulate
  curl -H Metadata:true 'http://127.0.0.1:8169/metadata/instance?api-version=2021-02-01'

  imdsgate simulate --listen 127.0.0.1:0 --manage 127.0.0.1:0 --json
  imdsgate simulate --instance vm.yaml --limits off --log-requests
  imdsgate simulate --fault status=429,path=/metadata/identity,count=3 --fault latency=200ms`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return simulate(e, f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.listen, "listen", "127.0.0.1:8169", "address and port of the metadata service; port 0 takes a free one")
	fl.StringVar(&f.manage, "manage", "", "address and port of the management API; without it there is none")
	fl.StringVar(&f.instance, "instance", "", "YAML file that is laid over the default VM")
	fl.StringVar(&f.limits, "limits", "", `requests per second, as in general=5,identity=20,concurrent=5 (which are the platform's own), or "off"`)
	fl.StringArrayVar(&f.faults, "fault", nil, "misbehave; can be given several times, the first that ends a request wins")
	fl.BoolVar(&f.ignoreCase, "ignore-case", false, "take paths, keys and query names in any letter case")
	fl.BoolVar(&f.logRequests, "log-requests", false, "write one JSON line per request to stderr, without tokens")
	fl.BoolVar(&f.asJSON, "json", false, "print the ready line as one JSON object")
	return cmd
}

func simulate(e *env, f simulateFlags) error {
	c, err := f.config(e.stderr)
	if err != nil {
		return usageError("simulate: %v", err)
	}
	s, err := sim.New(c)
	if err != nil {
		return err
	}
	protocol, err := listenOn(e.ctx, "--listen", f.listen, "127.0.0.1:8169")
	if err != nil {
		return err
	}
	defer protocol.Close() // Run closes it too; this is for the ways out before
	var manage net.Listener
	if f.manage != "" {
		if manage, err = listenOn(e.ctx, "--manage", f.manage, "127.0.0.1:8170"); err != nil {
			return err
		}
		defer manage.Close()
	}
	if err := simulateReady(e.stdout, protocol, manage, f.asJSON); err != nil {
		return err
	}
	return s.Run(e.ctx, protocol, manage)
}

// config turns flags into what the simulator takes. Its errors are the user's.
func (f *simulateFlags) config(stderr io.Writer) (sim.Config, error) {
	c := sim.Config{AnyCase: f.ignoreCase}
	var err error
	if f.instance != "" {
		if c.VM, err = sim.LoadVM(f.instance); errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
			return c, fmt.Errorf("--instance: %w", err)
		} else if err != nil {
			return c, err
		}
	}
	if c.Limits, err = sim.ParseLimits(f.limits); err != nil {
		return c, err
	}
	for _, text := range f.faults {
		fault, err := sim.ParseFault(text)
		if err != nil {
			return c, err
		}
		c.Faults = append(c.Faults, fault)
	}
	if f.logRequests {
		var mu sync.Mutex
		c.Seen = func(x sim.Exchange) {
			mu.Lock()
			defer mu.Unlock()
			writeJSON(stderr, x) // nowhere is left to report a broken stderr
		}
	}
	return c, nil
}

// simulateReady tells people and scripts that requests are taken, and where.
func simulateReady(w io.Writer, protocol, manage net.Listener, asJSON bool) error {
	line := struct {
		Ready    bool   `json:"ready"`
		Metadata string `json:"metadata"`
		Manage   string `json:"manage,omitempty"`
	}{Ready: true, Metadata: "http://" + protocol.Addr().String()}
	if manage != nil {
		line.Manage = "http://" + manage.Addr().String()
	}
	if asJSON {
		return writeJSON(w, line)
	}
	_, err := fmt.Fprintf(w, "ready: metadata %s, management %s\n", line.Metadata, cmp.Or(line.Manage, "off"))
	return err
}
