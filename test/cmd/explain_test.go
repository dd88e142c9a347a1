package cmd_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

// explained is the JSON of `imps-node explain pod`, as people's programs see it.
type explained struct {
	Namespace, Pod, Node, ServiceAccount string
	Containers                           []struct {
		Name, Image, Repository, State, Cause, Why, Next, Error string
		Resources                                               []struct {
			Name, Cause, Holds, Selected, Secret, SecretState, AccountNames string
			SelectedBy                                                      []string
			PodNames                                                        bool
			AttachedAt                                                      *time.Time
			Kubelet                                                         *struct{ Scope, Served, Why string }
		}
	}
	Unknown []string
}

// explain runs imps-node explain pod, as a user.
func explain(t *testing.T, kubeconfig, pod string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	command := exec.CommandContext(t.Context(), binary, append([]string{"explain", "pod", pod, "--kubeconfig=" + kubeconfig}, args...)...)
	command.Stdout, command.Stderr = &out, &err
	failure := command.Run()
	if _, exited := errors.AsType[*exec.ExitError](failure); !exited {
		require.NoError(t, failure)
	}
	requireSilent(t, out.String()+err.String())
	return command.ProcessState.ExitCode(), out.String(), err.String()
}

func explainJSON(t *testing.T, kubeconfig, pod string, args ...string) explained {
	t.Helper()
	code, stdout, stderr := explain(t, kubeconfig, pod, append(args, "-o", "json")...)
	require.Zero(t, code, stderr)
	require.Empty(t, stderr)
	var e explained
	require.NoError(t, json.Unmarshal([]byte(stdout), &e), stdout)
	return e
}

// resourceOf returns an ImagePullSecret as it is.
func resourceOf(t *testing.T, name string) *v1alpha1.ImagePullSecret {
	t.Helper()
	c, err := dynamic.NewForConfig(control.Admin())
	require.NoError(t, err)
	object, err := c.Resource(v1alpha1.Resource).Get(t.Context(), name, metav1.GetOptions{})
	require.NoError(t, err)
	r := &v1alpha1.ImagePullSecret{}
	require.NoError(t, runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, r))
	return r
}

// puller is a Pod with one container, and what its kubelet says about it.
type puller struct {
	namespace      string
	image          string
	serviceAccount string
	pullSecrets    []string
	unbound        bool
	// node is worker-1 where it is empty.
	node string
	// waiting is a reason and a message; empty: the container runs.
	waiting, message string
	// failed is the message of an Event of the kubelet, and since when that was.
	failed string
	ago    time.Duration
}

// create puts the Pod into the cluster.
func (p puller) create(t *testing.T, name string) {
	t.Helper()
	core := client(t).CoreV1()
	made := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			NodeName: cmp.Or(p.node, "worker-1"), ServiceAccountName: p.serviceAccount, AutomountServiceAccountToken: new(bool),
			Containers: []corev1.Container{{Name: "app", Image: p.image}}, TerminationGracePeriodSeconds: new(int64),
		},
	}
	if p.unbound {
		made.Spec.NodeName = ""
	}
	for _, secret := range p.pullSecrets {
		made.Spec.ImagePullSecrets = append(made.Spec.ImagePullSecrets, corev1.LocalObjectReference{Name: secret})
	}
	require.Eventually(t, func() bool { // until its ServiceAccount is there
		created, err := core.Pods(p.namespace).Create(t.Context(), made, metav1.CreateOptions{})
		if err == nil {
			made = created
		}
		return err == nil
	}, patience, pause)
	if p.unbound {
		return
	}
	state := map[string]any{"running": map[string]any{}}
	if p.waiting != "" {
		state = map[string]any{"waiting": map[string]any{"reason": p.waiting, "message": p.message}}
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"containerStatuses": []map[string]any{
		{"name": "app", "image": p.image, "imageID": "", "ready": false, "restartCount": 0, "state": state},
	}}})
	require.NoError(t, err)
	_, err = core.Pods(p.namespace).Patch(t.Context(), name, types.MergePatchType, patch, metav1.PatchOptions{}, "status")
	require.NoError(t, err)
	if p.failed == "" {
		return
	}
	_, err = core.Events(p.namespace).Create(t.Context(), &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{GenerateName: name + "."},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.namespace, Name: name, UID: made.UID},
		Reason:         "Failed", Type: corev1.EventTypeWarning, Message: p.failed, LastTimestamp: metav1.NewTime(time.Now().Add(-p.ago)), Count: 1,
	}, metav1.CreateOptions{})
	require.NoError(t, err)
}

