package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/metadata"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

const (
	registry   = "registry.test"
	sourceName = "source"
)

// The labels of what is selected.
var (
	namespaceLabels = map[string]string{"pull": "private"}
	podLabels       = map[string]string{"image": "private"}
)

// resource is an ImagePullSecret; name and name of the Secret are to be filled in.
const resource = `apiVersion: images.banzaicloud.io/v1alpha1
kind: ImagePullSecret
metadata: {name: %s}
spec:
  registry:
    credentials: [{name: ` + sourceName + `, namespace: ` + imps.SourceNamespace + `}]
  target:
    secret: {name: %s}
    namespaces: {labels: [{matchLabels: {pull: private}}]}
    namespacesWithPods: {labels: [{matchLabels: {image: private}}]}
`

// setUp makes the cluster and everything in it but imps's processes.
func (s *simulation) setUp(ctx context.Context) error {
	s.say("starting a control plane")
	var err error
	if s.control, err = cluster.Run(ctx, cluster.WithProgress(s.progress)); err != nil {
		return err
	}
	s.core = s.control.Client()
	if s.dynamic, err = dynamic.NewForConfig(s.control.Admin()); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	if s.metadata, err = metadata.NewForConfig(s.control.Admin()); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	version, err := s.core.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("ask for the version: %w", err)
	}
	s.result.Kubernetes = version.GitVersion
	if s.apiServer, err = findProcess(s.control.Dir(), string(cluster.APIServer)); err != nil {
		return err
	}
	// In the cluster's own folder, which goes with it.
	if s.dir, err = os.MkdirTemp(s.control.Dir(), "scale-"); err != nil {
		return fmt.Errorf("create a folder: %w", err)
	}

	s.say("building imps-node and installing the chart")
	if _, err := imps.Build(ctx, s.root, s.dir, "-trimpath", "-ldflags=-s -w"); err != nil {
		return err
	}
	names := make([]string, s.Resources)
	for i := range names {
		names[i] = secretName(i)
	}
	if err := imps.Install(ctx, s.root, s.control, "targetSecretNames={"+strings.Join(names, ",")+"}"); err != nil {
		return err
	}
	if s.watcher, err = newWatcher(ctx, s.metadata); err != nil {
		return err
	}
	if err := s.populate(ctx); err != nil {
		return err
	}
	if s.coordinator.spec, err = imps.Coordinator(ctx, s.control); err != nil {
		return err
	}
	if err := s.writeSource(ctx); err != nil {
		return err
	}
	for i, name := range names {
		if err := s.control.Apply(ctx, fmt.Appendf(nil, resource, fmt.Sprintf("resource-%d", i), name)); err != nil {
			return err
		}
	}
	return s.report(ctx)
}

// report makes further nodes and their reports, of the same Pods as if they had an agent.
func (s *simulation) report(ctx context.Context) error {
	resources, err := s.metadata.Resource(v1alpha1.Resource).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list the ImagePullSecrets: %w", err)
	}
	var uids []types.UID
	for i := range resources.Items {
		uids = append(uids, resources.Items[i].UID)
	}
	s.say("creating %d further nodes, with a report and nothing else", s.Reports)
	return parallel(ctx, s.Reports, func(ctx context.Context, i int) error {
		node := nodeName(s.Agents + i)
		if err := s.control.Node(ctx, node); err != nil {
			return err
		}
		report := impsync.Report{Node: node, FormatVersions: impsync.FormatVersions(), Demand: map[string][]types.UID{}}
		for j := range s.Pods {
			if namespace := s.namespaceOf(s.Agents+i, j); !s.selectedByLabel(namespace) {
				report.Demand[namespaceName(namespace)] = slices.Clone(uids)
			}
		}
		data, err := report.Encode()
		if err != nil {
			return err
		}
		_, err = s.core.CoreV1().ConfigMaps(imps.SystemNamespace).Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: impsync.ReportName(node), Labels: map[string]string{impsync.LabelComponent: impsync.ComponentReport}},
			Data:       data,
		}, metav1.CreateOptions{FieldManager: impsync.FieldManager})
		if err != nil {
			return fmt.Errorf("create the report of %s: %w", node, err)
		}
		return nil
	})
}

