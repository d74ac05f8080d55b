package audit

import "os"

const (
	openFlags     = 0    // a link was refused by its kind; here it takes an administrator to make one
	closeToRename = true // open files have no other name
)

// Windows has no two proxies at the same time: no agent hands over between them.
func lock(*os.File) error { return nil }

func unlock(*os.File) {}
