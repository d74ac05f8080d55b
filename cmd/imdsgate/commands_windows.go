//go:build !forwardonly

package main

import "github.com/spf13/cobra"

const rootExample = `  imdsgate proxy --listen :80 --ensure-route --dry-run
  imdsgate forward --to 172.17.0.2 -- my-app.exe
  imdsgate agent --docker --dry-run
  imdsgate service install --dry-run -- agent --docker`

// platformCommands are the commands that Windows has besides.
func platformCommands(e *env) []*cobra.Command {
	return []*cobra.Command{agentCmd(e), serviceCmd(e)}
}