// populate makes namespaces, nodes and their Pods, and a token for each agent.
func (s *simulation) populate(ctx context.Context) error {
	s.say("creating %d namespaces", s.Namespaces+s.NewPods)
	err := parallel(ctx, s.Namespaces+s.NewPods, func(ctx context.Context, i int) error {
		namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespaceName(i)}}
		if s.selectedByLabel(i) {
			namespace.Labels = namespaceLabels
		}
		if _, err := s.core.CoreV1().Namespaces().Create(ctx, namespace, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create namespace %s: %w", namespace.Name, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.say("creating %d nodes, each with an agent's token and %d Pods", s.Agents, s.Pods)
	for i := range s.Agents {
		name := nodeName(i)
		s.agents = append(s.agents, &agent{node: name, line: line{total: &s.traffic}, log: s.warnings.logger().With("node", name)})
	}
	return parallel(ctx, s.Agents, func(ctx context.Context, i int) error {
		name := s.agents[i].node
		if err := s.control.Node(ctx, name); err != nil {
			return err
		}
		// The DaemonSet's Pod of the node is made with the token.
		token, err := s.control.NodeToken(ctx, imps.SystemNamespace, "imps-node", name)
		if err != nil {
			return err
		}
		s.agents[i].config = s.control.ConfigForToken(token)
		for j := range s.Pods {
			namespace := s.namespaceOf(i, j)
			pod, err := s.createPod(ctx, name, namespace, !s.selectedByLabel(namespace))
			if err != nil {
				return err
			}
			if j >= s.Pods-s.Waiting {
				continue
			}
			pod.Status.Phase = corev1.PodRunning
			pod.Status.ContainerStatuses = []corev1.ContainerStatus{{
				Name: pod.Spec.Containers[0].Name, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}},
			}}
			if _, err := s.core.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
				return fmt.Errorf("start Pod %s/%s: %w", pod.Namespace, pod.Name, err)
			}
		}
		return nil
	})
}

// createPod creates a Pod as the scheduler leaves it: bound to its node, nothing started.
func (s *simulation) createPod(ctx context.Context, node string, namespace int, selecting bool) (*corev1.Pod, error) {
	automount := false
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "app-" + node, Namespace: namespaceName(namespace)},
		Spec: corev1.PodSpec{
			NodeName: node, AutomountServiceAccountToken: &automount,
			Containers:       []corev1.Container{{Name: "app", Image: registry + "/app"}},
			ImagePullSecrets: []corev1.LocalObjectReference{{Name: secretName(0)}},
		},
	}
	if selecting {
		pod.Labels = podLabels
	}
	var created *corev1.Pod
	// Until the namespace has its ServiceAccount, the Pod is forbidden.
	err := s.await(ctx, "Pods can be created in "+pod.Namespace, 100*time.Millisecond, func() (_ bool, err error) {
		created, err = s.core.CoreV1().Pods(pod.Namespace).Create(ctx, pod, metav1.CreateOptions{})
		if apierrors.IsForbidden(err) {
			return false, nil
		}
		return true, err
	})
	if err != nil {
		return nil, fmt.Errorf("create Pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return created, nil
}

// writeSource puts a new password into the source.
func (s *simulation) writeSource(ctx context.Context) error {
	config := fmt.Sprintf(`{"auths": {%q: {"username": "robot", "password": %q}}}`, registry, rand.Text())
	source := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: sourceName},
		Type:       corev1.SecretTypeDockerConfigJson,
		Data:       map[string][]byte{corev1.DockerConfigJsonKey: []byte(config)},
	}
	secrets := s.core.CoreV1().Secrets(imps.SourceNamespace)
	_, err := secrets.Create(ctx, source, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = secrets.Update(ctx, source, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("write the source: %w", err)
	}
	return nil
}

// namespaceOf is the namespace of a Pod of a node: the nodes' Pods go round.
func (c config) namespaceOf(node, pod int) int { return (node*c.Pods + pod) % c.Namespaces }

// selectedByLabel: every other namespace is; those that come after the first ones are not,
// they are there for new Pods.
func (c config) selectedByLabel(namespace int) bool {
	return namespace < c.Namespaces && namespace%2 == 0
}

// selectedAtFirst and selected are the numbers of Secrets without and with the agents' demand.
func (c config) selectedAtFirst() int { return c.selectedBy(c.Agents, c.Agents+c.Reports) }

func (c config) selected() int { return c.selectedBy(0, c.Agents+c.Reports) }

// selectedBy counts the Secrets that labels select, or Pods of the nodes in a range.
func (c config) selectedBy(first, end int) int {
	selected := map[int]bool{}
	for i := range c.Namespaces {
		selected[i] = c.selectedByLabel(i)
	}
	for node := first; node < end; node++ {
		for pod := range c.Pods {
			selected[c.namespaceOf(node, pod)] = true
		}
	}
	maps.DeleteFunc(selected, func(_ int, is bool) bool { return !is })
	return len(selected) * c.Resources
}

func nodeName(i int) string { return fmt.Sprintf("node-%05d", i) }

func namespaceName(i int) string { return fmt.Sprintf("scale-%05d", i) }

func secretName(resource int) string {
	if resource == 0 {
		return imps.SecretName
	}
	return fmt.Sprintf("%s-%d", imps.SecretName, resource)
}

// parallel does something n times, some of them at once.
func parallel(ctx context.Context, n int, do func(context.Context, int) error) error {
	group, work := errgroup.WithContext(ctx)
	group.SetLimit(clients)
	for i := range n {
		if work.Err() != nil {
			break // the group tells why
		}
		group.Go(func() error { return do(work, i) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}
