package imds

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSubtree(t *testing.T) {
	tests := []struct {
		name, path string // below /metadata/instance
		action     Action
		want       string
	}{
		{"whole", "", InstanceRead, ""},
		{"whole with slash", "/", InstanceRead, ""},
		{"section", "/compute", InstanceRead, "compute"},
		{"section shouted", "/NETWORK/", InstanceRead, "network"},
		{"node", "/compute/osprofile", InstanceRead, "compute/osProfile"},
		{"leaf", "/compute/OSPROFILE/adminusername", InstanceRead, "compute/osProfile/adminUsername"},
		{"array", "/compute/tagsList", InstanceRead, "compute/tagsList"},
		{"element", "/compute/TAGSLIST/12", InstanceRead, "compute/tagsList"},
		{"leaf of an element", "/compute/tagsList/0/value", InstanceRead, "compute/tagsList/value"},
		{"two indexes", "/network/interface/0/ipv4/ipAddress/1/publicIpAddress", InstanceRead, "network/interface/ipv4/ipAddress/publicIpAddress"},
		{"index forgotten", "/network/interface/macAddress", InstanceRead, "network/interface/macAddress"},
		{"keys of 2017-03-01", "/network/interface/0/ipv4/ipaddress/0/publicip", InstanceRead, "network/interface/ipv4/ipAddress/publicip"},
		{"newer key", "/compute/Newer", InstanceRead, "compute/Newer"},
		{"newer key with index", "/compute/Newer/0/Still/1", InstanceRead, "compute/Newer/Still"},
		{"newer key below a leaf", "/compute/tags/env", InstanceRead, "compute/tags/env"},
		{"known key at another place", "/compute/plan/ADMINUSERNAME", InstanceRead, "compute/plan/adminUsername"},
		{"query does not matter", "/compute/tags?api-version=2017-03-01&format=text", InstanceRead, "compute/tags"},

		{"index into an object", "/compute/osProfile/0", Unknown, ""},
		{"index into a section", "/network/0", Unknown, ""},
		{"index into the document", "/0", Unknown, ""},
		{"index into a leaf", "/compute/tags/0", Unknown, ""},
		{"index into an element", "/compute/tagsList/0/0", Unknown, ""},
		{"index with a zero in front", "/compute/tagsList/00/value", Unknown, ""},
		{"index in hexadecimal", "/network/interface/0x0/macAddress", Unknown, ""},
		{"index that overflows", "/network/interface/4294967296/macAddress", Unknown, ""},
		{"key that begins as an index", "/compute/0tags", Unknown, ""},
		{"index and then user data", "/compute/osProfile/0/userData", InstanceUserdata, ""},
		{"user data", "/compute/userData", InstanceUserdata, ""},
		{"extended", "/extended/compute", InstanceProvisioning, ""},
		{"extended document", "?extended=true", InstanceProvisioning, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q := query(t, ask{target: instanceRoot + tt.path})
			if q.Action != tt.action || q.Subtree != tt.want {
				t.Errorf("got %s %q, want %s %q", q.Action, q.Subtree, tt.action, tt.want)
			}
		})
	}
	for _, target := range originals {
		if q := query(t, ask{target: target}); q.Action != InstanceRead && q.Subtree != "" {
			t.Errorf("%s has the subtree %q", target, q.Subtree)
		}
	}
}

func TestWithin(t *testing.T) {
	tests := []struct {
		subtree, of string
		want        bool
	}{
		{"", "", true}, {"compute", "", true}, {"compute/tags", "compute", true}, {"compute/tags", "compute/tags", true},
		{"COMPUTE/Tags/x", "compute/tAGS", true},
		{"", "compute", false}, {"compute", "compute/tags", false}, {"compute/tagsList", "compute/tags", false},
		{"compute/tags", "network", false}, {"compute/\u212aey", "compute/key", false}, {"x/compute", "compute", false},
	}
	for _, tt := range tests {
		if got := Within(tt.subtree, tt.of); got != tt.want {
			t.Errorf("Within(%q, %q) = %v, want %v", tt.subtree, tt.of, got, tt.want)
		}
	}
}

