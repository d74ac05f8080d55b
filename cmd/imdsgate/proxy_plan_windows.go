//go:build !forwardonly

package main

import (
	"io"
	"net/netip"

	"imdsgate/internal/route"
)

func ownPlanFlags(fl flagSet, p *routePlan) {
	fl.BoolVar(&p.dryRun, "dry-run", false, "with --ensure-route: look, and print what would be done; change nothing")
}

func planOwnRoute(w io.Writer, to netip.Addr) error {
	steps, err := route.PlanRoute(to)
	if err != nil {
		return routeError(err)
	}
	return printPlan(w, steps)
}
