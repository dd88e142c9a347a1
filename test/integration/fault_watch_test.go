package integration

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	clusterduty "github.com/imps-node/imps/pkg/sync/cluster"
	"github.com/imps-node/imps/test/cluster/cluster"
)

// stall has all watches that match break and, begun anew, bring nothing and not end. No
// side of a stream notices that: not the pings, which tell only of whole connections.
func (s *system) stall(watches int, match func(cluster.Request) bool) *cluster.Injection {
	s.t.Helper()
	stall := s.proxy.Inject(cluster.Fault{StallAfter: cluster.AtOnce, Match: func(r cluster.Request) bool {
		return r.Verb == "watch" && match(r)
	}})
	s.proxy.BreakAll()
	s.eventually(func() error {
		if n := stall.Hits(); n < watches {
			return fmt.Errorf("%d", n)
		}
		return nil
	}, "the watches do not begin anew")
	return stall
}

// asks waits until the coordinator has listed something since mark, by this name if any.
func (s *system) asks(mark cluster.Mark, resource, name string) {
	s.t.Helper()
	s.eventually(func() error {
		for _, e := range s.requests(mark, "coordinator") {
			if e.Resource == resource && e.Verb == "list" && strings.Contains(e.URI, name) {
				return nil
			}
		}
		return fmt.Errorf("not yet")
	}, "the coordinator does not ask for %s", resource)
}

// An agent that sees nothing: what rules select, the coordinator delivers. What only the
// Pods of that node select waits until the agent sees again. What it then creates late is
// no older than what is there.
func TestAnAgentWhoseWatchesStallHoldsUpOnlyWhatItsPodsAloneSelect(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	history := s.observe()
	first := s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
	s.has(first, "registry.one")
	s.ready(s.prefix, 1)

	stall := s.stall(3, func(r cluster.Request) bool { return r.UserAgent == "imps-test/agent/node-a" })
	mark := s.control.Audit().Mark()
	labelled, byPods := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(nil, nil)
	for _, namespace := range []string{labelled, byPods} {
		s.pod(namespace, "node-a", map[string]string{s.prefix: "a"}, nil)
	}
	s.has(labelled, "registry.one")
	s.source("hub", dockerConfig("registry.two"))
	s.has(first, "registry.two")
	s.has(labelled, "registry.two")
	s.ready(s.prefix, 2)
	require.Nil(t, s.secret(byPods, secretName))
	require.Empty(t, s.secretRequests(mark, "agent/node-a"))

	stall.Remove()
	s.has(byPods, "registry.two")
	s.ready(s.prefix, 3)
	history.is(s, []string{first, labelled}, watch.Added, watch.Modified)
	for _, e := range s.secretWrites(mark, "agent/node-a") {
		require.Equal(t, byPods, e.Namespace)
	}
	s.calm()
}

// An agent that sees Pods, but no new credentials: what it creates is old, and the
// coordinator brings it up to date.
func TestAnAgentThatMissesARotationIsPutRight(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	history := s.observe()
	first := s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
	s.has(first, "registry.one")
	s.ready(s.prefix, 1)
	stall := s.stall(1, func(r cluster.Request) bool {
		return r.UserAgent == "imps-test/agent/node-a" && r.Namespace == renderedNamespace
	})
	s.source("hub", dockerConfig("registry.two"))
	s.has(first, "registry.two")
	byPods := s.namespace(nil, nil)
	s.pod(byPods, "node-a", map[string]string{s.prefix: "a"}, nil)
	s.has(byPods, "registry.two")
	s.ready(s.prefix, 2)
	stall.Remove()
	// What comes after it shows that the agent has caught up.
	again := s.namespace(nil, nil)
	s.pod(again, "node-a", map[string]string{s.prefix: "a"}, nil)
	s.has(again, "registry.two")
	history.is(s, []string{first, byPods}, watch.Added, watch.Modified)
	s.calm()
}

