package integration

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	clusterduty "github.com/imps-node/imps/pkg/sync/cluster"
	"github.com/imps-node/imps/test/cluster/cluster"
)

// K11: one write per Secret and change, in place.
func TestARotatedSourceReachesEverySecretInPlace(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	uids := map[string]types.UID{}
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: "yes"}}]}`))
	for range 20 {
		namespace := s.namespace(map[string]string{s.prefix: "yes"}, nil)
		uids[namespace] = s.has(namespace, "registry.one").UID
	}
	s.ready(s.prefix, 20)
	before := s.get(s.prefix).Status.LastSuccessfulReconciliation
	require.NotNil(t, before)
	for round := range 3 {
		mark := control.Audit().Mark()
		registries := []string{"registry.one", fmt.Sprintf("registry.%d", round)}
		s.source("hub", dockerConfig(registries...))
		for namespace, uid := range uids {
			require.Equal(t, uid, s.has(namespace, registries...).UID)
		}
		s.ready(s.prefix, 20)
		require.Len(t, s.secretWrites(mark, "coordinator"), 20)
		require.Empty(t, s.secretRequests(mark, "agent/node-a"), "a rotation is none of a node's business")
	}
	s.becomes(s.prefix, func(status v1alpha1.ImagePullSecretStatus) error {
		if !status.LastSuccessfulReconciliation.After(before.Time) {
			return fmt.Errorf("last reconciled at %v", status.LastSuccessfulReconciliation)
		}
		return nil
	})
}

// secretRequests are all requests about Secrets outside imps's own namespaces.
func (s *system) secretRequests(mark cluster.Mark, agent string) (requests []string) {
	s.t.Helper()
	for _, e := range s.requests(mark, agent) {
		if e.Resource == "secrets" && e.Namespace != renderedNamespace {
			requests = append(requests, e.Verb+" "+e.URI)
		}
	}
	return requests
}

// A source that names what it had before changes nothing: no write at all.
func TestAnIdleSystemIsSilent(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	c := s.coordinator()
	namespace := s.namespace(nil, nil)
	s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
	s.has(namespace, "registry.one")
	s.ready(s.prefix, 1)
	// A new leader, and a source that is written without being changed.
	c.stop()
	mark := control.Audit().Mark()
	s.coordinator()
	_, err := s.core.CoreV1().Secrets(sourceNamespace).Patch(t.Context(), "hub", types.MergePatchType,
		[]byte(`{"metadata":{"annotations":{"x":"y"}}}`), metav1.PatchOptions{})
	require.NoError(t, err)
	// What comes after it shows that it was looked at.
	other := s.namespace(nil, nil)
	s.resource(s.prefix+"-other", `
