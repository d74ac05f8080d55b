package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
)

// Tail is the end of what stands before a start record.
type Tail struct {
	Head Head   // the last record; zero if there is none
	Torn string // SHA-256, in hexadecimal, of what follows it and is no record; empty if nothing does
	Open bool   // the last line has no newline
}

// readTail finds the last record of a file of this size. What is further from the
// end than a few lines of the largest size is not searched.
func readTail(r io.ReaderAt, size int64) (Tail, error) {
	var t Tail
	for _, window := range []int64{64 << 10, 4 * maxLine} {
		n := min(size, window)
		b := make([]byte, n)
		if _, err := r.ReadAt(b, size-n); err != nil && err != io.EOF {
			return t, fmt.Errorf("audit: read the last lines: %w", err)
		}
		if t = scanTail(b, n == size); t.Head != (Head{}) || n == size {
			break
		}
	}
	return t, nil
}

// scanTail finds the last record in the end of a file. Whole says that the end is
// all of it.
func scanTail(b []byte, whole bool) Tail {
	var t Tail
	t.Open = len(b) > 0 && b[len(b)-1] != '\n'
	rest := bytes.TrimSuffix(b, []byte("\n"))
	end := len(rest) // of the line that is looked at
	for end >= 0 && len(b) > 0 {
		start := bytes.LastIndexByte(rest[:end], '\n') + 1
		if start == 0 && !whole {
			break // only a part of the line is here
		}
		if _, h, ok := unseal(rest[start:end]); ok {
			t.Head = h
			if end < len(rest) {
				t.Torn = fragment(rest[end+1:])
			}
			return t
		}
		end = start - 1
	}
	if whole && len(b) > 0 {
		t.Torn = fragment(rest)
	}
	return t
}

// fragment is the sum of what is left of lines that were not written to their end.
// A whole object in JSON is no such thing: somebody wrote it, and it is not ours
// to explain.
func fragment(b []byte) string {
	if json.Valid(b[bytes.LastIndexByte(b, '\n')+1:]) {
		return ""
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
