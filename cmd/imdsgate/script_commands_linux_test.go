package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"

	"imdsgate/internal/testnet"
)

// want refuses a wrong use of a command.
func want(ts *testscript.TestScript, ok bool, usage string) {
	if !ok {
		ts.Fatalf("usage: %s", usage)
	}
}

// cmdNeed skips the script where something is missing, or fails it where
// nothing may be missing: see testnet.Require.
func cmdNeed(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, !neg, "need root|namespaces|sklookup|userns|PROGRAM...")
	for _, name := range args {
		if name == "userns" {
			needUserns(ts)
			continue
		}
		n, ok := needs[name]
		if !ok {
			n = testnet.Command(name)
		}
		testnet.Require(of(ts).t, n)
	}
}

// needUserns is the right of ordinary users to make user namespaces.
func needUserns(ts *testscript.TestScript) {
	cmd := command(context.Background(), ts, strings.Fields("setpriv --reuid 65534 --regid 65534 --clear-groups unshare --user --net true"))
	out, err := cmd.CombinedOutput()
	switch t := of(ts).t; {
	case err == nil:
	case os.Getenv("CI") == "true":
		t.Fatalf("needs user namespaces for ordinary users: %v: %s", err, out)
	default:
		t.Skipf("needs user namespaces for ordinary users: %v: %s", err, out)
	}
}

// cmdAsk has the real curl ask, and wants an answer of this status. The answer is
// in the files body and head.
func cmdAsk(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, !neg && len(args) > 1, "ask STATUS ARGUMENT-OF-CURL...")
	curl := []string{"curl", "-q", "-sS", "--noproxy", "*", "--max-time", "20", "-o", "body", "-D", "head", "-w", "%{http_code}"}
	out, err := command(context.Background(), ts, append(curl, args[1:]...)).CombinedOutput()
	if err != nil || string(out) != args[0] {
		ts.Fatalf("got status %s (%v), want %s\n%s\n%s", out, err, args[0], ts.ReadFile("head"), ts.ReadFile("body"))
	}
}

// cmdChomp takes the final newline from files: the archive cannot hold one
// without, and the service's bodies have none.
func cmdChomp(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, !neg && len(args) > 0, "chomp FILE...")
	for _, name := range args {
		text, ok := strings.CutSuffix(ts.ReadFile(name), "\n")
		want(ts, ok, "chomp: "+name+" has no final newline")
		ts.Check(os.WriteFile(ts.MkAbs(name), []byte(text), 0o600))
	}
}

// cmdJSON wants values in a file that holds one JSON object and nothing else, or
// in one line of a file of such lines.
func cmdJSON(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, !neg && len(args) > 1, "json FILE|stdout[:LINE] PATH=VALUE...")
	name, line, isLine := strings.Cut(args[0], ":")
	text := ts.ReadFile(name)
	if isLine {
		n, err := strconv.Atoi(line)
		ts.Check(err)
		lines := slices.Collect(strings.Lines(text))
		if n < 1 || n > len(lines) {
			ts.Fatalf("%s has %d lines, want line %d", name, len(lines), n)
		}
		text = lines[n-1]
	}
	v, err := oneObject(text)
	if err != nil {
		ts.Fatalf("%s: %v", args[0], err)
	}
	for _, arg := range args[1:] {
		path, value, _ := strings.Cut(arg, "=")
		if got := lookup(v, path); got != value {
			ts.Fatalf("%s: %s: got %s, want %s in\n%s", args[0], path, got, value, text)
		}
	}
}

func oneObject(text string) (any, error) {
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	v := make(map[string]any)
	if err := dec.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("more than one JSON object")
	}
	return v, nil
}

// lookup follows a path of keys and indexes; "length" is that of a list.
func lookup(v any, path string) string {
	for key := range strings.SplitSeq(path, ".") {
		switch x := v.(type) {
		case map[string]any:
			v = x[key]
		case []any:
			if i, err := strconv.Atoi(key); err == nil && i < len(x) {
				v = x[i]
			} else if key == "length" {
				v = len(x)
			} else {
				v = nil
			}
		default:
			v = nil
		}
	}
	if v == nil {
		return "(nothing)"
	}
	return fmt.Sprint(v)
}

// cmdMode wants these permissions.
func cmdMode(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, !neg && len(args) == 2, "mode OCTAL FILE")
	st, err := os.Lstat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := fmt.Sprintf("%#o", st.Mode().Perm()); got != args[0] {
		ts.Fatalf("%s: got mode %s, want %s", args[1], got, args[0])
	}
}

// cmdLeftovers fails when anything of the script's programs is still there: a
// process, a folder of the demo, an agent's cgroup that "signal" has seen.
func cmdLeftovers(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg && len(args) == 0, "! leftovers")
	s := of(ts)
	found, err := filepath.Glob(filepath.Join(s.tmp, "imdsgate-*"))
	ts.Check(err)
	for _, pid := range s.processes() {
		line, _ := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
		found = append(found, "process "+pid+": "+strings.ReplaceAll(string(line), "\x00", " "))
	}
	for dir := range s.cgroups {
		if _, err := os.Stat(dir); err == nil {
			found = append(found, dir)
		}
	}
	if len(found) > 0 {
		ts.Fatalf("left behind:\n%s", strings.Join(found, "\n"))
	}
}

// processes lists the ids of those that have this script's environment.
func (s *script) processes() []string {
	files, _ := filepath.Glob("/proc/[0-9]*/environ")
	var pids []string
	for _, file := range files {
		b, err := os.ReadFile(file) // it may be gone by now
		if err == nil && slices.Contains(strings.Split(string(b), "\x00"), "TMPDIR="+s.tmp) {
			pids = append(pids, filepath.Base(filepath.Dir(file)))
		}
	}
	return pids
}

// noteCgroups remembers the cgroups that the script's agents are in.
func (s *script) noteCgroups() {
	for _, pid := range s.processes() {
		b, _ := os.ReadFile(filepath.Join("/proc", pid, "cgroup"))
		for line := range strings.Lines(string(b)) {
			path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
			if ok && strings.HasPrefix(filepath.Base(path), "imdsgate-") {
				s.cgroups[filepath.Join(cgroupMount(), path)] = true
			}
		}
	}
}

// cgroupMount is where cgroup v2 is; an agent in a cgroup has found it too.
func cgroupMount() string {
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1]
		}
	}
	return ""
}
