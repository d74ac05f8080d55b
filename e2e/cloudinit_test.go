//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"testing"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/netns"
	"imdsgate/internal/sim"
)

// What cloud-init asks for (canonical/cloud-init, cloudinit/sources/azure/imds.py).
const (
	imdsRoot       = "http://169.254.169.254/metadata"
	extendedURL    = imdsRoot + "/instance?api-version=2021-08-01&extended=true"
	fallbackURL    = imdsRoot + "/instance?api-version=2019-06-01"
	reprovisionURL = imdsRoot + "/reprovisiondata?api-version=2019-06-01"
)

// cloudInit asks as cloud-init does at boot, but for the second that it waits
// before it tries again.
type cloudInit struct {
	ns       *netns.Handle
	statuses []int    // of all answers
	ids      []string // x-ms-client-request-id of all requests
}

// maxTries stands in for cloud-init's deadline.
const maxTries = 10

// get asks for a URL until there is an answer other than those on which
// cloud-init tries again.
func (ci *cloudInit) get(t *testing.T, url string) (status int, body []byte) {
	t.Helper()
	for range maxTries {
		status, body = ci.once(t, url)
		if !slices.Contains([]int{404, 410, 429, 500}, status) {
			return status, body
		}
	}
	t.Fatalf("%s: still %d after %d tries: %s", url, status, maxTries, body)
	return 0, nil
}

// once sends what cloud-init's HTTP library sends, over a new connection.
func (ci *cloudInit) once(t *testing.T, url string) (status int, body []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	ok(t, err)
	id := fmt.Sprintf("00000000-0000-4000-8000-%012d", len(ci.ids))
	for name, value := range map[string]string{
		"Metadata": "true", "x-ms-client-request-id": id, "User-Agent": "Cloud-Init/25.1",
		"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "Connection": "keep-alive",
	} {
		req.Header.Set(name, value)
	}
	client := inside(ci.ns)
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	ok(t, err)
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	ok(t, err)
	ci.ids, ci.statuses = append(ci.ids, id), append(ci.statuses, resp.StatusCode)
	return resp.StatusCode, body
}

// metadata is what cloud-init's fetch_metadata_with_api_fallback does: the
// extended document, or, from a service that does not know it, the plain one.
func (ci *cloudInit) metadata(t *testing.T) (status int, body []byte) {
	t.Helper()
	status, body = ci.get(t, extendedURL)
	if status == http.StatusBadRequest {
		status, body = ci.get(t, fallbackURL)
	}
	return status, body
}

// bootData is what cloud-init reads of the document.
type bootData struct {
	Compute struct {
		Name      string
		OSProfile struct{ AdminUsername, ComputerName, DisablePasswordAuthentication string }
		// Keys for the admin's login.
		PublicKeys []struct{ KeyData, Path string }
		UserData   string
	}
	Network struct {
		Interface []struct {
			MACAddress string
			IPv4       struct {
				IPAddress []struct{ PrivateIPAddress string }
				Subnet    []struct{ Address, Prefix string }
			}
		}
	}
	Extended *struct {
		Compute struct {
			HasCustomData *bool // a truth value, unlike all in the plain document
			PPSType       string
		}
	}
}

const (
	provisioningPolicy = "allow: [instance.read, instance.provisioning]\n"
	userdataPolicy     = "allow: [instance.read, instance.provisioning, instance.userdata]\n"
	withUserData       = "instance: {compute: {userData: I2Nsb3VkLWNvbmZpZw==}}\n"
)

func TestCloudInit(t *testing.T) {
	for _, c := range []struct {
		name, policy, instance string
		sim                    []string
		want                   []int // statuses
		extended               bool
		userData               string
	}{
		{name: "extended", policy: provisioningPolicy, want: []int{200}, extended: true},
		{name: "old_service_falls_back", policy: provisioningPolicy, instance: "versions: [2018-10-01, 2019-06-01]\n", want: []int{400, 200}},
		{name: "early_in_boot", policy: provisioningPolicy, sim: []string{"--fault", "partial,count=2"}, want: []int{404, 404, 200}, extended: true},
		{name: "service_comes_and_goes", policy: provisioningPolicy,
			sim:  []string{"--fault", "status=410,count=1", "--fault", "status=429,count=1", "--fault", "status=500,count=1"},
			want: []int{410, 429, 500, 200}, extended: true},
		{name: "user_data_allowed", policy: userdataPolicy, instance: withUserData, want: []int{200}, extended: true, userData: "I2Nsb3VkLWNvbmZpZw=="},
		{name: "user_data_blanked", policy: provisioningPolicy, instance: withUserData, want: []int{200}, extended: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			// Its request ids come to the service only if its answers are its own.
			b := start(t, setup{policy: c.policy, instance: c.instance, sim: append(c.sim, "--limits", "off"), proxy: []string{"--cache=off", "--budget=off"}, containers: []string{"boot"}})
			ci := &cloudInit{ns: b.containers["boot"].NS}
			status, body := ci.metadata(t)
			if status != http.StatusOK || !slices.Equal(ci.statuses, c.want) {
				t.Fatalf("got statuses %v, want %v: %s", ci.statuses, c.want, body)
			}
			checkBoot(t, body, c.extended, c.userData)
			checkRequestIDs(t, b.history(t), ci.ids)
			b.onlyTheVM(t)
		})
	}
}

