package main

import (
	"io"
	"log/slog"
)

// newLogger writes a line an event, for people or for machines.
func newLogger(w io.Writer, asJSON bool) *slog.Logger {
	return newLoggerFrom(w, asJSON, slog.LevelInfo)
}

// newLoggerFrom leaves out what is below a level.
func newLoggerFrom(w io.Writer, asJSON bool, level slog.Level) *slog.Logger {
	o := &slog.HandlerOptions{Level: level}
	if asJSON {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
