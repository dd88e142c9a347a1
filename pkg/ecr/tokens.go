package ecr

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"

	"github.com/imps-node/imps/pkg/dockerconfig"
)

// Username is that of every token (https://docs.aws.amazon.com/AmazonECR/latest/userguide/registry_auth.html).
const Username = "AWS"

const (
	// MaxLife bounds what is believed of an expiry: AWS documents 12 hours.
	MaxLife = 12 * time.Hour
	// callTimeout bounds one call, with all that the SDK does for it.
	callTimeout = 10 * time.Second
	// maxRate is how many calls a second are begun, of all grants together.
	maxRate = 10
	// Failures that may pass are tried again after a time between minBackoff and a bound that doubles up to maxBackoff.
	minBackoff, maxBackoff = time.Second, 5 * time.Minute
	// waitBackoff is for failures that somebody has to mend.
	waitBackoff = 15 * time.Minute
	// maxSleep bounds every wait: timers stand still while a machine is suspended, tokens do not.
	maxSleep = time.Minute
	// identityFresh is for how long it counts who the process was.
	identityFresh = time.Minute
	// tolerableSkew is by how much the clock may differ from AWS's without a word. AWS refuses signatures that are
	// off by more (https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-troubleshooting.html).
	tolerableSkew = 5 * time.Minute
)

// Token is what opens the registries of a scope.
type Token struct {
	Password dockerconfig.Sensitive
	// Issued and Expires are by the clock of AWS.
	Issued, Expires time.Time
	// Principal is who the process was that asked for it, where it asked as itself; empty where that is not known.
	Principal string
}

// IsZero reports whether there is none.
func (t Token) IsZero() bool { return t.Password.IsZero() }

// margin is how long before its expiry a token is not used any more: a pull takes its time.
func (t Token) margin() time.Duration { return min(time.Minute, t.Expires.Sub(t.Issued)/10) }

// Reply is what AWS answered.
type Reply struct {
	// Password is empty where there is nothing to be had, and that is well: ECR Public without permission.
	Password dockerconfig.Sensitive
	Expires  time.Time
	// Date is AWS's time, zero where the reply had none.
	Date time.Time
}

// Caller is who asks, as AWS sees it.
type Caller struct {
	// Principal is the ARN of a user or a role, without the name of the session.
	Principal string
	// Date is AWS's time, zero where the reply had none.
	Date time.Time
}

// Minter asks AWS. Errors that somebody has to mend are ErrWait.
type Minter interface {
	// Mint asks for a token.
	Mint(ctx context.Context, grant Grant) (Reply, error)
	// Caller asks who asks for a grant, before any role is assumed.
	Caller(ctx context.Context, grant Grant) (Caller, error)
	// Forget drops what is kept for a grant, as credentials of a role.
	Forget(grant Grant)
}

// ErrWait says that another try helps only once somebody has changed something, here or at AWS.
var ErrWait = errors.New("somebody has to mend this")

// ErrIdentityChanged says that the process is not who it was when it asked for a token. What that one could read, this one may
// not be able to; so the token stays in use until it expires.
var ErrIdentityChanged = errors.New("the coordinator's AWS identity has changed")

// Clock tells the time.
type Clock interface {
	// Now is what everybody believes the time to be. It may jump.
	Now() time.Time
	// Boot is the time since some moment, suspension included. It never jumps.
	Boot() time.Duration
}

// Status is what is known of a grant.
type Status struct {
	// Token is zero where there is none that may be used.
	Token Token
	// Err says why the last call failed, nil where it did not.
	Err error
	// Pending: nothing is known yet. Where there is neither a token nor an error and it is not pending, there is nothing to
	// be had, and that is well.
	Pending bool
}

// Config of Tokens. Everything is required.
type Config struct {
	Minter Minter
	Clock  Clock
	Log    *slog.Logger
	// Changed is called with the ID of a grant whose status has changed, from several goroutines.
	Changed func(id string)
}

// Tokens keeps the tokens of all grants that somebody uses: one call for each, whoever they are, and again at half of
// its life. It is safe for concurrent use, and a prometheus.Collector.
type Tokens struct {
	config  Config
	limiter *rate.Limiter
	mints   *prometheus.CounterVec

	mu      sync.Mutex
	run     context.Context // nil where it does not run
	running sync.WaitGroup
	grants  map[string]*grantState
	// base is the time of AWS at boot time baseAt; told says that AWS has told it, and not the clock of the machine.
	base   time.Time
	baseAt time.Duration
	told   bool
	// skew is what the clock lacked to it at the last reply.
	skew time.Duration
	// principal is who the process itself is, by the last answer, at boot time knownAt. unknown are the regions that could
	// not be asked. identify shares the question.
	principal string
	knownAt   time.Duration
	unknown   map[string]unknown
	identify  singleflight.Group
}

