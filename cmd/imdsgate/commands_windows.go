//go:build !forwardonly

package main

import "github.com/spf13/cobra"

// platformCommands are the commands that Windows has besides.
func platformCommands(e *env) []*cobra.Command {
	return []*cobra.Command{agentCmd(e), serviceCmd(e)}
}
