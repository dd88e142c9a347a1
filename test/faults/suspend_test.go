package faults

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

// A leader is suspended with writes on their way, so long that another one takes over and
// rotates everything. The writes arrive after that, and at last it resumes: nothing goes
// back, not for a moment.
func TestASuspendedLeaderBringsNothingBack(t *testing.T) {
	s := newSystem(t)
	s.source("hub", "hub.0")
	s.source("other", "other.0")
	hub := want{namespaces: s.namespaces(28, "a"), registry: "hub.0"}
	hub.resource = s.resource("hub", "hub", s.byLabel("a"))
	other := want{namespaces: s.namespaces(2, "b"), registry: "other.0"}
	other.resource = s.resource("other", "other", s.byLabel("b"))
	suspended := s.leader("suspended")
	successor := s.coordinator("successor")
	s.ready(successor)
	s.settles(hub, other)

	// On their way: changes and creations of targets, and a rendered Secret.
	rendered, _ := own(other.resource)
	written := suspended.proxy.Inject(cluster.Fault{
		Match: func(r cluster.Request) bool {
			name := r.Namespace + "/" + r.Name
			return r.Resource == "secrets" && isWrite(r.Verb) && (r.Name == imps.SecretName || name == rendered)
		},
		Hold: true,
	})
	hub.registry, other.registry = "hub.1", "other.1"
	s.source("other", other.registry)
	held := []*cluster.Held{s.held(written)}
	s.source("hub", hub.registry)
	for range 8 {
		held = append(held, s.held(written))
	}
	fresh := s.namespaces(8, "a") // more than are written at a time: some will be on resuming
	hub.namespaces = append(hub.namespaces, fresh...)
	for held[len(held)-1].Request.Namespace != fresh[0] {
		held = append(held, s.held(written))
	}
	require.NoError(t, suspended.Signal(syscall.SIGSTOP))

	mark := control.Audit().Mark()
	s.takesOver(successor)
	s.settles(hub, other)
	s.wroteOnce(mark)
	// The successor counts on further than the other could.
	hub.registry, other.registry = "hub.2", "other.2"
	mark = control.Audit().Mark()
	s.source("hub", hub.registry)
	s.source("other", other.registry)
	s.settles(hub, other)
	s.wroteOnce(mark)

	mark = control.Audit().Mark()
	for _, h := range held {
		h.Release()
	}
	s.eventually(func() error {
		answered := 0
		for _, e := range s.requests(mark) {
			if e.Resource == "secrets" && isWrite(e.Verb) {
				answered++
			}
		}
		if answered < len(held) {
			return fmt.Errorf("%d of %d", answered, len(held))
		}
		return nil
	}, "what was on its way does not arrive")
	require.Empty(t, s.writes(mark), "it comes too late, all of it")
	written.Remove()
	require.NoError(t, suspended.Signal(syscall.SIGCONT))
	s.eventually(func() error {
		if !strings.Contains(suspended.Log(), `"no longer leading"`) || s.isLeader(suspended) {
			return errors.New("it believes that it leads")
		}
		return nil
	}, "the suspended leader does not notice that it is superseded")
	s.settles(hub, other)
	require.Empty(t, s.writes(mark))
	require.True(t, s.isLeader(successor))

	// It is good for the next term.
	successor.Kill()
	s.freeLease()
	s.leads(suspended)
	hub.registry = "hub.last"
	mark = control.Audit().Mark()
	s.source("hub", hub.registry)
	s.settles(hub, other)
	require.Equal(t, rotation(hub), s.writes(mark))
}

