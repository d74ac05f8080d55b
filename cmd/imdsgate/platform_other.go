//go:build !linux && !windows

package main

import "github.com/spf13/cobra"

// platformLong ends the help of all.
const platformLong = ""

func platformCommands(*env) []*cobra.Command { return nil }
