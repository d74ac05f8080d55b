package relay

import "golang.org/x/sys/windows"

// passingErrors are AcceptEx's; the syscall package's names are numbers of its own
// there. What a connection in the queue had, the runtime passes over.
var passingErrors = []error{
	windows.WSAEMFILE, windows.WSAENOBUFS, windows.WSAENETDOWN, windows.WSAECONNABORTED, windows.WSAECONNRESET,
	windows.ERROR_NETNAME_DELETED, windows.ERROR_NOT_ENOUGH_MEMORY,
}
