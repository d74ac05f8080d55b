//go:build !forwardonly

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/status"
	"imdsgate/internal/workload"
)

// controlSocket is where commands look for a running proxy.
const controlSocket = "/run/imdsgate-proxy/control.sock"

func policyCmd(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Check, test, learn and explain policies (changes nothing)",
		Long: `A policy says which container may do what. Rules match containers by what the
container engine says of them, and allow or deny typed actions; what no rule
allows is denied, and a deny beats every allow.

  mode: enforce                  # audit: record only; off: let everything pass
  allow: [versions.read]         # for every container
  rules:
    - name: web reads its vault
      match: {compose: {project: shop, service: web}}
      allow: [identity.token]
      resource: https://vault.azure.net
      identity: {client_id: 11111111-2222-3333-4444-555555555555}

The actions:
` + actionTable(),
		Example: `  imdsgate policy check policy.yaml
  imdsgate policy test cases.yaml
  imdsgate policy learn audit.jsonl > policy.yaml
  imdsgate policy explain web '/metadata/instance?api-version=2021-02-01'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(policyCheckCmd(e), policyTestCmd(e), policyLearnCmd(e), policyExplainCmd(e), policySchemaCmd(e))
	return cmd
}

// loadPolicy is for commands that a person waits for.
func loadPolicy(path string) (*policy.Policy, error) {
	if path == "" {
		return policy.Default(), nil
	}
	text, err := readText(path)
	if err != nil {
		return nil, err
	}
	p, err := policy.Parse(path, text)
	if err != nil {
		return nil, withHint(usageError("%v", err), "see 'imdsgate policy --help' for the form, or 'imdsgate policy schema'")
	}
	return p, nil
}

func readText(path string) ([]byte, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, withHint(usageError("%v", err), "give the path of a file that you may read")
	}
	return text, nil
}

// files wants at least one argument.
func files(least, most int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return usageError("%swant %s", subject(cmd), what)
		case most > 0 && len(args) > most:
			return usageError("%sunexpected argument %q: want %s", subject(cmd), args[most], what)
		}
		return nil
	}
}

func policyCheckCmd(e *env) *cobra.Command {
	var asJSON bool
	var proxy string
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Read a policy and say what may not be meant",
		Long: `check reads a policy as the proxy does, and looks for what works and may not be
meant: rules that never count, secrets for everybody, callers that may choose any
identity, modes that decide nothing. With --proxy it asks a running proxy which
containers there are, and names the rules that are for none of them.

Exit code 0: nothing found. 1: something found. 2: the file is wrong; the message
says where.`,
		Example: `  imdsgate policy check policy.yaml
  imdsgate policy check --proxy ` + controlSocket + ` policy.yaml
  imdsgate policy check --json policy.yaml`,
		Args: files(1, 1, "the policy's file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := loadPolicy(args[0])
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("proxy") && proxy == "" {
				return usageError("--proxy: want the path of a socket, got nothing")
			}
			var known []*workload.Workload
			if proxy != "" {
				c := status.Client{Path: proxy}
				if known, err = c.Workloads(e.ctx); err != nil {
					return noProxy("--proxy", proxy, err)
				}
				if known == nil {
					known = []*workload.Workload{}
				}
			}
			return reportFindings(e.stdout, p, p.Check(known), asJSON)
		},
	}
	cmd.Flags().StringVar(&proxy, "proxy", "", "control socket of a running proxy (its --control), to ask which containers there are")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}

func noProxy(what, path string, err error) error {
	err = fmt.Errorf("%s: %w", what, err)
	if lost := new(net.OpError); !errors.As(err, &lost) {
		return err // the proxy itself has said it
	}
	return withHint(unsupported("%v", err), fmt.Sprintf("is a proxy running with --control %s, on this machine or in this container, as you or with you as root? By itself it opens %s, where that folder is there and its own", path, controlSocket))
}

func reportFindings(w io.Writer, p *policy.Policy, found []policy.Finding, asJSON bool) error {
	if asJSON {
		if found == nil {
			found = []policy.Finding{}
		}
		if err := writeJSON(w, map[string]any{"ok": len(found) == 0, "policy": p.Name(), "mode": p.Mode(), "rules": p.Len(), "findings": found}); err != nil {
			return err
		}
	} else {
		for _, f := range found {
			fmt.Fprintf(w, "%s: %s: %s\n", f.Rule, f.Kind, f.Text)
		}
	}
	if len(found) > 0 {
		return &codedError{code: exitFailure, silent: asJSON, err: fmt.Errorf("policy check: %s: %d found", p.Name(), len(found))}
	}
	if !asJSON {
		fmt.Fprintf(w, "ok: %s: mode %s, %d rules\n", p.Name(), p.Mode(), p.Len())
	}
	return nil
}

func policyTestCmd(e *env) *cobra.Command {
	var asJSON bool
	var path string
	cmd := &cobra.Command{
		Use:   "test CASES...",
		Short: "Hold a policy against questions and the answers that are wanted",
		Long: `test asks a policy what is written in files of cases, and compares the answers.
It needs no proxy and no container: run it where you keep the policy.

  cases:
    - name: web reads its vault
      workload: {name: web, compose: {project: shop, service: web}}
      request: GET /metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net
      want: allow                # or deny; refuse: it is no proper request
      identity: client_id=11111111-2222-3333-4444-555555555555   # if it matters
      rule: web reads its vault                                  # if it matters

A workload has what match has, and image-labels, proof (listener, if nothing is
said) and members, for containers that share a network namespace.

Exit code 0: all passed. 1: some failed. 2: a file is wrong.`,
		Example: `  imdsgate policy test cases.yaml                    with the policy.yaml beside it
  imdsgate policy test --policy policy.yaml cases/*.yaml
  imdsgate policy test --json cases.yaml`,
		Args: files(1, 0, "files of cases"),
		RunE: func(_ *cobra.Command, args []string) error { return runPolicyTest(e, path, args, asJSON) },
	}
	cmd.Flags().StringVar(&path, "policy", "", "policy file (default: policy.yaml beside the first file of cases)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object for each case")
	return cmd
}

func runPolicyTest(e *env, path string, args []string, asJSON bool) error {
	if path == "" {
		path = filepath.Join(filepath.Dir(args[0]), "policy.yaml")
	}
	p, err := loadPolicy(path)
	if err != nil {
		return err
	}
	var cases []policy.Case
	var from []string
	for _, file := range args {
		text, err := readText(file)
		if err != nil {
			return err
		}
		more, err := policy.ParseCases(file, text)
		if err != nil {
			return withHint(usageError("%v", err), "see 'imdsgate policy test --help' for the form")
		}
		cases = append(cases, more...)
		for range more {
			from = append(from, file)
		}
	}
	s := new(policy.Current).Set(p)
	failed := 0
	for i := range cases {
		r := cases[i].Run(s, imds.Azure)
		if !r.OK {
			failed++
		}
		switch {
		case asJSON:
			err = writeJSON(e.stdout, struct {
				File string `json:"file"`
				policy.Result
			}{from[i], r})
		case r.OK:
			_, err = fmt.Fprintf(e.stdout, "pass  %s\n", r.Case)
		default:
			_, err = fmt.Fprintf(e.stdout, "FAIL  %s\n      %s:%d: %s\n", r.Case, from[i], r.Line, r.Wrong)
		}
		if err != nil {
			return err
		}
	}
	if failed > 0 {
		return &codedError{code: exitFailure, silent: asJSON, err: fmt.Errorf("policy test: %d of %d cases failed", failed, len(cases))}
	}
	if !asJSON {
		fmt.Fprintf(e.stdout, "ok: %d cases\n", len(cases))
	}
	return nil
}

func policySchemaCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "schema",
		Short:   "Print the JSON Schema of policy files, for editors",
		Example: "  imdsgate policy schema > policy.schema.json",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := e.stdout.Write(policy.Schema())
			return err
		},
	}
}
