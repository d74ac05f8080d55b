//go:build !forwardonly

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/spf13/cobra"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/workload"
)

func policyLearnCmd(e *env) *cobra.Command {
	var asJSON, denied bool
	cmd := &cobra.Command{
		Use:   "learn AUDIT...",
		Short: "Write the least policy that allows what an audit log shows",
		Long: `learn reads the audit lines of a proxy and writes the least policy that allows what
was let through and answered well: for each container its actions, narrowed to the resources, the
identities and the parts of the instance document that it asked for. Run the proxy
with a policy of "mode: audit" for a while to see what its containers need; then
read what was learned before you put it to use.

The policy goes to stdout; what of the log it would still deny, and why, to stderr.`,
		Example: `  imdsgate policy learn audit.jsonl > policy.yaml && imdsgate policy check policy.yaml
  docker compose logs --no-log-prefix proxy | imdsgate policy learn - > policy.yaml
  imdsgate policy learn --denied audit.jsonl     allow what was denied, too`,
		Args: files(1, 0, "files of audit lines, or - for stdin"),
		RunE: func(_ *cobra.Command, args []string) error {
			events, err := readEvents(e, args)
			if err != nil {
				return err
			}
			return learnPolicy(e, events, denied, asJSON)
		},
	}
	cmd.Flags().BoolVar(&denied, "denied", false, "allow what policy denied, too")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object, with policy and what it denies")
	return cmd
}

const maxAuditLine = 1 << 20 // bytes

// readEvents reads audit lines. Lines that are no JSON are a log's own, between
// the proxy's, and passed over; a file without any event is a mistake.
func readEvents(e *env, paths []string) (events []audit.Event, err error) {
	for _, path := range paths {
		from := e.stdin
		if path != "-" {
			f, err := os.Open(path)
			if err != nil {
				return nil, withHint(usageError("%v", err), "give the files that a proxy wrote (--audit), or - for stdin")
			}
			defer f.Close()
			from = f
		}
		n := 0
		lines := bufio.NewScanner(from)
		lines.Buffer(nil, maxAuditLine)
		for lines.Scan() {
			var ev audit.Event
			if json.Unmarshal(lines.Bytes(), &ev) == nil && ev.Decision != "" {
				events = append(events, ev)
				n++
			}
		}
		if err := lines.Err(); err != nil {
			return nil, usageError("%s: %v", path, err)
		}
		if n == 0 {
			return nil, withHint(usageError("%s: no audit line in it", path), "these are lines of JSON with a decision, as 'imdsgate proxy --audit FILE' writes them")
		}
	}
	return events, nil
}

// stillDenied is what a learned policy does not allow of what was seen.
type stillDenied struct {
	Workload string `json:"workload"`
	Verb     string `json:"verb"`
	Target   string `json:"target"`
	Reason   string `json:"reason"`
	Count    int    `json:"count"`
}

func learnPolicy(e *env, events []audit.Event, denied, asJSON bool) error {
	var seen []policy.Seen
	for i := range events {
		// What the service itself has refused teaches nothing.
		if ev := &events[i]; ev.Decision == audit.Allow && ev.Status < 400 || denied && ev.Decision == audit.Deny {
			if s, err := observed(ev); err == nil {
				seen = append(seen, s)
			}
		}
	}
	text := policy.Learn(seen)
	p, err := policy.Parse("learned", text)
	if err != nil {
		return fmt.Errorf("policy learn: what was learned cannot be read back: %w", err)
	}
	rest := leftOut(new(policy.Current).Set(p), events)
	if asJSON {
		return writeJSON(e.stdout, map[string]any{"policy": string(text), "rules": p.Len(), "events": len(events), "denied": rest})
	}
	if _, err := e.stdout.Write(text); err != nil {
		return err
	}
	return printLeftOut(e.stderr, len(events), p.Len(), rest)
}

const mostShown = 50 // lines of what is still denied

// printable is a text from a file, fit for a terminal.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.QuoteToASCII(s)
	}
	return s
}

