package upstream

import (
	"bytes"
	"encoding/json"
	"io"
	"math"
	"strconv"
	"time"
)

// token is what the cache reads in the answer of the token endpoint
// (protocol-azure §9).
type token struct {
	expires time.Time
	in      time.Duration // expires_in; the longest there is, if that is not given
	digits  [2]int        // where the digits of expires_in begin and end; 0 if it is not given
}

// readToken reads a token's times, which are strings of digits, or numbers. It
// reports false for everything that it does not understand for certain: such an
// answer is not kept.
func readToken(body []byte) (token, bool) {
	t := token{in: math.MaxInt64}
	dec := json.NewDecoder(bytes.NewReader(body))
	if open, err := dec.Token(); err != nil || open != json.Delim('{') {
		return t, false
	}
	seen := make(map[string]bool, 10)
	for dec.More() {
		name, err := dec.Token()
		key, ok := name.(string)
		if err != nil || !ok || seen[key] {
			return t, false // two parsers could read it differently
		}
		seen[key] = true
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return t, false
		}
		switch key {
		case "expires_on":
			seconds, _, ok := seconds(raw)
			if !ok {
				return t, false
			}
			t.expires = time.Unix(seconds, 0)
		case "expires_in":
			seconds, quotes, ok := seconds(raw)
			end := int(dec.InputOffset())
			if !ok || !bytes.HasSuffix(body[:end], raw) {
				return t, false
			}
			t.in = time.Duration(seconds) * time.Second
			t.digits = [2]int{end - len(raw) + quotes, end - quotes}
		}
	}
	if end, err := dec.Token(); err != nil || end != json.Delim('}') {
		return t, false
	}
	if _, err := dec.Token(); err != io.EOF {
		return t, false
	}
	return t, seen["expires_on"] && seen["access_token"]
}

// maxSeconds is in the year 2255, and still a time.Duration.
const maxSeconds = 9_000_000_000

// seconds reads 86317 or "86317", and says how many quotes are at each end.
func seconds(raw []byte) (n int64, quotes int, ok bool) {
	if len(raw) > 2 && raw[0] == '"' && raw[len(raw)-1] == '"' {
		raw, quotes = raw[1:len(raw)-1], 1
	}
	for _, b := range raw {
		if b < '0' || b > '9' {
			return 0, 0, false
		}
	}
	n, err := strconv.ParseInt(string(raw), 10, 64)
	return n, quotes, err == nil && n <= maxSeconds
}

// noIdentity reports whether an error says that the VM has no such identity
// (protocol-azure §6).
func noIdentity(body []byte) bool {
	var e struct {
		Text string `json:"error_description"`
	}
	return json.Unmarshal(body, &e) == nil && e.Text == "Identity not found"
}
