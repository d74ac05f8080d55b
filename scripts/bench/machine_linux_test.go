package bench

import (
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// describe says what machine this is and what runs on it. What cannot be found out
// stays empty.
func describe() header {
	h := header{
		Machine: cmp.Or(firstLine("/sys/class/dmi/id/product_name"), "a "+runtime.GOARCH+" machine"),
		CPU:     cmp.Or(valueIn("/proc/cpuinfo", "model name"), runtime.GOARCH),
		CPUs:    runtime.NumCPU(),
		Date:    time.Now().UTC().Format("2006-01-02 15:04 MST"),
		Command: strings.Join(append([]string{filepath.Base(os.Args[0])}, os.Args[1:]...), " "),
		Load:    strings.Join(fields(firstLine("/proc/loadavg"), 3), " "),
		Versions: map[string]string{
			"go": runtime.Version(), "nginx": said("nginx", "-v"), "haproxy": said("haproxy", "-v"), "wrk": said("wrk", "-v"),
			"imdsgate": said("git", "describe", "--always", "--dirty"),
		},
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		h.Memory = int(info.Totalram * uint64(info.Unit) >> 20)
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		h.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	return h
}

func firstLine(path string) string {
	text, _ := os.ReadFile(path)
	line, _, _ := strings.Cut(string(text), "\n")
	return strings.TrimSpace(line)
}

// valueIn is the first value of that name in a file of /proc; empty if there is none.
func valueIn(path, name string) string {
	text, _ := os.ReadFile(path)
	for line := range strings.Lines(string(text)) {
		if n, value, _ := strings.Cut(line, ":"); strings.TrimSpace(n) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func fields(s string, n int) []string {
	all := strings.Fields(s)
	return all[:min(n, len(all))]
}

// said is the first line that a program says; wrk -v ends with an error.
func said(name string, args ...string) string {
	text, _ := exec.Command(name, args...).CombinedOutput()
	line, _, _ := strings.Cut(string(text), "\n")
	return strings.TrimSpace(line)
}
