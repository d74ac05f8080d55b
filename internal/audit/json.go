package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"sync"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// line is the space one event is written in.
type line struct {
	event Event
	raw   bytes.Buffer
	out   []byte // the event as an open object: its last brace is missing
}

var lines = sync.Pool{New: func() any { return new(line) }}

// roomy is the size above which a line's space is not kept.
const roomy = 16 << 10

func (l *line) free() {
	if l.raw.Cap() > roomy || cap(l.out) > roomy {
		return
	}
	l.event = Event{}
	lines.Put(l)
}

// encode fills the line.
func (l *line) encode(e Event) error {
	e.Time, e.Until = e.Time.UTC(), e.Until.UTC()
	l.event = e
	var err error
	l.out, err = open(l.out[:0], &l.raw, &l.event)
	return err
}

// open appends v, a struct, as an object in JSON without its last brace.
//
// A line holds printable characters only. Whatever else a caller managed to get
// into an event (control characters, line separators, text direction marks,
// bytes that are not UTF-8) is escaped or replaced, so that it can neither break
// the line nor drive the terminal it is read on.
func open(dst []byte, raw *bytes.Buffer, v any) ([]byte, error) {
	raw.Reset()
	enc := json.NewEncoder(raw)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return dst, fmt.Errorf("audit: %w", err)
	}
	return escape(dst, bytes.TrimSuffix(raw.Bytes(), []byte("}\n"))), nil
}

// escape appends JSON and escapes what is not printable. Outside of strings JSON
// is printable ASCII, so all that is escaped stands in a string. The encoder has
// already replaced bytes that are not UTF-8 and escaped the control characters
// below 0x20.
func escape(dst, src []byte) []byte {
	done := 0 // src[:done] is in dst
	for i := 0; i < len(src); {
		if b := src[i]; ' ' <= b && b <= '~' {
			i++
			continue
		}
		r, size := utf8.DecodeRune(src[i:])
		if !unicode.IsPrint(r) {
			dst = append(dst, src[done:i]...)
			done = i + size
			if r < 0x10000 {
				dst = fmt.Appendf(dst, `\u%04x`, r)
			} else {
				hi, lo := utf16.EncodeRune(r)
				dst = fmt.Appendf(dst, `\u%04x\u%04x`, hi, lo)
			}
		}
		i += size
	}
	return append(dst, src[done:]...)
}