// unknown is why a region could not be asked who the process is, and at what boot time.
type unknown struct {
	err error
	at  time.Duration
}

// grantState is a grant that somebody uses. The lock of Tokens guards all but the first two.
type grantState struct {
	grant Grant
	id    string

	users map[string]struct{}
	stop  context.CancelFunc // nil where it does not run
	wake  chan struct{}

	token    Token
	err      error
	failures int
	// success is when the last call succeeded.
	success  time.Time
	answered bool
	// outdated: AWS has answered, or a token has come to its end, so that what others know from before counts no more.
	outdated bool
	// next is when the next call is due.
	next time.Time
	// renewal is when the token has lived for half of its life, and a little more.
	renewal time.Time
}

// New returns Tokens that know of no grant yet.
func New(config Config) *Tokens {
	return &Tokens{
		config: config, limiter: rate.NewLimiter(maxRate, 1), mints: newMints(), grants: map[string]*grantState{}, unknown: map[string]unknown{},
		base: config.Clock.Now(), baseAt: config.Clock.Boot(),
	}
}

// Run keeps tokens until the context ends.
func (t *Tokens) Run(ctx context.Context) {
	t.mu.Lock()
	t.run = ctx
	for _, g := range t.grants {
		t.start(g) //nolint:contextcheck // it is t.run
	}
	t.mu.Unlock()
	<-ctx.Done()
	t.mu.Lock()
	t.run = nil // nothing is started any more
	t.mu.Unlock()
	t.running.Wait()
}

// now is the time at AWS, as far as is known: its own at the last reply, and what has passed since. The clock of the
// machine counts only until the first reply. The caller holds the lock.
func (t *Tokens) now() time.Time { return t.base.Add(t.config.Clock.Boot() - t.baseAt) }

// Wanted is a grant that a user wants.
type Wanted struct {
	Grant Grant
	// Known is a token of it from before, zero where there is none.
	Known Token
}

// Use says which grants a user wants from now on, instead of those from before. A grant that nobody wants any more
// is forgotten.
func (t *Tokens) Use(user string, wants ...Wanted) {
	t.mu.Lock()
	defer t.mu.Unlock()
	wanted := map[string]struct{}{}
	for _, want := range wants {
		id := want.Grant.ID()
		wanted[id] = struct{}{}
		g := t.grants[id]
		if g == nil {
			g = &grantState{grant: want.Grant, id: id, users: map[string]struct{}{}, wake: make(chan struct{}, 1), next: t.now()}
			t.grants[id] = g
		}
		g.users[user] = struct{}{}
		t.take(g, want.Known)
		t.start(g)
	}
	for id, g := range t.grants {
		if _, ok := wanted[id]; ok {
			continue
		}
		delete(g.users, user)
		if len(g.users) == 0 {
			if g.stop != nil {
				g.stop()
			}
			delete(t.grants, id)
			t.config.Minter.Forget(g.grant)
		}
	}
}

// take takes a token over that is known from before, where none is that lives longer. The caller holds the lock.
func (t *Tokens) take(g *grantState, token Token) {
	life := token.Expires.Sub(token.Issued)
	if g.outdated || token.IsZero() || life <= 0 || life > MaxLife || !token.Expires.After(g.token.Expires) {
		return
	}
	if token.Issued.After(t.now()) {
		// The time is at least that, whatever our clock says.
		t.base, t.baseAt = token.Issued, t.config.Clock.Boot()
	}
	if !t.usable(token) {
		return // then AWS is asked before anything is told
	}
	g.token, g.answered = token, true
	g.renewal = renewal(token)
	if g.failures == 0 {
		if g.next = g.renewal; g.asItself() || !t.told {
			g.next = t.now() // is it still the same that asked for it, and what is the time?
		}
	}
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// Now is the time at AWS, as far as is known.
func (t *Tokens) Now() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.now()
}

// Status returns what is known of a grant; of one that nobody uses, that it is pending.
func (t *Tokens) Status(grant Grant) Status {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.grants[grant.ID()]
	if g == nil {
		return Status{Pending: true}
	}
	s := Status{Err: g.err, Pending: !g.answered}
	switch {
	case t.usable(g.token):
		s.Token = g.token
	case !g.token.IsZero() && g.err == nil: // it has come to its end, and AWS is about to be asked
		s.Pending = true
	}
	return s
}

