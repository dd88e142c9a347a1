package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/cluster/cluster"
)

// asIMPS writes a target Secret the way banzaicloud/imps does: an update with data, its
// label, its annotation with the credentials in clear, and an owner reference.
func (s *system) asIMPS(namespace string, owner *v1alpha1.ImagePullSecret, config []byte) *corev1.Secret {
	s.t.Helper()
	written, err := s.core.CoreV1().Secrets(namespace).Create(s.t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{
			Name: secretName, Namespace: namespace,
			Labels:      map[string]string{impsync.LabelOwnerUID: string(owner.UID), "from-imps": "x"},
			Annotations: map[string]string{impsync.AnnotationLegacyApplied: "UEsDBBQ-in-clear", "note": "old"},
			OwnerReferences: []metav1.OwnerReference{{
				APIVersion: "images.banzaicloud.io/v1alpha1", Kind: "ImagePullSecret", Name: owner.Name, UID: owner.UID,
			}},
		},
		Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: config},
	}, metav1.CreateOptions{FieldManager: "manager"})
	require.NoError(s.t, err)
	return written
}

// ours requires that a Secret is imps's in every respect, and nobody else's in any.
func ours(t *testing.T, secret *corev1.Secret, owners ...types.UID) {
	t.Helper()
	require.NotContains(t, secret.Annotations, impsync.AnnotationLegacyApplied)
	require.NotEmpty(t, secret.Annotations[impsync.AnnotationRevision])
	require.Equal(t, string(owners[0]), secret.Labels[impsync.LabelOwnerUID])
	var references []types.UID
	for _, reference := range secret.OwnerReferences {
		references = append(references, reference.UID)
	}
	require.ElementsMatch(t, owners, references)
	for _, entry := range secret.ManagedFields {
		require.Equal(t, impsync.FieldManager, entry.Manager, "nobody else owns a field of it")
		require.Equal(t, metav1.ManagedFieldsOperationApply, entry.Operation)
	}
}