target: {secret: {name: `+otherSecretName+`}, namespaces: {names: [`+other+`]}}
registry: {credentials: [{name: hub, namespace: registry-access}]}`)
	s.hasNamed(other, otherSecretName, "registry.one")
	s.ready(s.prefix+"-other", 1)
	writes := map[string]int{}
	for _, e := range s.requests(mark, "coordinator") {
		if !slices.Contains([]string{"get", "list", "watch"}, e.Verb) && e.Resource != "leases" && e.Resource != "events" {
			if e.Resource == "imagepullsecrets" && e.Name == s.prefix+"-other" {
				continue // once, or twice where the first look came before all was done
			}
			writes[e.Verb+" "+e.Resource+"/"+e.Subresource]++
		}
	}
	require.Equal(t, map[string]int{"create secrets/": 1, "patch secrets/": 2}, writes,
		"all of it for the second resource: its state, its rendered and its target Secret")
}

// Prune on every kind of deselection.
func TestASecretGoesWhenItsNamespaceIsNoLongerSelected(t *testing.T) {
	for name, c := range map[string]struct {
		target   string
		deselect func(*system, string)
	}{
		"its label is removed": {
			`  namespaces: {labels: [{matchLabels: {KEY: a}}]}`,
			func(s *system, namespace string) { s.label(namespace, map[string]any{s.prefix: nil}) },
		},
		"its annotation changes": {
			`  namespaces: {annotations: [{matchAnnotations: {KEY: a}}]}`,
			func(s *system, namespace string) { s.annotate(namespace, map[string]string{s.prefix: "b"}) },
		},
		"its name is taken off the list": {
			`  namespaces: {names: [NAMESPACE, KEPT]}`,
			func(s *system, _ string) {
				s.change(s.prefix, `spec: {target: {namespaces: {names: [`+s.kept+`]}}}`)
			},
		},
		"the selector changes": {
			`  namespaces: {names: [KEPT], labels: [{matchLabels: {KEY: a}}]}`,
			func(s *system, _ string) {
				s.change(s.prefix, `spec: {target: {namespaces: {labels: [{matchLabels: {`+s.prefix+`: b}}]}}}`)
			},
		},
		"the Secret is given another name": {
			`  namespaces: {labels: [{matchLabels: {KEY: a}}]}`,
			func(s *system, namespace string) {
				s.change(s.prefix, `spec: {target: {secret: {name: `+otherSecretName+`}}}`)
				s.hasNamed(namespace, otherSecretName, "registry.one")
			},
		},
		"the resource is deleted": {
			`  namespaces: {labels: [{matchLabels: {KEY: a}}]}`,
			func(s *system, _ string) { s.deleteResource(s.prefix, metav1.DeletePropagationBackground) },
		},
		"the resource is deleted in the foreground": {
			`  namespaces: {labels: [{matchLabels: {KEY: a}}]}`,
			func(s *system, _ string) { s.deleteResource(s.prefix, metav1.DeletePropagationForeground) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			s.source("hub", dockerConfig("registry.one"))
			s.coordinator()
			namespace := s.namespace(map[string]string{s.prefix: "a"}, map[string]string{s.prefix: "a"})
			s.kept = s.namespace(map[string]string{s.prefix: "a"}, map[string]string{s.prefix: "a"})
			bystander := s.writeSecret(&corev1.Secret{
				ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "bystander", Labels: map[string]string{impsync.LabelOwnerUID: "x"}},
			})
			target := replaceKey(c.target, s.prefix)
			r := s.resource(s.prefix, spec(replaceNames(target, namespace, s.kept)))
			s.has(namespace, "registry.one")
			kept := s.has(s.kept, "registry.one")
			c.deselect(s, namespace)
			s.lacks(namespace)
			require.Equal(t, bystander.UID, s.secret(namespace, "bystander").UID)
			if name == "its label is removed" || name == "its name is taken off the list" {
				require.Equal(t, kept.UID, s.secret(s.kept, secretName).UID)
				s.ready(s.prefix, 1)
			}
			if name == "the resource is deleted" || name == "the resource is deleted in the foreground" {
				s.lacks(s.kept)
				for _, own := range []string{impsync.RenderedName(r.UID), impsync.StateName(r.UID)} {
					s.lacksNamed(renderedNamespace, own)
					s.lacksNamed(systemNamespace, own)
				}
			}
		})
	}
}

func TestExcludedNamespacesAreNotServedAndCounted(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	excluded, served := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(map[string]string{s.prefix: "a"}, nil)
	c := s.coordinator()
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	s.has(excluded, "registry.one")
	s.ready(s.prefix, 2)
	c.stop()
	s.coordinator(func(c *clusterduty.Config) { c.Excluded = impsync.Exclusion{excluded[:len(excluded)-2] + "*"} })
	s.lacks(excluded)
	s.has(served, "registry.one")
	status := s.ready(s.prefix, 1)
	require.EqualValues(t, 1, status.Namespaces.Excluded)
}

// K13 and "last good": what was good before a fault is good after it.
func TestAFailingSourceKeepsItsLastGoodCredentials(t *testing.T) {
	s := newSystem(t)
	s.source("one", dockerConfig("registry.one"))
	s.source("two", dockerConfig("registry.two"))
	c := s.coordinator()
	namespace := s.namespace(nil, nil)
	s.resource(s.prefix, `
