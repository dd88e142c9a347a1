package integration

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

func podRules(key string) string {
	return `  namespacesWithPods: {labels: [{matchLabels: {` + key + `: a}}], annotations: [{matchAnnotations: {` + key + `: "b c"}}]}`
}

// K5: a matching Pod of any phase selects its namespace, as long as it is there.
func TestPodsSelectTheirNamespace(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	s.resource(s.prefix, spec(podRules(s.prefix)))
	s.ready(s.prefix, 0)
	byLabel, byAnnotation, neither := s.namespace(nil, nil), s.namespace(nil, nil), s.namespace(nil, nil)
	pods := []*corev1.Pod{
		s.pod(byLabel, "node-a", map[string]string{s.prefix: "a"}, nil),
		s.pod(byAnnotation, "node-a", nil, map[string]string{s.prefix: "b c"}),
	}
	s.pod(neither, "node-a", map[string]string{s.prefix: "b"}, nil)
	s.has(byLabel, "registry.one")
	s.has(byAnnotation, "registry.one")
	s.ready(s.prefix, 2)

	// Any phase counts, and a Pod that is relabelled counts as it is.
	s.phase(pods[0], corev1.PodSucceeded)
	s.phase(pods[1], corev1.PodFailed)
	other := s.pod(neither, "node-a", nil, nil)
	_, err := s.core.CoreV1().Pods(neither).Patch(t.Context(), other.Name, types.MergePatchType,
		[]byte(`{"metadata":{"labels":{"`+s.prefix+`":"a"}}}`), metav1.PatchOptions{})
	require.NoError(t, err)
	s.has(neither, "registry.one")
	s.ready(s.prefix, 3)

	for _, pod := range pods {
		s.deletePod(pod)
	}
	s.lacks(byLabel)
	s.lacks(byAnnotation)
	s.ready(s.prefix, 1)
	require.NotNil(t, s.secret(neither, secretName))
}

func (s *system) phase(pod *corev1.Pod, phase corev1.PodPhase) {
	s.t.Helper()
	_, err := s.core.CoreV1().Pods(pod.Namespace).Patch(s.t.Context(), pod.Name, types.MergePatchType,
		[]byte(`{"status":{"phase":"`+string(phase)+`"}}`), metav1.PatchOptions{}, "status")
	require.NoError(s.t, err)
}

func TestDemandOfThreeNodesEndsWithTheLast(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	namespace := s.namespace(nil, nil)
	s.resource(s.prefix, spec(podRules(s.prefix)))
	s.ready(s.prefix, 0)
	var pods []*corev1.Pod
	for i := range 3 {
		nodeName := fmt.Sprintf("node-%d", i)
		s.agent(nodeName)
		pods = append(pods, s.pod(namespace, nodeName, map[string]string{s.prefix: "a"}, nil))
	}
	was := s.has(namespace, "registry.one")
	s.eventually(func() error {
		if n := len(s.demands(namespace)); n != 3 {
			return fmt.Errorf("%d reports demand it", n)
		}
		return nil
	}, "not every node's report demands the namespace")

	// With each node but the last, nothing happens.
	for i, pod := range pods[:2] {
		s.deletePod(pod)
		s.eventually(func() error {
			if n := len(s.demands(namespace)); n != 2-i {
				return fmt.Errorf("%d reports demand it", n)
			}
			return nil
		}, "a report goes on demanding the namespace")
	}
	require.Equal(t, was.UID, s.secret(namespace, secretName).UID)
	s.deletePod(pods[2])
	ended := time.Now()
	s.lacks(namespace)
	require.GreaterOrEqual(t, time.Since(ended), linger-time.Second, "not before the linger: the report is written at most a second late")

	// Demand that returns while the Secret lingers keeps it.
	again := s.pod(namespace, "node-1", map[string]string{s.prefix: "a"}, nil)
	was = s.has(namespace, "registry.one")
	s.deletePod(again)
	s.eventually(func() error {
		if n := len(s.demands(namespace)); n != 0 {
			return fmt.Errorf("%d reports demand it", n)
		}
		return nil
	}, "a report goes on demanding the namespace")
	s.pod(namespace, "node-2", map[string]string{s.prefix: "a"}, nil)
	mark := s.namespace(nil, nil)
	last := s.pod(mark, "node-0", map[string]string{s.prefix: "a"}, nil)
	s.has(mark, "registry.one")
	s.deletePod(last)
	s.lacks(mark) // a linger later
	require.Equal(t, was.UID, s.secret(namespace, secretName).UID)
}

// demanded waits until a node report demands a namespace.
func (s *system) demanded(namespace string) {
	s.t.Helper()
	s.eventually(func() error {
		if len(s.demands(namespace)) == 0 {
			return fmt.Errorf("no report demands %s", namespace)
		}
		return nil
	}, "the demand is not reported")
}

