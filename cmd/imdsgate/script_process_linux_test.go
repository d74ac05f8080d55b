package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"imdsgate/internal/testnet"
)

// patience is how long a script waits for what should happen at once.
const patience = 20 * time.Second

// script is what one script has running.
type script struct {
	t       testnet.TB
	vars    []string        // the environment at its start
	tmp     string          // its own $TMPDIR
	cgroups map[string]bool // of its agents, as paths
	running map[string]*process
}

type scriptKey struct{}

func newScript(env *testscript.Env) *script {
	return &script{
		t: env.T().(testnet.TB), vars: slices.Clone(env.Vars), tmp: env.Getenv("TMPDIR"),
		cgroups: make(map[string]bool), running: make(map[string]*process),
	}
}

func of(ts *testscript.TestScript) *script { return ts.Value(scriptKey{}).(*script) }

// close ends what the script has left running.
func (s *script) close() {
	for _, p := range s.running {
		p.cmd.Process.Kill()
		<-p.done
	}
}

// command prepares a program of the script.
func command(ctx context.Context, ts *testscript.TestScript, args []string) *exec.Cmd {
	path, err := exec.LookPath(args[0])
	ts.Check(err)
	cmd := exec.CommandContext(ctx, path, args[1:]...)
	cmd.Args[0] = args[0]
	cmd.Dir, cmd.Env = ts.MkAbs("."), of(ts).vars
	cmd.WaitDelay = 5 * time.Second // for children that hold its output open
	return cmd
}

// cmdExits runs a program and wants it to end with this exit code, neither
// better nor worse. Its output is for stdout, stderr and cmp.
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, !neg && len(args) > 1, "exits CODE PROGRAM ARGUMENT...")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := command(ctx, ts, args[1:])
	cmd.Stdout, cmd.Stderr = ts.Stdout(), ts.Stderr()
	err := cmd.Run()
	if got := strconv.Itoa(cmd.ProcessState.ExitCode()); got != args[0] {
		ts.Fatalf("got exit code %s (%v), want %s", got, err, args[0])
	}
}

// process runs in the background, with its output in NAME.out and NAME.err.
type process struct {
	cmd      *exec.Cmd
	out, err *stream
	done     chan struct{} // closed when it has ended and all was read
	failed   error         // Wait's, once done
}

// stream is an output that can be waited for.
type stream struct {
	mu   sync.Mutex
	text []byte
	more chan struct{} // closed and replaced at every write
	file *os.File
}

func newStream(ts *testscript.TestScript, path string) *stream {
	f, err := os.Create(ts.MkAbs(path))
	ts.Check(err)
	return &stream{more: make(chan struct{}), file: f}
}

func (s *stream) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text = append(s.text, b...)
	close(s.more)
	s.more = make(chan struct{})
	return s.file.Write(b)
}

func (s *stream) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.text)
}

// find looks for a pattern in the whole lines so far.
func (s *stream) find(re *regexp.Regexp) ([]string, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	whole := s.text[:bytes.LastIndexByte(s.text, '\n')+1]
	return re.FindStringSubmatch(string(whole)), s.more
}

// cmdStart starts a program in the background; $NAME_pid is its process id. It
// is killed at the end of the script if it has not ended by then.
func cmdStart(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, !neg && len(args) > 1, "start NAME PROGRAM ARGUMENT...")
	name, s := args[0], of(ts)
	if s.running[name] != nil {
		ts.Fatalf("%s is running already", name)
	}
	p := &process{
		cmd: command(context.Background(), ts, args[1:]), done: make(chan struct{}),
		out: newStream(ts, name+".out"), err: newStream(ts, name+".err"),
	}
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.err
	ts.Check(p.cmd.Start())
	s.running[name] = p
	ts.Setenv(name+"_pid", strconv.Itoa(p.cmd.Process.Pid))
	go p.wait()
}

func (p *process) wait() {
	defer close(p.done)
	p.failed = p.cmd.Wait()
	p.out.file.Close()
	p.err.file.Close()
}

// String is the output so far.
func (p *process) String() string { return "stdout: " + p.out.String() + "\nstderr: " + p.err.String() }

func running(ts *testscript.TestScript, name string) *process {
	p := of(ts).running[name]
	if p == nil {
		ts.Fatalf("nothing runs as %s", name)
	}
	return p
}

// cmdAwait waits for a pattern in the output of a background program, and keeps
// what its groups match in variables.
func cmdAwait(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, !neg && len(args) > 2 && (args[1] == "out" || args[1] == "err"), "await NAME out|err PATTERN [VARIABLE...]")
	p := running(ts, args[0])
	from := p.out
	if args[1] == "err" {
		from = p.err
	}
	re, err := regexp.Compile("(?m)" + args[2])
	ts.Check(err)
	want(ts, re.NumSubexp() == len(args)-3, "await: one variable for each group of the pattern")
	timeout := time.After(patience)
	for ended := false; ; {
		found, more := from.find(re)
		if found != nil {
			for i, name := range args[3:] {
				ts.Setenv(name, found[i+1])
			}
			return
		}
		if ended {
			ts.Fatalf("%s has ended (%v) without %q\n%v", args[0], p.failed, args[2], p)
		}
		select {
		case <-more:
		case <-p.done:
			ended = true
		case <-timeout:
			ts.Fatalf("%s: no %q within %v\n%v", args[0], args[2], patience, p)
		}
	}
}

// cmdSignal sends a signal to a background program, and notes for "leftovers" what
// is there now.
func cmdSignal(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, !neg && len(args) == 2, "signal NAME INT|TERM|HUP|KILL|USR1")
	sig := unix.SignalNum("SIG" + args[1])
	want(ts, sig != 0, "signal NAME INT|TERM|HUP|KILL|USR1")
	of(ts).noteCgroups()
	ts.Check(running(ts, args[0]).cmd.Process.Signal(sig))
}

// cmdEnd waits for the end of a background program and wants this exit code.
func cmdEnd(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, !neg && len(args) == 2, "end NAME CODE")
	p := running(ts, args[0])
	select {
	case <-p.done:
	case <-time.After(patience):
		ts.Fatalf("%s has not ended within %v\n%v", args[0], patience, p)
	}
	delete(of(ts).running, args[0])
	if got := strconv.Itoa(p.cmd.ProcessState.ExitCode()); got != args[1] || errors.Is(p.failed, exec.ErrWaitDelay) {
		ts.Fatalf("%s: got exit code %s (%v), want %s\n%v", args[0], got, p.failed, args[1], p)
	}
}
