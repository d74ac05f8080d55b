package testnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"imdsgate/internal/netns"
)

// Debian's Wine puts nothing into /usr/bin.
const (
	wine64     = "/usr/lib/wine/wine64"
	wineserver = "/usr/lib/wine/wineserver64"
)

// WineHere is Debian's 64-bit Wine, which runs programs that were built for Windows.
var WineHere = Need{"Wine (Debian's package wine64)", func() error {
	for _, program := range []string{wine64, wineserver} {
		if _, err := os.Stat(program); err != nil {
			return err
		}
	}
	return nil
}}

// Wine is a Windows of its own, all of it in one network namespace: the server,
// which owns the sockets, and the programs. What it cannot do: change addresses
// and routes, HNS, a real netsh.
type Wine struct {
	NS *netns.Handle

	dir    string
	server *Process
	keeper *exec.Cmd      // a program that does nothing, for as long as all of it lasts
	stdin  io.WriteCloser // the keeper's
}

// NewWine makes a fresh prefix (some seconds, 700 MB until Close), with what Go
// programs need there, as Windows 10. Linux's root is drive Z.
func NewWine(ctx context.Context, ns *netns.Handle) (*Wine, error) {
	dir, err := os.MkdirTemp("", "imdsgate-wine-")
	if err != nil {
		return nil, err
	}
	w := &Wine{NS: ns, dir: dir}
	if err := w.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("wine: %w", err), w.Close())
	}
	return w, nil
}

func (w *Wine) start(ctx context.Context) (err error) {
	if err := os.Mkdir(w.prefix(), 0o700); err != nil {
		return err
	}
	// In the foreground, so that it dies with this process.
	server := exec.Command(wineserver, "-f", "-p60")
	server.Env = w.env()
	if w.server, err = Spawn(w.NS, "wineserver", server); err != nil {
		return err
	}
	if err := w.boot(ctx); err != nil {
		return err
	}
	shim := exec.CommandContext(ctx, "go", "run", "imdsgate/scripts/wineshim", filepath.Join(w.prefix(), "drive_c/windows/system32/bcryptprimitives.dll"))
	if out, err := shim.CombinedOutput(); err != nil {
		return fmt.Errorf("wineshim: %w: %s", err, out)
	}
	_, err = w.Run(ctx, "reg", "add", `HKCU\Software\Wine`, "/v", "Version", "/d", "win10", "/f")
	return err
}

// boot starts a program that does nothing and stays. The first program makes the
// prefix, and brings about what Windows has running always: all of that inherits
// its files, so it has none. And while it is there nothing of that ends: a second
// service manager, beside one that is ending, starts no service.
func (w *Wine) boot(ctx context.Context) (err error) {
	keeper := w.Command("cmd")
	if w.stdin, err = keeper.StdinPipe(); err != nil {
		return err
	}
	if err := Start(w.NS, keeper); err != nil {
		return err
	}
	w.keeper = keeper
	ready := filepath.Join(w.dir, "ready")
	if _, err := fmt.Fprintf(w.stdin, "echo ready > %s\r\n", w.Path(ready)); err != nil {
		return err
	}
	for {
		if _, err := os.Stat(ready); err == nil {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("waiting for its first program: %w", ctx.Err())
		}
	}
}

func (w *Wine) prefix() string { return filepath.Join(w.dir, "prefix") }

// env is this process's, less what would lead Wine to a screen or another prefix.
func (w *Wine) env() []string {
	env := []string{"WINEPREFIX=" + w.prefix(), "WINEDEBUG=-all", "WINEDLLOVERRIDES=winemenubuilder.exe=d;mscoree=d;mshtml=d"}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "WINE") && !strings.HasPrefix(v, "DISPLAY=") {
			env = append(env, v)
		}
	}
	return env
}

// Path is how Windows programs name a file of Linux.
func (w *Wine) Path(file string) string { return "Z:" + strings.ReplaceAll(file, "/", `\`) }

// Dir is a folder for files, gone with Close.
func (w *Wine) Dir() string { return w.dir }

// Command is a Windows program in this Windows, to be started with Spawn.
func (w *Wine) Command(args ...string) *exec.Cmd {
	cmd := exec.Command(wine64, args...)
	cmd.Env = w.env()
	return cmd
}

// Spawn starts a program. Asking it to end does nothing for most: kill it.
func (w *Wine) Spawn(args ...string) (*Process, error) {
	return Spawn(w.NS, filepath.Base(args[0]), w.Command(args...))
}

// Run runs a program to its end. The error, if any, holds the output too.
func (w *Wine) Run(ctx context.Context, args ...string) (output string, err error) {
	p, err := w.Spawn(args...)
	if err != nil {
		return "", err
	}
	defer context.AfterFunc(ctx, p.Kill)()
	if err := p.Wait(); err != nil {
		return p.Output(), fmt.Errorf("%q: %w: %s", args, err, p.Output())
	}
	return p.Output(), nil
}

// Close ends all programs of this Windows, and removes it.
func (w *Wine) Close() error {
	var err error
	if w.server != nil {
		kill := exec.Command(wineserver, "-k")
		kill.Env = w.env()
		err = kill.Run()
		if err != nil {
			w.server.Kill()
		}
		w.server.Wait()
	}
	if w.keeper != nil {
		w.stdin.Close()
		w.keeper.Wait() // killed with all others
	}
	return errors.Join(err, os.RemoveAll(w.dir))
}
