package cmd_test

import (
	"encoding/base64"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/imps-node/imps/test/cluster/cluster"
)

const (
	leaseName = "73de1ad9.banzaicloud.io"
	// canary stands for a credential, and must be found nowhere but in Secrets.
	canary = "canary-61c0d4-never-printed"
)

func client(t *testing.T) *kubernetes.Clientset {
	t.Helper()
	c, err := kubernetes.NewForConfig(control.Admin())
	require.NoError(t, err)
	return c
}

// source creates a source Secret with the canary for some registries.
func source(t *testing.T, secretType corev1.SecretType, data map[string][]byte) string {
	t.Helper()
	secrets := client(t).CoreV1().Secrets(sourceNamespace)
	name := cluster.Prefix(t)
	_, err := secrets.Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Type: secretType, Data: data,
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = secrets.Delete(cleanupContext(t), name, metav1.DeleteOptions{}) })
	return name
}

func dockerConfig(registries ...string) map[string][]byte {
	config := `{"auths":{`
	for i, registry := range registries {
		if i > 0 {
			config += ","
		}
		config += `"` + registry + `":{"username":"robot","password":"` + canary + `"}`
	}
	return map[string][]byte{corev1.DockerConfigJsonKey: []byte(config + "}}")}
}

func requireSilent(t *testing.T, text string) {
	t.Helper()
	require.NotContains(t, text, canary)
	for _, secret := range []string{canary, "robot:" + canary} {
		for offset := range 3 {
			encoded := base64.StdEncoding.EncodeToString([]byte("xx"[:offset] + secret))
			require.NotContains(t, text, encoded[4:len(encoded)-4])
		}
	}
}

func TestCoordinatorLeadsAndGivesTheLeaseUp(t *testing.T) {
	p := start(t, "--duties=cluster", "--kubeconfig="+coordinatorKubeconfig(t))
	p.awaitReady(t)
	p.awaitLog(t, "leading")
	leases := client(t).CoordinationV1().Leases(systemNamespace)
	lease, err := leases.Get(t.Context(), leaseName, metav1.GetOptions{})
	require.NoError(t, err)
	require.NotEmpty(t, *lease.Spec.HolderIdentity)
	require.Equal(t, testVersion, p.logged("starting")[0]["version"])

	code, took := p.terminate(t)
	require.Equal(t, 0, code)
	require.Less(t, took, 6*time.Second)
	lease, err = leases.Get(t.Context(), leaseName, metav1.GetOptions{})
	require.NoError(t, err)
	require.Empty(t, *lease.Spec.HolderIdentity)
	require.Len(t, p.logged("stopped"), 1)
	require.Empty(t, p.logged("a line that is not JSON"))
}

func TestHealthAndMetricsOfBothDuties(t *testing.T) {
	require.NoError(t, control.Node(t.Context(), "both"))
	p := start(t, "--duties=node,cluster", "--node-name=both", "--kubeconfig="+control.Kubeconfig())
	p.awaitReady(t)

	for path, want := range map[string]string{"/healthz": "ok\n", "/readyz": "ok\n"} {
		code, body := get(t, p.health, path)
		require.Equal(t, http.StatusOK, code)
		require.Equal(t, want, body)
	}
	code, _ := get(t, p.health, "/metrics")
	require.Equal(t, http.StatusNotFound, code)

	require.Eventually(t, func() bool {
		_, metrics := get(t, p.metrics, "/metrics")
		return strings.Contains(metrics, "\nimps_leader 1\n")
	}, patience, pause)
	code, metrics := get(t, p.metrics, "/metrics")
	require.Equal(t, http.StatusOK, code)
	for _, want := range []string{
		`version="` + testVersion + `"} 1`, "imps_fast_path_seconds_bucket", "imps_nodes_without_agent",
		`rest_client_requests_total{code="20`, "rest_client_request_duration_seconds_bucket",
		`workqueue_depth{name="node-namespaces"}`, `workqueue_depth{name="cluster-targets"}`,
		"go_goroutines", "process_resident_memory_bytes",
	} {
		require.Contains(t, metrics, want)
	}
	code, _ = p.terminate(t)
	require.Equal(t, 0, code)
}

func TestAgentRunsOnTheNodeOfItsToken(t *testing.T) {
	p := start(t, "--node-name=worker-1", "--kubeconfig="+agentKubeconfig(t, "worker-1"))
	p.awaitReady(t)
	p.awaitLog(t, "serving")
	events, err := control.Audit().Since(0)
	require.NoError(t, err)
	agents := map[string]bool{}
	for _, event := range events {
		if event.User == "system:serviceaccount:"+systemNamespace+":imps-node" {
			agents[event.UserAgent] = true
		}
	}
	require.Equal(t, map[string]bool{"imps-node/" + testVersion + " (node)": true}, agents)
	code, took := p.terminate(t)
	require.Equal(t, 0, code)
	require.Less(t, took, 6*time.Second)
}

