// Package redirect knows, on Windows, the policies of the Host Networking Service.
package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/Microsoft/hnslib/hcn"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/windows"
)

// OpenEndpoints is the system's own HNS. It returns errors.ErrUnsupported, with the
// name of the function that is missing, where there is none.
func OpenEndpoints() (*Endpoints, error) {
	dll := windows.NewLazySystemDLL("computenetwork.dll")
	for _, f := range []string{"HcnEnumerateEndpoints", "HcnOpenEndpoint", "HcnQueryEndpointProperties", "HcnModifyEndpoint", "HcnCloseEndpoint"} {
		if dll.NewProc(f).Find() != nil {
			return nil, fmt.Errorf("computenetwork.dll, or its function %s, is missing: %w", f, errors.ErrUnsupported)
		}
	}
	logrus.SetOutput(io.Discard) // the library's own words
	return &Endpoints{hns: hostNetworking{}}, nil
}

// hostNetworking is HNS by hnslib.
type hostNetworking struct{}

func (hostNetworking) supports(policy string) error {
	var err error
	switch policy {
	case PolicyWFPProxy:
		err = hcn.L4WfpProxyPolicySupported()
	case PolicyProxy:
		err = hcn.L4proxyPolicySupported()
	default:
		_, err = hcn.GetCachedSupportedFeatures()
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	return nil
}

func (hostNetworking) endpoints() ([]endpoint, error) {
	list, err := hcn.ListEndpoints()
	if err != nil {
		return nil, fmt.Errorf("list endpoints: %w", err)
	}
	var all []endpoint
	for _, h := range list {
		ep := endpoint{id: h.Id}
		for _, c := range h.IpConfigurations {
			if a, err := netip.ParseAddr(c.IpAddress); err == nil {
				ep.addrs = append(ep.addrs, a)
			}
		}
		for _, p := range h.Policies {
			ep.policies = append(ep.policies, rawPolicy{string(p.Type), p.Settings})
		}
		all = append(all, ep)
	}
	return all, nil
}

func (hostNetworking) modify(id string, request []byte) error {
	var r hcn.ModifyEndpointSettingRequest
	if err := json.Unmarshal(request, &r); err != nil {
		return err
	}
	return hcn.ModifyEndpointSettings(id, &r)
}
