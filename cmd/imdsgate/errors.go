package main

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
)

// codedError is an error that chooses the exit code. A silent one has said what
// it had to say already.
type codedError struct {
	code   int
	silent bool
	err    error
}

func (e *codedError) Error() string { return e.err.Error() }
func (e *codedError) Unwrap() error { return e.err }

// usageError is for what the user wrote: flags, arguments, files. Exit code 2.
func usageError(format string, args ...any) error {
	return &codedError{code: exitUsage, err: fmt.Errorf(format, args...)}
}

// unsupported is for what this machine lacks. Exit code 3.
func unsupported(format string, args ...any) error {
	return &codedError{code: exitUnsupported, err: fmt.Errorf(format, args...)}
}

// hintError carries the next thing to try, shown on a line of its own.
type hintError struct {
	err  error
	hint string
}

func (e *hintError) Error() string { return e.err.Error() }
func (e *hintError) Unwrap() error { return e.err }

func withHint(err error, hint string) error { return &hintError{err: err, hint: hint} }

// missingFolder is for a flag that names a file to be made in a folder that is not
// there.
func missingFolder(flag, path string) error {
	return withHint(usageError("%s: folder %s does not exist", flag, filepath.Dir(path)), "make it first, or give another path with "+flag)
}

// writeJSON writes v as one line.
func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
