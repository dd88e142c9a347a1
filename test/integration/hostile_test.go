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
	clusterduty "github.com/imps-node/imps/pkg/sync/cluster"
)

// A counter that a tenant writes is not imps's, whatever it is: it costs a repair in that
// namespace, and nothing anywhere else.
func TestACounterThatATenantWroteCostsOneRepair(t *testing.T) {
	for _, counter := range []string{"1000", "4611686018427387904", "9223372036854775807", "18446744073709551616"} {
		t.Run(counter, func(t *testing.T) {
			s := newSystem(t)
			s.source("hub", dockerConfig("registry.one"))
			s.coordinator()
			tenant, other := s.namespace(nil, nil), s.namespace(nil, nil)
			r := s.resource(s.prefix, spec(`  namespaces: {names: [`+other+`]}`))
			s.has(other, "registry.one")
			s.ready(s.prefix, 1)
			planted := s.writeSecret(&corev1.Secret{
				ObjectMeta: metav1.ObjectMeta{
					Namespace: tenant, Name: secretName,
					Labels:      map[string]string{impsync.LabelOwnerUID: string(r.UID)},
					Annotations: map[string]string{impsync.AnnotationRevision: string(r.UID) + "." + counter},
				},
				Type: corev1.SecretTypeDockerConfigJson, Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte("{}")},
			})
			mark := control.Audit().Mark()
			s.change(s.prefix, `spec: {target: {namespaces: {names: [`+other+`, `+tenant+`]}}}`)
			if counter == "18446744073709551616" { // no revision at all: a foreign Secret
				s.failed(s.prefix, tenant, "not imps's")
			} else {
				require.Equal(t, planted.UID, s.has(tenant, "registry.one").UID)
				s.ready(s.prefix, 2)
			}
			require.Equal(t, string(r.UID)+".1", s.secret(other, secretName).Annotations[impsync.AnnotationRevision])
			for _, write := range s.secretWrites(mark, "coordinator") {
				require.Equal(t, tenant, write.Namespace)
			}
		})
	}
}

// A lost counter is caught up with, everywhere.
func TestALeaderWhoseTracesAreLostCatchesUp(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	c := s.coordinator()
	one, two := s.namespace(nil, nil), s.namespace(nil, nil)
	r := s.resource(s.prefix, spec(`  namespaces: {names: [`+one+`, `+two+`]}`))
	s.has(one, "registry.one")
	for round := range 3 {
		s.source("hub", dockerConfig(fmt.Sprintf("registry.%d", round)))
		s.has(one, fmt.Sprintf("registry.%d", round))
	}
	was := s.has(two, "registry.2")
	c.stop()
	require.NoError(t, s.core.CoreV1().Secrets(systemNamespace).Delete(t.Context(), impsync.StateName(r.UID), metav1.DeleteOptions{}))
	require.NoError(t, s.core.CoreV1().Secrets(renderedNamespace).Delete(t.Context(), impsync.RenderedName(r.UID), metav1.DeleteOptions{}))
	s.source("hub", dockerConfig("registry.new"))
	s.coordinator()
	require.Equal(t, was.UID, s.has(two, "registry.new").UID)
	s.has(one, "registry.new")
	s.ready(s.prefix, 2)
	for _, namespace := range []string{one, two} {
		revision, err := impsync.ParseRevision(s.secret(namespace, secretName).Annotations[impsync.AnnotationRevision])
		require.NoError(t, err)
		require.Greater(t, revision.Counter, uint64(4))
	}
}

// Imps's own Secrets come back when they are deleted by hand, also with their namespace.
func TestTheRenderedNamespaceComesBack(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	namespace := s.namespace(nil, nil)
	r := s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
	s.has(namespace, "registry.one")
	require.NoError(t, s.core.CoreV1().Namespaces().Delete(t.Context(), renderedNamespace, metav1.DeleteOptions{}))
	s.eventually(func() error {
		if _, err := s.core.CoreV1().Namespaces().Get(t.Context(), renderedNamespace, metav1.GetOptions{}); err == nil {
			return fmt.Errorf("it is there")
		}
		return nil
	}, "the namespace does not go")
	s.source("hub", dockerConfig("registry.two"))
	s.failed(s.prefix, "tried again")
	require.NoError(t, install(t.Context(), control))
	s.has(namespace, "registry.two")
	s.ready(s.prefix, 1)
	require.NotNil(t, s.secret(renderedNamespace, impsync.RenderedName(r.UID)))
}

