package main

import (
	"io"
	"log/slog"
)

// newLogger writes a line an event, for people or for machines.
func newLogger(w io.Writer, asJSON bool) *slog.Logger {
	if asJSON {
		return slog.New(slog.NewJSONHandler(w, nil))
	}
	return slog.New(slog.NewTextHandler(w, nil))
}
