package cluster

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// nodeClaim is where the API server puts the node of a bound token.
const nodeClaim = "authentication.kubernetes.io/node-name"

func TestTheClusterServes(t *testing.T) {
	t.Run("the pinned version of Kubernetes", func(t *testing.T) {
		version, err := shared.Client().Discovery().ServerVersion()
		require.NoError(t, err)
		pinned, err := pinnedVersion(filepath.Join("..", "modules", "kubernetes", "go.mod"), "k8s.io/kubernetes")
		require.NoError(t, err)
		require.Equal(t, pinned, version.GitVersion)
		require.Equal(t, "1.36", version.Major+"."+version.Minor)
	})

	t.Run("the kubeconfig file's user, who may do everything", func(t *testing.T) {
		cfg, err := clientcmd.BuildConfigFromFlags("", shared.Kubeconfig())
		require.NoError(t, err)
		user := whoami(t, cfg)
		require.Equal(t, "admin", user.Username)
		require.Contains(t, user.Groups, "system:masters")
	})

	t.Run("nobody who does not know its certificate authority", func(t *testing.T) {
		cfg := shared.Admin()
		cfg.CAData = nil
		_, err := clientFor(t, cfg).CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{})
		require.ErrorContains(t, err, "certificate")
	})

	t.Run("garbage collection", requireGarbageCollection)

	t.Run("the root certificate in every namespace", func(t *testing.T) {
		maps := shared.Client().CoreV1().ConfigMaps(shared.Namespace(t, nil))
		poll(t, func(ctx context.Context) bool {
			root, err := maps.Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
			return err == nil && root.Data["ca.crt"] == string(shared.Admin().CAData)
		})
	})

	t.Run("streaming lists", func(t *testing.T) {
		namespace := shared.Namespace(t, nil)
		client := shared.Client()
		_, err := client.CoreV1().ConfigMaps(namespace).Create(t.Context(), configMap("one"), metav1.CreateOptions{})
		require.NoError(t, err)
		names, err := streamList(t, client, namespace)
		require.NoError(t, err)
		require.Contains(t, names, "one")
	})
}

func TestIdentities(t *testing.T) {
	t.Run("a token of a node's pod carries the node", func(t *testing.T) {
		namespace, node := shared.Namespace(t, nil), Prefix(t)
		require.NoError(t, shared.Node(t.Context(), node))
		token, err := shared.NodeToken(t.Context(), namespace, "default", node)
		require.NoError(t, err)
		user := whoami(t, shared.ConfigForToken(token))
		require.Equal(t, "system:serviceaccount:"+namespace+":default", user.Username)
		require.Equal(t, authenticationv1.ExtraValue{node}, user.Extra[nodeClaim])
	})

	t.Run("an unbound token carries no node", func(t *testing.T) {
		namespace := shared.Namespace(t, nil)
		token, err := shared.Token(t.Context(), namespace, "default")
		require.NoError(t, err)
		user := whoami(t, shared.ConfigForToken(token))
		require.Equal(t, "system:serviceaccount:"+namespace+":default", user.Username)
		require.NotContains(t, user.Extra, nodeClaim)
	})

	t.Run("a token of no ServiceAccount is refused", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		_, err := shared.Token(ctx, shared.Namespace(t, nil), "nobody")
		require.ErrorContains(t, err, "nobody")
	})

	t.Run("a node can be created twice", func(t *testing.T) {
		node := Prefix(t)
		require.NoError(t, shared.Node(t.Context(), node))
		require.NoError(t, shared.Node(t.Context(), node))
	})

	t.Run("a kubelet has a kubelet's rights", func(t *testing.T) {
		node := Prefix(t)
		require.NoError(t, shared.Node(t.Context(), node))
		cfg, err := shared.ConfigForUser("system:node:"+node, "system:nodes")
		require.NoError(t, err)
		path := filepath.Join(t.TempDir(), "kubeconfig")
		require.NoError(t, shared.WriteKubeconfig(path, cfg))
		cfg, err = clientcmd.BuildConfigFromFlags("", path)
		require.NoError(t, err)
		require.Equal(t, "system:node:"+node, whoami(t, cfg).Username)

		client := clientFor(t, cfg)
		_, err = client.CoreV1().Nodes().Get(t.Context(), node, metav1.GetOptions{})
		require.NoError(t, err)
		_, err = client.CoreV1().Secrets("").List(t.Context(), metav1.ListOptions{})
		require.True(t, apierrors.IsForbidden(err), "%v", err)
	})

	t.Run("a namespace with a token's pod can be deleted", func(t *testing.T) {
		namespace, node := shared.Namespace(t, nil), Prefix(t)
		require.NoError(t, shared.Node(t.Context(), node))
		_, err := shared.NodeToken(t.Context(), namespace, "default", node)
		require.NoError(t, err)
		namespaces := shared.Client().CoreV1().Namespaces()
		require.NoError(t, namespaces.Delete(t.Context(), namespace, metav1.DeleteOptions{}))
		poll(t, func(ctx context.Context) bool {
			_, err := namespaces.Get(ctx, namespace, metav1.GetOptions{})
			return apierrors.IsNotFound(err)
		})
	})
}