func TestRenamesInQuickSuccessionLeaveNoStraySecret(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	var namespaces []string
	for range 20 {
		namespaces = append(namespaces, s.namespace(map[string]string{s.prefix: "a"}, nil))
	}
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	for round := range 10 {
		s.change(s.prefix, `spec: {target: {secret: {name: `+[]string{otherSecretName, secretName}[round%2]+`}}}`)
	}
	s.ready(s.prefix, len(namespaces))
	for _, namespace := range namespaces {
		s.has(namespace, "registry.one")
		s.lacksNamed(namespace, otherSecretName)
	}
}

func TestATakenAwaySpecTakesEverythingBack(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	namespace := s.namespace(nil, nil)
	r := s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
	s.has(namespace, "registry.one")
	s.change(s.prefix, `spec: null`)
	s.lacks(namespace)
	s.lacksNamed(renderedNamespace, impsync.RenderedName(r.UID))
	s.ready(s.prefix, 0)
}

func TestAnOverwrittenStatusIsPutRight(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	namespace := s.namespace(nil, nil)
	s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
	s.ready(s.prefix, 1)
	_, err := s.dynamic.Resource(v1alpha1.Resource).Patch(t.Context(), s.prefix, types.MergePatchType,
		[]byte(`{"status":{"status":"Failed","namespaces":{"selected":9,"delivered":0,"excluded":0}}}`), metav1.PatchOptions{}, "status")
	require.NoError(t, err)
	s.ready(s.prefix, 1)
}

// A status never says Ready for less than is selected.
func TestAStatusIsNotReadyBeforeEverythingIsThere(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	const many = 100
	for range many {
		s.namespace(map[string]string{s.prefix: "a"}, nil)
	}
	watch, err := s.dynamic.Resource(v1alpha1.Resource).Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + s.prefix})
	require.NoError(t, err)
	defer watch.Stop()
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	s.ready(s.prefix, many)
	s.change(s.prefix, `spec: {target: {namespaces: {labels: []}}}`)
	s.ready(s.prefix, 0)
	deselected := false
	for event := range watch.ResultChan() {
		object, ok := event.Object.(interface{ GetGeneration() int64 })
		require.True(t, ok)
		status := typedObject(t, event.Object).Status
		if status.Status == v1alpha1.StatusReady && status.ObservedGeneration == 1 {
			require.EqualValues(t, many, status.Namespaces.Delivered)
		}
		if deselected = object.GetGeneration() == 2 && status.Status == v1alpha1.StatusReady && status.ObservedGeneration == 2; deselected {
			require.Zero(t, status.Namespaces.Selected)
			break
		}
	}
	require.True(t, deselected)
}

// A coordinator that is told to stop ends what is in flight, and begins nothing more.
func TestAStoppingCoordinatorBeginsNothingMore(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	c := s.coordinator()
	const many = 150
	for range many {
		s.namespace(map[string]string{s.prefix: "a"}, nil)
	}
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	s.ready(s.prefix, many)
	mark := control.Audit().Mark()
	s.source("hub", dockerConfig("registry.two"))
	s.eventually(func() error {
		if len(s.secretWrites(mark, "coordinator")) == 0 {
			return fmt.Errorf("no write yet")
		}
		return nil
	}, "the rotation does not begin")
	stop := control.Audit().Mark()
	c.stop()
	require.LessOrEqual(t, len(s.secretWrites(stop, "coordinator")), 64, "32 in flight, and what was answered between the mark and the stop")
	s.coordinator()
	s.ready(s.prefix, many)
}

