package redirect

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/Microsoft/hnslib/hcn"
	"golang.org/x/sys/windows"
)

// TestPolicyJSONIsTheLibrarys makes the same requests with hnslib's types.
func TestPolicyJSONIsTheLibrarys(t *testing.T) {
	for name, settings := range map[string]any{
		"acl": hcn.AclPolicySetting{Protocols: "6", Action: hcn.ActionTypeBlock, Direction: hcn.DirectionTypeOut, RemoteAddresses: "169.254.169.254",
			RemotePorts: "80", RuleType: hcn.RuleTypeSwitch, Priority: aclPriority},
		"l4wfpproxy": hcn.L4WfpProxyPolicySetting{OutboundProxyPort: "15080", UserSID: "S-1-5-18",
			FilterTuple: hcn.FiveTuple{Protocols: "6", RemoteAddresses: "169.254.169.254", RemotePorts: "80", Priority: 1}},
		"l4proxy": hcn.L4ProxyPolicySetting{IP: "169.254.169.254", Port: "80", Protocol: hcn.ProtocolTypeTCP, Destination: "10.0.1.7:80", OutboundNAT: true},
	} {
		p := examples()[name]
		s, err := json.Marshal(settings)
		if err != nil {
			t.Fatal(err)
		}
		policies, err := json.Marshal(hcn.PolicyEndpointRequest{Policies: []hcn.EndpointPolicy{{Type: hcn.EndpointPolicyType(p.Type), Settings: s}}})
		if err != nil {
			t.Fatal(err)
		}
		want, err := json.Marshal(hcn.ModifyEndpointSettingRequest{ResourceType: hcn.EndpointResourceTypePolicy, RequestType: hcn.RequestTypeAdd, Settings: policies})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := request("Add", p); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: got  %s, %v\nwant %s", name, got, err, want)
		}
	}
}

// TestNoHNS is a system without HNS: the error names what is missing.
func TestNoHNS(t *testing.T) {
	if windows.NewLazySystemDLL("computenetwork.dll").Load() == nil {
		t.Skip("there is an HNS here")
	}
	if _, err := OpenEndpoints(); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "HcnEnumerateEndpoints") {
		t.Errorf("got %v", err)
	}
}
