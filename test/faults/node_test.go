package faults

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/imps"
)

func TestARenderedSecretThatWasDeletedComesBack(t *testing.T) {
	s := newSystem(t)
	s.source("hub", "registry.one")
	s.leader("a")
	s.agent("node-a")
	all := want{namespaces: s.namespaces(3, "a"), registry: "registry.one"}
	all.resource = s.resource("all", "hub", s.byLabel("a")+", "+s.byPods("a"))
	s.settles(all)
	mark := control.Audit().Mark()
	require.NoError(t, s.core.CoreV1().Secrets(imps.RenderedNamespace).Delete(t.Context(), impsync.RenderedName(all.resource.UID), metav1.DeleteOptions{}))
	s.settles(all)
	// Its counter is lost with it, and the next one is on every Secret.
	require.Equal(t, rotation(all), s.writes(mark))
	byPod := s.namespace("")
	s.pod(byPod, "node-a", "a")
	all.namespaces = append(all.namespaces, byPod)
	s.settles(all)
	s.demands("node-a", byPod)
}

// The Node of a running agent is deleted, and later made again.
func TestAnAgentOutlivesItsNode(t *testing.T) {
	s := newSystem(t)
	s.source("hub", "registry.one")
	leader := s.leader("a")
	agent := s.agent("node-a")
	s.agent("node-b")
	all := want{namespaces: s.namespaces(1, ""), registry: "registry.one"}
	all.resource = s.resource("all", "hub", s.byPods("a"))
	s.pod(all.namespaces[0], "node-a", "a")
	s.settles(all)
	_, was, err := s.report("node-a")
	require.NoError(t, err)
	mark := control.Audit().Mark()
	require.NoError(t, s.core.CoreV1().Nodes().Delete(t.Context(), "node-a", metav1.DeleteOptions{}))
	s.withoutAgent(leader, all, 0, 1) // node-b is the only one, and has its agent
	// Without a Node the agent goes on.
	later := s.namespace("")
	s.pod(later, "node-a", "a")
	all.namespaces = append(all.namespaces, later)
	s.settles(all)
	s.demands("node-a", all.namespaces...)
	// So does one that starts without.
	agent.Kill()
	s.again(agent)
	s.ready(agent)
	later = s.namespace("")
	s.pod(later, "node-a", "a")
	all.namespaces = append(all.namespaces, later)
	s.settles(all)
	s.demands("node-a", all.namespaces...)
	require.NoError(t, control.Node(t.Context(), "node-a"))
	s.withoutAgent(leader, all, 0, 2)
	s.settles(all)
	require.Equal(t, map[string]int{target(all.namespaces[1]): 1, target(all.namespaces[2]): 1}, s.writes(mark))
	_, uid, err := s.report("node-a")
	require.NoError(t, err)
	require.Equal(t, was, uid, "the report is the same")
}

// Where a node has no agent, the coordinator alone serves its Pods, by namespace rules; and
// those of Pod rules as soon as the agent is there.
func TestThePodsOfANodeWithoutAnAgentAreServedInTheEnd(t *testing.T) {
	s := newSystem(t)
	s.source("hub", "registry.one")
	leader := s.leader("a")
	s.agent("node-a")
	require.NoError(t, control.Node(t.Context(), "node-b"))
	all := want{registry: "registry.one"}
	all.resource = s.resource("all", "hub", s.byLabel("a")+", "+s.byPods("a"))
	s.settles(all)
	s.withoutAgent(leader, all, 1, 2)
	labelled, byPod := s.namespace("a"), s.namespace("")
	s.pod(labelled, "node-b", "a")
	s.pod(byPod, "node-b", "a")
	all.namespaces = []string{labelled}
	s.settles(all)
	mark := control.Audit().Mark()
	s.agent("node-b")
	all.namespaces = append(all.namespaces, byPod)
	s.settles(all)
	s.withoutAgent(leader, all, 0, 2)
	require.Equal(t, map[string]int{target(byPod): 1}, s.writes(mark))
	s.demands("node-b", all.namespaces...)
}

// withoutAgent waits until metric and status say how many of all nodes have no agent.
func (s *system) withoutAgent(leader *process, w want, without, all int) {
	s.t.Helper()
	told := fmt.Sprintf("%d of %d nodes have no agent", without, all)
	s.eventually(func() error {
		metrics, err := leader.Metrics(s.t.Context())
		if err != nil {
			return err
		}
		if !strings.Contains(metrics, fmt.Sprintf("\nimps_nodes_without_agent %d\n", without)) {
			return errors.New("the metric does not say it")
		}
		object, err := s.dynamic.Resource(v1alpha1.Resource).Get(s.t.Context(), w.resource.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		condition := meta.FindStatusCondition(typed(s.t, object).Status.Conditions, v1alpha1.ConditionSecretsReady)
		if condition == nil || strings.Contains(condition.Message, "no agent") != (without > 0) || without > 0 && !strings.Contains(condition.Message, told) {
			return fmt.Errorf("the status says %+v", condition)
		}
		return nil
	}, "not %s", told)
}
