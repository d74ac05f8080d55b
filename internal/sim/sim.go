// Package sim plays a cloud's instance metadata service, for laptops and tests:
// Azure's, closely enough for the cloud's own SDKs and cloud-init, and on
// request badly enough to see how they take it. It never talks to a cloud; its
// tokens and certificates are its own and good for nothing elsewhere.
//
// Protocol facts cite the section of docs/protocol-azure.md that holds their
// source. Where the real answer is not known, the comment says so.
package sim

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"
)

// Config says which VM is played, and how. The zero value is the default VM with
// the platform's own limits and no faults.
type Config struct {
	VM       *VM           // nil means DefaultVM
	Keys     *Keys         // nil means new ones
	Limits   Limits        // zero means the platform's
	Faults   []Fault       // from the start
	TokenTTL time.Duration // life of new tokens; 0 means 24 hours
	AnyCase  bool          // paths, keys and query names in any letter case (docs/protocol-azure.md §1.6: not known)
	History  int           // how many exchanges are remembered; 0 means 1000

	Now   func() time.Time                     // nil means time.Now
	After func(time.Duration) <-chan time.Time // for the fault "latency"; nil means time.After
	Seen  func(Exchange)                       // called for every exchange, from several goroutines at once; nil means nobody
}

// Server plays the metadata service of one VM. Safe for concurrent use.
type Server struct {
	vm       *VM
	trees    map[string]map[string]any // the instance as each version shows it
	keys     *Keys
	tokenTTL time.Duration
	anyCase  bool
	now      func() time.Time
	after    func(time.Duration) <-chan time.Time
	observe  func(Exchange)

	limits   *limiter
	faults   faultList
	tokens   tokenCache
	calendar calendar
	history  history
}

// New prepares a server; it starts nothing. It fails when the VM or a fault
// makes no sense, or no keys could be made.
func New(c Config) (*Server, error) {
	s := &Server{
		vm: c.VM, keys: c.Keys, tokenTTL: cmp.Or(c.TokenTTL, defaultTokenTTL), anyCase: c.AnyCase,
		now: c.Now, after: c.After, observe: c.Seen,
		history:  history{ring: make([]Exchange, 0, max(1, cmp.Or(c.History, defaultHistory)))},
		calendar: calendar{incarnation: 1},
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.after == nil {
		s.after = time.After
	}
	if s.vm == nil {
		s.vm = DefaultVM()
	}
	if err := s.vm.check(); err != nil {
		return nil, fmt.Errorf("simulated VM: %w", err)
	}
	if err := s.faults.set(c.Faults, s.now()); err != nil {
		return nil, err
	}
	s.limits = newLimiter(c.Limits, s.now())
	s.trees = make(map[string]map[string]any)
	for _, v := range s.vm.Versions {
		s.trees[v], _ = instanceShape.prune(s.vm.Instance, v).(map[string]any)
	}
	if s.keys == nil {
		var err error
		if s.keys, err = NewKeys(s.now()); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Faults returns the faults that are in force, counts and all.
func (s *Server) Faults() []Fault { return s.faults.get(s.now()) }

// SetFaults replaces all faults; when one makes no sense, none is changed.
func (s *Server) SetFaults(faults []Fault) error { return s.faults.set(faults, s.now()) }

// Handler returns the metadata service. The management API is not in it.
func (s *Server) Handler() http.Handler { return http.HandlerFunc(s.serve) }

// shutdownGrace is how long answers under way may take when Run ends.
const shutdownGrace = time.Second

// Run serves the protocol on l, and the management API on manage unless that is
// nil, until ctx is cancelled; then it cuts off requests that hang or are being
// delayed, lets the others end, and returns nil. It closes both listeners. Any
// other end is an error.
func (s *Server) Run(ctx context.Context, l, manage net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	serve := func(l net.Listener, h http.Handler) {
		srv := newHTTP(ctx, h)
		g.Go(func() error { return accept(srv, l) })
		g.Go(func() error { return shutdown(ctx, srv) })
	}
	serve(l, s.Handler())
	if manage != nil {
		serve(manage, s.Manage())
	}
	return g.Wait()
}

// newHTTP has no write time-out: the fault "hang" is the client's to end.
func newHTTP(ctx context.Context, h http.Handler) *http.Server {
	return &http.Server{
		Handler:                      h,
		ReadHeaderTimeout:            10 * time.Second,
		BaseContext:                  func(net.Listener) context.Context { return ctx },
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     log.New(io.Discard, "", 0),
	}
}

func accept(srv *http.Server, l net.Listener) error {
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// shutdown waits for the end of ctx, lets requests under way end for a while,
// and closes what is left.
func shutdown(ctx context.Context, srv *http.Server) error {
	<-ctx.Done()
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancel()
	if srv.Shutdown(grace) != nil {
		srv.Close() // its error is the listener's, which is closed already
	}
	return nil
}

// newUUID is a random UUID (RFC 9562 §5.4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
