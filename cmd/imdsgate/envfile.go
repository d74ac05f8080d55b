package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// addressVariable holds the proxy's address, for a client container.
const addressVariable = "IMSProxyIpAddress"

// readEnvFile finds a variable in a file of lines NAME=VALUE, as "docker run
// --env-file" reads it: the last one counts, and quotes are part of the value. An
// error is os.ErrNotExist for a missing variable too.
func readEnvFile(path, name string) (string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	value, found := "", false
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(strings.TrimRight(line, "\r\n"), name+"="); ok {
			value, found = v, true
		}
	}
	if !found {
		return "", fmt.Errorf("%s: no line %s=…: %w", path, name, os.ErrNotExist)
	}
	return value, nil
}

// writeEnvFile sets a variable in such a file, and leaves all other lines as they
// are. Whoever reads the file sees the old text or the new, never a part. A file
// that is there keeps its permissions, a new one can be read by all.
func writeEnvFile(path, name, value string) error {
	if to, err := filepath.EvalSymlinks(path); err == nil {
		path = to
	}
	mode := os.FileMode(0o644)
	old, err := os.ReadFile(path)
	switch st, serr := os.Stat(path); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return err
	case serr != nil:
		return serr
	default:
		mode = st.Mode().Perm()
	}
	text := withVariable(old, name, value)
	if err == nil && bytes.Equal(text, old) {
		return nil
	}
	return replaceFile(path, text, mode)
}

func withVariable(old []byte, name, value string) []byte {
	var b bytes.Buffer
	done := false
	for line := range bytes.Lines(old) {
		switch {
		case !bytes.HasPrefix(line, []byte(name+"=")):
			b.Write(line)
			if !bytes.HasSuffix(line, []byte("\n")) {
				b.WriteByte('\n')
			}
		case !done:
			fmt.Fprintf(&b, "%s=%s\n", name, value)
			done = true
		}
	}
	if !done {
		fmt.Fprintf(&b, "%s=%s\n", name, value)
	}
	return b.Bytes()
}

// replaceFile puts a new file in the place of another.
func replaceFile(path string, text []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
