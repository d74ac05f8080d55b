package redirect

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var (
	imds    = netip.MustParseAddrPort("169.254.169.254:80")
	address = netip.MustParseAddr("10.0.1.9")
)

func examples() map[string]Policy {
	return map[string]Policy{
		"acl":        BlockPolicy(imds, "Switch"),
		"l4wfpproxy": WFPProxyPolicy(imds, 15080, "S-1-5-18"),
		"l4proxy":    ProxyPolicy(imds, netip.MustParseAddrPort("10.0.1.7:80")),
	}
}

// TestPolicyJSON holds the requests to the golden files, which hnslib's own types
// are held to as well (TestPolicyJSONIsTheLibrarys, on Windows).
func TestPolicyJSON(t *testing.T) {
	for name, p := range examples() {
		got, err := request("Add", p)
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join("testdata/hns", name+".json"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(append(got, '\n'), want) {
			t.Errorf("%s: got  %s\nwant %s", name, got, want)
		}
	}
}

// service plays HNS, as far as endpoints go.
type service struct {
	eps     []endpoint
	unknown string // a type of policy
	deaf    bool   // changes succeed, and do nothing
	broken  error
	changes int
	log     []string // what had an effect
}

func (s *service) supports(policy string) error {
	if policy == s.unknown {
		return errors.ErrUnsupported
	}
	return nil
}

func (s *service) endpoints() ([]endpoint, error) { return s.eps, nil }

func (s *service) modify(id string, request []byte) error {
	s.changes++
	var r struct {
		RequestType string
		Settings    struct {
			Policies []struct {
				Type     string
				Settings map[string]any
			}
		}
	}
	if err := json.Unmarshal(request, &r); err != nil || s.deaf || s.broken != nil {
		return errors.Join(err, s.broken)
	}
	for i, ep := range s.eps {
		if ep.id != id {
			continue
		}
		if r.RequestType == "Remove" {
			p := r.Settings.Policies[0]
			b, _ := json.Marshal(p.Settings)
			var gone any
			json.Unmarshal(b, &gone)
			s.eps[i].policies = slices.DeleteFunc(slices.Clone(ep.policies), func(o rawPolicy) bool {
				var got any
				return o.kind == p.Type && json.Unmarshal(o.settings, &got) == nil && within(gone, got)
			})
			s.log = append(s.log, "remove "+p.Type)
			continue
		}
		p := r.Settings.Policies[0]
		s.log = append(s.log, "add "+p.Type)
		delete(p.Settings, "InboundExceptions") // as HNS leaves out what is empty
		p.Settings["Id"] = "1"                  // and adds its own
		b, _ := json.Marshal(p.Settings)
		s.eps[i].policies = append(s.eps[i].policies, rawPolicy{p.Type, b})
	}
	return nil
}

func oneEndpoint() []endpoint {
	return []endpoint{{id: "a", addrs: []netip.Addr{address}}, {id: "b", addrs: []netip.Addr{netip.MustParseAddr("10.0.1.10")}}}
}

func TestEndpoints(t *testing.T) {
	for _, tc := range []struct {
		name string
		s    service
		want string // error of Apply
		left int    // changes
	}{
		{"applied", service{eps: oneEndpoint()}, "", 1},
		{"unknown_policy", service{eps: oneEndpoint(), unknown: PolicyWFPProxy}, "policy L4WFPPROXY: unsupported operation", 0},
		{"no_endpoint", service{}, "endpoint of 10.0.1.9: no endpoint with this address", 0},
		{"overlapping_networks", service{eps: append(oneEndpoint(), oneEndpoint()...)}, "endpoint of 10.0.1.9: several endpoints with this address", 0},
		{"success_without_effect", service{eps: oneEndpoint(), deaf: true}, "endpoint a: Add L4WFPPROXY: read back: " + ErrNoEffect.Error(), 1},
		{"refused", service{eps: oneEndpoint(), broken: errors.New("access denied")}, "endpoint a: Add L4WFPPROXY: access denied", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := &Endpoints{hns: &tc.s}
			policies := []Policy{examples()["l4wfpproxy"]}
			got := ""
			added, err := e.Apply(address, policies)
			if err != nil {
				got = err.Error()
			}
			if got != tc.want || tc.s.changes != tc.left || added != (tc.want == "") {
				t.Fatalf("got %q, added %v, after %d changes, want %q after %d", got, added, tc.s.changes, tc.want, tc.left)
			}
			if tc.want != "" {
				return
			}
			if added, err := e.Apply(address, policies); added || err != nil || tc.s.changes != 1 {
				t.Errorf("again: added %v, %v, after %d changes", added, err, tc.s.changes)
			}
			if len(tc.s.eps[1].policies) != 0 {
				t.Error("another endpoint was changed")
			}
			tc.s.deaf = true
			if err := e.Remove(address, policies); !errors.Is(err, ErrNoEffect) {
				t.Errorf("a removal without effect: got %v", err)
			}
			tc.s.deaf = false
			if err := e.Remove(address, policies); err != nil || len(tc.s.eps[0].policies) != 0 {
				t.Errorf("removal: %v", err)
			}
			tc.s.eps = nil
			if err := e.Remove(address, policies); err != nil {
				t.Errorf("endpoint is gone: %v", err)
			}
		})
	}
}

