package node

import (
	"errors"
	"net/url"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
	"github.com/imps-node/imps/test/registry"
)

// The chart's own Pod on a node: root without capabilities, a root file system that cannot be written to, and the folder as a
// hostPath, which its kubelet and its runtime make. Where that is removed on the node, the container ends and gets a new one.
func TestTheChartsAgent(t *testing.T) {
	s := newSystem(t)
	require.NoError(t, s.agent.Terminate())
	require.NoError(t, os.RemoveAll(s.cache))
	t.Setenv("CGO_ENABLED", "0") // there is nothing else in the image
	path, err := imps.Build(t.Context(), root, t.TempDir())
	require.NoError(t, err)
	program, err := os.ReadFile(path)
	require.NoError(t, err)
	image, err := cluster.ProgramImage("imps-node", program)
	require.NoError(t, err)
	own, err := registry.StartHostsOf(t.Context(), control, distribution, t.TempDir(), image)
	require.NoError(t, err)
	t.Cleanup(own.Stop)
	own.Host("imps.test").Open()
	require.NoError(t, s.node.SetRegistry("imps.test", own.Host("imps.test").Address))

	daemonSet, err := s.core.AppsV1().DaemonSets(imps.SystemNamespace).Get(t.Context(), imps.AgentAccount, metav1.GetOptions{})
	require.NoError(t, err)
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: s.prefix + "-agent"}, Spec: daemonSet.Spec.Template.Spec}
	pod.Spec.NodeName = s.node.Name() // there is no scheduler
	// Pods of such a node have no network, and there is no address of the API server's Service.
	server, err := url.Parse(control.Admin().Host)
	require.NoError(t, err)
	pod.Spec.HostNetwork = true
	c := &pod.Spec.Containers[0]
	c.Image = "imps.test/imps-node:v1"
	c.Env = append(c.Env, corev1.EnvVar{Name: "KUBERNETES_SERVICE_HOST", Value: server.Hostname()}, corev1.EnvVar{Name: "KUBERNETES_SERVICE_PORT", Value: server.Port()})
	c.Args = append(c.Args, "--health-addr=127.0.0.1:0", "--metrics-addr=127.0.0.1:0")
	c.Ports, c.LivenessProbe, c.ReadinessProbe = nil, nil, nil
	for i := range pod.Spec.Volumes {
		if v := &pod.Spec.Volumes[i]; v.HostPath != nil {
			require.Equal(t, "/run/imps", v.HostPath.Path)
			v.HostPath.Path = s.cache
		}
	}
	_, err = s.core.CoreV1().Pods(imps.SystemNamespace).Create(t.Context(), pod, metav1.CreateOptions{})
	require.NoError(t, err)

	s.registry("registry.test").Allow("imps", canary)
	s.source("hub", canary, "registry.test")
	s.resource("node", "{secret: {name: "+imps.SecretName+"}, kubelet: {scope: Node}}", secretOf("hub"))
	s.has("registry.test/app", "")
	namespace := s.namespace()
	s.runs(namespace, "first", "registry.test/first:v1")

	require.NoError(t, os.RemoveAll(s.cache))
	s.eventually(func() error {
		p, err := s.core.CoreV1().Pods(imps.SystemNamespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
		if err == nil && (len(p.Status.ContainerStatuses) == 0 || p.Status.ContainerStatuses[0].RestartCount == 0) {
			err = errors.New("it has not started again")
		}
		return err
	}, "the agent does not start again")
	s.has("registry.test/app", "")
	require.NoError(t, s.node.RestartKubelet(t.Context())) // which would have kept the answer
	s.runs(namespace, "second", "registry.test/second:v1")
}
