// Package workload is the vocabulary of who is asking: identities, the evidence
// that a connection carries, and how much that evidence proves. It is pure: it
// opens nothing and knows no runtime.
package workload

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"sync"
)

// ID names a workload, stably for as long as it lives on this host. The part
// before the colon says who vouches for the rest: "static:web",
// "docker:3f2a…", "address:10.0.0.7".
type ID string

// Workload is one caller of the metadata service, as the runtime describes it.
// Nothing in it was said by the workload itself over the network. It is not
// changed once it is in a Directory.
type Workload struct {
	ID   ID     `json:"id"`
	Name string `json:"name"`

	// Labels are those that whoever runs the workload gave it.
	Labels map[string]string `json:"labels,omitempty"`

	// ImageLabels are those that its image brought along, unchanged: whoever
	// builds an image chooses them, so they can take away but never give. A label
	// stands in one of the two maps.
	ImageLabels map[string]string `json:"image_labels,omitempty"`

	// Image is the name of the image that the runtime made the workload from, as
	// it was asked for, whatever has that name now. Empty means that there is none
	// or, if ImageID is set, that the name is not known (yet): it may be any.
	Image string `json:"image,omitempty"`

	// ImageID is the digest of the image, "sha256:" and 64 hexadecimal digits, as
	// the runtime computed it; empty if there is none.
	ImageID string `json:"image_id,omitempty"`

	// Pod is set for a workload that Kubernetes runs.
	Pod *Pod `json:"pod,omitempty"`

	// Members are all workloads that share one network namespace, in the order of
	// their IDs. The kernel cannot tell them apart, so they are one workload here,
	// and may do what all of them may, and no more. Empty means that the workload has the
	// namespace to itself; members have no members.
	Members []Workload `json:"members,omitempty"`
}

// Pod is what Kubernetes says of a workload.
type Pod struct {
	Namespace      string            `json:"namespace"`
	ServiceAccount string            `json:"service_account,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"`

	// Claimed says that it may be the image alone which says so: then it can take
	// away and never give, as ImageLabels do.
	Claimed bool `json:"claimed,omitempty"`
}

// The labels that Compose sets on every container (docker/compose
// pkg/api/labels.go). Since its version 2 it sets the first two on images that it
// builds, too; the others never, and an image cannot know its own digest.
const (
	ComposeProject = "com.docker.compose.project"
	ComposeService = "com.docker.compose.service"
	composeHash    = "com.docker.compose.config-hash"
	composeImage   = "com.docker.compose.image"
)

// Compose is the Compose project and service that the workload is of, both empty
// if it is of none. Sure is false where the image alone may say so, and for pods,
// whose labels their authors choose.
//
// Images that Compose built carry its labels, so an unchanged label proves
// nothing by itself; a hash of the service's configuration, or a digest of the
// image, that is not the image's is Compose's own, and then so are the others.
func (w *Workload) Compose() (project, service string, sure bool) {
	project, given := w.Labels[ComposeProject]
	if !given {
		project = w.ImageLabels[ComposeProject]
	}
	service, ok := w.Labels[ComposeService]
	if !ok {
		service = w.ImageLabels[ComposeService]
	}
	if project == "" || service == "" {
		return "", "", false
	}
	_, hash := w.Labels[composeHash]
	_, image := w.Labels[composeImage]
	return project, service, w.Pod == nil && (given && ok || hash || image)
}

// MemberNames are the names of Members, sorted; nil if there are none.
func (w *Workload) MemberNames() []string {
	if len(w.Members) == 0 {
		return nil
	}
	names := make([]string, 0, len(w.Members))
	for i := range w.Members {
		names = append(names, w.Members[i].Name)
	}
	slices.Sort(names)
	return names
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
	by map[uint64]*Workload
}

// Set records, or replaces, the workload behind an attachment.
func (d *Directory) Set(attachment uint64, w Workload) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.by == nil {
		d.by = make(map[uint64]*Workload)
	}
	d.by[attachment] = &w
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
// The workload is not changed afterwards: another description is another pointer.
//
// Evidence of proof Address stands for the address alone.
func (d *Directory) Lookup(e Evidence) (*Workload, bool) {
	switch e.Proof {
	case Listener:
		d.mu.RLock()
		defer d.mu.RUnlock()
		w, ok := d.by[e.Attachment]
		return w, ok
	case Address:
		if !e.Peer.IsValid() {
			return nil, false
		}
		a := e.Peer.Addr().Unmap().WithZone("").String()
		return &Workload{ID: ID("address:" + a), Name: a}, true
	default:
		return nil, false
	}
}

// All lists the workloads, in the order of their IDs.
func (d *Directory) All() []*Workload {
	d.mu.RLock()
	defer d.mu.RUnlock()
	all := make([]*Workload, 0, len(d.by))
	for _, w := range d.by {
		all = append(all, w)
	}
	slices.SortFunc(all, func(a, b *Workload) int { return cmp.Compare(a.ID, b.ID) })
	return all
}
