package ecr

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/test/fakeaws"
)

// world is a bubble with a clock and an AWS of its own.
type world struct {
	t     *testing.T
	begun time.Time

	mu sync.Mutex
	// jumped is by how much the clock of the machine is off, suspended for how long it slept.
	jumped, suspended time.Duration
	// awsOff is by how much the clock of AWS is off.
	awsOff time.Duration
	// answer is what AWS answers; by default a new token of 12 hours.
	answer func(ctx context.Context, grant Grant) (Reply, error)
	// calls are when AWS was asked, since the world began.
	calls   []time.Duration
	seen    int
	asking  map[string]int
	most    map[string]int // asked at once
	changed int
	log     strings.Builder
	// principal is who the process is, which it cannot find out where that is empty; asked is how often anybody has tried.
	principal string
	asked     int
	forgotten []string

	tokens *Tokens
	stop   func()
}

func inWorld(t *testing.T, test func(t *testing.T, w *world)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, begun: time.Now(), principal: "me", asking: map[string]int{}, most: map[string]int{}}
		w.restart()
		test(t, w)
		w.stop()
		require.NotContains(t, w.logged(), canary)
	})
}

func (w *world) Now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.suspended + w.jumped)
}

func (w *world) Boot() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Since(w.begun) + w.suspended + time.Hour
}

// aws is the time at AWS.
func (w *world) aws() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.suspended + w.awsOff)
}

func (w *world) Mint(ctx context.Context, grant Grant) (Reply, error) {
	id := grant.ID()
	w.mu.Lock()
	w.calls = append(w.calls, time.Since(w.begun)+w.suspended)
	n := len(w.calls)
	w.asking[id]++
	w.most[id] = max(w.most[id], w.asking[id])
	answer := w.answer
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		w.asking[id]--
		w.mu.Unlock()
	}()
	if answer != nil {
		return answer(ctx, grant)
	}
	return Reply{Password: dockerconfig.NewSensitive(fmt.Sprintf("%s-%d", canary, n)), Expires: w.aws().Add(12 * time.Hour), Date: w.aws()}, nil
}

func (w *world) Caller(_ context.Context, grant Grant) (Caller, error) {
	date := w.aws()
	w.mu.Lock()
	defer w.mu.Unlock()
	switch w.asked++; {
	case w.principal == "":
		return Caller{}, errors.New("x")
	case w.principal == "nobody":
		return Caller{}, ErrNoCredentials
	case !grant.Ambient():
		return Caller{"owner of the keys", date}, nil
	}
	return Caller{w.principal, date}, nil
}

// is sets who the process is.
func (w *world) is(principal string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.principal = principal
}

func (w *world) Forget(grant Grant) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.forgotten = append(w.forgotten, grant.ID())
}

// answers sets what AWS answers from now on.
func (w *world) answers(answer func(ctx context.Context, grant Grant) (Reply, error)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answer = answer
}

func (w *world) away(err error) {
	w.answers(func(context.Context, Grant) (Reply, error) { return Reply{}, err })
}

// restart begins anew with Tokens that know nothing but what they are told before they run.
func (w *world) restart(before ...func()) {
	if w.stop != nil {
		w.stop()
	}
	log := slog.New(slog.NewTextHandler(w, nil))
	w.tokens = New(Config{Minter: w, Clock: w, Log: log, Changed: func(string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.changed++
	}})
	for _, tell := range before {
		tell()
	}
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.tokens.Run(ctx)
	}()
	w.stop = func() {
		cancel()
		<-done
	}
}

// after lets time pass, and returns how often AWS was asked since the last time.
func (w *world) after(d time.Duration) int {
	<-time.After(d)
	synctest.Wait()
	seen := w.seen
	w.seen = w.count()
	return w.seen - seen
}

func (w *world) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.calls)
}

// askedWho is how often it was asked who asks.
func (w *world) askedWho() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.asked
}

func (w *world) changes() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

// Write takes what is logged.
func (w *world) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(line)
}

func (w *world) logged() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.String()
}

func (w *world) jump(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.jumped += d
}

func (w *world) suspend(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.suspended += d
}

