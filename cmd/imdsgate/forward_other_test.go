//go:build !linux && !windows

package main

import (
	"strings"
	"testing"
)

func TestForwardElsewhere(t *testing.T) {
	code, _, errs := called(t, nil, "forward", "--to", "172.17.0.2")
	if code != exitUnsupported || !strings.Contains(errs, "hint: 'imdsgate forward --print netsh'") {
		t.Errorf("code %d: %s", code, errs)
	}
}
