//go:build !forwardonly

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"imdsgate/internal/policy"
)

const (
	policyLook    = time.Second // between two looks at the file
	maxPolicyFile = 4 << 20     // bytes
)

// policyFile keeps the policy in force equal to a file. A file that is wrong
// changes nothing: the last good one stays, and while there was none, everything
// is denied.
type policyFile struct {
	path    string
	current *policy.Current
	log     *slog.Logger

	tried   []byte        // the text that was last put in force, or found wrong
	seen    []byte        // the text at the last look, when it was another
	said    string        // the trouble that was last logged
	lost    bool          // the file could not be read at the last look
	isReady atomic.Bool   // see whenReady
	good    chan struct{} // closed when the first good policy is in force
	hup     chan os.Signal
}

// followPolicy puts the policy of a file in force, or the default, before anything
// is asked of it. Without a file there is nothing to follow.
func followPolicy(path string, log *slog.Logger) *policyFile {
	f := &policyFile{path: path, current: new(policy.Current), log: log, good: make(chan struct{})}
	if path == "" {
		f.current.Set(policy.Default())
		close(f.good)
		return f
	}
	f.hup = make(chan os.Signal, 1)
	signal.Notify(f.hup, syscall.SIGHUP) // for good: no SIGHUP ends a proxy that reads its policy at it
	f.load()
	return f
}

// run looks at the file again and again, and at once at SIGHUP, until ctx ends.
//
// It looks at what is there, and does not wait to be told: a file that is mounted
// alone, a symbolic link that is switched or a folder on a network tell nobody. A
// text counts when two looks have found the same, lest half a file is taken for
// all of it; who sends SIGHUP has finished writing.
func (f *policyFile) run(ctx context.Context) {
	if f.path == "" {
		return
	}
	look := time.NewTicker(policyLook)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.hup:
			f.said = "" // who asks is told
			f.load()
		case <-look.C:
			f.look()
		}
	}
}

// whenReady calls fn once there has been a good policy, unless ctx ends first. The
// proxy is ready then: all else was before.
func (f *policyFile) whenReady(ctx context.Context, fn func()) {
	select {
	case <-f.good:
		fn()
		f.isReady.Store(true)
	case <-ctx.Done():
	}
}

// look loads a text that is new and has stood for a while.
func (f *policyFile) look() {
	text, err := readPolicyFile(f.path)
	switch {
	case err != nil:
		f.lost = true
		f.trouble(err)
	case bytes.Equal(text, f.tried):
		f.seen = nil
		if f.lost {
			f.lost, f.said = false, ""
			f.log.Info("policy: the file is there again, as it was", "file", f.path)
		}
	case f.seen == nil || !bytes.Equal(text, f.seen):
		f.seen = bytes.Clone(text)
	default:
		f.try(text)
	}
}

// load reads the file and puts it in force, if it is good.
func (f *policyFile) load() {
	text, err := readPolicyFile(f.path)
	if err != nil {
		f.trouble(err)
		return
	}
	f.try(text)
}

func (f *policyFile) try(text []byte) {
	f.tried, f.seen = text, nil
	if f.tried == nil {
		f.tried = []byte{}
	}
	p, err := policy.Parse(f.path, text)
	if err != nil {
		f.trouble(withHint(err, "see 'imdsgate policy check "+f.path+"'"))
		return
	}
	f.said = ""
	s := f.current.Set(p)
	sum := sha256.Sum256(text)
	f.log.Info("policy", "snapshot", s.Number, "file", f.path, "mode", p.Mode(), "rules", p.Len(), "sha256", hex.EncodeToString(sum[:]))
	if why := p.Lets(); why != "" {
		f.log.Warn("policy: " + why)
	}
	select {
	case <-f.good:
	default:
		close(f.good)
	}
}

// trouble says once what keeps the file from being put in force.
func (f *policyFile) trouble(err error) {
	if err.Error() == f.said {
		return
	}
	f.said = err.Error()
	attrs := []any{"error", err}
	if h := new(hintError); errors.As(err, &h) {
		attrs = append(attrs, "hint", h.hint)
	}
	if s := f.current.Snapshot(); s != nil {
		f.log.Error("policy: the last good one stays in force", append(attrs, "snapshot", s.Number)...)
		return
	}
	f.log.Error("policy: there is none: everything is denied, and this proxy is not ready", attrs...)
}

func readPolicyFile(path string) ([]byte, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe is not waited for
	if err == nil {
		defer file.Close()
		if info, serr := file.Stat(); serr != nil || !info.Mode().IsRegular() {
			return nil, withHint(fmt.Errorf("--policy: %s is no regular file", path), "give the path of a file")
		}
		var text []byte
		if text, err = io.ReadAll(io.LimitReader(file, maxPolicyFile+1)); err == nil && len(text) > maxPolicyFile {
			err = fmt.Errorf("%s is larger than %d bytes", path, maxPolicyFile)
		}
		if err == nil {
			return text, nil
		}
	}
	hint := "without --policy facts may be read, and nothing that is a secret"
	if errors.Is(err, os.ErrPermission) {
		hint = fmt.Sprintf("the proxy runs as uid %d, which must be able to read the file and to pass its folders: as in /etc/imdsgate/policy.yaml, mode 644", os.Geteuid())
	}
	return nil, withHint(fmt.Errorf("--policy: %w", err), hint)
}
