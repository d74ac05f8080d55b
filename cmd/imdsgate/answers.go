//go:build !forwardonly

package main

import (
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"imdsgate/internal/upstream"
)

// answerFlags say what stands between the gate and the metadata service.
type answerFlags struct {
	cache, budget string
	cacheMiB      int
	ahead         bool

	kept *upstream.Cache // once source has made it
}

func (f *answerFlags) add(fl *pflag.FlagSet) {
	fl.StringVar(&f.cache, "cache", "on", "keep and merge answers, in memory alone: on or off")
	fl.IntVar(&f.cacheMiB, "cache-size", 8, "memory for answers that are kept, in MiB")
	fl.BoolVar(&f.ahead, "prefetch", false, "fetch the tokens that the policy names for a container (identity and resource) when it appears")
	fl.StringVar(&f.budget, "budget", "general=3,identity=16,concurrent=4",
		"requests/s to the service and, for identities, at once; shared out fairly; off: none")
}

// source is the client with what the flags put before it. The function ends what
// is under way.
func (f *answerFlags) source(client upstream.Source) (upstream.Source, func(), error) {
	s, end := client, func() {}
	if f.budget != "off" {
		b := &upstream.Budget{Source: s}
		if err := parseBudget(f.budget, b); err != nil {
			return nil, nil, err
		}
		s = b
	}
	switch f.cache {
	case "on":
		if f.cacheMiB < 2 || f.cacheMiB > 1<<20 {
			return nil, nil, usageError("--cache-size: want 2 to 1048576 MiB")
		}
		c := &upstream.Cache{Source: s, MaxBytes: int64(f.cacheMiB) << 20}
		s, end, f.kept = c, c.Close, c
	case "off":
	default:
		return nil, nil, usageError("--cache %q: want on or off", f.cache)
	}
	if f.ahead && f.kept == nil {
		return nil, nil, usageError("--prefetch is for --cache on")
	}
	return s, end, nil
}

// parseBudget reads "general=3,identity=16,concurrent=4", or a part of it.
func parseBudget(text string, b *upstream.Budget) error {
	for part := range strings.SplitSeq(text, ",") {
		name, value, _ := strings.Cut(part, "=")
		n, err := strconv.ParseFloat(value, 64)
		if err != nil || !(n >= 0.01 && n <= 1e6) { // beyond that times overflow
			return withHint(usageError("--budget %q: want NAME=NUMBER, from 0.01 to 1000000", part), "as in --budget general=3,identity=16,concurrent=4, or off")
		}
		switch name {
		case "general":
			b.General.PerSecond = n
		case "identity":
			b.Identity.PerSecond = n
		case "concurrent":
			if n != float64(int(n)) {
				return usageError("--budget %q: want a whole number", part)
			}
			b.Identity.AtOnce = int(n)
		default:
			return withHint(usageError("--budget %q: no such limit", part), "as in --budget general=3,identity=16,concurrent=4, or off")
		}
	}
	return nil
}
