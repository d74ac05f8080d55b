//go:build !windows && !forwardonly

package main

import "syscall"

const (
	errNoAddress = syscall.EADDRNOTAVAIL
	whoHasPorts  = "ss -ltnp"
)
