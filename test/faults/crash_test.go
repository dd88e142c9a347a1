package faults

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// A leader that dies at any write of a rotation leaves it to the next one, which writes
// what is not written yet, and nothing else.
func TestARotationSurvivesItsLeaderAtEveryWrite(t *testing.T) {
	s := newSystem(t)
	s.source("hub", "registry.0")
	all := want{namespaces: s.namespaces(2, "a"), registry: "registry.0"}
	all.resource = s.resource("all", "hub", s.byLabel("a"))
	leader := s.leader("a")
	s.settles(all)
	_, state := own(all.resource)
	round := 0
	for _, side := range []where{before, after} {
		var hit []string
		for n := int64(1); ; n++ {
			round++
			all.registry = fmt.Sprintf("registry.%d", round)
			mark := control.Audit().Mark()
			write, killed := s.killAt(leader, n, side, func() { s.source("hub", all.registry) }, func() error { return s.settled([]want{all}) })
			if killed {
				hit = append(hit, write)
				s.freeLease()
				s.again(leader)
				s.leads(leader)
			}
			s.settles(all)
			writes := rotation(all)
			if killed && (n == 1 && side == after || n == 2 && side == before) {
				// The counter that was given out is lost, and another one is needed.
				writes[state] = 2
			}
			require.Equal(t, writes, s.writes(mark), "killed %s write %d: %s", side, n, write)
			if !killed {
				break
			}
		}
		t.Logf("killed %s each of: %q", side, hit)
		require.GreaterOrEqual(t, len(hit), len(all.namespaces)+3)
		require.Contains(t, hit[0], impsync.StateName(all.resource.UID))
		require.Contains(t, hit[1], impsync.RenderedName(all.resource.UID))
		require.Contains(t, hit[len(hit)-1], "imagepullsecrets/status")
	}
}

// An agent that dies at any of its writes is replaced by one that does what is left.
func TestPodsAreServedWhenTheirAgentDiesAtAnyWrite(t *testing.T) {
	s := newSystem(t)
	s.source("hub", "registry.one")
	all := want{registry: "registry.one"}
	all.resource = s.resource("all", "hub", s.byPods("a"))
	s.leader("a")
	agent := s.agent("node-a")
	s.settles(all)
	for _, side := range []where{before, after} {
		var hit []string
		for n := int64(1); ; n++ {
			fresh := s.namespace("")
			all.namespaces = append(all.namespaces, fresh)
			mark := control.Audit().Mark()
			write, killed := s.killAt(agent, n, side, func() { s.pod(fresh, "node-a", "a") }, func() error { return s.settled([]want{all}) })
			if killed {
				hit = append(hit, write)
				s.again(agent)
				s.ready(agent)
			}
			s.demands("node-a", all.namespaces...)
			s.settles(all)
			require.Equal(t, map[string]int{target(fresh): 1}, s.writes(mark), "killed %s write %d: %s", side, n, write)
			if !killed {
				break
			}
		}
		t.Logf("killed %s each of: %q", side, hit)
		require.Len(t, hit, 2) // the report, and the Secret
	}
}

// deaths are the writes of a deletion at which a leader dies. Its first two are of imps's
// own Secrets, one after the other, so that dying before the second is dying after the first.
var deaths = []struct {
	side where
	n    int64
}{{before, 1}, {after, 1}, {after, 2}, {after, 3}}

// A resource is deleted while Pods arrive that it selects, and the leader dies of it.
func TestNothingIsLeftOfAResourceWhoseLeaderDiesOfItsDeletion(t *testing.T) {
	s := newSystem(t)
	leader := s.leader("a")
	s.agent("node-a")
	s.source("hub", "registry.one")
	for _, death := range deaths {
		all := want{namespaces: s.namespaces(2, ""), registry: "registry.one"}
		label := fmt.Sprintf("%s-%d", death.side, death.n)
		all.resource = s.resource(label, "hub", s.byPods(label))
		for _, namespace := range all.namespaces {
			s.pod(namespace, "node-a", label)
		}
		s.settles(all)
		late := s.namespaces(2, "")
		write, killed := s.killAt(leader, death.n, death.side, func() {
			s.pod(late[0], "node-a", label)
			s.deleteResource(all.resource, metav1.DeletePropagationBackground)
			s.pod(late[1], "node-a", label)
		}, func() error { return s.settled(nil) })
		// Of the targets the garbage collector may have left it none.
		require.True(t, killed || death.n > 2)
		t.Logf("killed %s write %d: %s", death.side, death.n, write)
		if killed {
			s.freeLease()
			s.again(leader)
			s.leads(leader)
		}
		s.settles()
	}
}

// With --cascade=orphan the Secrets stay, whenever the leader dies, and only they.
func TestOrphanedSecretsStayWhenTheLeaderDiesOfIt(t *testing.T) {
	s := newSystem(t)
	leader := s.leader("a")
	s.source("hub", "registry.one")
	all := want{namespaces: s.namespaces(3, "a"), registry: "registry.one"}
	for _, death := range deaths[:3] {
		adopted := control.Audit().Mark()
		all.resource = s.resource("all", "hub", s.byLabel("a"))
		s.settles(all) // from the second time on with the Secrets that were there
		require.Equal(t, rotation(all), s.writes(adopted))
		was := s.contents()
		mark := control.Audit().Mark()
		orphaned := func() error { return s.orphaned(all) }
		write, killed := s.killAt(leader, death.n, death.side, func() { s.deleteResource(all.resource, metav1.DeletePropagationOrphan) }, orphaned)
		require.True(t, killed)
		t.Logf("killed %s write %d: %s", death.side, death.n, write)
		s.freeLease()
		s.again(leader)
		s.leads(leader)
		s.eventually(orphaned, "not everything of the resource but its Secrets goes")
		s.pass(quiet)
		rendered, state := own(all.resource)
		require.Subset(t, []string{rendered, state}, slices.Collect(maps.Keys(s.writes(mark))), "imps leaves the Secrets alone")
		require.Equal(t, was, s.contents())
	}
	all.resource = s.resource("all", "hub", s.byLabel("a"))
	s.settles(all)
}

// contents returns the data of each Secret of the targets' name, by UID.
func (s *system) contents() map[types.UID]map[string][]byte {
	contents := map[types.UID]map[string][]byte{}
	for _, secret := range s.secrets() {
		contents[secret.UID] = secret.Data
	}
	return contents
}

// orphaned returns what keeps a resource from being gone with all but its targets.
func (s *system) orphaned(w want) error {
	if _, err := s.counters([]want{{resource: s.blocked}}); err != nil {
		return err
	}
	if _, err := s.dynamic.Resource(v1alpha1.Resource).Get(s.t.Context(), w.resource.Name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return fmt.Errorf("the resource is there, or: %w", err)
	}
	return nil
}
