package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
	"github.com/imps-node/imps/test/registry"
)

const (
	nodeTitle = "A real node: Pods that name no Secret pull by the kubelet's credential provider"
	realNode  = "node-c"
	nodeHost  = "private.test"
	// podWithin is how long a Pod may take; a machine may be busy with others.
	podWithin = 2 * time.Minute
	// Namespaces: one that the resource selects, and one that it does not.
	insider, stranger = "frontend", "backend"
)

// nodeResource is what the step about the node is about; the audience sees it.
const nodeResource = `apiVersion: images.banzaicloud.io/v1alpha1
kind: ImagePullSecret
metadata:
  name: demo-node
spec:
  registry:
    credentials:
    - {name: private, namespace: ` + sourceNamespace + `}
  target:
    secret: {name: ` + secretName + `}
    namespaces: {names: [` + insider + `]}
    kubelet: {scope: Namespace}   # kubelets may pull with it, for Pods of these namespaces
`

// providers is the kubelet's configuration.
const providers = `apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: imps-credprovider
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: ["*.test"]
  defaultCacheDuration: "0s"
  args: ["--scope=Namespace", "--cache-dir=%s"]
  tokenAttributes: {serviceAccountTokenAudience: imps, cacheType: ServiceAccount, requireServiceAccount: true}
`

// cacheDir is the node cache of an agent.
func (d *demo) cacheDir(node string) string { return filepath.Join(d.dir, "cache-"+node) }

// node shows a kubelet that pulls for Pods of a selected namespace, and not for others.
func (d *demo) node(ctx context.Context) error {
	if err := cluster.CanStartNode(); err != nil {
		d.note("Not shown here: %v", err)
		if os.Getenv("CI") != "" {
			return err
		}
		return nil
	}
	d.note("containerd and a kubelet, as processes of this machine in namespaces of their own; the first run builds them (some minutes)")
	root, err := imps.Root(ctx)
	if err != nil {
		return err
	}
	bin := filepath.Join(d.dir, "bin")
	if _, err := imps.BuildCommand(ctx, root, bin, "imps-credprovider", "-trimpath"); err != nil {
		return err
	}
	config := filepath.Join(d.dir, "providers.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, providers, d.cacheDir(realNode)), 0o600); err != nil {
		return err
	}
	hosts, err := registry.StartHosts(ctx, d.control, d.distribution, d.dir)
	if err != nil {
		return err
	}
	defer hosts.Stop()
	private := hosts.Host(nodeHost)
	private.Allow("robot", d.passwords[hub])

	begin := time.Now()
	node, err := d.control.StartNode(ctx, cluster.NodeConfig{
		Name: realNode, CredentialProviderConfig: config, CredentialProviderBinDir: bin, Registries: hosts.Addresses(),
	})
	if err != nil {
		return err
	}
	defer func() {
		if err := node.Stop(); err != nil {
			d.failed(check{name: "the node is stopped and removed", want: "no error", seen: err.Error()})
		}
	}()
	d.note("%s is Ready after %.1f s", realNode, time.Since(begin).Seconds())
	if err := d.launchAgent(ctx, realNode); err != nil {
		return err
	}

	source := d.source(nodeHost, d.passwords[hub])
	if _, err := d.client.CoreV1().Secrets(sourceNamespace).Create(ctx, source, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("create source %s: %w", source.Name, err)
	}
	d.say("\n   | %s", strings.ReplaceAll(strings.TrimSpace(nodeResource), "\n", "\n   | "))
	if err := d.control.Apply(ctx, []byte(nodeResource)); err != nil {
		return err
	}
	d.note("The same Pod in both namespaces. It names no Secret, and neither does its ServiceAccount:")
	for _, namespace := range []string{insider, stranger} {
		if err := d.newNamespace(ctx, namespace); err != nil {
			return err
		}
		if err := eventually(ctx, "namespace "+namespace+" has a ServiceAccount", func(ctx context.Context) error {
			_, err := d.client.CoreV1().ServiceAccounts(namespace).Get(ctx, "default", metav1.GetOptions{})
			return err
		}); err != nil {
			return err
		}
	}
	states := map[string]string{}
	for _, namespace := range []string{insider, stranger} {
		took, state, err := d.runPod(ctx, namespace)
		if err != nil {
			return err
		}
		d.say("   %-9s after %4.1f s: %s", namespace, took.Seconds(), state)
		states[namespace] = state
	}
	d.check("the Pod of "+insider+", which the resource selects, pulls", "Running", states[insider])
	d.check("the Pod of "+stranger+", which it does not select, is refused", "ErrImagePull: no basic auth credentials", states[stranger])
	counts := private.Counts()
	d.check("the registry has let one pull in, with credentials", 1, counts.Pulled)
	d.check("it has seen no credentials from the other", 0, counts.Refused)
	return nil
}

// runPod makes a Pod, and waits until it runs or its registry refuses it.
func (d *demo) runPod(ctx context.Context, namespace string) (took time.Duration, state string, err error) {
	begin := time.Now()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "app"},
		Spec:       corev1.PodSpec{NodeName: realNode, Containers: []corev1.Container{{Name: "app", Image: nodeHost + "/" + namespace + "/app:v1"}}},
	}
	pods := d.client.CoreV1().Pods(namespace)
	if _, err := pods.Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		return 0, "", fmt.Errorf("create a Pod in %s: %w", namespace, err)
	}
	err = eventuallyWithin(ctx, podWithin, "the Pod of "+namespace+" has come to something", func(ctx context.Context) error {
		p, err := pods.Get(ctx, pod.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, s := range p.Status.ContainerStatuses {
			switch {
			case s.State.Running != nil:
				state = "Running"
				return nil
			case s.State.Waiting != nil && s.State.Waiting.Reason == "ErrImagePull":
				text := s.State.Waiting.Message
				state = "ErrImagePull: " + text[strings.LastIndex(text, ": ")+2:]
				return nil
			}
		}
		return errors.New(string(p.Status.Phase))
	})
	return time.Since(begin), state, err
}
