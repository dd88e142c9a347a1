package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// account creates a ServiceAccount that names these Secrets.
func (s *system) account(namespace, name string, labels map[string]string, pullSecrets ...string) {
	s.t.Helper()
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	for _, secret := range pullSecrets {
		account.ImagePullSecrets = append(account.ImagePullSecrets, corev1.LocalObjectReference{Name: secret})
	}
	_, err := s.core.CoreV1().ServiceAccounts(namespace).Create(s.t.Context(), account, metav1.CreateOptions{FieldManager: "a-user"})
	require.NoError(s.t, err)
}

// patchAccount changes a ServiceAccount as a user does.
func (s *system) patchAccount(namespace, name string, kind types.PatchType, patch string) {
	s.t.Helper()
	_, err := s.core.CoreV1().ServiceAccounts(namespace).Patch(s.t.Context(), name, kind, []byte(patch), metav1.PatchOptions{FieldManager: "a-user"})
	require.NoError(s.t, err)
}

// names waits until a ServiceAccount names exactly these Secrets, in this order, and is said to owe some of them to imps.
func (s *system) names(namespace, account, attached string, pullSecrets ...string) {
	s.t.Helper()
	s.eventually(func() error {
		a, err := s.core.CoreV1().ServiceAccounts(namespace).Get(s.t.Context(), account, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if have := namesOf(a); !slices.Equal(have, pullSecrets) || a.Annotations[impsync.AnnotationAttached] != attached {
			return fmt.Errorf("ServiceAccount %s/%s names %q, %q of them imps's; not %q, %q", namespace, account, have, a.Annotations[impsync.AnnotationAttached], pullSecrets, attached)
		}
		return nil
	}, "the ServiceAccount does not name what it should")
}

func namesOf(a *corev1.ServiceAccount) (names []string) {
	for _, ref := range a.ImagePullSecrets {
		names = append(names, ref.Name)
	}
	return names
}

// attachTo is a target whose Secret the ServiceAccounts of namespaces with a label name.
func attachTo(label, accounts string) string {
	return spec(`  namespaces: {labels: [{matchLabels: {` + label + `: x}}]}
  serviceAccounts: ` + accounts)
}

// The reference is there before the pod is, and before the Secret.
func TestServiceAccountsOfANewNamespace(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.resource(s.prefix, attachTo(s.prefix, `{labels: [{}]}`))
	namespace := s.namespace(map[string]string{s.prefix: "x"}, nil)
	s.names(namespace, "default", secretName, secretName)
	s.eventually(func() error { // admission goes by a watch of its own
		if pod := s.pod(namespace, "node-a", nil, nil); !slices.Equal(pod.Spec.ImagePullSecrets, []corev1.LocalObjectReference{{Name: secretName}}) {
			return fmt.Errorf("the Pod names %v", pod.Spec.ImagePullSecrets)
		}
		return nil
	}, "admission does not copy it")
	s.account(namespace, "later", nil)
	s.names(namespace, "later", secretName, secretName)
	s.has(namespace, "registry.one")
	s.says(s.prefix, v1alpha1.ConditionServiceAccountsReady, "2 of 2 ServiceAccounts name the Secret")
	s.ready(s.prefix, 1)
	s.calm()
}

// Whatever is selected, comes and goes, users' entries are as they left them.
func TestServiceAccountsAreAsTheirUsersLeftThem(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	coordinator := s.coordinator()
	other := s.namespace(nil, nil)
	s.account(other, "default-like", nil, "a")
	namespace := s.namespace(map[string]string{s.prefix: "x"}, nil)
	s.account(namespace, "two", nil, "b", "a")
	s.account(namespace, "own", nil, secretName, "a")
	s.account(namespace, "labelled", map[string]string{"team": "a"}, "a")
	s.account(namespace, "unlisted", nil, "a")
	s.resource(s.prefix, attachTo(s.prefix, `{names: [two, own, absent], labels: [{matchLabels: {team: a}}]}`))
	attached := func() {
		t.Helper()
		s.names(namespace, "two", secretName, "b", "a", secretName)
		s.names(namespace, "own", "", secretName, "a")
		s.names(namespace, "labelled", secretName, "a", secretName)
		s.names(namespace, "unlisted", "", "a")
		s.names(other, "default-like", "", "a")
	}
	detached := func() {
		t.Helper()
		s.names(namespace, "two", "", "b", "a")
		s.names(namespace, "own", "", secretName, "a")
		s.names(namespace, "labelled", "", "a")
		s.names(namespace, "unlisted", "", "a")
	}
	attached()
	s.says(s.prefix, v1alpha1.ConditionServiceAccountsReady, "3 of 3 ServiceAccounts name the Secret")

	s.label(namespace, map[string]any{s.prefix: nil})
	s.lacks(namespace)
	detached()
	s.label(namespace, map[string]any{s.prefix: "x"})
	attached()

	// A ServiceAccount goes out of the selection, and the resource asks for others.
	s.patchAccount(namespace, "labelled", types.MergePatchType, `{"metadata":{"labels":{"team":"b"}}}`)
	s.names(namespace, "labelled", "", "a")
	s.patchAccount(namespace, "labelled", types.MergePatchType, `{"metadata":{"labels":{"team":"a"}}}`)
	s.names(namespace, "labelled", secretName, "a", secretName)
	s.change(s.prefix, `{spec: {target: {serviceAccounts: {names: [unlisted], labels: null}}}}`)
	s.names(namespace, "unlisted", secretName, "a", secretName)
	s.names(namespace, "two", "", "b", "a")
	s.names(namespace, "labelled", "", "a")
	s.change(s.prefix, `{spec: {target: {serviceAccounts: {names: [two, own], labels: [{matchLabels: {team: a}}]}}}}`)
	attached()

	// Users change what is theirs, and what is not.
	s.patchAccount(namespace, "two", types.JSONPatchType, `[{"op":"add","path":"/imagePullSecrets/0","value":{"name":"c"}},{"op":"add","path":"/imagePullSecrets/-","value":{"name":"d"}}]`)
	s.names(namespace, "two", secretName, "c", "b", "a", secretName, "d")
	s.patchAccount(namespace, "two", types.MergePatchType, `{"imagePullSecrets":[{"name":"b"},{"name":"a"}]}`)
	attached()
	s.patchAccount(namespace, "two", types.MergePatchType, `{"metadata":{"annotations":{"images.banzaicloud.io/attached":"`+secretName+`,a"}}}`)
	s.names(namespace, "two", secretName+",a", "b", "a", secretName)
	s.label(namespace, map[string]any{s.prefix: nil})
	s.names(namespace, "two", "a", "b", "a")
	s.patchAccount(namespace, "two", types.MergePatchType, `{"metadata":{"annotations":{"images.banzaicloud.io/attached":null}}}`)
	detached()
	s.label(namespace, map[string]any{s.prefix: "x"})
	attached()

	// The Secret has another name.
	s.change(s.prefix, `{spec: {target: {secret: {name: `+otherSecretName+`}}}}`)
	s.names(namespace, "two", otherSecretName, "b", "a", otherSecretName)
	s.names(namespace, "own", otherSecretName, secretName, "a", otherSecretName)
	s.change(s.prefix, `{spec: {target: {secret: {name: `+secretName+`}}}}`)
	attached()

	// A backup brings back what was there once.
	s.restored(namespace, "restored", secretName, "a", secretName)
	s.restored(other, "restored", secretName, "a", secretName)
	s.names(namespace, "restored", "", "a")
	s.names(other, "restored", "", "a")

	// The resource goes; and once more while no coordinator runs.
	s.deleteResource(s.prefix, metav1.DeletePropagationBackground)
	detached()
	s.resource(s.prefix, attachTo(s.prefix, `{names: [two, own], labels: [{matchLabels: {team: a}}]}`))
	attached()
	coordinator.stop()
	s.deleteResource(s.prefix, metav1.DeletePropagationBackground)
	s.lacks(namespace)
	coordinator = s.coordinator()
	detached()

	// Its Secrets stay where it is orphaned, and so does what names them.
	s.resource(s.prefix, attachTo(s.prefix, `{names: [two, own], labels: [{matchLabels: {team: a}}]}`))
	attached()
	s.deleteResource(s.prefix, metav1.DeletePropagationOrphan)
	s.calm()
	attached()
	coordinator.stop()
	s.coordinator()
	s.calm()
	attached()
	s.has(namespace, "registry.one")
}

// A namespace and a Deployment in one go, again and again: the Pods name the Secret, and those few that came too early do so
// once they were rescued.
func TestDeploymentsThatComeWithTheirNamespaces(t *testing.T) {
	const n = 500
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator(allowRescue)
	s.agent("node-a")
	early := s.namespace(map[string]string{s.prefix: "x"}, nil) // one at least that comes too early
	s.cannotPull(s.deploy(early, 1)[0])
	late := []string{early}
	s.resource(s.prefix, attachTo(s.prefix, `{names: [default]}`+"\n  rescue: true"))
	s.ready(s.prefix, 1)
	var namespaces []string
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range n {
		namespace := s.control.Namespace(t, map[string]string{s.prefix: "x"})
		_, err := s.core.AppsV1().Deployments(namespace).Create(t.Context(), deploymentOn("node-a"), metav1.CreateOptions{})
		require.NoError(t, err)
		namespaces = append(namespaces, namespace)
		<-tick.C
	}
	named := 0
	for _, namespace := range namespaces {
		var pods *corev1.PodList
		s.eventually(func() (err error) {
			if pods, err = s.core.CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{}); err == nil && len(pods.Items) == 0 {
				err = fmt.Errorf("namespace %s has no Pod", namespace)
			}
			return err
		}, "a Deployment has no Pod")
		if slices.Contains(pods.Items[0].Spec.ImagePullSecrets, corev1.LocalObjectReference{Name: secretName}) {
			named++
		} else {
			s.cannotPull(pods.Items[0])
			late = append(late, namespace)
		}
	}
	t.Logf("of %d Pods %d name the Secret", n, named)
	require.GreaterOrEqual(t, named, n*90/100, "the goal is 99 %%")
	for _, namespace := range late {
		s.replaced(namespace, 1)
	}
}

