package imds

// Letter case is folded for ASCII alone: Unicode folding would make U+017F a
// spelling of "s" and U+212A one of "k", which no metadata service does.

func isLetter(b byte) bool { return 'a' <= b|0x20 && b|0x20 <= 'z' }
func isDigit(b byte) bool  { return '0' <= b && b <= '9' }

func lowerByte(b byte) byte {
	if 'A' <= b && b <= 'Z' {
		return b + 'a' - 'A'
	}
	return b
}

// lower appends s in lower case to dst. It reports false, having appended
// nothing, when s does not fit dst's capacity: such a string is in no table.
func lower(dst []byte, s string) ([]byte, bool) {
	if len(s) > cap(dst)-len(dst) {
		return dst, false
	}
	for i := range len(s) {
		dst = append(dst, lowerByte(s[i]))
	}
	return dst, true
}

// equalFold compares without regard to the case of ASCII letters.
func equalFold(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if lowerByte(a[i]) != lowerByte(b[i]) {
			return false
		}
	}
	return true
}

func hasPrefixFold(s, prefix string) bool {
	return len(s) >= len(prefix) && equalFold(s[:len(prefix)], prefix)
}

// respell gives s, which has the prefix in some letter case, the prefix's own.
func respell(s, prefix string) string {
	if s[:len(prefix)] == prefix {
		return s
	}
	return prefix + s[len(prefix):]
}
