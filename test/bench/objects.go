package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/imps"
)

const (
	registry     = "registry.test"
	sourceName   = "source"
	resourceName = "bench"
)

// resource selects namespaces by label, and by the labels of the Pods in them.
const resource = `apiVersion: images.banzaicloud.io/v1alpha1
kind: ImagePullSecret
metadata:
  name: ` + resourceName + `
spec:
  registry:
    credentials:
      - {name: ` + sourceName + `, namespace: ` + imps.SourceNamespace + `}
  target:
    secret: {name: ` + imps.SecretName + `}
    namespaces:
      labels: [{matchLabels: {pull: private}}]
    namespacesWithPods:
      labels: [{matchLabels: {image: private}}]
`

// attaches is what a resource says besides whose Secret all ServiceAccounts name.
const attaches = `    serviceAccounts:
      labels: [{}]
`

// lateAccount is a ServiceAccount that comes when imps is at work.
const lateAccount = "late"

// namespaceLabels and podLabels are what it selects.
var (
	namespaceLabels = map[string]string{"pull": "private"}
	podLabels       = map[string]string{"image": "private"}
)

var nodes = []string{"node-a", "node-b"}

func (b *bench) podNamespaces() []string   { return names("pods", b.size.pods) }
func (b *bench) labelNamespaces() []string { return names("labels", b.size.labels) }

func names(prefix string, n int) []string {
	all := make([]string, 0, n)
	for i := range n {
		all = append(all, fmt.Sprintf("%s-%05d", prefix, i))
	}
	return all
}

// prepare makes what is there before imps.
func (b *bench) prepare(ctx context.Context) error {
	const unrelated = "unrelated"
	all := append(append(b.podNamespaces(), b.labelNamespaces()...), unrelated)
	if _, err := callAll(ctx, all, inFlight, 0, func(ctx context.Context, name string) error {
		namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if b.size.labelled && name != unrelated {
			namespace.Labels = namespaceLabels
		}
		_, err := b.client.CoreV1().Namespaces().Create(ctx, namespace, metav1.CreateOptions{})
		return err
	}); err != nil {
		return err
	}
	// 32 KiB that do not compress to nothing, as Helm's releases.
	data := []byte(strings.Repeat(rand.Text(), 32<<10)[:32<<10])
	if _, err := callAll(ctx, names("release", b.size.unrelated), inFlight, 0, func(ctx context.Context, name string) error {
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string][]byte{"release": data}}
		_, err := b.client.CoreV1().Secrets(unrelated).Create(ctx, secret, metav1.CreateOptions{})
		return err
	}); err != nil {
		return err
	}
	for i := 1; i < b.size.accounts; i++ { // the first is the default one
		if _, err := callAll(ctx, b.labelNamespaces(), inFlight, 0, func(ctx context.Context, namespace string) error {
			return b.createServiceAccount(ctx, namespace, fmt.Sprint("app-", i))
		}); err != nil {
			return err
		}
	}
	// The controllers make these two in every namespace; without the first no Pod is allowed.
	for resource, name := range map[string]string{"serviceaccounts": "default", "configmaps": "kube-root-ca.crt"} {
		if err := await(ctx, func(ctx context.Context) error {
			list, err := b.metadata.Resource(schema.GroupVersionResource{Version: "v1", Resource: resource}).
				List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
			if err == nil && len(list.Items) < len(all) {
				err = fmt.Errorf("%d of %d namespaces have their %s", len(list.Items), len(all), name)
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// createPod creates a Pod as the scheduler leaves it: bound to a node, nothing started.
func (b *bench) createPod(ctx context.Context, namespace string) error {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "app", Labels: podLabels},
		Spec: corev1.PodSpec{
			NodeName:         nodes[int(namespace[len(namespace)-1])%len(nodes)],
			Containers:       []corev1.Container{{Name: "app", Image: registry + "/app"}},
			ImagePullSecrets: []corev1.LocalObjectReference{{Name: imps.SecretName}},
		},
	}
	_, err := b.client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{})
	return err
}

func (b *bench) createServiceAccount(ctx context.Context, namespace, name string) error {
	_, err := b.client.CoreV1().ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	return err
}

func (b *bench) createAccount(ctx context.Context, namespace string) error {
	return b.createServiceAccount(ctx, namespace, lateAccount)
}

func (b *bench) label(ctx context.Context, namespace string) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": namespaceLabels}})
	if err != nil {
		return fmt.Errorf("encode a label: %w", err)
	}
	_, err = b.client.CoreV1().Namespaces().Patch(ctx, namespace, types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}

// dockerConfig is what a source holds.
func dockerConfig(password string) []byte {
	return fmt.Appendf(nil, `{"auths":{%q:{"username":"robot","password":%q}}}`, registry, password)
}

// writeSource creates the source, or changes it, with a new password.
func (b *bench) writeSource(ctx context.Context) error {
	b.password = rand.Text()
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: sourceName},
		Type:       corev1.SecretTypeDockerConfigJson,
		Data:       map[string][]byte{corev1.DockerConfigJsonKey: dockerConfig(b.password)},
	}
	sources := b.client.CoreV1().Secrets(imps.SourceNamespace)
	_, err := sources.Update(ctx, secret, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		_, err = sources.Create(ctx, secret, metav1.CreateOptions{})
	}
	return err
}

func (b *bench) createResource(ctx context.Context) error {
	manifest := resource
	if b.size.accounts > 0 {
		manifest += attaches
	}
	return b.control.Apply(ctx, []byte(manifest))
}

// resourcePath is where ImagePullSecrets are.
var resourcePath = "/apis/" + v1alpha1.GroupVersion.String() + "/" + v1alpha1.Resource.Resource

func (b *bench) deleteResource(ctx context.Context) error { return b.deleteNamed(ctx, resourceName) }

func (b *bench) deleteNamed(ctx context.Context, name string) error {
	return b.client.CoreV1().RESTClient().Delete().AbsPath(resourcePath, name).Do(ctx).Error()
}

// read reads an ImagePullSecret.
func (b *bench) read(ctx context.Context, name string) (*v1alpha1.ImagePullSecret, error) {
	raw, err := b.client.CoreV1().RESTClient().Get().AbsPath(resourcePath, name).Do(ctx).Raw()
	if err != nil {
		return nil, err
	}
	r := &v1alpha1.ImagePullSecret{}
	return r, json.Unmarshal(raw, r)
}

// isReady returns nil once the coordinator leads and every agent has a report.
func (b *bench) isReady(ctx context.Context) error {
	r, err := b.read(ctx, resourceName)
	if err != nil {
		return err
	}
	if r.Status.Status != v1alpha1.StatusReady {
		return errors.New("the resource is not Ready: " + r.Status.Reason)
	}
	for _, node := range nodes {
		if _, err := b.client.CoreV1().ConfigMaps(imps.SystemNamespace).Get(ctx, impsync.ReportName(node), metav1.GetOptions{}); err != nil {
			return err
		}
	}
	return nil
}
