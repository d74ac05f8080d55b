package discover

import (
	"fmt"
	"slices"
	"strings"
)

// settle notes which containers have processes in some namespaces. An owner stays
// once it is the only one: whoever enters later without having been told to by
// --network container:NAME is nobody's member.
//
// A container owns one namespace at most. While it is found in two, none of which
// is its already, it owns neither.
func (v *view) settle(seen map[*space]sight) {
	claims := v.claims(seen)
	elsewhere := func(id string, s *space) bool {
		return slices.ContainsFunc(claims[id], func(inode uint64) bool { return inode != s.inode })
	}
	for s, look := range seen {
		s.doubt = nil
		if len(s.owners) != 1 {
			owners := v.ownersAmong(look.ids)
			free := slices.DeleteFunc(slices.Clone(owners), func(id string) bool { return elsewhere(id, s) })
			switch {
			case len(look.several) > 0:
				s.doubt = fmt.Errorf("%w: %s", ErrAmbiguous, shortly(look.several))
			case len(free) > 0:
				s.owners = free
			case len(owners) > 0:
				s.doubt = fmt.Errorf("%w: %s", ErrTwice, shortly(owners))
			}
			if s.doubt != nil {
				s.owners, s.joiners = nil, nil
				continue
			}
		}
		s.joiners = nil
		for _, id := range look.ids {
			c := v.containers[id]
			root, ok := v.root(c)
			if _, joins := c.joins(); joins && !(ok && elsewhere(root.id, s)) {
				s.joiners = append(s.joiners, id)
			}
		}
	}
}

// claims is which containers own a namespace or may do so, and the inodes of those.
func (v *view) claims(seen map[*space]sight) map[string][]uint64 {
	claims := make(map[string][]uint64)
	for _, s := range v.spaces {
		ids := s.owners
		if look, ok := seen[s]; ok && len(ids) != 1 {
			ids = v.ownersAmong(look.ids)
		}
		for _, id := range ids {
			claims[id] = append(claims[id], s.inode)
		}
	}
	return claims
}

// ownersAmong leaves out those that join, and those of the host's network: they
// enter other namespaces for their work.
func (v *view) ownersAmong(ids []string) (owners []string) {
	for _, id := range ids {
		c := v.containers[id]
		if _, joins := c.joins(); !joins && c.mode != "host" {
			owners = append(owners, id)
		}
	}
	return owners
}

// shortly writes ids as the engine's tools do.
func shortly(ids []string) string {
	var short []string
	for _, id := range ids {
		short = append(short, fmt.Sprintf("%.12s", id))
	}
	return strings.Join(short, ", ")
}