func TestParseSubtree(t *testing.T) {
	tests := []struct {
		s    string
		want []string
	}{
		{"compute", []string{"compute"}},
		{"network", []string{"network"}},
		{"compute/osProfile", []string{"compute/osProfile"}},
		{"Compute/OSPROFILE/adminusername", []string{"compute/osProfile/adminUsername"}},
		{"network/interface/ipv4", []string{"network/interface/ipv4"}},
		{"compute/tags", []string{"compute/tags", "compute/tagsList"}},
		{"compute/tagsList", []string{"compute/tagsList", "compute/tags"}},
		{"network/interface/macAddress", []string{"network/interface/macAddress", "network/interface/mac"}},
		{"network/interface/mac", []string{"network/interface/mac", "network/interface/macAddress"}},
		{"network/interface/ipv4/ipAddress/publicIpAddress", []string{"network/interface/ipv4/ipAddress/publicIpAddress", "network/interface/ipv4/ipAddress/publicip"}},
		{"network/interface/ipv6/ipAddress/privateIpAddress", []string{"network/interface/ipv6/ipAddress/privateIpAddress", "network/interface/ipv6/ipAddress/ipAddress"}},
	}
	for _, tt := range tests {
		got, err := ParseSubtree(tt.s)
		if d := cmp.Diff(tt.want, got); err != nil || d != "" {
			t.Errorf("%s: %v (-want +got):\n%s", tt.s, err, d)
		}
	}
}

func TestParseSubtreeErrors(t *testing.T) {
	tests := []struct{ name, s, want string }{
		{"empty", "", "must not be empty"},
		{"slash", "/", "no slash at either end"},
		{"slash in front", "/compute", "no slash at either end"},
		{"slash at the end", "compute/", "no slash at either end"},
		{"path of a request", "/metadata/instance/compute/tags", "leave out /metadata/instance/"},
		{"two slashes", "compute//tags", "nothing between"},
		{"index", "network/interface/0/ipv4", "leave out the index 0"},
		{"index at the end", "compute/tagsList/0", "leave out the index 0"},
		{"index of an object", "compute/0", "leave out the index 0"},
		{"odd index", "compute/tagsList/0x0", "leave out the index 0x0"},
		{"user data", "compute/userData", "the action instance.userdata stands for it"},
		{"custom data shouted", "COMPUTE/CUSTOMDATA", "the action instance.userdata stands for it"},
		{"extended", "extended", "the action instance.provisioning stands for it"},
		{"slip of the pen", "compute/osProfil", "did you mean compute/osProfile?"},
		{"slip in a section", "computer/tags", "did you mean compute?"},
		{"key without what is above it", "compute/adminUsername", "did you mean compute/osProfile/adminUsername?"},
		{"section left out", "tagsList", "did you mean compute/tagsList?"},
		{"plural", "network/interfaces", "did you mean network/interface?"},
		{"nothing like it", "network/zzzzzzzz", "its keys are interface"},
		{"below a leaf", "compute/tags/env", "compute/tags has no parts"},
		{"names of tags", "compute/tagsList/name", "name compute/tagsList"},
		{"values of tags", "compute/tagsList/value", "name compute/tagsList"},
		{"pattern", "compute/*", "there is no key *"},
		{"dots", "compute/../network", "there is no key .."},
		{"space", "compute/tags ", "did you mean compute/tags?"},
		{"letter that folds by unicode", "compute/tag\u017f", "did you mean compute/tags?"},
		{"newer key", "compute/notYetDocumented", "there is no key notYetDocumented in compute"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got, err := ParseSubtree(tt.s); err == nil || got != nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, %v, want an error with %q", got, err, tt.want)
			}
		})
	}
}

// documentedPaths lists all keys of the instance document.
func documentedPaths() (paths []string) {
	var add func(*node)
	add = func(n *node) {
		for _, c := range n.children {
			paths = append(paths, c.path)
			add(c)
		}
	}
	add(instanceDocument)
	slices.Sort(paths)
	return paths
}

// What a request for a documented key asks for and what a policy calls it are one.
func TestSubtreesAgree(t *testing.T) {
	for _, path := range documentedPaths() {
		q := query(t, ask{target: instancePrefix + strings.ToUpper(path)})
		if q.Action != InstanceRead || q.Subtree != path || q.Path != instancePrefix+path {
			t.Errorf("a request for %s asks for %s %q", path, q.Action, q.Subtree)
		}
		names, err := ParseSubtree(strings.ToLower(path))
		if Within(path, "compute/tagsList") && path != "compute/tagsList" {
			continue // refused, see TestParseSubtreeErrors
		}
		if err != nil || names[0] != path {
			t.Errorf("a policy calls %s %v, %v", path, names, err)
		}
		for _, name := range names {
			back, err := ParseSubtree(name)
			if err != nil || !slices.Contains(back, path) || len(back) != len(names) {
				t.Errorf("%s has the names %v, and %s has %v, %v", path, names, name, back, err)
			}
		}
	}
}
