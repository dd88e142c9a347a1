package faults

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

// process is an imps-node that reaches the API server through a proxy of its own.
type process struct {
	*imps.Process
	binary string
	spec   imps.Spec
	proxy  *cluster.Proxy
}

// coordinator starts the cluster duty, and does not wait.
func (s *system) coordinator(name string, change ...func(*process)) *process {
	s.t.Helper()
	spec, err := imps.Coordinator(s.t.Context(), control)
	require.NoError(s.t, err)
	spec.Name = "coordinator-" + name
	spec.Args = append(spec.Args, "--demand-linger="+linger.String())
	return s.start(spec, change...)
}

// leader starts the cluster duty, and waits until it leads.
func (s *system) leader(name string) *process {
	s.t.Helper()
	p := s.coordinator(name)
	s.leads(p)
	return p
}

// agent starts the node duty of a node, and waits until it is ready.
func (s *system) agent(node string, change ...func(*process)) *process {
	s.t.Helper()
	spec, err := imps.Agent(s.t.Context(), control, node)
	require.NoError(s.t, err)
	p := s.start(spec, change...)
	s.ready(p)
	return p
}

func (s *system) start(spec imps.Spec, change ...func(*process)) *process {
	s.t.Helper()
	p := &process{binary: binary, spec: spec}
	for _, c := range change {
		c(p)
	}
	var err error
	p.proxy, err = control.Proxy(s.t.Context())
	require.NoError(s.t, err)
	p.spec.Config = p.proxy.Config(p.spec.Config)
	s.again(p)
	s.t.Cleanup(func() {
		p.Kill()
		require.NoError(s.t, p.proxy.Close())
		log := p.Log()
		require.NoError(s.t, findCanary(log), "%s's log", p.Name)
		require.NotContains(s.t, log, "DATA RACE")
		require.NotContains(s.t, log, "panic")
		if s.t.Failed() {
			s.t.Logf("%s:\n%s", p.Name, log)
		}
	})
	return p
}

// again starts a process that has ended, as the kubelet would.
func (s *system) again(p *process) {
	s.t.Helper()
	var err error
	// It lives until the cleanup kills it.
	p.Process, err = imps.Start(context.WithoutCancel(s.t.Context()), control, p.binary, s.dir, p.spec)
	require.NoError(s.t, err)
}

func (s *system) ready(p *process) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), within)
	defer cancel()
	require.NoError(s.t, p.AwaitReady(ctx))
}

// leads waits until a process leads.
func (s *system) leads(p *process) {
	s.t.Helper()
	s.ready(p)
	s.takesOver(p)
}

// takesOver waits until one that is ready leads: once the Lease of another has run out.
func (s *system) takesOver(p *process) {
	s.t.Helper()
	s.eventually(func() error {
		if !s.isLeader(p) {
			return errors.New("it does not")
		}
		return nil
	}, "%s does not come to lead", p.Name)
}

func (s *system) isLeader(p *process) bool {
	s.t.Helper()
	metrics, err := p.Metrics(s.t.Context())
	require.NoError(s.t, err)
	return strings.Contains(metrics, "\nimps_leader 1\n")
}

// where says on which side of the API server's work on a request something happens.
type where bool

const (
	before where = false
	after  where = true
)

func (w where) String() string {
	if w == after {
		return "after"
	}
	return "before"
}

// killAt does what act does, kills p at its n-th write from then on, before the API server
// has seen the write or after it has done it, and returns that write. Where no more than
// n-1 writes are needed until done returns no error, it kills nothing.
func (s *system) killAt(p *process, n int64, side where, act func(), done func() error) (write string, killed bool) {
	s.t.Helper()
	var seen atomic.Int64
	i := p.proxy.Inject(cluster.Fault{
		// All that follow, too: what is done at the same time must not hide what is not.
		Match: func(r cluster.Request) bool { return ofInterest(r) && seen.Add(1) >= n },
		Hold:  side == before, HoldAfter: side == after,
	})
	defer i.Remove()
	act()
	deadline, tick := time.After(within), time.NewTicker(50*time.Millisecond)
	defer tick.Stop()
	var over <-chan time.Time // once it is done, and nothing more comes
	for {
		select {
		case held := <-i.Held():
			p.Kill()
			held.Drop()
			return fmt.Sprintf("%s %s/%s %s", held.Request.Verb, held.Request.Resource, held.Request.Subresource, held.Request.Name), true
		case <-over:
			return "", false
		case <-tick.C:
			if err := done(); err != nil {
				over = nil
			} else if over == nil {
				over = time.After(quiet)
			}
		case <-deadline:
			require.Fail(s.t, "neither done nor hit", "%v", done())
		}
	}
}

// held waits for the next request that a fault holds.
func (s *system) held(i *cluster.Injection) *cluster.Held {
	s.t.Helper()
	select {
	case h := <-i.Held():
		return h
	case <-time.After(within):
		require.Fail(s.t, "the request to hold does not come")
		return nil
	}
}

// ofInterest selects the writes that imps cannot do without.
func ofInterest(r cluster.Request) bool {
	switch r.Resource {
	case "secrets", "configmaps", "imagepullsecrets":
		return isWrite(r.Verb)
	}
	return false
}