func TestSecretsOfIMPSAreAdoptedInPlace(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	labelled, unselected := s.namespace(map[string]string{s.prefix: "yes"}, nil), s.namespace(nil, nil)
	r := s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: "yes"}}]}`))
	// The same content in IMPS's own form, and one of a source that has changed since.
	was := s.asIMPS(labelled, r, []byte(`{"auths":{"registry.one":{"auth":"x","password":"x","username":"x"}}}`))
	s.asIMPS(unselected, r, dockerConfig("registry.one"))
	require.Equal(t, "manager", was.ManagedFields[0].Manager)

	s.coordinator()
	s.ready(s.prefix, 1)
	secret := s.has(labelled, "registry.one")
	require.Equal(t, was.UID, secret.UID, "in place")
	ours(t, secret, r.UID)
	require.Equal(t, map[string]string{impsync.LabelOwnerUID: string(r.UID)}, secret.Labels, "what the resource does not ask for went")
	require.Contains(t, string(secret.Data[corev1.DockerConfigJsonKey]), canaryUser)
	s.lacks(unselected)
}

func TestAForeignSecretIsNeverTouched(t *testing.T) {
	config := dockerConfig("registry.one")
	for name, change := range map[string]func(*corev1.Secret){
		"with other content": func(secret *corev1.Secret) {
			secret.Data[corev1.DockerConfigJsonKey] = dockerConfig("registry.other")
		},
		"with the very same content": func(*corev1.Secret) {},
		"of another type": func(secret *corev1.Secret) {
			secret.Type, secret.Data = corev1.SecretTypeOpaque, map[string][]byte{"key": []byte("value")}
		},
		"with our label copied by a user": func(secret *corev1.Secret) {
			secret.Labels = map[string]string{impsync.LabelOwnerUID: "0a1b"}
		},
		"immutable": func(secret *corev1.Secret) {
			yes := true
			secret.Immutable = &yes
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			s.source("hub", config)
			foreign, free := s.namespace(nil, nil), s.namespace(nil, nil)
			secret := &corev1.Secret{
				ObjectMeta: metav1.ObjectMeta{Name: secretName, Namespace: foreign},
				Type:       corev1.SecretTypeDockerConfigJson,
				Data:       map[string][]byte{corev1.DockerConfigJsonKey: rendered(t)},
			}
			change(secret)
			was := s.writeSecret(secret)
			s.coordinator()
			s.agent("node-a")
			s.resource(s.prefix, spec(`  namespaces: {names: [`+foreign+`, `+free+`]}`))
			s.has(free, "registry.one") // the other namespace is served all the same (K13)
			s.failed(s.prefix, foreign, "not imps's")
			s.manages(s.prefix, free)
			s.pod(foreign, "node-a", nil, nil)
			s.eventually(func() error { // the agent has looked at it
				for _, e := range s.requests(s.began, "agent/node-a") {
					if e.Resource == "secrets" && e.Namespace == foreign {
						return nil
					}
				}
				return errors.New("the agent has not asked")
			}, "the agent does not look")
			barrier := s.namespace(nil, nil)
			s.change(s.prefix, `spec: {target: {namespaces: {names: [`+foreign+`, `+free+`, `+barrier+`]}}}`)
			s.has(barrier, "registry.one")
			s.calm()
			require.Empty(t, s.secretWrites(s.began, "agent/node-a"))
			require.Zero(t, s.tries(s.began, "agent/node-a", foreign), "nor tried")
			require.Zero(t, s.tries(s.began, "coordinator", foreign))
			require.Equal(t, was.ResourceVersion, s.secret(foreign, secretName).ResourceVersion, "not a byte of it was written")
			s.eventually(func() error { return s.event(s.prefix, corev1.EventTypeWarning, "SecretReconciliationError", foreign) }, "no Event")

			// Taken up when it is gone.
			require.NoError(t, s.core.CoreV1().Secrets(foreign).Delete(t.Context(), secretName, metav1.DeleteOptions{}))
			s.has(foreign, "registry.one")
			s.ready(s.prefix, 3)
		})
	}
}

// rendered is dockerConfig("registry.one") byte for byte as imps renders it.
func rendered(t *testing.T) []byte {
	t.Helper()
	return fmt.Appendf(nil, `{"auths":{"registry.one":{"username":%q,"password":%q,"auth":%q}}}`,
		canaryUser, canaryPassword, base64Of(canaryUser+":"+canaryPassword))
}

// event returns an error where there is no Event about a resource with this text.
func (s *system) event(resource, eventType, reason, text string) error {
	events, err := s.core.CoreV1().Events("default").List(s.t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + resource})
	if err != nil {
		return err
	}
	for _, e := range events.Items {
		if e.Type == eventType && e.Reason == reason && strings.Contains(e.Message, text) {
			return nil
		}
	}
	return fmt.Errorf("no %s %s about %s with %q among %d Events", eventType, reason, resource, text, len(events.Items))
}

// restore puts a Secret back as a backup tool does: the same content without the server's
// own metadata.
func (s *system) restore(secret *corev1.Secret, namespace string) *corev1.Secret {
	s.t.Helper()
	copied := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{
			Name: secret.Name, Namespace: namespace, Labels: secret.Labels, Annotations: secret.Annotations,
		},
		Type: secret.Type, Data: secret.Data,
	}
	created, err := s.core.CoreV1().Secrets(namespace).Create(s.t.Context(), copied, metav1.CreateOptions{FieldManager: "backup"})
	require.NoError(s.t, err)
	return created
}

func TestARestoredSecretIsAdoptedWhereSelectedAndLeftWhereNot(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	selected, other := s.namespace(nil, nil), s.namespace(nil, nil)
	c := s.coordinator()
	r := s.resource(s.prefix, spec(`  namespaces: {names: [`+selected+`]}`))
	was := s.has(selected, "registry.one")
	c.stop()
	require.NoError(t, s.core.CoreV1().Secrets(selected).Delete(t.Context(), secretName, metav1.DeleteOptions{}))
	restored := s.restore(was, selected)
	copied := s.restore(was, other)

	s.coordinator()
	s.eventually(func() error {
		if secret := s.secret(selected, secretName); len(secret.OwnerReferences) == 0 {
			return fmt.Errorf("not adopted yet")
		}
		return nil
	}, "the restored Secret is not adopted")
	secret := s.has(selected, "registry.one")
	require.Equal(t, restored.UID, secret.UID)
	require.Equal(t, []metav1.OwnerReference{{APIVersion: "images.banzaicloud.io/v1alpha1", Kind: "ImagePullSecret", Name: r.Name, UID: r.UID}}, secret.OwnerReferences)
	s.ready(s.prefix, 1)
	require.Equal(t, copied.ResourceVersion, s.secret(other, secretName).ResourceVersion, "a copy that nothing selects is a user's")

	// A rotation reaches it like any other.
	s.source("hub", dockerConfig("registry.one", "registry.two"))
	require.Equal(t, restored.UID, s.has(selected, "registry.one", "registry.two").UID)
}

func TestClearedManagedFieldsAreHealed(t *testing.T) {
	for name, value := range map[string]string{"with an empty entry": `[{}]`, "with an empty list": `[]`} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			s.source("hub", dockerConfig("registry.one"))
			namespace := s.namespace(nil, nil)
			s.coordinator()
			r := s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
			was := s.has(namespace, "registry.one")
			s.ready(s.prefix, 1)
			_, err := s.core.CoreV1().Secrets(namespace).Patch(t.Context(), secretName, types.MergePatchType,
				[]byte(`{"metadata":{"managedFields":`+value+`}}`), metav1.PatchOptions{})
			require.NoError(t, err)
			s.source("hub", dockerConfig("registry.one", "registry.two"))
			secret := s.has(namespace, "registry.one", "registry.two")
			require.Equal(t, was.UID, secret.UID)
			ours(t, secret, r.UID)
			s.ready(s.prefix, 1)
		})
	}
}

// delivered has one coordinator deliver to one namespace.
func (s *system) delivered() (*v1alpha1.ImagePullSecret, *corev1.Secret) {
	s.t.Helper()
	s.source("hub", dockerConfig("registry.one"))
	namespace := s.namespace(nil, nil)
	s.coordinator()
	r := s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
	secret := s.has(namespace, "registry.one")
	s.ready(s.prefix, 1)
	return r, secret
}

// B18: what a user changes is put back at once, and no more than that.
func TestAnEditedSecretIsRepairedInPlace(t *testing.T) {
	for name, patch := range map[string]string{
		"data":             `{"data":{".dockerconfigjson":"e30="}}`,
		"data removed":     `{"data":{".dockerconfigjson":null},"stringData":{".dockerconfigjson":"{}"}}`,
		"revision":         `{"metadata":{"annotations":{"images.banzaicloud.io/revision":"UID.99999"}}}`,
		"another revision": `{"metadata":{"annotations":{"images.banzaicloud.io/revision":"x.99999"}}}`,
		"revision removed": `{"metadata":{"annotations":{"images.banzaicloud.io/revision":null}}}`,
		"owner":            `{"metadata":{"ownerReferences":null}}`,
		"a label of ours":  `{"metadata":{"labels":{"team":"b"}}}`,
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			s.source("hub", dockerConfig("registry.one"))
			namespace := s.namespace(nil, nil)
			s.coordinator()
			r := s.resource(s.prefix, `
