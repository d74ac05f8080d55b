// Command testlog reads the events of "go test -json" and writes what "go test"
// alone would: a line for each package, and all of what failed. The tests that were
// skipped, which "go test" keeps to itself, it appends to a file: a line each, the
// reason, a tab, and the test.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go test -json ... | testlog FILE")
		os.Exit(2)
	}
	skips, err := os.OpenFile(os.Args[1], os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err == nil {
		err = filter(os.Stdin, os.Stdout, skips)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testlog:", err)
		os.Exit(1)
	}
}

// event is one line of the input ("go doc test2json"). Test is empty for what is
// about the package as a whole.
type event struct {
	Action, Package, Test, Output string
}

// filter passes on the input to its end. Lines that are no events are passed on as
// they are.
func filter(r io.Reader, w, skips io.Writer) error {
	said := make(map[string]map[string][]string) // by package and test, what is not yet decided on
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadBytes('\n')
		if err == io.EOF && len(line) == 0 {
			return nil
		}
		if err != nil && err != io.EOF {
			return err
		}
		var e event
		if !bytes.HasPrefix(line, []byte("{")) || json.Unmarshal(line, &e) != nil {
			e = event{Action: "build-output", Output: string(line)}
		}
		if said[e.Package] == nil {
			said[e.Package] = make(map[string][]string)
		}
		if err := handle(e, said[e.Package], w, skips); err != nil {
			return err
		}
	}
}

// handle takes one event; said is what its package has said, by test.
func handle(e event, said map[string][]string, w, skips io.Writer) error {
	switch e.Action {
	case "build-output":
		_, err := io.WriteString(w, e.Output)
		return err
	case "output":
		said[e.Test] = append(said[e.Test], e.Output)
		return nil
	case "pass", "skip", "fail":
	default:
		return nil
	}
	lines := said[e.Test]
	delete(said, e.Test)
	var show strings.Builder
	switch {
	case e.Test == "" && e.Action == "fail":
		for _, test := range slices.Sorted(maps.Keys(said)) { // unfinished: a panic, or out of time
			showLines(&show, said[test])
		}
		show.WriteString(strings.Join(lines, ""))
	case e.Test == "":
		show.WriteString(strings.Join(lines[max(len(lines)-1, 0):], "")) // ok, or no test files
	case e.Action == "fail":
		showLines(&show, lines)
	case e.Action == "skip":
		_, err := fmt.Fprintf(skips, "%s\t%s.%s\n", reason(lines), e.Package, e.Test)
		return err
	}
	_, err := io.WriteString(w, show.String())
	return err
}

// showLines leaves out what only tells that a test has begun or goes on.
func showLines(w *strings.Builder, lines []string) {
	for _, line := range lines {
		if !strings.HasPrefix(line, "=== ") {
			w.WriteString(line)
		}
	}
}

var logged = regexp.MustCompile(`^\s*\S+\.go:\d+: (.*)\n?$`)

// reason is the last line that a test has logged.
func reason(lines []string) string {
	why := "no reason given"
	for _, line := range lines {
		if m := logged.FindStringSubmatch(line); m != nil {
			why = m[1]
		}
	}
	return why
}
