package cluster_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/fakeaws"
	"github.com/imps-node/imps/test/registry"
)

func TestNode(t *testing.T) {
	cluster.NeedNode(t)
	shared := cluster.Shared()
	binary, err := registry.Build(t.Context(), filepath.Join("..", "..", ".."), t.TempDir())
	require.NoError(t, err)
	hosts, err := registry.StartHosts(t.Context(), shared, binary, t.TempDir())
	require.NoError(t, err)
	t.Cleanup(hosts.Stop)
	hosts.Host("public.test").Open()
	const (
		anonymous    = "authorization failed: no basic auth credentials"
		unauthorized = "401 Unauthorized"
	)
	private := hosts.Host("private.test:5000")
	private.Allow("user", "good")

	provider := newProvider(t, "private.test:5000")
	n := shared.NodeFor(t, cluster.NodeConfig{
		Name:                     cluster.Prefix(t),
		CredentialProviderConfig: provider.config,
		CredentialProviderBinDir: provider.dir,
		Registries:               hosts.Addresses(),
	})
	pods := podsOf{namespace: shared.Namespace(t, nil), node: n.Name()}

	t.Run("it tells its metrics", func(t *testing.T) {
		metrics, err := n.Metrics(t.Context())
		require.NoError(t, err)
		require.Contains(t, metrics, "kubelet_credential_provider_config_info")
	})

	t.Run("a public image runs", func(t *testing.T) {
		pod := pods.running(t, pods.create(t, "public.test/app:v1"))
		require.NotEmpty(t, pod.Status.PodIP)
	})

	t.Run("a private image is refused without credentials", func(t *testing.T) {
		provider.answer(t, "", "")
		before := private.Counts()
		pods.waiting(t, pods.create(t, "private.test:5000/without:v1"), anonymous)
		after := private.Counts()
		require.Equal(t, before.Pulled, after.Pulled)
		require.Equal(t, before.Refused, after.Refused)
		require.Greater(t, after.Anonymous, before.Anonymous)
	})

	t.Run("a private image is refused with a wrong password", func(t *testing.T) {
		provider.answer(t, "user", "bad")
		before := private.Counts()
		pods.waiting(t, pods.create(t, "private.test:5000/wrong:v1"), unauthorized)
		after := private.Counts()
		require.Equal(t, before.Pulled, after.Pulled)
		require.Greater(t, after.Refused, before.Refused)
	})

	t.Run("a private image runs with what the credential provider says", func(t *testing.T) {
		provider.answer(t, "user", "good")
		before := private.Counts()
		pods.running(t, pods.create(t, "private.test:5000/with/some/path:v1"))
		after := private.Counts()
		require.Equal(t, before.Pulled+1, after.Pulled)
		require.Equal(t, before.Refused, after.Refused)
	})

	t.Run("a password can be changed", func(t *testing.T) {
		private.Allow("user", "next")
		pods.waiting(t, pods.create(t, "private.test:5000/before-the-change:v1"), unauthorized)
		provider.answer(t, "user", "next")
		pods.running(t, pods.create(t, "private.test:5000/after-the-change:v1"))
		private.Revoke("user")
		pods.waiting(t, pods.create(t, "private.test:5000/after-the-end:v1"), unauthorized)
	})

	t.Run("a guard of another kind decides, too", func(t *testing.T) {
		const host = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"
		ecr := hosts.Host(host)
		ecr.Guard(func(next http.Handler) http.Handler { return fakeaws.New().Guard("eu-central-1", next) })
		require.NoError(t, n.SetRegistry(host, ecr.Address))
		pods.waiting(t, pods.create(t, host+"/app:v1"), anonymous)
	})

	t.Run("a host that was not set is not looked for", func(t *testing.T) {
		pods.waiting(t, pods.create(t, "elsewhere.test/app:v1"), "connection refused")
	})

	t.Run("a host can be set later", func(t *testing.T) {
		later := hosts.Host("later.test")
		later.Open()
		require.NoError(t, n.SetRegistry("later.test", later.Address))
		pods.running(t, pods.create(t, "later.test/app:v1"))
		require.Equal(t, 1, later.Counts().Pulled)
	})

	t.Run("a Pod that is deleted ends", func(t *testing.T) {
		name := pods.create(t, "public.test/app:v1")
		pods.running(t, name)
		pods.delete(t, name)
	})

	t.Run("Pods outlive the kubelet", func(t *testing.T) {
		name := pods.create(t, "public.test/app:v1")
		before := pods.running(t, name).Status.ContainerStatuses[0]
		require.NoError(t, n.KillKubelet())
		require.ErrorIs(t, n.KillKubelet(), cluster.ErrNotRunning)
		_, err := n.Metrics(t.Context())
		require.Error(t, err)
		require.NoError(t, n.StartKubelet(t.Context()))
		require.NoError(t, n.RestartKubelet(t.Context()))
		// What it says after the new one has run another Pod is its own view.
		pods.running(t, pods.create(t, "public.test/app:v1"))
		after := pods.running(t, name).Status.ContainerStatuses[0]
		require.Equal(t, before.ContainerID, after.ContainerID)
		require.Zero(t, after.RestartCount)
		pods.delete(t, name)
	})

	t.Run("a second node runs beside it", func(t *testing.T) {
		second := shared.NodeFor(t, cluster.NodeConfig{Name: cluster.Prefix(t), Registries: hosts.Addresses()})
		on := podsOf{namespace: pods.namespace, node: second.Name()}
		on.running(t, on.create(t, "public.test/app:v1"))
		pods.running(t, pods.create(t, "public.test/app:v1"))
	})

	t.Run("a name is given to one node only", func(t *testing.T) {
		_, err := shared.StartNode(t.Context(), cluster.NodeConfig{Name: n.Name()})
		require.ErrorContains(t, err, "exists")
	})
}

