//go:build unix

package audit_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"imdsgate/internal/audit"
)

// What is no file is refused at once, and not opened: a named pipe would wait for
// its reader.
func TestOnlyRegularFiles(t *testing.T) {
	for name, tc := range map[string]struct {
		make func(path string) error
		want string
	}{
		"named_pipe": {func(p string) error { return unix.Mkfifo(p, 0o600) }, "a named pipe"},
		"folder":     {func(p string) error { return os.Mkdir(p, 0o700) }, "a folder"},
		"device":     {func(p string) error { return os.Symlink("/dev/null", p) }, "a symbolic link"},
		"link_to_a_file": {func(p string) error {
			return errors.Join(os.WriteFile(p+"-file", nil, 0o600), os.Symlink(p+"-file", p))
		}, "a symbolic link"},
		"link_to_nothing": {func(p string) error { return os.Symlink(p+"-file", p) }, "a symbolic link"},
		"socket": {func(p string) error {
			_, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: p, Net: "unixgram"})
			return err
		}, "a socket"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			if err := tc.make("audit"); err != nil {
				t.Fatal(err)
			}
			f, err := audit.OpenFile("audit", 0, 1, nil)
			if !errors.Is(err, audit.ErrNotRegular) || !strings.HasSuffix(err.Error(), tc.want) {
				t.Errorf("got %v, want ErrNotRegular: it is %s", err, tc.want)
			}
			f.Close()
		})
	}
	if _, err := audit.OpenFile("/dev/null", 0, 1, nil); !errors.Is(err, audit.ErrNotRegular) || !strings.HasSuffix(err.Error(), "a device") {
		t.Errorf("/dev/null: got %v", err)
	}
	if _, err := audit.OpenFile(filepath.Join(t.TempDir(), "no", "audit"), 0, 1, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: got %v", err)
	}
}

// A path that was made a link later is not followed either.
func TestFileReplacedByALink(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit")
	f, l := openFile(t, path, 0, 1), new(audit.Log)
	written(t, l, f, full())
	if err := errors.Join(os.Rename(path, path+".1"), os.WriteFile(path+"-other", nil, 0o600), os.Symlink(path+"-other", path)); err != nil {
		t.Fatal(err)
	}
	written(t, l, f, full())
	if b, err := os.ReadFile(path + "-other"); err != nil || len(b) > 0 || l.Lost() != 1 {
		t.Errorf("lost %d, and %q was written to the link's target (%v)", l.Lost(), b, err)
	}
}
