package imds

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Within reports whether a subtree of the instance document is of, or lies below
// it. Everything is within the empty one, the whole document. The case of ASCII
// letters does not count.
func Within(subtree, of string) bool {
	return of == "" || hasPrefixFold(subtree, of) && (len(subtree) == len(of) || subtree[len(of)] == '/')
}

// oldNames are two keys for the same data: tags have two forms, and version
// 2017-03-01 had names of its own (protocol-azure §4).
var oldNames = [][2]string{
	{"compute/tags", "compute/tagsList"},
	{"network/interface/macAddress", "network/interface/mac"},
	{"network/interface/ipv4/ipAddress/privateIpAddress", "network/interface/ipv4/ipAddress/ipAddress"},
	{"network/interface/ipv4/ipAddress/publicIpAddress", "network/interface/ipv4/ipAddress/publicip"},
	{"network/interface/ipv6/ipAddress/privateIpAddress", "network/interface/ipv6/ipAddress/ipAddress"},
	{"network/interface/ipv6/ipAddress/publicIpAddress", "network/interface/ipv6/ipAddress/publicip"},
}

// ParseSubtree reads a subtree of the instance document as a policy names it:
// documented keys in any letter case, joined by "/", without array indexes. It
// returns the subtree as Query.Subtree has it and, behind it, other names of the
// same data; a rule is about all of them.
//
// A key that is not documented is an error. In a rule that denies, a slip of the
// pen would else leave open what it was meant to close.
func ParseSubtree(s string) ([]string, error) {
	switch {
	case s == "":
		return nil, errors.New("a subtree must not be empty: name a part such as compute/osProfile, or none for the whole document")
	case hasPrefixFold(s, instanceRoot):
		return nil, fmt.Errorf("subtree %q: leave out %s/", s, instanceRoot)
	case s[0] == '/' || s[len(s)-1] == '/':
		return nil, fmt.Errorf("subtree %q: no slash at either end", s)
	}
	n := instanceDocument
	for seg := range strings.SplitSeq(s, "/") {
		next, err := n.step(seg)
		if err != nil {
			return nil, fmt.Errorf("subtree %q: %w", s, err)
		}
		n = next
	}
	if Within(n.path, "compute/tagsList") && n.path != "compute/tagsList" {
		return nil, fmt.Errorf("subtree %q: names and values of tags go together, since compute/tags holds both: name compute/tagsList", s)
	}
	out := []string{n.path}
	for _, pair := range oldNames {
		if i := slices.Index(pair[:], n.path); i >= 0 {
			out = append(out, pair[1-i])
		}
	}
	return out, nil
}

// step is the child that a segment names.
func (n *node) step(seg string) (*node, error) {
	key, ok := instanceKey(seg)
	switch c := n.child(key); {
	case seg == "":
		return nil, errors.New("two slashes with nothing between them")
	case ok && c != nil:
		return c, nil
	case isDigit(seg[0]) && (n.list || isIndex(seg)):
		return nil, fmt.Errorf("leave out the index %s: a subtree is about all elements of an array", seg)
	case key == "userData" || key == "customData":
		return nil, fmt.Errorf("%s is no part of %s: the action %s stands for it", key, InstanceRead, InstanceUserdata)
	case key == "extended" && n.path == "":
		return nil, fmt.Errorf("%s is no part of %s: the action %s stands for it", key, InstanceRead, InstanceProvisioning)
	case len(n.children) == 0:
		return nil, fmt.Errorf("%s has no parts", n.path)
	}
	return nil, n.unknown(seg)
}

// unknown says that there is no such key, and which one may have been meant.
func (n *node) unknown(seg string) error {
	where := "there is no key " + seg
	if n.path != "" {
		where += " in " + n.path
	}
	low := strings.ToLower(seg)
	best, distance := "", len(seg)/2+1
	for key := range n.children {
		if d := edits(low, strings.ToLower(key)); d < distance || d == distance && key < best {
			best, distance = key, d
		}
	}
	if best != "" {
		return fmt.Errorf("%s: did you mean %s?", where, join(n.path, best))
	}
	if below := n.find(low); below != "" {
		return fmt.Errorf("%s: did you mean %s?", where, below)
	}
	keys := make([]string, 0, len(n.children))
	for key := range n.children {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return fmt.Errorf("%s: its keys are %s", where, strings.Join(keys, ", "))
}

// find is the path of a key anywhere below, by its name in lower case; of
// several, the first in order.
func (n *node) find(low string) (path string) {
	for key, c := range n.children {
		at := c.path
		if strings.ToLower(key) != low {
			at = c.find(low)
		}
		if at != "" && (path == "" || at < path) {
			path = at
		}
	}
	return path
}

// edits is the number of bytes to insert, delete or change to get from a to b.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
