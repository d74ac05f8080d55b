package sim

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

//go:embed default.yaml
var defaultYAML []byte

// VM is the machine that the simulator plays. Its trees hold map[string]any,
// []any and scalars; in Instance every scalar is a string. A VM is not changed
// by the simulator, and must not be changed while one uses it.
type VM struct {
	Versions []string       // api-versions offered, oldest first
	Instance map[string]any // "compute" and "network", in their newest form
	Extended map[string]any // what extended=true adds; nil adds nothing

	Tenant    string     // the Entra tenant's id
	System    *Identity  // the system-assigned identity; nil means that it is off
	User      []Identity // the user-assigned identities
	Resources []string   // what tokens are issued for; empty means any URI or GUID

	Balancer    map[string]any // nil: no Standard load balancer, 404
	Reprovision string         // "" means 404
}

// Identity is a managed identity.
type Identity struct {
	ClientID, ObjectID string
	ResourceID         string // of a system-assigned identity: the VM's own
}

// DefaultVM returns the VM of the embedded default file: one system-assigned
// and two user-assigned identities, all fields of the newest api-version.
func DefaultVM() *VM {
	vm, err := ParseVM("default.yaml", nil)
	if err != nil {
		panic(err) // the embedded file; held by a test
	}
	return vm
}

// LoadVM reads an instance file and lays it over the default; see ParseVM.
func LoadVM(path string) (*VM, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err // names the file
	}
	return ParseVM(path, data)
}

// ParseVM reads an instance file and lays it over the default: mappings are
// merged key by key, lists and single values replaced as a whole, null takes a
// key away, and of tags and tagsList the one that is not given follows the
// other. Unknown keys, keys given twice and wrong types are errors, one a line,
// each of the form "file:line: path: what was wanted".
func ParseVM(file string, data []byte) (*VM, error) {
	root, err := parseYAML("default.yaml", defaultYAML)
	if err != nil {
		return nil, err
	}
	over, err := parseYAML(file, data)
	if err != nil {
		return nil, err
	}
	var given any
	if over != nil {
		if given, err = (reader{file: file, partial: true}).read(fileShape, over, ""); err != nil {
			return nil, err
		}
		root = merge(root, over)
	}
	all, err := reader{file: file}.read(fileShape, root, "")
	if err != nil {
		return nil, err
	}
	vm, err := newVM(all.(map[string]any))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	followTags(vm.Instance, given)
	return vm, nil
}

// newVM takes what was read, which has the shape of a file, apart.
func newVM(all map[string]any) (*VM, error) {
	vm := &VM{Versions: allVersions}
	vm.Instance, _ = all["instance"].(map[string]any)
	if vm.Instance == nil {
		return nil, errors.New("instance: cannot be null")
	}
	vm.Extended, _ = all["extended"].(map[string]any)
	vm.Balancer, _ = all["loadbalancer"].(map[string]any)
	vm.Reprovision, _ = all["reprovisiondata"].(string)
	if v, ok := all["versions"]; ok {
		vm.Versions = texts(v)
	}
	if id, ok := all["identity"].(map[string]any); ok {
		vm.Tenant = id["tenantId"].(string)
		vm.Resources = texts(id["resources"])
		if sys, ok := id["system"].(map[string]any); ok {
			one := identityOf(sys)
			one.ResourceID = vm.compute("resourceId")
			vm.System = &one
		}
		users, _ := id["userAssigned"].([]any)
		for _, u := range users {
			vm.User = append(vm.User, identityOf(u.(map[string]any)))
		}
	}
	return vm, vm.check()
}

func identityOf(m map[string]any) Identity {
	field := func(name string) string { v, _ := m[name].(string); return v }
	return Identity{ClientID: field("clientId"), ObjectID: field("objectId"), ResourceID: field("resourceId")}
}

// check finds what a shape cannot say.
func (vm *VM) check() error {
	if len(vm.Versions) == 0 {
		return errors.New("versions: want at least one")
	}
	for i, v := range vm.Versions {
		if !slices.Contains(allVersions, v) {
			return fmt.Errorf("versions: unknown api-version %q: want some of %s", v, strings.Join(allVersions, ", "))
		}
		if i > 0 && v <= vm.Versions[i-1] {
			return fmt.Errorf("versions: %s after %s: want them oldest first", v, vm.Versions[i-1])
		}
	}
	seen := make(map[string]bool)
	for _, id := range vm.identities() {
		for _, name := range []string{id.ClientID, id.ObjectID, id.ResourceID} {
			if seen[strings.ToLower(name)] {
				return fmt.Errorf("identity: %q stands for two identities", name)
			}
			seen[strings.ToLower(name)] = true
		}
	}
	return nil
}

// identities are all of the VM's, the system-assigned one first.
func (vm *VM) identities() []Identity {
	if vm.System == nil {
		return vm.User
	}
	return append([]Identity{*vm.System}, vm.User...)
}

// compute is a text field of the instance's compute part, "" if it has none.
func (vm *VM) compute(name string) string {
	c, _ := vm.Instance["compute"].(map[string]any)
	v, _ := c[name].(string)
	return v
}

func texts(v any) []string {
	var out []string
	elems, _ := v.([]any)
	for _, e := range elems {
		s, _ := e.(string)
		out = append(out, s)
	}
	return out
}

// followTags makes tagsList from tags or the other way, when the user's file
// has given only one of them.
func followTags(instance map[string]any, given any) {
	compute, _ := instance["compute"].(map[string]any)
	tags, hasTags := lookup(given, "instance", "compute", "tags").(string)
	pairs, hasList := lookup(given, "instance", "compute", "tagsList").([]any)
	_, showsTags := compute["tags"]
	_, showsList := compute["tagsList"]
	switch {
	case hasTags && !hasList && showsList:
		out := []any{}
		for pair := range strings.SplitSeq(tags, ";") {
			if name, value, _ := strings.Cut(pair, ":"); name != "" {
				out = append(out, map[string]any{"name": name, "value": value})
			}
		}
		compute["tagsList"] = out
	case hasList && !hasTags && showsTags:
		var out []string
		for _, p := range pairs {
			name, _ := lookup(p, "name").(string)
			value, _ := lookup(p, "value").(string)
			out = append(out, name+":"+value)
		}
		compute["tags"] = strings.Join(out, ";")
	}
}

func lookup(v any, path ...string) any {
	for _, name := range path {
		m, _ := v.(map[string]any)
		v = m[name]
	}
	return v
}