// with is the same with another ServiceAccount.
func (p puller) with(serviceAccount string) puller {
	p.serviceAccount = serviceAccount
	return p
}

const (
	// What kubelets say, with containerd.
	unauthorized = `Failed to pull image "r.one/app": failed to resolve reference "r.one/app:latest": unexpected status from HEAD request to https://r.one/v2/app/manifests/latest: 401 Unauthorized`
	notFound     = `Failed to pull image "r.one/app": rpc error: code = NotFound desc = failed to pull and unpack image "r.one/app:latest": r.one/app:latest: not found`
	noSuchHost   = `Failed to pull image "r.one/app": failed to do request: Head "https://r.one/v2/app/manifests/latest": dial tcp: lookup r.one: no such host`
	odd          = `Failed to pull image "r.one/app": failed to extract layer: no space left on device`
	backOff      = `Back-off pulling image "r.one/app"`
)

// Each of these Pods does not pull, or does, for another reason, and that is what is said.
func TestExplainFindsTheCause(t *testing.T) {
	core := client(t).CoreV1()
	team := cluster.Prefix(t)
	labels := map[string]string{"team": team}
	hub := source(t, corev1.SecretTypeDockerConfigJson, dockerConfig("r.one"))
	credentials := `
  registry: {credentials: [{name: ` + hub + `, namespace: registry-access}]}`
	served, unselected, excluded, foreign, quota, claimed := control.Namespace(t, labels), control.Namespace(t, nil), control.Namespace(t, labels),
		control.Namespace(t, labels), control.Namespace(t, labels), control.Namespace(t, labels)
	_, err := core.Secrets(foreign).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "imps-pull-secret"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = core.ResourceQuotas(quota).Create(t.Context(), &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Name: "none"}, Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{"count/secrets": {}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		q, err := core.ResourceQuotas(quota).Get(t.Context(), "none", metav1.GetOptions{})
		return err == nil && len(q.Status.Hard) > 0
	}, patience, pause)
	for _, name := range []string{"attached", "resisting", "elder"} {
		_, err := core.ServiceAccounts(served).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		require.NoError(t, err)
	}
	early := puller{namespace: served, image: "r.one/app", serviceAccount: "attached", waiting: "ImagePullBackOff", message: backOff, failed: unauthorized}
	early.create(t, "early")
	// These come before anything is attached, too: admission goes by a watch, and may be behind what is taken out later.
	early.with("resisting").create(t, "resisting")
	early.with("elder").create(t, "late")

	resource(t, `{name: a-`+team+`}`, `
  target: {secret: {name: imps-pull-secret}, namespaces: {names: [`+claimed+`]}}
  registry: {credentials: [{name: `+source(t, corev1.SecretTypeDockerConfigJson, dockerConfig("r.two"))+`, namespace: registry-access}]}`)
	resource(t, `{name: b-`+team+`}`, `
  target:
    secret: {name: imps-pull-secret}
    namespaces: {labels: [{matchLabels: {team: `+team+`}}]}
    serviceAccounts: {names: [attached, resisting]}`+credentials)
	resource(t, `{name: c-`+team+`}`, `
  target: {secret: {name: imps-pull-secret}, namespaces: {names: [`+unselected+`-broken]}}
  registry: {credentials: [{name: gone, namespace: registry-access}]}`)
	broken := unselected + "-broken"
	_, err = core.Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: broken}}, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = core.Namespaces().Delete(cleanupContext(t), broken, metav1.DeleteOptions{}) })

	coordinator := start(t, "--duties=cluster", "--kubeconfig="+coordinatorKubeconfig(t), "--excluded-namespaces="+excluded)
	require.Eventually(t, func() bool {
		a, err := core.ServiceAccounts(served).Get(t.Context(), "resisting", metav1.GetOptions{})
		require.NoError(t, err)
		_, err = core.Secrets(served).Get(t.Context(), "imps-pull-secret", metav1.GetOptions{})
		return len(a.ImagePullSecrets) == 1 && err == nil && strings.Contains(resourceOf(t, "b-"+team).Status.Reason, "quota")
	}, patience, pause)
	require.Eventually(t, func() bool {
		_, err := core.Secrets(claimed).Get(t.Context(), "imps-pull-secret", metav1.GetOptions{})
		return err == nil
	}, patience, pause)
	coordinator.terminate(t)

	// What a coordinator would mend.
	annotate := func(account, patch string) {
		_, err := core.ServiceAccounts(served).Patch(t.Context(), account, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		require.NoError(t, err)
	}
	annotate("resisting", `{"imagePullSecrets":null}`)

	fails := func(message string) puller {
		return puller{namespace: served, image: "r.one/app", pullSecrets: []string{"imps-pull-secret"}, waiting: "ImagePullBackOff", message: backOff, failed: message}
	}
	in := func(namespace string) puller {
		p := fails(unauthorized)
		p.namespace = namespace
		return p
	}
	with := func(change func(*puller)) puller {
		p := fails(unauthorized)
		change(&p)
		return p
	}
	cases := map[string]struct {
		puller
		cause, why, next string
	}{
		"running":        {puller{namespace: served, image: "r.one/app"}, "Pulled", "the image is on the node", "nothing about the image"},
		"unscheduled":    {puller{namespace: served, image: "r.one/app", unbound: true}, "NotScheduled", "neither the Pod nor its ServiceAccount default names Secret imps-pull-secret", "kubectl describe pod"},
		"creating":       {with(func(p *puller) { p.waiting, p.message, p.failed = "ContainerCreating", "", "" }), "Waiting", "no pull has failed so far", "kubectl describe pod"},
		"no-image":       {with(func(p *puller) { p.image, p.waiting, p.failed = "r.one/APP", "InvalidImageName", "" }), "InvalidImage", "no image reference", "correct the image"},
		"never":          {with(func(p *puller) { p.waiting, p.failed = "ErrImageNeverPull", "" }), "NeverPull", "imagePullPolicy is Never", "change imagePullPolicy"},
		"unreachable":    {fails(noSuchHost), "RegistryUnreachable", "cannot reach the registry", "from the node to r.one"},
		"unheard-of":     {with(func(p *puller) { p.image, p.failed = "r.three/app", "" }), "NoResource", "none of the 3 ImagePullSecrets has credentials for r.three/app", "add a source"},
		"no-source":      {in(broken), "NotDelivering", "ImagePullSecret c-" + team + " may be meant", "kubectl describe imps c-" + team},
		"unselected":     {in(unselected), "NotSelected", "no selector of its spec.target selects namespace " + unselected, "imps-node plan"},
		"excluded":       {in(excluded), "Excluded", "which --excluded-namespaces excludes", "excludedNamespaces"},
		"claimed":        {in(claimed), "OlderResource", "Secret imps-pull-secret is of ImagePullSecret a-" + team, "another spec.target.secret.name"},
		"foreign":        {in(foreign), "ForeignSecret", "a Secret imps-pull-secret that is not imps's", "delete or rename it"},
		"quota":          {in(quota), "SecretMissing", "the namespace's quota is exceeded", "kubectl describe imps b-" + team},
		"unnamed":        {with(func(p *puller) { p.pullSecrets = nil }), "NotNamed", "neither the Pod nor its ServiceAccount default names Secret imps-pull-secret", "add imps-pull-secret to imagePullSecrets"},
		"own":            {with(func(p *puller) { p.pullSecrets, p.serviceAccount = []string{"theirs"}, "attached" }), "OwnPullSecrets", "the Pod has pull Secrets of its own (theirs)", "add imps-pull-secret to imagePullSecrets"},
		"back-off":       {with(func(p *puller) { p.ago = time.Hour }), "BackOff", "the last pull failed at", "wait: the kubelet tries again within five minutes"},
		"refused":        {fails(unauthorized), "Refused", "the registry refuses what it holds", "try the credentials of the sources of ImagePullSecret b-" + team + " by hand"},
		"no-such-image":  {fails(notFound), "ImageNotFound", "there is no such image", "check its name and tag"},
		"something-else": {fails(odd), "PullFailed", "a reason that is not about credentials", "see that error"},
	}
	admin := control.Kubeconfig()
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			c.create(t, name)
			e := explainJSON(t, admin, c.namespace+"/"+name, "--excluded-namespaces="+excluded)
			require.Empty(t, e.Unknown)
			require.Len(t, e.Containers, 1)
			got := e.Containers[0]
			require.Equal(t, c.cause, got.Cause, got.Why)
			require.Contains(t, got.Why, c.why)
			require.Contains(t, got.Next, c.next)
			if c.failed != "" {
				require.Equal(t, c.failed, got.Error, "the kubelet's last error")
			}
		})
	}

	t.Run("it came before its ServiceAccount named the Secret", func(t *testing.T) {
		e := explainJSON(t, admin, served+"/early")
		got := e.Containers[0]
		require.Equal(t, "AttachedLate", got.Cause)
		require.Contains(t, got.Why, "it came too early to get the name")
		require.Contains(t, got.Next, "delete the Pod and make it anew: it has no controller that would")
		r := got.Resources[0]
		require.Equal(t, "b-"+team, r.Name, "what the cause is about comes first")
		require.Equal(t, []string{"yes", "yes", "imps-pull-secret", "current", "yes"}, []string{r.Holds, r.Selected, r.Secret, r.SecretState, r.AccountNames})
		require.Equal(t, []string{"label"}, r.SelectedBy)
		require.False(t, r.PodNames)
		require.WithinDuration(t, time.Now(), *r.AttachedAt, time.Minute)
	})
	t.Run("it came after, and something has taken the name out", func(t *testing.T) {
		annotate("elder", `{"metadata":{"annotations":{"images.banzaicloud.io/attached":"imps-pull-secret","images.banzaicloud.io/attached-at":"2020-01-01T00:00:00Z"}},
			"imagePullSecrets":[{"name":"imps-pull-secret"}]}`)
		got := explainJSON(t, admin, served+"/late").Containers[0]
		require.Equal(t, "NameRemoved", got.Cause, got.Why)
		require.Contains(t, got.Next, "mutatingwebhookconfigurations")
	})
	t.Run("its ServiceAccount is to name the Secret, and does not", func(t *testing.T) {
		got := explainJSON(t, admin, served+"/resisting").Containers[0]
		require.Equal(t, "NotAttached", got.Cause, got.Why)
		require.Contains(t, got.Why, "ServiceAccount resisting is to name Secret imps-pull-secret, and does not")
		require.Contains(t, got.Next, "ServiceAccountsReady says why")
	})
	t.Run("people get a table", func(t *testing.T) {
		code, stdout, stderr := explain(t, admin, served+"/early")
		require.Zero(t, code, stderr)
		require.Regexp(t, `(?m)^CONTAINER +IMAGE +STATE +CAUSE$`, stdout)
		require.Regexp(t, `(?m)^app +r\.one/app +ImagePullBackOff +AttachedLate$`, stdout)
		require.Regexp(t, `(?m)^  next: delete the Pod`, stdout)
		require.Regexp(t, `(?m)^  the kubelet says, at \S+: Failed to pull image "r.one/app"`, stdout)
		require.Regexp(t, `(?m)^  b-`+team+` +yes +label +imps-pull-secret +current +no +since \S+ +AttachedLate$`, stdout)
		require.NotContains(t, stdout, "UNKNOWN")
	})
	t.Run("somebody who may see the namespace alone", func(t *testing.T) {
		name := "developer-" + team
		who := user(t, name)
		role := metav1.ObjectMeta{Name: name}
		_, err := client(t).RbacV1().Roles(served).Create(t.Context(), &rbacv1.Role{ObjectMeta: role, Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods", "secrets", "serviceaccounts", "events"}, Verbs: []string{"get", "list"}},
		}}, metav1.CreateOptions{})
		require.NoError(t, err)
		_, err = client(t).RbacV1().RoleBindings(served).Create(t.Context(), &rbacv1.RoleBinding{
			ObjectMeta: role, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: name},
			Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: name}},
		}, metav1.CreateOptions{})
		require.NoError(t, err)
		e := explainJSON(t, who, served+"/early")
		require.Equal(t, "AttachedLate", e.Containers[0].Cause)
		require.Equal(t, "b-"+team, e.Containers[0].Resources[0].Name, "the Secret's owner reference tells")
		require.Equal(t, "unknown", e.Containers[0].Resources[0].Selected)
		require.Len(t, e.Unknown, 2)
		require.Contains(t, e.Unknown[0], "cannot get Namespace "+served)
		require.Contains(t, e.Unknown[1], "cannot list ImagePullSecrets: forbidden; only those are known")
		require.Equal(t, "Unknown", explainJSON(t, who, served+"/unnamed").Containers[0].Cause)
	})
	t.Run("somebody who may see the Pod alone", func(t *testing.T) {
		who := user(t, "pods-"+team, rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}})
		e := explainJSON(t, who, served+"/refused")
		require.Equal(t, "Unknown", e.Containers[0].Cause)
		require.Equal(t, "ask somebody who may see what is unknown", e.Containers[0].Next)
		require.Len(t, e.Unknown, 5)
	})
	t.Run("a token that has expired", func(t *testing.T) {
		object := resourceOf(t, "b-"+team)
		secrets := core.Secrets(imps.RenderedNamespace)
		s, err := secrets.Get(t.Context(), impsync.RenderedName(object.UID), metav1.GetOptions{})
		require.NoError(t, err)
		rendered, err := impsync.DecodeRendered(s, impsync.FormatVersions())
		require.NoError(t, err)
		rendered.Expiries = map[string]time.Time{"r.one": time.Now().Add(-time.Minute)}
		s.Data, err = impsync.EncodeRendered(rendered)
		require.NoError(t, err)
		_, err = secrets.Update(t.Context(), s, metav1.UpdateOptions{})
		require.NoError(t, err)
		got := explainJSON(t, admin, served+"/refused").Containers[0]
		require.Equal(t, "TokenExpired", got.Cause)
		require.Contains(t, got.Why, "have expired at")
	})
	t.Run("a Secret that somebody has changed", func(t *testing.T) {
		_, err := core.Secrets(served).Patch(t.Context(), "imps-pull-secret", types.MergePatchType, []byte(`{"data":{".dockerconfigjson":"e30="}}`), metav1.PatchOptions{})
		require.NoError(t, err)
		got := explainJSON(t, admin, served+"/refused").Containers[0]
		require.Equal(t, "SecretStale", got.Cause)
	})
}

