// Package workload is the vocabulary of who is asking: identities, the evidence
// that a connection carries, and how much that evidence proves. It is pure: it
// opens nothing and knows no runtime.
package workload

import (
	"fmt"
	"net/netip"
	"sync"
)

// ID names a workload, stably for as long as it lives on this host. The part
// before the colon says who vouches for the rest: "static:web",
// "docker:3f2a…", "address:10.0.0.7".
type ID string

// Workload is one caller of the metadata service, as the runtime describes it.
// Nothing in it was said by the workload itself over the network.
type Workload struct {
	ID     ID                `json:"id"`
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels,omitempty"`

	// Image is the name of the image that the runtime made the workload from, as
	// it was asked for; empty if there is none.
	Image string `json:"image,omitempty"`

	// Members lists the names of all workloads that share one network
	// namespace, sorted. The kernel cannot tell them apart, so they are one
	// workload here. Empty means that the workload has the namespace to itself.
	Members []string `json:"members,omitempty"`
}

// Proof is how much the evidence of a connection is worth. Proofs are ordered:
// a larger one can stand in for a smaller one.
type Proof uint8

const (
	// None: nothing is known but that somebody could connect.
	None Proof = iota
	// Address: the source address of the connection, which neighbours can forge.
	Address
	// Endpoint: the virtual switch port, vouched for by the host (Windows HNS).
	Endpoint
	// Cgroup: the cgroup of the connecting socket, recorded by the kernel.
	Cgroup
	// Listener: the connection was generated inside one network namespace and
	// accepted from the listener that lives there.
	Listener
)

var proofNames = [...]string{"none", "address", "endpoint", "cgroup", "listener"}

func (p Proof) String() string {
	if int(p) < len(proofNames) {
		return proofNames[p]
	}
	return fmt.Sprintf("Proof(%d)", uint8(p))
}

// ParseProof is the inverse of Proof.String.
func ParseProof(s string) (Proof, error) {
	for i, n := range proofNames {
		if n == s {
			return Proof(i), nil
		}
	}
	return None, fmt.Errorf("unknown proof %q: want one of none, address, endpoint, cgroup, listener", s)
}

// MarshalText writes the proof's name.
func (p Proof) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (p *Proof) UnmarshalText(b []byte) error {
	v, err := ParseProof(string(b))
	*p = v
	return err
}

// Evidence is what the kernel says about a connection. It is bound to the
// connection once, at accept, and never read from anything the peer sent.
type Evidence struct {
	Proof  Proof  `json:"proof"`
	Method string `json:"method"` // the capture method: "sklookup", "nftables", "listen"

	// Attachment is the listener that the connection was accepted from; zero
	// when Proof is below Listener.
	Attachment uint64 `json:"attachment,omitempty"`

	// Peer is the source address. It is evidence only when Proof is Address.
	Peer netip.AddrPort `json:"peer"`
}

// Directory maps evidence to workloads. The zero value is empty and ready to
// use; it is safe for concurrent use.
type Directory struct {
	mu sync.RWMutex
	by map[uint64]Workload
}

// Set records, or replaces, the workload behind an attachment.
func (d *Directory) Set(attachment uint64, w Workload) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.by == nil {
		d.by = make(map[uint64]Workload)
	}
	d.by[attachment] = w
}

// Delete forgets an attachment.
func (d *Directory) Delete(attachment uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.by, attachment)
}

// Len is the number of attachments known.
func (d *Directory) Len() int {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return len(d.by)
}

// Lookup finds the workload that the evidence stands for. It reports false when
// the evidence names nobody: the caller must refuse then, never assume the host.
//
// Evidence of proof Address stands for the address alone.
func (d *Directory) Lookup(e Evidence) (Workload, bool) {
	switch e.Proof {
	case Listener:
		d.mu.RLock()
		defer d.mu.RUnlock()
		w, ok := d.by[e.Attachment]
		return w, ok
	case Address:
		if !e.Peer.IsValid() {
			return Workload{}, false
		}
		a := e.Peer.Addr().Unmap().WithZone("").String()
		return Workload{ID: ID("address:" + a), Name: a}, true
	default:
		return Workload{}, false
	}
}
