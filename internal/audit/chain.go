package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strconv"
	"strings"
	"time"
)

// Line is what a line that tells of an event holds, in this order: the event, and
// what makes the line a record of a chain.
type Line struct {
	Event
	Lost  uint64 `json:"lost,omitempty"` // events that came before it and could not be written
	Seq   uint64 `json:"seq"`            // rises by one with each record of the chain, from 1
	Chain string `json:"chain"`          // see Head.Sum; 64 hexadecimal digits
}

// Start is the record that each file, and what a run writes, begins with. Like a Line it
// ends in seq and chain.
type Start struct {
	Type    string    `json:"type"` // "start"
	Time    time.Time `json:"time"`
	Version string    `json:"version"`        // of the program
	Run     string    `json:"run"`            // random, the same for all that one process starts
	Why     Why       `json:"why"`            //
	Prev    string    `json:"prev"`           // the chain value that it goes on from; 64 zeros if it is the first
	Torn    string    `json:"torn,omitempty"` // SHA-256 of what stands before it and is no record
	Lost    uint64    `json:"lost,omitempty"`
	Seq     uint64    `json:"seq"`
	Chain   string    `json:"chain"`
}

// Why is the reason for a start record.
type Why string

const (
	New       Why = "new"       // nothing was there to go on from
	Continued Why = "continued" // the chain goes on: another file, another run
	Torn      Why = "torn"      // so it does, after a line that was not written to its end
)

// lostType is the type of the record that says at the end of a run what was lost.
const lostType = "lost"

// Head is a record of a chain, by its number and its chain value. Whoever keeps
// the head of a chain elsewhere can tell later whether all that led to it is
// still there, unchanged.
type Head struct {
	Seq uint64
	// Sum is SHA-256 over the Sum of the record before (32 bytes, zeros before
	// the first) and the record's line up to and excluding `,"chain":`.
	Sum [sha256.Size]byte
}

// String is "SEQ:HEX".
func (h Head) String() string { return fmt.Sprintf("%d:%x", h.Seq, h.Sum) }

// MarshalText writes what String returns.
func (h Head) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

var errHead = errors.New("want NUMBER:CHAIN, a record's seq and its chain of 64 hexadecimal digits")

// ParseHead is the inverse of String.
func ParseHead(s string) (Head, error) {
	n, sum, _ := strings.Cut(s, ":")
	var h Head
	var err error
	if h.Seq, err = strconv.ParseUint(n, 10, 64); err != nil || h.Seq == 0 {
		return Head{}, errHead
	}
	if b, err := hex.DecodeString(sum); err != nil || copy(h.Sum[:], b) != len(h.Sum) || len(b) > len(h.Sum) {
		return Head{}, errHead
	}
	return h, nil
}

const (
	seqKey   = `,"seq":`
	chainKey = `,"chain":"`
	// maxLine is more than any line has: targets have at most 8 KiB, and an
	// escape at most six bytes for one.
	maxLine  = 1 << 20
	sealSize = 160 // what seal adds, at most
)

// chain puts lines in a row. Its user orders the calls.
type chain struct {
	head, next Head
	hash       hash.Hash
	out        [sha256.Size]byte // or else it would be allocated for each line
}

func newChain() *chain { return &chain{hash: sha256.New()} }

// seal completes an open object to the line that follows the head. The head moves
// there with commit, once the line is written.
func (c *chain) seal(text []byte, lost uint64) []byte {
	if lost > 0 {
		text = strconv.AppendUint(append(text, `,"lost":`...), lost, 10)
	}
	c.next.Seq = c.head.Seq + 1
	text = strconv.AppendUint(append(text, seqKey...), c.next.Seq, 10)
	c.next.Sum = c.sum(&c.head.Sum, text)
	text = hex.AppendEncode(append(text, chainKey...), c.next.Sum[:])
	return append(text, "\"}\n"...)
}

func (c *chain) commit() { c.head = c.next }

// sum is the chain value of a line whose text up to its chain is given.
func (c *chain) sum(prev *[sha256.Size]byte, text []byte) [sha256.Size]byte {
	c.hash.Reset()
	c.hash.Write(prev[:])
	c.hash.Write(text)
	c.hash.Sum(c.out[:0])
	return c.out
}

// unseal takes a line, without its newline, apart: the text that its chain value
// is computed from, and which record it says to be. It reports false for anything
// that seal does not write.
func unseal(line []byte) (text []byte, h Head, ok bool) {
	at := len(line) - len(chainKey) - 2*len(h.Sum) - len(`"}`)
	if at <= 0 || line[0] != '{' {
		return nil, h, false
	}
	text, rest := line[:at], line[at:]
	sum, found := bytes.CutPrefix(rest, []byte(chainKey))
	sum, closed := bytes.CutSuffix(sum, []byte(`"}`))
	if !found || !closed || bytes.ContainsAny(sum, "ABCDEF") {
		return nil, h, false
	}
	if _, err := hex.Decode(h.Sum[:], sum); err != nil {
		return nil, h, false
	}
	i := bytes.LastIndex(text, []byte(seqKey))
	if i < 0 {
		return nil, h, false
	}
	digits := string(text[i+len(seqKey):])
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != digits {
		return nil, h, false
	}
	h.Seq = n
	return text, h, true
}