// What a node serves its kubelet is told, and what keeps it from that, where Pods name no Secret.
func TestExplainSaysWhatTheNodeServes(t *testing.T) {
	team := cluster.Prefix(t)
	served, unselected := control.Namespace(t, map[string]string{"team": team}), control.Namespace(t, nil)
	for scope, registry := range map[string]string{"Node": "r.one", "Namespace": "r.two"} {
		resource(t, `{name: `+strings.ToLower(scope)+`-`+team+`}`, `
  target:
    secret: {name: imps-pull-secret}
    namespaces: {labels: [{matchLabels: {team: `+team+`}}]}
    kubelet: {scope: `+scope+`}
  registry: {credentials: [{name: `+source(t, corev1.SecretTypeDockerConfigJson, dockerConfig(registry))+`, namespace: registry-access}]}`)
	}
	withCache, without, bare := team+"-cache", team+"-nocache", team+"-bare"
	require.NoError(t, control.Node(t.Context(), bare))
	start(t, "--duties=cluster", "--kubeconfig="+coordinatorKubeconfig(t))
	start(t, "--node-name="+withCache, "--kubeconfig="+agentKubeconfig(t, withCache), "--node-cache-dir="+filepath.Join(t.TempDir(), "imps"))
	start(t, "--node-name="+without, "--kubeconfig="+agentKubeconfig(t, without))

	refused := func(node, namespace, image string) puller {
		return puller{namespace: namespace, node: node, image: image, waiting: "ErrImagePull", message: "401 Unauthorized"}
	}
	admin := control.Kubeconfig()
	for name, c := range map[string]struct {
		puller
		cause, resource, scope, served, why string
	}{
		"of-the-node":      {refused(withCache, unselected, "r.one/app"), "NodeProvider", "node-", "Node", "yes", "these credentials for every Pod of the node"},
		"of-the-namespace": {refused(withCache, served, "r.two/app"), "NodeProvider", "namespace-", "Namespace", "yes", "these credentials for Pods of namespace " + served},
		"of-another":       {refused(withCache, unselected, "r.two/app"), "NotSelected", "namespace-", "Namespace", "no", "neither namespace " + unselected + " itself nor a Pod of it"},
		"without-cache":    {refused(without, served, "r.two/app"), "NodeNotServing", "namespace-", "Namespace", "no", "runs without --node-cache-dir"},
		"without-agent":    {refused(bare, unselected, "r.one/app"), "NodeNotServing", "node-", "Node", "no", "no agent reports from it"},
	} {
		t.Run(name, func(t *testing.T) {
			c.create(t, name)
			var e explained
			require.Eventually(t, func() bool { // until all is rendered, and reported
				e = explainJSON(t, admin, c.namespace+"/"+name)
				return e.Containers[0].Cause == c.cause
			}, patience, pause)
			require.Empty(t, e.Unknown)
			r := e.Containers[0].Resources[0]
			require.Equal(t, c.resource+team, r.Name)
			require.Equal(t, []string{c.scope, c.served}, []string{r.Kubelet.Scope, r.Kubelet.Served}, r.Kubelet.Why)
			require.Contains(t, r.Kubelet.Why, c.why)
		})
	}
	t.Run("people get a line", func(t *testing.T) {
		code, stdout, stderr := explain(t, admin, unselected+"/of-the-node")
		require.Zero(t, code, stderr)
		require.Regexp(t, `(?m)^  node-`+team+`, to the kubelet, scope Node: yes: the agent of node `+withCache+` says`, stdout)
	})
	t.Run("a kubelet before 1.34", func(t *testing.T) {
		_, err := client(t).CoreV1().Nodes().Patch(t.Context(), withCache, types.MergePatchType, []byte(`{"status":{"nodeInfo":{"kubeletVersion":"v1.33.9"}}}`), metav1.PatchOptions{}, "status")
		require.NoError(t, err)
		got := explainJSON(t, admin, served+"/of-the-namespace").Containers[0]
		require.Equal(t, "NodeNotServing", got.Cause)
		require.Contains(t, got.Why, "is v1.33.9: before 1.34")
	})
	t.Run("a report that is none", func(t *testing.T) {
		reports, name := client(t).CoreV1().ConfigMaps(systemNamespace), impsync.ReportName(bare)
		_, err := reports.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{impsync.ReportKey: "{}"}}, metav1.CreateOptions{})
		require.NoError(t, err)
		t.Cleanup(func() { _ = reports.Delete(cleanupContext(t), name, metav1.DeleteOptions{}) })
		e := explainJSON(t, admin, unselected+"/without-agent")
		require.Equal(t, "NotSelected", e.Containers[0].Cause)
		require.Equal(t, []string{"cannot read ConfigMap imps-system/" + name + ": node report: it names no node"}, e.Unknown)
	})
	t.Run("somebody who may not see nodes and their reports", func(t *testing.T) {
		who := user(t, "no-nodes-"+team,
			rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods", "secrets", "serviceaccounts", "events", "namespaces"}, Verbs: []string{"get", "list"}},
			rbacv1.PolicyRule{APIGroups: []string{v1alpha1.GroupVersion.Group}, Resources: []string{v1alpha1.Resource.Resource}, Verbs: []string{"list"}})
		e := explainJSON(t, who, served+"/of-the-namespace")
		require.Equal(t, "NotNamed", e.Containers[0].Cause)
		require.Equal(t, "unknown", e.Containers[0].Resources[0].Kubelet.Served)
		require.Equal(t, []string{
			"cannot get Node " + withCache + ": forbidden; whether its kubelet is new enough for the scope Namespace is unknown",
			"cannot get ConfigMap imps-system/imps-node-" + withCache + ": forbidden; whether the node serves its kubelet is unknown",
		}, e.Unknown)
	})
}