// checkBoot compares what cloud-init reads with the simulator's VM.
func checkBoot(t *testing.T, body []byte, extended bool, userData string) {
	t.Helper()
	var got, want bootData
	ok(t, json.Unmarshal(body, &got))
	text, err := json.Marshal(sim.DefaultVM().Instance)
	ok(t, err)
	ok(t, json.Unmarshal(text, &want))
	if got.Compute.Name != want.Compute.Name || len(want.Compute.PublicKeys) == 0 || !slices.Equal(got.Compute.PublicKeys, want.Compute.PublicKeys) {
		t.Errorf("compute: got %+v, want %+v", got.Compute, want.Compute)
	}
	if g, w := fmt.Sprint(got.Network), fmt.Sprint(want.Network); g != w {
		t.Errorf("network: got %s, want %s", g, w)
	}
	if got.Compute.UserData != userData {
		t.Errorf("user data: got %q, want %q", got.Compute.UserData, userData)
	}
	if !extended {
		if got.Extended != nil {
			t.Errorf("got extended data from a service that has none: %+v", got.Extended)
		}
		return
	}
	if got.Compute.OSProfile != want.Compute.OSProfile {
		t.Errorf("osProfile: got %+v, want %+v", got.Compute.OSProfile, want.Compute.OSProfile)
	}
	if e := got.Extended; e == nil || e.Compute.PPSType != "None" || e.Compute.HasCustomData == nil || *e.Compute.HasCustomData {
		t.Errorf("extended: got %+v, want ppsType None and hasCustomData false", e)
	}
}

// checkRequestIDs checks that each request came to the service under the id that
// cloud-init gave it.
func checkRequestIDs(t *testing.T, history []sim.Exchange, want []string) {
	t.Helper()
	var got []string
	for _, e := range history {
		got = append(got, e.Header.Get("X-Ms-Client-Request-Id"))
	}
	if !slices.Equal(got, want) {
		t.Errorf("the service saw request ids %v, want %v", got, want)
	}
}

// What a pre-provisioned VM waits for comes through unchanged.
func TestCloudInitReprovisionData(t *testing.T) {
	const ovf = `<ns0:Environment xmlns:ns0="http://schemas.dmtf.org/ovf/environment/1"/>`
	b := start(t, setup{policy: provisioningPolicy, instance: "reprovisiondata: '" + ovf + "'\n", containers: []string{"boot"}})
	ci := &cloudInit{ns: b.containers["boot"].NS}
	if status, body := ci.get(t, reprovisionURL); status != http.StatusOK || string(body) != ovf {
		t.Errorf("got %d %s, want 200 %s", status, body, ovf)
	}
}

// Under the default policy cloud-init in a container learns at once that it is
// not for it, and why; a 400 would send it on to the fallback.
func TestCloudInitDenied(t *testing.T) {
	const want = `{"error":"imdsgate policy: container boot: no rule allows instance.provisioning: add {match: {name: boot}, allow: [instance.provisioning]} to the policy's rules"}`
	b := start(t, setup{containers: []string{"boot"}})
	for _, url := range []string{extendedURL, reprovisionURL} {
		ci := &cloudInit{ns: b.containers["boot"].NS}
		if status, body := ci.get(t, url); status != http.StatusForbidden || string(body) != want {
			t.Errorf("%s: got %d %s, want 403 %s", url, status, body, want)
		}
	}
	if all := b.history(t); len(all) != 0 {
		t.Errorf("the service was asked: %+v", all)
	}
	for _, e := range b.events(t)["static:boot"] {
		if e.Decision != audit.Deny || e.Action != imds.InstanceProvisioning {
			t.Errorf("event %d: got %s of %s, want deny of %s", e.ID, e.Decision, e.Action, imds.InstanceProvisioning)
		}
	}
}
