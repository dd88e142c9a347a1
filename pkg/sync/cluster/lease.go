package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// errLeaseStale refuses a write of a process that does not know whether it leads. It
// passes: either the Lease is renewed in a moment, or the term ends.
var errLeaseStale = errors.New("the Lease was not renewed of late, and another coordinator may lead by now")

// leaseGuard keeps a process that was suspended from writing before it knows whether it
// still leads. The elector ends the term then, but of what wakes up, it may be the last;
// and what has just arrived about Secrets does not fit what was known about resources.
type leaseGuard struct {
	// renewed is when the last request was sent that acquired or renewed the Lease.
	renewed atomic.Pointer[time.Time]
}

// fresh reports whether the Lease was renewed less than renewDeadline ago. The clock of a
// process goes on while it is suspended, that of a machine need not: then the time of day
// tells.
func (g *leaseGuard) fresh() bool {
	at := g.renewed.Load()
	if at == nil {
		return false
	}
	now := time.Now()
	return max(now.Sub(*at), now.Round(0).Sub(at.Round(0))) < renewDeadline
}

// wrap returns a connection that refuses to write while the Lease is not fresh, and has no more than writesInFlight writes
// under way.
func (g *leaseGuard) wrap(next http.RoundTripper) http.RoundTripper {
	return guardedTransport{guard: g, next: next, slots: make(chan struct{}, writesInFlight)}
}

type guardedTransport struct {
	guard *leaseGuard
	next  http.RoundTripper
	slots chan struct{}
}

func (t guardedTransport) RoundTrip(request *http.Request) (*http.Response, error) {
	if request.Method == http.MethodGet {
		return t.next.RoundTrip(request)
	}
	err := errLeaseStale
	select {
	case <-request.Context().Done():
		err = request.Context().Err()
	case t.slots <- struct{}{}:
		defer func() { <-t.slots }()
		if t.guard.fresh() {
			return t.next.RoundTrip(request)
		}
	}
	if request.Body != nil {
		_ = request.Body.Close() // as http.RoundTripper asks for
	}
	return nil, err
}

// WrappedRoundTripper is for client-go, which looks through wrappers for what it can cancel.
func (t guardedTransport) WrappedRoundTripper() http.RoundTripper { return t.next }

// guardedLock is the Lease for one term, as it tells the guard that it is held.
type guardedLock struct {
	resourcelock.Interface
	guard *leaseGuard
	// transitions is the count of the Lease with which the term began; nil before. Only the
	// elector's own goroutine uses it.
	transitions *int
}

func (l *guardedLock) Create(ctx context.Context, record resourcelock.LeaderElectionRecord) error {
	return l.hold(record, func() error { return l.Interface.Create(ctx, record) })
}

// Update refuses to take the Lease back that another has had meanwhile, and given up: to
// the elector that is a renewal, but what the term knows is of before.
func (l *guardedLock) Update(ctx context.Context, record resourcelock.LeaderElectionRecord) error {
	if l.transitions != nil && record.LeaderTransitions != *l.transitions {
		return errSuperseded
	}
	return l.hold(record, func() error { return l.Interface.Update(ctx, record) })
}

func (l *guardedLock) hold(record resourcelock.LeaderElectionRecord, write func() error) error {
	sent := time.Now()
	if err := write(); err != nil {
		return fmt.Errorf("write the Lease: %w", err)
	}
	l.guard.renewed.Store(&sent)
	l.transitions = &record.LeaderTransitions
	return nil
}