var mine = Grant{Scope: frankfurt}

func want(grant Grant) Wanted { return Wanted{Grant: grant} }

func password(s Status) string { return s.Token.Password.Reveal() }

func TestATokenIsRenewedAtHalfOfItsLife(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		require.True(t, w.tokens.Status(mine).Pending)
		w.tokens.Use("a", want(mine))
		require.Equal(t, 1, w.after(0))
		first := w.tokens.Status(mine)
		require.NoError(t, first.Err)
		require.False(t, first.Pending)
		require.NotEmpty(t, password(first))
		require.Zero(t, w.after(6*time.Hour-time.Second))
		require.Equal(t, password(first), password(w.tokens.Status(mine)))
		require.Equal(t, 1, w.after(37*time.Minute), "half of its life, and up to a twentieth")
		require.NotEqual(t, password(first), password(w.tokens.Status(mine)))
		calls := w.after(30 * 24 * time.Hour)
		require.GreaterOrEqual(t, calls, 30*24/7)
		require.LessOrEqual(t, calls, 30*24/6)
	})
}

func TestOneCallServesAllWhoAskForTheSame(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		for i := range 200 {
			w.tokens.Use(fmt.Sprint(i), want(mine), want(mine))
		}
		require.Equal(t, 1, w.after(time.Minute))
		other := mine
		other.RoleARN = "arn:aws:iam::210987654321:role/pull"
		w.tokens.Use("0", want(mine), want(other))
		require.Equal(t, 1, w.after(time.Minute))
		require.NotEqual(t, password(w.tokens.Status(mine)), password(w.tokens.Status(other)))

		w.tokens.Use("0")
		require.True(t, w.tokens.Status(other).Pending, "nobody wants it any more")
		require.Equal(t, []string{other.ID()}, w.forgotten)
		require.NotEmpty(t, password(w.tokens.Status(mine)), "199 others do")
		for i := range 200 {
			w.tokens.Use(fmt.Sprint(i))
		}
		require.Zero(t, w.after(24*time.Hour))
	})
}

func TestGrantsThatAreUsedBeforeItRunsAreServedOnceItDoes(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.restart(func() {
			w.tokens.Use("a", want(mine))
			require.Zero(t, w.after(time.Hour))
		})
		require.Equal(t, 1, w.after(time.Second))
	})
}

// AWS is away: what is good stays until its end, and the status tells from the first failure on.
func TestAnOutageOfAWS(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.tokens.Use("a", want(mine))
		w.after(5 * time.Hour)
		token := password(w.tokens.Status(mine))
		w.away(errors.New("no such host"))
		w.after(5 * time.Hour)
		s := w.tokens.Status(mine)
		require.Equal(t, token, password(s))
		require.EqualError(t, s.Err, "token for eu-central-1 as ambient: no such host")

		w.after(2*time.Hour - 2*time.Minute)
		require.Equal(t, token, password(w.tokens.Status(mine)), "a minute before its end")
		changes := w.changes()
		w.after(61 * time.Second)
		require.Empty(t, password(w.tokens.Status(mine)))
		require.Greater(t, w.changes(), changes, "its end is told")
		require.Error(t, w.tokens.Status(mine).Err)
		w.after(time.Hour)

		w.answers(nil)
		require.Equal(t, 1, w.after(maxBackoff))
		require.NotEmpty(t, password(w.tokens.Status(mine)))
		require.NoError(t, w.tokens.Status(mine).Err)
	})
}

func TestFailuresThatMayPassAreTriedAgainEverMoreSeldom(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.away(errors.New("throttled"))
		w.tokens.Use("a", want(mine))
		w.after(24 * time.Hour)
		require.Greater(t, w.count(), 24*12)
		require.Less(t, w.count(), 24*60)
		ceiling := time.Duration(0)
		for i := 1; i < len(w.calls); i++ {
			ceiling = min(maxBackoff, max(2*minBackoff, 2*ceiling))
			gap := w.calls[i] - w.calls[i-1]
			require.GreaterOrEqual(t, gap, minBackoff, i)
			require.LessOrEqual(t, gap, ceiling+time.Second, i)
		}
	})
}

