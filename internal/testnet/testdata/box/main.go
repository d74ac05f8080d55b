// Command box is the only program in the containers of tests. It is compiled
// static, so that it needs no image below it.
//
//	box say WORDS…      prints the words
//	box wait            runs until it is asked to end
//	box ask ADDRESS     connects and prints what the other side says
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "box:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) >= 1 && args[0] == "say":
		fmt.Println(strings.Join(args[1:], " "))
		return nil
	case len(args) == 1 && args[0] == "wait":
		end := make(chan os.Signal, 1)
		signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
		<-end
		return nil
	case len(args) == 2 && args[0] == "ask":
		return ask(args[1])
	}
	return fmt.Errorf("unknown command %q: want say, wait or ask", args)
}

func ask(address string) error {
	c, err := net.DialTimeout("tcp", address, 3*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * time.Second))
	_, err = io.Copy(os.Stdout, c)
	return err
}
