package faults

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

// Everything is told to stop in the middle of a rotation, as when the nodes are drained.
func TestARotationIsFinishedByWhatIsStartedAgain(t *testing.T) {
	s := newSystem(t)
	s.source("hub", "registry.one")
	all := want{namespaces: s.namespaces(40, "a"), registry: "registry.one"}
	all.resource = s.resource("all", "hub", s.byLabel("a")+", "+s.byPods("a"))
	leader := s.leader("a")
	processes := []*process{leader, s.coordinator("b"), s.agent("node-a")}
	s.ready(processes[1])
	s.settles(all)

	mark := control.Audit().Mark()
	middle := leader.proxy.Inject(cluster.Fault{
		Match: func(r cluster.Request) bool { return r.Name == imps.SecretName && isWrite(r.Verb) }, Hold: true,
	})
	all.registry = "registry.two"
	s.source("hub", all.registry)
	s.held(middle).Release()
	s.held(middle)
	ended := make(chan error, len(processes))
	for _, p := range processes {
		go func() { ended <- p.Terminate() }()
	}
	s.eventually(func() error { // before what is in flight goes on, so that there is a middle
		for _, e := range s.requests(mark) {
			if e.Verb == "watch" && e.Resource == "imagepullsecrets" {
				return nil
			}
		}
		return errors.New("its watches go on")
	}, "the leader does not stop")
	middle.Remove()
	for range processes {
		require.NoError(t, <-ended)
	}
	require.Less(t, len(s.writes(mark)), len(all.namespaces)+2, "it was in the middle")

	// A Pod comes while nothing of imps is there.
	byPod := s.namespace("")
	s.pod(byPod, "node-a", "a")
	all.namespaces = append(all.namespaces, byPod)
	for _, p := range processes {
		s.again(p)
	}
	for _, p := range processes {
		s.ready(p)
	}
	s.settles(all)
	s.demands("node-a", byPod)
	require.Equal(t, rotation(all), s.writes(mark))
}
