// Package gate is the way through: it takes requests for the metadata service
// from the listeners that stand in the callers' place of it, and answers,
// refuses and records each of them.
//
// A request goes the same way always: classify (imds), identify (workload),
// decide (policy), answer (upstream), record (audit). What cannot be done for
// certain is refused, and exactly one event tells of each request.
package gate

import (
	"cmp"
	"errors"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"imdsgate/internal/audit"
	"imdsgate/internal/imds"
	"imdsgate/internal/policy"
	"imdsgate/internal/upstream"
	"imdsgate/internal/workload"
)

// ErrListenerLost is why Serve returns when the listener died under it: a
// caller with rights in its own network namespace may kill the socket (ss -K).
// Connections that were accepted before live on until Serve's context ends.
var ErrListenerLost = errors.New("the listener is lost")

// Gate answers the requests of many listeners with one http.Server. The fields
// are set before the first request and not changed afterwards.
type Gate struct {
	Cloud     imds.Cloud
	Hosts     []string // accepted values of Host, beside the cloud's own
	Directory *workload.Directory
	Policy    *policy.Current // nil denies everything
	Source    upstream.Source

	// Audit gets one event for each request, when its answer is out. That an
	// event is lost closes nothing: the first loss is logged, and all are
	// counted (AuditFailures).
	Audit audit.Sink

	Log    *slog.Logger // nil logs nothing
	Limits Limits

	once   sync.Once
	limits Limits // with defaults
	server *http.Server

	mu      sync.Mutex
	taps    map[*tap]struct{} // listeners that are served or have connections left
	shares  map[uint64]*share // of the attachments among them
	stopped bool

	events   atomic.Uint64
	conns    atomic.Uint64
	open     atomic.Int64 // connections now
	failures atomic.Uint64
}

// Limits bound what callers can make the gate hold or wait for. Zero means the
// default.
type Limits struct {
	HeaderBytes int           // of a request's header, request line included; 16 KiB, at least 4 KiB
	HeaderTime  time.Duration // for a header to arrive, the first one from accept on; 5 s
	IdleTime    time.Duration // a connection is kept for its next request; 2 min
	BodyBytes   int64         // of a request's body; 64 KiB, and imds refuses more
	BodyTime    time.Duration // for a body to arrive; 5 s
	WriteTime   time.Duration // without the caller reading a single byte of its answer; 30 s

	// Of one workload, or of a listener that stands for no workload: its
	// connections, 256, those beyond are closed at once; and its requests to the
	// source at once, 64.
	Conns, InFlight int

	AllConns  int           // connections of everybody; 0 is no bound. Those beyond are closed at once
	QueueTime time.Duration // to wait for one's turn in InFlight; 5 s

	// HoldTime is how long a request waits for the directory to learn who is
	// behind its listener: the news may be slower than the first request. 1 s.
	HoldTime time.Duration

	BlankBytes int64         // of an answer from which parts are taken out; 4 MiB
	DrainTime  time.Duration // for requests to end when their listener stops; 10 s
}

func (l Limits) withDefaults() Limits {
	return Limits{
		HeaderBytes: cmp.Or(l.HeaderBytes, 16<<10),
		HeaderTime:  cmp.Or(l.HeaderTime, 5*time.Second),
		IdleTime:    cmp.Or(l.IdleTime, 2*time.Minute),
		BodyBytes:   cmp.Or(l.BodyBytes, 64<<10),
		BodyTime:    cmp.Or(l.BodyTime, 5*time.Second),
		WriteTime:   cmp.Or(l.WriteTime, 30*time.Second),
		Conns:       cmp.Or(l.Conns, 256),
		AllConns:    l.AllConns,
		InFlight:    cmp.Or(l.InFlight, 64),
		QueueTime:   cmp.Or(l.QueueTime, 5*time.Second),
		HoldTime:    cmp.Or(l.HoldTime, time.Second),
		BlankBytes:  cmp.Or(l.BlankBytes, 4<<20),
		DrainTime:   cmp.Or(l.DrainTime, 10*time.Second),
	}
}

// init builds what is made from the fields.
func (g *Gate) init() {
	g.once.Do(func() {
		g.limits = g.Limits.withDefaults()
		if g.Log == nil {
			g.Log = slog.New(slog.DiscardHandler)
		}
		protocols := new(http.Protocols)
		protocols.SetHTTP1(true)
		g.server = &http.Server{
			Handler:                      g,
			DisableGeneralOptionsHandler: true,
			ReadHeaderTimeout:            g.limits.HeaderTime,
			IdleTimeout:                  g.limits.IdleTime,
			MaxHeaderBytes:               max(g.limits.HeaderBytes-headerSlop, 1),
			ConnState:                    connState,
			ConnContext:                  connContext,
			ErrorLog:                     slog.NewLogLogger(g.Log.Handler(), slog.LevelDebug),
			Protocols:                    protocols,
		}
	})
}

// headerSlop is what net/http reads beyond Server.MaxHeaderBytes.
const headerSlop = 4096

// ServeHTTP answers one request. Only Serve binds evidence to connections: a
// request from any other server has none and is refused.
func (g *Gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.init()
	x := g.begin(w, r)
	defer x.end()
	x.serve()
}

// AuditFailures is the number of events that could not be recorded.
func (g *Gate) AuditFailures() uint64 { return g.failures.Load() }

// record numbers the event and hands it on.
func (g *Gate) record(e audit.Event) {
	e.ID = g.events.Add(1)
	err := g.Audit.Record(e)
	if err != nil && g.failures.Add(1) == 1 {
		g.Log.Error("audit events are lost", "err", err, "event", e.ID)
	}
}
