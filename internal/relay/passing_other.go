//go:build !windows

package relay

import "syscall"

// passingErrors are accept's, which Linux takes from connections in the queue too
// (accept(2), "Error handling").
var passingErrors = []error{
	syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
	syscall.ECONNABORTED, syscall.EPROTO, syscall.ENETDOWN, syscall.ENETUNREACH, syscall.EHOSTUNREACH,
}
