package upstream

import "sync"

// maxEdits is how many edits of a kept answer are remembered.
const maxEdits = 4

// edits are bodies that were made out of a kept one.
type edits struct {
	mu  sync.Mutex
	all []edited
}

type edited struct {
	key  string
	body []byte
}

// Edit returns what edit makes out of Bytes, which it must not change. What was
// made for the same key before is taken instead, for as long as the answer is
// kept: so the key has to say all that edit depends on. Nobody changes the result.
// An error is edit's, and is not remembered; nor is what is longer than Bytes.
func (a *Answer) Edit(key string, edit func([]byte) ([]byte, error)) ([]byte, error) {
	if a.edits == nil {
		return edit(a.Bytes)
	}
	if body, ok := a.edits.find(key); ok {
		return body, nil
	}
	body, err := edit(a.Bytes)
	if err == nil && len(body) <= len(a.Bytes) {
		a.edits.keep(key, body)
	}
	return body, err
}

func (e *edits) find(key string) ([]byte, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.all {
		if e.all[i].key == key {
			return e.all[i].body, true
		}
	}
	return nil, false
}

// keep remembers the first few: answers are short-lived, and callers of one kind
// have one policy or two.
func (e *edits) keep(key string, body []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.all {
		if e.all[i].key == key {
			return
		}
	}
	if len(e.all) < maxEdits {
		e.all = append(e.all, edited{key, body})
	}
}
