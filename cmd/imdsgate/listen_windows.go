//go:build !forwardonly

package main

import "golang.org/x/sys/windows"

const (
	errNoAddress = windows.WSAEADDRNOTAVAIL
	whoHasPorts  = "netstat -ano"
)