target: {secret: {name: `+secretName+`, labels: {team: a}}, namespaces: {names: [`+namespace+`]}}
registry: {credentials: [{name: hub, namespace: registry-access}]}`)
			was := s.has(namespace, "registry.one")
			s.ready(s.prefix, 1)
			mark := control.Audit().Mark()
			edited, err := s.core.CoreV1().Secrets(namespace).Patch(t.Context(), secretName, types.MergePatchType,
				[]byte(strings.ReplaceAll(patch, "UID", string(r.UID))), metav1.PatchOptions{FieldManager: "a-user"})
			require.NoError(t, err)
			require.NotEqual(t, was.ResourceVersion, edited.ResourceVersion)
			s.eventually(func() error {
				now := s.secret(namespace, secretName)
				for what, same := range map[string]bool{
					"data":        string(now.Data[corev1.DockerConfigJsonKey]) == string(was.Data[corev1.DockerConfigJsonKey]),
					"owner":       len(now.OwnerReferences) == 1 && now.OwnerReferences[0].UID == was.OwnerReferences[0].UID,
					"labels":      fmt.Sprint(now.Labels) == fmt.Sprint(was.Labels),
					"annotations": fmt.Sprint(now.Annotations) == fmt.Sprint(was.Annotations),
					"UID":         now.UID == was.UID,
				} {
					if !same {
						return fmt.Errorf("its %s is not what it was", what)
					}
				}
				return nil
			}, "the Secret is not repaired")
			s.ready(s.prefix, 1)
			s.calm()
			require.Len(t, s.secretWrites(mark, "coordinator"), 1, "one write repairs it")
		})
	}
	t.Run("a user's own label and annotation stay", func(t *testing.T) {
		s := newSystem(t)
		s.source("hub", dockerConfig("registry.one"))
		namespace := s.namespace(nil, nil)
		s.coordinator()
		s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
		s.has(namespace, "registry.one")
		_, err := s.core.CoreV1().Secrets(namespace).Patch(t.Context(), secretName, types.MergePatchType,
			[]byte(`{"metadata":{"labels":{"mine":"x"},"annotations":{"mine":"y"}}}`), metav1.PatchOptions{FieldManager: "a-user"})
		require.NoError(t, err)
		s.source("hub", dockerConfig("registry.one", "registry.two"))
		secret := s.has(namespace, "registry.one", "registry.two")
		require.Equal(t, "x", secret.Labels["mine"])
		require.Equal(t, "y", secret.Annotations["mine"])
	})
	t.Run("another owner in its owner's place stays beside that", func(t *testing.T) {
		s := newSystem(t)
		r, was := s.delivered()
		namespace := was.Namespace
		users, err := s.core.CoreV1().ConfigMaps(namespace).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "theirs"}}, metav1.CreateOptions{})
		require.NoError(t, err)
		mark := control.Audit().Mark()
		_, err = s.core.CoreV1().Secrets(namespace).Patch(t.Context(), secretName, types.MergePatchType,
			fmt.Appendf(nil, `{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"ConfigMap","name":"theirs","uid":%q}]}}`, users.UID),
			metav1.PatchOptions{FieldManager: "a-user"})
		require.NoError(t, err)
		s.owners(namespace, 2)
		secret := s.has(namespace, "registry.one")
		require.Equal(t, was.UID, secret.UID)
		require.ElementsMatch(t, []types.UID{users.UID, r.UID}, []types.UID{secret.OwnerReferences[0].UID, secret.OwnerReferences[1].UID})
		s.ready(s.prefix, 1)
		s.calm()
		require.Len(t, s.secretWrites(mark, "coordinator"), 1)
	})
	t.Run("labelled as another resource's, it is not that one's", func(t *testing.T) {
		s := newSystem(t)
		r, was := s.delivered()
		namespace := was.Namespace
		other := s.resource(s.prefix+"-other", spec(`  namespaces: {names: [`+s.namespace(nil, nil)+`]}`))
		s.ready(other.Name, 1)
		mark := control.Audit().Mark()
		_, err := s.core.CoreV1().Secrets(namespace).Patch(t.Context(), secretName, types.MergePatchType,
			fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, impsync.LabelOwnerUID, other.UID), metav1.PatchOptions{FieldManager: "a-user"})
		require.NoError(t, err)
		s.eventually(func() error {
			if now := s.secret(namespace, secretName); now == nil || now.Labels[impsync.LabelOwnerUID] != string(r.UID) {
				return fmt.Errorf("it is another's, or gone")
			}
			return nil
		}, "the Secret does not come back to its resource")
		require.Equal(t, was.UID, s.has(namespace, "registry.one").UID)
		s.ready(s.prefix, 1)
		s.ready(other.Name, 1)
		s.calm()
		require.Len(t, s.secretWrites(mark, "coordinator"), 1)
	})
	t.Run("deleted, it comes back", func(t *testing.T) {
		s := newSystem(t)
		r, was := s.delivered()
		namespace := was.Namespace
		mark := control.Audit().Mark()
		require.NoError(t, s.core.CoreV1().Secrets(namespace).Delete(t.Context(), secretName, metav1.DeleteOptions{}))
		s.eventually(func() error {
			if now := s.secret(namespace, secretName); now == nil || now.UID == was.UID {
				return fmt.Errorf("not there")
			}
			return nil
		}, "the Secret does not come back")
		ours(t, s.has(namespace, "registry.one"), r.UID)
		s.calm()
		s.ready(s.prefix, 1)
		require.Len(t, s.secretWrites(mark, "coordinator"), 1)
	})
	t.Run("its label removed, it is the user's", func(t *testing.T) {
		s := newSystem(t)
		_, was := s.delivered()
		namespace := was.Namespace
		mark := control.Audit().Mark()
		users, err := s.core.CoreV1().Secrets(namespace).Patch(t.Context(), secretName, types.MergePatchType,
			[]byte(`{"metadata":{"labels":{"`+impsync.LabelOwnerUID+`":null}}}`), metav1.PatchOptions{FieldManager: "a-user"})
		require.NoError(t, err)
		s.failed(s.prefix, namespace, "not imps's")
		s.calm()
		require.Zero(t, s.tries(mark, "coordinator", namespace))
		require.Equal(t, users.ResourceVersion, s.secret(namespace, secretName).ResourceVersion)
	})
}

// owners waits until the Secret of a namespace has so many owner references.
func (s *system) owners(namespace string, want int) {
	s.t.Helper()
	s.eventually(func() error {
		if n := len(s.secret(namespace, secretName).OwnerReferences); n != want {
			return fmt.Errorf("%d owner references, not %d", n, want)
		}
		return nil
	}, "the Secret does not come to name its claimants as owners")
}

func TestTheOlderOfTwoResourcesWinsATargetAndHandsItOver(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.source("second", dockerConfig("registry.two"))
	shared, own := s.namespace(nil, nil), s.namespace(nil, nil)
	s.coordinator()
	// Two that are made in one second are ordered by their names.
	older := s.resource(s.prefix+"-a", spec(`  namespaces: {names: [`+shared+`]}`))
	was := s.has(shared, "registry.one")
	younger := s.resource(s.prefix+"-b", `
