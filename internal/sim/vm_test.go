package sim

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDefaultVM(t *testing.T) {
	vm := DefaultVM()
	if vm.System == nil || len(vm.User) != 2 || vm.Tenant == "" || vm.Extended == nil || vm.Balancer == nil {
		t.Errorf("got %+v", vm)
	}
}

// What the default file leaves out would be filled in silently, and be missed by
// those who read the file to learn the keys.
func TestDefaultFileNamesEveryKey(t *testing.T) {
	root, err := parseYAML("default.yaml", defaultYAML)
	if err != nil {
		t.Fatal(err)
	}
	named, err := reader{file: "default.yaml", partial: true}.read(fileShape, root, "")
	if err != nil {
		t.Fatal(err)
	}
	filled, err := reader{file: "default.yaml"}.read(fileShape, root, "")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(filled, named); diff != "" {
		t.Errorf("(-filled +named):\n%s", diff)
	}
}

func TestMerge(t *testing.T) {
	rows := []struct {
		name, yaml, path string
		want             any
	}{
		{"empty file", "", "instance.compute.name", "vm-sim-0"},
		{"comments only", "# nothing\n", "instance.compute.name", "vm-sim-0"},
		{"null file", "~\n", "instance.compute.name", "vm-sim-0"},
		{"value replaced", "instance: {compute: {name: web-7}}", "instance.compute.name", "web-7"},
		{"neighbours stay", "instance: {compute: {name: web-7}}", "instance.compute.vmSize", "Standard_D2s_v5"},
		{"deep merge", "instance: {compute: {plan: {name: p}}}", "instance.compute.plan", map[string]any{"name": "p", "product": "", "publisher": ""}},
		{"number becomes a string", "instance: {compute: {zone: 3}}", "instance.compute.zone", "3"},
		{"large number stays exact", "instance: {compute: {zone: 12345678901234567890}}", "instance.compute.zone", "12345678901234567890"},
		{"leading zeros stay", "instance: {compute: {zone: 007}}", "instance.compute.zone", "007"},
		{"fraction becomes a string", "instance: {compute: {version: 24.10}}", "instance.compute.version", "24.10"},
		{"truth value becomes a string", "instance: {compute: {isHostCompatibilityLayerVm: True}}", "instance.compute.isHostCompatibilityLayerVm", "true"},
		{"date stays", "instance: {compute: {version: 2024-01-01}}", "instance.compute.version", "2024-01-01"},
		{"null takes away", "instance: {compute: {host: null}}", "instance.compute.host", nil},
		{"list replaced and its elements completed", "instance: {network: {interface: [{macAddress: A}]}}", "instance.network.interface",
			[]any{map[string]any{
				"ipv4":       map[string]any{"ipAddress": []any{}, "subnet": []any{}},
				"ipv6":       map[string]any{"ipAddress": []any{}},
				"macAddress": "A",
			}}},
		{"list emptied", "instance: {network: {interface: []}}", "instance.network.interface", []any{}},
		{"tagsList follows tags", "instance: {compute: {tags: 'a:1;b:x:y'}}", "instance.compute.tagsList",
			[]any{map[string]any{"name": "a", "value": "1"}, map[string]any{"name": "b", "value": "x:y"}}},
		{"tagsList follows empty tags", "instance: {compute: {tags: ''}}", "instance.compute.tagsList", []any{}},
		{"tags follow tagsList", "instance: {compute: {tagsList: [{name: a, value: 1}, {name: b}]}}", "instance.compute.tags", "a:1;b:"},
		{"both given", "instance: {compute: {tags: 'a:1', tagsList: []}}", "instance.compute.tagsList", []any{}},
		{"tags given and tagsList taken away", "instance: {compute: {tags: 'a:1', tagsList: null}}", "instance.compute.tagsList", nil},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			vm := vmWith(t, row.yaml)
			got := lookup(map[string]any{"instance": vm.Instance}, strings.Split(row.path, ".")...)
			if diff := cmp.Diff(row.want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", row.path, diff)
			}
		})
	}
}

func TestMergeIdentity(t *testing.T) {
	vm := vmWith(t, `
identity:
  tenantId: t
  system: {clientId: mine}
  userAssigned: [{clientId: c, objectId: o, resourceId: /r}]
  resources: [https://vault.azure.net]
instance: {compute: {resourceId: /vm}}
loadbalancer: {inboundRules: [{frontendPort: 8080}], outboundRules: []}
extended: {compute: {hasCustomData: true}}
`)
	want := &VM{
		Versions: allVersions, Instance: vm.Instance, Tenant: "t",
		System:    &Identity{ClientID: "mine", ObjectID: "5a5a0000-0000-0000-0000-0000000000f1", ResourceID: "/vm"},
		User:      []Identity{{ClientID: "c", ObjectID: "o", ResourceID: "/r"}},
		Resources: []string{"https://vault.azure.net"},
		Balancer: map[string]any{
			"publicIpAddresses": []any{map[string]any{"frontendIpAddress": "203.0.113.10", "privateIpAddress": "10.0.0.4"}},
			"inboundRules": []any{map[string]any{"frontendIpAddress": "", "protocol": "", "frontendPort": 8080,
				"backendPort": 0, "privateIpAddress": ""}},
			"outboundRules": []any{},
		},
		Extended: map[string]any{"compute": map[string]any{"hasCustomData": true, "ppsType": "None"}},
	}
	if diff := cmp.Diff(want, vm); diff != "" {
		t.Errorf("VM (-want +got):\n%s", diff)
	}
}

