package testnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"imdsgate/internal/netns"
)

// DockerEngine is what StartDocker needs: root, the engine's programs and
// cgroups that can be written.
var DockerEngine = Need{"a Docker engine (root, dockerd, containerd, runc, iptables)", func() error {
	if os.Geteuid() != 0 {
		return errors.New("not root")
	}
	for _, name := range []string{"dockerd", "containerd", "containerd-shim-runc-v2", "runc", "iptables"} {
		if _, err := exec.LookPath(name); err != nil {
			return err
		}
	}
	for _, root := range cgroupRoots() {
		if unix.Access(root, unix.W_OK) == nil {
			return nil
		}
	}
	return errors.New("no cgroup hierarchy below /sys/fs/cgroup can be written")
}}

// Docker is a real engine with a containerd of its own in the network namespace
// of a VM: the VM's loopback and uplink are the host's for it, and its bridge
// docker0 is beside the VM's br0. Nothing of it leaves that namespace but mounts,
// cgroups and processes, which Close takes away, or the next StartDocker if this
// process is killed.
type Docker struct {
	VM  *VM
	Dir string // holds everything but the cgroups; its name ends like CgroupParent

	// CgroupParent is the folder of the containers' cgroups in each hierarchy, below
	// this process's own cgroup.
	CgroupParent string

	args       []string
	lock       *os.File
	containerd *Process
	engine     *Process
	client     *http.Client
}

const (
	dockerDir    = "imdsgate-docker-"
	dockerCgroup = "imdsgate-test-"
	// maxSocketPath is sizeof(sun_path) less the final zero (unix(7)).
	maxSocketPath = 107
)

// ErrHostNamespace is returned by StartDocker for a VM that is this process's own
// network namespace: the containers' packets would leave by the machine's uplink.
var ErrHostNamespace = errors.New("a test engine never runs in the machine's own network namespace")

// StartDocker starts an engine in a VM and waits until it answers. Further
// arguments are passed to dockerd. The caller closes it, before the VM.
func StartDocker(ctx context.Context, vm *VM, args ...string) (*Docker, error) {
	own, err := netns.Current()
	if err != nil {
		return nil, err
	}
	defer own.Close()
	if own.ID() == vm.NS.ID() {
		return nil, ErrHostNamespace
	}
	SweepDocker() // what cannot be removed now is no obstacle
	d := &Docker{VM: vm, args: args}
	if err := d.makeDir(); err != nil {
		return nil, err
	}
	d.client = &http.Client{Transport: &http.Transport{DialContext: d.dial}}
	if err := d.start(ctx); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// makeDir makes the folder and holds its lock, which says that its owner lives.
func (d *Docker) makeDir() error {
	for range 10 {
		dir, err := os.MkdirTemp(tempDir(), fmt.Sprintf("%s%d-", dockerDir, os.Getpid()))
		if err != nil {
			return err
		}
		lock, err := lockDir(dir, unix.LOCK_EX)
		if errors.Is(err, os.ErrNotExist) {
			continue // a sweep was faster than the lock
		}
		if err != nil {
			return errors.Join(err, os.Remove(dir))
		}
		d.Dir, d.lock, d.CgroupParent = dir, lock, cgroupOfDir(dir)
		return d.shareExecRoot()
	}
	return errors.New("folder for the engine: swept away ten times")
}

func cgroupOfDir(dir string) string {
	return dockerCgroup + strings.TrimPrefix(filepath.Base(dir), dockerDir)
}

// tempDir is where the folders are, by the name that the kernel lists mounts under.
func tempDir() string {
	if dir, err := filepath.EvalSymlinks(os.TempDir()); err == nil {
		return dir
	}
	return os.TempDir()
}

// lockDir locks a folder. ErrNotExist means that it was removed meanwhile.
func lockDir(dir string, how int) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if _, err := os.Stat(dir); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// shareExecRoot makes the exec-root a shared mount, as everything is on a host
// with systemd: a container can then be given it with the mounts to come.
func (d *Docker) shareExecRoot() error {
	root := d.execRoot()
	if err := os.Mkdir(root, 0o711); err != nil {
		return err
	}
	if err := unix.Mount(root, root, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", root, err)
	}
	if err := unix.Mount("", root, "", unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share %s: %w", root, err)
	}
	return nil
}

// Socket is the path of the engine's API.
func (d *Docker) Socket() string { return filepath.Join(d.Dir, "docker.sock") }

// Host is the address of the engine's API as DOCKER_HOST has it.
func (d *Docker) Host() string { return "unix://" + d.Socket() }

// NetnsDir is where the engine mounts the containers' network namespaces.
func (d *Docker) NetnsDir() string { return filepath.Join(d.execRoot(), "netns") }

func (d *Docker) execRoot() string         { return filepath.Join(d.Dir, "exec") }
func (d *Docker) containerdSocket() string { return filepath.Join(d.Dir, "containerd.sock") }

func (d *Docker) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	var nd net.Dialer
	return nd.DialContext(ctx, "unix", d.Socket())
}

