package sim

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestVersions(t *testing.T) {
	a := newBench(t, Config{}).get("/metadata/versions")
	got := decode[map[string][]string](t, a)["apiVersions"]
	if len(got) != 35 || got[0] != "2017-03-01" || got[34] != "2025-04-07" || !slices.IsSorted(got) {
		t.Errorf("got %d versions %v", len(got), got)
	}
}

func TestNewestInstance(t *testing.T) {
	golden, err := os.ReadFile("testdata/instance-newest.json")
	if err != nil {
		t.Fatal(err)
	}
	var want any
	if err := json.Unmarshal(golden, &want); err != nil {
		t.Fatal(err)
	}
	a := newBench(t, Config{}).get("/metadata/instance?api-version=2025-04-07")
	if diff := cmp.Diff(want, decode[any](t, a)); diff != "" {
		t.Errorf("instance (-want +got):\n%s", diff)
	}
	if got := requestID(a); len(got) != 36 {
		t.Errorf("got x-ms-request-id %q, want a UUID", got)
	}
	if got := a.Header.Get("Server"); got != "IMDS/150.870.65.1854" {
		t.Errorf("got Server %q", got)
	}
	if got := a.Header.Get("Content-Type"); got != "application/json; charset=utf-8" {
		t.Errorf("got Content-Type %q", got)
	}
}

// requestID is found by its name in the service's letter case, which Go's own
// look-up would not find.
func requestID(a answer) string {
	for name, values := range a.Header {
		if name == "x-ms-request-id" && len(values) == 1 {
			return values[0]
		}
	}
	return ""
}

func TestOldestInstance(t *testing.T) {
	const want = `{"compute":{"location":"westeurope","name":"vm-sim-0","offer":"ubuntu-24_04-lts","osType":"Linux",` +
		`"platformFaultDomain":"0","platformUpdateDomain":"0","publisher":"canonical","sku":"server","version":"24.04.202601010",` +
		`"vmId":"5f0d5b1e-7c1a-4a0e-9a53-000000000001","vmSize":"Standard_D2s_v5"},` +
		`"network":{"interface":[{"ipv4":{"ipAddress":[{"privateIpAddress":"10.0.0.4","publicIpAddress":""}],` +
		`"subnet":[{"address":"10.0.0.0","prefix":"24"}]},"ipv6":{"ipAddress":[]},"macAddress":"000D3AF806EC"}]}}`
	a := newBench(t, Config{}).get("/metadata/instance?api-version=2017-04-02")
	if a.Body != want {
		t.Errorf("got  %s\nwant %s", a.Body, want)
	}
}

// The table of docs/protocol-azure.md §1.6: each field is there from its version on,
// and not in the version before.
func TestFieldsAppearWithTheirVersion(t *testing.T) {
	since := map[string]string{
		"additionalCapabilities/hibernationEnabled": "2021-11-01", "azEnvironment": "2018-10-01", "customData": "2019-02-01",
		"evictionPolicy": "2020-12-01", "extendedLocation/type": "2021-03-01", "host/id": "2021-11-15", "hostGroup/id": "2021-11-15",
		"isHostCompatibilityLayerVm": "2020-06-01", "licenseType": "2020-09-01", "osProfile/adminUsername": "2020-07-15",
		"osProfile/computerName": "2020-07-15", "osProfile/disablePasswordAuthentication": "2020-10-01", "physicalZone": "2023-11-15",
		"placementGroupId": "2017-08-01", "plan/name": "2018-04-02", "platformSubFaultDomain": "2021-10-01", "priority": "2020-12-01",
		"provider": "2018-10-01", "publicKeys/0/keyData": "2018-04-02", "resourceGroupName": "2017-08-01", "resourceId": "2019-03-11",
		"securityProfile/secureBootEnabled": "2020-06-01", "securityProfile/virtualTpmEnabled": "2020-06-01",
		"securityProfile/encryptionAtHost": "2021-11-01", "securityProfile/securityType": "2021-12-13",
		"storageProfile/osDisk/name": "2019-06-01", "storageProfile/dataDisks/0/lun": "2019-06-01", "storageProfile/resourceDisk/size": "2021-02-01",
		"storageProfile/imageReference/exactVersion":            "2023-07-01",
		"storageProfile/imageReference/communityGalleryImageId": "2023-07-01", "storageProfile/imageReference/sharedGalleryImageId": "2023-07-01",
		"subscriptionId": "2017-08-01", "tags": "2017-08-01", "tagsList/0/name": "2019-06-04", "userData": "2021-01-01",
		"virtualMachineScaleSet/id": "2021-03-01", "vmScaleSetName": "2017-12-01", "zone": "2017-12-01",
	}
	b := newBench(t, Config{})
	status := func(field, version string) int {
		return b.get("/metadata/instance/compute/" + field + "?format=text&api-version=" + version).Status
	}
	for field, first := range since {
		before := allVersions[slices.Index(allVersions, first)-1]
		if got := status(field, first); got != 200 {
			t.Errorf("%s at %s: got %d, want 200", field, first, got)
		}
		if got := status(field, before); got != 404 {
			t.Errorf("%s at %s: got %d, want 404", field, before, got)
		}
	}
}

