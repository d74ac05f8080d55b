package imds

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// Cut says what of an instance document stays: subtrees as ParseSubtree gives
// them. The zero value keeps everything.
type Cut struct {
	Keep []string // these alone; empty means all
	Drop []string // goes, even where Keep has it
}

// Prune takes out of the body of a 200 answer what c does not leave in it, and
// counts keys from q.Subtree on, where the body hangs. What goes becomes what the
// service itself has for "not set" (protocol-azure §4): {} of an object, [] of an
// array, "" of anything else; what stays, stays byte for byte. Keys are compared
// as Blank does it: at every place, in any letter case, however often they occur.
// A key of digits counts as an index: it is no part of a path. A scalar where
// parts of an object were cut goes, since it may hold them in another form.
//
// The rest is as for Blank: without anything to remove the body is returned
// itself; in no case is it modified; with format=text it must be a list of names;
// a HEAD answer has no body, and none stays none. It is an error when the body is
// not a document (ErrNotDocument), when nothing of it would stay, and when a cut
// is asked of an answer that is no InstanceRead and covers none. The caller then
// fails closed.
//
// Of the extended document Keep is about the part that InstanceRead stands for.
func Prune(q Query, c Cut, body []byte) ([]byte, error) {
	if len(c.Keep) == 0 && len(c.Drop) == 0 {
		return body, nil
	}
	extended := q.Action == InstanceProvisioning && slices.Contains(q.Covers, InstanceRead)
	if q.Action != InstanceRead && !extended {
		return nil, fmt.Errorf("prune %s: it is no instance document", q.Action)
	}
	at, ok := c.below(q.Subtree)
	if !ok {
		return nil, fmt.Errorf("prune %s: it is all of the answer", q.Subtree)
	}
	if extended && !at.all {
		at.keep = append(at.keep, extendedKey)
	}
	return at.prune(q, body)
}

// place is a cut as seen from a place in the document.
type place struct {
	all        bool     // everything here is kept, but for what is dropped
	keep, drop []string // paths from here on; none is empty
}

// below is the cut as seen from a subtree. It reports false if nothing stays.
func (c Cut) below(subtree string) (p place, ok bool) {
	p.all = len(c.Keep) == 0
	for _, k := range c.Keep {
		if Within(subtree, k) {
			p.all = true
		} else if Within(k, subtree) {
			p.keep = append(p.keep, rest(k, subtree))
		}
	}
	for _, d := range c.Drop {
		if Within(subtree, d) {
			return p, false
		}
		if Within(d, subtree) {
			p.drop = append(p.drop, rest(d, subtree))
		}
	}
	return p, p.all || len(p.keep) > 0
}

// rest is the path from subtree to path, which lies below it.
func rest(path, subtree string) string {
	return strings.TrimPrefix(path[len(subtree):], "/")
}

// enter is the cut as seen from the value of a key. It reports false if nothing
// of the value stays.
func (p *place) enter(key []byte) (next place, ok bool) {
	next.all = p.all
	for _, k := range p.keep {
		if name, tail, more := strings.Cut(k, "/"); isKey(key, name) {
			if more {
				next.keep = append(next.keep, tail)
			} else {
				next.all = true
			}
		}
	}
	for _, d := range p.drop {
		if name, tail, more := strings.Cut(d, "/"); isKey(key, name) {
			if !more {
				return next, false
			}
			next.drop = append(next.drop, tail)
		}
	}
	return next, next.all || len(next.keep) > 0
}

func (p *place) prune(q Query, body []byte) ([]byte, error) {
	if p.all && len(p.drop) == 0 {
		return body, nil
	}
	if open, err := openDocument(q, body); err != nil {
		return nil, err
	} else if !open {
		return body, nil
	}
	e := edit{body: body}
	e.value(skipSpace(body, 0), p)
	return e.done(), nil
}

// value goes through the value at i of which some part goes, and returns the
// index after it. The body is valid JSON.
func (e *edit) value(i int, p *place) int {
	b := e.body
	switch b[i] {
	case '{':
		for i = skipSpace(b, i+1); b[i] != '}'; i = skipComma(b, i) {
			end := skipString(b, i)
			colon := skipSpace(b, end)
			i = e.member(b[i:end], skipSpace(b, colon+1), p)
		}
		return i + 1
	case '[':
		for i = skipSpace(b, i+1); b[i] != ']'; i = skipComma(b, i) {
			i = e.value(i, p)
		}
		return i + 1
	}
	return e.replace(i, skipValue(b, i), `""`)
}

// member is value for the value at i of a key of an object at p.
func (e *edit) member(literal []byte, i int, p *place) int {
	key, ok := decodeKey(literal)
	if ok && isNumber(key) {
		return e.value(i, p)
	}
	next, stays := p.enter(key)
	switch {
	case !ok || !stays:
		return e.empty(i)
	case next.all && len(next.drop) == 0:
		return skipValue(e.body, i)
	}
	return e.value(i, &next)
}

// empty puts the "not set" of its kind in place of the value at i.
func (e *edit) empty(i int) int {
	with := `""`
	switch e.body[i] {
	case '{':
		with = "{}"
	case '[':
		with = "[]"
	}
	return e.replace(i, skipValue(e.body, i), with)
}

// edit collects changes to a body, from front to back.
type edit struct {
	body, out []byte
	at        int // body[:at] is in out, or out is nil and it is unchanged
}

// replace puts a text in place of body[start:end], and returns end.
func (e *edit) replace(start, end int, with string) int {
	if string(e.body[start:end]) != with {
		e.out = append(append(e.out, e.body[e.at:start]...), with...)
		e.at = end
	}
	return end
}

// done is the changed body; the body itself if nothing changed.
func (e *edit) done() []byte {
	if e.out == nil {
		return e.body
	}
	return append(e.out, e.body[e.at:]...)
}

// decodeKey reads the literal of a key as clients will. It reports false for what
// cannot be in valid JSON.
func decodeKey(literal []byte) ([]byte, bool) {
	key := literal[1 : len(literal)-1]
	for _, b := range key {
		if b == '\\' {
			var s string
			err := json.Unmarshal(literal, &s)
			return []byte(s), err == nil
		}
	}
	return key, true
}

func isNumber(key []byte) bool {
	for _, b := range key {
		if !isDigit(b) {
			return false
		}
	}
	return len(key) > 0
}

// skipComma returns the index of what follows a value that ends at i.
func skipComma(b []byte, i int) int {
	if i = skipSpace(b, i); b[i] == ',' {
		i = skipSpace(b, i+1)
	}
	return i
}
