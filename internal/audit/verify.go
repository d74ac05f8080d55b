package audit

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Part is a file of a record, or what else holds a piece of it.
type Part struct {
	Name string
	R    io.Reader
}

// Check is what a record is held against.
type Check struct {
	Head     *Head // a record that is known to be in the chain; nil if none is
	Restarts bool  // chains may start anew, as on stdout, in syslog and the journal
}

// Place is a line.
type Place struct {
	Name string
	Line int // from 1; 0 is the whole of it
}

func (p Place) String() string {
	if p.Line == 0 {
		return p.Name
	}
	return fmt.Sprintf("%s:%d", p.Name, p.Line)
}

// Summary is what was found in a record.
type Summary struct {
	Records uint64  // lines that are records of a chain
	First   uint64  // the first one's number
	Head    Head    // the last one
	Chains  int     // more than one with Check.Restarts only
	Lost    uint64  // events that the record says are not in it
	Torn    []Place // lines that were not written to their end, as the record says itself
}

// Broken is the error of a record that is not whole.
type Broken struct {
	Place
	Reason string
}

func (b *Broken) Error() string { return b.Place.String() + ": " + b.Reason }

// Verify reads the parts, in the order of their first records, and tells whether
// all of it is one chain, each record in its place and unchanged. The error is a
// *Broken for the first that is not; any other is of the reading.
//
// A chain has no secret: whoever can write a file can write another chain that is
// whole. What it cannot be is the chain whose Head is known from elsewhere.
func Verify(parts []Part, c Check) (Summary, error) {
	files := make([]*reader, 0, len(parts))
	for _, p := range parts {
		f := &reader{Part: p, r: bufio.NewReaderSize(p.R, peekSize)}
		if err := f.peek(); err != nil {
			return Summary{}, err
		}
		files = append(files, f)
	}
	slices.SortStableFunc(files, func(a, b *reader) int { return cmp.Compare(a.first, b.first) })
	v := &verifier{check: c, chain: newChain(), region: sha256.New()}
	if len(files) > 0 {
		v.last.Name = files[len(files)-1].Name
	}
	err := eachLine(files, v.line)
	if err == nil {
		err = v.end()
	}
	var gap *gapError
	if errors.As(err, &gap) {
		err = gap.explain(files)
	}
	return v.sum, err
}

// peekSize is what is looked at of a file to find its place among others: a
// record that was cut off, and a whole one.
const peekSize = 128 << 10

// reader reads a part line by line.
type reader struct {
	Part
	r     *bufio.Reader
	first uint64 // number of the first record
	lines int    // read so far
}

// peek finds the number of the first record without taking it. The first lines
// may be torn, and no records.
func (f *reader) peek() error {
	b, err := f.r.Peek(peekSize)
	if err != nil && err != io.EOF {
		return fmt.Errorf("%s: %w", f.Name, err)
	}
	for line := range bytes.SplitSeq(b, []byte("\n")) {
		if _, h, ok := unseal(line); ok {
			f.first = h.Seq
			return nil
		}
	}
	return nil
}

var errLong = errors.New("a line is too long")

// next returns a line without its newline, and io.EOF after the last. It is good
// until the next call.
func (f *reader) next() (line []byte, whole bool, err error) {
	for {
		b, err := f.r.ReadSlice('\n')
		if err == nil && line == nil {
			f.lines++
			return b[:len(b)-1], true, nil
		}
		line = append(line, b...)
		switch {
		case len(line) > maxLine:
			f.lines++
			return nil, false, errLong
		case err == nil:
			f.lines++
			return line[:len(line)-1], true, nil
		case err == io.EOF && len(line) > 0:
			f.lines++
			return line, false, nil
		case err != bufio.ErrBufferFull:
			return nil, false, err
		}
	}
}

// eachLine calls do for all lines, until it fails.
func eachLine(files []*reader, do func(p Place, line []byte, whole bool) error) error {
	for _, f := range files {
		for {
			line, whole, err := f.next()
			if err == io.EOF {
				break
			}
			p := Place{f.Name, f.lines}
			switch {
			case err == errLong:
				return &Broken{p, "is longer than any record"}
			case err != nil:
				return fmt.Errorf("%s: %w", f.Name, err)
			}
			if err := do(p, line, whole); err != nil {
				return err
			}
		}
	}
	return nil
}