// A coordinator that sees no changes of target Secrets: it delivers and rotates all the
// same. What others did meanwhile it meets with its next write, and nothing goes backwards
// when the stall ends.
func TestACoordinatorWhoseWatchOfTargetsStallsGoesOn(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	history := s.observe()
	var namespaces []string
	for range 3 {
		namespaces = append(namespaces, s.namespace(map[string]string{s.prefix: "a"}, nil))
	}
	deleted, edited, untouched := namespaces[0], namespaces[1], namespaces[2]
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	s.ready(s.prefix, 3)

	stall := s.stall(1, func(r cluster.Request) bool { return r.Resource == "secrets" && r.Name == secretName })
	require.NoError(t, s.core.CoreV1().Secrets(deleted).Delete(t.Context(), secretName, metav1.DeleteOptions{}))
	_, err := s.core.CoreV1().Secrets(edited).Patch(t.Context(), secretName, types.MergePatchType,
		[]byte(`{"data":{".dockerconfigjson":"e30="}}`), metav1.PatchOptions{FieldManager: "a-user"})
	require.NoError(t, err)
	late := s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.has(late, "registry.one")
	require.Nil(t, s.secret(deleted, secretName))

	s.source("hub", dockerConfig("registry.two"))
	for _, namespace := range append(namespaces, late) {
		s.has(namespace, "registry.two")
	}
	s.ready(s.prefix, 4)
	stall.Remove()
	s.source("hub", dockerConfig("registry.three"))
	for _, namespace := range append(namespaces, late) {
		s.has(namespace, "registry.three")
	}
	s.ready(s.prefix, 4)
	history.is(s, []string{deleted}, watch.Added, watch.Deleted, watch.Added, watch.Modified)
	history.is(s, []string{edited}, watch.Added, watch.Modified, watch.Modified, watch.Modified)
	history.is(s, []string{untouched, late}, watch.Added, watch.Modified, watch.Modified)
	s.calm()
}

