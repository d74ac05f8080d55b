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
	var userdata, instance bool
	for _, a := range denied {
		switch {
		case a == q.Action:
			return nil, fmt.Errorf("blank %s: it is all of the answer", a)
		case !slices.Contains(q.Covers, a):
		case a == InstanceUserdata:
			userdata = true
		case a == InstanceRead && q.Action == InstanceProvisioning:
			instance = true
		default:
			return nil, fmt.Errorf("blank %s: its data cannot be told from the rest", a)
		}
	}
	if !userdata && !instance {
		return body, nil
	}
	if open, err := openDocument(q, body); err != nil {
		return nil, err
	} else if !open {
		return body, nil
	}
	if body[skipSpace(body, 0)] != '{' {
		return nil, ErrNotDocument
	}
	if userdata {
		body = blankUserdata(body)
	}
	if instance {
		return (&place{keep: []string{extendedKey}}).prune(q, body)
	}
	return body, nil
}

// openDocument reports whether the body is a document with values in it. It is
// false for what has none: the body that a HEAD answer lacks, a list of names.
func openDocument(q Query, body []byte) (bool, error) {
	if q.Method == "HEAD" && len(body) == 0 {
		return false, nil
	}
	if format, _ := q.Param("format"); equalFold(format, "text") {
		if !isChildNames(body) {
			return false, fmt.Errorf("format=text: %w", ErrNotDocument)
		}
		return false, nil
	}
	if !json.Valid(body) {
		return false, ErrNotDocument
	}
	if b := body[skipSpace(body, 0)]; b != '{' && b != '[' { // valid: never all space
		return false, ErrNotDocument
	}
	return true, nil
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
	e := edit{body: body}
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
		i = e.replace(start, skipValue(body, start), `""`)
	}
	return e.done()
}

func isUserdataKey(literal []byte) bool {
	key, ok := decodeKey(literal)
	return !ok || isKey(key, "userData") || isKey(key, "customData")
}

// isKey compares without regard to letter case, Unicode's included, since some
// JSON readers fold it when they look a key up.
func isKey(key []byte, name string) bool { return bytes.EqualFold(key, []byte(name)) }

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
