package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// JSON writes each event as one line of JSON, with one call of Write.
//
// A line holds printable characters only. Whatever else a caller managed to get
// into an event (control characters, line separators, text direction marks,
// bytes that are not UTF-8) is escaped or replaced, so that it can neither break
// the line nor drive the terminal it is read on.
type JSON struct {
	mu sync.Mutex // one Write at a time
	w  io.Writer
}

// NewJSON writes to w, which the caller closes after the last Record.
func NewJSON(w io.Writer) *JSON { return &JSON{w: w} }

// line is the space one event is written in.
type line struct {
	raw, out bytes.Buffer
}

var lines = sync.Pool{New: func() any { return new(line) }}

// Record writes e. The errors are those of the writer, and io.ErrShortWrite.
func (j *JSON) Record(e Event) error {
	l := lines.Get().(*line)
	defer lines.Put(l)
	l.raw.Reset()
	l.out.Reset()
	e.Time = e.Time.UTC()
	enc := json.NewEncoder(&l.raw)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(e); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	escape(&l.out, l.raw.Bytes())

	j.mu.Lock()
	defer j.mu.Unlock()
	n, err := j.w.Write(l.out.Bytes())
	if err == nil && n < l.out.Len() {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	return nil
}

// escape copies one line of JSON and escapes what is not printable. Outside of
// strings JSON is printable ASCII but for the newline at the end, so all that
// is escaped stands in a string. The encoder has already replaced bytes that
// are not UTF-8 and escaped the control characters below 0x20.
func escape(dst *bytes.Buffer, src []byte) {
	done := 0 // src[:done] is in dst
	for i := 0; i < len(src); {
		if b := src[i]; ' ' <= b && b <= '~' || b == '\n' {
			i++
			continue
		}
		r, size := utf8.DecodeRune(src[i:])
		if !unicode.IsPrint(r) {
			dst.Write(src[done:i])
			done = i + size
			if r < 0x10000 {
				fmt.Fprintf(dst, `\u%04x`, r)
			} else {
				hi, lo := utf16.EncodeRune(r)
				fmt.Fprintf(dst, `\u%04x\u%04x`, hi, lo)
			}
		}
		i += size
	}
	dst.Write(src[done:])
}
