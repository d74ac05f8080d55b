package agent

import (
	"context"
	"fmt"
	"net/netip"

	"imdsgate/internal/discover"
)

// Plan says what Run would do now, or Undo, a line each, and does nothing.
func (f *Forwards) Plan(ctx context.Context, undo bool) (lines []string, err error) {
	s, err := f.Clients.Look(ctx)
	if err != nil {
		return nil, err
	}
	for _, c := range s.Clients {
		if undo {
			lines = append(lines, f.planUndo(c)...)
			continue
		}
		lines = append(lines, f.planClient(c)...)
	}
	for _, id := range s.Orphans {
		lines = append(lines, "remove side-car "+id+": its client is gone")
	}
	if len(s.Clients) == 0 {
		lines = append(lines, "wait: no running container has the label")
	}
	return lines, nil
}

func (f *Forwards) planClient(c discover.Client) (lines []string) {
	if c.Why != nil {
		return []string{fmt.Sprintf("wait for a proxy for client %s: %v", c.Name, c.Why)}
	}
	for _, p := range f.wanted(c) {
		lines = append(lines, fmt.Sprintf("see that the endpoint of client %s (%v) has the policy %s %s, and read it back", c.Name, c.Addr, p.Type, p.JSON()))
	}
	switch {
	case f.By == ByExec:
		lines = append(lines, fmt.Sprintf("put %s and %s into client %s, and start there: %v", exeFile, envFile, c.Name, append([]string{f.Clients.Path(exeFile)}, f.arguments()...)))
	case f.By == ByL4Proxy:
	case c.Sidecar == "":
		lines = append(lines, fmt.Sprintf("start a side-car of image %s that shares the network of client %s: %v", f.Image, c.Name, append(append([]string{}, f.Side...), f.arguments()...)))
	case c.SideOld:
		lines = append(lines, fmt.Sprintf("replace side-car %s of client %s, which has started again since", c.Sidecar, c.Name))
	default:
		lines = append(lines, fmt.Sprintf("keep side-car %s of client %s running", c.Sidecar, c.Name))
	}
	return append(lines, fmt.Sprintf("lead client %s to the proxy at %v", c.Name, netip.AddrPortFrom(c.Proxy, f.Port)))
}

func (f *Forwards) planUndo(c discover.Client) (lines []string) {
	if c.Sidecar != "" {
		lines = append(lines, fmt.Sprintf("remove side-car %s of client %s", c.Sidecar, c.Name))
	}
	if f.By == ByExec {
		lines = append(lines, fmt.Sprintf("put %s into client %s, at which a forward there ends", endFile, c.Name))
	}
	ps := f.wanted(c)
	if len(ps) > 0 && len(c.Addrs) == 0 {
		return append(lines, fmt.Sprintf("fail for client %s: %v", c.Name, ErrNoAddress))
	}
	for _, a := range c.Addrs {
		for _, p := range ps {
			lines = append(lines, fmt.Sprintf("remove each policy %s for %v from the endpoint of client %s (%v)", p.Type, f.Service, c.Name, a))
		}
	}
	return lines
}
