package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	accountsNamespace = "mobile"
	earlyNamespace    = "kiosk" // its Pod comes before the resource
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
    namespaces: {names: [` + accountsNamespace + `, ` + earlyNamespace + `]}
    serviceAccounts: {names: [default]}
`

// deployment is a namespace and a Deployment in it, to be applied in one go.
func deployment(namespace string) []byte {
	return []byte(`apiVersion: v1
kind: Namespace
metadata: {name: ` + namespace + `}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: app, namespace: ` + namespace + `}
spec:
  selector: {matchLabels: {app: app}}
  template:
    metadata: {labels: {app: app}}
    spec:
      nodeName: node-a
      containers: [{name: app, image: ` + hub + `/app}]
`)
}

// attach shows that Pods name the Secret whose authors have never heard of it.
func (d *demo) attach(ctx context.Context) error {
	early, err := d.deploy(ctx, earlyNamespace)
	if err != nil {
		return err
	}
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
	pod, err := d.deploy(ctx, accountsNamespace)
	if err != nil {
		return err
	}
	if len(pod.Spec.ImagePullSecrets) == 0 { // docs/serviceaccounts.md, window A
		d.note("This Pod was faster than its ServiceAccount, as some in 500 are. It is deleted once, and made anew.")
		if err := d.client.CoreV1().Pods(accountsNamespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil {
			return fmt.Errorf("delete a Pod: %w", err)
		}
		if pod, err = d.deploy(ctx, accountsNamespace); err != nil {
			return err
		}
	}
	d.note("Namespace and Deployment were applied in one go. The Pod's imagePullSecrets, copied from its ServiceAccount at its admission: %v", pod.Spec.ImagePullSecrets)
	d.check("the Pod of a Deployment that came with its namespace names the Secret", fmt.Sprint([]corev1.LocalObjectReference{{Name: secretName}}), fmt.Sprint(pod.Spec.ImagePullSecrets))
	if err := d.explain(ctx, early); err != nil {
		return err
	}
	if d.keep {
		return nil
	}
	if err := d.rest().Delete().AbsPath(resources(), "demo-serviceaccounts").Do(ctx).Error(); err != nil {
		return fmt.Errorf("delete the ImagePullSecret: %w", err)
	}
	err = eventually(ctx, "the ServiceAccount is as it was", func(ctx context.Context) error {
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

// deploy applies a namespace with a Deployment, and returns the Pod that comes of it.
func (d *demo) deploy(ctx context.Context, namespace string) (pod corev1.Pod, err error) {
	if err := d.control.Apply(ctx, deployment(namespace)); err != nil {
		return pod, err
	}
	err = eventually(ctx, "the Deployment has its Pod", func(ctx context.Context) error {
		pods, err := d.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
		if err == nil && len(pods.Items) != 1 {
			err = fmt.Errorf("it has %d", len(pods.Items))
		}
		if err == nil {
			pod = pods.Items[0]
		}
		return err
	})
	return pod, err
}

// explain shows why a Pod does not pull that was there before its ServiceAccount named the Secret.
func (d *demo) explain(ctx context.Context, pod corev1.Pod) error {
	_, err := d.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, []byte(`{"status":{"containerStatuses":[
		{"name":"app","image":"app","imageID":"","ready":false,"restartCount":0,"state":{"waiting":{"reason":"ImagePullBackOff","message":"401 Unauthorized"}}}]}}`),
		metav1.PatchOptions{}, "status")
	if err != nil {
		return fmt.Errorf("write the status of a Pod: %w", err)
	}
	if err := eventually(ctx, "namespace "+pod.Namespace+" has its Secret, and its ServiceAccount names it", func(ctx context.Context) error {
		if _, err := d.client.CoreV1().Secrets(pod.Namespace).Get(ctx, secretName, metav1.GetOptions{}); err != nil {
			return err
		}
		account, err := d.client.CoreV1().ServiceAccounts(pod.Namespace).Get(ctx, "default", metav1.GetOptions{})
		if err == nil && len(account.ImagePullSecrets) == 0 {
			err = errors.New("it names none")
		}
		return err
	}); err != nil {
		return err
	}
	name := pod.Namespace + "/" + pod.Name
	out, err := exec.CommandContext(ctx, d.binary, "explain", "pod", name, "--kubeconfig", d.control.Kubeconfig()).Output() //nolint:gosec // the binary that was just built
	if err != nil {
		return fmt.Errorf("imps-node explain: %w", err)
	}
	d.note("Namespace %s has a Pod that came before the resource. No kubelet runs here: the demo has written the status that one would.", pod.Namespace)
	d.say("\n   $ imps-node explain pod %s\n\n   %s", name, strings.ReplaceAll(strings.ReplaceAll(strings.TrimSpace(string(out)), "\n", "\n   "), "\n   \n", "\n\n"))
	d.check("imps-node explain says what keeps a Pod from pulling that came too early", true, strings.Contains(string(out), "AttachedLate"))
	return nil
}
