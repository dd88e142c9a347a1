package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

func TestTheEndOfANode(t *testing.T) {
	NeedNode(t)

	t.Run("Stop leaves nothing", func(t *testing.T) {
		before := machine(t)
		n, err := shared.StartNode(t.Context(), NodeConfig{Name: Prefix(t)})
		require.NoError(t, err)
		runPod(t, shared.Client(), n.Name())
		require.Equal(t, before, machine(t), "while it runs")
		require.NotEmpty(t, cgroupsOf(t, n.cgroup))
		pids := processesOf(t, n)

		require.NoError(t, n.Stop())
		for _, pid := range pids {
			require.True(t, gone(pid), "process %d", pid)
		}
		require.Empty(t, cgroupsOf(t, n.cgroup))
		require.NoDirExists(t, n.dir)
		require.Equal(t, before, machine(t))
		require.NoError(t, n.Stop(), "a second time")
		require.Error(t, n.StartKubelet(t.Context()))
	})

	t.Run("one that fails to start says why and leaves nothing", func(t *testing.T) {
		name := Prefix(t)
		_, err := shared.StartNode(t.Context(), NodeConfig{
			Name: name, CredentialProviderConfig: "/no/such/file", CredentialProviderBinDir: "/no/such/folder",
		})
		require.ErrorContains(t, err, "kubelet exited before it was ready")
		require.ErrorContains(t, err, "/no/such/folder")
		require.Empty(t, cgroupsOf(t, filepath.Base(shared.Dir())+"."+name))
		require.NoDirExists(t, shared.dir.path("node-"+name))
	})

	t.Run("it ends with its cluster", func(t *testing.T) {
		c := Start(t)
		n, err := c.StartNode(t.Context(), NodeConfig{Name: "node"})
		require.NoError(t, err)
		runPod(t, c.Client(), "node")
		pids := processesOf(t, n)
		require.NoError(t, c.Stop())
		for _, pid := range pids {
			require.True(t, gone(pid), "process %d", pid)
		}
		require.Empty(t, cgroupsOf(t, n.cgroup))
		require.NoDirExists(t, c.Dir())
	})

	t.Run("it dies with a killed parent, and the next start sweeps its cgroups", func(t *testing.T) {
		temp := t.TempDir()
		kill, dir, child := startChild(t, temp, "node")
		cgroup := filepath.Base(dir) + "." + childNode
		cfg, err := clientcmd.BuildConfigFromFlags("", filepath.Join(dir, adminKubeconfig))
		require.NoError(t, err)
		runPod(t, clientFor(t, cfg), childNode)
		pids := descendants(t, child)
		require.GreaterOrEqual(t, len(pids), 3+6)
		sweep(temp)
		require.NotEmpty(t, cgroupsOf(t, cgroup), "its owner lives")

		kill()
		for _, pid := range pids {
			poll(t, func(context.Context) bool { return gone(pid) })
		}
		poll(t, func(context.Context) bool {
			sweep(temp)
			return !exists(dir)
		})
		require.Empty(t, cgroupsOf(t, cgroup))
	})
}

func TestSkip(t *testing.T) {
	list := filepath.Join(t.TempDir(), "list")
	t.Setenv(skippedEnv, list)
	reason := errors.New("no root here")

	t.Run("a skipped test is listed", func(t *testing.T) {
		t.Setenv("CI", "")
		recorded := &recorder{TB: t}
		skip(recorded, reason)
		require.Equal(t, "skipped: no root here", recorded.outcome)
		text, err := os.ReadFile(list)
		require.NoError(t, err)
		require.Equal(t, t.Name()+"\n", string(text))
	})

	t.Run("CI skips nothing", func(t *testing.T) {
		t.Setenv("CI", "true")
		recorded := &recorder{TB: t}
		skip(recorded, reason)
		require.Equal(t, "failed: no root here", recorded.outcome)
	})
}

// recorder is a test that only says how it ended first.
type recorder struct {
	testing.TB
	outcome string
}

func (r *recorder) Skip(args ...any)  { r.end("skipped: ", args) }
func (r *recorder) Fatal(args ...any) { r.end("failed: ", args) }

func (r *recorder) end(outcome string, args []any) {
	if r.outcome == "" {
		r.outcome = outcome + fmt.Sprint(args...)
	}
}

// runPod runs a Pod that pulls nothing.
func runPod(t *testing.T, client kubernetes.Interface, node string) {
	t.Helper()
	pods := client.CoreV1().Pods(metav1.NamespaceDefault)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: Prefix(t)},
		Spec: corev1.PodSpec{
			NodeName:   node,
			Containers: []corev1.Container{{Name: "main", Image: PauseImageName}},
		},
	}
	_, err := pods.Create(t.Context(), pod, metav1.CreateOptions{})
	require.NoError(t, err)
	poll(t, func(ctx context.Context) bool {
		got, err := pods.Get(ctx, pod.Name, metav1.GetOptions{})
		return err == nil && len(got.Status.ContainerStatuses) == 1 && got.Status.ContainerStatuses[0].State.Running != nil
	})
}

// processesOf returns the processes of a node with a Pod: its own three, a shim,
// and the Pod's sandbox and container.
func processesOf(t *testing.T, n *Node) []int {
	t.Helper()
	pids := append(descendants(t, pid(n.init)), pid(n.init), pid(n.containerd), pid(n.kubelet))
	require.GreaterOrEqual(t, len(pids), 6)
	return pids
}

// cgroupsOf returns the folders of a cgroup, in all hierarchies.
func cgroupsOf(t *testing.T, name string) []string {
	t.Helper()
	one, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", name))
	require.NoError(t, err)
	many, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", "*", name))
	require.NoError(t, err)
	return append(one, many...)
}

// machine describes what a node could change on this machine: what a pod
// network leaves, mounts, and the kernel's parameters.
func machine(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, shared.Dir()) || strings.Contains(line, "/netns") || strings.Contains(line, "/run/containerd") {
			found["mount "+line] = ""
		}
	}
	interfaces, err := net.Interfaces()
	require.NoError(t, err)
	for _, i := range interfaces {
		found["interface "+i.Name] = ""
	}
	if rules, err := exec.CommandContext(t.Context(), "iptables-save").Output(); err == nil {
		for line := range strings.Lines(string(rules)) {
			if strings.Contains(line, "KUBE") || strings.Contains(line, "CNI") {
				found["rule "+line] = ""
			}
		}
	}
	for _, parameter := range []string{
		"net/ipv4/ip_forward", "vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	} {
		value, err := os.ReadFile(filepath.Join("/proc/sys", parameter))
		require.NoError(t, err)
		found[parameter] = string(value)
	}
	for _, folder := range []string{"/run/netns", "/run/containerd", "/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/var/log/pods", "/opt/containerd"} {
		entries, err := os.ReadDir(folder)
		found["folder "+folder] = fmt.Sprint(entries, err)
	}
	return found
}
