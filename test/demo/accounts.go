package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	accountsNamespace = "mobile"
	accountsTitle     = "ServiceAccounts: a Deployment comes with its namespace, and names no Secret"
)

// accountsResource is what the step about ServiceAccounts is about; the audience sees it.
const accountsResource = `apiVersion: images.banzaicloud.io/v1alpha1
kind: ImagePullSecret
metadata:
  name: demo-serviceaccounts
spec:
  registry:
    credentials:
    - {name: hub, namespace: ` + sourceNamespace + `}
  target:
    secret: {name: ` + secretName + `}
    namespaces: {names: [` + accountsNamespace + `]}
    serviceAccounts: {names: [default]}
`

// deployment is applied in one go.
const deployment = `apiVersion: v1
kind: Namespace
metadata: {name: ` + accountsNamespace + `}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: app, namespace: ` + accountsNamespace + `}
spec:
  selector: {matchLabels: {app: app}}
  template:
    metadata: {labels: {app: app}}
    spec:
      containers: [{name: app, image: ` + hub + `/app}]
`

// attach shows that Pods name the Secret whose authors have never heard of it.
func (d *demo) attach(ctx context.Context) error {
	d.say("\n   | %s", strings.ReplaceAll(strings.TrimSpace(accountsResource), "\n", "\n   | "))
	if err := d.control.Apply(ctx, []byte(accountsResource)); err != nil {
		return err
	}
	if err := eventually(ctx, "the resource is in force", func(ctx context.Context) error {
		raw, err := d.rest().Get().AbsPath(resources(), "demo-serviceaccounts").DoRaw(ctx)
		if err == nil && !strings.Contains(string(raw), `"ServiceAccountsReady"`) {
			err = errors.New("its status does not speak of ServiceAccounts")
		}
		return err
	}); err != nil {
		return err
	}
	if err := d.control.Apply(ctx, []byte(deployment)); err != nil {
		return err
	}
	var pod corev1.Pod
	if err := eventually(ctx, "the Deployment has its Pod", func(ctx context.Context) error {
		pods, err := d.client.CoreV1().Pods(accountsNamespace).List(ctx, metav1.ListOptions{})
		if err == nil && len(pods.Items) != 1 {
			err = fmt.Errorf("it has %d", len(pods.Items))
		}
		if err == nil {
			pod = pods.Items[0]
		}
		return err
	}); err != nil {
		return err
	}
	d.note("Namespace and Deployment were applied in one go. The Pod's imagePullSecrets, copied from its ServiceAccount at its admission: %v", pod.Spec.ImagePullSecrets)
	d.check("the Pod of a Deployment that came with its namespace names the Secret", fmt.Sprint([]corev1.LocalObjectReference{{Name: secretName}}), fmt.Sprint(pod.Spec.ImagePullSecrets))
	if d.keep {
		return nil
	}
	if err := d.rest().Delete().AbsPath(resources(), "demo-serviceaccounts").Do(ctx).Error(); err != nil {
		return fmt.Errorf("delete the ImagePullSecret: %w", err)
	}
	err := eventually(ctx, "the ServiceAccount is as it was", func(ctx context.Context) error {
		account, err := d.client.CoreV1().ServiceAccounts(accountsNamespace).Get(ctx, "default", metav1.GetOptions{})
		if err == nil && len(account.ImagePullSecrets)+len(account.Annotations) > 0 {
			err = fmt.Errorf("it names %v, and has the annotations %v", account.ImagePullSecrets, account.Annotations)
		}
		return err
	})
	if err == nil {
		d.done("with the resource the ServiceAccount's entry goes")
	}
	return err
}