func deployment() *appsv1.Deployment {
	labels := map[string]string{"app": "app"}
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "app"},
		Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "registry.one/app"}}},
			},
		},
	}
}

// restored creates a ServiceAccount as it was when imps had attached a Secret to it.
func (s *system) restored(namespace, name, attached string, pullSecrets ...string) {
	s.t.Helper()
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{impsync.AnnotationAttached: attached}}}
	for _, secret := range pullSecrets {
		account.ImagePullSecrets = append(account.ImagePullSecrets, corev1.LocalObjectReference{Name: secret})
	}
	_, err := s.core.CoreV1().ServiceAccounts(namespace).Create(s.t.Context(), account, metav1.CreateOptions{FieldManager: "velero-server"})
	require.NoError(s.t, err)
}

// Pods select a namespace: its ServiceAccounts are attached as long as they do, and as long as the Secret lingers.
func TestServiceAccountsOfANamespaceThatPodsSelect(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	s.resource(s.prefix, spec(`  namespacesWithPods: {labels: [{matchLabels: {`+s.prefix+`: x}}]}
  serviceAccounts: {names: [default]}`))
	namespace := s.namespace(nil, nil)
	pod := s.pod(namespace, "node-a", map[string]string{s.prefix: "x"}, nil)
	s.names(namespace, "default", secretName, secretName)
	s.has(namespace, "registry.one")
	s.deletePod(pod)
	s.lacks(namespace)
	s.names(namespace, "default", "")
	s.calm()
}