func TestFaults(t *testing.T) {
	client := shared.Client()

	t.Run("data outlives the API server", func(t *testing.T) {
		maps := client.CoreV1().ConfigMaps(shared.Namespace(t, nil))
		_, err := maps.Create(t.Context(), configMap("kept"), metav1.CreateOptions{})
		require.NoError(t, err)
		mark := shared.Audit().Mark()

		require.NoError(t, shared.StopAPIServer())
		_, err = maps.Get(t.Context(), "kept", metav1.GetOptions{})
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		require.ErrorIs(t, shared.StopAPIServer(), ErrNotRunning)

		require.NoError(t, shared.StartAPIServer(t.Context()))
		_, err = maps.Get(t.Context(), "kept", metav1.GetOptions{})
		require.NoError(t, err)
		require.ErrorContains(t, shared.StartAPIServer(t.Context()), "running already")
		require.Len(t, eventsOf(t, mark, func(e Event) bool { return e.Name == "kept" }), 1)
	})

	t.Run("data outlives etcd", func(t *testing.T) {
		maps := client.CoreV1().ConfigMaps(shared.Namespace(t, nil))
		_, err := maps.Create(t.Context(), configMap("kept"), metav1.CreateOptions{})
		require.NoError(t, err)

		require.NoError(t, shared.StopEtcd())
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = maps.Create(ctx, configMap("refused"), metav1.CreateOptions{})
		require.Error(t, err)

		require.NoError(t, shared.StartEtcd(t.Context()))
		_, err = maps.Get(t.Context(), "kept", metav1.GetOptions{})
		require.NoError(t, err)
	})

	t.Run("a stopped API server hangs and goes on", func(t *testing.T) {
		require.NoError(t, shared.Signal(APIServer, syscall.SIGSTOP))
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		_, err := client.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NoError(t, shared.Signal(APIServer, syscall.SIGCONT))
		_, err = client.CoreV1().Namespaces().Get(t.Context(), "default", metav1.GetOptions{})
		require.NoError(t, err)
	})

	t.Run("garbage collection goes on after all that", requireGarbageCollection)

	t.Run("a controller manager with other flags collects garbage as well", func(t *testing.T) {
		require.NoError(t, shared.RestartControllerManager(t.Context(), "--kube-api-qps=20", "--kube-api-burst=30"))
		requireGarbageCollection(t)
		require.NoError(t, shared.RestartControllerManager(t.Context()))
		requireGarbageCollection(t)
	})

	t.Run("an unknown component cannot be signalled", func(t *testing.T) {
		require.ErrorIs(t, shared.Signal("kubelet", syscall.SIGTERM), ErrNotRunning)
	})
}

