package route

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"imdsgate/internal/testnet"
)

// TestCheckNoticesACapturedService gives the service's address to a bridge, in the
// two ways in which a container network can.
func TestCheckNoticesACapturedService(t *testing.T) {
	testnet.Require(t, testnet.Namespaces)
	service := netip.MustParseAddr(testnet.IMDS4)
	for _, tc := range []struct {
		name, address string // of br0
		want          error
	}{
		{"as_it_should_be", "", nil},
		{"subnet_of_a_container_network", "169.254.169.1/24", ErrCaptured},
		{"gateway_of_a_container_network", "169.254.169.254/24", ErrCaptured},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fabric, err := testnet.NewFabric()
			if err != nil {
				t.Fatal(err)
			}
			defer fabric.Close()
			vm, err := fabric.NewVM()
			if err != nil {
				t.Fatal(err)
			}
			defer vm.Close()
			err = vm.NS.Do(func() error {
				if tc.address != "" {
					if err := addAddress("br0", tc.address); err != nil {
						return err
					}
				}
				if err := Check(service); !errors.Is(err, tc.want) {
					t.Errorf("got %v, want %v", err, tc.want)
				}
				return Check(netip.MustParseAddr("127.0.0.1"))
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}

func addAddress(link, cidr string) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	l, err := h.LinkByName(link)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	return h.AddrAdd(l, a)
}
