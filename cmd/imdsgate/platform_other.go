//go:build !linux && !windows

package main

import "github.com/spf13/cobra"

// platformLong ends the help of all.
const platformLong = ""

func platformCommands(*env) []*cobra.Command { return nil }

const rootExample = `  imdsgate demo                 see all of it work, on this machine, in namespaces
  imdsgate simulate             run a metadata service for laptops and tests
  imdsgate agent --workloads workloads.yaml
  imdsgate proxy --agent /run/imdsgate/agent.sock`