// podsOf makes Pods on a node.
type podsOf struct{ namespace, node string }

func (p podsOf) create(t *testing.T, image string) string {
	t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: cluster.Prefix(t)},
		Spec: corev1.PodSpec{
			NodeName:   p.node,
			Containers: []corev1.Container{{Name: "main", Image: image}},
		},
	}
	poll(t, func(ctx context.Context) error {
		// Until the namespace has its ServiceAccount.
		_, err := cluster.Shared().Client().CoreV1().Pods(p.namespace).Create(ctx, pod, metav1.CreateOptions{})
		return err
	})
	return pod.Name
}

// await waits until a check of a Pod returns nil.
func (p podsOf) await(t *testing.T, name string, check func(*corev1.Pod) error) (pod *corev1.Pod) {
	t.Helper()
	poll(t, func(ctx context.Context) (err error) {
		if pod, err = cluster.Shared().Client().CoreV1().Pods(p.namespace).Get(ctx, name, metav1.GetOptions{}); err != nil {
			return err
		}
		return check(pod)
	})
	return pod
}

func (p podsOf) running(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	return p.await(t, name, func(pod *corev1.Pod) error {
		if s := pod.Status.ContainerStatuses; len(s) != 1 || s[0].State.Running == nil {
			return fmt.Errorf("not running: %v", s)
		}
		return nil
	})
}

// waiting waits until the Pod's image cannot be pulled for a reason.
func (p podsOf) waiting(t *testing.T, name, reason string) {
	t.Helper()
	p.await(t, name, func(pod *corev1.Pod) error {
		for _, s := range pod.Status.ContainerStatuses {
			if w := s.State.Waiting; w != nil && (w.Reason == "ErrImagePull" || w.Reason == "ImagePullBackOff") &&
				strings.Contains(w.Message, reason) {
				return nil
			}
		}
		return fmt.Errorf("does not wait for %q: %v", reason, pod.Status.ContainerStatuses)
	})
}

func (p podsOf) delete(t *testing.T, name string) {
	t.Helper()
	pods := cluster.Shared().Client().CoreV1().Pods(p.namespace)
	require.NoError(t, pods.Delete(t.Context(), name, metav1.DeleteOptions{}))
	poll(t, func(ctx context.Context) error {
		_, err := pods.Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(errors.New("the Pod is still there"), err)
	})
}

// provider is a credential provider that says what a file says.
type provider struct{ dir, config, host string }

func newProvider(t *testing.T, host string) provider {
	t.Helper()
	p := provider{dir: t.TempDir(), host: host}
	p.config = filepath.Join(p.dir, "config.yaml")
	require.NoError(t, os.WriteFile(p.config, []byte(`
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: provider
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: ["`+host+`"]
  defaultCacheDuration: 0s
`), 0o600))
	script := "#!/bin/sh\ncat >/dev/null\ncat '" + filepath.Join(p.dir, "answer") + "'\n"
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "provider"), []byte(script), 0o700))
	return p
}

func (p provider) answer(t *testing.T, user, password string) {
	t.Helper()
	auth := map[string]any{}
	if user != "" {
		auth[p.host] = map[string]string{"username": user, "password": password}
	}
	answer, err := json.Marshal(map[string]any{
		"apiVersion": "credentialprovider.kubelet.k8s.io/v1", "kind": "CredentialProviderResponse",
		"cacheKeyType": "Image", "cacheDuration": "0s", "auth": auth,
	})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "answer"), answer, 0o600))
}

func poll(t *testing.T, check func(context.Context) error) {
	t.Helper()
	var last error
	err := wait.PollUntilContextTimeout(t.Context(), 50*time.Millisecond, 2*time.Minute, true, func(ctx context.Context) (bool, error) {
		last = check(ctx)
		return last == nil, nil
	})
	require.NoError(t, err, "%v", last)
}
