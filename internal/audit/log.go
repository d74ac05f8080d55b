package audit

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// ErrFull is the error of an event that is lost because the sink does not take
// lines fast enough, or at all.
var ErrFull = errors.New("audit: the sink takes no more lines")

// Log writes events as lines of JSON that form a chain: see Line, Start, Verify.
//
// Record hands a line on and Run writes it, so that a sink that blocks holds up
// nobody for ever: Record waits for Patience at most, and then, until the sink has
// taken another line, not at all. Events that are lost are counted, and the
// chain's next record says how many.
type Log struct {
	Out     Out
	Version string // of the program

	// Report is told that lines are lost, once, and with nil that they are written
	// again. Run calls it. Nil tells nobody.
	Report func(error)

	Now      func() time.Time // nil is the system's
	Patience time.Duration    // 0 is a second
	Queue    int              // lines that wait to be written; 0 is 512

	once    sync.Once
	queue   chan *line
	run     string
	stalled atomic.Bool // the queue was full for Patience, and nothing was written since

	pending atomic.Uint64 // lost, and no record has said so
	lost    atomic.Uint64 // lost in all

	mu   sync.Mutex
	head Head // of what is written

	// Run alone has these.
	chain  *chain
	buf    bytes.Buffer
	own    []byte // a record of the chain's own
	failed bool   // the last line could not be written
}

func (l *Log) init() {
	l.once.Do(func() {
		if l.Now == nil {
			l.Now = time.Now
		}
		if l.Patience == 0 {
			l.Patience = time.Second
		}
		if l.Queue == 0 {
			l.Queue = 512
		}
		l.queue = make(chan *line, l.Queue)
		l.chain = newChain()
		var id [16]byte
		rand.Read(id[:]) // never fails
		l.run = hex.EncodeToString(id[:])
	})
}

// Lost is the number of events that could not be written.
func (l *Log) Lost() uint64 { return l.lost.Load() }

// Head is the last record that was written; zero before the first.
func (l *Log) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// Record hands e on to Run. The error is ErrFull, or that of an event that cannot
// be written as JSON; the event is lost then, and counted.
func (l *Log) Record(e Event) error {
	l.init()
	x := lines.Get().(*line)
	err := x.encode(e)
	if err == nil {
		err = l.enqueue(x)
	}
	if err != nil {
		x.free()
		l.lose(1)
	}
	return err
}

func (l *Log) enqueue(x *line) error {
	select {
	case l.queue <- x:
		return nil
	default:
	}
	if l.stalled.Load() {
		return ErrFull
	}
	t := time.NewTimer(l.Patience)
	defer t.Stop()
	select {
	case l.queue <- x:
		return nil
	case <-t.C:
		l.stalled.Store(true)
		return ErrFull
	}
}

func (l *Log) lose(n uint64) {
	l.pending.Add(n)
	l.lost.Add(n)
}

// Run writes what is recorded, until ctx is done and all is written that was
// recorded before; the start record goes before the first event. It returns when
// Out lets it: an Out that blocks for ever blocks it too. One Run at a time; it
// leaves Out open.
func (l *Log) Run(ctx context.Context) {
	l.init()
	for {
		select {
		case x := <-l.queue:
			l.writeEvent(x)
			continue
		case <-ctx.Done():
		}
		select {
		case x := <-l.queue:
			l.writeEvent(x)
		default:
			if l.pending.Load() > 0 {
				l.writeLost()
			}
			return
		}
	}
}

func (l *Log) writeEvent(x *line) {
	if !l.put(x, &x.event) {
		l.lose(1)
	}
	x.free()
}

// writeLost ends a run whose last events were lost.
func (l *Log) writeLost() {
	x := lines.Get().(*line)
	defer x.free()
	var err error
	x.out, err = open(x.out[:0], &x.raw, struct {
		Type string    `json:"type"`
		Time time.Time `json:"time"`
	}{lostType, l.Now().UTC()})
	if err == nil {
		l.put(x, nil)
	}
}

// put writes a line, and before it the start record that may have to go there. The
// event is nil for a record of the chain's own.
func (l *Log) put(x *line, e *Event) bool {
	err := l.tryPut(x, e)
	l.stalled.Store(false)
	if failed := err != nil; failed != l.failed {
		l.failed = failed
		if l.Report != nil {
			l.Report(err)
		}
	}
	return err == nil
}

func (l *Log) tryPut(x *line, e *Event) error {
	defer l.Out.End()
	tail, err := l.Out.Begin(len(x.out)+sealSize, l.chain.head)
	if err == nil && tail != nil {
		err = l.start(tail)
	}
	if err != nil {
		return err
	}
	return l.seal(&x.out, e)
}

// start writes the record that a chain, or another part of it, begins with.
func (l *Log) start(t *Tail) error {
	l.chain.head = t.Head
	s := struct {
		Type    string    `json:"type"`
		Time    time.Time `json:"time"`
		Version string    `json:"version"`
		Run     string    `json:"run"`
		Why     Why       `json:"why"`
		Prev    string    `json:"prev"`
		Torn    string    `json:"torn,omitempty"`
	}{"start", l.Now().UTC(), l.Version, l.run, Continued, hex.EncodeToString(t.Head.Sum[:]), t.Torn}
	switch {
	case t.Torn != "":
		s.Why = Torn
	case t.Head == Head{}:
		s.Why = New
	}
	l.own = l.own[:0]
	if t.Open {
		l.own = append(l.own, '\n')
	}
	var err error
	if l.own, err = open(l.own, &l.buf, s); err != nil {
		return err
	}
	return l.seal(&l.own, nil)
}

// seal writes an open line as the next record. The newline that a start record has
// before it is not a part of the record.
func (l *Log) seal(text *[]byte, e *Event) error {
	said := l.pending.Load()
	skip := 0
	if (*text)[0] == '\n' {
		skip = 1
	}
	sealed := l.chain.seal((*text)[skip:], said)
	*text = append((*text)[:skip], sealed...)
	if err := l.Out.Write(*text, e); err != nil {
		return err
	}
	l.chain.commit()
	l.pending.Add(-said)
	l.mu.Lock()
	l.head = l.chain.head
	l.mu.Unlock()
	return nil
}
