package sim

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Fault is a way in which the simulator misbehaves on purpose. Latency goes with
// everything; of Status, Hang, Reset, Cut, Down and Gone there can be one.
type Fault struct {
	Path   string // this path and what is below it, in any letter case; "" means all
	Method string // "" means all
	Count  int    // how many requests it is still for; 0 means until it is taken away

	Latency  time.Duration // before the answer
	Status   int           // an error of this status, in the endpoint's shape
	Hang     bool          // accept, and never answer
	Reset    bool          // reset the connection
	Cut      bool          // half of the answer's body, then the end of the connection
	Down     bool          // the host's front answers, because IMDS is away: 500 in plain text
	Gone     time.Duration // 410, for so long from when the fault is set
	Partial  bool          // instance data as early in a VM's boot; extended=true gets 404
	TokenTTL time.Duration // new tokens live so long; below 0 means that they are expired already
}

// ParseFault reads "key=value,key,…" with the keys path, method, count, latency,
// status, hang, reset, cut, down, gone, partial and token-ttl; durations as in 200ms.
func ParseFault(s string) (Fault, error) {
	var f Fault
	for part := range strings.SplitSeq(s, ",") {
		key, value, given := strings.Cut(part, "=")
		if !given {
			value = "true"
		}
		if err := f.set(key, value); err != nil {
			return Fault{}, fmt.Errorf("fault %q: %w", s, err)
		}
	}
	if err := f.check(); err != nil {
		return Fault{}, fmt.Errorf("fault %q: %w", s, err)
	}
	return f, nil
}

func (f *Fault) set(key, value string) error {
	var err error
	switch key {
	case "path":
		f.Path = value
	case "method":
		f.Method = value
	case "count":
		f.Count, err = strconv.Atoi(value)
	case "status":
		f.Status, err = strconv.Atoi(value)
	case "latency":
		f.Latency, err = time.ParseDuration(value)
	case "gone":
		f.Gone, err = time.ParseDuration(value)
	case "token-ttl":
		f.TokenTTL, err = time.ParseDuration(value)
		if err == nil && f.TokenTTL == 0 {
			err = errors.New("0")
		}
	case "hang":
		return setFlag(&f.Hang, key, value)
	case "reset":
		return setFlag(&f.Reset, key, value)
	case "cut":
		return setFlag(&f.Cut, key, value)
	case "down":
		return setFlag(&f.Down, key, value)
	case "partial":
		return setFlag(&f.Partial, key, value)
	default:
		return fmt.Errorf("unknown key %q: want one of path, method, count, latency, status, hang, reset, cut, down, gone, partial, token-ttl", key)
	}
	if err != nil {
		return fmt.Errorf("%s: cannot use %q", key, value)
	}
	return nil
}

// setFlag sets what stands alone in the text form, and is a truth value in JSON.
func setFlag(to *bool, key, value string) error {
	if value != "true" && value != "false" {
		return fmt.Errorf("%s takes no value, got %q", key, value)
	}
	*to = value == "true"
	return nil
}

func (f *Fault) check() error {
	ends := 0
	for _, set := range []bool{f.Status != 0, f.Hang, f.Reset, f.Cut, f.Down, f.Gone != 0} {
		if set {
			ends++
		}
	}
	switch {
	case ends > 1:
		return errors.New("want one of status, hang, reset, cut, down and gone, got several")
	case ends == 0 && f.Latency == 0 && !f.Partial && f.TokenTTL == 0:
		return errors.New("it does nothing: want status, latency, hang, reset, cut, down, gone, partial or token-ttl")
	case f.Status != 0 && (f.Status < 400 || f.Status > 599):
		return fmt.Errorf("status: want 400 to 599, got %d", f.Status)
	case f.Count < 0 || f.Latency < 0 || f.Gone < 0:
		return errors.New("count, latency and gone cannot be below 0")
	case f.Path != "" && f.Path[0] != '/':
		return fmt.Errorf("path: want a leading slash, got %q", f.Path)
	}
	return nil
}

// pairs are the keys that are set, in the words of ParseFault.
func (f Fault) pairs() map[string]any {
	out := make(map[string]any)
	add := func(key string, value any, set bool) {
		if set {
			out[key] = value
		}
	}
	add("path", f.Path, f.Path != "")
	add("method", f.Method, f.Method != "")
	add("count", f.Count, f.Count != 0)
	add("status", f.Status, f.Status != 0)
	add("latency", f.Latency.String(), f.Latency != 0)
	add("gone", f.Gone.String(), f.Gone != 0)
	add("token-ttl", f.TokenTTL.String(), f.TokenTTL != 0)
	add("hang", true, f.Hang)
	add("reset", true, f.Reset)
	add("cut", true, f.Cut)
	add("down", true, f.Down)
	add("partial", true, f.Partial)
	return out
}

// MarshalJSON writes an object with the keys of ParseFault, numbers and truth
// values as such, durations as strings.
func (f Fault) MarshalJSON() ([]byte, error) { return json.Marshal(f.pairs()) }

// UnmarshalJSON reads what MarshalJSON writes. Its errors are those of ParseFault.
func (f *Fault) UnmarshalJSON(b []byte) error {
	var pairs map[string]any
	dec := json.NewDecoder(strings.NewReader(string(b)))
	dec.UseNumber()
	if err := dec.Decode(&pairs); err != nil {
		return fmt.Errorf("fault: %w", err)
	}
	*f = Fault{}
	for key, value := range pairs {
		if err := f.set(key, fmt.Sprint(value)); err != nil {
			return fmt.Errorf("fault: %w", err)
		}
	}
	return f.check()
}