// demands returns the reports that demand a namespace.
func (s *system) demands(namespace string) (nodes []string) {
	s.t.Helper()
	list, err := s.core.CoreV1().ConfigMaps(systemNamespace).List(s.t.Context(), metav1.ListOptions{LabelSelector: impsync.LabelComponent})
	require.NoError(s.t, err)
	for _, c := range list.Items {
		report, err := impsync.DecodeReport(c.Data)
		require.NoError(s.t, err)
		if len(report.Demand[namespace]) > 0 {
			nodes = append(nodes, report.Node)
		}
	}
	return nodes
}

// Losing its label does not cost a namespace its Secret while Pods select it.
func TestANamespaceThatLosesItsLabelButHasPodsKeepsItsSecret(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	namespace := s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
	was := s.has(namespace, "registry.one")
	pod := s.pod(namespace, "node-a", map[string]string{s.prefix: "a"}, nil)
	s.demanded(namespace)
	s.label(namespace, map[string]any{s.prefix: nil})
	barrier := s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.has(barrier, "registry.one")
	require.Equal(t, was.UID, s.secret(namespace, secretName).UID)
	s.deletePod(pod)
	s.lacks(namespace)
}

// The coordinator is absent: a Pod of a selected namespace gets its Secret from its node.
func TestPodsGetTheirSecretWhileTheCoordinatorIsAway(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	c := s.coordinator()
	s.resource(s.prefix, spec(`  namespaces: {names: [`+s.prefix+`-named], labels: [{matchLabels: {`+s.prefix+`: a}}], annotations: [{matchAnnotations: {`+s.prefix+`: b}}]}`+"\n"+podRules(s.prefix)))
	s.ready(s.prefix, 0)
	c.stop()
	s.agent("node-a")
	_, err := s.core.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.prefix + "-named"}}, metav1.CreateOptions{})
	require.NoError(t, err)

	unselected := s.namespace(nil, nil)
	s.pod(unselected, "node-a", nil, nil)
	selected := map[string]string{ // namespace -> label of the Pod
		s.prefix + "-named": "",
		s.namespace(map[string]string{s.prefix: "a"}, nil): "",
		s.namespace(nil, map[string]string{s.prefix: "b"}): "",
		s.namespace(nil, nil):                              "a",
	}
	uids := map[string]types.UID{}
	for namespace, label := range selected {
		s.pod(namespace, "node-a", map[string]string{s.prefix: label}, nil)
		uids[namespace] = s.has(namespace, "registry.one").UID
	}
	require.Nil(t, s.secret(unselected, secretName))

	// A namespace that is labelled under its waiting Pods.
	late := s.namespace(nil, nil)
	s.pod(late, "node-a", nil, nil)
	s.label(late, map[string]any{s.prefix: "a"})
	uids[late] = s.has(late, "registry.one").UID

	// The coordinator comes back and finds nothing to do.
	mark := control.Audit().Mark()
	s.coordinator()
	s.ready(s.prefix, 5)
	require.Empty(t, s.secretWrites(mark, "coordinator"))
	for namespace, uid := range uids {
		require.Equal(t, uid, s.secret(namespace, secretName).UID)
	}
	require.NoError(t, s.core.CoreV1().Namespaces().Delete(t.Context(), s.prefix+"-named", metav1.DeleteOptions{}))
}

// A node agent restarted: no Secret requests beyond namespaces with waiting Pods.
func TestARestartedAgentAsksOnlyWhereAPodWaits(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	first := s.agent("node-a")
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
	var running, waiting []string
	for i := range 10 {
		namespace := s.namespace(map[string]string{s.prefix: "a"}, nil)
		pod := s.pod(namespace, "node-a", map[string]string{s.prefix: "a"}, nil)
		s.has(namespace, "registry.one")
		if i < 7 {
			running = append(running, namespace)
			s.started(pod)
		} else {
			waiting = append(waiting, namespace)
		}
	}
	s.ready(s.prefix, 10)
	s.eventually(func() error {
		if n := len(s.reportOf("node-a").Demand); n != 10 {
			return fmt.Errorf("the report demands %d namespaces", n)
		}
		return nil
	}, "the report is not complete")
	first.stop()
	mark := control.Audit().Mark()
	s.agent("node-a")
	// A new Pod shows that the agent has dealt with what it found.
	namespace := s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.pod(namespace, "node-a", nil, nil)
	s.has(namespace, "registry.one")
	s.eventually(func() error {
		asked := map[string]int{}
		for _, e := range s.requests(mark, "agent/node-a") {
			if e.Resource == "secrets" && e.Namespace != renderedNamespace {
				asked[e.Namespace]++
			}
		}
		for _, namespace := range waiting {
			if asked[namespace] != 1 {
				return fmt.Errorf("%d requests for %s", asked[namespace], namespace)
			}
		}
		for _, namespace := range running {
			require.Zero(t, asked[namespace])
		}
		return nil
	}, "not one request for each namespace with a waiting Pod")
	for _, e := range s.requests(mark, "agent/node-a") {
		require.False(t, e.Resource == "configmaps" && !slices.Contains([]string{"get", "list", "watch"}, e.Verb), "the report is as it was: no write of it")
	}
}

