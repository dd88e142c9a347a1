package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The registries, each with a source Secret; their names end in the domain that is reserved for tests.
const (
	hub = "hub.test"
	git = "git.test"
)

// passwords are passwords by registry.
type passwords map[string]string

const resourceName = "demo"

// resource is what the demo is about; the audience sees it.
const resource = `apiVersion: images.banzaicloud.io/v1alpha1
kind: ImagePullSecret
metadata:
  name: ` + resourceName + `
spec:
  registry:
    credentials:                # merged in this order
    - {name: hub, namespace: ` + sourceNamespace + `}
    - {name: git, namespace: ` + sourceNamespace + `}
  target:
    secret: {name: ` + secretName + `}
    namespaces:                 # selected when any entry matches
      names: [shop]
      labels: [{matchLabels: {pull: private}}]
      annotations: [{matchAnnotations: {example.test/pull: "from: private registries"}}]
    namespacesWithPods:         # or any of these matches a Pod in it
      labels: [{matchLabels: {image: private}}]
      annotations: [{matchAnnotations: {example.test/image: private}}]
`

// What the selectors above match.
var (
	namespaceLabels      = map[string]any{"pull": "private"}
	namespaceAnnotations = map[string]any{"example.test/pull": "from: private registries"}
	podLabels            = map[string]string{"image": "private"}
	podAnnotations       = map[string]string{"example.test/image": "private"}
)

// create makes the sources and the resource.
func (d *demo) create(ctx context.Context) error {
	d.passwords = passwords{hub: rand.Text(), git: rand.Text()}
	for _, registry := range []string{hub, git} {
		source := d.source(registry, d.passwords[registry])
		if _, err := d.client.CoreV1().Secrets(sourceNamespace).Create(ctx, source, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create source %s: %w", source.Name, err)
		}
		d.note("Secret %s/%s has credentials for %s", sourceNamespace, source.Name, registry)
	}
	d.say("\n   | %s", strings.ReplaceAll(strings.TrimSpace(resource), "\n", "\n   | "))
	return d.control.Apply(ctx, []byte(resource))
}

// source returns a Secret with a password for a registry, named after it.
func (d *demo) source(registry, password string) *corev1.Secret {
	config := fmt.Sprintf(`{"auths": {%q: {"username": "robot", "password": %q}}}`, registry, password)
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: strings.TrimSuffix(registry, ".test")},
		Type:       corev1.SecretTypeDockerConfigJson,
		Data:       map[string][]byte{corev1.DockerConfigJsonKey: []byte(config)},
	}
}

// passwordsIn returns the passwords that a pull Secret holds, none where it cannot be read.
func passwordsIn(secret *corev1.Secret) passwords {
	var config struct {
		Auths map[string]struct{ Password string } `json:"auths"`
	}
	if json.Unmarshal(secret.Data[corev1.DockerConfigJsonKey], &config) != nil {
		return nil
	}
	found := passwords{}
	for registry, entry := range config.Auths {
		found[registry] = entry.Password
	}
	return found
}

// describe tells of credentials without telling them.
func (d *demo) describe(found passwords) string {
	var text []string
	for _, registry := range slices.Sorted(maps.Keys(found)) {
		which := "an outdated"
		if found[registry] == d.passwords[registry] {
			which = "the current"
		}
		text = append(text, which+" password for "+registry)
	}
	return strings.Join(text, ", ")
}

// newNamespace creates a namespace.
func (d *demo) newNamespace(ctx context.Context, name string) error {
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if _, err := d.client.CoreV1().Namespaces().Create(ctx, namespace, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("create namespace %s: %w", name, err)
	}
	return nil
}

// setMetadata returns what sets labels or annotations of a namespace; nil removes one.
func (d *demo) setMetadata(field string, values map[string]any) func(context.Context, string) error {
	return func(ctx context.Context, namespace string) error {
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{field: values}})
		if err != nil {
			return fmt.Errorf("encode a patch: %w", err)
		}
		if _, err := d.client.CoreV1().Namespaces().Patch(ctx, namespace, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("set %s of namespace %s: %w", field, namespace, err)
		}
		return nil
	}
}

// newPod returns what creates a Pod as the scheduler leaves it: bound to a node, nothing started.
func (d *demo) newPod(node string, labels, annotations map[string]string) func(context.Context, string) error {
	return func(ctx context.Context, namespace string) error {
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "app", Labels: labels, Annotations: annotations},
			Spec: corev1.PodSpec{
				NodeName:         node,
				Containers:       []corev1.Container{{Name: "app", Image: git + "/app"}},
				ImagePullSecrets: []corev1.LocalObjectReference{{Name: secretName}},
			},
		}
		if _, err := d.client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create a Pod in %s: %w", namespace, err)
		}
		return nil
	}
}

// deletePod deletes the Pod of a namespace at once, as there is no kubelet to end it.
func (d *demo) deletePod(ctx context.Context, namespace string) error {
	now := int64(0)
	if err := d.client.CoreV1().Pods(namespace).Delete(ctx, "app", metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		return fmt.Errorf("delete the Pod in %s: %w", namespace, err)
	}
	return nil
}
