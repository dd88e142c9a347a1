package cmd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/test/cluster/cluster"
)

// planned is the JSON of `imps-node plan`, as people's programs see it.
type planned struct {
	Name       string
	Target     string
	Exists     bool
	Namespaces []struct {
		Name       string
		SelectedBy []string
		Outcome    string
	}
	Registries []struct {
		Registry, Source string
		Overrides        []string
	}
	Conflicts []struct{ Kind, Namespace, Message string }
	Notes     []string
	Unknown   []string
}

func (p planned) outcomes() map[string]string {
	outcomes := map[string]string{}
	for _, n := range p.Namespaces {
		outcomes[n.Name] = strings.Join(n.SelectedBy, ",") + ": " + n.Outcome
	}
	return outcomes
}

func (p planned) conflicts() []string {
	var conflicts []string
	for _, c := range p.Conflicts {
		conflicts = append(conflicts, strings.Join(strings.Fields(c.Kind+" "+c.Namespace), " "))
	}
	return conflicts
}

// cleanupContext is for what happens after the test, when its own context has ended.
func cleanupContext(t *testing.T) context.Context { return context.WithoutCancel(t.Context()) }

// manifest returns an ImagePullSecret as YAML.
func manifest(metadata, spec string) string {
	return "apiVersion: images.banzaicloud.io/v1alpha1\nkind: ImagePullSecret\nmetadata: " + metadata + "\nspec:" + spec + "\n"
}

// resource creates an ImagePullSecret.
func resource(t *testing.T, metadata, spec string) {
	t.Helper()
	object := &unstructured.Unstructured{}
	require.NoError(t, yaml.Unmarshal([]byte(manifest(metadata, spec)), &object.Object))
	c, err := dynamic.NewForConfig(control.Admin())
	require.NoError(t, err)
	resources := c.Resource(v1alpha1.Resource)
	_, err = resources.Create(t.Context(), object, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = resources.Delete(cleanupContext(t), object.GetName(), metav1.DeleteOptions{}) })
}

// plan runs `imps-node plan` for a file with these manifests, as a user.
func plan(t *testing.T, kubeconfig string, manifests string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "resources.yaml")
	require.NoError(t, os.WriteFile(file, []byte(manifests), 0o600))
	command := exec.CommandContext(t.Context(), binary, append([]string{"plan", "-f", file, "--kubeconfig", kubeconfig}, args...)...)
	var out, errOut bytes.Buffer
	command.Stdout, command.Stderr = &out, &errOut
	err := command.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); !exited {
		require.NoError(t, err)
	}
	requireSilent(t, out.String()+errOut.String())
	return command.ProcessState.ExitCode(), out.String(), errOut.String()
}

// planJSON does the same, and decodes the answer.
func planJSON(t *testing.T, kubeconfig string, manifests string, args ...string) (code int, plans []planned) {
	t.Helper()
	code, stdout, stderr := plan(t, kubeconfig, manifests, append(args, "-o", "json")...)
	require.Empty(t, stderr)
	require.NoError(t, json.Unmarshal([]byte(stdout), &plans), stdout)
	return code, plans
}

// user returns a kubeconfig of a user with these rights.
func user(t *testing.T, name string, rules ...rbacv1.PolicyRule) string {
	t.Helper()
	roles, bindings := client(t).RbacV1().ClusterRoles(), client(t).RbacV1().ClusterRoleBindings()
	meta := metav1.ObjectMeta{Name: name}
	_, err := roles.Create(t.Context(), &rbacv1.ClusterRole{ObjectMeta: meta, Rules: rules}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = bindings.Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: name}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = bindings.Delete(cleanupContext(t), name, metav1.DeleteOptions{})
		_ = roles.Delete(cleanupContext(t), name, metav1.DeleteOptions{})
	})
	config, err := control.ConfigForUser(name)
	require.NoError(t, err)
	return kubeconfig(t, config)
}

// reader is a user who may read all that a plan wants to see.
func reader(t *testing.T, name string) string {
	t.Helper()
	return user(t, name,
		rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"namespaces", "pods", "secrets"}, Verbs: []string{"get", "list"}},
		rbacv1.PolicyRule{APIGroups: []string{v1alpha1.GroupVersion.Group}, Resources: []string{v1alpha1.Resource.Resource}, Verbs: []string{"list"}})
}

// pod creates a Pod whose label app is its namespace; without a node it is not bound.
func pod(t *testing.T, namespace, node string) {
	t.Helper()
	grace := int64(0)
	_, err := client(t).CoreV1().Pods(namespace).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Labels: map[string]string{"app": namespace}},
		Spec: corev1.PodSpec{
			NodeName: node, TerminationGracePeriodSeconds: &grace, Containers: []corev1.Container{{Name: "main", Image: "registry.invalid/main"}},
			AutomountServiceAccountToken: new(bool), Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
		},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
}