func TestAClusterOfItsOwn(t *testing.T) {
	t.Run("without watch list it refuses streaming lists, and Stop leaves nothing", func(t *testing.T) {
		c := Start(t, WithoutWatchList())
		_, err := streamList(t, c.Client(), "default")
		require.True(t, apierrors.IsInvalid(err), "%v", err)

		pids := []int{pid(c.processes[Etcd]), pid(c.processes[APIServer]), pid(c.processes[ControllerManager])}
		require.NoError(t, c.Stop())
		for _, pid := range pids {
			require.True(t, gone(pid), "process %d", pid)
		}
		require.NoDirExists(t, c.Dir())
		require.NoError(t, c.Stop(), "a second time")
		require.Error(t, c.StartEtcd(t.Context()))
	})

	t.Run("with an old etcd it breaks off streaming lists", func(t *testing.T) {
		const variable = "CLUSTER_TEST_OLD_ETCD"
		etcd := os.Getenv(variable)
		if etcd == "" {
			t.Skip(variable + " does not name an etcd 3.4, such as Debian's etcd-server")
		}
		c := Start(t, WithEtcd(etcd))
		_, err := streamList(t, c.Client(), "default")
		require.ErrorContains(t, err, "RequestWatchProgress is disabled")
		require.NoError(t, c.StopEtcd())
		require.NoError(t, c.StartEtcd(t.Context()))
	})

	t.Run("one that fails to start says why and leaves nothing", func(t *testing.T) {
		temp := t.TempDir()
		t.Setenv("TMPDIR", temp)
		_, err := Run(t.Context(), WithAPIServerFlags("--no-such-flag"))
		require.ErrorContains(t, err, "kube-apiserver exited")
		require.ErrorContains(t, err, "unknown flag: --no-such-flag")
		left, err := os.ReadDir(temp)
		require.NoError(t, err)
		require.Empty(t, left)
	})

	t.Run("a start can be cancelled", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := Run(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})

	t.Run("logs are kept on request", func(t *testing.T) {
		temp := t.TempDir()
		t.Setenv("TMPDIR", temp)
		var progress bytes.Buffer
		c := Start(t, WithKeep(), WithProgress(&progress))
		require.NoError(t, c.Stop())
		require.FileExists(t, filepath.Join(c.Dir(), "kube-apiserver.log"))
		require.Contains(t, progress.String(), c.Dir())
		sweep(temp)
		require.DirExists(t, c.Dir())
	})

	t.Run("its processes die with a killed parent, and the next start sweeps its folder", func(t *testing.T) {
		if runtime.GOOS != "linux" {
			t.Skip("only Linux ends the children of a killed parent")
		}
		temp := t.TempDir()
		kill, dir, child := startChild(t, temp, "cluster")
		pids := descendants(t, child)
		require.Len(t, pids, 3)
		sweep(temp)
		require.DirExists(t, dir, "its owner lives")

		kill()
		for _, pid := range pids {
			poll(t, func(context.Context) bool { return gone(pid) })
		}
		require.DirExists(t, dir)
		sweep(temp)
		require.NoDirExists(t, dir)
	})
}

// startChild runs the test binary as a parent of a cluster, with a temporary
// folder of its own, and returns what kills it, the cluster's folder and its own
// process.
func startChild(t *testing.T, temp, kind string) (kill func(), dir string, pid int) {
	t.Helper()
	executable, err := os.Executable()
	require.NoError(t, err)
	child := exec.CommandContext(t.Context(), executable)
	child.Env = append(os.Environ(), childEnv+"="+kind, "TMPDIR="+temp)
	child.Stderr = os.Stderr
	stdin, err := child.StdinPipe()
	require.NoError(t, err)
	stdout, err := child.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, child.Start())
	t.Cleanup(func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	})
	_, err = fmt.Fscan(stdout, &dir)
	require.NoError(t, err)
	return func() {
		require.NoError(t, child.Process.Kill())
		_, _ = io.Copy(io.Discard, stdout)
		require.Error(t, child.Wait())
		_ = stdin.Close()
	}, dir, child.Process.Pid
}

