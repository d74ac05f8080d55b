// Command evil is the program in the attackers' containers. It is compiled static,
// so that its image needs nothing else. What it is told is done once, and what came
// of it is printed as a line of JSON.
//
//	evil serve                                   reads commands from stdin, a line each
//	evil [-from PORT] [-end ADDRESS] COMMAND…
//
// Commands that send:
//
//	call [-device D] [-mapped] [-fastopen] [-via HOP] tcp|udp TARGET
//	packet -source ADDRESS TARGET                a SYN in an IP packet of its own making
//	frame -to NEIGHBOUR [-type NUMBER] TARGET    a SYN in an Ethernet frame
//
// Commands that change something in the container, run the command that follows
// them, and take back what they did:
//
//	unrule, unroute                              what steers its calls is deleted, for good
//	overrule                                     a rule of its own comes first
//	lodown                                       lo is down
//	claim                                        the address is its own
//	hairpin ADDRESS                              the route is by way of another container
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"
)

// patience is how long a call waits for an answer: a little longer than the kernel
// does before it sends a SYN again.
const patience = 1250 * time.Millisecond

// result is what came of a command.
type result struct {
	Said    string `json:"said"`    // first line of the answer
	Error   string `json:"error"`   // why there was none
	Changed int    `json:"changed"` // how many things were changed in the container
}

// attacker does one command.
type attacker struct {
	from uint16 // source port of all that it sends
	result
}

// command does what its arguments say.
type command func(a *attacker, args []string) error

var commands map[string]command

func init() {
	commands = map[string]command{
		"call": call, "packet": packet, "frame": frame,
		"unrule": unrule, "unroute": unroute, "overrule": overrule, "lodown": loDown, "claim": claim, "hairpin": hairpin,
	}
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == "serve" {
		serve(os.Stdin)
		return
	}
	r := run(os.Args[1:])
	json.NewEncoder(os.Stdout).Encode(r)
	if r.Error != "" {
		os.Exit(1)
	}
}

// serve is how one container does many attacks.
func serve(commands io.Reader) {
	fmt.Println("ready")
	for s := bufio.NewScanner(commands); s.Scan(); {
		json.NewEncoder(os.Stdout).Encode(run(strings.Fields(s.Text())))
	}
}

// run does a command and then sends a packet to elsewhere: where that arrives, all
// that was sent before has arrived, or never will.
func run(args []string) result {
	fs := flag.NewFlagSet("evil", flag.ContinueOnError)
	from := fs.Uint("from", 0, "source port")
	end := fs.String("end", "", "address and port of a last packet")
	if err := fs.Parse(args); err != nil {
		return result{Error: err.Error()}
	}
	a := &attacker{from: uint16(*from)}
	err := a.do(fs.Args())
	if err != nil {
		a.Error = err.Error()
	}
	if *end == "" {
		return a.result
	}
	to, err := netip.ParseAddrPort(*end)
	if err == nil {
		err = a.lastPacket(to)
	}
	if err != nil {
		a.Error += " last packet: " + err.Error()
	}
	return a.result
}

func (a *attacker) do(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("no command")
	}
	c, ok := commands[args[0]]
	if !ok {
		return fmt.Errorf("unknown command %q", args[0])
	}
	return c(a, args[1:])
}
