//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"imdsgate/internal/testnet"
)

// client is a cloud's SDK in one language. It runs in the container that has its
// name, so that the audit tells the clients apart.
type client struct {
	name    string
	needs   []testnet.Need
	command func() ([]string, error)
}

var clients = []client{
	{name: "go", command: func() ([]string, error) { return []string{sdkclient}, nil }},
	{name: "js", needs: []testnet.Need{testnet.Command("node"), testnet.Command("npm")}, command: javaScript},
}

// attempt is what a client tells of one credential; see cmd/sdkclient.
type attempt struct {
	Credential string `json:"credential"`
	Claims     struct {
		Audience string `json:"aud"`
		ObjectID string `json:"oid"`
		ClientID string `json:"appid"`
	} `json:"claims"`
	ExpiresOn int64   `json:"expires_on"`
	File      string  `json:"file"`
	Error     string  `json:"error"`
	Took      float64 `json:"took_ms"`
}

// asking is a client at work.
type asking struct {
	p *testnet.Process
	n int
}

// start has the client ask in its container, which is the only place where the
// address that it calls is ours. Its environment is empty: no setting of this
// machine sends it elsewhere, and no other login is in its reach.
func (c client) start(ctx context.Context, t *testing.T, b *bench, credentials ...string) asking {
	t.Helper()
	testnet.Require(t, c.needs...)
	argv, err := c.command()
	ok(t, err)
	dir, nothing := t.TempDir(), t.TempDir()
	argv = append(append(argv, "--tokens", dir), credentials...)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = []string{"HOME=" + nothing, "PATH=" + nothing}
	p, err := testnet.Spawn(b.containers[c.name].NS, "client "+c.name, cmd)
	ok(t, err)
	stop := context.AfterFunc(ctx, p.Kill)
	t.Cleanup(func() {
		if stop() {
			p.Kill()
		}
	})
	return asking{p, len(credentials)}
}

// attempts waits for the client and returns what it tells, in the order of its
// credentials.
func (a asking) attempts(t *testing.T) []attempt {
	t.Helper()
	if err := a.p.Wait(); err != nil {
		t.Fatalf("%s: %v: %s", a.p.Name, err, a.p.Output())
	}
	var all []attempt
	for _, line := range a.p.Lines() {
		var one attempt
		if err := json.Unmarshal([]byte(line), &one); err != nil {
			t.Fatalf("%s: %v: %s", a.p.Name, err, line)
		}
		all = append(all, one)
	}
	if len(all) != a.n {
		t.Fatalf("%s told of %d credentials, want %d", a.p.Name, len(all), a.n)
	}
	return all
}

// javaScript is the command of the client in js/.
func javaScript() ([]string, error) {
	if err := nodeModules(); err != nil {
		return nil, err
	}
	node, err := exec.LookPath("node")
	if err != nil {
		return nil, err
	}
	script, err := filepath.Abs("js/sdkclient.mjs")
	return []string{node, script}, err
}

// nodeModules installs what js/package-lock.json names, unless it is there. The
// file that tells is the last that npm writes.
var nodeModules = sync.OnceValue(func() error {
	have, err := os.Stat("js/node_modules/.package-lock.json")
	if err == nil {
		want, err := os.Stat("js/package-lock.json")
		if err != nil || !want.ModTime().After(have.ModTime()) {
			return err
		}
	}
	cmd := exec.Command("npm", "ci")
	cmd.Dir = "js"
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("npm ci: %w\n%s", err, out)
	}
	return nil
})
