package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// testMains are asked in turn whether this process is something else than the
// tests; see load_linux_test.go.
var testMains []func() (handled bool, code int)

// atExit is called after the last test.
var atExit []func()

func TestMain(m *testing.M) {
	for _, other := range testMains {
		if handled, code := other(); handled {
			os.Exit(code)
		}
	}
	if os.Args[0] == "/proc/self/exe" { // as the demo calls its parts
		main()
	}
	// The scripts' programs: this test binary under these names.
	testscript.Main(tests{m}, map[string]func(){"imdsgate": main, "standin": standin})
}

// tests runs the tests and then what is to follow them.
type tests struct{ m *testing.M }

func (t tests) Run() int {
	code := t.m.Run()
	for _, f := range atExit {
		f()
	}
	return code
}

// standin plays a metadata service that does what no fault of the simulator is:
// "standin redirect URL" sends all callers elsewhere, "standin hold" answers
// nobody until SIGUSR1. Both say where they listen, and when somebody has asked.
func standin() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	usr1 := make(chan os.Signal, 1)
	signal.Notify(usr1, unix.SIGUSR1)
	fmt.Printf("ready: http://%s\n", l.Addr())
	panic(http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Println("asked")
		switch os.Args[1] {
		case "redirect":
			http.Redirect(w, r, os.Args[2]+r.RequestURI, http.StatusFound)
		case "hold":
			<-usr1
			fmt.Fprint(w, "{}")
		}
	})))
}