func TestWhatSomebodyHasToMendIsAskedSeldom(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.away(fmt.Errorf("AccessDenied: %w", ErrWait))
		w.tokens.Use("a", want(mine))
		require.Equal(t, 5, w.after(time.Hour+time.Second))
		require.ErrorIs(t, w.tokens.Status(mine).Err, ErrWait)
	})
}

func TestNothingToBeHadIsNoFailure(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.answers(func(context.Context, Grant) (Reply, error) { return Reply{Date: w.aws()}, nil })
		w.tokens.Use("a", want(mine))
		require.Equal(t, 1, w.after(time.Minute))
		require.Equal(t, Status{}, w.tokens.Status(mine))
		require.Equal(t, 1, w.after(15*time.Minute))
		w.answers(nil)
		require.Equal(t, 1, w.after(15*time.Minute))
		require.NotEmpty(t, password(w.tokens.Status(mine)))
	})
}

// A call that hangs ends after ten seconds, holds up nobody else, and is never made twice at once.
func TestACallThatHangs(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		other := Grant{Scope: beijing}
		w.answers(func(ctx context.Context, grant Grant) (Reply, error) {
			if grant.Region == beijing.Region {
				return Reply{Password: dockerconfig.NewSensitive("x"), Expires: w.aws().Add(time.Hour)}, nil
			}
			<-ctx.Done()
			return Reply{}, ctx.Err()
		})
		w.tokens.Use("a", want(mine))
		w.after(time.Second)
		w.tokens.Use("b", want(mine), want(other))
		w.after(time.Second)
		require.NotEmpty(t, password(w.tokens.Status(other)))
		require.True(t, w.tokens.Status(mine).Pending)
		w.after(8 * time.Second)
		require.ErrorIs(t, w.tokens.Status(mine).Err, context.DeadlineExceeded)
		w.after(time.Hour)
		require.Equal(t, 1, w.most[mine.ID()])
	})
}

func TestManyGrantsAtOnceStayUnderTenCallsASecond(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		const many = 5000
		for i := range many {
			grant := mine
			grant.RoleARN = fmt.Sprintf("arn:aws:iam::210987654321:role/%d", i)
			w.tokens.Use(fmt.Sprint(i), want(grant))
		}
		w.after(many / maxRate * time.Second)
		require.Equal(t, many, w.count())
		for i := maxRate; i < len(w.calls); i++ {
			require.GreaterOrEqual(t, w.calls[i]-w.calls[i-maxRate], time.Second-time.Microsecond)
		}
	})
}

func TestExpiriesThatCannotBe(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		expires func(now time.Time) time.Time
		err     string
		life    time.Duration
	}{
		"never":             {func(time.Time) time.Time { return time.Time{} }, "already expired", 0},
		"in the past":       {func(now time.Time) time.Time { return now.Add(-time.Hour) }, "a token that has already expired, 1h0m0s ago", 0},
		"now":               {func(now time.Time) time.Time { return now }, "already expired", 0},
		"in a minute":       {func(now time.Time) time.Time { return now.Add(time.Minute) }, "", time.Minute},
		"in thirteen hours": {func(now time.Time) time.Time { return now.Add(13 * time.Hour) }, "", MaxLife},
		"in the year 9999":  {func(time.Time) time.Time { return time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC) }, "", MaxLife},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.answers(func(context.Context, Grant) (Reply, error) {
					return Reply{Password: dockerconfig.NewSensitive("x"), Expires: test.expires(w.aws()), Date: w.aws()}, nil
				})
				w.tokens.Use("a", want(mine))
				w.after(100 * time.Millisecond)
				s := w.tokens.Status(mine)
				if test.err != "" {
					require.ErrorContains(t, s.Err, test.err)
					require.True(t, s.Token.IsZero())
					return
				}
				require.NoError(t, s.Err)
				require.Equal(t, test.life, s.Token.Expires.Sub(s.Token.Issued))
			})
		})
	}
}

