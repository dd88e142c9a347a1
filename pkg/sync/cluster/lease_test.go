package cluster

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// lock is a Lease that cannot be written while err is set.
type lock struct {
	resourcelock.Interface
	err error
}

func (l *lock) Create(context.Context, resourcelock.LeaderElectionRecord) error { return l.err }

func (l *lock) Update(context.Context, resourcelock.LeaderElectionRecord) error {
	<-time.After(time.Second) // the answer takes its time
	return l.err
}

func TestNothingIsWrittenWithoutAFreshLease(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSituation(t)
		s.guard.renewed.Store(nil)
		server := s.server()
		writes := func(why string, refused bool) {
			t.Helper()
			server.asked()
			err := s.secrets.Delete(t.Context(), "n", "pull", "uid", "1")
			require.Equal(t, refused, errors.Is(err, errLeaseStale), why)
			require.Len(t, server.asked(), map[bool]int{false: 1}[refused], why)
			if refused {
				require.Equal(t, impsync.ClassRetry, impsync.ClassifyError(err))
			}
			_, err = s.secrets.Get(t.Context(), "n", "pull")
			require.NotErrorIs(t, err, errLeaseStale, "everybody may read")
			require.Len(t, server.asked(), 1)
		}
		held := &guardedLock{Interface: &lock{}, guard: &s.guard}
		writes("it never led", true)
		require.NoError(t, held.Create(t.Context(), resourcelock.LeaderElectionRecord{}))
		writes("it has taken the Lease", false)
		<-time.After(renewDeadline - 1)
		writes("for so long nobody else takes it", false)
		<-time.After(1)
		writes("it did not renew it, or it was suspended", true)

		require.NoError(t, held.Update(t.Context(), resourcelock.LeaderElectionRecord{}))
		writes("it has renewed it", false)
		<-time.After(renewDeadline - time.Second)
		writes("it counts from the request, not from its answer", true)

		failing := &guardedLock{Interface: &lock{err: errors.New("x")}, guard: &s.guard}
		require.Error(t, failing.Update(t.Context(), resourcelock.LeaderElectionRecord{}))
		require.Error(t, failing.Create(t.Context(), resourcelock.LeaderElectionRecord{}))
		writes("nor does a try count", true)

		_, err := s.leases.Leases("imps-system").Get(t.Context(), LeaseName, metav1.GetOptions{})
		require.Error(t, err)
		_ = s.leases.Leases("imps-system").Delete(t.Context(), LeaseName, metav1.DeleteOptions{})
		require.Len(t, server.asked(), 2, "the Lease itself may be written by whoever wants it")
	})
}

// A leader was suspended; another one has led and given the Lease up.
func TestATermIsNotGoneOnWithAfterAnotherHasLed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var guard leaseGuard
		l := &guardedLock{Interface: &lock{}, guard: &guard}
		at := func(transitions int) resourcelock.LeaderElectionRecord {
			return resourcelock.LeaderElectionRecord{LeaderTransitions: transitions}
		}
		require.NoError(t, l.Update(t.Context(), at(3)), "it takes the Lease")
		require.NoError(t, l.Update(t.Context(), at(3)), "it renews it")
		<-time.After(renewDeadline)
		require.ErrorIs(t, l.Update(t.Context(), at(4)), errSuperseded)
		require.False(t, guard.fresh())
		require.NoError(t, l.Create(t.Context(), at(0)), "somebody has deleted it under a leader")
		require.NoError(t, l.Update(t.Context(), at(0)))
		require.NoError(t, (&guardedLock{Interface: &lock{}, guard: &guard}).Update(t.Context(), at(4)), "the next term begins anew")
	})
}

func TestTheGuardHeedsTheTimeOfDayToo(t *testing.T) {
	t.Parallel()
	var guard leaseGuard
	// A machine that was suspended: its monotonic clock stood still.
	renewed := time.Now()
	guard.renewed.Store(&renewed)
	require.True(t, guard.fresh())
	before := renewed.Round(0).Add(-time.Hour)
	guard.renewed.Store(&before)
	require.False(t, guard.fresh())
	// A clock that was set back says nothing.
	after := renewed.Round(0).Add(time.Hour)
	guard.renewed.Store(&after)
	require.True(t, guard.fresh())
}

func TestTheGuardClosesWhatItDoesNotSend(t *testing.T) {
	t.Parallel()
	body := &closing{Reader: strings.NewReader("x")}
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPatch, "http://api.invalid", body)
	require.NoError(t, err)
	response, err := (&leaseGuard{}).wrap(http.DefaultTransport).RoundTrip(request)
	if response != nil {
		_ = response.Body.Close()
	}
	require.ErrorIs(t, err, errLeaseStale)
	require.True(t, body.closed)
}

type closing struct {
	*strings.Reader
	closed bool
}

func (c *closing) Close() error {
	c.closed = true
	return nil
}

// However many have something to write, so many writes are under way, and reads wait for none of them.
func TestWritesInFlight(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSituation(t)
		var under, most atomic.Int64
		s.server().before = func(request *http.Request) {
			if request.Method == http.MethodGet {
				return
			}
			most.Store(max(most.Load(), under.Add(1)))
			select {
			case <-time.After(time.Second):
			case <-request.Context().Done():
			}
			under.Add(-1)
		}
		var all sync.WaitGroup
		for range 5 * writesInFlight {
			all.Go(func() { _ = s.secrets.Delete(t.Context(), "n", "pull", "uid", "1") })
		}
		begin := time.Now()
		_, _ = s.secrets.Get(t.Context(), "n", "pull")
		require.Less(t, time.Since(begin), time.Second)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		require.ErrorIs(t, s.secrets.Delete(ctx, "n", "pull", "uid", "1"), context.DeadlineExceeded, "who waits may give up")
		all.Wait()
		require.Equal(t, 5*time.Second, time.Since(begin))
		require.Equal(t, int64(writesInFlight), most.Load())
	})
}
