package audit

import "errors"

// DialSyslog is not for Windows: the error is errors.ErrUnsupported.
func DialSyslog(path, tag string) (Out, error) { return nil, errors.ErrUnsupported }

// DialJournal is not for Windows: the error is errors.ErrUnsupported.
func DialJournal(path, tag string) (Out, error) { return nil, errors.ErrUnsupported }
