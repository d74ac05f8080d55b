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
	"time"

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
	want(ts, !neg, "need root|namespaces|sklookup|PROGRAM...")
	for _, name := range args {
		n, ok := needs[name]
		if !ok {
			n = testnet.Command(name)
		}
		testnet.Require(of(ts).t, n)
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

// lookup follows a path of keys and indexes; "#" is the length of a list.
func lookup(v any, path string) string {
	for key := range strings.SplitSeq(path, ".") {
		switch x := v.(type) {
		case map[string]any:
			v = x[key]
		case []any:
			if i, err := strconv.Atoi(key); err == nil && i < len(x) {
				v = x[i]
			} else if key == "#" {
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
// process, an agent's cgroup without processes, a folder of the demo.
func cmdLeftovers(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg && len(args) == 0, "! leftovers")
	s := of(ts)
	// Others' agents are between making a cgroup and entering it for a moment.
	var found []string
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		folders, err := filepath.Glob(filepath.Join(s.tmp, "imdsgate-*"))
		ts.Check(err)
		found = slices.Concat(s.processes(), folders, s.emptyCgroups())
		if len(found) == 0 {
			return
		}
	}
	ts.Fatalf("left behind:\n%s", strings.Join(found, "\n"))
}

// processes lists those that have this script's environment.
func (s *script) processes() []string {
	files, _ := filepath.Glob("/proc/[0-9]*/environ")
	var found []string
	for _, file := range files {
		b, err := os.ReadFile(file) // it may be gone by now
		if err == nil && slices.Contains(strings.Split(string(b), "\x00"), "TMPDIR="+s.tmp) {
			line, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
			found = append(found, file+": "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return found
}

// emptyCgroups lists agents' cgroups that came after the script's start and hold
// nobody.
func (s *script) emptyCgroups() []string {
	var found []string
	for _, dir := range agentCgroups() {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err == nil && len(b) == 0 && !slices.Contains(s.cgroups, dir) {
			found = append(found, dir)
		}
	}
	return found
}

// agentCgroups lists the cgroups that have an agent's name.
func agentCgroups() []string {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil
	}
	var found []string
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 3 || f[2] != "cgroup2" {
			continue
		}
		filepath.WalkDir(f[1], func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "imdsgate-") {
				found = append(found, path)
			}
			return nil
		})
	}
	return found
}