// descendants returns the processes that a process has started, and those that
// they have.
func descendants(t *testing.T, ancestor int) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	require.NoError(t, err)
	children := map[int][]int{}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) // it may be gone
		_, rest, _ := strings.Cut(string(stat), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 {
			parent, err := strconv.Atoi(fields[1])
			require.NoError(t, err)
			children[parent] = append(children[parent], pid)
		}
	}
	found := children[ancestor]
	for i := 0; i < len(found); i++ {
		found = append(found, children[found[i]]...)
	}
	return found
}

// requireGarbageCollection needs the controller manager to work.
func requireGarbageCollection(t *testing.T) {
	t.Helper()
	maps := shared.Client().CoreV1().ConfigMaps(shared.Namespace(t, nil))
	owner, err := maps.Create(t.Context(), configMap("owner"), metav1.CreateOptions{})
	require.NoError(t, err)
	dependent := configMap("dependent")
	dependent.OwnerReferences = []metav1.OwnerReference{
		{APIVersion: "v1", Kind: "ConfigMap", Name: owner.Name, UID: owner.UID},
	}
	_, err = maps.Create(t.Context(), dependent, metav1.CreateOptions{})
	require.NoError(t, err)
	require.NoError(t, maps.Delete(t.Context(), owner.Name, metav1.DeleteOptions{}))
	poll(t, func(ctx context.Context) bool {
		_, err := maps.Get(ctx, dependent.Name, metav1.GetOptions{})
		return apierrors.IsNotFound(err)
	})
}

// gone says whether a process has ended; one that has, but whose parent has not
// noticed yet, counts as ended.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, state, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(state, "Z") || strings.HasPrefix(state, "X")
}

// streamList lists the ConfigMaps of a namespace through a watch that begins
// with what is there.
func streamList(t *testing.T, client kubernetes.Interface, namespace string) ([]string, error) {
	t.Helper()
	initial := true
	watcher, err := client.CoreV1().ConfigMaps(namespace).Watch(t.Context(), metav1.ListOptions{
		SendInitialEvents:    &initial,
		ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan,
		AllowWatchBookmarks:  true,
	})
	if err != nil {
		return nil, err
	}
	defer watcher.Stop()
	var names []string
	for event := range watcher.ResultChan() {
		if event.Type == watch.Error {
			return nil, apierrors.FromObject(event.Object)
		}
		object, ok := event.Object.(*corev1.ConfigMap)
		require.True(t, ok, "%v", event)
		if object.Annotations[metav1.InitialEventsAnnotationKey] == "true" {
			return names, nil
		}
		names = append(names, object.Name)
	}
	require.Fail(t, "the watch ended before its initial events did")
	return nil, nil
}

func clientFor(t *testing.T, cfg *rest.Config) *kubernetes.Clientset {
	t.Helper()
	client, err := kubernetes.NewForConfig(cfg)
	require.NoError(t, err)
	return client
}

func whoami(t *testing.T, cfg *rest.Config) authenticationv1.UserInfo {
	t.Helper()
	review, err := clientFor(t, cfg).AuthenticationV1().SelfSubjectReviews().
		Create(t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	require.NoError(t, err)
	return review.Status.UserInfo
}

// pollLimit bounds the wait for something that takes moments.
const pollLimit = time.Minute

func configMap(name string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

func poll(t *testing.T, check func(context.Context) bool) {
	t.Helper()
	err := wait.PollUntilContextTimeout(t.Context(), pollInterval, pollLimit, true,
		func(ctx context.Context) (bool, error) { return check(ctx), nil })
	require.NoError(t, err)
}
