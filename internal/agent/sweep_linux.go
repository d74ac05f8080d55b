package agent

import (
	"errors"
	"fmt"
	"os"

	"imdsgate/internal/netns"
	"imdsgate/internal/redirect"
)

// Sweep takes back, in the network namespaces at these paths, what agents have
// ever put there and nobody holds any more. What is no namespace (any more) is
// passed over. It returns how many namespaces it looked into.
func Sweep(r *redirect.Redirector, paths []string) (looked int, err error) {
	seen := make(map[uint64]bool)
	var errs []error
	for _, path := range paths {
		inode, err := netns.Inode(path)
		if err != nil || seen[inode] {
			continue // ended meanwhile, or looked at already
		}
		seen[inode] = true
		ok, err := sweepOne(r, path)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", path, err))
		}
		if ok {
			looked++
		}
	}
	return looked, errors.Join(errs...)
}

func sweepOne(r *redirect.Redirector, path string) (looked bool, err error) {
	ns, err := netns.Open(path)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, netns.ErrNotNetns), errors.Is(err, os.ErrPermission):
		return false, nil
	case err != nil:
		return false, err
	}
	defer ns.Close()
	if r.Host(ns.ID()) {
		return false, nil
	}
	return true, r.Detach(ns, &redirect.Attachment{Netns: ns.ID(), Method: redirect.NFTables})
}
