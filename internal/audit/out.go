package audit

import (
	"fmt"
	"io"
)

// Out is where a Log's lines go. Its methods are called by one goroutine; a Write
// that blocks holds up the lines behind it, not those who record.
type Out interface {
	// Begin makes ready for a line of about n bytes. It returns where the chain
	// stands if a start record has to go before the line, else nil. Head is the
	// last record that was written through this Out.
	Begin(n int, head Head) (*Tail, error)

	// Write takes one line, with its newline, as a whole: with an error the line
	// counts as not written, whatever of it has gone out. The event is nil for
	// records of the chain's own.
	Write(line []byte, e *Event) error

	// End follows each Begin, after the line was written or given up.
	End()

	// Close lets go of what it goes to.
	Close() error
}

// stream is any writer: a pipe, a terminal.
type stream struct {
	w     io.Writer
	begun bool
	torn  []byte // what it took of lines that failed, since the last whole one
}

// NewStream writes each line to w with one call of Write. It begins a chain, which
// nothing before it belongs to. Close leaves w open.
func NewStream(w io.Writer) Out { return &stream{w: w} }

func (s *stream) Begin(_ int, head Head) (*Tail, error) {
	if len(s.torn) == 0 {
		if s.begun {
			return nil, nil
		}
		return new(Tail), nil
	}
	t := scanTail(s.torn, true)
	if t.Head == (Head{}) {
		t.Head = head
	}
	return &t, nil
}

func (s *stream) Write(line []byte, _ *Event) error {
	n, err := s.w.Write(line)
	if err == nil && n < len(line) {
		err = io.ErrShortWrite
	}
	if err == nil {
		s.begun, s.torn = true, nil
		return nil
	}
	if n > 0 && len(s.torn) < maxLine {
		s.torn = append(s.torn, line[:min(n, len(line))]...)
	}
	return fmt.Errorf("audit: %w", err)
}

func (*stream) End() {}

func (*stream) Close() error { return nil }