func TestPlanOfASmallCluster(t *testing.T) {
	ctx := t.Context()
	c := client(t)
	team := cluster.Prefix(t)
	labels := map[string]string{"team": team}
	fresh := control.Namespace(t, labels)
	foreign := control.Namespace(t, labels)
	claimed := control.Namespace(t, labels)
	lost := control.Namespace(t, labels)
	excluded := control.Namespace(t, labels)
	podded := control.Namespace(t, nil)
	unbound := control.Namespace(t, nil)
	annotated := control.Namespace(t, nil)
	terminating := control.Namespace(t, labels)

	// A namespace that hangs in its deletion.
	held := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "held", Finalizers: []string{"example.com/held"}}}
	_, err := c.CoreV1().ConfigMaps(terminating).Create(ctx, held, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() {
		_, _ = c.CoreV1().ConfigMaps(terminating).Patch(cleanupContext(t), "held", "application/merge-patch+json", []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
	})
	require.NoError(t, c.CoreV1().Namespaces().Delete(ctx, terminating, metav1.DeleteOptions{}))

	_, err = c.CoreV1().Namespaces().Patch(ctx, annotated, "application/merge-patch+json", []byte(`{"metadata":{"annotations":{"team":"`+team+`"}}}`), metav1.PatchOptions{})
	require.NoError(t, err)
	_, err = c.CoreV1().Secrets(foreign).Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "imps-pull-secret"}, Type: corev1.SecretTypeDockerConfigJson, Data: dockerConfig("mine.example.com"),
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	require.NoError(t, control.Node(ctx, "worker-1"))
	for namespace, node := range map[string]string{podded: "worker-1", unbound: ""} {
		_, err := c.CoreV1().ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
		if !apierrors.IsAlreadyExists(err) { // the controller may have been faster
			require.NoError(t, err)
		}
		pod(t, namespace, node)
	}
	hub := source(t, corev1.SecretTypeDockerConfigJson, dockerConfig("https://index.docker.io/v1/", "ghcr.io"))
	mirror := source(t, corev1.SecretTypeDockerConfigJson, dockerConfig("docker.io", "quay.io"))
	broken := source(t, corev1.SecretTypeOpaque, map[string][]byte{"password": []byte(canary)})
	keys := source(t, "banzaicloud.io/aws-ecr-login-config", map[string][]byte{
		"accountID": []byte("210987654321"), "region": []byte("eu-central-1"), "accessKeyID": []byte("AKIA" + canary), "secretKey": []byte(canary),
	})

	// Where creation times are equal, in whole seconds, the name decides.
	older, self, younger := "a-"+team, "b-"+team, "c-"+team
	resource(t, `{name: `+older+`}`, `
  target: {secret: {name: imps-pull-secret}, namespaces: {names: [`+claimed+`]}}
  registry: {credentials: []}`)
	spec := `
  target:
    secret: {name: imps-pull-secret}
    namespaces:
      names: [` + fresh + `, later-` + team + `]
      labels: [{matchLabels: {team: ` + team + `}}]
      annotations: [{matchAnnotations: {team: ` + team + `}}]
    namespacesWithPods:
      labels: [{matchExpressions: [{key: app, operator: In, values: [` + podded + `, ` + unbound + `]}]}]
    rescue: true
  registry:
    credentials:
      - {name: ` + hub + `, namespace: registry-access}
      - {name: gone, namespace: registry-access}
      - {name: ` + broken + `, namespace: registry-access}
      - {name: any, namespace: elsewhere}
      - ecr: {registries: [123456789012.dkr.ecr.eu-central-1.amazonaws.com]}
      - ecr: {registries: [ecr.example.com]}
      - {name: ` + keys + `, namespace: registry-access}
      - {name: ` + mirror + `, namespace: registry-access}`
	resource(t, `{name: `+self+`}`, spec)
	resource(t, `{name: `+younger+`}`, `
  target: {secret: {name: imps-pull-secret}, namespaces: {names: [`+lost+`]}}
  registry: {credentials: []}`)

	as := "reader-" + team
	who := reader(t, as)
	mark := control.Audit().Mark()
	code, plans := planJSON(t, who, manifest(`{name: `+self+`}`, spec), "--excluded-namespaces=nothing,"+excluded)
	require.Equal(t, 2, code)
	require.Len(t, plans, 1)
	got := plans[0]
	require.True(t, got.Exists)
	require.Equal(t, "imps-pull-secret", got.Target)
	require.Equal(t, map[string]string{
		fresh: "name,label: create", foreign: "label: foreign", claimed: "label: claimed", lost: "label: create",
		excluded: "label: excluded", terminating: "label: terminating", annotated: "annotation: create", podded: "pods: create",
	}, got.outcomes())
	require.ElementsMatch(t, []string{
		"ForeignSecret " + foreign, "OlderResource " + claimed, "YoungerResource " + lost,
		"SourceFailed", "SourceFailed", "SourceFailed", "NotAllowed", "NotAllowed",
	}, got.conflicts())
	registries := map[string]string{}
	for _, r := range got.Registries {
		registries[r.Registry] = strings.Join(append([]string{r.Source}, r.Overrides...), " over ")
	}
	require.Equal(t, map[string]string{
		"docker.io": sourceNamespace + "." + mirror + " over " + sourceNamespace + "." + hub,
		"ghcr.io":   sourceNamespace + "." + hub,
		"quay.io":   sourceNamespace + "." + mirror,
		"123456789012.dkr.ecr.eu-central-1.amazonaws.com": "ecr.123456789012.dkr.ecr.eu-central-1.amazonaws.com",
		"210987654321.dkr.ecr.eu-central-1.amazonaws.com": sourceNamespace + "." + keys,
	}, registries)
	require.Equal(t, []string{
		"namespaces that get nothing, as --excluded-namespaces (nothing, " + excluded + ") has them: 1",
		"namespaces that get nothing, as they are being deleted: 1",
		`namespace "later-` + team + `" does not exist; it gets the Secret once it does`,
	}, got.Notes)
	require.Empty(t, got.Unknown)

	code, table, _ := plan(t, who, manifest(`{name: `+self+`}`, spec))
	require.Equal(t, 2, code)
	for _, want := range []string{
		"ImagePullSecret " + self + " (exists), Secret imps-pull-secret: 8 namespaces, 5 registries, 8 conflicts\n",
		"name,label    create", "label         foreign", "ForeignSecret     " + foreign,
		"SourceFailed      -", "source " + sourceNamespace + ".gone: not found",
		`source elsewhere.any: namespace "elsewhere" is not in --source-namespaces (registry-access): add it to the chart's value sourceNamespaces`,
	} {
		require.Contains(t, table, want)
	}

	events, err := control.Audit().Since(mark)
	require.NoError(t, err)
	seen := 0
	for _, event := range events {
		if event.User != as {
			continue
		}
		seen++
		require.Contains(t, []string{"get", "list"}, event.Verb, "a plan only reads")
		require.Equal(t, "imps-node/"+testVersion+" (plan)", event.UserAgent)
		if event.Resource == "pods" || event.Resource == "namespaces" {
			require.Contains(t, event.URI, "limit=1000")
		}
	}
	require.NotZero(t, seen)
}