func TestAgentRefusesAnotherNodeThanThatOfItsToken(t *testing.T) {
	p := start(t, "--node-name=worker-2", "--kubeconfig="+agentKubeconfig(t, "worker-1"))
	require.Equal(t, 1, p.awaitEnd(t))
	lines := p.logged("stopping after an error")
	require.Len(t, lines, 1)
	require.Equal(t, `--node-name is "worker-2", but the token is bound to node "worker-1": set it to the Pod's spec.nodeName`, lines[0]["error"])
	events, err := control.Audit().Since(0)
	require.NoError(t, err)
	for _, event := range events {
		require.NotEqual(t, "imps-node-worker-2", event.Name, "nothing is written before the claim is known")
	}
}

func TestAgentWithoutANodeClaimRuns(t *testing.T) {
	token, err := control.Token(t.Context(), systemNamespace, "imps-node")
	require.NoError(t, err)
	p := start(t, "--node-name=worker-3", "--kubeconfig="+kubeconfig(t, control.ConfigForToken(token)))
	p.awaitReady(t)
	require.Len(t, p.logged("the token is bound to no node"), 1)
}

func TestProcessOutlivesAnAPIServerThatIsNotThereYet(t *testing.T) {
	agent, coordinator := agentKubeconfig(t, "worker-1"), coordinatorKubeconfig(t)
	require.NoError(t, control.StopAPIServer())
	restarted := false
	t.Cleanup(func() {
		if !restarted {
			require.NoError(t, control.StartAPIServer(cleanupContext(t)))
		}
	})
	p := start(t, "--node-name=worker-1", "--kubeconfig="+agent)
	c := start(t, "--duties=cluster", "--kubeconfig="+coordinator)
	const warning = "cannot ask the API server which node the token is bound to"
	p.awaitLog(t, warning)
	code, _ := get(t, p.health, "/healthz")
	require.Equal(t, http.StatusOK, code)
	code, reason := get(t, p.health, "/readyz")
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.Contains(t, reason, "the node duty has not read")
	code, _ = get(t, c.health, "/healthz")
	require.Equal(t, http.StatusOK, code)

	require.NoError(t, control.StartAPIServer(t.Context()))
	restarted = true
	p.awaitReady(t)
	c.awaitLog(t, "leading")
	require.Len(t, p.logged(warning), 1)
	require.Len(t, p.logged("the API server answers again"), 1)
	for _, started := range []*process{p, c} {
		code, took := started.terminate(t)
		require.Equal(t, 0, code)
		require.Less(t, took, 6*time.Second)
	}
}

func TestAgentStopsWhileTheAPIServerIsAway(t *testing.T) {
	agent := agentKubeconfig(t, "worker-1")
	require.NoError(t, control.StopAPIServer())
	t.Cleanup(func() { require.NoError(t, control.StartAPIServer(cleanupContext(t))) })
	p := start(t, "--node-name=worker-1", "--kubeconfig="+agent)
	p.awaitLog(t, "cannot ask the API server")
	code, took := p.terminate(t)
	require.Equal(t, 0, code)
	require.Less(t, took, 3*time.Second)
}

func TestLogsHoldNoCredentialAtTheHighestVerbosity(t *testing.T) {
	namespace := control.Namespace(t, nil)
	name := source(t, corev1.SecretTypeDockerConfigJson, dockerConfig("registry.example.com"))
	resource(t, `{name: `+cluster.Prefix(t)+`}`, `
  target: {secret: {name: imps-pull-secret}, namespaces: {names: [`+namespace+`]}}
  registry: {credentials: [{name: `+name+`, namespace: registry-access}]}`)
	require.NoError(t, control.Node(t.Context(), "both"))
	p := start(t, "--duties=node,cluster", "--node-name=both", "--kubeconfig="+control.Kubeconfig())
	secrets := client(t).CoreV1().Secrets(namespace)
	require.Eventually(t, func() bool {
		secret, err := secrets.Get(t.Context(), "imps-pull-secret", metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			require.NoError(t, err)
		}
		return err == nil && len(secret.Data) > 0
	}, patience, pause)
	_, metrics := get(t, p.metrics, "/metrics")
	require.Contains(t, metrics, `imps_secret_writes_total{duty="cluster",result="ok",verb="create"}`)
	code, _ := p.terminate(t)
	require.Equal(t, 0, code)
	require.Contains(t, p.stderr(), `"level":"DEBUG"`)
	requireSilent(t, p.stderr())
	requireSilent(t, metrics)
}

func TestAnAddressThatIsTakenEndsTheProcess(t *testing.T) {
	p := start(t, "--duties=cluster", "--kubeconfig="+coordinatorKubeconfig(t))
	second := exec.CommandContext(t.Context(), binary, "run", "--duties=cluster", "--kubeconfig="+coordinatorKubeconfig(t),
		"--metrics-addr="+p.metrics, "--health-addr=0")
	stderr, err := second.CombinedOutput()
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 1, exit.ExitCode())
	require.Equal(t, "imps-node: --metrics-addr: listen tcp "+p.metrics+": bind: address already in use\n", string(stderr))
}

func TestInClusterConfigurationIsTheDefault(t *testing.T) {
	second := exec.CommandContext(t.Context(), binary, "run", "--duties=cluster")
	second.Env = []string{"HOME=" + t.TempDir(), "KUBECONFIG=" + filepath.Join(t.TempDir(), "unused")}
	stderr, err := second.CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(stderr), "imps-node: --kubeconfig: none is given, and this is no Pod of a cluster")
}
