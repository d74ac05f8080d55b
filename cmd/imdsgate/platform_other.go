//go:build !linux

package main

import "github.com/spf13/cobra"

func platformCommands(*env) []*cobra.Command { return nil }