// TestStalePolicies are of an agent before, or lead to an old proxy.
func TestStalePolicies(t *testing.T) {
	raw := func(p Policy, change ...string) rawPolicy {
		return rawPolicy{p.Type, json.RawMessage(strings.NewReplacer(change...).Replace(strings.Replace(p.JSON(), "{", `{"Id":"7",`, 1)))}
	}
	guard, proxy := BlockPolicy(imds, "Switch"), ProxyPolicy(imds, netip.MustParseAddrPort("10.0.1.7:80"))
	wfp := WFPProxyPolicy(imds, 15080, "")
	oldProxy := raw(proxy, "10.0.1.7", "10.0.1.6")
	for _, tc := range []struct {
		name   string
		there  []rawPolicy
		want   []Policy
		apply  []string // with an effect
		remove []string
	}{
		{"to_an_old_proxy", []rawPolicy{oldProxy}, []Policy{proxy}, []string{"remove L4Proxy", "add L4Proxy"}, []string{"remove L4Proxy"}},
		{"to_several_old_proxies", []rawPolicy{oldProxy, raw(proxy, "10.0.1.7", "10.0.1.5"), oldProxy}, []Policy{proxy},
			[]string{"remove L4Proxy", "remove L4Proxy", "add L4Proxy"}, []string{"remove L4Proxy", "remove L4Proxy"}},
		{"guard_of_another_kind_goes_last", []rawPolicy{raw(guard, "Switch", "Host")}, []Policy{guard}, []string{"add ACL", "remove ACL"}, []string{"remove ACL"}},
		{"guard_stays_when_the_proxy_moves", []rawPolicy{raw(guard), oldProxy}, []Policy{guard, proxy}, []string{"remove L4Proxy", "add L4Proxy"}, []string{"remove L4Proxy", "remove ACL"}},
		{"another_port_of_the_side_car", []rawPolicy{raw(wfp, "15080", "15081")}, []Policy{wfp}, []string{"remove L4WFPPROXY", "add L4WFPPROXY"}, []string{"remove L4WFPPROXY"}},
		{"what_HNS_fills_in_is_no_other", []rawPolicy{raw(wfp, `"Id":"7"`, `"UserSID":"S-1-5-18"`)}, []Policy{wfp}, nil, []string{"remove L4WFPPROXY"}},
		{"of_others", []rawPolicy{raw(guard, ":169}", ":200}"), raw(guard, "Block", "Allow"), raw(proxy, "169.254.169.254", "10.0.9.9"), {PolicyACL, []byte("{")}}, []Policy{guard, proxy},
			[]string{"add ACL", "add L4Proxy"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			run := func(what string, want []string, do func(*Endpoints) error) {
				t.Helper()
				s := &service{eps: oneEndpoint()}
				s.eps[0].policies = slices.Clone(tc.there)
				if err := do(&Endpoints{hns: s}); err != nil || !slices.Equal(s.log, want) {
					t.Errorf("%s: %v, did %q, want %q", what, err, s.log, want)
				}
			}
			run("apply", tc.apply, func(e *Endpoints) error {
				changed, err := e.Apply(address, tc.want)
				if changed != (len(tc.apply) > 0) {
					t.Errorf("changed: got %v", changed)
				}
				return err
			})
			run("remove", tc.remove, func(e *Endpoints) error { return e.Remove(address, tc.want) })
		})
	}
}

// TestRemoveFromOneOfSeveral is no success: nobody knows which endpoint is meant.
func TestRemoveFromOneOfSeveral(t *testing.T) {
	s := &service{eps: append(oneEndpoint(), oneEndpoint()...)}
	if err := (&Endpoints{hns: s}).Remove(address, []Policy{BlockPolicy(imds, "Switch")}); !errors.Is(err, ErrEndpoints) || s.changes != 0 {
		t.Errorf("got %v after %d changes", err, s.changes)
	}
}

// TestOtherPoliciesAreNotOurs has the same type with other settings.
func TestOtherPoliciesAreNotOurs(t *testing.T) {
	ours := BlockPolicy(imds, "Switch")
	b, _ := json.Marshal(ours.Settings)
	for name, settings := range map[string]string{
		"another_address":  strings.Replace(string(b), "169.254.169.254", "168.63.129.16", 1),
		"another_priority": strings.Replace(string(b), `:169}`, `:200}`, 1),
		"not_blocked":      strings.Replace(string(b), "Block", "Allow", 1),
		"no_object":        `"Block"`,
		"broken":           `{`,
	} {
		ep := endpoint{policies: []rawPolicy{{PolicyACL, json.RawMessage(settings)}}}
		if ep.has(ours) {
			t.Errorf("%s was taken for ours", name)
		}
	}
	ep := endpoint{policies: []rawPolicy{{PolicyProxy, b}, {PolicyACL, b}}}
	if !ep.has(ours) {
		t.Error("ours was not found")
	}
}
