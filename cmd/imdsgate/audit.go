//go:build !forwardonly

package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"imdsgate/internal/audit"
)

// auditSpec says where audit lines go.
type auditSpec struct {
	to   string // -, a path, syslog[:TAG] or journald
	size string // of a file before it is rotated
	keep int    // rotated files
	rate int    // lines a second of one workload before they are put together
}

func (s *auditSpec) flags(fl *pflag.FlagSet) {
	fl.StringVar(&s.to, "audit", "-", "where audit lines go: a file, syslog[:TAG], journald, or - for stdout")
	fl.StringVar(&s.size, "audit-size", "100MiB", "size at which the file is rotated, to FILE.1 and so on; 0 is never")
	fl.IntVar(&s.rate, "audit-rate", 40, "lines a second of one workload beyond which they are put together, ten times as many at once; 0 is never")
	fl.IntVar(&s.keep, "audit-keep", 5, "rotated files that are kept")
}

// leastSize is that of a few lines, so that files are not rotated at each.
const leastSize = 4 << 10

var sizeValue = regexp.MustCompile(`^([0-9]{1,18})(|B|KiB|MiB|GiB)$`)

// bytes is what size means.
func (s *auditSpec) bytes() (int64, error) {
	if m := sizeValue.FindStringSubmatch(s.size); m != nil {
		n, _ := strconv.ParseInt(m[1], 10, 64) // fits by its digits
		unit := int64(1) << map[string]int{"KiB": 10, "MiB": 20, "GiB": 30}[m[2]]
		if n == 0 || n <= math.MaxInt64/unit && n*unit >= leastSize {
			return n * unit, nil
		}
	}
	return 0, withHint(usageError("--audit-size %q: want a size of at least 4KiB, or 0", s.size), "give bytes, or a number with KiB, MiB or GiB, as in 100MiB")
}

// tagValue is what syslog takes for the name of a program (RFC 3164, section 5.3).
var tagValue = regexp.MustCompile(`^[A-Za-z0-9._-]{1,32}$`)

// program is the tag of syslog and journald when none is given: not that of the
// services' own lines, which are no records.
const program = "imdsgate-audit"

// openAuditSink opens what s names and begins to write. Close, after the last
// Record, writes what is left. The log is told of lines that are lost, and of the
// chain's head at the end: so it is kept in two places.
func openAuditSink(s auditSpec, stdout io.Writer, log *slog.Logger) (audit.Sink, io.Closer, error) {
	size, err := s.bytes()
	if err != nil {
		return nil, nil, err
	}
	switch {
	case s.keep < 1:
		return nil, nil, usageError("--audit-keep: want more than zero")
	case s.rate < 0:
		return nil, nil, usageError("--audit-rate: want zero or more")
	}
	out, err := openAuditOut(s, size, stdout, log)
	if err != nil {
		return nil, nil, err
	}
	l := &audit.Log{Out: out, Version: version, Report: func(err error) {
		if err != nil {
			log.Error("audit lines are lost", "err", err)
			return
		}
		log.Warn("audit lines are written again")
	}}
	ctx, cancel := context.WithCancel(context.Background())
	r := &auditRun{log: l, cancel: cancel, ended: make(chan struct{}), say: log}
	go r.run(ctx)
	if s.rate == 0 {
		return l, r, nil
	}
	fold := &audit.Fold{Sink: l, Rate: float64(s.rate), Burst: 10 * float64(s.rate)}
	folding, stop := context.WithCancel(context.Background())
	r.unfold = stop
	r.folds.Go(func() { fold.Run(folding) })
	return fold, r, nil
}

func openAuditOut(s auditSpec, size int64, stdout io.Writer, log *slog.Logger) (audit.Out, error) {
	kind, tag, hasTag := strings.Cut(s.to, ":")
	switch {
	case s.to == "-":
		return audit.NewStream(stdout), nil
	case s.to == "":
		return nil, usageError("--audit: want a file, syslog[:TAG], journald, or - for stdout")
	case s.to == "journald":
		out, err := audit.DialJournal("", program)
		return out, noDaemon("systemd's journal", err)
	case kind == "syslog" && !hasTag:
		out, err := audit.DialSyslog("", program)
		return out, noDaemon("a syslog daemon", err)
	case kind == "syslog" && !tagValue.MatchString(tag):
		return nil, withHint(usageError("--audit %q: want a tag of 1 to 32 letters, digits, dots and dashes", s.to), "as in syslog:imdsgate; for a file of that name write ./"+s.to)
	case kind == "syslog":
		out, err := audit.DialSyslog("", tag)
		return out, noDaemon("a syslog daemon", err)
	}
	f, err := audit.OpenFile(s.to, size, s.keep, func(err error) { log.Error("audit file is not rotated", "err", err) })
	switch {
	case err == nil:
		return f, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, missingFolder("--audit", s.to)
	case errors.Is(err, audit.ErrNotRegular):
		return nil, withHint(usageError("--audit: %v", err), "give a file, or - for stdout, which can be a pipe or a device")
	}
	return nil, withHint(usageError("--audit: %v", err), "give a file, no symbolic link, that the proxy may read and append to, or - for stdout")
}

// noDaemon is the error for a machine without the daemon.
func noDaemon(name string, err error) error {
	if err == nil {
		return nil
	}
	return withHint(unsupported("--audit: there is no way to %s: %v", name, err), "start it, let this process see its socket, or give a file, or - for stdout")
}

// auditRun is a Log that is being written.
type auditRun struct {
	log    *audit.Log
	cancel context.CancelFunc
	ended  chan struct{}
	unfold context.CancelFunc // hands on what is folded; nil if nothing is
	folds  sync.WaitGroup
	say    *slog.Logger
}

func (r *auditRun) run(ctx context.Context) {
	defer close(r.ended)
	r.log.Run(ctx)
}

// auditTime is how long the last lines may take.
const auditTime = 3 * time.Second

// Close gives a sink that does not take the last lines some time, and then up.
func (r *auditRun) Close() error {
	if r.unfold != nil {
		r.unfold()
		r.folds.Wait()
	}
	r.cancel()
	t := time.NewTimer(auditTime)
	defer t.Stop()
	select {
	case <-r.ended:
	case <-t.C:
		r.say.Error("audit lines were not written: what they go to does not take them", "head", r.log.Head().String())
		return nil // the process is at its end, and so is what Run waits for
	}
	if h := r.log.Head(); h.Seq > 0 {
		r.say.Info("audit ends", "head", h.String(), "lost", r.log.Lost())
	}
	return r.log.Out.Close()
}
