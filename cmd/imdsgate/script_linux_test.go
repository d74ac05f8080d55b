package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"imdsgate/internal/testnet"
)

// TestScripts runs the command line as people do: as a process of its own, with
// its real exit codes and signals. The scripts' own commands are in
// script_commands_linux_test.go.
func TestScripts(t *testing.T) {
	openToEverybody(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"need":      cmdNeed,
			"exits":     cmdExits,
			"start":     cmdStart,
			"await":     cmdAwait,
			"signal":    cmdSignal,
			"end":       cmdEnd,
			"ask":       cmdAsk,
			"chomp":     cmdChomp,
			"json":      cmdJSON,
			"mode":      cmdMode,
			"leftovers": cmdLeftovers,
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("GORACE", "atexit_sleep_ms=0") // or else each process takes a second to end
			if testing.CoverMode() != "" {
				env.Setenv("GOCOVERDIR", env.Getenv("TMPDIR")) // one that ordinary users may write to
			}
			s := newScript(env)
			env.Values[scriptKey{}] = s
			env.Defer(s.close)
			// The scripts' ordinary users pass through the folders above, and write
			// to the temporary one.
			if err := os.Chmod(filepath.Dir(env.WorkDir), 0o711); err != nil {
				return err
			}
			return os.Chmod(env.Getenv("TMPDIR"), 0o777)
		},
	})
}

// openToEverybody lets other users run the scripts' programs.
func openToEverybody(t *testing.T) {
	path, err := exec.LookPath("imdsgate")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Dir(path)
	for file, mode := range map[string]os.FileMode{filepath.Dir(bin): 0o711, bin: 0o711, path: 0o755} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
}

// needs are what "need" knows besides programs.
var needs = map[string]testnet.Need{
	"root":       testnet.Root,
	"namespaces": testnet.Namespaces,
	"sklookup":   testnet.BPF,
}