// usable reports whether a token may still be used. The caller holds the lock.
func (t *Tokens) usable(token Token) bool {
	return !token.IsZero() && t.now().Before(token.Expires.Add(-token.margin()))
}

// asItself reports whether the process asks as itself, without a role.
func (g *grantState) asItself() bool { return g.grant.Ambient() && g.grant.RoleARN == "" }

// renewal is when a token is to be renewed: at half of its life, and a little later, each at another moment.
func renewal(token Token) time.Time {
	life := token.Expires.Sub(token.Issued)
	return token.Issued.Add(life/2 + rand.N(life/20+1)) //nolint:gosec // jitter is no secret
}

// start runs the schedule of a grant. The caller holds the lock.
func (t *Tokens) start(g *grantState) {
	if t.run == nil || g.stop != nil {
		return
	}
	var ctx context.Context
	ctx, g.stop = context.WithCancel(t.run)
	t.running.Go(func() { t.keep(ctx, g) })
}

// keep calls AWS whenever it is time, and tells when a token has come to its end.
func (t *Tokens) keep(ctx context.Context, g *grantState) {
	for ctx.Err() == nil {
		t.mu.Lock()
		now := t.now()
		wait := g.next.Sub(now)
		ended := false
		if !g.token.IsZero() {
			end := g.token.Expires.Add(-g.token.margin())
			if ended = !now.Before(end); ended {
				g.token, g.outdated = Token{}, true
				g.answered = g.err != nil
			}
			wait = min(wait, max(end.Sub(now), 0))
		}
		t.mu.Unlock()
		switch {
		case ended:
			t.config.Changed(g.id)
		case wait <= 0:
			t.call(ctx, g)
		default:
			timer := time.NewTimer(min(wait, maxSleep))
			select {
			case <-ctx.Done():
			case <-g.wake:
			case <-timer.C:
			}
			timer.Stop()
		}
	}
}

// call asks AWS once, and notes the answer.
func (t *Tokens) call(ctx context.Context, g *grantState) {
	principal := ""
	if g.asItself() || t.needsTime(g) {
		var err error
		principal, err = t.whoIsIt(ctx, g)
		due, changed := t.isDue(g, principal, err)
		if changed {
			t.config.Changed(g.id)
		}
		if !due {
			return
		}
	}
	if t.limiter.Wait(ctx) != nil {
		return
	}
	asking, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	asked := t.config.Clock.Boot()
	reply, err := t.config.Minter.Mint(asking, g.grant)
	if ctx.Err() != nil {
		return
	}
	t.mu.Lock()
	t.learn(reply.Date, asked)
	now := t.now()
	var token Token
	if err == nil && !reply.Password.IsZero() {
		token = Token{Password: reply.Password, Issued: now, Expires: reply.Expires, Principal: principal}
		if token.Expires.Sub(now) > MaxLife {
			token.Expires = now.Add(MaxLife)
		}
		if !token.Expires.After(now) {
			err = fmt.Errorf("AWS has given a token that has already expired, %s ago", now.Sub(reply.Expires).Round(time.Second))
		}
	}
	g.answered, g.outdated = true, g.outdated || err == nil
	t.mints.WithLabelValues(g.grant.Scope.String(), g.grant.Who(), resultOf(token, err)).Inc()
	if err != nil {
		err = fmt.Errorf("token for %s as %s: %w", g.grant.Scope, g.grant.Who(), err)
		g.err = err
		g.next = now.Add(backoff(err, g.failures))
		g.failures++
	} else {
		g.err, g.failures, g.token, g.success = nil, 0, token, now
		if g.next = now.Add(waitBackoff); !token.IsZero() {
			g.renewal = renewal(token)
			g.next = g.renewal
		}
	}
	t.mu.Unlock()
	t.config.Changed(g.id)
}

// needsTime reports whether a token from before goes by nothing but the clock of the machine.
func (t *Tokens) needsTime(g *grantState) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.told && !g.token.IsZero()
}