// A lie about an expiry costs nothing that was good.
func TestABadReplyLosesNothing(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.tokens.Use("a", want(mine))
		w.after(time.Hour)
		token := password(w.tokens.Status(mine))
		w.answers(func(context.Context, Grant) (Reply, error) {
			return Reply{Password: dockerconfig.NewSensitive("x"), Expires: w.aws().Add(-time.Hour), Date: w.aws()}, nil
		})
		w.after(7 * time.Hour)
		require.Error(t, w.tokens.Status(mine).Err)
		require.Equal(t, token, password(w.tokens.Status(mine)))
	})
}

// The clock of the machine is off by hours, from the start or from some moment on, and AWS is there or not.
func TestTheClockOfTheMachineDoesNotMatter(t *testing.T) {
	t.Parallel()
	for name, jump := range map[string]time.Duration{"twelve hours ahead": 12 * time.Hour, "twelve hours behind": -12 * time.Hour} {
		t.Run(name+", at once", func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.jump(jump)
				w.restart()
				w.tokens.Use("a", want(mine))
				require.Equal(t, 1, w.after(time.Second))
				s := w.tokens.Status(mine)
				require.WithinDuration(t, w.aws().Add(12*time.Hour), s.Token.Expires, 2*time.Second)
				require.Contains(t, w.logged(), "the clock differs from that of AWS")
				require.Zero(t, w.after(6*time.Hour-time.Minute))
				require.Equal(t, 1, w.after(time.Hour))
			})
		})
		t.Run(name+", in the middle", func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.tokens.Use("a", want(mine))
				w.after(3 * time.Hour)
				token := password(w.tokens.Status(mine))
				w.jump(jump)
				require.Zero(t, w.after(3*time.Hour-time.Minute))
				require.Equal(t, token, password(w.tokens.Status(mine)))
				w.away(errors.New("x"))
				w.after(6*time.Hour - time.Minute)
				require.Equal(t, token, password(w.tokens.Status(mine)))
				w.after(2 * time.Minute)
				require.Empty(t, password(w.tokens.Status(mine)))
			})
		})
		t.Run(name+", and back", func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.jump(jump)
				w.restart()
				w.tokens.Use("a", want(mine))
				w.after(time.Hour)
				w.jump(-jump)
				w.after(7 * time.Hour)
				require.Contains(t, w.logged(), "the clock is that of AWS again")
				require.Equal(t, 2, w.count())
			})
		})
		t.Run(name+", and a restart in the middle", func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.tokens.Use("a", want(mine))
				w.after(3 * time.Hour)
				token := w.tokens.Status(mine).Token
				w.jump(jump)
				w.restart()
				w.tokens.Use("a", Wanted{mine, token})
				w.after(time.Second)
				s := w.tokens.Status(mine)
				require.False(t, s.Token.IsZero())
				require.True(t, w.aws().Before(s.Token.Expires))
				w.after(30 * time.Minute) // whatever the first look was, a reply has set it right
				require.LessOrEqual(t, w.count(), 2)
				require.LessOrEqual(t, w.after(5*time.Hour-time.Minute), 1)
			})
		})
	}
}

// Nothing is served that has expired while the machine slept.
func TestASuspendedMachine(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.tokens.Use("a", want(mine))
		w.after(time.Hour)
		token := password(w.tokens.Status(mine))
		w.suspend(13 * time.Hour)
		require.Equal(t, Status{Pending: true}, w.tokens.Status(mine), "before any timer has run out")
		require.Equal(t, 1, w.after(maxSleep))
		require.NotEmpty(t, password(w.tokens.Status(mine)))
		require.NotEqual(t, token, password(w.tokens.Status(mine)))
	})
}

