// Package discover knows which containers exist on this host. What a runtime's
// API looks like does not leave it.
//
// Static is a list that somebody wrote down. Docker asks a container engine, and
// sees a container's network namespace before the container runs; how, is said
// there.
package discover

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"go.yaml.in/yaml/v3"

	"imdsgate/internal/netns"
	"imdsgate/internal/workload"
)

// Found is a workload and the path of its network namespace, at this moment. The
// workload is the zero value while nobody knows yet whose namespace it is.
type Found struct {
	Workload workload.Workload
	Netns    string

	// Recheck, if not nil, says whether Netns still leads to this workload's
	// namespace: to be asked once it is open.
	Recheck func() error
}

// ErrGone is the reason why a listed workload was not found: its process or its
// namespace is not there (any more, or yet).
var ErrGone = errors.New("not running")

// Missing is a workload that is listed but was not found, and why.
type Missing struct {
	ID  workload.ID
	Err error
}

// Static is a list of workloads that somebody wrote down. Safe for concurrent
// use.
type Static struct {
	entries []entry

	mu     sync.Mutex
	starts map[int]uint64 // pid → start time when it was first seen
}

type entry struct {
	Name   string            `yaml:"name"`
	Netns  string            `yaml:"netns"`
	PID    int               `yaml:"pid"`
	Labels map[string]string `yaml:"labels"`
	Image  string            `yaml:"image"`
	Digest string            `yaml:"digest"`
	Pod    *podEntry         `yaml:"pod"`
}

type podEntry struct {
	Namespace      string            `yaml:"namespace"`
	ServiceAccount string            `yaml:"service-account"`
	Labels         map[string]string `yaml:"labels"`
}

// ParseStatic reads a list:
//
//	workloads:
//	  - name: web              # unique
//	    netns: /run/netns/web  # absolute; or pid: 4711
//	    labels: {team: shop}   # optional, as all that follows
//	    image: registry.example/shop/web:3
//	    digest: sha256:…       # of the image
//	    pod: {namespace: shop, service-account: web, labels: {app: web}}
//
// Whoever writes the list vouches for it: its labels are those of the runner.
// Errors name the file and line, and what was expected.
func ParseStatic(name string, text []byte) (*Static, error) {
	var doc struct {
		Workloads []entry `yaml:"workloads"`
	}
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(&doc); err != nil {
		return nil, yamlError(name, err)
	}
	// Once more, for the line numbers.
	var nodes struct {
		Workloads yaml.Node `yaml:"workloads"`
	}
	if err := yaml.Unmarshal(text, &nodes); err != nil {
		return nil, yamlError(name, err)
	}
	if nodes.Workloads.Kind != yaml.SequenceNode { // an empty list is one: nobody is steered
		return nil, fmt.Errorf("%s:1: want a list under the key workloads, found none", name)
	}
	first := make(map[string]int)
	for i, e := range doc.Workloads {
		line := nodes.Workloads.Content[i].Line
		if err := e.check(); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, line, err)
		}
		if before, ok := first[e.Name]; ok {
			return nil, fmt.Errorf("%s:%d: workload %q: the name is taken by line %d", name, line, e.Name, before)
		}
		first[e.Name] = line
	}
	return &Static{entries: doc.Workloads, starts: make(map[int]uint64)}, nil
}

func (e entry) check() error {
	switch {
	case e.Name == "":
		return errors.New("workload without name")
	case (e.Netns == "") == (e.PID == 0):
		return fmt.Errorf("workload %q: want either netns (a path) or pid", e.Name)
	case e.Netns != "" && !filepath.IsAbs(e.Netns):
		return fmt.Errorf("workload %q: netns %q: want an absolute path, as in /run/netns/%[1]s", e.Name, e.Netns)
	case e.PID < 0:
		return fmt.Errorf("workload %q: pid %d: want a positive number", e.Name, e.PID)
	case e.Digest != "" && !digestForm.MatchString(e.Digest):
		return fmt.Errorf("workload %q: digest %q: want sha256: and 64 hexadecimal digits in lower case", e.Name, e.Digest)
	case e.Pod != nil && e.Pod.Namespace == "":
		return fmt.Errorf("workload %q: pod without namespace", e.Name)
	}
	return nil
}

var digestForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// workload is what the entry says; a workload is not changed by who gets it.
func (e entry) workload() workload.Workload {
	w := workload.Workload{ID: workload.ID("static:" + e.Name), Name: e.Name, Labels: e.Labels, Image: e.Image, ImageID: e.Digest}
	if p := e.Pod; p != nil {
		w.Pod = &workload.Pod{Namespace: p.Namespace, ServiceAccount: p.ServiceAccount, Labels: p.Labels}
	}
	return w
}

// yamlError turns the library's "line N: …", which speaks of Go types, into
// "file:N: …", which speaks of the file.
func yamlError(name string, err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	text = strings.TrimSpace(strings.TrimPrefix(text, "unmarshal errors:"))
	text, _, _ = strings.Cut(text, "\n") // one at a time
	line := "1"
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		line, text, _ = strings.Cut(rest, ": ")
	}
	if text == "EOF" {
		text = "empty: want a list under the key workloads"
	}
	text = unknownKey.ReplaceAllString(text, "unknown key \"$1\": want workloads at the top; name, netns or pid, labels, image, digest, pod in each; namespace, service-account, labels in a pod")
	text = wrongType.ReplaceAllStringFunc(text, func(s string) string {
		m := wrongType.FindStringSubmatch(s)
		return "got " + m[1] + ", want " + cmp.Or(wanted[m[2]], m[2])
	})
	return fmt.Errorf("%s:%s: %s", name, line, text)
}

var (
	unknownKey = regexp.MustCompile(`^field (\S+) not found in type .*$`)
	wrongType  = regexp.MustCompile("^cannot unmarshal !!\\w+ (?:`(.*)` )?into (\\S+)$")
	wanted     = map[string]string{"int": "a number", "string": "a text", "[]discover.entry": "a list", "discover.entry": "a workload: name, and netns or pid", "discover.podEntry": "a pod: namespace, service-account, labels", "map[string]string": "labels as name: value"}
)

// Inherit takes over from the list that this one replaces which processes the pids
// meant: one that was given to another process meanwhile is not taken for the
// workload. After a restart of the agent nobody remembers that: prefer netns.
func (s *Static) Inherit(old *Static) {
	old.mu.Lock()
	defer old.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.Copy(s.starts, old.starts)
}

// Changed is nil: nobody tells when a process or a path comes or goes.
func (s *Static) Changed() <-chan struct{} { return nil }

// Find looks for every listed workload. A pid that was given to another process
// meanwhile is not taken for the workload.
func (s *Static) Find() (found []Found, missing []Missing) {
	for _, e := range s.entries {
		w := e.workload()
		path, err := s.locate(e)
		if err != nil {
			missing = append(missing, Missing{w.ID, err})
			continue
		}
		f := Found{Workload: w, Netns: path}
		if e.PID != 0 {
			f.Recheck = func() error { _, err := s.locate(e); return err }
		}
		found = append(found, f)
	}
	return found, missing
}

func (s *Static) locate(e entry) (string, error) {
	if e.PID == 0 {
		if _, err := os.Stat(e.Netns); err != nil {
			return "", fmt.Errorf("%w: %w", ErrGone, err)
		}
		return e.Netns, nil
	}
	start, err := startTime(e.PID)
	if err != nil {
		return "", fmt.Errorf("%w: pid %d: %w", ErrGone, e.PID, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if first, ok := s.starts[e.PID]; ok && first != start {
		return "", fmt.Errorf("%w: pid %d is another process now", ErrGone, e.PID)
	}
	s.starts[e.PID] = start
	return netns.PIDPath(e.PID), nil
}

// startTime is field 22 of /proc/PID/stat: clock ticks after boot.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field, in parentheses, may hold anything.
	i := bytes.LastIndexByte(b, ')')
	fields := strings.Fields(string(b[i+1:]))
	if i < 0 || len(fields) < 20 {
		return 0, errors.New("stat has too few fields")
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// A Finder lists workloads and tells when the list changes.
type Finder interface {
	Find() ([]Found, []Missing)
	Changed() <-chan struct{}
}

// Both lists what two finders list. Only changes of A are told.
type Both struct{ A, B Finder }

// Find lists all of A's, then all of B's.
func (b Both) Find() ([]Found, []Missing) {
	found, missing := b.A.Find()
	more, moreMissing := b.B.Find()
	return append(slices.Clip(found), more...), append(slices.Clip(missing), moreMissing...)
}

// Changed is A's.
func (b Both) Changed() <-chan struct{} { return b.A.Changed() }