// A leader is suspended while it deletes, and before the deletions arrive one namespace is
// selected again. Its status comes too late as well.
func TestASuspendedLeaderDeletesNothingThatIsWantedAgain(t *testing.T) {
	s := newSystem(t)
	s.source("hub", "hub.0")
	all := want{namespaces: s.namespaces(4, "a"), registry: "hub.0"}
	all.resource = s.resource("all", "hub", s.byLabel("a"))
	suspended := s.leader("suspended")
	successor := s.coordinator("successor")
	s.ready(successor)
	s.settles(all)

	status := suspended.proxy.Inject(cluster.Fault{Hold: true, Times: 1, Match: func(r cluster.Request) bool {
		return r.Resource == "imagepullsecrets" && isWrite(r.Verb)
	}})
	all.namespaces = append(all.namespaces, s.namespace("a"))
	late := s.held(status)
	deletions := suspended.proxy.Inject(cluster.Fault{Hold: true, Match: func(r cluster.Request) bool {
		return r.Name == imps.SecretName && r.Verb == "delete"
	}})
	back, away := all.namespaces[0], all.namespaces[1]
	s.label(back, "b")
	s.label(away, "b")
	held := []*cluster.Held{s.held(deletions), s.held(deletions)}
	require.NoError(t, suspended.Signal(syscall.SIGSTOP))
	all.namespaces = slices.DeleteFunc(all.namespaces, func(namespace string) bool { return namespace == away })
	s.label(back, "a")

	mark := control.Audit().Mark()
	s.takesOver(successor)
	s.settles(all)
	require.Equal(t, map[string]int{target(away): 1}, s.writes(mark))
	all.registry = "hub.1"
	s.source("hub", all.registry)
	s.settles(all)

	mark = control.Audit().Mark()
	for _, h := range append(held, late) {
		h.Release()
	}
	s.eventually(func() error {
		if tries := s.tries(mark); len(tries) < len(held)+1 {
			return fmt.Errorf("answered: %v", tries)
		}
		return nil
	}, "what was on its way does not arrive")
	require.Empty(t, s.writes(mark), "it comes too late")
	require.NoError(t, suspended.Signal(syscall.SIGCONT))
	s.settles(all)
	require.Empty(t, s.writes(mark))
	require.True(t, s.isLeader(successor))
	require.False(t, s.isLeader(suspended))
}

// While a leader is suspended, another one leads, and gives the Lease up. The first takes it
// again when it resumes, but goes on with nothing that it knew.
func TestASuspendedLeaderBeginsAnewAfterAnotherHasLedAndGone(t *testing.T) {
	s := newSystem(t)
	s.source("hub", "hub.0")
	hub := want{namespaces: s.namespaces(4, "a"), registry: "hub.0"}
	hub.resource = s.resource("hub", "hub", s.byLabel("a"))
	suspended := s.leader("suspended")
	successor := s.coordinator("successor")
	s.ready(successor)
	s.settles(hub)
	require.NoError(t, suspended.Signal(syscall.SIGSTOP))
	s.takesOver(successor)
	hub.registry = "hub.1"
	s.source("hub", hub.registry)
	s.settles(hub)
	require.NoError(t, successor.Terminate())

	mark := control.Audit().Mark()
	require.NoError(t, suspended.Signal(syscall.SIGCONT))
	s.eventually(func() error {
		if strings.Count(suspended.Log(), "msg=leading") < 2 || !s.isLeader(suspended) {
			return errors.New("it does not lead anew")
		}
		return nil
	}, "the suspended one does not begin anew")
	s.settles(hub)
	require.Empty(t, s.writes(mark))
	hub.registry = "hub.2"
	s.source("hub", hub.registry)
	s.settles(hub)
	require.Equal(t, rotation(hub), s.writes(mark))
}

// An agent's creation of a Secret arrives after the coordinator has created and rotated it.
func TestALateCreationOfAnAgentBringsNothingBack(t *testing.T) {
	s := newSystem(t)
	s.source("hub", "registry.one")
	all := want{registry: "registry.one"}
	all.resource = s.resource("all", "hub", s.byPods("a"))
	s.leader("a")
	agent := s.agent("node-a")
	s.settles(all)
	late := agent.proxy.Inject(cluster.Fault{
		Match: func(r cluster.Request) bool { return r.Resource == "secrets" && isWrite(r.Verb) }, Hold: true, Times: 1,
	})
	all.namespaces = s.namespaces(1, "")
	s.pod(all.namespaces[0], "node-a", "a")
	held := s.held(late)
	s.demands("node-a", all.namespaces...)
	require.NoError(t, agent.Signal(syscall.SIGSTOP)) // or it would give up after a while
	s.settles(all)
	all.registry = "registry.two"
	s.source("hub", all.registry)
	s.settles(all)
	mark := control.Audit().Mark()
	held.Release()
	s.eventually(func() error {
		for _, e := range s.requests(mark) {
			if e.Resource == "secrets" && isWrite(e.Verb) {
				return nil
			}
		}
		return errors.New("not answered")
	}, "what was on its way does not arrive")
	require.NoError(t, agent.Signal(syscall.SIGCONT))
	s.settles(all)
	require.Empty(t, s.writes(mark))
}

// wroteOnce requires that each Secret was written at most once since mark, and each state
// Secret at most twice: where a counter was given out and is lost.
func (s *system) wroteOnce(mark cluster.Mark) {
	s.t.Helper()
	for name, n := range s.writes(mark) {
		if strings.HasPrefix(name, imps.SystemNamespace) {
			n--
		}
		require.LessOrEqual(s.t, n, 1, name)
	}
}