target: {secret: {name: `+secretName+`}, namespaces: {names: [`+shared+`, `+own+`]}}
registry: {credentials: [{name: second, namespace: registry-access}]}`)
	s.has(own, "registry.two")
	s.failed(younger.Name, shared, "the older ImagePullSecret "+older.Name)
	s.manages(younger.Name, own)
	s.ready(older.Name, 1)
	s.owners(shared, 2)
	secret := s.has(shared, "registry.one")
	ours(t, secret, older.UID, younger.UID)

	s.deleteResource(older.Name, metav1.DeletePropagationBackground)
	secret = s.has(shared, "registry.two")
	require.Equal(t, was.UID, secret.UID, "handed over in place")
	s.ready(younger.Name, 2)
	s.eventually(func() error {
		secret = s.secret(shared, secretName)
		if n := len(secret.OwnerReferences); n != 1 {
			return fmt.Errorf("%d owner references", n)
		}
		return nil
	}, "the dead claimant stays an owner")
	ours(t, secret, younger.UID)
	s.has(own, "registry.two")
}

func TestALoserThatGoesTakesNothingWithIt(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	namespace := s.namespace(nil, nil)
	s.coordinator()
	older := s.resource(s.prefix+"-a", spec(`  namespaces: {names: [`+namespace+`]}`))
	was := s.has(namespace, "registry.one")
	younger := s.resource(s.prefix+"-b", spec(`  namespaces: {names: [`+namespace+`]}`))
	s.failed(younger.Name, namespace)
	s.change(younger.Name, `spec: {target: {namespaces: {names: []}}}`)
	s.ready(younger.Name, 0)
	s.owners(namespace, 1)
	secret := s.has(namespace, "registry.one")
	require.Equal(t, was.UID, secret.UID)
	ours(t, secret, older.UID)
}

// The older of two claimants goes, and the younger ceases to select the namespace, while
// nobody leads: the younger's owner reference keeps the garbage collector from the Secret,
// and with its rendered Secret the trace is lost that it ever claimed it.
func TestASecretThatWasNeverHandedOverGoesWhereNobodyWantsIt(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	shared, own := s.namespace(nil, nil), s.namespace(nil, nil)
	coordinator := s.coordinator()
	older := s.resource(s.prefix+"-a", spec(`  namespaces: {names: [`+shared+`]}`))
	younger := s.resource(s.prefix+"-b", spec(`  namespaces: {names: [`+shared+`, `+own+`]}`))
	s.failed(younger.Name, shared, "the older ImagePullSecret "+older.Name)
	s.owners(shared, 2)
	coordinator.stop()

	s.deleteResource(older.Name, metav1.DeletePropagationBackground)
	s.owners(shared, 1)
	require.Equal(t, string(older.UID), s.has(shared, "registry.one").Labels[impsync.LabelOwnerUID])
	s.change(younger.Name, `spec: {target: {namespaces: {names: [`+own+`]}}}`)
	require.NoError(t, s.core.CoreV1().Secrets(renderedNamespace).Delete(t.Context(), impsync.RenderedName(younger.UID), metav1.DeleteOptions{}))
	s.coordinator()
	s.lacks(shared)
	s.ready(younger.Name, 1)
	s.has(own, "registry.one")
}

func TestAnOrphanedSecretStaysAndIsAdoptedAnew(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	namespace := s.namespace(nil, nil)
	s.coordinator()
	first := s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
	was := s.has(namespace, "registry.one")
	s.ready(s.prefix, 1)
	s.deleteResource(s.prefix, metav1.DeletePropagationOrphan)
	s.eventually(func() error {
		if s.secret(renderedNamespace, impsync.RenderedName(first.UID)) != nil {
			return fmt.Errorf("its rendered Secret is there")
		}
		if _, err := s.dynamic.Resource(v1alpha1.Resource).Get(t.Context(), s.prefix, metav1.GetOptions{}); err == nil {
			return fmt.Errorf("the resource is there")
		}
		return nil
	}, "the resource does not go")
	require.Equal(t, was.UID, s.has(namespace, "registry.one").UID)

	mark := s.control.Audit().Mark()
	second := s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
	s.ready(s.prefix, 1)
	secret := s.has(namespace, "registry.one")
	require.Equal(t, was.UID, secret.UID)
	ours(t, secret, second.UID)
	s.calm()
	require.Len(t, s.secretWrites(mark, "coordinator"), 1)
	raw, err := json.Marshal(secret.ManagedFields)
	require.NoError(t, err)
	require.NotContains(t, string(raw), string(first.UID))
}

// A resource is orphaned while nobody leads, and with its rendered Secret the trace of its
// state Secret is lost, but for what it left in the namespaces.
func TestTheStateOfAnOrphanedResourceDoesNotOutliveIt(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	namespace := s.namespace(nil, nil)
	coordinator := s.coordinator()
	r := s.resource(s.prefix, spec(`  namespaces: {names: [`+namespace+`]}`))
	was := s.has(namespace, "registry.one")
	s.ready(s.prefix, 1)
	coordinator.stop()
	require.NoError(t, s.core.CoreV1().Secrets(renderedNamespace).Delete(t.Context(), impsync.RenderedName(r.UID), metav1.DeleteOptions{}))
	s.deleteResource(s.prefix, metav1.DeletePropagationOrphan)
	s.owners(namespace, 0)
	require.NotNil(t, s.secret(systemNamespace, impsync.StateName(r.UID)))
	s.coordinator()
	s.lacksNamed(systemNamespace, impsync.StateName(r.UID))
	s.calm()
	require.Equal(t, was.UID, s.has(namespace, "registry.one").UID)
}

// The garbage collector does not hear of every end: where its watch broke, and another
// resource of that name was created meanwhile, it takes the two for one.
func TestWhatAResourceLeftThatIsGoneBeforeItsLeaderGoesWithoutTheGarbageCollector(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	left, other := s.namespace(nil, nil), s.namespace(nil, nil)
	coordinator := s.coordinator()
	first := s.resource(s.prefix, spec(`  namespaces: {names: [`+left+`]}`))
	s.has(left, "registry.one")
	s.ready(s.prefix, 1)
	coordinator.stop()
	require.NoError(t, control.Signal(cluster.ControllerManager, syscall.SIGSTOP))
	goOn := s.givesBack(func() error { return control.Signal(cluster.ControllerManager, syscall.SIGCONT) })
	s.deleteResource(s.prefix, metav1.DeletePropagationBackground)
	mark := control.Audit().Mark()
	s.resource(s.prefix, spec(`  namespaces: {names: [`+other+`]}`))
	s.coordinator()
	s.lacks(left)
	for namespace, name := range map[string]string{systemNamespace: impsync.StateName(first.UID), renderedNamespace: impsync.RenderedName(first.UID)} {
		s.lacksNamed(namespace, name)
	}
	was := s.has(other, "registry.one")
	s.ready(s.prefix, 1)
	s.calm()
	require.Len(t, s.secretWrites(mark, "coordinator"), 2, "one deleted, one created")
	goOn()
	s.calm()
	require.Equal(t, was.ResourceVersion, s.has(other, "registry.one").ResourceVersion)
}

func TestTheYoungerSaysWhatIsInItsOwnWayOnceTheOlderIsGone(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	namespace := s.namespace(nil, nil)
	s.writeSecret(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: secretName, Namespace: namespace}})
	s.coordinator()
	s.resource(s.prefix+"-a", spec(`  namespaces: {names: [`+namespace+`]}`))
	s.failed(s.prefix+"-a", "not imps's")
	s.resource(s.prefix+"-b", spec(`  namespaces: {names: [`+namespace+`]}`))
	s.failed(s.prefix+"-b", "the older ImagePullSecret "+s.prefix+"-a")
	s.deleteResource(s.prefix+"-a", metav1.DeletePropagationBackground)
	s.failed(s.prefix+"-b", "not imps's")
}

func TestAForeignSecretWithOurLabelIsForgottenWithItsNamespace(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	namespace := s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.coordinator()
	r := s.resource(s.prefix, spec(`  namespaces: {names: [], labels: [{matchLabels: {`+s.prefix+`: b}}]}`))
	s.ready(s.prefix, 0)
	was := s.writeSecret(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{
		Name: secretName, Namespace: namespace, Labels: map[string]string{impsync.LabelOwnerUID: string(r.UID)},
	}})
	s.label(namespace, map[string]any{s.prefix: "b"})
	s.failed(s.prefix, "not imps's")
	s.label(namespace, map[string]any{s.prefix: "a"})
	s.ready(s.prefix, 0)
	s.label(namespace, map[string]any{s.prefix: "b"})
	s.failed(s.prefix, "not imps's")
	s.change(s.prefix, `spec: {target: {namespaces: {labels: []}}}`)
	s.ready(s.prefix, 0)
	require.Equal(t, was.ResourceVersion, s.secret(namespace, secretName).ResourceVersion)
}

func TestADeletedStateSecretIsWrittenAnewFromMemory(t *testing.T) {
	s := newSystem(t)
	s.source("one", dockerConfig("registry.one"))
	s.source("two", dockerConfig("registry.two"))
	s.coordinator()
	namespace := s.namespace(nil, nil)
	r := s.resource(s.prefix, `
target: {secret: {name: `+secretName+`}, namespaces: {names: [`+namespace+`]}}
registry:
  credentials: [{name: one, namespace: registry-access}, {name: two, namespace: registry-access}]`)
	s.has(namespace, "registry.one", "registry.two")
	s.ready(s.prefix, 1)
	require.NoError(t, s.core.CoreV1().Secrets(systemNamespace).Delete(t.Context(), impsync.StateName(r.UID), metav1.DeleteOptions{}))
	s.source("one", []byte(`{"auths":{"registry.one":{"auth":"%%%"}}}`))
	s.failed(s.prefix, "registry-access.one")
	s.source("two", dockerConfig("registry.three"))
	s.has(namespace, "registry.one", "registry.three")
	require.NotNil(t, s.secret(systemNamespace, impsync.StateName(r.UID)))
}
