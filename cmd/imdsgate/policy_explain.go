//go:build !forwardonly

package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/status"
	"imdsgate/internal/workload"
)

// explainFlags describe a container, where no proxy is asked.
type explainFlags struct {
	policy, proxy                      string
	image, digest, compose, pod, proof string
	labels                             []string
	asJSON                             bool
}

func policyExplainCmd(e *env) *cobra.Command {
	var f explainFlags
	cmd := &cobra.Command{
		Use:   "explain CONTAINER [METHOD] URL",
		Short: "Say what would become of a request, and why",
		Long: `explain decides about a request without making it: its canonical form, the action,
the decision and its rule, whose identity it is for, and what each rule has to say.

It asks a running proxy, of which CONTAINER is a name or an ID as in its audit; or,
with --policy, decides by that file about a container that the flags describe.

Exit code 0: it has said so, whatever the decision; "refuse" is for what is no
proper request, whoever sends it. 1: there is no such container. 3: no proxy is there.`,
		Example: `  imdsgate policy explain web '/metadata/instance?api-version=2021-02-01'
  docker compose exec proxy /imdsgate policy explain shop-web-1 '/metadata/versions'
  imdsgate policy explain --policy policy.yaml --compose shop/web web \
      'http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net'`,
		Args: files(2, 3, "a container, a method (or none, for GET) and a URL or path"),
		RunE: func(cmd *cobra.Command, args []string) error {
			method := "GET"
			if len(args) == 3 {
				method = args[1]
			}
			target, err := targetOf(args[len(args)-1])
			if err != nil {
				return err
			}
			q := status.Question{Workload: args[0], Method: method, Target: target}
			byFile := cmd.Flags().Changed("policy")
			for _, name := range []string{"image", "digest", "label", "compose", "pod", "proof"} {
				if cmd.Flags().Changed(name) && !byFile {
					return withHint(usageError("policy explain: --%s describes a container for --policy", name), "a running proxy knows its containers: leave it out, or add --policy FILE")
				}
			}
			return f.explain(e, q, byFile)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.proxy, "proxy", controlSocket, "control socket of a running proxy (its --control)")
	fl.StringVar(&f.policy, "policy", "", `decide by this file instead; "" is the built-in policy`)
	fl.StringVar(&f.image, "image", "", "with --policy: the container's image")
	fl.StringVar(&f.digest, "digest", "", "with --policy: the image's ID, sha256:…")
	fl.StringArrayVar(&f.labels, "label", nil, "with --policy: a label that its runner gave it, key=value (repeatable)")
	fl.StringVar(&f.compose, "compose", "", "with --policy: project/service")
	fl.StringVar(&f.pod, "pod", "", "with --policy: namespace/service-account")
	fl.StringVar(&f.proof, "proof", "listener", "with --policy: what proves who it is: address, endpoint, cgroup or listener")
	fl.BoolVar(&f.asJSON, "json", false, "print one JSON object")
	return cmd
}

// explain asks whoever knows, and prints the answer.
func (f *explainFlags) explain(e *env, q status.Question, byFile bool) (err error) {
	var ex policy.Explanation
	if byFile {
		ex, err = f.decide(q)
	} else if ex, err = (&status.Client{Path: f.proxy}).Explain(e.ctx, q); err != nil {
		err = noProxy("policy explain", f.proxy, err)
	}
	switch {
	case err != nil:
		return err
	case f.asJSON:
		return writeJSON(e.stdout, ex)
	}
	return printExplanation(e.stdout, &ex)
}

// targetOf takes a URL of the service, or its path.
func targetOf(s string) (string, error) {
	rest, isURL := strings.CutPrefix(s, "http://")
	if !isURL {
		if !strings.HasPrefix(s, "/") {
			return "", withHint(usageError("policy explain: %q: want a URL of the metadata service, or its path", s), "like '/metadata/instance?api-version=2021-02-01', in quotes")
		}
		return s, nil
	}
	host, path, _ := strings.Cut(rest, "/")
	switch strings.TrimSuffix(host, ":80") {
	case "169.254.169.254", "[fd00:ec2::254]":
		return "/" + path, nil
	}
	return "", withHint(usageError("policy explain: %q is not the metadata service", host), "want http://169.254.169.254/…, or the path alone")
}

// decide is explain without a proxy.
func (f *explainFlags) decide(q status.Question) (policy.Explanation, error) {
	p, err := loadPolicy(f.policy)
	if err != nil {
		return policy.Explanation{}, err
	}
	w := &workload.Workload{ID: workload.ID("static:" + q.Workload), Name: q.Workload, Image: f.image, ImageID: f.digest, Labels: make(map[string]string)}
	for _, l := range f.labels {
		key, value, ok := strings.Cut(l, "=")
		if !ok {
			return policy.Explanation{}, usageError("--label %q: want key=value", l)
		}
		w.Labels[key] = value
	}
	if f.compose != "" {
		project, service, ok := strings.Cut(f.compose, "/")
		if !ok {
			return policy.Explanation{}, usageError("--compose %q: want project/service", f.compose)
		}
		w.Labels[workload.ComposeProject], w.Labels[workload.ComposeService] = project, service
	}
	if f.pod != "" {
		namespace, account, _ := strings.Cut(f.pod, "/")
		w.Pod = &workload.Pod{Namespace: namespace, ServiceAccount: account}
	}
	proof, err := workload.ParseProof(f.proof)
	if err != nil {
		return policy.Explanation{}, usageError("--proof: %v", err)
	}
	return new(policy.Current).Set(p).ExplainTarget(w, proof, imds.Azure, q.Method, q.Target), nil
}

func printExplanation(w io.Writer, e *policy.Explanation) error {
	var b strings.Builder
	line := func(key, format string, args ...any) {
		fmt.Fprintf(&b, "%-10s %s\n", key, fmt.Sprintf(format, args...))
	}
	line("container", "%s, proof %s", e.Workload, e.Proof)
	line("request", "%s %s", e.Method, e.Target)
	line("action", "%s", e.Action)
	line("decision", "%s", e.Decision)
	line("rule", "%s", e.Rule)
	line("reason", "%s", e.Reason)
	if e.Mode != policy.Enforce {
		line("mode", "%s", e.Mode)
	}
	if e.Would != "" {
		line("would", "%s, if every mode were enforce", e.Would)
	}
	if e.Member != "" {
		line("member", "%s: of those that share the network namespace, its rules are the narrowest", e.Member)
	}
	if e.Identity != "" {
		line("identity", "%s", e.Identity)
	}
	for _, a := range e.Without {
		line("without", "%s", a)
	}
	for _, s := range e.Drop {
		line("without", "%s", s)
	}
	if len(e.Keep) > 0 {
		line("only", "%s", strings.Join(e.Keep, ", "))
	}
	for _, r := range e.Rules {
		who := ""
		if r.Member != "" {
			who = " (" + r.Member + ")"
		}
		fmt.Fprintf(&b, "  %s %s%s: %s\n", r.Effect, r.Rule, who, r.Says)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
