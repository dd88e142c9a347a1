package cmd_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// uninstall runs imps-node uninstall.
func uninstall(t *testing.T, kubeconfig string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	command := exec.CommandContext(t.Context(), binary, append([]string{"uninstall", "--kubeconfig=" + kubeconfig}, args...)...)
	command.Stdout, command.Stderr = &out, &err
	failure := command.Run()
	if exit := (*exec.ExitError)(nil); failure != nil && !errors.As(failure, &exit) {
		require.NoError(t, failure)
	}
	return command.ProcessState.ExitCode(), out.String(), err.String()
}

// What imps has put into ServiceAccounts goes, and what users have stays.
func TestUninstall(t *testing.T) {
	namespace := control.Namespace(t, nil)
	accounts := client(t).CoreV1().ServiceAccounts(namespace)
	for _, name := range []string{"users", "own"} {
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}, ImagePullSecrets: []corev1.LocalObjectReference{{Name: "b"}, {Name: "a"}}}
		if name == "own" {
			account.ImagePullSecrets[0].Name = "imps-pull-secret"
		}
		_, err := accounts.Create(t.Context(), account, metav1.CreateOptions{})
		require.NoError(t, err)
	}
	names := func(account string) (names []string, attached string) {
		a, err := accounts.Get(t.Context(), account, metav1.GetOptions{})
		require.NoError(t, err)
		for _, ref := range a.ImagePullSecrets {
			names = append(names, ref.Name)
		}
		return names, a.Annotations["images.banzaicloud.io/attached"]
	}
	hub := source(t, corev1.SecretTypeDockerConfigJson, dockerConfig("registry.one"))
	resource(t, `{name: `+namespace+`}`, `
  target:
    secret: {name: imps-pull-secret}
    namespaces: {names: [`+namespace+`]}
    serviceAccounts: {names: [users, own]}
  registry: {credentials: [{name: `+hub+`, namespace: registry-access}]}`)
	coordinator := start(t, "--duties=cluster", "--kubeconfig="+coordinatorKubeconfig(t))
	require.Eventually(t, func() bool { have, _ := names("users"); return len(have) == 3 }, patience, pause)

	code, out, failure := uninstall(t, control.Kubeconfig())
	require.Equal(t, 1, code)
	require.Empty(t, out)
	require.Contains(t, failure, "a coordinator is at work")
	require.Contains(t, failure, "kubectl --namespace imps-system scale deployment imps-coordinator --replicas=0")
	coordinator.terminate(t)

	code, out, failure = uninstall(t, control.Kubeconfig(), "--dry-run")
	require.Equal(t, 0, code, failure)
	require.Equal(t, namespace+"/users: would take out imps-pull-secret\n", out)
	have, attached := names("users")
	require.Equal(t, []string{"b", "a", "imps-pull-secret"}, have)
	require.Equal(t, "imps-pull-secret", attached)

	nobody := user(t, "lister-"+namespace, rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"serviceaccounts"}, Verbs: []string{"list"}},
		rbacv1.PolicyRule{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{"get"}})
	code, out, failure = uninstall(t, nobody, "-o", "json")
	require.Equal(t, 1, code)
	require.Contains(t, failure, "1 ServiceAccounts could not be changed")
	require.Contains(t, out, "forbidden")

	code, out, failure = uninstall(t, control.Kubeconfig(), "-o", "json")
	require.Equal(t, 0, code, failure)
	var done map[string]any
	require.NoError(t, json.Unmarshal([]byte(out), &done))
	require.Equal(t, map[string]any{"namespace": namespace, "serviceAccount": "users", "secrets": []any{"imps-pull-secret"}}, done)
	have, attached = names("users")
	require.Equal(t, []string{"b", "a"}, have)
	require.Empty(t, attached)
	have, _ = names("own")
	require.Equal(t, []string{"imps-pull-secret", "a"}, have)

	code, out, failure = uninstall(t, control.Kubeconfig())
	require.Equal(t, 0, code, failure)
	require.Equal(t, "no ServiceAccount names a Secret of imps\n", out)
	require.Empty(t, failure)

	code, _, failure = uninstall(t, control.Kubeconfig(), "--namespace=default")
	require.Equal(t, 0, code)
	require.Regexp(t, `^imps-node: note: there is no Lease default/\S+: if a coordinator runs in another namespace`, failure)
}
