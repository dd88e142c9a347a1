package integration

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	impsync "github.com/imps-node/imps/pkg/sync"
	clusterduty "github.com/imps-node/imps/pkg/sync/cluster"
	"github.com/imps-node/imps/test/cluster/cluster"
)

func TestTheSecondCoordinatorTakesOverAtOnce(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	first := s.coordinator()
	second := s.standby()
	namespace := s.namespace(nil, nil)
	s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
	was := s.has(namespace, "registry.one")
	s.ready(s.prefix, 1)
	require.Error(t, second.ready(), "it does not lead")

	mark := control.Audit().Mark()
	stopped := time.Now()
	first.stop()
	lease, err := s.core.CoordinationV1().Leases(systemNamespace).Get(t.Context(), clusterduty.LeaseName, metav1.GetOptions{})
	require.NoError(t, err)
	require.NotEqual(t, s.leader, *lease.Spec.HolderIdentity, "given up, not left to expire")
	s.eventually(second.ready, "the second does not take over")
	require.Less(t, time.Since(stopped), 15*time.Second, "before the Lease would have expired")
	s.source("hub", dockerConfig("registry.two"))
	require.Equal(t, was.UID, s.has(namespace, "registry.two").UID)
	s.ready(s.prefix, 1)
	require.Len(t, s.secretWrites(mark, "coordinator"), 1)
}

// A leader that was superseded without noticing must neither write old content nor take
// the Lease from its successor.
func TestASupersededLeaderStopsAndLeavesTheLeaseAlone(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	namespace := s.namespace(nil, nil)
	r := s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
	s.has(namespace, "registry.one")
	s.ready(s.prefix, 1)
	// Somebody else leads, and has counted on.
	other := "somebody-else"
	leases := s.core.CoordinationV1().Leases(systemNamespace)
	s.eventually(func() error { // the leader renews it meanwhile
		lease, err := leases.Get(t.Context(), clusterduty.LeaseName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		now := metav1.NowMicro()
		lease.Spec.HolderIdentity, lease.Spec.RenewTime = &other, &now
		_, err = leases.Update(t.Context(), lease, metav1.UpdateOptions{})
		return err
	}, "cannot take the Lease")
	secret := s.secret(namespace, secretName)
	revision, err := impsync.ParseRevision(secret.Annotations[impsync.AnnotationRevision])
	require.NoError(t, err)
	revision.Counter += 5
	body := fmt.Sprintf(`{"apiVersion":"v1","kind":"Secret","metadata":{"name":%q,"labels":{%q:%q},"annotations":{%q:%q},"ownerReferences":[{"apiVersion":"images.banzaicloud.io/v1alpha1","kind":"ImagePullSecret","name":%q,"uid":%q}]},"type":"kubernetes.io/dockerconfigjson","data":{".dockerconfigjson":%q}}`,
		secretName, impsync.LabelOwnerUID, r.UID, impsync.AnnotationRevision, revision, r.Name, r.UID, base64Of(string(dockerConfig("registry.new"))))
	force := true
	_, err = s.core.CoreV1().Secrets(namespace).Patch(t.Context(), secretName, "application/apply-patch+yaml", []byte(body),
		metav1.PatchOptions{FieldManager: impsync.FieldManager, Force: &force})
	require.NoError(t, err)
	s.source("hub", dockerConfig("registry.old"))
	s.eventually(func() error {
		if err := s.running.ready(); err == nil {
			return fmt.Errorf("it goes on leading")
		}
		return nil
	}, "the superseded leader does not stop")
	s.has(namespace, "registry.new")
	lease, err := leases.Get(t.Context(), clusterduty.LeaseName, metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, other, *lease.Spec.HolderIdentity)
	// The tests after this one need the Lease.
	require.NoError(t, leases.Delete(t.Context(), clusterduty.LeaseName, metav1.DeleteOptions{}))
}

// While nobody leads, a resource comes to select by another label, and the namespaces have
// only that one. The next leader knows the old selection first.
func TestALeaderDeletesNothingByAnOldSelection(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	coordinator := s.coordinator()
	history := s.observe()
	kept, left := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	s.ready(s.prefix, 2)
	coordinator.stop()
	s.change(s.prefix, `spec: {target: {namespaces: {labels: [{matchLabels: {`+s.prefix+`: b}}]}}}`)
	s.label(kept, map[string]any{s.prefix: "b"})
	s.label(left, map[string]any{s.prefix: "c"})
	s.coordinator()
	s.lacks(left)
	s.ready(s.prefix, 1)
	history.is(s, []string{kept}, watch.Added)
	history.is(s, []string{left}, watch.Added, watch.Deleted)
}

// An agent whose Node is gone for longer than its report is kept, or was never there.
func TestTheReportOfAnAgentThatLivesWithoutItsNodeStays(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator(func(c *clusterduty.Config) { c.ReportLinger = linger })
	s.agent("node-a")
	s.resource(s.prefix, spec(podRules(s.prefix)))
	namespace := s.namespace(nil, nil)
	s.pod(namespace, "node-a", map[string]string{s.prefix: "a"}, nil)
	was := s.has(namespace, "registry.one")
	s.demanded(namespace)
	s.ready(s.prefix, 1)
	deletions := func(mark cluster.Mark) (n int) {
		for _, e := range s.requests(mark, "coordinator") {
			if e.Resource == "configmaps" && e.Verb == "delete" {
				n++
			}
		}
		return n
	}
	mark := control.Audit().Mark()
	require.NoError(t, s.core.CoreV1().Nodes().Delete(t.Context(), "node-a", metav1.DeleteOptions{}))
	s.eventually(func() error {
		if deletions(mark) == 0 {
			return fmt.Errorf("not yet")
		}
		return nil
	}, "the report of a node that is gone stays")
	s.demanded(namespace)
	s.calm()
	mark = control.Audit().Mark()
	pass(t, 3*linger)
	require.Zero(t, deletions(mark), "its agent lives")
	s.calm()
	require.Empty(t, append(s.secretWrites(mark, "coordinator"), s.secretWrites(mark, "agent/node-a")...))
	require.Equal(t, was.UID, s.has(namespace, "registry.one").UID)
	s.ready(s.prefix, 1)
}

func TestTheReportOfANodeThatIsGoneGoesLater(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator(func(c *clusterduty.Config) { c.ReportLinger = linger })
	agent := s.agent("node-gone")
	s.agent("node-back")
	s.resource(s.prefix, spec(podRules(s.prefix)))
	namespace := s.namespace(nil, nil)
	s.pod(namespace, "node-gone", map[string]string{s.prefix: "a"}, nil)
	s.has(namespace, "registry.one")
	s.demanded(namespace)
	agent.stop()
	for _, name := range []string{"node-gone", "node-back"} {
		require.NoError(t, s.core.CoreV1().Nodes().Delete(t.Context(), name, metav1.DeleteOptions{}))
	}
	require.NoError(t, s.control.Node(t.Context(), "node-back"))
	s.eventually(func() error {
		if _, err := s.core.CoreV1().ConfigMaps(systemNamespace).Get(t.Context(), impsync.ReportName("node-gone"), metav1.GetOptions{}); err == nil {
			return fmt.Errorf("it is there")
		}
		return nil
	}, "the report of a node that is gone stays")
	s.lacks(namespace)
	s.reportOf("node-back")
}
