package testnet

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"imdsgate/internal/netns"
)

// Process is a running command whose output is read line by line.
type Process struct {
	Name string
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended and all was read

	mu     sync.Mutex
	lines  []string
	more   chan struct{} // closed and replaced at every line
	waited error
}

// Spawn starts a command inside a namespace, with its output captured. It dies
// with this process, and has a process group of its own, so that Ctrl-C reaches
// only us.
func Spawn(ns *netns.Handle, name string, cmd *exec.Cmd) (*Process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	p := &Process{Name: name, cmd: cmd, done: make(chan struct{}), more: make(chan struct{})}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = w, w
	err = Start(ns, cmd)
	w.Close()
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go p.read(r)
	return p, nil
}

// maxLines bounds what is kept of a process's output.
const maxLines = 100_000

func (p *Process) read(r *os.File) {
	defer close(p.done)
	defer r.Close()
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 64<<10), 1<<20)
	for s.Scan() {
		p.mu.Lock()
		if len(p.lines) < maxLines {
			p.lines = append(p.lines, s.Text())
		}
		close(p.more)
		p.more = make(chan struct{})
		p.mu.Unlock()
	}
	io.Copy(io.Discard, r)
	err := p.cmd.Wait()
	p.mu.Lock()
	p.waited = err
	p.mu.Unlock()
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Lines is the output so far, stdout and stderr in order of arrival.
func (p *Process) Lines() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lines[:len(p.lines):len(p.lines)]
}

// Output is the output so far as one text.
func (p *Process) Output() string { return strings.Join(p.Lines(), "\n") }

// Await waits for an output line, from line from on, that match accepts, and
// returns its index. An error holds the output when the process ends first.
func (p *Process) Await(ctx context.Context, from int, match func(line string) bool) (int, error) {
	for {
		p.mu.Lock()
		lines, more := p.lines, p.more
		p.mu.Unlock()
		for ; from < len(lines); from++ {
			if match(lines[from]) {
				return from, nil
			}
		}
		select {
		case <-more:
		case <-p.done:
			if len(p.Lines()) > from {
				continue
			}
			return 0, fmt.Errorf("%s ended (%v): %s", p.Name, p.Wait(), p.Output())
		case <-ctx.Done():
			return 0, fmt.Errorf("%s: waiting for its output: %w: %s", p.Name, ctx.Err(), p.Output())
		}
	}
}

// AwaitLog waits for a JSON log line with this message and returns its fields.
func (p *Process) AwaitLog(ctx context.Context, message string) (map[string]any, error) {
	var fields map[string]any
	_, err := p.Await(ctx, 0, func(line string) bool {
		fields = nil
		return json.Unmarshal([]byte(line), &fields) == nil && fields["msg"] == message
	})
	return fields, err
}

// Wait waits for the end, and returns exec's error if it was not a good one.
func (p *Process) Wait() error {
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waited
}

// Kill ends the process at once and waits for it.
func (p *Process) Kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// Signal sends a signal.
func (p *Process) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// Stop asks the process to end, and kills it if it has not within 5 s.
func (p *Process) Stop() error {
	err := p.cmd.Process.Signal(syscall.SIGTERM)
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	select {
	case <-p.done:
		return errors.Join(err, p.Wait())
	case <-time.After(5 * time.Second):
		p.Kill()
		return fmt.Errorf("%s did not end within 5 s and was killed", p.Name)
	}
}

// Unprivileged is how a process runs as a user that has nothing, in an empty
// network namespace: uid and gid 65534, or, where this process's user namespace
// has no such user, in a further user namespace where it has.
func Unprivileged() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET,
		Credential: &syscall.Credential{Uid: nobody, Gid: nobody, NoSetGroups: !mapped(nobody)},
	}
	if !mapped(nobody) {
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: nobody, HostID: os.Geteuid(), Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: nobody, HostID: os.Getegid(), Size: 1}}
	}
	return a
}

const nobody = 65534

// mapped reports whether this user namespace has the user id.
func mapped(id int) bool {
	for _, m := range uidMap() {
		if id >= m.ContainerID && id < m.ContainerID+m.Size {
			return true
		}
	}
	return false
}

// uidMap is the mapping of this user namespace.
func uidMap() []syscall.SysProcIDMap {
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return []syscall.SysProcIDMap{{Size: 1 << 31}}
	}
	var all []syscall.SysProcIDMap
	for line := range strings.Lines(string(b)) {
		var m syscall.SysProcIDMap
		if n, _ := fmt.Sscan(line, &m.ContainerID, &m.HostID, &m.Size); n == 3 {
			all = append(all, m)
		}
	}
	return all
}

// OutsideUID says which user the parent of this user namespace knows as uid.
func OutsideUID(uid string) string {
	id, err := strconv.Atoi(uid)
	if err != nil {
		return uid
	}
	for _, m := range uidMap() {
		if id >= m.ContainerID && id < m.ContainerID+m.Size {
			return strconv.Itoa(m.HostID + id - m.ContainerID)
		}
	}
	return uid
}
