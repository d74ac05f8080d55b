//go:build forwardonly

package main

import "github.com/spf13/cobra"

const rootExample = `  imdsgate forward --to 172.17.0.2 -- my-app.exe`

// commands are those of the small binary for clients' images, which is built for
// Windows with -tags forwardonly.
func commands(e *env) []*cobra.Command {
	return []*cobra.Command{versionCmd(e), forwardCmd(e)}
}

func harden() error { return nil }
