package imds

import (
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	maxTarget = 8 << 10 // bytes of a request target
	maxParams = 16      // parameters of a query
	maxName   = 64      // bytes of a parameter name on an endpoint without a list
	maxShown  = 256     // bytes of one value, or of the path, in Redacted
	ellipsis  = "…"     // of what Redacted hides or cuts; all else in it is ASCII
)

// Param is the decoded value of the parameter with that name in documented
// letter case, and whether there is one.
func (q Query) Param(name string) (string, bool) {
	for i := range q.Params {
		if q.Params[i].Name == name {
			return q.Params[i].Value, true
		}
	}
	return "", false
}

// Target is the request target that is forwarded: path, and query if there is
// one. It decides alone what the service sees, and classifies to the same Query.
// It may hold secrets: records take Redacted.
func (q Query) Target() string {
	if len(q.Params) == 0 {
		return q.Path
	}
	n := len(q.Path)
	for _, p := range q.Params {
		n += len(p.Name) + len(p.Value) + len(p.Value)/2 + 2
	}
	out := append(make([]byte, 0, n), q.Path...)
	for i, p := range q.Params {
		out = append(append(append(out, separator(i)), p.Name...), '=')
		out = appendEscaped(out, p.Value, "")
	}
	return string(out)
}

// Redacted is the target as records may show it: values that select what is
// asked for are shown, escaped and cut to 256 bytes; of a nonce its length is
// shown; every other value is "…". The path is cut to 256 bytes too.
func (q Query) Redacted() string {
	out := appendCut(nil, []byte(q.Path))
	for i, p := range q.Params {
		out = append(append(append(out, separator(i)), p.Name...), '=')
		switch {
		case shown(p):
			out = appendCut(out, appendEscaped(nil, p.Value, ":/@,"))
		case p.Name == "nonce":
			out = append(strconv.AppendInt(append(out, ellipsis+"("...), int64(len(p.Value)), 10), ')')
		default:
			out = append(out, ellipsis...)
		}
	}
	return string(out)
}

func shown(p Param) bool {
	switch p.Name {
	case "api-version", "cred-api-version", "format", "resource", clientID, objectID, resourceID, oldResourceID:
		return true
	case "bypass_cache", extendedParam:
		return p.Value == "true" || p.Value == "false"
	}
	return false
}

func separator(i int) byte {
	if i == 0 {
		return '?'
	}
	return '&'
}

func appendCut(dst, s []byte) []byte {
	if len(s) > maxShown {
		return append(append(dst, s[:maxShown]...), ellipsis...)
	}
	return append(dst, s...)
}

// appendEscaped writes a value in the one form that is forwarded: letters,
// digits and "-._~" as they are, every other byte as %XX, so a space is %20 and
// never "+". Bytes in keep stay as they are as well.
func appendEscaped(dst []byte, s, keep string) []byte {
	const hex = "0123456789ABCDEF"
	for i := range len(s) {
		b := s[i]
		if isUnreserved(b) || strings.IndexByte(keep, b) >= 0 {
			dst = append(dst, b)
		} else {
			dst = append(dst, '%', hex[b>>4], hex[b&15])
		}
	}
	return dst
}

// isUnreserved follows RFC 3986 §2.3.
func isUnreserved(b byte) bool {
	return isLetter(b) || isDigit(b) || b == '-' || b == '.' || b == '_' || b == '~'
}

// parseQuery reads the query, without its "?", strictly: what two parsers could
// read differently is refused, never repaired. known is the endpoint's list of
// documented names, nil for any plain name.
func parseQuery(raw string, known []string) ([]Param, *fault) {
	if raw == "" {
		return nil, nil
	}
	n := strings.Count(raw, "&") + 1
	if n > maxParams {
		return nil, &faultTooMany
	}
	params := make([]Param, 0, n)
	for len(params) < n {
		var pair string
		pair, raw, _ = strings.Cut(raw, "&")
		name, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, &faultQuery
		}
		if name, ok = unescape(name); !ok {
			return nil, &faultQuery
		}
		if value, ok = unescape(value); !ok {
			return nil, &faultQuery
		}
		if name, ok = documented(name, known); !ok {
			return nil, &faultParameter
		}
		for i := range params {
			if equalFold(params[i].Name, name) {
				return nil, &faultDuplicate
			}
		}
		params = append(params, Param{name, value})
	}
	slices.SortFunc(params, func(a, b Param) int { return strings.Compare(a.Name, b.Name) })
	return params, nil
}

// documented is the spelling of name on the list. Without a list a plain name
// stays as it is: its documented letter case is not known.
func documented(name string, known []string) (string, bool) {
	if known == nil {
		return name, plainName(name)
	}
	for _, k := range known {
		if equalFold(k, name) {
			return k, true
		}
	}
	return "", false
}

func plainName(s string) bool {
	for i := range len(s) {
		if !isUnreserved(s[i]) {
			return false
		}
	}
	return s != "" && len(s) <= maxName
}

// unescape decodes one name or value of a query. It reports false for bytes
// that RFC 3986 does not allow there, for ";", which some parsers take for a
// separator, for a bad escape, and for text that is not UTF-8 or holds control
// characters when decoded.
func unescape(s string) (string, bool) {
	escaped := false
	for i := range len(s) {
		switch b := s[i]; {
		case b == '%' || b == '+':
			escaped = true
		case !isUnreserved(b) && strings.IndexByte("!$'()*,:@/?=", b) < 0:
			return "", false
		}
	}
	if !escaped {
		return s, true
	}
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '%':
			if i+2 >= len(s) || unhex[s[i+1]] < 0 || unhex[s[i+2]] < 0 {
				return "", false
			}
			out = append(out, byte(unhex[s[i+1]])<<4|byte(unhex[s[i+2]]))
			i += 2
		case '+':
			out = append(out, ' ') // as every form decoder reads it; forwarded as %20
		default:
			out = append(out, s[i])
		}
	}
	text := string(out)
	return text, utf8.ValidString(text) && strings.IndexFunc(text, unicode.IsControl) < 0
}

// unhex is the value of a hexadecimal digit, -1 for other bytes.
var unhex = func() (t [256]int8) {
	for i := range t {
		t[i] = -1
	}
	for i := range 10 {
		t['0'+i] = int8(i)
	}
	for i := range 6 {
		t['a'+i], t['A'+i] = int8(10+i), int8(10+i)
	}
	return t
}()