func TestPlanOfWhatIsDelivered(t *testing.T) {
	namespace := control.Namespace(t, nil)
	name := cluster.Prefix(t)
	hub := source(t, corev1.SecretTypeDockerConfigJson, dockerConfig("ghcr.io"))
	spec := `
  target: {secret: {name: imps-pull-secret}, namespaces: {names: [` + namespace + `]}}
  registry: {credentials: [{name: ` + hub + `, namespace: registry-access}]}`
	who := reader(t, "reader-"+name)

	code, plans := planJSON(t, who, manifest(`{name: `+name+`}`, spec))
	require.Equal(t, 0, code)
	require.False(t, plans[0].Exists)
	require.Equal(t, map[string]string{namespace: "name: create"}, plans[0].outcomes())

	resource(t, `{name: `+name+`}`, spec)
	p := start(t, "--duties=cluster", "--kubeconfig="+coordinatorKubeconfig(t))
	require.Eventually(t, func() bool {
		_, plans = planJSON(t, who, manifest(`{name: `+name+`}`, spec))
		return plans[0].outcomes()[namespace] == "name: update"
	}, patience, pause)
	require.True(t, plans[0].Exists)
	require.Empty(t, plans[0].Conflicts)

	// Under another name it would be another resource, which is younger.
	code, plans = planJSON(t, who, manifest(`{name: another-`+name+`}`, spec))
	require.Equal(t, 2, code)
	require.Equal(t, []string{"OlderResource " + namespace}, plans[0].conflicts())
	code, _ = p.terminate(t)
	require.Equal(t, 0, code)
}

