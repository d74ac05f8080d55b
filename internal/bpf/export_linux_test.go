package bpf

import (
	"fmt"

	"github.com/cilium/ebpf/asm"
)

// LoadSteerWithoutLoopbackCheck is the steering program as it must not be: it
// ignores which interface a packet came by. Tests use it to prove that they
// would notice.
func LoadSteerWithoutLoopbackCheck() (*Steer, error) {
	s, err := LoadSteer()
	if err != nil {
		return nil, err
	}
	ins := s.spec.Programs[steerProgSteer].Instructions
	const ingressIfindex = 64 // offsetof(struct bpf_sk_lookup, ingress_ifindex)
	for i := range ins {
		load := ins[i]
		if load.OpCode.Class() != asm.LdXClass || load.Offset != ingressIfindex {
			continue
		}
		// Read "the packet came by lo" whatever is true.
		meta := ins[i].Metadata
		ins[i] = asm.Mov.Imm(load.Dst, 1)
		ins[i].Metadata = meta
		return s, nil
	}
	return nil, fmt.Errorf("no load of ingress_ifindex found")
}