// whoIsIt asks who the process itself is, once for all who want to know within a minute; those of a region that cannot be
// asked ask there once. With an error it is who it was. The time comes with the answer, and of a grant that has keys or a role
// nothing else is wanted.
func (t *Tokens) whoIsIt(ctx context.Context, g *grantState) (string, error) {
	if !g.asItself() {
		_, err := t.ask(ctx, g.grant)
		return "", err
	}
	region := g.grant.Region
	answer, err, _ := t.identify.Do(region, func() (any, error) {
		t.mu.Lock()
		run, boot := t.run, t.config.Clock.Boot()
		known, knownAt := t.principal, t.knownAt
		failed, ok := t.unknown[region]
		t.mu.Unlock()
		switch {
		case run == nil: // it ends
			return known, context.Canceled
		case known != "" && boot-knownAt < identityFresh:
			return known, nil
		case ok && boot-failed.at < identityFresh:
			return known, failed.err
		}
		principal, err := t.ask(run, g.grant) // whoever asked first may go, and others wait for it
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.unknown, region)
		if err != nil {
			t.unknown[region] = unknown{err, boot}
			return known, err
		}
		t.principal, t.knownAt = principal, boot
		return principal, nil
	})
	principal, _ := answer.(string)
	return principal, err
}

// ask asks who asks for a grant, and learns the time.
func (t *Tokens) ask(ctx context.Context, grant Grant) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	asked := t.config.Clock.Boot()
	caller, err := t.config.Minter.Caller(ctx, grant)
	if err != nil {
		t.config.Log.Debug("cannot find out who asks AWS", "identity", grant.Who(), "error", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.learn(caller.Date, asked)
	return caller.Principal, err
}

// isDue reports whether a new token is to be asked for, with the process being who it is: not as long as one is good that
// another has asked for, or that this process could not have asked for, which changes the status; nor before the one from
// before has lived for half of its life. Where it is not known who the process is, as where STS cannot be reached, that is
// no reason not to ask.
func (t *Tokens) isDue(g *grantState, principal string, unknown error) (due, changed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	if !t.usable(g.token) {
		return true, false
	}
	if principal != "" && g.token.Principal != "" && g.token.Principal != principal {
		// In time for a few tries before its end. Until then it may become the former again.
		last := g.token.Expires.Add(-5 * g.token.margin())
		if !now.Before(last) {
			return true, false
		}
		g.next = now.Add(min(waitBackoff, last.Sub(now)))
		was := g.err
		g.err = fmt.Errorf("token for %s: %w from %s to %s; the token of the former stays in use until it expires at %s",
			g.grant.Scope, ErrIdentityChanged, g.token.Principal, principal, g.token.Expires.UTC().Format(time.RFC3339))
		return false, was == nil || was.Error() != g.err.Error()
	}
	if errors.Is(unknown, ErrNoCredentials) {
		g.err = fmt.Errorf("token for %s: %w", g.grant.Scope, unknown)
		g.failures++
		g.next = now.Add(waitBackoff)
		return false, true
	}
	if !now.Before(g.renewal) {
		return true, false
	}
	changed = g.err != nil
	g.next, g.err, g.failures = g.renewal, nil, 0
	return false, changed
}

// learn takes over AWS's time from a reply to a call that began at a boot time. The caller holds the lock.
func (t *Tokens) learn(date time.Time, asked time.Duration) {
	if date.IsZero() {
		return
	}
	// The reply was written somewhere since then. Where the machine slept meanwhile, that makes a great difference: better
	// too late a time than one that serves what has expired.
	boot, was := t.config.Clock.Boot(), t.now()
	t.base, t.baseAt, t.told = date, asked, true
	if shift := t.now().Sub(was); shift.Abs() > tolerableSkew {
		for _, g := range t.grants {
			if g.err != nil || g.token.IsZero() {
				g.next = g.next.Add(shift) // what waits for a while, and for no time of AWS
			}
		}
	}
	before := t.skew
	t.skew = date.Sub(t.config.Clock.Now().Add(-(boot - asked) / 2)).Round(time.Second)
	if off := t.skew.Abs() > tolerableSkew; off != (before.Abs() > tolerableSkew) {
		if off {
			t.config.Log.Warn("the clock differs from that of AWS, which is allowed for", "skew", t.skew.String())
		} else {
			t.config.Log.Info("the clock is that of AWS again")
		}
	}
}

// backoff is how long to wait after so many failures and this one.
func backoff(err error, failures int) time.Duration {
	if errors.Is(err, ErrWait) {
		return waitBackoff
	}
	ceiling := maxBackoff
	if failures < 9 {
		ceiling = min(ceiling, 2*minBackoff<<failures)
	}
	return minBackoff + rand.N(ceiling-minBackoff) //nolint:gosec // jitter is no secret
}