// A restart, or a new leader, goes on with what there is.
func TestATokenFromBefore(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		after time.Duration // since it was issued
		calls int           // at once
		same  bool
	}{
		"with more than half of its life left":     {5 * time.Hour, 0, true},
		"with less than that":                      {7 * time.Hour, 1, false},
		"at its end":                               {12*time.Hour - 30*time.Second, 1, false},
		"after its end":                            {20 * time.Hour, 1, false},
		"of tomorrow, as the clock has it wrongly": {-24 * time.Hour, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				issued := w.aws().Add(-test.after)
				w.restart(func() {
					w.tokens.Use("a", Wanted{mine, Token{Password: dockerconfig.NewSensitive("old"), Issued: issued, Expires: issued.Add(12 * time.Hour)}})
					w.tokens.Use("b", Wanted{mine, Token{Password: dockerconfig.NewSensitive("older"), Issued: issued.Add(-time.Hour), Expires: issued.Add(11 * time.Hour)}})
					w.tokens.Use("c", Wanted{mine, Token{Password: dockerconfig.NewSensitive("nonsense"), Issued: issued, Expires: issued.Add(1200 * time.Hour)}})
				})
				require.Equal(t, test.calls, w.after(time.Second))
				require.Equal(t, test.same, password(w.tokens.Status(mine)) == "old")
			})
		})
	}
}

// The same with all that is between: AWS hangs, for five hours and for thirteen, and the coordinator restarts again and
// again, or does not.
func TestAnOutageOfAWSAsTheSDKSeesIt(t *testing.T) {
	t.Parallel()
	for name, restarts := range map[string]bool{"one process": false, "a new one each hour": true} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				minter, fake := newAWS(t)
				fake.Clock = w.aws
				w.answers(minter.Mint)
				grant := Grant{frankfurt, customerKeys()}
				var known Token // as the state Secret has it
				opens := func() bool {
					s := w.tokens.Status(grant)
					if !s.Token.IsZero() {
						known = s.Token
					}
					return fake.Opens(grant.Region, false, Username, s.Token.Password.Reveal())
				}
				restart := func() {
					if restarts {
						w.restart(func() { w.tokens.Use("a", Wanted{grant, known}) })
						w.after(0)
					}
				}
				w.tokens.Use("a", want(grant))
				w.after(4 * time.Hour)
				require.True(t, opens())
				fake.Faults(func(fakeaws.Call) *fakeaws.Fault { return &fakeaws.Fault{Hang: true} })
				for minute := range 5 * 60 {
					if minute%60 == 30 {
						restart()
					}
					w.after(time.Minute)
					require.True(t, opens())
				}
				w.after(callTimeout)
				require.ErrorContains(t, w.tokens.Status(grant).Err, "no answer in time")
				for minute := range 8 * 60 {
					if minute%60 == 30 {
						restart()
					}
					w.after(time.Minute)
					s := w.tokens.Status(grant)
					require.Equal(t, !s.Token.IsZero(), opens(), "nothing is served that has expired")
				}
				require.False(t, opens())
				fake.Faults(nil)
				w.after(maxBackoff + callTimeout)
				require.True(t, opens())
				require.NoError(t, w.tokens.Status(grant).Err)
			})
		})
	}
}

// AWS is where the clock of the machine is not.
func TestClocksThatDifferAsTheSDKSeesThem(t *testing.T) {
	t.Parallel()
	for _, off := range []time.Duration{12 * time.Hour, -12 * time.Hour} {
		t.Run(off.String(), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				minter, fake := newAWS(t)
				w.awsOff = off
				fake.Clock = w.aws
				w.answers(minter.Mint)
				grant := Grant{frankfurt, customerKeys()}
				w.tokens.Use("a", want(grant))
				for range 48 * 12 {
					w.after(5 * time.Minute)
					s := w.tokens.Status(grant)
					require.NoError(t, s.Err)
					require.True(t, fake.Opens(grant.Region, false, Username, s.Token.Password.Reveal()))
				}
				require.LessOrEqual(t, w.count(), 8)
				require.Len(t, fake.Refused(), 1)
			})
		})
	}
}