func (d *Docker) start(ctx context.Context) error {
	// The longest name of a socket that the two make below the folder.
	if n := len(filepath.Join(d.execRoot(), "libnetwork", "0123456789ab.sock")); n > maxSocketPath {
		return fmt.Errorf("%s: sockets in it would have names of %d bytes, %d are possible: set TMPDIR", d.Dir, n, maxSocketPath)
	}
	if err := d.startContainerd(ctx); err != nil {
		return err
	}
	return d.StartEngine(ctx)
}

// startContainerd starts a containerd that shares nothing with the machine's.
func (d *Docker) startContainerd(ctx context.Context) error {
	config := filepath.Join(d.Dir, "containerd.toml")
	const text = `version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
`
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	cmd := exec.Command("containerd", "--config", config, "--address", d.containerdSocket(),
		"--root", filepath.Join(d.Dir, "containerd"), "--state", filepath.Join(d.Dir, "tasks"))
	var err error
	if d.containerd, err = Spawn(d.VM.NS, "containerd", cmd); err != nil {
		return err
	}
	_, err = d.containerd.Await(ctx, 0, func(line string) bool { return strings.Contains(line, "containerd successfully booted") })
	return err
}

// StartEngine starts dockerd, again after StopEngine, and waits until it answers.
func (d *Docker) StartEngine(ctx context.Context) error {
	config := filepath.Join(d.Dir, "daemon.json")
	if err := os.WriteFile(config, []byte("{}"), 0o600); err != nil {
		return err
	}
	args := append([]string{
		"--config-file", config, "--containerd", d.containerdSocket(),
		"--data-root", filepath.Join(d.Dir, "data"), "--exec-root", d.execRoot(),
		"--host", d.Host(), "--pidfile", filepath.Join(d.Dir, "docker.pid"),
		"--bip", fmt.Sprintf("172.29.%d.1/24", d.VM.number),
		"--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", d.CgroupParent,
	}, d.args...)
	var err error
	if d.engine, err = Spawn(d.VM.NS, "dockerd", exec.Command("dockerd", args...)); err != nil {
		return err
	}
	if _, err = d.engine.Await(ctx, 0, func(line string) bool { return strings.Contains(line, "API listen on") }); err != nil {
		return err
	}
	_, err = d.call(ctx, http.MethodGet, "/_ping", nil)
	return err
}

// StopEngine ends dockerd in good order, and not containerd. Containers end with
// it, unless dockerd was given --live-restore.
func (d *Docker) StopEngine() error {
	if d.engine == nil {
		return nil
	}
	e := d.engine
	d.engine = nil
	d.client.CloseIdleConnections()
	return stopWithin(e, 20*time.Second)
}

// stopWithin asks a process to end, and kills it if it does not.
func stopWithin(p *Process, limit time.Duration) error {
	if err := p.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(limit):
		p.Kill()
		return fmt.Errorf("%s did not end within %v and was killed", p.Name, limit)
	}
}

// Output is what dockerd has logged since it was last started.
func (d *Docker) Output() string {
	if d.engine == nil {
		return ""
	}
	return d.engine.Output()
}

// Close removes all containers, ends the engine and takes away what it has left:
// processes, mounts, cgroups and the folder. An error says what is still there.
func (d *Docker) Close() error {
	var errs []error
	if d.engine != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		errs = append(errs, d.RemoveAll(ctx))
		cancel()
	}
	errs = append(errs, d.StopEngine())
	if d.containerd != nil {
		errs = append(errs, stopWithin(d.containerd, 5*time.Second))
	}
	d.client.CloseIdleConnections()
	errs = append(errs, sweepDir(d.Dir), d.lock.Close())
	return errors.Join(errs...)
}
