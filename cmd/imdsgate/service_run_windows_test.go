//go:build !forwardonly

package main

import (
	"fmt"
	"io"
	"slices"
	"testing"
)

// eventList plays the event log.
type eventList []string

func (l *eventList) add(kind, text string) error { *l = append(*l, kind+": "+text); return nil }

func (l *eventList) Error(_ uint32, text string) error   { return l.add("error", text) }
func (l *eventList) Warning(_ uint32, text string) error { return l.add("warning", text) }
func (l *eventList) Info(_ uint32, text string) error    { return l.add("info", text) }
func (l *eventList) Close() error                        { return l.add("closed", "") }

// TestEventLines holds that each line is an event, also the last one, which may have
// no end.
func TestEventLines(t *testing.T) {
	var got eventList
	w := &eventLines{log: &got}
	for _, part := range []string{"level=INFO a", "\nlevel=WARN b\nlevel=", "ERROR c\n", "imdsgate: agent: it ended"} {
		if _, err := io.WriteString(w, part); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	want := eventList{"info: level=INFO a", "warning: level=WARN b", "error: level=ERROR c", "error: imdsgate: agent: it ended", "closed: "}
	if !slices.Equal(got, want) {
		t.Errorf("got  %s\nwant %s", fmt.Sprintf("%q", got), fmt.Sprintf("%q", want))
	}
}