// A coordinator that comes up as somebody else keeps the tokens of who it was.
func TestACoordinatorThatIsSomebodyElse(t *testing.T) {
	t.Parallel()
	role := mine
	role.RoleARN = "arn:aws:iam::210987654321:role/pull"
	keys := Grant{frankfurt, customerKeys()}
	for name, test := range map[string]struct {
		grant     Grant
		was, is   string
		age       time.Duration
		kept      bool
		principal string // of the token in the end
	}{
		"the same":                         {mine, "me", "me", time.Hour, false, "me"},
		"somebody else":                    {mine, "you", "me", time.Hour, true, "me"},
		"somebody else, late":              {mine, "you", "me", 11 * time.Hour, true, "me"},
		"it is not known who that was":     {mine, "", "me", time.Hour, false, "me"},
		"it is not known who this is":      {mine, "you", "", time.Hour, false, ""},
		"somebody else with the same role": {role, "", "me", time.Hour, false, ""},
		"somebody else with the same keys": {keys, "", "me", time.Hour, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.is(test.is)
				issued := w.aws().Add(-test.age)
				w.restart(func() {
					w.tokens.Use("a", Wanted{test.grant, Token{Password: dockerconfig.NewSensitive("old"), Issued: issued, Expires: issued.Add(12 * time.Hour), Principal: test.was}})
				})
				require.Zero(t, w.after(time.Second))
				s := w.tokens.Status(test.grant)
				require.Equal(t, "old", password(s))
				if !test.kept {
					require.NoError(t, s.Err)
					require.Zero(t, w.after(6*time.Hour-test.age-time.Minute))
					require.Equal(t, 1, w.after(time.Hour))
				} else {
					require.ErrorIs(t, s.Err, ErrIdentityChanged)
					require.ErrorContains(t, s.Err, "from you to me; the token of the former stays in use until it expires at")
					require.Zero(t, w.after(12*time.Hour-test.age-6*time.Minute))
					require.Equal(t, "old", password(w.tokens.Status(test.grant)))
					require.Equal(t, 1, w.after(2*time.Minute))
				}
				s = w.tokens.Status(test.grant)
				require.NoError(t, s.Err)
				require.NotEqual(t, "old", password(s))
				require.Equal(t, test.principal, s.Token.Principal)
			})
		})
	}
}

// A coordinator that becomes somebody else while it runs, as by another role for its Pod Identity association, and back.
func TestACoordinatorThatBecomesSomebodyElse(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.tokens.Use("a", want(mine))
		require.Equal(t, 1, w.after(time.Second))
		first := password(w.tokens.Status(mine))
		w.is("you")
		require.Zero(t, w.after(7*time.Hour), "it is asked before the token is renewed")
		require.ErrorIs(t, w.tokens.Status(mine).Err, ErrIdentityChanged)
		require.Equal(t, first, password(w.tokens.Status(mine)))
		told := w.changes()
		require.Zero(t, w.after(time.Hour))
		require.Equal(t, told, w.changes(), "told once")
		w.is("me")
		require.Equal(t, 1, w.after(waitBackoff+time.Minute))
		s := w.tokens.Status(mine)
		require.NoError(t, s.Err)
		require.NotEqual(t, first, password(s))

		w.is("you")
		require.Zero(t, w.after(11*time.Hour))
		require.Equal(t, 1, w.after(time.Hour))
		require.Equal(t, "you", w.tokens.Status(mine).Token.Principal)
		w.is("")
		require.Equal(t, 1, w.after(7*time.Hour), "where it cannot be found out, it is who it was")
		require.Equal(t, "you", w.tokens.Status(mine).Token.Principal)
	})
}

// All regions at once, and it is asked once who asks; where there is no answer, once in each.
func TestWhoItIsIsAskedOnceForAll(t *testing.T) {
	t.Parallel()
	for principal, times := range map[string]int{"me": 1, "": 40, "nobody": 40} {
		t.Run(principal, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.is(principal)
				for i := range 40 {
					grant := mine
					grant.Region = fmt.Sprint("region-", i)
					w.tokens.Use(fmt.Sprint(i), want(grant))
				}
				require.Equal(t, 40, w.after(10*time.Second))
				require.Equal(t, times, w.askedWho())
			})
		})
	}
}

// callers asks who asks in a way of its own.
type callers struct {
	*world
	ask func(ctx context.Context, grant Grant) (Caller, error)
}

func (c callers) Caller(ctx context.Context, grant Grant) (Caller, error) { return c.ask(ctx, grant) }

// ofSomebodyElse is a token that is due for renewal, and that "you" have asked for.
func (w *world) ofSomebodyElse() Token {
	issued := w.aws().Add(-7 * time.Hour)
	return Token{Password: dockerconfig.NewSensitive("old"), Issued: issued, Expires: issued.Add(12 * time.Hour), Principal: "you"}
}

