//go:build !forwardonly

package main

import "github.com/spf13/cobra"

const rootExample = `  imdsgate demo                 see all of it work, on this machine, in namespaces
  imdsgate simulate             run a metadata service for laptops and tests
  imdsgate agent --workloads workloads.yaml
  imdsgate proxy --agent /run/imdsgate/agent.sock`

// commands are those of the whole binary.
func commands(e *env) []*cobra.Command {
	return append([]*cobra.Command{versionCmd(e), simulateCmd(e), proxyCmd(e), forwardCmd(e), locateCmd(e), policyCmd(e), auditCmd(e)}, platformCommands(e)...)
}