func TestWalk(t *testing.T) {
	vm := vmWith(t, "instance: {compute: {userData: c2VjcmV0, tags: 'a:<1>;b:&'}}")
	rows := []struct{ name, path, query, body string }{
		{"subtree", "compute/plan", "", `{"name":"","product":"","publisher":""}`},
		{"array", "compute/tagsList", "&format=json", `[{"name":"a","value":"<1>"},{"name":"b","value":"&"}]`},
		{"array element", "network/interface/0/ipv4/subnet/0", "", `{"address":"10.0.0.0","prefix":"24"}`},
		{"empty array", "network/interface/0/ipv6/ipAddress", "", `[]`},
		{"leaf", "compute/vmSize", "&format=text", `Standard_D2s_v5`},
		{"leaf below an array", "compute/tagsList/1/name", "&format=text", `b`},
		{"number as text", "compute/storageProfile/osDisk/diskSizeGB", "&format=text", `30`},
		{"user data", "compute/userData", "&format=text", `c2VjcmV0`},
		{"empty leaf", "compute/licenseType", "&format=text", ``},
		{"leaf with slash", "compute/vmSize/", "&format=text", `Standard_D2s_v5`},
		{"node with slash", "compute/plan/", "", `{"name":"","product":"","publisher":""}`},
		{"root as text", "", "&format=text", "compute/\nnetwork/"},
		{"node as text", "compute/storageProfile/osDisk/managedDisk", "&format=text", "id\nstorageAccountType"},
		{"node with nodes as text", "compute/storageProfile", "&format=text", "dataDisks/\nimageReference/\nosDisk/\nresourceDisk/"},
		{"array as text", "compute/tagsList", "&format=text", "0/\n1/"},
		{"empty array as text", "network/interface/0/ipv6/ipAddress", "&format=text", ""},
	}
	b := newBench(t, Config{VM: vm})
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			a := b.get("/metadata/instance/" + row.path + "?api-version=2021-02-01" + row.query)
			if a.Status != 200 || a.Body != row.body {
				t.Errorf("got %d %q, want 200 %q", a.Status, a.Body, row.body)
			}
			want := "application/json; charset=utf-8"
			if strings.Contains(row.query, "text") {
				want = "text/plain; charset=utf-8"
			}
			if got := a.Header.Get("Content-Type"); got != want {
				t.Errorf("got Content-Type %q, want %q", got, want)
			}
		})
	}
}

// What cloud-init does at boot: ask for extended data at a version that may be
// unknown, step down on 400 only, and take 404 for "not yet".
func TestCloudInit(t *testing.T) {
	const (
		extended = "/metadata/instance?api-version=2021-08-01&extended=true"
		older    = "/metadata/instance?api-version=2019-06-01"
	)
	t.Run("extended", func(t *testing.T) {
		got := decode[map[string]any](t, newBench(t, Config{}).get(extended))
		want := map[string]any{"compute": map[string]any{"hasCustomData": false, "ppsType": "None"}}
		if diff := cmp.Diff(want, got["extended"]); diff != "" || got["compute"] == nil || got["network"] == nil {
			t.Errorf("got %v, extended (-want +got):\n%s", got, diff)
		}
	})
	t.Run("steps down from an unknown version", func(t *testing.T) {
		b := newBench(t, Config{VM: vmWith(t, "versions: [2017-04-02, 2019-06-01]")})
		a := b.get(extended)
		if a.Status != 400 || !strings.Contains(a.Body, `"newest-versions":["2019-06-01","2017-04-02"]`) {
			t.Errorf("got %d %s, want 400 with the versions that are there", a.Status, a.Body)
		}
		if got := decode[map[string]any](t, b.get(older)); got["compute"] == nil {
			t.Errorf("got %v", got)
		}
	})
	t.Run("extended means nothing to an older version", func(t *testing.T) {
		if got := decode[map[string]any](t, newBench(t, Config{}).get(older+"&extended=true")); got["extended"] != nil {
			t.Errorf("got %v", got["extended"])
		}
	})
	t.Run("early in the boot", func(t *testing.T) {
		b := newBench(t, Config{Faults: []Fault{{Partial: true, Count: 2}}})
		if a := b.get(extended); a.Status != 404 {
			t.Errorf("extended: got %d, want 404: all or nothing", a.Status)
		}
		got := decode[struct {
			Compute struct{ PublicKeys []any }
			Network struct{ Interface []any }
		}](t, b.get("/metadata/instance?api-version=2021-08-01"))
		if len(got.Network.Interface) != 0 || len(got.Compute.PublicKeys) != 0 {
			t.Errorf("got %v, want no interface and no key", got)
		}
		if a := b.get("/metadata/instance/network/interface/0?api-version=2021-08-01"); a.Status != 200 {
			t.Errorf("afterwards: got %d, want 200", a.Status)
		}
	})
	t.Run("reprovisioning", func(t *testing.T) {
		b := newBench(t, Config{VM: vmWith(t, "reprovisiondata: <Environment/>")})
		if a := b.get("/metadata/reprovisiondata?api-version=2019-06-01"); a.Status != 200 || a.Body != "<Environment/>" {
			t.Errorf("got %d %s", a.Status, a.Body)
		}
	})
}

func TestLoadBalancerHasNumbers(t *testing.T) {
	const want = `{"loadbalancer":{"inboundRules":[{"backendPort":443,"frontendIpAddress":"203.0.113.10","frontendPort":80,"privateIpAddress":"10.0.0.4","protocol":"tcp"}],` +
		`"outboundRules":[{"frontendIpAddress":"203.0.113.10","privateIpAddress":"10.0.0.4"}],"publicIpAddresses":[{"frontendIpAddress":"203.0.113.10","privateIpAddress":"10.0.0.4"}]}}`
	a := newBench(t, Config{}).get("/metadata/loadbalancer?api-version=2020-10-01&format=json")
	if a.Status != 200 || a.Body != want {
		t.Errorf("got %d %s\nwant %s", a.Status, a.Body, want)
	}
}