// A tool that takes the entry out whenever it is put in is noticed, and not fought.
func TestAToolThatTakesTheEntryOut(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	namespace := s.namespace(map[string]string{s.prefix: "x"}, nil)
	s.account(namespace, "managed", nil, "a")
	s.resource(s.prefix, attachTo(s.prefix, `{names: [managed]}`))
	for range 4 {
		s.names(namespace, "managed", secretName, "a", secretName)
		s.patchAccount(namespace, "managed", types.MergePatchType, `{"metadata":{"annotations":{"images.banzaicloud.io/attached":null}},"imagePullSecrets":[{"name":"a"}]}`)
	}
	s.says(s.prefix, v1alpha1.ConditionServiceAccountsReady, namespace+"/managed: somebody takes the entry out whenever it is put in")
	s.eventually(func() error {
		return s.event(s.prefix, corev1.EventTypeWarning, "ServiceAccountError", "somebody takes the entry out whenever it is put in")
	}, "no Event tells")
	s.names(namespace, "managed", secretName, "a", secretName)
	s.ready(s.prefix, 1)
}

// Without the right, Secrets are delivered all the same, and the status says which value of the chart gives it.
func TestServiceAccountsThatMayNotBeRead(t *testing.T) {
	s := newSystem(t)
	roles := s.core.RbacV1().ClusterRoles()
	role, err := roles.Get(t.Context(), "imps-coordinator", metav1.GetOptions{})
	require.NoError(t, err)
	without := role.DeepCopy()
	without.Rules = slices.DeleteFunc(without.Rules, func(r rbacv1.PolicyRule) bool { return slices.Contains(r.Resources, "serviceaccounts") })
	require.Less(t, len(without.Rules), len(role.Rules))
	_, err = roles.Update(t.Context(), without, metav1.UpdateOptions{})
	require.NoError(t, err)
	giveBack := s.givesBack(func() error {
		now, err := roles.Get(ctxOf(t), role.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		now.Rules = role.Rules
		_, err = roles.Update(ctxOf(t), now, metav1.UpdateOptions{})
		return err
	})
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	namespace := s.namespace(map[string]string{s.prefix: "x"}, nil)
	s.resource(s.prefix, attachTo(s.prefix, `{names: [default]}`))
	s.has(namespace, "registry.one")
	s.failed(s.prefix, "the ServiceAccounts cannot be read", "the chart's value attachServiceAccounts gives the right")
	giveBack()
	s.names(namespace, "default", secretName, secretName)
	s.ready(s.prefix, 1)
}

// Many others write the same ServiceAccounts all the time, and nobody loses an entry.
func TestManyWritersOfServiceAccounts(t *testing.T) {
	const writers, accounts = 20, 100
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	namespace := s.namespace(map[string]string{s.prefix: "x"}, nil)
	for i := range accounts {
		s.account(namespace, fmt.Sprint("sa-", i), nil, "first")
	}
	mark := s.control.Audit().Mark()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var writes atomic.Int64
	holds := make([]map[string]bool, writers) // the entries of each writer, by ServiceAccount
	var work sync.WaitGroup
	for w := range writers {
		holds[w] = map[string]bool{}
		work.Go(func() {
			own := corev1.LocalObjectReference{Name: fmt.Sprint("writer-", w)}
			for i := w; ctx.Err() == nil; i += 7 {
				name := fmt.Sprint("sa-", i%accounts)
				if s.toggle(namespace, name, own) {
					holds[w][name] = !holds[w][name]
					writes.Add(1)
				}
			}
		})
	}
	s.coordinator()
	s.resource(s.prefix, attachTo(s.prefix, `{labels: [{}]}`))
	work.Wait()
	s.ready(s.prefix, 1)
	for i := range accounts {
		name := fmt.Sprint("sa-", i)
		a, err := s.core.CoreV1().ServiceAccounts(namespace).Get(t.Context(), name, metav1.GetOptions{})
		require.NoError(t, err)
		want := []string{"first", secretName}
		for w := range writers {
			if holds[w][name] {
				want = append(want, fmt.Sprint("writer-", w))
			}
		}
		have := namesOf(a)
		require.Equal(t, "first", have[0])
		require.ElementsMatch(t, want, have, name)
	}
	written, conflicts := 0, 0
	for _, e := range s.requests(mark, "coordinator") {
		if e.Resource == "serviceaccounts" && e.Verb == "patch" {
			switch e.Code {
			case http.StatusOK:
				written++
			case http.StatusConflict:
				conflicts++
			default:
				t.Errorf("%s: %d", e.URI, e.Code)
			}
		}
	}
	t.Logf("%d writes of others, %d of imps, %d conflicts", writes.Load(), written, conflicts)
	require.Greater(t, writes.Load(), int64(1000))
	require.Equal(t, accounts+1, written, "each is written once, and the namespace's default")
	require.LessOrEqual(t, conflicts, 5*accounts)
}

// toggle adds an entry to a ServiceAccount, or takes it out, in one of the ways that lose nothing: an update over what was
// read, or a JSON patch that appends. It reports whether it was done.
func (s *system) toggle(namespace, name string, own corev1.LocalObjectReference) bool {
	ctx, accounts := s.t.Context(), s.core.CoreV1().ServiceAccounts(namespace)
	a, err := accounts.Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return false
	}
	switch i := slices.Index(a.ImagePullSecrets, own); {
	case i >= 0:
		a.ImagePullSecrets = slices.Delete(a.ImagePullSecrets, i, i+1)
		_, err = accounts.Update(ctx, a, metav1.UpdateOptions{})
	case len(own.Name)%2 == 0:
		a.ImagePullSecrets = append(a.ImagePullSecrets, own)
		_, err = accounts.Update(ctx, a, metav1.UpdateOptions{})
	default:
		patch, _ := json.Marshal([]map[string]any{{"op": "add", "path": "/imagePullSecrets/-", "value": own}})
		_, err = accounts.Patch(ctx, name, types.JSONPatchType, patch, metav1.PatchOptions{})
	}
	if err != nil && !apierrors.IsConflict(err) {
		s.t.Errorf("%s: %v", own.Name, err)
	}
	return err == nil
}
