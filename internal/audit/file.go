package audit

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
)

// ErrNotRegular is the error for a path at which there is something that lines
// cannot be appended to for good: a device, a named pipe, a folder, a link.
var ErrNotRegular = errors.New("not a regular file")

// File appends lines to a file. The chain goes on where the file's last record is,
// also when another process has written it: each line is written under a lock, and
// what stands before it is looked at again whenever it is not this File's own.
//
// A file that was moved away or emptied is followed at the next line: by another at
// the same path, in which the chain goes on. Nothing in a file is ever changed.
type File struct {
	path   string
	size   int64
	keep   int
	report func(error)

	f       *os.File
	end     int64 // size of the file after the last Write; -1: not known
	at      int64 // size at the last Begin
	before  Tail  // of the file that was written before this one
	patient int64 // no rotation is tried below this size, after one that failed
}

// OpenFile opens or makes (mode 0600) the file. A file that would become larger
// than size bytes (0: any) is renamed to PATH.1, that to PATH.2, and so on; keep of
// them, at least one, are kept. Report, which may be nil, is told why renaming
// failed; lines go on in the same file then.
//
// The errors are those of the file, and ErrNotRegular.
func OpenFile(path string, size int64, keep int, report func(error)) (*File, error) {
	if report == nil {
		report = func(error) {}
	}
	f := &File{path: path, size: size, keep: max(keep, 1), report: report}
	return f, f.open()
}

func (f *File) open() error {
	st, err := os.Lstat(f.path)
	switch {
	case err == nil && !st.Mode().IsRegular():
		return fmt.Errorf("audit: %s: %w: it is %s", f.path, ErrNotRegular, kind(st.Mode()))
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("audit: %w", err)
	}
	file, err := openAppend(f.path)
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	if st, err := file.Stat(); err != nil || !st.Mode().IsRegular() {
		file.Close()
		return fmt.Errorf("audit: %s: %w", f.path, errors.Join(err, ErrNotRegular))
	}
	f.f, f.end = file, -1
	return nil
}

func kind(m fs.FileMode) string {
	switch {
	case m&fs.ModeSymlink != 0:
		return "a symbolic link"
	case m&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case m&fs.ModeSocket != 0:
		return "a socket"
	case m&fs.ModeDevice != 0:
		return "a device"
	case m.IsDir():
		return "a folder"
	}
	return "something else"
}

// errRestless is for a path at which there is another file at each look.
var errRestless = errors.New("the file is replaced all the time")

// Begin locks the file until End.
func (f *File) Begin(n int, head Head) (*Tail, error) {
	for range 16 {
		if f.f == nil {
			if err := f.open(); err != nil {
				return nil, err
			}
		}
		if err := lock(f.f); err != nil {
			return nil, fmt.Errorf("audit: lock %s: %w", f.path, err)
		}
		st, err := f.ours()
		if err != nil {
			return nil, err
		}
		if st == nil {
			f.leave()
			continue
		}
		if f.full(st.Size(), n) {
			if err := f.rotate(); err != nil {
				f.patient = st.Size() + f.size/16
				f.report(fmt.Errorf("audit: rotate: %w", err))
			}
			continue
		}
		return f.begin(st.Size(), head)
	}
	return nil, fmt.Errorf("audit: %s: %w", f.path, errRestless)
}

// ours is the file at the path, nil if it is not the one that is open.
func (f *File) ours() (fs.FileInfo, error) {
	there, err := os.Lstat(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	mine, err := f.f.Stat()
	if err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	if !os.SameFile(there, mine) {
		return nil, nil
	}
	return mine, nil
}

// begin looks at what stands before the next line, unless this File wrote it.
func (f *File) begin(size int64, head Head) (*Tail, error) {
	f.at = size
	if size == f.end {
		return nil, nil
	}
	f.end = -1
	t, err := readTail(f.f, size)
	if err != nil {
		return nil, err
	}
	if t.Head != (Head{}) {
		return &t, nil
	}
	// Nothing here: the chain goes on from the file before, from what was in this
	// one, or from a file that another process has renamed; the last of these.
	before := f.before
	for _, other := range []Tail{{Head: head}, f.first()} {
		if other.Head.Seq > before.Head.Seq {
			before = other
		}
	}
	t.Head = before.Head
	if size == 0 {
		t.Torn = before.Torn
	}
	return &t, nil
}

// first is the tail of the file that was renamed last.
func (f *File) first() Tail {
	r, err := openRead(f.old(1))
	if err != nil {
		return Tail{}
	}
	defer r.Close()
	st, err := r.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return Tail{}
	}
	t, err := readTail(r, st.Size())
	if err != nil {
		return Tail{}
	}
	return t
}

// leave closes the file, and remembers how it ends.
func (f *File) leave() {
	if st, err := f.f.Stat(); err == nil {
		if t, err := readTail(f.f, st.Size()); err == nil && t.Head != (Head{}) {
			f.before = t
		}
	}
	f.f.Close()
	f.f, f.patient = nil, 0
}

func (f *File) full(size int64, n int) bool {
	return f.size > 0 && size > 0 && size+int64(n) > f.size && size >= f.patient
}

func (f *File) old(n int) string { return f.path + "." + strconv.Itoa(n) }

// rotate renames the files, the oldest first: whenever it is interrupted, what is
// missing is one name, and never a file. Only the last of those that are kept is
// replaced.
func (f *File) rotate() error {
	gap := 1 // the first name that is free
	for ; gap < f.keep; gap++ {
		if _, err := os.Lstat(f.old(gap)); errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	for ; gap > 1; gap-- {
		if err := os.Rename(f.old(gap-1), f.old(gap)); err != nil {
			return err
		}
	}
	return os.Rename(f.path, f.old(1))
}

// Write appends the line.
func (f *File) Write(line []byte, _ *Event) error {
	n, err := f.f.Write(line)
	if err == nil && n < len(line) {
		err = io.ErrShortWrite
	}
	if err != nil {
		f.end = -1
		return fmt.Errorf("audit: %w", err)
	}
	f.at += int64(n)
	f.end, f.before = f.at, Tail{}
	return nil
}

// End unlocks the file.
func (f *File) End() {
	if f.f != nil {
		unlock(f.f)
	}
}

// Close closes the file.
func (f *File) Close() error {
	if f.f == nil {
		return nil
	}
	return f.f.Close()
}
