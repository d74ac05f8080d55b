//go:build !forwardonly

package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"imdsgate/internal/audit"
)

func auditCmd(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Show whether an audit record is whole",
		Long: `audit looks at what 'imdsgate proxy --audit' has written. It changes nothing.

Each line is a record of a chain: it is numbered (seq), and its chain value is a
hash over the line and the chain value of the line before.`,
		Example: "  imdsgate audit verify /var/log/imdsgate/audit.jsonl",
		Args:    noArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(auditVerifyCmd(e))
	return cmd
}

type verifyFlags struct {
	head     string
	restarts bool
	asJSON   bool
}

func auditVerifyCmd(e *env) *cobra.Command {
	var f verifyFlags
	cmd := &cobra.Command{
		Use:   "verify [FILE...]",
		Short: "Tell whether records were changed, removed, put in or torn",
		Long: `verify reads audit files, or standard input, and tells whether they hold one
chain, each line in its place and unchanged. Rotated files can be given in any
order. It prints the chain's head, its last number and chain value, or where the
chain is broken and how.

The chain has no secret: whoever can write the files can write another chain that
is whole, and can cut off the end. Keep the head elsewhere, and hold the files
against it later (--head): the record that it names must be there, so that
nothing before it was changed and nothing was cut off up to it.

Records on stdout, in syslog and in the journal begin a chain with each start of
the proxy (--restarts); a file goes on with the one it has.

Exit codes: 0 the record is whole, 1 it is not, 2 it cannot be read.`,
		Example: `  imdsgate audit verify /var/log/imdsgate/audit.jsonl*
  imdsgate audit verify --head 1207:5f70bf18a086… audit.jsonl
  imdsgate audit verify --json audit.jsonl
  journalctl -t imdsgate-audit -o cat | imdsgate audit verify --restarts
  sed 's/^[^{]*//' imdsgate.log | imdsgate audit verify --restarts    # from syslog`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("head") && f.head == "" {
				return withHint(usageError("audit verify: --head: want SEQ:CHAIN, got nothing"), "leave it out where no head is known")
			}
			return auditVerify(e, f, args)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.head, "head", "", "a record that is known to be in the chain, as verify prints it: SEQ:CHAIN")
	fl.BoolVar(&f.restarts, "restarts", false, "the chain may begin anew, as often as the proxy was started")
	fl.BoolVar(&f.asJSON, "json", false, "print one JSON object")
	return cmd
}

func auditVerify(e *env, f verifyFlags, names []string) error {
	check := audit.Check{Restarts: f.restarts}
	if f.head != "" {
		h, err := audit.ParseHead(f.head)
		if err != nil {
			return withHint(usageError("audit verify: --head %q: %v", f.head, err), "it is what verify prints after head, and the proxy logs at its end")
		}
		check.Head = &h
	}
	parts, done, err := auditParts(e.stdin, names)
	defer done()
	if err != nil {
		return usageError("audit verify: %w", err)
	}
	sum, err := audit.Verify(parts, check)
	var broken *audit.Broken
	switch {
	case errors.As(err, &broken):
		return verifyBroken(e.stdout, f.asJSON, sum, broken)
	case err != nil:
		return usageError("audit verify: %w", err)
	case f.asJSON:
		return writeJSON(e.stdout, verifyResult{OK: true, Records: sum.Records, First: sum.First, Last: sum.Head.Seq, Head: sum.Head.String(),
			Chains: sum.Chains, Lost: sum.Lost, Torn: places(sum.Torn)})
	}
	return verifyOK(e.stdout, sum)
}

// auditParts opens files; done closes them.
func auditParts(stdin io.Reader, names []string) (parts []audit.Part, done func(), err error) {
	var files []*os.File
	done = func() {
		for _, f := range files {
			f.Close()
		}
	}
	if len(names) == 0 {
		names = []string{"-"}
	}
	seen := make(map[string]bool)
	for _, name := range names {
		if seen[name] {
			return nil, done, fmt.Errorf("%s is given twice", name)
		}
		seen[name] = true
		if name == "-" {
			parts = append(parts, audit.Part{Name: "stdin", R: stdin})
			continue
		}
		f, err := os.Open(name)
		if err != nil {
			return nil, done, err
		}
		files = append(files, f)
		parts = append(parts, audit.Part{Name: name, R: f})
	}
	return parts, done, nil
}

// verifyResult is the output of verify for machines.
type verifyResult struct {
	OK      bool     `json:"ok"`
	Records uint64   `json:"records"` // that are whole; if it is not ok, before the place
	First   uint64   `json:"first"`
	Last    uint64   `json:"last"`
	Head    string   `json:"head,omitempty"`
	Chains  int      `json:"chains"`
	Lost    uint64   `json:"lost"`
	Torn    []string `json:"torn,omitempty"`

	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"`
	Reason string `json:"reason,omitempty"`
}

func places(ps []audit.Place) (texts []string) {
	for _, p := range ps {
		texts = append(texts, p.String())
	}
	return texts
}

// verifyOK says what is there, and what is not as the record says itself.
func verifyOK(w io.Writer, sum audit.Summary) error {
	text := fmt.Sprintf("ok: %d records, seq %d–%d, head %v\n", sum.Records, sum.First, sum.Head.Seq, sum.Head)
	if sum.First > 1 {
		text += fmt.Sprintf("note: what came before record %d is not here\n", sum.First)
	}
	if sum.Chains > 1 {
		text += fmt.Sprintf("note: %d chains, one behind the other; the head is that of the last\n", sum.Chains)
	}
	if sum.Lost > 0 {
		text += fmt.Sprintf("note: events that could not be written: %d\n", sum.Lost)
	}
	for _, p := range sum.Torn {
		text += fmt.Sprintf("note: %v was not written to its end, and is no record\n", p)
	}
	_, err := io.WriteString(w, text)
	return err
}

func verifyBroken(w io.Writer, asJSON bool, sum audit.Summary, b *audit.Broken) error {
	err := error(&codedError{code: exitFailure, silent: asJSON, err: fmt.Errorf("audit verify: %w", b)})
	if asJSON {
		r := verifyResult{Records: sum.Records, First: sum.First, Last: sum.Head.Seq, Chains: sum.Chains, Lost: sum.Lost, Torn: places(sum.Torn),
			File: b.Name, Line: b.Line, Reason: b.Reason}
		return errors.Join(writeJSON(w, r), err)
	}
	if sum.Records == 0 {
		return err
	}
	return withHint(err, fmt.Sprintf("up to record %d nothing is wrong: seq %d–%[1]d are whole", sum.Head.Seq, sum.First))
}
