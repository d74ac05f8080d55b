package testnet

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"imdsgate/internal/netns"
)

// ownerEnv makes the test binary the owner of an engine that waits to be killed.
const ownerEnv = "TESTNET_DOCKER_OWNER"

// See package main: the main thread must not be one that enters namespaces.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	if box := os.Getenv(ownerEnv); box != "" {
		if err := own(box); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
	}
	os.Exit(Main(m.Run, func() error { return goleak.Find() }))
}

// own starts an engine with a running container, says its folder, and waits.
func own(box string) error {
	ctx := context.Background()
	f, err := NewFabric()
	if err != nil {
		return err
	}
	vm, err := f.NewVM()
	if err != nil {
		return err
	}
	d, err := StartDocker(ctx, vm)
	if err != nil {
		return err
	}
	if err := d.Image(ctx, "box", map[string]string{"/box": box}); err != nil {
		return err
	}
	id, err := d.Create(ctx, Box{Image: "box", Cmd: []string{"/box", "wait"}})
	if err != nil {
		return err
	}
	if err := d.Start(ctx, id); err != nil {
		return err
	}
	fmt.Println("dir:", d.Dir)
	select {}
}

func buildBox(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "box")
	if err := BuildStatic(t.Context(), "testdata/box", file); err != nil {
		t.Fatal(err)
	}
	return file
}

// leftOf is what an engine's folder, cgroups, mounts and processes still are.
func leftOf(t *testing.T, dir string) (left []string) {
	t.Helper()
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		left = append(left, dir)
	}
	left = append(left, cgroupsNamed(cgroupOfDir(dir))...)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) {
			left = append(left, line)
		}
	}
	for _, pid := range processesOf(dir, cgroupOfDir(dir)) {
		left = append(left, fmt.Sprint("process ", pid))
	}
	return left
}

func TestDockerRunsInsideTheVM(t *testing.T) {
	Require(t, Namespaces, DockerEngine)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	f, err := NewFabric()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	vm, err := f.NewVM()
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	l, err := Listen(f.NS, IMDS4+":80")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go Say(l, "fabric")

	d, err := StartDocker(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if left := leftOf(t, d.Dir); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	})
	if err := d.Image(ctx, "box", map[string]string{"/box": buildBox(t)}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		box  Box
		want string
		code int
	}{
		{"bridge_reaches_the_fabric", Box{Cmd: []string{"/box", "ask", IMDS4 + ":80"}}, "fabric", 0},
		{"host_network_is_the_vm", Box{Cmd: []string{"/box", "ask", IMDS4 + ":80"}, Network: "host"}, "fabric", 0},
		{"none_reaches_nothing", Box{Cmd: []string{"/box", "ask", IMDS4 + ":80"}, Network: "none"}, "box: dial tcp 169.254.169.254:80: connect: network is unreachable\n", 1},
		{"exit_code", Box{Cmd: []string{"/box", "nonsense"}}, "box: unknown command [\"nonsense\"]: want say, wait or ask\n", 1},
		{"removed_when_ended", Box{Cmd: []string{"/box", "say", "hello"}, Remove: true}, "", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.box.Image = "box"
			got, err := d.Run(ctx, tc.box)
			if err != nil {
				t.Fatal(err)
			}
			if got.Output != tc.want || got.Code != tc.code {
				t.Errorf("got %q, code %d, want %q, code %d", got.Output, got.Code, tc.want, tc.code)
			}
		})
	}
	t.Run("sweep_leaves_the_living_alone", func(t *testing.T) {
		if err := SweepDocker(); err != nil {
			t.Error(err)
		}
		if _, err := d.Run(ctx, Box{Image: "box", Cmd: []string{"/box", "say"}}); err != nil {
			t.Error(err)
		}
	})
	t.Run("errors_are_the_engines_words", func(t *testing.T) {
		_, err := d.Create(ctx, Box{Image: "nonsense"})
		if err == nil || !strings.Contains(err.Error(), "No such image: nonsense") {
			t.Errorf("got %v, want that there is no such image", err)
		}
	})
}

func TestDockerNeverInTheMachinesNamespace(t *testing.T) {
	Require(t, Namespaces)
	own, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if _, err := StartDocker(t.Context(), &VM{NS: own, number: 1}); !errors.Is(err, ErrHostNamespace) {
		t.Errorf("got %v, want ErrHostNamespace", err)
	}
}

func TestDockerOfADeadTestIsSweptAway(t *testing.T) {
	Require(t, Namespaces, DockerEngine)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), ownerEnv+"="+buildBox(t))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	cmd.Process.Kill()
	cmd.Wait()
	dir, ok := strings.CutPrefix(strings.TrimSpace(line), "dir: ")
	if err != nil || !ok {
		t.Fatalf("owner said %q, %v", line, err)
	}
	if left := leftOf(t, dir); len(left) < 4 {
		t.Errorf("the killed owner left only %q: this test proves nothing", left)
	}
	if err := SweepDocker(); err != nil {
		t.Error(err)
	}
	if left := leftOf(t, dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
