package main

import "github.com/spf13/cobra"

// platformLong ends the help of all.
const platformLong = ""

// platformCommands are the commands that only Linux has.
func platformCommands(e *env) []*cobra.Command {
	return []*cobra.Command{agentCmd(e), demoCmd(e), demoPartCmd(e)}
}