func printLeftOut(w io.Writer, events, rules int, rest []stillDenied) error {
	var b strings.Builder
	fmt.Fprintf(&b, "learned %d rules from %d requests", rules, events)
	if len(rest) == 0 {
		b.WriteString("; they allow all of it\n")
	} else {
		b.WriteString("; still denied, or different:\n")
	}
	for i, d := range rest {
		if i == mostShown {
			fmt.Fprintf(&b, "  and %d others (--json has them)\n", len(rest)-i)
			break
		}
		fmt.Fprintf(&b, "  %d × %s: %s %s: %s\n", d.Count, printable(d.Workload), printable(d.Verb), printable(d.Target), printable(d.Reason))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// observed is an event as something to learn from.
func observed(ev *audit.Event) (policy.Seen, error) {
	q, hidden, err := imds.ParseRecord(ev.Verb, ev.Target)
	if err != nil {
		return policy.Seen{}, err
	}
	if q.Action != ev.Action {
		return policy.Seen{}, fmt.Errorf("the line says %s, its target is %s", ev.Action, q.Action)
	}
	s := policy.Seen{Workload: workload.Workload{ID: ev.Workload, Name: ev.Name}, Query: q, Hidden: hidden, Identity: ev.Identity}
	if s.Identity == "" && imds.TakesSelector(q.Action) {
		s.Identity = policy.Effective(q, policy.Decision{})
	}
	if project, service, ok := strings.Cut(ev.Compose, "/"); ok {
		s.Workload.Labels = map[string]string{workload.ComposeProject: project, workload.ComposeService: service}
	}
	if namespace, account, ok := strings.Cut(ev.Pod, "/"); ok {
		s.Workload.Pod = &workload.Pod{Namespace: namespace, ServiceAccount: account}
	}
	for _, name := range ev.Members {
		s.Workload.Members = append(s.Workload.Members, workload.Workload{Name: name})
	}
	return s, nil
}

// leftOut asks the policy about all that was seen, whatever had become of it.
func leftOut(s *policy.Snapshot, events []audit.Event) []stillDenied {
	rest := []stillDenied{}
	at := make(map[stillDenied]int) // where in rest, counts aside
	views := make(map[string]*policy.View)
	for i := range events {
		ev := &events[i]
		d := stillDenied{Workload: ev.Name, Verb: ev.Verb, Target: ev.Target}
		if o, err := observed(ev); err != nil || ev.Decision == audit.Refuse {
			d.Reason = ev.Reason
			if ev.Decision != audit.Refuse {
				d.Reason = err.Error()
			}
		} else {
			who := strings.Join(append([]string{ev.Name, ev.Compose, ev.Pod, ev.Proof.String()}, ev.Members...), "\x00")
			if views[who] == nil {
				views[who] = s.View(&o.Workload, ev.Proof)
			}
			if d.Reason = verdict(views[who], ev, o); d.Reason == "" {
				continue
			}
		}
		n, ok := at[d]
		if !ok {
			n = len(rest)
			at[d] = n
			rest = append(rest, d)
		}
		rest[n].Count += max(ev.Count, 1)
	}
	slices.SortStableFunc(rest, func(a, b stillDenied) int { return b.Count - a.Count })
	return rest
}

// verdict is why the policy would not let an event pass as it did; empty if it would.
func verdict(v *policy.View, ev *audit.Event, o policy.Seen) string {
	d := v.Decide(o.Query)
	switch {
	case len(o.Hidden) > 0 && !d.Allow:
		return "the record does not show " + strings.Join(o.Hidden, ", ")
	case !d.Allow:
		if ev.Decision == audit.Allow && ev.Status >= 400 {
			return fmt.Sprintf("was answered %d, and so not learned: %s", ev.Status, d.Reason)
		}
		return d.Reason
	case len(d.Blank) > 0 && len(ev.Blanked) == 0 && ev.Decision != audit.Deny:
		return "allowed, without " + string(d.Blank[0])
	}
	return ""
}
