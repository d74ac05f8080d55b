package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"imdsgate/internal/netns"
	"imdsgate/internal/redirect"
)

// Sweep takes back, in every network namespace that a process is in or that is
// mounted in one of the folders, what agents have ever put there and nobody holds
// any more. It returns how many namespaces it looked into.
func Sweep(r *redirect.Redirector, dirs []string) (looked int, err error) {
	paths, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return 0, err
	}
	for _, dir := range append(dirs, "/run/docker/netns", "/run/netns") {
		more, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			return 0, err
		}
		paths = append(paths, more...)
	}
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
