//go:build !linux

// Package discover knows which containers exist on this host. What a runtime's
// API looks like does not leave it. Here it knows containers by their addresses
// only: it locates the proxy, and gives clients their forwards.
package discover
