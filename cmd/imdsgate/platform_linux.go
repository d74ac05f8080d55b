package main

import "github.com/spf13/cobra"

// platformCommands are the commands that only Linux has.
func platformCommands(e *env) []*cobra.Command {
	return []*cobra.Command{agentCmd(e), demoCmd(e), demoPartCmd(e)}
}