func TestPlanCountsServiceAccounts(t *testing.T) {
	namespace, excluded := control.Namespace(t, nil), control.Namespace(t, nil)
	for _, account := range []*corev1.ServiceAccount{
		{ObjectMeta: metav1.ObjectMeta{Name: "named"}}, {ObjectMeta: metav1.ObjectMeta{Name: "labelled", Labels: map[string]string{"pull": "x"}}}, {ObjectMeta: metav1.ObjectMeta{Name: "other"}},
	} {
		for _, n := range []string{namespace, excluded} {
			_, err := client(t).CoreV1().ServiceAccounts(n).Create(t.Context(), account, metav1.CreateOptions{})
			require.NoError(t, err)
		}
	}
	hub := source(t, corev1.SecretTypeDockerConfigJson, dockerConfig("ghcr.io"))
	resource := manifest("{name: accounts}", `
  target:
    secret: {name: imps-pull-secret}
    namespaces: {names: [`+namespace+`, `+excluded+`]}
    serviceAccounts: {names: [named, absent], labels: [{matchLabels: {pull: x}}]}
  registry: {credentials: [{name: `+hub+`, namespace: registry-access}]}`)
	code, stdout, _ := plan(t, control.Kubeconfig(), resource, "--excluded-namespaces="+excluded)
	require.Zero(t, code)
	require.Regexp(t, `(?m)^NAMESPACE +SELECTED BY +OUTCOME +SERVICEACCOUNTS$`, stdout)
	require.Regexp(t, `(?m)^`+namespace+` +name +create +2$`, stdout)
	require.Regexp(t, `(?m)^`+excluded+` +name +excluded +-$`, stdout)
	_, plans := planJSON(t, reader(t, "reader-"+namespace), resource)
	require.Contains(t, plans[0].Unknown, "cannot list ServiceAccounts: forbidden; how many would name the Secret is unknown")
}

func TestPlanOfSeveralResourcesKnowsThemAll(t *testing.T) {
	namespace := control.Namespace(t, nil)
	hub := source(t, corev1.SecretTypeDockerConfigJson, dockerConfig("ghcr.io"))
	spec := `
  target: {secret: {name: imps-pull-secret}, namespaces: {names: [` + namespace + `]}}
  registry: {credentials: [{name: ` + hub + `, namespace: registry-access}]}`
	code, plans := planJSON(t, control.Kubeconfig(), manifest("{name: b-of-two}", spec)+"---\n"+manifest("{name: a-of-two}", spec))
	require.Equal(t, 2, code)
	require.Len(t, plans, 2)
	require.Equal(t, []string{"OlderResource " + namespace}, plans[0].conflicts(), "of one age: the name decides")
	require.Equal(t, []string{"YoungerResource " + namespace}, plans[1].conflicts())

	code, plans = planJSON(t, control.Kubeconfig(), manifest("{name: a-name}", strings.Replace(spec, "imps-pull-secret", "other", 1)))
	require.Equal(t, 2, code)
	require.Equal(t, []string{"NotAllowed"}, plans[0].conflicts())
	require.Equal(t, map[string]string{namespace: "name: refused"}, plans[0].outcomes())
	code, _ = planJSON(t, control.Kubeconfig(), manifest("{name: a-name}", strings.Replace(spec, "imps-pull-secret", "other", 1)), "--target-secret-names=*")
	require.Equal(t, 0, code)
}

func TestPlanOfSomebodyWhoMaySeeNothing(t *testing.T) {
	namespace := control.Namespace(t, nil)
	hub := source(t, corev1.SecretTypeDockerConfigJson, dockerConfig("ghcr.io"))
	code, plans := planJSON(t, user(t, "nobody-"+namespace), manifest("{name: unseen}", `
  target:
    secret: {name: imps-pull-secret}
    namespaces: {names: [`+namespace+`], labels: [{}]}
    namespacesWithPods: {labels: [{}]}
  registry: {credentials: [{name: `+hub+`, namespace: registry-access}]}`))
	require.Equal(t, 0, code)
	require.Equal(t, []string{
		"cannot get Secret registry-access/" + hub + ": forbidden; its registries are unknown",
		"cannot list ImagePullSecrets: forbidden; whether there is one of that name, or others that claim the same Secret, is unknown",
		"cannot list Namespaces: forbidden; only those that names or Pods select are shown",
		"cannot list Pods: forbidden; the namespaces that only Pods select are unknown",
		"cannot list Secrets named imps-pull-secret: forbidden; whether foreign ones are in the way is unknown",
	}, plans[0].Unknown)
	require.Equal(t, map[string]string{namespace: "name: unknown"}, plans[0].outcomes())
	require.Empty(t, plans[0].Conflicts)
}

func TestPlanFailsWithoutAnAPIServer(t *testing.T) {
	config := control.Admin()
	config.Host = "https://127.0.0.1:1"
	code, stdout, stderr := plan(t, kubeconfig(t, config), manifest("{name: a}", " {target: {}, registry: {}}"))
	require.Equal(t, 1, code)
	require.Empty(t, stdout)
	require.Regexp(t, `^imps-node: plan a: list ImagePullSecrets: .*connection refused\n$`, stderr)
}