func TestBadFiles(t *testing.T) {
	rows := []struct{ name, yaml, want string }{
		{"unknown key", "instance:\n  compute:\n    vmName: x\n", `vm.yaml:3: instance.compute: unknown key "vmName": want one of additionalCapabilities, azEnvironment,`},
		{"unknown key at the top", "compute: {}\n", `vm.yaml:1: file: unknown key "compute": want one of extended, identity, instance, loadbalancer, reprovisiondata, versions`},
		{"key in another letter case", "instance:\n  compute: {VMID: x}\n", `vm.yaml:2: instance.compute: unknown key "VMID"`},
		{"mapping for a value", "instance:\n  compute:\n    vmSize: {a: b}\n", "vm.yaml:3: instance.compute.vmSize: want a single value, got a mapping"},
		{"list for a value", "instance:\n  compute:\n    vmSize: [a]\n", "vm.yaml:3: instance.compute.vmSize: want a single value, got a list"},
		{"value for a mapping", "instance:\n  compute: here\n", `vm.yaml:2: instance.compute: want a mapping, got "here"`},
		{"value for a list", "instance:\n  network:\n    interface: eth0\n", `vm.yaml:3: instance.network.interface: want a list, got "eth0"`},
		{"deep in a list", "instance:\n  network:\n    interface:\n      - macAddress: A\n      - ipv4: {ipAddress: [7]}\n", `vm.yaml:5: instance.network.interface[1].ipv4.ipAddress[0]: want a mapping, got "7"`},
		{"null in a list", "versions:\n  - null\n", "vm.yaml:2: versions[0]: want a single value, got null"},
		{"word for a number", "loadbalancer:\n  inboundRules:\n    - frontendPort: http\n", `vm.yaml:3: loadbalancer.inboundRules[0].frontendPort: want a whole number, got "http"`},
		{"quoted number", "loadbalancer: {inboundRules: [{frontendPort: '80'}]}\n", `vm.yaml:1: loadbalancer.inboundRules[0].frontendPort: want a whole number, got "80"`},
		{"word for a truth value", "extended: {compute: {hasCustomData: 'yes'}}\n", `vm.yaml:1: extended.compute.hasCustomData: want true or false, got "yes"`},
		{"key twice", "instance:\n  compute:\n    name: a\n    name: b\n", `vm.yaml:4: instance.compute: key "name" a second time, after line 3`},
		{"several at once", "a: 1\nb: 2\n", "vm.yaml:2: file: unknown key \"b\""},
		{"alias", "instance:\n  compute:\n    name: &n x\n    location: *n\n", "vm.yaml:4: instance.compute.location: want a single value, got an alias"},
		{"list for the file", "- a\n", "vm.yaml:1: file: want a mapping, got a list"},
		{"two documents", "{}\n---\n{}\n", "vm.yaml: want one YAML document, got several"},
		{"bad second document", "{}\n---\n[\n", "vm.yaml: want one YAML document, got several"},
		{"not YAML", "instance:\n  compute: {\n", "vm.yaml:"},
		{"incomplete identity", "identity:\n  userAssigned:\n    - clientId: a\n      resourceId: /r\n", `vm.yaml:3: identity.userAssigned[0]: key "objectId" is missing`},
		{"empty identity", "identity:\n  userAssigned:\n    - {clientId: '', objectId: o, resourceId: /r}\n", `vm.yaml:3: identity.userAssigned[0]: key "clientId" is missing`},
		{"required key taken away", "identity:\n  system:\n    clientId: null\n", `vm.yaml:3: identity.system: key "clientId" cannot be null`},
		{"one id for two identities", "identity: {userAssigned: [{clientId: a, objectId: o, resourceId: /r}, {clientId: A, objectId: p, resourceId: /s}]}", `vm.yaml: identity: "A" stands for two identities`},
		{"unknown version", "versions: [2022-01-01]", `vm.yaml: versions: unknown api-version "2022-01-01": want some of 2017-03-01,`},
		{"versions out of order", "versions: [2019-06-01, 2017-04-02]", "vm.yaml: versions: 2017-04-02 after 2019-06-01: want them oldest first"},
		{"no versions", "versions: []", "vm.yaml: versions: want at least one"},
		{"no instance", "instance: null", "vm.yaml: instance: cannot be null"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			_, err := ParseVM("vm.yaml", []byte(row.yaml))
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("got  %v\nwant %s", err, row.want)
			}
		})
	}
}

func TestLoadVM(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.yaml")
	if _, err := LoadVM(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: got %v, want fs.ErrNotExist", err)
	}
	if err := os.WriteFile(path, []byte("instance: {compute: {name: from-file}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	vm, err := LoadVM(path)
	if err != nil || vm.compute("name") != "from-file" {
		t.Errorf("got %v %v", vm, err)
	}
}