func TestExplainSaysWhatIsWrongWithTheQuestion(t *testing.T) {
	code, stdout, stderr := explain(t, control.Kubeconfig(), "default/nobody")
	require.Equal(t, 1, code)
	require.Empty(t, stdout)
	require.Equal(t, `imps-node: explain Pod default/nobody: pods "nobody" not found`+"\n", stderr)
	for _, arg := range []string{"web", "a/b/c", "/web", "shop/"} {
		code, _, stderr = explain(t, control.Kubeconfig(), arg)
		require.Equal(t, 1, code)
		require.Contains(t, stderr, `"`+arg+`" names no Pod: give it as NAMESPACE/NAME`)
	}
}

// A shell completes the Pods of the cluster.
func TestShellsCompletePods(t *testing.T) {
	namespace := control.Namespace(t, nil)
	puller{namespace: namespace, image: "r.one/app"}.create(t, "web-1")
	puller{namespace: namespace, image: "r.one/app"}.create(t, "db-1")
	for begun, want := range map[string]string{
		namespace[:len(namespace)-1]: namespace + "/\n:6\n", namespace + "/": namespace + "/db-1\n" + namespace + "/web-1\n:4\n", namespace + "/w": namespace + "/web-1\n:4\n",
	} {
		command := exec.CommandContext(t.Context(), binary, "__complete", "explain", "pod", "--kubeconfig="+control.Kubeconfig(), begun)
		out, err := command.Output()
		require.NoError(t, err)
		require.Equal(t, want, string(out))
	}
}