target: {secret: {name: `+secretName+`}, namespaces: {names: [`+namespace+`]}}
registry:
  credentials: [{name: one, namespace: registry-access}, {name: two, namespace: registry-access}]`)
	was := s.has(namespace, "registry.one", "registry.two")
	s.ready(s.prefix, 1)

	s.source("one", []byte(`{"auths":{"registry.one":{"auth":"%%%"}}}`))
	status := s.failed(s.prefix, "registry-access.one", "last good credentials stay in use")
	require.Equal(t, v1alpha1.SourceOK, status.SourceSecretStatus["registry-access.two"])
	require.NotEqual(t, v1alpha1.SourceOK, status.SourceSecretStatus["registry-access.one"])
	s.eventually(func() error {
		return s.event(s.prefix, corev1.EventTypeWarning, "SourceCredentialsError", "registry-access.one")
	}, "no Event")

	// The other one goes on, and a new leader remembers.
	s.source("two", dockerConfig("registry.three"))
	s.has(namespace, "registry.one", "registry.three")
	c.stop()
	s.coordinator()
	s.source("two", dockerConfig("registry.four"))
	secret := s.has(namespace, "registry.one", "registry.four")
	require.Equal(t, was.UID, secret.UID)
	s.failed(s.prefix, "registry-access.one")

	// Gone is gone: that withdraws it.
	require.NoError(t, s.core.CoreV1().Secrets(sourceNamespace).Delete(t.Context(), "one", metav1.DeleteOptions{}))
	s.has(namespace, "registry.four")
	s.failed(s.prefix, "registry-access.one: not found")
	s.source("one", dockerConfig("registry.one"))
	s.has(namespace, "registry.one", "registry.four")
	s.ready(s.prefix, 1)
	require.Equal(t, was.UID, s.secret(namespace, secretName).UID)
	s.calm()
}

// Whatever a source becomes that cannot be used, it costs nothing but a status.
func TestASourceThatTurnsBadIsToldOnceAndIsGoodAgain(t *testing.T) {
	for name, bad := range map[string]corev1.Secret{
		"auths that are a list":     {Type: corev1.SecretTypeDockerConfigJson, Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(`{"auths":[]}`)}},
		"an entry that is a number": {Type: corev1.SecretTypeDockerConfigJson, Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(`{"auths":{"registry.one":7}}`)}},
		"another type":              {Data: map[string][]byte{"password": []byte(canaryPassword)}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			s.source("hub", dockerConfig("registry.one"))
			s.coordinator()
			namespace := s.namespace(nil, nil)
			s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
			was := s.has(namespace, "registry.one")
			s.ready(s.prefix, 1)
			s.calm()
			mark := control.Audit().Mark()
			// A type cannot be changed: the coordinator has to see the Secret go, or not.
			withdrawn := bad.Type != corev1.SecretTypeDockerConfigJson
			if withdrawn {
				require.NoError(t, s.core.CoreV1().Secrets(sourceNamespace).Delete(t.Context(), "hub", metav1.DeleteOptions{}))
				s.has(namespace)
			}
			bad.ObjectMeta = metav1.ObjectMeta{Namespace: sourceNamespace, Name: "hub"}
			s.writeSecret(&bad)
			s.failed(s.prefix, "registry-access.hub")
			s.calm()
			if !withdrawn {
				require.Equal(t, was.ResourceVersion, s.secret(namespace, secretName).ResourceVersion, "what was good stays")
				require.Empty(t, s.secretWrites(mark, "coordinator"))
			}

			require.NoError(t, s.core.CoreV1().Secrets(sourceNamespace).Delete(t.Context(), "hub", metav1.DeleteOptions{}))
			s.has(namespace)
			s.source("hub", dockerConfig("registry.two"))
			require.Equal(t, was.UID, s.has(namespace, "registry.two").UID)
			s.ready(s.prefix, 1)
		})
	}
}

func TestWhatASourceMustNotBeSaysSo(t *testing.T) {
	s := newSystem(t)
	s.coordinator()
	namespace := s.namespace(nil, nil)
	s.writeSecret(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: sourceNamespace, Name: "opaque"}, Data: map[string][]byte{"a": []byte(canaryPassword)}})
	s.writeSecret(&corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: sourceNamespace, Name: "ecr"}, Type: "banzaicloud.io/aws-ecr-login-config",
		Data: map[string][]byte{"accessKeyID": []byte("x"), "secretKey": []byte(canaryPassword)},
	})
	s.source("good", dockerConfig("registry.one"))
	s.resource(s.prefix, `
