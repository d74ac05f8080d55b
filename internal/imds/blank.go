package imds

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// ErrNotDocument is what Blank returns, wrapped or not, when the body is not the
// document that the query asks for. The body must not be passed on then.
var ErrNotDocument = errors.New("not the document that was asked for")

// Blank removes from the body of a 200 answer what belongs to the denied
// actions, which are actions that q.Covers; others in denied are of no concern.
// The values of userData and customData become "", the service's own form of
// "not set" (protocol-azure §4), at any depth, in any letter case, and however
// often a key occurs. Without anything to remove the body is returned itself;
// in no case is it modified. A HEAD answer has no body, and none stays none.
//
// With format=text the service lists the names of the children and no values:
// such a body is returned as it is, once it is seen to be a list of names.
//
// It is an error when the body is not what it should be, or when an action is
// denied whose data cannot be told from the rest. The caller then fails closed.
func Blank(q Query, denied []Action, body []byte) ([]byte, error) {
	remove := false
	for _, a := range denied {
		switch {
		case a == q.Action:
			return nil, fmt.Errorf("blank %s: it is all of the answer", a)
		case !slices.Contains(q.Covers, a):
		case a == InstanceUserdata:
			remove = true
		default:
			return nil, fmt.Errorf("blank %s: its data cannot be told from the rest", a)
		}
	}
	if !remove || q.Method == "HEAD" && len(body) == 0 {
		return body, nil
	}
	if format, _ := q.Param("format"); equalFold(format, "text") {
		if !isChildNames(body) {
			return nil, fmt.Errorf("format=text: %w", ErrNotDocument)
		}
		return body, nil
	}
	if !json.Valid(body) || body[skipSpace(body, 0)] != '{' { // valid: never all space
		return nil, ErrNotDocument
	}
	return blankUserdata(body), nil
}

// isChildNames reports whether a body lists names, one a line, nodes with a
// slash at the end: letters, digits, dashes and underscores.
func isChildNames(body []byte) bool {
	for line := range bytes.SplitSeq(body, []byte("\n")) {
		line = bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\r")), []byte("/"))
		if len(line) > maxName {
			return false
		}
		for _, b := range line {
			if !isLetter(b) && !isDigit(b) && b != '-' && b != '_' {
				return false
			}
		}
	}
	return true
}

// blankUserdata works on the bytes of valid JSON: a string that is followed by
// a colon is a key, and what follows the colon is its value. So the rest of the
// document stays as it is, duplicate keys included.
func blankUserdata(body []byte) []byte {
	var out []byte
	done := 0 // body[:done] is in out, or unchanged
	for i := 0; i < len(body); {
		if body[i] != '"' {
			i++
			continue
		}
		end := skipString(body, i)
		key := body[i:end]
		i = skipSpace(body, end)
		if i == len(body) || body[i] != ':' || !isUserdataKey(key) {
			continue
		}
		start := skipSpace(body, i+1)
		i = skipValue(body, start)
		if string(body[start:i]) != `""` {
			out = append(append(out, body[done:start]...), `""`...)
			done = i
		}
	}
	if done == 0 {
		return body
	}
	return append(out, body[done:]...)
}

// isUserdataKey reads the literal of a key as clients will: escapes decoded,
// and without regard to letter case, Unicode's included, since some JSON readers
// fold it when they look a key up.
func isUserdataKey(literal []byte) bool {
	key := literal[1 : len(literal)-1]
	if bytes.IndexByte(key, '\\') >= 0 {
		var s string
		if json.Unmarshal(literal, &s) != nil {
			return true // cannot happen in valid JSON; if it does, nothing leaks
		}
		key = []byte(s)
	}
	return bytes.EqualFold(key, []byte("userData")) || bytes.EqualFold(key, []byte("customData"))
}

func skipSpace(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\t' || b[i] == '\n' || b[i] == '\r') {
		i++
	}
	return i
}

// skipString returns the index after the string that starts at i.
func skipString(b []byte, i int) int {
	for i++; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
	return len(b)
}

// skipValue returns the index after the value that starts at i.
func skipValue(b []byte, i int) int {
	depth := 0
	for i < len(b) {
		switch c := b[i]; {
		case c == '"':
			i = skipString(b, i)
		case c == '{' || c == '[':
			depth++
			i++
		case depth > 0 && (c == '}' || c == ']'):
			depth--
			i++
		case depth == 0 && bytes.IndexByte([]byte(" \t\r\n,}]"), c) >= 0:
			return i // the end of a number or a literal
		default:
			i++
			continue
		}
		if depth == 0 {
			return i
		}
	}
	return len(b)
}