// A coordinator that does not hear of a label, but of the Secret that an agent has created
// for it: it asks before it deletes what it knows no reason for.
func TestACoordinatorWhoseWatchOfNamespacesStallsDeletesNothingThatIsSelected(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	history := s.observe()
	first, late := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(nil, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	s.has(first, "registry.one")
	s.ready(s.prefix, 1)

	stall := s.stall(1, func(r cluster.Request) bool {
		return r.UserAgent == "imps-test/coordinator" && r.Resource == "namespaces"
	})
	mark := s.control.Audit().Mark()
	s.label(late, map[string]any{s.prefix: "a"})
	s.pod(late, "node-a", nil, nil)
	s.has(late, "registry.one")
	s.asks(mark, "namespaces", late)
	s.calm()
	stall.Remove()
	s.ready(s.prefix, 2)
	history.is(s, []string{first, late}, watch.Added)
}

// A coordinator that does not hear that a resource selects by another label now, but of the
// namespace that has only that one.
func TestACoordinatorWhoseWatchOfResourcesStallsDeletesNothingThatIsSelected(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	history := s.observe()
	kept, left := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	s.ready(s.prefix, 2)

	stall := s.stall(1, func(r cluster.Request) bool { return r.Resource == "imagepullsecrets" })
	mark := s.control.Audit().Mark()
	s.change(s.prefix, `spec: {target: {namespaces: {labels: [{matchLabels: {`+s.prefix+`: b}}]}}}`)
	s.label(kept, map[string]any{s.prefix: "b"})
	s.label(left, map[string]any{s.prefix: "c"})
	s.asks(mark, "imagepullsecrets", "")
	s.calm()
	require.NotNil(t, s.secret(left, secretName))
	stall.Remove()
	s.lacks(left)
	s.ready(s.prefix, 1)
	history.is(s, []string{kept}, watch.Added)
	history.is(s, []string{left}, watch.Added, watch.Deleted)
}

// The same where another resource, whose the Secret is, goes then: the garbage collector
// takes what nobody else holds.
func TestACoordinatorWhoseWatchOfResourcesStallsLetsGoOfNothingThatIsSelected(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	namespace := s.namespace(map[string]string{s.prefix: "a"}, nil)
	older := s.resource(s.prefix+"-a", spec(`  namespaces: {names: [`+namespace+`]}`))
	younger := s.resource(s.prefix+"-b", spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	s.has(namespace, "registry.one")
	s.owners(namespace, 2)
	s.ready(older.Name, 1)
	s.calm()
	was := s.secret(namespace, secretName)

	stall := s.stall(1, func(r cluster.Request) bool { return r.Resource == "imagepullsecrets" })
	mark := s.control.Audit().Mark()
	s.change(younger.Name, `spec: {target: {namespaces: {labels: [{matchLabels: {`+s.prefix+`: b}}]}}}`)
	s.label(namespace, map[string]any{s.prefix: "b"})
	s.asks(mark, "imagepullsecrets", "")
	s.source("hub", dockerConfig("registry.two"))
	s.has(namespace, "registry.two") // which is not held up
	s.owners(namespace, 2)
	s.deleteResource(older.Name, metav1.DeletePropagationBackground)
	s.owners(namespace, 1)
	stall.Remove()
	s.ready(younger.Name, 1)
	secret := s.has(namespace, "registry.two")
	require.Equal(t, was.UID, secret.UID)
	ours(t, secret, younger.UID)
	s.calm()

	// What nobody claims any more is let go of, in one write.
	again := s.resource(s.prefix+"-c", spec(`  namespaces: {names: [`+namespace+`]}`))
	s.owners(namespace, 2)
	s.calm()
	mark = s.control.Audit().Mark()
	s.change(again.Name, `spec: {target: {namespaces: {names: []}}}`)
	s.owners(namespace, 1)
	s.calm()
	require.Len(t, s.secretWrites(mark, "coordinator"), 1)
}

// A coordinator that does not hear that Pods select a namespace, which no rule does any
// more: it reads the reports before it deletes anything.
func TestACoordinatorWhoseWatchOfReportsStallsDeletesNothingThatPodsSelect(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator(func(c *clusterduty.Config) { c.DemandLinger = clusterduty.DefaultDemandLinger })
	s.agent("node-a")
	history := s.observe()
	kept, left := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
	s.ready(s.prefix, 2)

	stall := s.stall(1, func(r cluster.Request) bool {
		return r.UserAgent == "imps-test/coordinator" && r.Resource == "configmaps"
	})
	s.pod(kept, "node-a", map[string]string{s.prefix: "a"}, nil)
	s.demanded(kept)
	for _, namespace := range []string{kept, left} {
		s.label(namespace, map[string]any{s.prefix: nil})
	}
	s.lacks(left)
	s.calm()
	stall.Remove()
	s.ready(s.prefix, 1)
	history.is(s, []string{kept}, watch.Added)
	history.is(s, []string{left}, watch.Added, watch.Deleted)
}

// A coordinator that hears of the garbage collector's deletions before it hears of the
// resource's brings nothing back.
func TestACoordinatorWhoseWatchOfResourcesStallsBringsNothingBackThatIsGone(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	history := s.observe()
	goes, stays := s.namespace(nil, nil), s.namespace(nil, nil)
	s.resource(s.prefix+"-goes", spec(`  namespaces: {names: [`+goes+`]}`))
	s.resource(s.prefix+"-stays", spec(`  namespaces: {names: [`+stays+`]}`))
	s.ready(s.prefix+"-goes", 1)
	s.ready(s.prefix+"-stays", 1)

	stall := s.stall(1, func(r cluster.Request) bool { return r.Resource == "imagepullsecrets" })
	mark := s.control.Audit().Mark()
	s.deleteResource(s.prefix+"-goes", metav1.DeletePropagationBackground)
	s.lacks(goes)
	require.NoError(t, s.core.CoreV1().Secrets(stays).Delete(t.Context(), secretName, metav1.DeleteOptions{}))
	s.has(stays, "registry.one")
	s.calm()
	require.Zero(t, s.tries(mark, "coordinator", goes))
	stall.Remove()
	s.ready(s.prefix+"-stays", 1)
	history.is(s, []string{goes}, watch.Added, watch.Deleted)
	history.is(s, []string{stays}, watch.Added, watch.Deleted, watch.Added)
}

// While nobody at imps sees anything, etcd is compacted and the API server restarted, so
// that every watch that goes on from where it was is answered with 410. What changed
// meanwhile is found by comparing.
func TestWhatHappensBeforeACompactionIsCaughtUpWith(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	var namespaces []string
	for range 4 {
		namespaces = append(namespaces, s.namespace(map[string]string{s.prefix: "a"}, nil))
	}
	deleted, edited, deselected, untouched := namespaces[0], namespaces[1], namespaces[2], namespaces[3]
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
	s.resource(s.prefix+"-gone", `
target: {secret: {name: `+otherSecretName+`}, namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}}
registry: {credentials: [{name: hub, namespace: registry-access}]}`)
	s.ready(s.prefix, 4)
	s.ready(s.prefix+"-gone", 4)
	s.calm()
	mark := s.control.Audit().Mark()
	was := s.secret(untouched, secretName)

	held := s.proxy.Inject(cluster.Fault{Match: func(r cluster.Request) bool { return r.Verb == "watch" }, Hold: true})
	s.proxy.BreakAll()
	s.eventually(func() error {
		if n := held.Hits(); n < 10 {
			return fmt.Errorf("%d watches", n)
		}
		return nil
	}, "the watches do not begin anew")
	require.NoError(t, s.core.CoreV1().Secrets(deleted).Delete(t.Context(), secretName, metav1.DeleteOptions{}))
	_, err := s.core.CoreV1().Secrets(edited).Patch(t.Context(), secretName, types.MergePatchType,
		[]byte(`{"data":{".dockerconfigjson":"e30="}}`), metav1.PatchOptions{FieldManager: "a-user"})
	require.NoError(t, err)
	s.label(deselected, map[string]any{s.prefix: nil})
	selected, byPods := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(nil, nil)
	s.pod(byPods, "node-a", map[string]string{s.prefix: "a"}, nil)
	s.deleteResource(s.prefix+"-gone", metav1.DeletePropagationBackground)
	require.NoError(t, s.control.CompactEtcd(t.Context()))
	require.NoError(t, s.control.StopAPIServer())
	require.NoError(t, s.control.StartAPIServer(t.Context()))
	expired, err := s.core.CoreV1().Secrets("").Watch(t.Context(), metav1.ListOptions{ResourceVersion: was.ResourceVersion})
	if err == nil {
		defer expired.Stop()
		err = apierrors.FromObject((<-expired.ResultChan()).Object)
	}
	require.True(t, apierrors.IsResourceExpired(err), "%v", err)
	held.Remove()

	for _, namespace := range []string{deleted, edited, selected, byPods} {
		s.has(namespace, "registry.one")
	}
	s.lacks(deselected)
	s.ready(s.prefix, 5)
	for _, namespace := range append(namespaces, selected) {
		s.lacksNamed(namespace, otherSecretName)
	}
	s.eventually(func() error { return s.event(s.prefix, "Normal", "Reconciled", "") }, "no Event")
	require.Equal(t, was.ResourceVersion, s.secret(untouched, secretName).ResourceVersion, "nothing to do there")
	s.calm()
	writes := map[string]int{}
	for _, e := range append(s.secretWrites(mark, "coordinator"), s.secretWrites(mark, "agent/node-a")...) {
		if e.Name == secretName {
			writes[e.Namespace]++
		}
	}
	require.Equal(t, map[string]int{deleted: 1, edited: 1, deselected: 1, selected: 1, byPods: 1}, writes)
}