target: {secret: {name: `+secretName+`}, namespaces: {names: [`+namespace+`]}}
registry:
  credentials:
  - {name: opaque, namespace: registry-access}
  - {name: ecr, namespace: registry-access}
  - {name: missing, namespace: registry-access}
  - {name: hidden, namespace: kube-system}
  - {name: good, namespace: registry-access}`)
	s.has(namespace, "registry.one")
	status := s.failed(s.prefix, "4 of 5 sources")
	require.Contains(t, status.SourceSecretStatus["registry-access.opaque"], "Opaque")
	require.Contains(t, status.SourceSecretStatus["registry-access.ecr"], "not supported")
	require.Equal(t, "not found", status.SourceSecretStatus["registry-access.missing"])
	require.Contains(t, status.SourceSecretStatus["kube-system.hidden"], "--source-namespaces")
	require.Equal(t, v1alpha1.SourceOK, status.SourceSecretStatus["registry-access.good"])
}

// K13: one failing namespace does not hold up the others, and says why (B4, B8).
func TestOneBadNamespaceHoldsUpNoOther(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	full, good, terminating := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(nil, nil)
	s.quota(full, "0")
	finalized := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "holds", Namespace: terminating, Finalizers: []string{"test/holds"}}}
	_, err := s.core.CoreV1().ConfigMaps(terminating).Create(t.Context(), finalized, metav1.CreateOptions{})
	require.NoError(t, err)
	require.NoError(t, s.core.CoreV1().Namespaces().Delete(t.Context(), terminating, metav1.DeleteOptions{}))
	t.Cleanup(func() {
		_, err := s.core.CoreV1().ConfigMaps(terminating).Patch(context.WithoutCancel(t.Context()), "holds", types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
		require.NoError(t, err)
	})
	s.coordinator()
	s.resource(s.prefix, spec(`  namespaces: {names: [`+terminating+`], labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	s.has(good, "registry.one")
	status := s.failed(s.prefix, full, "quota")
	require.EqualValues(t, 2, status.Namespaces.Selected, "a namespace that terminates is not counted")
	s.manages(s.prefix, good)
	s.eventually(func() error {
		return s.event(s.prefix, corev1.EventTypeWarning, "SecretReconciliationError", full)
	}, "no Event")
	s.label(full, map[string]any{s.prefix: nil})
	s.ready(s.prefix, 1)
}

func (s *system) quota(namespace, secrets string) {
	s.t.Helper()
	quota := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: "few"}, Spec: corev1.ResourceQuotaSpec{Hard: quantities("secrets", secrets)}}
	_, err := s.core.CoreV1().ResourceQuotas(namespace).Create(s.t.Context(), quota, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.eventually(func() error { // the controller manager has to count first
		now, err := s.core.CoreV1().ResourceQuotas(namespace).Get(s.t.Context(), "few", metav1.GetOptions{})
		if err == nil && len(now.Status.Hard) == 0 {
			return fmt.Errorf("not counted yet")
		}
		return err
	}, "the quota does not come into force")
}

// K15 and K16: what scripts read.
func TestTheStatusSaysWhatIsTrue(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	var namespaces []string
	for range 3 {
		namespaces = append(namespaces, s.namespace(map[string]string{s.prefix: "a"}, nil))
	}
	slices.Sort(namespaces)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	status := s.ready(s.prefix, 3)
	require.Equal(t, namespaces, status.ManagedNamespaces)
	require.Equal(t, map[string]string{"registry-access.hub": "Ok"}, status.SourceSecretStatus)
	require.EqualValues(t, 1, status.ObservedGeneration)
	require.Empty(t, status.Reason)
	require.Zero(t, status.ValiditySeconds)
	require.NotNil(t, status.LastSuccessfulReconciliation)
	s.eventually(func() error { return s.event(s.prefix, corev1.EventTypeNormal, "Reconciled", "") }, "no Event")
	require.Equal(t, []string{"State", "Reconciled", "Validity seconds", "Secret Name", "Namespaces"}, s.columns())

	s.change(s.prefix, `spec: {target: {namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}, {matchLabels: {other: b}}]}}}`)
	s.becomes(s.prefix, func(status v1alpha1.ImagePullSecretStatus) error {
		if status.ObservedGeneration != 2 {
			return fmt.Errorf("observed generation is %d", status.ObservedGeneration)
		}
		return nil
	})
	s.change(s.prefix, `spec: {target: {namespaces: {labels: [{matchExpressions: [{key: a, operator: Foo}]}]}}}`)
	status = s.failed(s.prefix, "Foo", "what was delivered before stays")
	require.Equal(t, namespaces, status.ManagedNamespaces)
	s.eventually(func() error { return s.event(s.prefix, corev1.EventTypeWarning, "ReconciliationFailed", "Foo") }, "no Event")
	for _, namespace := range namespaces {
		s.has(namespace, "registry.one")
	}
}
