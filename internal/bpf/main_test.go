package bpf_test

import (
	"runtime"
)

// See package main: the main thread must not be one that enters namespaces.
func init() { runtime.LockOSThread() }