// Coming from banzaicloud/imps, the coordinator may be there before the agents.
func TestASecretOfPodsStaysUntilTheAgentsAreThere(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	require.NoError(t, s.control.Node(t.Context(), "node-a"))
	used, unused := s.namespace(nil, nil), s.namespace(nil, nil)
	r := s.resource(s.prefix, spec(podRules(s.prefix)))
	was := s.asIMPS(used, r, dockerConfig("registry.old"))
	s.asIMPS(unused, r, dockerConfig("registry.old"))
	s.pod(used, "node-a", map[string]string{s.prefix: "a"}, nil)
	started := time.Now()
	s.coordinator()
	require.Equal(t, was.UID, s.has(used, "registry.one").UID)
	s.has(unused, "registry.one")
	s.eventually(func() error {
		if time.Since(started) < 2*linger {
			return fmt.Errorf("the linger is not over twice")
		}
		return nil
	}, "time stands still")
	require.Equal(t, was.UID, s.has(used, "registry.one").UID)
	s.has(unused, "registry.one")
	s.agent("node-a")
	s.lacks(unused)
	require.Equal(t, was.UID, s.has(used, "registry.one").UID)
	s.ready(s.prefix, 1)
}

// With the state lost, a broken source's credentials are in the rendered Secret alone.
func TestALostStateLosesNoCredentials(t *testing.T) {
	s := newSystem(t)
	s.source("one", dockerConfig("registry.one"))
	s.source("two", dockerConfig("registry.two"))
	c := s.coordinator()
	first, second := s.namespace(nil, nil), s.namespace(nil, nil)
	r := s.resource(s.prefix, `
target: {secret: {name: `+secretName+`}, namespaces: {names: [`+first+`]}}
registry:
  credentials: [{name: one, namespace: registry-access}, {name: two, namespace: registry-access}]`)
	s.has(first, "registry.one", "registry.two")
	c.stop()
	require.NoError(t, s.core.CoreV1().Secrets(systemNamespace).Delete(t.Context(), impsync.StateName(r.UID), metav1.DeleteOptions{}))
	s.source("one", []byte(`{"auths":{"registry.one":{"auth":"%%%"}}}`))
	s.coordinator(func(c *clusterduty.Config) { c.Identity = s.prefix })
	s.failed(s.prefix, "registry-access.one")
	s.change(s.prefix, `spec: {target: {namespaces: {names: [`+second+`]}}}`)
	s.has(second, "registry.one", "registry.two")
	s.lacks(first)
	s.manages(s.prefix, second)
	require.True(t, slices.Contains(registriesOf(t, s.secret(second, secretName)), "registry.one"))
}

// Two that undo each other's work must not keep the API server busy.
func TestSomebodyWhoEditsASecretAtEveryChangeDoesNotMakeImpsWriteAtEveryChange(t *testing.T) {
	s := newSystem(t)
	s.source("one", dockerConfig("one.example.com"))
	namespace := s.namespace(nil, nil)
	spec := `
registry: {credentials: [{name: one, namespace: registry-access}]}
target: {secret: {name: ` + secretName + `}, namespaces: {names: [` + namespace + `]}}`
	s.resource(s.prefix+"r", spec)
	s.coordinator()
	s.has(namespace, "one.example.com")
	s.ready(s.prefix+"r", 1)

	mark := s.control.Audit().Mark()
	secrets := s.core.CoreV1().Secrets(namespace)
	watcher, err := secrets.Watch(t.Context(), metav1.ListOptions{})
	require.NoError(t, err)
	edited := make(chan int, 1)
	go func() {
		edits := 0
		defer func() { edited <- edits }()
		for event := range watcher.ResultChan() {
			secret, ok := event.Object.(*corev1.Secret)
			if !ok || secret.Annotations[impsync.AnnotationRevision] == "edited" {
				continue
			}
			_, err := secrets.Patch(t.Context(), secretName, "application/merge-patch+json",
				[]byte(`{"metadata":{"annotations":{"`+impsync.AnnotationRevision+`":"edited"}}}`), metav1.PatchOptions{FieldManager: "an-editor"})
			if err == nil {
				edits++
			}
		}
	}()
	s.failed(s.prefix+"r", "somebody changes or deletes the Secret")
	watcher.Stop()
	edits := <-edited
	require.GreaterOrEqual(t, edits, 4)
	writes := len(s.secretWrites(mark, "coordinator"))
	require.GreaterOrEqual(t, writes, 3)
	require.LessOrEqual(t, writes, 3+5, "prompt repairs, and what the deadline allows beyond")

	s.ready(s.prefix+"r", 1) // the editor has gone, and the repair comes
	s.has(namespace, "one.example.com")
}