func (s *system) reportOf(nodeName string) impsync.Report {
	s.t.Helper()
	c, err := s.core.CoreV1().ConfigMaps(systemNamespace).Get(s.t.Context(), impsync.ReportName(nodeName), metav1.GetOptions{})
	require.NoError(s.t, err)
	report, err := impsync.DecodeReport(c.Data)
	require.NoError(s.t, err)
	return report
}

// started gives a Pod the status of one whose container runs.
func (s *system) started(pod *corev1.Pod) {
	s.t.Helper()
	_, err := s.core.CoreV1().Pods(pod.Namespace).Patch(s.t.Context(), pod.Name, types.MergePatchType,
		[]byte(`{"status":{"phase":"Running","containerStatuses":[{"name":"main","image":"x","imageID":"x","ready":true,"restartCount":0,"state":{"running":{"startedAt":"2026-01-01T00:00:00Z"}}}]}}`),
		metav1.PatchOptions{}, "status")
	require.NoError(s.t, err)
}

// A Pod's status changes cost nothing (B9).
func TestStatusChangesOfPodsCostNoRequest(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	s.resource(s.prefix, spec(podRules(s.prefix)))
	namespace := s.namespace(nil, nil)
	pod := s.pod(namespace, "node-a", map[string]string{s.prefix: "a"}, nil)
	s.has(namespace, "registry.one")
	s.ready(s.prefix, 1)
	s.demanded(namespace)
	mark := control.Audit().Mark()
	for range 5 {
		s.phase(pod, corev1.PodRunning)
		s.phase(pod, corev1.PodPending)
	}
	barrier := s.namespace(nil, nil)
	s.pod(barrier, "node-a", map[string]string{s.prefix: "a"}, nil)
	s.has(barrier, "registry.one")
	s.ready(s.prefix, 2)
	for _, agent := range []string{"agent/node-a", "coordinator"} {
		for _, e := range s.requests(mark, agent) {
			require.NotEqual(t, namespace, e.Namespace, "%s %s", e.Verb, e.URI)
		}
	}
}

func TestADeletedReportIsWrittenAgain(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	s.resource(s.prefix, spec(podRules(s.prefix)))
	namespace := s.namespace(nil, nil)
	s.pod(namespace, "node-a", map[string]string{s.prefix: "a"}, nil)
	was := s.has(namespace, "registry.one")
	s.demanded(namespace)
	require.NoError(t, s.core.CoreV1().ConfigMaps(systemNamespace).Delete(t.Context(), impsync.ReportName("node-a"), metav1.DeleteOptions{}))
	s.demanded(namespace)
	require.Equal(t, was.UID, s.secret(namespace, secretName).UID)
}

func TestNodesWithoutAnAgentAreCounted(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	require.NoError(t, s.control.Node(t.Context(), "node-b"))
	s.coordinator()
	s.agent("node-a")
	s.resource(s.prefix, spec(podRules(s.prefix)))
	s.says(s.prefix, "SecretsReady", "1 of 2 nodes have no agent")
	s.agent("node-b")
	s.saysNot(s.prefix, "SecretsReady", "no agent")
}

// Where a node was quiet, its report of new demand is written while it creates the Secret:
// the coordinator must not write it a second time.
func TestAPodOnAQuietNodeCostsOneWriteOfItsSecret(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	s.resource(s.prefix, spec(podRules(s.prefix)))
	for range 3 {
		s.eventually(func() error {
			for _, e := range s.requests(s.began, "agent/node-a") {
				if e.Resource == "configmaps" && e.Verb == "patch" && time.Since(e.Received) < 1500*time.Millisecond {
					return fmt.Errorf("a report was written a moment ago")
				}
			}
			return nil
		}, "the node does not become quiet")
		mark := control.Audit().Mark()
		namespace := s.namespace(nil, nil)
		s.pod(namespace, "node-a", map[string]string{s.prefix: "a"}, nil)
		s.has(namespace, "registry.one")
		s.demanded(namespace)
		s.becomes(s.prefix, func(status v1alpha1.ImagePullSecretStatus) error {
			if !slices.Contains(status.ManagedNamespaces, namespace) {
				return fmt.Errorf("%s is not among them", namespace)
			}
			return nil
		})
		require.Len(t, s.secretWrites(mark, "agent/node-a"), 1)
		require.Empty(t, s.secretWrites(mark, "coordinator"))
	}
}