// A region that cannot be asked does not hide from the others that the identity has changed.
func TestARegionWithoutSTS(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.restart(func() {
			w.tokens.config.Minter = callers{w, func(ctx context.Context, grant Grant) (Caller, error) {
				if grant.Region != frankfurt.Region {
					return Caller{}, errors.New("no such host")
				}
				return w.Caller(ctx, grant)
			}}
			w.tokens.Use("bad", want(Grant{Scope: Scope{Partition: "aws", Region: "eu-nowhere-1"}}))
		})
		w.after(10 * time.Second)
		w.tokens.Use("a", Wanted{mine, w.ofSomebodyElse()})
		w.after(10 * time.Second)
		s := w.tokens.Status(mine)
		require.ErrorIs(t, s.Err, ErrIdentityChanged)
		require.Equal(t, "old", password(s))
	})
}

// Who asks first may go, and others wait for the answer.
func TestAQuestionThatIsGivenUpIsAnsweredAllTheSame(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.restart(func() {
			w.tokens.config.Minter = callers{w, func(ctx context.Context, grant Grant) (Caller, error) {
				select {
				case <-ctx.Done():
					return Caller{}, ctx.Err()
				case <-time.After(3 * time.Second):
					return w.Caller(ctx, grant)
				}
			}}
		})
		public := Grant{Scope: frankfurt}
		public.Public = true
		w.tokens.Use("gone", want(public))
		w.after(time.Second)
		w.tokens.Use("a", Wanted{mine, w.ofSomebodyElse()})
		w.after(time.Second)
		w.tokens.Use("gone")
		w.after(10 * time.Second)
		s := w.tokens.Status(mine)
		require.ErrorIs(t, s.Err, ErrIdentityChanged)
		require.Equal(t, "old", password(s))
	})
}

// What has failed by a clock that was ahead is not waited for until that time.
func TestAFailureBeforeTheTimeIsKnownIsTriedAgainSoon(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.is("")
		w.jump(12 * time.Hour)
		w.restart()
		w.away(errors.New("no such host"))
		w.tokens.Use("a", want(Grant{Scope: beijing}))
		require.Equal(t, 1, w.after(500*time.Millisecond))
		w.answers(nil)
		w.tokens.Use("b", want(mine))
		require.Equal(t, 1, w.after(500*time.Millisecond))
		require.Equal(t, 1, w.after(2*maxBackoff))
	})
}

// By a clock that is behind, a token from before lives longer than it does. So AWS is asked for the time, and for nothing else.
func TestARestartWithAClockThatIsBehind(t *testing.T) {
	t.Parallel()
	role := mine
	role.RoleARN = "arn:aws:iam::210987654321:role/pull"
	for name, grant := range map[string]Grant{"itself": mine, "with a role": role, "with keys": {frankfurt, customerKeys()}} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				issued := w.aws().Add(-4 * time.Hour)
				w.jump(-12 * time.Hour)
				w.restart(func() {
					w.tokens.Use("a", Wanted{grant, Token{Password: dockerconfig.NewSensitive("old"), Issued: issued, Expires: issued.Add(12 * time.Hour)}})
				})
				require.Zero(t, w.after(2*time.Hour-time.Minute))
				require.Equal(t, "old", password(w.tokens.Status(grant)))
				require.Equal(t, 1, w.askedWho())
				require.Equal(t, 1, w.after(time.Hour), "at half of its life")
			})
		})
	}
}

// A coordinator without any credentials says so while the token of another is still good.
func TestACoordinatorThatIsNobody(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.is("nobody")
		issued := w.aws().Add(-time.Hour)
		w.restart(func() {
			w.tokens.Use("a", Wanted{mine, Token{Password: dockerconfig.NewSensitive("old"), Issued: issued, Expires: issued.Add(12 * time.Hour), Principal: "me"}})
		})
		require.Zero(t, w.after(time.Second))
		s := w.tokens.Status(mine)
		require.Equal(t, "old", password(s))
		require.ErrorIs(t, s.Err, ErrNoCredentials)
		w.is("me")
		require.Zero(t, w.after(waitBackoff))
		require.NoError(t, w.tokens.Status(mine).Err)
		require.Equal(t, 1, w.after(6*time.Hour))
	})
}

