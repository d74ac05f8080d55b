package upstream

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"imdsgate/internal/imds"
)

// The reasons for which a Budget does not ask the service.
var (
	// ErrBusy: the VM's budget leaves nothing for this workload now; a moment
	// later it may.
	ErrBusy = errors.New("the budget for calls to the metadata service is used up for now")
	// ErrAway: the last calls of this workload have failed, and it gets another
	// in half a second.
	ErrAway = errors.New("the metadata service is away")
	// ErrGone is ErrAway where the service has said 410: it is being updated,
	// which takes 70 s at most (protocol-azure §7).
	ErrGone = errors.New("the metadata service is being updated")
)

// Rate is how much may be asked for. The zero value of a field means the
// default, which Budget names.
type Rate struct {
	PerSecond float64 // in the long run
	Burst     int     // at once, after a pause; 0 is a quarter of PerSecond, and two at least
	AtOnce    int     // calls under way
}

const (
	defaultWait  = 5 * time.Second
	defaultQueue = 32
)

// Budget is a Source that stays below the platform's limits, which are one for
// the whole VM: 5 requests/s, and for identities 20/s and 5 at once
// (protocol-azure §7). How the platform counts is not published, so that in no
// second there are more than PerSecond + Burst.
//
// Who has to wait gets its turn by workload, each of them one call in turn, and
// none may have all the calls that can be under way. The last of the burst is
// kept for those who ask seldom: so a noisy one does not even delay them. A call that several workloads
// wait for (Cache) waits in the line of each of them, and is the turn of the one
// that is first.
//
// After 429 everybody waits: as long as Retry-After says, up to a minute, else
// half a second. A GET that got one is tried again for two seconds: somebody
// else on the VM has been faster. After three errors, 5xx or 410 in a row a workload gets two
// calls a second, and an error for the rest, until one succeeds. That is its own
// affair: what one workload asks for cannot bar the way for others.
//
// A body up to 256 KiB is read before it is handed on, but for the events, and a
// larger one keeps its place for half a minute at most: slow readers hold up nobody.
//
// The fields are set before the first Answer and not changed afterwards.
type Budget struct {
	Source Source

	General  Rate // all but identities; 0 means 3/s, 16 at once
	Identity Rate // 0 means 16/s, 4 at once

	// Wait is how long a call waits for its turn; 0 means 5 s. Azure's clients
	// have more patience than that, and come again after ErrBusy.
	Wait time.Duration

	// Queue bounds the calls of a workload that wait; 0 means 32.
	Queue int

	once   sync.Once
	quotas [2]quota // by imds.Family
}

func (b *Budget) init() {
	b.once.Do(func() {
		for i, r := range [2]Rate{imds.General: b.General, imds.Identity: b.Identity} {
			standard := [2]Rate{imds.General: {3, 2, 16}, imds.Identity: {16, 4, 4}}[i]
			r.PerSecond = cmp.Or(r.PerSecond, standard.PerSecond)
			r.Burst = cmp.Or(r.Burst, max(2, int(r.PerSecond/4)))
			r.AtOnce = cmp.Or(r.AtOnce, standard.AtOnce)
			b.quotas[i] = quota{rate: r, wait: cmp.Or(b.Wait, defaultWait), queue: cmp.Or(b.Queue, defaultQueue),
				tokens: float64(r.Burst), filled: time.Now()}
		}
	})
}

// Answer asks the source when it is the request's turn. The errors are those
// above, the source's, and the context's.
func (b *Budget) Answer(ctx context.Context, r Request) (*Answer, error) {
	b.init()
	q := &b.quotas[imds.General]
	if r.Query.Family == imds.Identity {
		q = &b.quotas[imds.Identity]
	}
	for until := time.Now().Add(throttleTime); ; {
		a, err := b.ask(ctx, q, r)
		if err != nil || a.Status != http.StatusTooManyRequests || r.Query.Method != http.MethodGet || q.until().After(until) {
			return a, err
		}
		a.Body.Close() // it says nothing that the status does not
	}
}

// throttleTime is how long a GET that got 429 is tried again. What others on the
// VM have used up is there again after a second.
const throttleTime = 2 * time.Second

// ask is one call.
func (b *Budget) ask(ctx context.Context, q *quota, r Request) (*Answer, error) {
	l, err := q.enter(ctx, &r)
	if err != nil {
		return nil, err
	}
	r.party.begin()
	over := sync.OnceFunc(func() { q.leave(l) })
	ended := false
	defer func() {
		if !ended { // also when the source panics
			over()
		}
	}()
	a, err := b.Source.Answer(ctx, r)
	q.note(ctx, l, a, err)
	if err != nil {
		return nil, err
	}
	if a.Size >= 0 && a.Size <= sentWhole {
		return a, nil
	}
	counted := *a
	if r.Query.Action != imds.EventsRead {
		whole, err := counted.ahead()
		if err != nil {
			return nil, err
		}
		if whole {
			return &counted, nil
		}
	}
	ended = true
	late := time.AfterFunc(bodyTime, over)
	counted.Body = &closer{ReadCloser: counted.Body, then: func() {
		late.Stop()
		over()
	}}
	return &counted, nil
}

// ahead reads the body into memory, and reports whether that was the whole of it:
// how long its reader takes costs nobody a place then. Of a body that is too large
// the rest is read when its reader wants it. After an error it is closed.
func (a *Answer) ahead() (whole bool, err error) {
	if a.Size > readAhead {
		return false, nil
	}
	from := a.Body
	read, err := io.ReadAll(io.LimitReader(from, readAhead+1))
	if err == nil && len(read) > readAhead {
		a.Body = &resumed{read: read, Closer: from, rest: from}
		return false, nil
	}
	if cerr := from.Close(); err == nil {
		err = cerr
	}
	a.Body = io.NopCloser(bytes.NewReader(read))
	return true, err
}

const (
	readAhead = 256 << 10        // bytes of a body in memory, for a slow reader
	bodyTime  = 30 * time.Second // that a body keeps its place
)

// sentWhole is up to where the service is done with an answer once its header
// is here: the rest is in buffers on the way, and a slow reader holds up nobody.
const sentWhole = 64 << 10

// closer is a body with something to be done at its end.
type closer struct {
	io.ReadCloser
	then func() // more than once is like once
}

func (c *closer) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	if err == io.EOF {
		c.then()
	}
	return n, err
}

func (c *closer) Close() error {
	defer c.then()
	return c.ReadCloser.Close()
}
