package discover

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/workload"
)

func TestParseStaticRefuses(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"empty_file", "", "f.yaml:1: empty: want a list under the key workloads"},
		{"no_list", "workloads:\n", "f.yaml:1: want a list under the key workloads, found none"},
		{"comment_only", "# nothing\n", "f.yaml:1: empty: want a list under the key workloads"},
		{"unknown_key", "workloads:\n  - name: a\n    pidd: 3\n", `f.yaml:3: unknown key "pidd": want workloads at the top`},
		{"unknown_top_key", "workload:\n  - name: a\n", `f.yaml:1: unknown key "workload": want workloads at the top`},
		{"wrong_type", "workloads:\n  - name: a\n    pid: many\n", "f.yaml:3: got many, want a number"},
		{"list_is_no_list", "workloads: web\n", "f.yaml:1: got web, want a list"},
		{"syntax", "workloads:\n  - name: [\n", "f.yaml:"},
		{"no_name", "workloads:\n  - pid: 3\n", "f.yaml:2: workload without name"},
		{"neither_netns_nor_pid", "workloads:\n\n  - name: a\n", "f.yaml:3: workload \"a\": want either netns (a path) or pid"},
		{"netns_and_pid", "workloads:\n  - {name: a, netns: /x, pid: 3}\n", "f.yaml:2: workload \"a\": want either"},
		{"netns_by_name", "workloads:\n  - {name: a, netns: web}\n", "f.yaml:2: workload \"a\": netns \"web\": want an absolute path, as in /run/netns/a"},
		{"relative_netns", "workloads:\n  - {name: a, netns: run/netns/web}\n", "f.yaml:2: workload \"a\": netns \"run/netns/web\": want an absolute path"},
		{"negative_pid", "workloads:\n  - {name: a, pid: -3}\n", "f.yaml:2: workload \"a\": pid -3: want a positive number"},
		{"digest_of_another_kind", "workloads:\n  - {name: a, pid: 3, digest: \"sha512:00\"}\n", "f.yaml:2: workload \"a\": digest \"sha512:00\": want sha256: and 64"},
		{"digest_without_kind", "workloads:\n  - {name: a, pid: 3, digest: " + strings.Repeat("a", 64) + "}\n", "f.yaml:2: workload \"a\": digest \"aaa"},
		{"digest_in_upper_case", "workloads:\n  - {name: a, pid: 3, digest: \"sha256:" + strings.Repeat("A", 64) + "\"}\n", "f.yaml:2: workload \"a\": digest \"sha256:AAA"},
		{"digest_with_more_behind", "workloads:\n  - {name: a, pid: 3, digest: \"sha256:" + strings.Repeat("a", 64) + "\\n\"}\n", "f.yaml:2: workload \"a\": digest \"sha256:aaa"},
		{"pod_without_namespace", "workloads:\n  - {name: a, pid: 3, pod: {service-account: web}}\n", "f.yaml:2: workload \"a\": pod without namespace"},
		{"pod_with_unknown_key", "workloads:\n  - name: a\n    pod:\n      serviceAccount: web\n", `f.yaml:4: unknown key "serviceAccount": want workloads at the top; name, netns or pid, labels, image, digest, pod in each; namespace, service-account, labels in a pod`},
		{"pod_is_a_text", "workloads:\n  - name: a\n    pod: shop\n", "f.yaml:3: got shop, want a pod: namespace, service-account, labels"},
		{"image_labels_are_not_for_a_list", "workloads:\n  - name: a\n    imageLabels: {a: b}\n", `f.yaml:3: unknown key "imageLabels"`},
		{"name_twice", "workloads:\n  - {name: a, pid: 3}\n  - {name: a, pid: 4}\n", "f.yaml:3: workload \"a\": the name is taken by line 2"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := ParseStatic("f.yaml", []byte(tc.text))
			if err == nil || len(err.Error()) < len(tc.want) || err.Error()[:len(tc.want)] != tc.want {
				t.Errorf("got %v, want %s…", err, tc.want)
			}
		})
	}
}

func TestEntrySaysEverything(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0a", 32)
	s, err := ParseStatic("f.yaml", []byte(`workloads:
  - name: web
    netns: /proc/self/ns/net
    labels: {team: shop}
    image: registry.example/shop/web:3
    digest: `+digest+`
    pod: {namespace: shop, service-account: web, labels: {app: web}}
  - {name: plain, netns: /proc/self/ns/net}
`))
	if err != nil {
		t.Fatal(err)
	}
	found, _ := s.Find()
	var got []workload.Workload
	for _, f := range found {
		got = append(got, f.Workload)
	}
	want := []workload.Workload{{
		ID: "static:web", Name: "web", Labels: map[string]string{"team": "shop"}, Image: "registry.example/shop/web:3", ImageID: digest,
		Pod: &workload.Pod{Namespace: "shop", ServiceAccount: "web", Labels: map[string]string{"app": "web"}},
	}, {ID: "static:plain", Name: "plain"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestEmptyListIsNobody(t *testing.T) {
	s, err := ParseStatic("f.yaml", []byte("workloads: []\n"))
	if err != nil {
		t.Fatal(err)
	}
	if found, missing := s.Find(); len(found)+len(missing) != 0 {
		t.Errorf("found %v, missing %v", found, missing)
	}
}

func TestFind(t *testing.T) {
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer child.Wait()
	defer child.Process.Kill()
	s, err := ParseStatic("f.yaml", fmt.Appendf(nil, `workloads:
  - {name: process, pid: %d, labels: {team: shop}}
  - {name: path, netns: /proc/self/ns/net}
  - {name: no-process, pid: 99999999}
  - {name: no-path, netns: /nonexistent/ns}
`, child.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	found, missing := s.Find()
	var got []string
	for _, f := range found {
		got = append(got, string(f.Workload.ID)+" "+f.Netns)
	}
	for _, m := range missing {
		if !errors.Is(m.Err, ErrGone) {
			t.Errorf("%s: got %v, want ErrGone", m.ID, m.Err)
		}
		got = append(got, string(m.ID)+" missing")
	}
	want := []string{
		fmt.Sprintf("static:process /proc/%d/ns/net", child.Process.Pid),
		"static:path /proc/self/ns/net", "static:no-process missing", "static:no-path missing",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestPIDReuseIsNotTheWorkload(t *testing.T) {
	s, err := ParseStatic("f.yaml", fmt.Appendf(nil, "workloads:\n  - {name: a, pid: %d}\n", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	if found, _ := s.Find(); len(found) != 1 {
		t.Fatal("own process not found")
	}
	next, err := ParseStatic("f.yaml", fmt.Appendf(nil, "workloads:\n  - {name: b, pid: %d}\n", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	found, _ := s.Find()
	if err := found[0].Recheck(); err != nil {
		t.Errorf("the same process: %v", err)
	}
	s.starts[os.Getpid()]-- // the process that was seen first started earlier
	if err := found[0].Recheck(); !errors.Is(err, ErrGone) {
		t.Errorf("reused between look and open: %v, want ErrGone", err)
	}
	next.Inherit(s)
	if found, _ := next.Find(); len(found) != 0 {
		t.Errorf("reused, and the list was read again: %v", found)
	}
	found, missing := s.Find()
	if len(found) != 0 || len(missing) != 1 || !errors.Is(missing[0].Err, ErrGone) {
		t.Errorf("reused pid: found %v, missing %v", found, missing)
	}
}