// Who wants tokens while it stops gets none.
func TestNothingIsStartedOnceItStops(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.tokens.Use("a", want(mine))
		w.after(time.Second)
		var using sync.WaitGroup
		for i := range 100 {
			using.Go(func() { w.tokens.Use(fmt.Sprint(i), want(Grant{Scope: beijing})) })
		}
		w.stop()
		using.Wait()
		w.after(0)
		require.Zero(t, w.after(24*time.Hour))
	})
}

// looks has a user look at whatever changes, as a coordinator does, with the token that it knows from before each time.
func (w *world) looks(grant Grant, known func() Token) (count func() int) {
	var looks atomic.Int64
	changes := make(chan struct{}, 1)
	w.restart(func() {
		w.tokens.config.Changed = func(string) {
			select {
			case changes <- struct{}{}:
			default:
			}
		}
	})
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			looks.Add(1)
			w.tokens.Use("a", Wanted{grant, known()})
			<-time.After(20 * time.Millisecond)
			select {
			case <-changes:
			case <-ctx.Done():
				return
			}
		}
	}()
	stop := w.stop
	w.stop = func() {
		cancel()
		<-done
		stop()
	}
	return func() int { return int(looks.Load()) }
}

// What is known from before counts no more once AWS has said otherwise.
func TestPermissionThatIsTakenBack(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		var known Token
		w.looks(mine, func() Token {
			if s := w.tokens.Status(mine); !s.Pending {
				known = s.Token
			}
			return known
		})
		require.Equal(t, 1, w.after(time.Minute))
		w.answers(func(context.Context, Grant) (Reply, error) { return Reply{Date: w.aws()}, nil })
		w.after(7 * time.Hour)
		require.Equal(t, Status{}, w.tokens.Status(mine))
		require.LessOrEqual(t, w.after(time.Hour), 5)
	})
}

// The one that is known from before has expired, and whoever knows it cannot write that down.
func TestATokenThatIsHandedInAgainAfterItsEnd(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.away(errors.New("x"))
		issued := w.aws().Add(-11 * time.Hour)
		known := Token{Password: dockerconfig.NewSensitive("old"), Issued: issued, Expires: issued.Add(12 * time.Hour), Principal: "me"}
		count := w.looks(mine, func() Token { return known })
		w.after(2 * time.Hour)
		require.Empty(t, password(w.tokens.Status(mine)))
		before := count()
		w.after(time.Hour)
		require.LessOrEqual(t, count()-before, 60)
	})
}

// The machine sleeps between an answer and its being read.
func TestAMachineThatIsSuspendedDuringACall(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.answers(func(context.Context, Grant) (Reply, error) {
			r := Reply{Password: dockerconfig.NewSensitive("x"), Expires: w.aws().Add(12 * time.Hour), Date: w.aws()}
			w.suspend(8 * time.Hour)
			return r, nil
		})
		w.tokens.Use("a", want(mine))
		w.after(time.Second)
		require.False(t, w.tokens.Now().Before(w.aws()))
		w.away(errors.New("x"))
		w.after(4*time.Hour - time.Minute)
		require.Empty(t, password(w.tokens.Status(mine)))
	})
}

// By a clock that is a day ahead, the token from before has expired. That is not taken for the truth before AWS was asked.
func TestARestartWithAClockThatIsAhead(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		issued := w.aws().Add(-time.Hour)
		w.jump(24 * time.Hour)
		w.restart(func() {
			w.tokens.Use("a", Wanted{mine, Token{Password: dockerconfig.NewSensitive("old"), Issued: issued, Expires: issued.Add(12 * time.Hour), Principal: "me"}})
			require.True(t, w.tokens.Status(mine).Pending)
		})
		require.Equal(t, 1, w.after(time.Second))
		s := w.tokens.Status(mine)
		require.NoError(t, s.Err)
		require.NotEmpty(t, password(s))
	})
}
