//go:build !forwardonly

package main

import "github.com/spf13/cobra"

// commands are those of the whole binary.
func commands(e *env) []*cobra.Command {
	return append([]*cobra.Command{versionCmd(e), simulateCmd(e), proxyCmd(e), forwardCmd(e), locateCmd(e), policyCmd(e), auditCmd(e)}, platformCommands(e)...)
}
